"""What :mod:`intfa_cupy.reproduce` and :mod:`intfa_cupy.reproduce_speed` found, as tables and pictures."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from . import paper, records
from .bench import PEERS, label
from .bench_report import machine_lines
from .reproduce import FP8, METRICS, TableResult, TablesResult
from .reproduce_speed import AGAINST
from .tables import Column, Group, percent, print_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.console import Console

    from .reproduce_speed import SpeedResult

__all__ = [
    "print_speed",
    "print_tables",
    "short",
    "speed_figure",
    "speed_text",
    "tables_figure",
    "tables_text",
]

#: What the paper's rows are called, and which of ours they stand beside.
PAPER_NAMES = {"fp8": "paper: FP8", "half-int8": "paper: half-INT8", "paper-int8": "paper: full INT8"}


def short(n: int) -> str:
    """Return a length as the paper writes it: 4096 is 4k."""
    return f"{n // 1024}k" if n % 1024 == 0 else str(n)


def tables_text(result: TablesResult, width: int = 100) -> str:
    """Return what `print_tables` prints."""
    from rich.console import Console

    stream = io.StringIO()
    print_tables(
        Console(file=stream, width=width, color_system=None, highlight=False, force_jupyter=False), result
    )
    return stream.getvalue().rstrip("\n")


def print_tables(console: Console, result: TablesResult) -> None:
    """Print each table with the paper's figures in it, the reductions, and what the figures are."""
    for table in result.tables.values():
        _print_table(console, table)
    say = lambda line: console.print(line, markup=False)  # noqa: E731
    say(f"Errors against exact attention in float64, over all elements of {result.sample}.")
    say("  MRE        mean of |o - r| / (|r| + 1e-5): elements near zero decide it")
    say("  sum ratio  sum|o - r| / sum|r|          L2   ||o - r|| / ||r||")
    say("  +-         largest deviation of a seed from the mean of its length, in % of that mean")
    say("fp8-e5m2: unscaled, as in the paper's released benchmark. fp8-e4m3: one scale per head, as")
    say("FlashAttention-3. half-int8 and paper-int8: the paper's own; the rest are recipes of this library.")
    if result.queries is not None:
        say(f"{result.queries} queries of each head stand for all N; --full computes all.")
    by_backend: dict[str, list[str]] = {}
    for recipe, backend in result.backends.items():
        by_backend.setdefault(backend, []).append(recipe)
    for backend, recipes in by_backend.items():
        say(f"computed by {backend}: {', '.join(recipes)}")


def _print_table(console: Console, table: TableResult) -> None:
    best = table.nearest
    console.print(f"{table.paper.title}; d = {paper.HEAD_DIM}, full attention", style="bold", markup=False)
    say = lambda line: console.print(line, markup=False)  # noqa: E731
    say(f"{METRICS[best.metric]} in %, {_scores(best.scale)}")
    rows = [*table.paper.rows, *table.recipes]
    names = [*(PAPER_NAMES[r] for r in table.paper.rows), *table.recipes]
    count = len(table.paper.rows)

    def of_paper(row: str, n: int) -> str:
        printed = table.paper_error(row, n)
        return "-" if printed is None else percent(printed)

    by_length: Group = [
        Column(f"\n{short(n)}", [
            *(of_paper(r, n) for r in rows[:count]),
            *(percent(table.error(r, best.metric, n)) for r in rows[count:]),
        ])
        for n in table.lengths
    ]  # fmt: skip
    blank = ["-"] * count
    seeds = len(table.seeds(table.recipes[0], table.lengths[0], best.metric))
    spread = [
        *blank, *(f"{100 * table.spread(r, best.metric):.0f}" if seeds > 1 else "-" for r in table.recipes)
    ]  # fmt: skip
    by_length.append(Column("\n+-", spread))
    labels = {"mre": "mean\nMRE", "sum_ratio": "sum\nratio", "relative_l2": "\nL2"}
    means = [
        Column(labels[m], [*blank, *(percent(table.error(r, m)) for r in table.recipes)]) for m in METRICS
    ]
    print_table(console, Column("\n", names), [by_length, means], bold="int8")

    say("")
    ours = [r for r in table.recipes if r not in FP8]
    groups: list[Group] = []
    for fp8 in FP8:
        groups.append([
            Column(
                (f"vs {fp8.removeprefix('fp8-')}\n" if m == "mre" else "\n") + labels[m].split("\n")[-1],
                ["-", *(f"{100 * table.reduction(r, fp8, m):.0f}" for r in ours)],
            )
            for m in METRICS
        ])  # fmt: skip
    claim = Column("paper\nsays", [f"{100 * table.paper.claim:.0f}", *("-" for _ in ours)])
    say("% below FP8, mean over the lengths, by each metric")
    print_table(console, Column("\n", [PAPER_NAMES["paper-int8"], *ours]), [[claim], *groups], bold="int8")
    say("")
    say(f"Nearest to the paper's figures: {best}; off by a factor {best.factor:.2f} (geometric mean).")
    seen, ties = {(best.metric, best.fp8)}, table.ties()
    for d in table.definitions():
        if (d.metric, d.fp8) not in seen:
            seen.add((d.metric, d.fp8))
            say(f"  {d.factor:5.2f}  {d}{', which is as near' if d in ties else ''}")
    for verdict in table.verdicts():
        say(f"Claim: {verdict}.")
    say("")


