"""Tables for terminals of any width: columns in groups, split over several tables where they do not fit."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

__all__ = ["Column", "Group", "percent", "print_table", "span", "stdout_console"]

#: Width when the output is no terminal: a file or a pipe wants whole lines.
_PIPE_WIDTH = 200


@dataclass(frozen=True)
class Column:
    """A heading (lines separated by newlines) and its cells."""

    heading: str
    cells: Sequence[str]


Group = list[Column]


def percent(x: float) -> str:
    """Return a fraction in per cent with three significant digits, without the sign."""
    if x != x:
        return "-"
    value = 100 * x
    return f"{value:,.0f}" if abs(value) >= 999.5 else f"{value:#.3g}".rstrip(".")


def span(fractions: Sequence[float]) -> str:
    """Return the smallest and the largest of some fractions in whole per cent, as one if they are equal."""
    low, high = (f"{100 * x:.0f}" for x in (min(fractions), max(fractions)))
    return f"{low} %" if low == high else f"{low} to {high} %"


def stdout_console() -> Console:
    """Return a console on standard output that never wraps a table's line into the next when piped."""
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal and not os.environ.get("COLUMNS"):
        console = Console(highlight=False, width=_PIPE_WIDTH)
    return console


def print_table(console: Console, names: Column, groups: Sequence[Group], *, bold: str | None = None) -> None:
    """Print a table of numbers.

    Parameters
    ----------
    console : rich.console.Console
        Its width decides whether the groups stand side by side or in several tables.
    names : Column
        The first column, repeated in every table.
    groups : sequence of list of Column
        Columns that stay together as long as a group alone fits.
    bold : str, optional
        The row, by its name, to print in bold.
    """
    for spacing in (2, 1):
        table = _table(names, [c for g in groups for c in g], spacing, bold)
        if _width(console, table) <= console.width:
            console.print(table)
            return
    part: Group = []
    for group in groups:
        for unit in [group] if _fits(console, names, group) else [[column] for column in group]:
            if part and not _fits(console, names, part + unit):
                console.print(_table(names, part, 2, bold))
                part = []
            part = part + unit
    if part:
        console.print(_table(names, part, 2, bold))


def _fits(console: Console, names: Column, columns: Group) -> bool:
    return _width(console, _table(names, columns, 2, None)) <= console.width


def _width(console: Console, table: Table) -> int:
    # Measured without a limit: within one, rich reports what is left after squeezing.
    return table.__rich_measure__(console, console.options.update(width=10_000)).maximum


def _table(names: Column, columns: Group, spacing: int, bold: str | None) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, spacing - 1, 0, 0), pad_edge=False, show_edge=False)
    table.add_column(names.heading, no_wrap=True, vertical="bottom")
    for column in columns:
        table.add_column(column.heading, justify="right", no_wrap=True)
    for i, name in enumerate(names.cells):
        table.add_row(name, *(c.cells[i] for c in columns), style="bold" if name == bold else None)
    return table
