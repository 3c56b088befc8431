"""Every recipe on the same inputs: error against exact attention, bytes and time (``intfa-cupy compare``).

The work is in :func:`compare`, which prints nothing; the result prints as tables, goes to JSON, and is what
:func:`intfa_cupy.plots.compare_figure` draws.
"""

from __future__ import annotations

import dataclasses
import math
import os
import platform
import statistics
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import __version__, arrays
from .api import attention, quantize_qkv
from .dispatch import UnsupportedError
from .metrics import ErrorReport, error_report
from .problem import shape_of_qkv
from .recipes import get_recipe, recipes
from .reference import reference_attention
from .tables import Column, Group, percent

__all__ = [
    "BASELINE",
    "Comparison",
    "InputError",
    "Inputs",
    "Row",
    "Run",
    "compare",
    "load_inputs",
    "shipped_inputs",
]

#: What errors are set against: FP8 with one scale per head, the usual 8-bit attention.
BASELINE = "fp8-e4m3"

QKV = tuple[np.ndarray, np.ndarray, np.ndarray]


class InputError(ValueError):
    """A file that cannot be compared; the message is one line and names the file and the array."""


@dataclass(frozen=True)
class Inputs:
    """Queries, keys and values of one or several layers.

    Parameters
    ----------
    source : str
        Where they come from, for titles.
    layers : dict of str to (q, k, v)
        (B, H, Sq, D), (B, Hkv, Sk, D), (B, Hkv, Sk, D) by the layer's name.
    is_causal : bool or None
        What the source says of its mask; None if it says nothing.
    notes : dict of str to str
        What is worth saying of a layer.
    """

    source: str
    layers: dict[str, QKV]
    is_causal: bool | None
    notes: dict[str, str]


def shipped_inputs() -> Inputs:
    """Return the capture shipped with the package: two layers of SmolLM2-135M on English text."""
    from .capture import load_capture

    layers, metadata = load_capture()
    notes = {
        f"layer {i}": f"{100 * np.mean(mass):.2g} % of the probability on the first key"
        for i, mass in metadata["sink_mass"].items()
    }
    source = f"{metadata['model'].split(',')[0]}, {metadata['token_count']:,} tokens of English"
    return Inputs(source, {f"layer {i}": qkv for i, qkv in layers.items()}, bool(metadata["causal"]), notes)


