"""The paper's tables of errors, computed again over all elements and several seeds, beside our recipes.

The paper leaves open what its error is, which FP8 it sets itself against and by what factor the scores
enter the softmax. `tables` therefore computes every combination and names the one that comes
nearest to the printed figures; `TablesResult.verdicts` says under which of them the paper's claim holds.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from . import arrays, dispatch, gpu, paper
from .api import attention
from .dispatch import UnsupportedError
from .metrics import ErrorReport, error_report
from .problem import Problem, shape_of_qkv
from .recipes import get_recipe
from .reference import attention_float64
from .tables import span

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["FP8", "METRICS", "QUERIES", "RECIPES", "Definition", "TableResult", "TablesResult", "tables"]

#: What "FP8" may mean: unscaled e5m2, as the paper's released benchmark has it, and e4m3 with one
#: scale per head, as FlashAttention-3 has it.
FP8 = ("fp8-e5m2", "fp8-e4m3")
#: The rows of a table: what the paper compares (its FP8 in both meanings), then our recipes.
RECIPES = (*FP8, "half-int8", "paper-int8", "half-int8-plus", "int8-fast", "int8")
#: What "mean relative error" may mean; fields of `ErrorReport`, with what to call them.
METRICS = {"mre": "MRE", "sum_ratio": "sum|e| / sum|r|", "relative_l2": "relative L2"}
#: What the scores may be multiplied by: 1 / sqrt(64), and nothing.
SCALES = (1 / math.sqrt(paper.HEAD_DIM), 1.0)
#: Queries per head unless ``full``. All keys are there either way, and a row of the output needs no other.
QUERIES = 512
#: A claimed reduction counts as reproduced from this much below it.
_TOLERANCE = 0.03
#: Readings this near to each other are not told apart: another seed may turn them round.
_TIE = 1.05


@dataclass(frozen=True)
class Definition:
    """One reading of the paper's figures, and how far from them it comes.

    Parameters
    ----------
    metric : str
        A key of `METRICS`.
    fp8 : str
        One of `FP8`.
    scale : float
        Factor of the scores.
    factor : float
        Typical ratio of our figure to the paper's or the reverse: exp of the mean of ``|log(ours / paper)|``
        over FP8, half-INT8 and full INT8 and all lengths.
    """

    metric: str
    fp8: str
    scale: float
    factor: float

    def __str__(self) -> str:
        return f"{METRICS[self.metric]}, {self.fp8}, {_scale_name(self.scale)}"


def _scale_name(scale: float) -> str:
    return "scores unscaled" if scale == 1 else f"scores / {1 / scale:g}"


@dataclass(frozen=True)
class TableResult:
    """One of the paper's tables.

    Parameters
    ----------
    name : str
        A key of `paper.TABLES`.
    lengths : tuple of int
    errors : dict
        ``errors[scale][recipe][N]`` holds an `ErrorReport` for each seed.
    """

    name: str
    lengths: tuple[int, ...]
    errors: dict[float, dict[str, dict[int, tuple[ErrorReport, ...]]]] = field(repr=False)

    @property
    def paper(self) -> paper.PaperTable:
        """PaperTable : what the paper prints."""
        return paper.TABLES[self.name]

    @property
    def recipes(self) -> tuple[str, ...]:
        """tuple of str : the rows."""
        return tuple(next(iter(self.errors.values())))

    def paper_error(self, row: str, length: int) -> float | None:
        """Return the paper's figure, or None for a length that it does not have."""
        return dict(zip(paper.LENGTHS, self.paper.rows[row], strict=True)).get(length)

    def seeds(self, recipe: str, length: int, metric: str, scale: float | None = None) -> list[float]:
        """Return an error by seed; at the scale of the nearest definition unless one is given."""
        scale = self.nearest.scale if scale is None else scale
        return [getattr(report, metric) for report in self.errors[scale][recipe][length]]

    def error(self, recipe: str, metric: str, length: int | None = None, scale: float | None = None) -> float:
        """Return the mean over the seeds, of one length or of all."""
        lengths = self.lengths if length is None else (length,)
        return statistics.fmean(x for n in lengths for x in self.seeds(recipe, n, metric, scale))

    def spread(self, recipe: str, metric: str) -> float:
        """Return the largest deviation of a seed from the mean of its length, as part of that mean."""
        return max(
            abs(x / self.error(recipe, metric, n) - 1)
            for n in self.lengths
            for x in self.seeds(recipe, n, metric)
        )

    def definitions(self) -> list[Definition]:
        """Return every reading of the paper's figures, the nearest first."""
        found = []
        for scale, metric, fp8 in itertools.product(self.errors, METRICS, FP8):
            apart = []
            for row in self.paper.rows:
                for n in self.lengths:
                    printed = self.paper_error(row, n)
                    if printed is not None:
                        ours = self.error(fp8 if row == "fp8" else row, metric, n, scale)
                        apart.append(abs(math.log(ours / printed)))
            if apart:
                found.append(Definition(metric, fp8, scale, math.exp(statistics.fmean(apart))))
        if not found:  # none of the paper's lengths: the metric that its released code names
            found = [Definition("mre", FP8[0], next(iter(self.errors)), math.nan)]
        return sorted(found, key=lambda d: d.factor)

    @cached_property
    def nearest(self) -> Definition:
        """Definition : the reading that comes nearest to the paper's figures."""
        return self.definitions()[0]

    def ties(self) -> list[Definition]:
        """Return the readings that come as near to the paper's figures as `nearest`, within 5 %."""
        return [d for d in self.definitions()[1:] if d.factor < _TIE * self.nearest.factor]

    def reduction(self, recipe: str, fp8: str, metric: str) -> float:
        """Return how far a recipe's error is below an FP8's: 0.82 is 82 % below. Mean over the lengths."""
        return 1 - self.error(recipe, metric) / self.error(fp8, metric)

    def verdicts(self) -> Iterator[str]:
        """Yield in words under which definitions the paper's claim holds, for its full INT8 and ours."""
        claim = self.paper.claim
        for recipe in [r for r in ("paper-int8", "int8-fast", "int8") if r in self.recipes]:
            holds, fails = [], []
            for fp8 in FP8:
                reductions = [self.reduction(recipe, fp8, metric) for metric in METRICS]
                reached = [r >= claim - _TOLERANCE for r in reductions]
                if all(reached):
                    holds.append(f"against {fp8} ({span(reductions)})")
                elif not any(reached):
                    fails.append(f"against {fp8} ({span(reductions)})")
                else:
                    names = {True: holds, False: fails}
                    for metric, ok, r in zip(METRICS, reached, reductions, strict=True):
                        names[ok].append(f"against {fp8} by {METRICS[metric]} ({100 * r:.0f} %)")
            text = f"{recipe} {100 * claim:.0f} % below FP8: "
            if holds and fails:
                text += f"only {', '.join(holds)}; not {', '.join(fails)}"
            elif holds:
                text += f"holds {' and '.join(holds)}"
            else:
                text += f"does not hold {' nor '.join(fails)}"
            yield text

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON; errors as fractions."""
        return {
            "name": self.name,
            "title": self.paper.title,
            "lengths": list(self.lengths),
            "paper": {row: [self.paper_error(row, n) for n in self.lengths] for row in self.paper.rows},
            "paper_claim": self.paper.claim,
            "nearest": vars(self.nearest) | {"factor": _finite(self.nearest.factor)},
            "definitions": [vars(d) | {"factor": _finite(d.factor)} for d in self.definitions()],
            "ties": len(self.ties()),
            "verdicts": list(self.verdicts()),
            "reductions": {
                recipe: {fp8: {m: self.reduction(recipe, fp8, m) for m in METRICS} for fp8 in FP8}
                for recipe in self.recipes
                if recipe not in FP8
            },
            "errors": [
                {
                    "scale": scale,
                    "recipe": recipe,
                    "N": n,
                    "seeds": [report.as_dict() for report in reports],
                }
                for scale, rows in self.errors.items()
                for recipe, by_length in rows.items()
                for n, reports in by_length.items()
            ],
        }


def _finite(x: float) -> float | None:
    return x if math.isfinite(x) else None


@dataclass(frozen=True)
class TablesResult:
    """What `tables` found.

    Parameters
    ----------
    tables : dict of str to TableResult
        By ``"table1"`` and ``"table2"``.
    seeds, heads : int
    queries : int or None
        Queries per head; None where all N were computed.
    backends : dict of str to str
        What computed each recipe.
    """

    tables: dict[str, TableResult]
    seeds: int
    heads: int
    queries: int | None
    backends: dict[str, str]

    def __getitem__(self, name: str) -> TableResult:
        return self.tables[name]

    @property
    def sample(self) -> str:
        """str : what the errors are taken over, in words."""
        rows = "all N queries" if self.queries is None else f"{self.queries} queries on all N keys"
        heads = f"{self.heads} head{'s' * (self.heads > 1)}"
        seeds = f"{self.seeds} seed{'s' * (self.seeds > 1)}"
        return f"{seeds} x {heads} x {rows} x {paper.HEAD_DIM} channels"

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON; errors as fractions."""
        return {
            "seeds": self.seeds,
            "heads": self.heads,
            "queries": self.queries,
            "head_dim": paper.HEAD_DIM,
            "backends": self.backends,
            "tables": {name: table.as_dict() for name, table in self.tables.items()},
        }

    def __str__(self) -> str:
        from .reproduce_report import tables_text

        return tables_text(self)

    def figure(self) -> Figure:
        """Draw the errors by sequence length, a panel for each table, the paper's figures as crosses."""
        from .reproduce_report import tables_figure

        return tables_figure(self)


