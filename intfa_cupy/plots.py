"""Pictures. Figures are made without pyplot: no global state, no window, any thread."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from .tables import percent

if TYPE_CHECKING:
    from .compare import Comparison, Layer

__all__ = ["COLORS", "compare_figure", "new_figure", "recipe_color", "save"]

# Okabe and Ito's palette, told apart under every common colour blindness.
BLUE, ORANGE, GREEN, VERMILION, SKY, PURPLE, GREY = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#767676",
)  # fmt: skip
COLORS = (BLUE, ORANGE, GREEN, VERMILION, SKY, PURPLE, GREY)

#: What a recipe's numbers are, which is what its colour says.
_FAMILIES = {
    "fully INT8": (BLUE, "o"),
    "INT8 Q, K with fp16 P, V": (GREEN, "s"),
    "INT4": (PURPLE, "D"),
    "FP8": (VERMILION, "^"),
    "fp16": (GREY, "v"),
}

#: More layers than this share one panel.
_MOST_PANELS = 6


def _family(recipe: str) -> str:
    from .recipes import get_recipe

    r = get_recipe(recipe)
    if r.q_format in ("e4m3", "e5m2"):
        return "FP8"
    if r.q_format == "fp16":
        return "fp16"
    if "int4" in (r.q_format, r.k_format):
        return "INT4"
    return "fully INT8" if r.integer_p else "INT8 Q, K with fp16 P, V"


def recipe_color(recipe: str) -> str:
    """Return the colour of a named recipe: one for each family of number formats."""
    return _FAMILIES[_family(recipe)][0]


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure, in inches, that draws through Agg."""
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: str | Path) -> None:
    """Write a figure as PNG, whatever the file is called."""
    figure.savefig(path, format="png", dpi=150)


def compare_figure(result: Comparison) -> Figure:
    """Draw a comparison: every head's error by recipe and layer, and the bytes of the inputs.

    Parameters
    ----------
    result : Comparison
        Of :func:`intfa_cupy.compare.compare`.

    Returns
    -------
    matplotlib.figure.Figure
    """
    layers = list(result.layers)
    pooled = len(layers) > _MOST_PANELS
    panels = 1 if pooled else len(layers)
    # The panel of bytes is the last; up to four stand in one line.
    columns = panels + 1 if panels < 4 else 3
    lines = -(-(panels + 1) // columns)
    figure = new_figure(1.6 + 3.3 * columns, 0.9 + (0.6 + 0.3 * len(result.order)) * lines)
    figure.suptitle(result.title, fontsize=11)
    grid = figure.subplots(lines, columns, squeeze=False)
    spread = [h.relative_l2 for layer in layers for row in layer.rows.values() for h in row.errors.heads]
    positive = [e for e in spread if e > 0]
    limits = (100 * min(positive) / 2.5, 100 * max(positive) * 1.6) if positive else (1e-3, 1e2)
    for n in range(panels):
        shown = layers if pooled else [layers[n]]
        _error_panel(grid.flat[n], result, shown, limits, names=n % columns == 0)
    _bytes_panel(grid.flat[panels], result, names=panels % columns == 0)
    for ax in grid.flat[panels + 1 :]:
        ax.set_axis_off()
    present = {_family(r): None for r in result.order}
    handles = [
        Line2D([], [], linestyle="none", marker=_FAMILIES[f][1], color=_FAMILIES[f][0], label=f)
        for f in present
    ]
    handles.append(
        Line2D([], [], linestyle="none", marker="|", markersize=11, mew=2, color="black", label="mean")
    )
    figure.legend(
        handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8.5, frameon=False
    )
    return figure


def _error_panel(
    ax: Axes, result: Comparison, layers: list[Layer], limits: tuple[float, float], *, names: bool
) -> None:
    for y, recipe in enumerate(result.order):
        color, marker = _FAMILIES[_family(recipe)]
        errors = 100 * np.array([h.relative_l2 for layer in layers for h in layer.rows[recipe].errors.heads])
        errors = np.maximum(errors, limits[0])  # an exact head stands at the left edge
        ax.plot(errors, np.full(len(errors), y), marker, color=color, markersize=5, alpha=0.45, mew=0)
        mean = 100 * np.mean([layer.rows[recipe].errors.mean for layer in layers])
        ax.plot([mean], [y], "|", color="black", markersize=13, mew=2)
        ax.annotate(
            f"{percent(mean / 100)} %",
            (mean, y),
            xytext=(0, 7),
            textcoords="offset points",
            ha="center",
            fontsize=7.5,
        )
    ax.set_xscale("log")
    ax.set_xlim(*limits)
    ax.set_xlabel("relative L2 error of each head (%)")
    if limits[1] < 50 * limits[0]:
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    _rows(ax, result, names)
    name = layers[0].name if len(layers) == 1 else f"all {len(layers)} layers"
    note = layers[0].note if len(layers) == 1 else ""
    ax.set_title(name + (f"\n{note}" if note else ""), fontsize=9.5)
    ax.grid(True, axis="x", color="#dddddd", linewidth=0.7)


def _bytes_panel(ax: Axes, result: Comparison, *, names: bool) -> None:
    for y, recipe in enumerate(result.order):
        rows = [layer.rows[recipe] for layer in result.layers]
        stored = sum(row.input_bytes for row in rows)
        share = 100 * stored / sum(row.fp16_bytes for row in rows)
        ax.barh(y, share, height=0.62, color=recipe_color(recipe), alpha=0.75)
        ax.annotate(
            f"{share:.0f} %", (share, y), xytext=(3, 0), textcoords="offset points", va="center", fontsize=7.5
        )
    ax.set_xlim(0, 118)
    ax.set_xlabel("bytes of Q, K and V, scales included\n(% of fp16)")
    _rows(ax, result, names)
    ax.set_title("size of the inputs", fontsize=9.5)
    ax.grid(True, axis="x", color="#dddddd", linewidth=0.7)


def _rows(ax: Axes, result: Comparison, names: bool) -> None:
    """The recipes from top to bottom, the most accurate first."""
    ax.set_yticks(range(len(result.order)), result.order if names else [""] * len(result.order))
    ax.set_ylim(len(result.order) - 0.5, -0.7)
    ax.tick_params(labelsize=8.5)
    ax.set_axisbelow(True)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