def load_inputs(path: str | Path, layout: str = "bhsd") -> Inputs:
    """Read the user's arrays.

    Parameters
    ----------
    path : str or Path
        A file of :func:`numpy.savez` with arrays ``q``, ``k`` and ``v``, or ``NAME_q``, ``NAME_k`` and
        ``NAME_v`` for every layer NAME; each as :func:`intfa_cupy.attention` takes them. A boolean
        ``is_causal`` may be beside them. What ``python -m intfa_cupy.capture --out`` writes fits.
    layout : {"bhsd", "bshd"}
        Order of the arrays' dimensions.

    Raises
    ------
    InputError
        The file cannot be read, or an array is missing, of a wrong shape or dtype, or not finite.
    """
    path = Path(path)
    try:
        file = np.load(path, allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise InputError(f"{path}: holds one array, expected an .npz file with arrays q, k and v")
        with file:
            names = list(file.files)
            groups = _layer_names(path, names)
            found = {
                label: [_read(path, file, prefix + x) for x in "qkv"] for label, prefix in groups.items()
            }
            is_causal = _says_causal(path, file, names)
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None
    except (ValueError, EOFError, zipfile.BadZipFile):
        raise InputError(f"{path}: not a NumPy .npz file") from None
    layers: dict[str, QKV] = {}
    for label, (q, k, v) in found.items():
        where = f"{path}: {label}: " if len(found) > 1 else f"{path}: "
        try:
            for name, x in (("q", q), ("k", k), ("v", v)):
                arrays.check_floating(name, x, like=q)
            _, H, _, Sq, Sk, _ = shape_of_qkv(q.shape, k.shape, v.shape, layout)
        except (TypeError, ValueError) as error:
            raise InputError(f"{where}{error}") from None
        if 0 in (q.size, k.size):
            raise InputError(f"{where}nothing to compare: H = {H}, Sq = {Sq}, Sk = {Sk}")
        layers[label] = (arrays.to_bhsd(q, layout), arrays.to_bhsd(k, layout), arrays.to_bhsd(v, layout))
    return Inputs(path.name, layers, is_causal, {})


def _layer_names(path: Path, names: Sequence[str]) -> dict[str, str]:
    """Return label -> prefix of the arrays' names, sorted by the numbers in them."""
    prefixes = {name[:-1] for name in names if name in ("q", "k", "v") or name.endswith(("_q", "_k", "_v"))}
    if not prefixes:
        have = ", ".join(map(repr, names)) or "nothing"
        raise InputError(f"{path}: no arrays q, k, v (or layer0_q, layer0_k, layer0_v, ...); it holds {have}")
    for prefix in sorted(prefixes):
        for x in "qkv":
            if prefix + x not in names:
                raise InputError(f"{path}: array {prefix + x!r} is missing")

    def number(prefix: str) -> tuple[int, str]:
        digits = "".join(c for c in prefix if c.isdigit())
        return (int(digits) if digits else -1), prefix

    labels = {}
    for prefix in sorted(prefixes, key=number):
        label = prefix.rstrip("_") or "input"
        if label.startswith("layer") and label[5:].isdigit():
            label = f"layer {int(label[5:])}"
        labels[label] = prefix
    return labels


def _read(path: Path, file: Any, name: str) -> np.ndarray:
    try:
        x = np.asarray(file[name])
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        what = "holds Python objects, expected floating numbers" if "pickle" in str(error) else "is damaged"
        raise InputError(f"{path}: array {name!r} {what}") from None
    if x.dtype.kind == "V":
        raise InputError(
            f"{path}: array {name!r} has dtype {x.dtype}, which .npz cannot name (bfloat16?); "
            "save float16 or float32"
        )
    if x.dtype.kind == "f":
        with np.errstate(over="ignore"):
            bad = x.size - int(np.count_nonzero(np.isfinite(x.astype(np.float32))))
        if bad:
            raise InputError(
                f"{path}: array {name!r} has {bad:,} of {x.size:,} elements that are not finite in float32"
            )
    return x


def _says_causal(path: Path, file: Any, names: Sequence[str]) -> bool | None:
    if "is_causal" in names:
        flag = file["is_causal"]
        if flag.size != 1 or flag.dtype.kind not in "biu":
            raise InputError(
                f"{path}: array 'is_causal' must be one boolean, got {flag.dtype} of shape {flag.shape}"
            )
        return bool(flag.reshape(()))
    if "metadata" in names and file["metadata"].dtype.kind == "U":
        import json

        try:
            return bool(json.loads(str(file["metadata"]))["causal"])
        except (ValueError, KeyError, TypeError):
            return None
    return None


@dataclass(frozen=True)
class Run:
    """One recipe on one layer by one backend; ``problem`` says why there is no result."""

    backend: str
    seconds: float | None = None
    overall: ErrorReport | None = None
    heads: tuple[ErrorReport, ...] = ()
    problem: str | None = None

    @property
    def mean(self) -> float:
        """float : relative L2 error, mean over the heads."""
        return statistics.fmean(h.relative_l2 for h in self.heads) if self.heads else math.nan


@dataclass(frozen=True)
class Row:
    """One recipe on one layer.

    ``errors`` is the run whose errors are shown: the exact NumPy model's where it ran.
    """

    recipe: str
    input_bytes: int
    fp16_bytes: int
    runs: dict[str, Run]

    @property
    def errors(self) -> Run:
        """Run : NumPy's, else the first that has a result."""
        done = [run for run in self.runs.values() if run.heads]
        return next((run for run in done if run.backend == "numpy"), done[0] if done else Run("none"))

    @property
    def worst(self) -> tuple[int, float]:
        """(int, float) : the worst head (counted over batch and heads) and its relative L2 error."""
        errors = [h.relative_l2 for h in self.errors.heads]
        if not errors:
            return -1, math.nan
        index = int(np.argmax(errors))
        return index, errors[index]


@dataclass(frozen=True)
class Layer:
    """All recipes on one layer."""

    name: str
    shape: dict[str, int]
    note: str
    rows: dict[str, Row]

    def against_baseline(self, recipe: str) -> float:
        """Return the mean error's change against the baseline's: -0.8 is 80 % below."""
        return self.rows[recipe].errors.mean / self.rows[BASELINE].errors.mean - 1

    @property
    def title(self) -> str:
        """str : the layer's name and note."""
        return self.name + (f": {self.note}" if self.note else "")


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` found.

    ``devices`` maps every backend to what it ran on; ``order`` lists the recipes, the most accurate first.
    """

    source: str
    is_causal: bool
    devices: dict[str, str]
    order: tuple[str, ...]
    layers: tuple[Layer, ...]

    @property
    def backends(self) -> tuple[str, ...]:
        """tuple of str : those measured."""
        return tuple(self.devices)

    def mean(self, recipe: str) -> float:
        """Return the relative L2 error, mean over heads and layers."""
        return statistics.fmean(layer.rows[recipe].errors.mean for layer in self.layers)

    def against_baseline(self, recipe: str) -> float:
        """Return the change of :meth:`mean` against the baseline's."""
        return self.mean(recipe) / self.mean(BASELINE) - 1

    @property
    def title(self) -> str:
        """str : source and mask."""
        return f"{self.source}, {'causal' if self.is_causal else 'full'} attention"

    # -- tables ----------------------------------------------------------------------------

    def columns(self, layer: Layer) -> list[Group]:
        """Return the layer's table, in groups of columns that stay together."""
        rows = [layer.rows[name] for name in self.order]
        overall = [row.errors.overall for row in rows]

        def whole(field: str, show: Callable[[float], str]) -> list[str]:
            return ["-" if o is None else show(getattr(o, field)) for o in overall]

        def milliseconds(run: Run) -> str:
            if run.seconds is None:
                return "-"
            ms = 1e3 * run.seconds
            return f"{ms:,.0f}" if ms >= 99.95 else f"{ms:#.3g}"

        def change(recipe: str) -> str:
            return "0" if recipe == BASELINE else f"{100 * layer.against_baseline(recipe):+.1f}"

        return [
            [
                Column("L2\nmean %", [percent(row.errors.mean) for row in rows]),
                Column("worst\nhead %", [percent(row.worst[1]) for row in rows]),
                Column("% vs\ne4m3", [change(row.recipe) for row in rows]),
            ],
            [
                Column("\ncosine", whole("cosine", lambda x: f"{x:.5f}")),
                Column("MRE\n%", whole("mre", percent)),
                Column("sum\nratio %", whole("sum_ratio", percent)),
            ],
            [
                Column("Q,K,V\nKiB", [f"{row.input_bytes / 1024:,.0f}" for row in rows]),
                Column("% of\nfp16", [f"{100 * row.input_bytes / row.fp16_bytes:.0f}" for row in rows]),
            ],
            [Column(f"{b}\nms", [milliseconds(row.runs[b]) for row in rows]) for b in self.backends],
        ]

    def legend(self) -> Iterator[str]:
        """Yield what the columns mean, and what could not be measured."""
        source = {row.errors.backend for layer in self.layers for row in layer.rows.values()}
        yield "Most accurate recipe first. Errors against exact attention in float64:"
        yield f"  output of  {' and '.join(sorted(source))}"
        yield "  L2         ||o - r|| / ||r||, mean over the heads, and the worst head"
        yield f"  vs e4m3    its mean against that of {BASELINE} (one scale per head)"
        yield "  MRE        mean of |o - r| / (|r| + 1e-5) over all elements"
        yield "  sum ratio  sum|o - r| / sum|r| over all elements, as cosine is"
        yield "Bytes of Q, K and V as stored, scales included. Time of a whole call,"
        yield "quantisation included:"
        for name, device in self.devices.items():
            yield f"  {name:<10} {device}"
        others = [b for b in self.backends if b not in source]
        for backend in others:
            apart = [
                abs(row.runs[backend].mean - row.errors.mean)
                for layer in self.layers
                for row in layer.rows.values()
                if row.runs[backend].heads
            ]
            if apart:
                yield f"{backend}: mean errors within {100 * max(apart):.2g} percentage points of those shown"
        for (backend, problem), names in self._problems().items():
            yield f"{backend}: not measured for {', '.join(names)}: {problem}"

    def _problems(self) -> dict[tuple[str, str], list[str]]:
        found: dict[tuple[str, str], list[str]] = {}
        for layer in self.layers:
            for name in self.order:
                for run in layer.rows[name].runs.values():
                    if run.problem:
                        names = found.setdefault((run.backend, run.problem.partition("\n")[0]), [])
                        if name not in names:
                            names.append(name)
        return found

    # -- JSON ------------------------------------------------------------------------------

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain dictionaries and lists, fit for JSON; errors as fractions."""
        return {
            "source": self.source,
            "is_causal": self.is_causal,
            "baseline": BASELINE,
            "devices": self.devices,
            "versions": {"intfa-cupy": __version__, "numpy": np.__version__},
            "summary": [
                {
                    "recipe": r,
                    "relative_l2_mean": _finite(self.mean(r)),
                    "vs_baseline": _finite(self.against_baseline(r)),
                }
                for r in self.order
            ],
            "layers": [
                {
                    "name": layer.name,
                    "shape": layer.shape,
                    "note": layer.note,
                    "recipes": [self._row_dict(layer, layer.rows[name]) for name in self.order],
                }
                for layer in self.layers
            ],
        }  # fmt: skip

    @staticmethod
    def _row_dict(layer: Layer, row: Row) -> dict[str, Any]:
        worst_head, worst = row.worst
        return {
            "recipe": row.recipe,
            "relative_l2_mean": _finite(row.errors.mean),
            "relative_l2_worst": _finite(worst),
            "worst_head": worst_head,
            "vs_baseline": _finite(layer.against_baseline(row.recipe)),
            "input_bytes": row.input_bytes,
            "fp16_bytes": row.fp16_bytes,
            "errors_of": row.errors.backend,
            "runs": {
                name: {
                    "seconds": run.seconds,
                    "relative_l2_mean": _finite(run.mean),
                    "overall": None if run.overall is None else _finite_dict(run.overall),
                    "heads": [_finite_dict(h) for h in run.heads],
                    "problem": run.problem,
                }
                for name, run in row.runs.items()
            },
        }


def _finite(x: float) -> float | None:
    """JSON has no NaN."""
    return x if math.isfinite(x) else None


def _finite_dict(report: ErrorReport) -> dict[str, float | None]:
    return {name: _finite(value) for name, value in report.as_dict().items()}


def compare(
    inputs: Inputs,
    *,
    recipe_names: Iterable[str] | None = None,
    backends: Sequence[str] = ("numpy",),
    is_causal: bool | None = None,
    insist: bool = False,
    repeat: int = 5,
    progress: Callable[[str], None] = lambda what: None,
) -> Comparison:
    """Run every recipe on every layer by every backend.

    Parameters
    ----------
    inputs : Inputs
    recipe_names : iterable of str, optional
        All by default. The baseline is always added.
    backends : sequence of str
        Those to measure; available ones.
    is_causal : bool, optional
        As the inputs say by default, and full attention if they do not say.
    insist : bool
        A backend that fails raises, instead of being left out of the result with its reason.
    repeat : int
        Calls timed on the CPU; fewer where they take long.
    progress : callable
        Called with what begins, before each of the ``len(layers) * (len(recipes) + 1)`` steps.

    Returns
    -------
    Comparison
    """
    names = list(recipes()) if recipe_names is None else list(dict.fromkeys(recipe_names))
    names = [get_recipe(name).name for name in names]
    if BASELINE not in names:
        names.append(BASELINE)
    causal = bool(inputs.is_causal) if is_causal is None else is_causal
    layers = []
    for label, (q, k, v) in inputs.layers.items():
        progress(f"{label}: exact")
        ref = np.asarray(reference_attention(q, k, v, is_causal=causal))
        rows = {}
        for name in names:
            progress(f"{label}: {name}")
            runs = {b: _run((q, k, v), ref, name, b, causal, insist, repeat) for b in backends}
            stored = quantize_qkv(q, k, v, recipe=name, backend="numpy").nbytes
            rows[name] = Row(name, stored, 2 * (q.size + k.size + v.size), runs)
        keys = ("B", "H", "Hkv", "Sq", "Sk", "D")
        shape = dict(zip(keys, shape_of_qkv(q.shape, k.shape, v.shape, "bhsd"), strict=True))
        layers.append(Layer(label, shape, inputs.notes.get(label, ""), rows))
    result = Comparison(
        inputs.source, causal, {b: device_name(b) for b in backends}, tuple(names), tuple(layers)
    )
    order = sorted(names, key=lambda n: (math.isnan(result.mean(n)), result.mean(n)))
    return dataclasses.replace(result, order=tuple(order))


def device_name(backend: str) -> str:
    """Return what a backend runs on, in words."""
    if backend == "numpy":
        affinity = getattr(os, "sched_getaffinity", None)
        cores = len(affinity(0)) if affinity else os.cpu_count()
        return f"CPU, {platform.machine()}, {cores} cores"
    from . import gpu

    return str(gpu.device().name)  # type: ignore[attr-defined]


def _run(
    qkv: QKV, ref: np.ndarray, recipe: str, backend: str, causal: bool, insist: bool, repeat: int
) -> Run:
    def call(q: Any, k: Any, v: Any) -> Any:
        return attention(q, k, v, recipe=recipe, is_causal=causal, backend=backend)

    try:
        out, seconds = _on_host(call, qkv, repeat) if backend == "numpy" else _on_gpu(call, qkv)
    except UnsupportedError as error:
        return Run(backend, problem=str(error))
    except Exception as error:
        # A GPU can fail in many ways (driver, compiler, memory); that must not cost the user the rest.
        if insist or backend == "numpy":
            raise
        return Run(backend, problem=f"{type(error).__name__}: {error}")
    heads = tuple(error_report(out[i], ref[i]) for i in np.ndindex(*ref.shape[:2]))
    return Run(backend, seconds, error_report(out, ref), heads)


#: Repetitions on the CPU stop once they have taken this long together.
_ENOUGH_S = 0.2


def _on_host(call: Callable[..., Any], qkv: QKV, repeat: int) -> tuple[np.ndarray, float]:
    """Return the result and the median time of a few calls."""
    times: list[float] = []
    while True:
        start = time.perf_counter()
        out = call(*qkv)
        times.append(time.perf_counter() - start)
        if len(times) >= repeat or sum(times) > _ENOUGH_S:
            return out, statistics.median(times)


def _on_gpu(call: Callable[..., Any], qkv: QKV) -> tuple[np.ndarray, float]:
    """Return the result and the median time of calls on arrays that lie on the GPU already."""
    import cupy

    on_device = [cupy.asarray(x) for x in qkv]
    out = call(*on_device).get()  # compiles
    times = []
    for _ in range(50):
        start, stop = cupy.cuda.Event(), cupy.cuda.Event()
        start.record()
        call(*on_device)
        stop.record()
        stop.synchronize()
        times.append(1e-3 * cupy.cuda.get_elapsed_time(start, stop))
    return out, statistics.median(times[2:])