def tables(
    which: Sequence[str] = ("table1", "table2"),
    *,
    lengths: Sequence[int] = paper.LENGTHS,
    seeds: int = 3,
    heads: int = 2,
    full: bool = False,
    recipes: Sequence[str] = RECIPES,
    backend: str = "numpy",
    progress: Callable[[str, float], None] | None = None,
) -> TablesResult:
    """Compute the paper's tables of errors again, with our recipes beside its own.

    Parameters
    ----------
    which : sequence of {"table1", "table2"}
    lengths : sequence of int
        Sequence lengths N.
    seeds : int
        Draws of Q, K and V, for the spread.
    heads : int
        Heads per draw. Heads do not see each other, so the paper's B and H change the spread only.
    full : bool
        All N queries of a head. Otherwise the first 512: the keys are all there and the metrics are over all
        elements of the output rows computed.
    recipes : sequence of str
        Rows beside the paper's four (`FP8`, ``half-int8`` and ``paper-int8``), which are always there.
    backend : str
        What computes the recipes: a backend of `intfa_cupy.backends`, or ``"auto"`` for the fastest one
        available that serves the recipe. What none serves is computed by ``"numpy"``;
        `TablesResult.backends` says what did. Beside a kernel exact attention too is computed on the GPU,
        if CuPy has cuBLAS.
    progress : callable, optional
        ``progress(what, done)`` is called before each draw, with ``done`` from 0 to 1.

    Returns
    -------
    TablesResult
        Prints as tables.

    Examples
    --------
    >>> print(tables(["table2"], lengths=[1024], seeds=2, heads=1))  # doctest: +SKIP
    """
    for name in which:
        if name not in paper.TABLES:
            raise ValueError(f"which must hold {', '.join(map(repr, paper.TABLES))}; got {name!r}")
    if not which or not lengths or min(lengths) < 1 or seeds < 1 or heads < 1:
        raise ValueError(
            "which and lengths must not be empty, and lengths, seeds and heads must be at least 1; "
            f"got which={list(which)}, lengths={list(lengths)}, seeds={seeds}, heads={heads}"
        )
    wanted = {*RECIPES[:4], *(get_recipe(r).name for r in recipes)}
    rows = [r for r in RECIPES if r in wanted] + [r for r in recipes if r not in RECIPES]
    which, lengths = tuple(dict.fromkeys(which)), tuple(sorted(set(lengths)))
    if backend == "auto":
        candidates = [name for name, status in dispatch.backends().items() if status.available]
    else:
        candidates = list(dict.fromkeys([backend, "numpy"]))
    backends = dict.fromkeys(rows, candidates)
    # Time goes with the keys (times the queries): what the progress counts.
    cost = {n: n * (n if full else min(n, QUERIES)) for n in lengths}
    xp = _module(candidates[0])
    total, done = sum(cost.values()) * seeds * len(which), 0
    found = {}
    for name in which:
        errors: dict[float, dict[str, dict[int, tuple[ErrorReport, ...]]]] = {
            scale: {row: dict.fromkeys(lengths, ()) for row in rows} for scale in SCALES
        }
        for n, seed in itertools.product(lengths, range(seeds)):
            if progress is not None:
                progress(f"{name}, N = {n:,}, seed {seed + 1} of {seeds}", done / total)
            qkv = draw(paper.TABLES[name].activations, n, None if full else QUERIES, heads, seed)
            for scale in SCALES:
                exact = _exact(qkv, scale, xp)
                for row in rows:
                    out = _attend(qkv, row, scale, backends)
                    errors[scale][row][n] += (error_report(out, exact),)
            done += cost[n]
        found[name] = TableResult(name, lengths, errors)
    if progress is not None:
        progress("done", 1.0)
    queries = None if full or max(lengths) <= QUERIES else QUERIES
    return TablesResult(found, seeds, heads, queries, {row: left[0] for row, left in backends.items()})