def _scores(scale: float) -> str:
    return "scores as they are (softmax scale 1)" if scale == 1 else f"softmax scale 1/{1 / scale:g}"


def tables_figure(result: TablesResult) -> Figure:
    """Draw the errors by sequence length, a panel for each table, the paper's figures as crosses."""
    from . import plots

    figure = plots.new_figure(1.2 + 4.6 * len(result.tables), 5.2)
    axes = figure.subplots(1, len(result.tables), squeeze=False)[0]
    for ax, table in zip(axes, result.tables.values(), strict=True):
        _table_panel(ax, table)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8.5, frameon=False)
    figure.suptitle("INT-FlashAttention's tables: crosses are the paper's figures, lines ours", fontsize=11)
    return figure


#: Line of each row; the colour says the family of number formats, as in the other pictures.
_LINES = {
    "fp8-e5m2": "^-", "fp8-e4m3": "v--", "half-int8": "s-", "half-int8-plus": "D--",
    "paper-int8": "P-", "int8-fast": "o:", "int8": "o-",
}  # fmt: skip


def _table_panel(ax: Axes, table: TableResult) -> None:
    from . import plots

    metric = table.nearest.metric
    for recipe in table.recipes:
        means = [100 * table.error(recipe, metric, n) for n in table.lengths]
        by_seed = [[100 * e for e in table.seeds(recipe, n, metric)] for n in table.lengths]
        spread = [
            [m - min(s) for m, s in zip(means, by_seed, strict=True)],
            [max(s) - m for m, s in zip(means, by_seed, strict=True)],
        ]
        color = plots.BLUE if recipe.startswith("int8") else plots.recipe_color(recipe)
        if recipe == "paper-int8":
            color = plots.ORANGE
        ax.errorbar(
            table.lengths, means, yerr=spread, fmt=_LINES.get(recipe, "x-"), color=color, label=recipe,
            markersize=5, linewidth=1.3, capsize=2,
        )  # fmt: skip
    colors = {"fp8": plots.VERMILION, "half-int8": plots.GREEN, "paper-int8": plots.ORANGE}
    for row in table.paper.rows:
        points = [(n, table.paper_error(row, n)) for n in table.lengths]
        known = [(n, 100 * e) for n, e in points if e is not None]
        if known:
            ax.plot(
                *zip(*known, strict=True), "x", color=colors[row], markersize=8, mew=2, label=PAPER_NAMES[row]
            )
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xticks(table.lengths, [short(n) for n in table.lengths])
    ax.yaxis.set_major_locator(plots.LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(plots.FuncFormatter(lambda y, _: f"{y:g}"))
    ax.yaxis.set_minor_formatter(plots.NullFormatter())
    ax.set_xlabel("sequence length N")
    ax.set_ylabel(f"{METRICS[metric]} (%)")
    ax.set_title(f"{table.paper.title}\n{_scores(table.nearest.scale)}", fontsize=9.5)
    ax.grid(alpha=0.3, which="both")


def speed_text(result: SpeedResult, width: int = 100) -> str:
    """Return what `print_speed` prints."""
    from rich.console import Console

    stream = io.StringIO()
    print_speed(
        Console(file=stream, width=width, color_system=None, highlight=False, force_jupyter=False), result
    )
    return stream.getvalue().rstrip("\n")


def print_speed(console: Console, result: SpeedResult) -> None:
    """Print times and the time saved against our FP16 and FlashAttention-2, beside the paper's."""
    say = lambda line: console.print(line, markup=False)  # noqa: E731
    shape = result.shapes[0]
    console.print(
        f"Speed: B = {shape.B}, H = {shape.H}, d = {shape.D}, full attention", style="bold", markup=False
    )
    if result.recorded:
        say(f"A recorded run, not of this machine: {records.freshness('speed')}")
    for line in machine_lines(result.machine):
        say(line)
    names = [*result.labels, *result.missing]
    times = [
        Column(short(n), [_milliseconds(result.milliseconds(c, n)) for c in names]) for n in result.lengths
    ]
    say("\nms, kernel alone (inputs quantised already)")
    print_table(console, Column("", names), [times])
    whole = [c for c in result.labels if c not in PEERS]
    if whole:
        times = [
            Column(short(n), [_milliseconds(result.milliseconds(c, n, quantise=True)) for c in whole])
            for n in result.lengths
        ]
        say("\nms, whole call: from float16 inputs, quantiser included")
        print_table(console, Column("", whole), [times])
    for against, title in AGAINST.items():
        say(f"\n% of the time saved against {title}")
        if not any(result.saved(c, n, against) is not None for c in result.labels for n in result.lengths):
            say("  not measured")
            continue
        printed = [paper.SPEED.saved.get(n) for n in result.lengths]
        columns = [
            Column(short(n), [_saved(p), *(_saved(result.saved(c, n, against)) for c in result.labels)])
            for n, p in zip(result.lengths, printed, strict=True)
        ]
        first = f"paper, {paper.SPEED.card}: full INT8"
        print_table(console, Column("", [first, *result.labels]), [columns])
    say("\nThe paper sets its full INT8 kernel against a FlashAttention in FP16, both in Triton; its figures")
    say("stand in both tables. Medians of single launches, L2 overwritten before each, contestants in turn.")
    for verdict in result.verdicts():
        say(f"Claim: {verdict}.")
    for reason, contestants in result.bench.reasons().items():
        say(f"{', '.join(contestants)}: not measured: {reason}")


def _milliseconds(x: float | None) -> str:
    return "-" if x is None else f"{x:#.3g}".rstrip(".")


def _saved(x: float | None) -> str:
    return "-" if x is None else f"{round(100 * x)}"  # an integer has no -0


def speed_figure(result: SpeedResult) -> Figure:
    """Draw the times as bars and the time saved as lines, the paper's figures as crosses."""
    from . import plots

    figure = plots.new_figure(12.5, 5.2)
    bars, lines = figure.subplots(1, 2, width_ratios=(1.5, 1))
    contestants = result.labels
    styles = _speed_styles(result)
    places = range(len(result.lengths))
    width = 0.86 / max(1, len(contestants))
    for i, name in enumerate(contestants):
        shown = [(x, result.milliseconds(name, n)) for x, n in zip(places, result.lengths, strict=True)]
        known = [(x + (i - (len(contestants) - 1) / 2) * width, ms) for x, ms in shown if ms is not None]
        color, other, _ = styles[name]
        hatch = "///" if name in PEERS else "..." if other else None
        bars.bar(*zip(*known, strict=True), width, color=color, hatch=hatch, edgecolor="white", label=name)
    bars.set_yscale("log")
    bars.yaxis.set_major_formatter(plots.FuncFormatter(lambda y, _: f"{y:g}"))
    bars.set_xticks(list(places), [short(n) for n in result.lengths])
    bars.set_xlabel("sequence length N")
    bars.set_ylabel("time of one launch (ms)")
    bars.set_title("kernel alone", fontsize=10)
    bars.grid(axis="y", alpha=0.3)
    bars.set_axisbelow(True)
    against = "fp16" if label("fp16", result.skeleton) in contestants else PEERS[1]
    for name in contestants:
        saved = [(n, result.saved(name, n, against)) for n in result.lengths]
        points = [(n, 100 * s) for n, s in saved if s is not None]
        if points and name not in PEERS:
            color, _, line = styles[name]
            lines.plot(*zip(*points, strict=True), line, color=color, markersize=5)
    known = [(n, 100 * paper.SPEED.saved[n]) for n in result.lengths if n in paper.SPEED.saved]
    if known:
        text = f"paper, {paper.SPEED.card}: full INT8"
        lines.plot(*zip(*known, strict=True), "x", color="black", markersize=8, mew=2, label=text)
    lines.plot(
        [], [], "o-", color=plots.GREY, markersize=5, label=f"{result.skeleton}, common to all formats"
    )
    if any(other for name, (_, other, _) in styles.items() if name not in PEERS):
        lines.plot([], [], "s--", color=plots.GREY, markersize=5, label='the kernel of backend="auto"')
    lines.axhline(0, color="black", linewidth=0.8)
    lines.set_xscale("log", base=2)
    lines.set_xticks(result.lengths, [short(n) for n in result.lengths])
    lines.set_xlabel("sequence length N")
    lines.set_ylabel("time saved (%)")
    lines.set_title(f"against {AGAINST[against]}", fontsize=10)
    lines.grid(alpha=0.3)
    handles, names = (
        [*a, *b]
        for a, b in zip(bars.get_legend_handles_labels(), lines.get_legend_handles_labels(), strict=True)
    )
    figure.legend(handles, names, loc="outside lower center", ncols=5, fontsize=8.5, frameon=False)
    when = f"{result.machine['gpu']}, {result.machine['date']}"
    figure.suptitle(
        f"Attention at B = {result.shapes[0].B}, H = {result.shapes[0].H}, d = {result.shapes[0].D}; {when}",
        fontsize=11,
    )
    return figure


#: Past the seven of the palette, for all recipes to differ; and the peers.
_MORE_COLORS = ("#332288", "#882255", "#999933", "#117733")
_PEER_COLORS = dict(zip(PEERS, ("#444444", "#bbbbbb"), strict=True))


def _speed_styles(result: SpeedResult) -> dict[str, tuple[str, bool, str]]:
    """Return each contestant's colour, that of its recipe; whether its kernel is another one; its line."""
    from . import plots

    colors = iter((*plots.COLORS, *_MORE_COLORS) * 3)
    of_recipe: dict[str, str] = {}
    styles = {}
    for name in result.labels:
        if name in PEERS:
            styles[name] = (_PEER_COLORS[name], True, "x-")
            continue
        recipe = name.partition(" (")[0]
        color = of_recipe.get(recipe) or of_recipe.setdefault(recipe, next(colors))
        other = name != label(recipe, result.skeleton)
        styles[name] = (color, other, "s--" if other else "o-")
    return styles
