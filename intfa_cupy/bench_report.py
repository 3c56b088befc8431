"""What :mod:`intfa_cupy.bench` measured, as a table and as a picture."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .bench import PEERS, BenchResult, Row, Shape, label
from .tables import Column, Group, percent

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Console

__all__ = ["bench_figure", "markdown", "print_bench"]


def _label(row: Row) -> str:
    if row.stage == "peer":
        return row.name
    what = {"kernel": "", "with quantisation": " + quantise", "quantisation": ", quantise only"}[row.stage]
    return label(row.name, row.backend) + what


def _ratio(row: Row, peer: str) -> str:
    return f"{row.ratios[peer]:.2f}" if peer in row.ratios else "-"


def _groups(rows: list[Row]) -> list[Group]:
    quantiser = [row.stage == "quantisation" for row in rows]
    tops = ["-" if q else f"{r.tops:,.0f}" for r, q in zip(rows, quantiser, strict=True)]
    peak = [
        "-" if math.isnan(r.peak) else f"{100 * r.peak:.0f}{'*' if q else ''}"
        for r, q in zip(rows, quantiser, strict=True)
    ]
    # Bytes that a call reads; the quantiser's alone are in the row of the call that contains it.
    mib = ["-" if q else f"{r.nbytes / 2**20:.0f}" for r, q in zip(rows, quantiser, strict=True)]
    part = [f"{100 * r.nbytes / r.shape.fp16_bytes:.0f}" for r in rows]
    part = ["-" if q else text for q, text in zip(quantiser, part, strict=True)]
    return [
        [
            Column("time\nms", [f"{r.milliseconds:.3f}" for r in rows]),
            Column("10-90 %\nms", [f"{r.low:.3f}-{r.high:.3f}" for r in rows]),
        ],
        [
            Column("\nTOPS", tops),
            Column("% of\npeak", peak),
        ],
        [
            Column("x\ncuDNN", [_ratio(r, PEERS[0]) for r in rows]),
            Column("x\nFA2", [_ratio(r, PEERS[1]) for r in rows]),
        ],
        [
            Column("L2 error\n%", ["-" if r.error is None else percent(r.error) for r in rows]),
            Column("Q,K,V\nMiB", mib),
            Column("% of\nfp16", part),
        ],
    ]  # fmt: skip


def machine_lines(machine: dict[str, Any]) -> list[str]:
    """Return the machine in words."""
    peak = machine["int8_peak_tops"]
    return [
        f"{machine['gpu']}, {machine['date']}: {machine['sms']} SMs at up to {machine['clock_MHz']:.0f} MHz, "
        f"INT8 peak {'unknown' if peak is None else f'{peak:,.0f} TOPS'}, "
        f"copy {machine['copy_TBps']:.2f} TB/s",
        f"NVRTC {machine['nvrtc']}, CuPy {machine['cupy']}, intfa-cupy {machine['intfa_cupy']}, "
        f"kernel sources {machine['kernel_sources'][:12]}",
    ]


def print_bench(console: Console, result: BenchResult) -> None:
    """Print one table for each shape, and what the columns mean."""
    from .tables import print_table

    for line in machine_lines(result.machine):
        console.print(line, markup=False)
    for shape in result.shapes():
        rows = [row for row in result.rows if row.shape == shape]
        console.print(f"\n{shape}", style="bold", markup=False)
        print_table(console, Column("\n", [_label(row) for row in rows]), _groups(rows))
    console.print(
        "\nMedians of single launches with the L2 cache overwritten before each, all contestants in turn.\n"
        "TOPS: 4 B H D for each visible pair, over time. % of peak: of the INT8 tensor cores at the\n"
        "highest clock; * of the measured copy bandwidth. x: speed over that peer in this run, kernel or\n"
        "end to end as the row says. L2 error: 64 rows against float64. Q,K,V: bytes that the row reads,\n"
        "scales included. Peers take bfloat16 and need no quantiser.",
        markup=False,
    )
    for reason, contestants in result.reasons().items():
        console.print(f"{', '.join(contestants)}: not measured: {reason}", markup=False)


def markdown(result: BenchResult, recipe: str, stage: str, peer: str) -> str:
    """Return a Markdown table of a recipe's TOPS and ratio to a peer, by head dimension and length."""
    rows = {row.shape: row for row in result.rows if row.name == recipe and row.stage == stage}
    columns = sorted({(s.causal, s.N) for s in rows})
    lines = [
        "| | " + " | ".join(f"{'causal ' if causal else ''}{N // 1024}k" for causal, N in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for D in sorted({s.D for s in rows}):
        cells = []
        for causal, N in columns:
            row = next((r for s, r in rows.items() if (s.D, s.causal, s.N) == (D, causal, N)), None)
            cells.append("" if row is None else f"{row.tops:,.0f} ({_ratio(row, peer)}x)")
        lines.append(f"| d = {D} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def bench_figure(result: BenchResult) -> Figure:
    """Draw TOPS by sequence length: a panel for each head dimension and mask, a line for each contestant."""
    from . import plots

    panels = list(dict.fromkeys((s.D, s.causal) for s in result.shapes()))
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure = plots.new_figure(4.4 * columns, 3.4 * lines + 0.6)
    axes = figure.subplots(lines, columns, squeeze=False)
    styles = _styles(result, plots.COLORS)
    for ax, (D, causal) in zip(axes.flat, panels, strict=False):
        for name, (color, line) in styles.items():
            points = sorted(
                (r.shape.N, r.tops)
                for r in result.rows
                if _label(r) == name and (r.shape.D, r.shape.causal) == (D, causal)
            )
            if points:
                ax.plot(*zip(*points, strict=True), line, color=color, label=name, markersize=5)
        ax.set_title(f"d = {D}{', causal' if causal else ''}", fontsize=10)
        ax.set_xscale("log", base=2)
        lengths = sorted({s.N for s in result.shapes() if (s.D, s.causal) == (D, causal)})
        ax.set_xticks(lengths, [_short(n) for n in lengths])
        ax.set_ylim(bottom=0)
        ax.set_xlabel("sequence length")
        ax.set_ylabel("TOPS")
        ax.grid(alpha=0.3)
    for ax in list(axes.flat)[len(panels) :]:
        ax.set_visible(False)
    handles, labels = _legend(axes)
    figure.legend(
        handles, labels, loc="outside lower center", ncols=min(3, len(labels)), fontsize=8, frameon=False
    )
    figure.suptitle(f"Attention on {result.machine['gpu']}, kernel only", fontsize=11)
    return figure


def _styles(result: BenchResult, palette: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Return each contestant's colour, which is its recipe's, and line, which is its kernel's."""
    own = [r for r in result.rows if r.stage == "kernel"]
    colors = dict(zip(dict.fromkeys(r.name for r in own), itertools.cycle(palette), strict=False))
    lines = dict(
        zip(dict.fromkeys(r.backend for r in own), itertools.cycle(("o-", "^-.", "v:")), strict=False)
    )
    styles = {_label(r): (colors[r.name], lines[r.backend]) for r in own}
    greys = dict(zip(PEERS, ("black", "#999999"), strict=True))
    return {**styles, **{r.name: (greys[r.name], "s--") for r in result.rows if r.stage == "peer"}}


def _legend(axes: Any) -> tuple[list[Any], list[str]]:
    found: dict[str, Any] = {}
    for ax in axes.flat:
        for handle, name in zip(*ax.get_legend_handles_labels(), strict=True):
            found.setdefault(name, handle)
    return list(found.values()), list(found)


def _short(n: int) -> str:
    return f"{n // 1024}k" if n % 1024 == 0 else str(n)


def shape_from_text(text: str) -> Shape:
    """Read ``B,H,N,D`` or ``B,H,N,D,causal``.

    Raises
    ------
    ValueError
        Not of that form.
    """
    parts = text.split(",")
    if len(parts) not in (4, 5) or (len(parts) == 5 and parts[4] != "causal"):
        raise ValueError(f"a shape is B,H,N,D or B,H,N,D,causal; got {text!r}")
    try:
        B, H, N, D = (int(p) for p in parts[:4])
    except ValueError:
        raise ValueError(f"a shape is B,H,N,D or B,H,N,D,causal in whole numbers; got {text!r}") from None
    if min(B, H, N, D) < 1 or D > 256:
        raise ValueError(f"B, H, N and D must be at least 1 and D at most 256; got {text!r}")
    return Shape(B, H, N, D, len(parts) == 5)