def draw(activations: str, n: int, queries: int | None, heads: int, seed: int) -> tuple[np.ndarray, ...]:
    """Return Q (1, heads, min(n, queries), 64), K and V (1, heads, n, 64), float32."""
    rng = np.random.default_rng([n, seed])
    rows = n if queries is None else min(n, queries)
    sizes = [(1, heads, length, paper.HEAD_DIM) for length in (rows, n, n)]
    if activations == "normal":
        return tuple(rng.standard_normal(size, dtype=np.float32) for size in sizes)
    return tuple(rng.random(size, dtype=np.float32) - np.float32(0.5) for size in sizes)


def _module(backend: str) -> Any:
    """NumPy; or CuPy beside a kernel, where it has what multiplies float64."""
    if backend == "numpy" or gpu.unavailable() is not None:
        return np
    try:
        return gpu.matrix_library()
    except ImportError:
        return np


def _exact(qkv: tuple[np.ndarray, ...], scale: float, xp: Any) -> np.ndarray:
    """Exact attention, computed by NumPy or CuPy."""
    q, k, v = map(xp.asarray, qkv)
    problem = Problem(*shape_of_qkv(q.shape, k.shape, v.shape, "bhsd"), get_recipe("fp16"), scale=scale)
    return arrays.to_numpy(attention_float64(q, k, v, problem)[0])


def _attend(qkv: tuple[np.ndarray, ...], recipe: str, scale: float, backends: dict[str, list[str]]) -> Any:
    """Attention by the first of the recipe's backends that serves it; those that do not are dropped."""
    q, k, v = qkv
    while True:
        try:
            return attention(q, k, v, recipe=recipe, scale=scale, backend=backends[recipe][0])
        except UnsupportedError:
            backends[recipe] = backends[recipe][1:]
            if not backends[recipe]:
                raise
