"""``intfa-cupy bench``: our kernels beside their peers, timed in one run.

Times are medians of single launches with the L2 cache overwritten before each. The overwriting also
hides the host: it takes longer than enqueueing the call behind it, and calls of several kernels are
captured in a CUDA graph first. All contestants at a shape take turns, one launch each in every round and
another one first in the next, so that a clock that falls as the card warms up costs them the
same. Absolute times move from machine to machine; the ratios are what is claimed, and they are of one
run on one card.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from . import paper

__all__ = [
    "PAPER_SHAPES",
    "PEERS",
    "BenchResult",
    "BenchUnavailable",
    "Row",
    "Shape",
    "bench",
    "equal_token_shapes",
    "label",
]

#: Bytes written between two timed launches: several times any L2.
_FLUSH_BYTES = 512 << 20
_COPY_BYTES = 1 << 30

# INT8 tensor-core operations per clock and SM (multiply and add are two), dense, from NVIDIA's
# datasheets: 624 TOPS / (108 SMs * 1.41 GHz) for the A100 and so on.
_INT8_PER_CLOCK = {75: 2048, 80: 4096, 86: 2048, 87: 2048, 89: 2048, 90: 8192, 100: 16384, 120: 2048}


class BenchUnavailable(RuntimeError):
    """There is no GPU to measure on; the message says why."""


@dataclass(frozen=True)
class Shape:
    """One problem: B batches, H heads, N queries and as many keys, head dimension D."""

    B: int
    H: int
    N: int
    D: int
    causal: bool = False

    @property
    def operations(self) -> int:
        """int : 4 B H D per visible pair: a multiplication and an addition in each product."""
        pairs = self.N * (self.N + 1) // 2 if self.causal else self.N * self.N
        return 4 * self.B * self.H * self.D * pairs

    @property
    def fp16_bytes(self) -> int:
        """int : bytes of Q, K and V in 16 bits."""
        return 3 * 2 * self.B * self.H * self.N * self.D

    def __str__(self) -> str:
        return f"B{self.B} H{self.H} N{self.N} d{self.D}{' causal' if self.causal else ''}"


#: What torch's attention is timed as.
PEERS = ("cuDNN bf16", "FlashAttention-2 bf16")

#: The shapes of INT-FlashAttention's speed figure (arXiv 2409.16997, section 4).
PAPER_SHAPES = tuple(Shape(4, 32, n, paper.HEAD_DIM) for n in paper.LENGTHS)


def equal_token_shapes(
    head_dims: Iterable[int],
    lengths: Iterable[int],
    causal: Iterable[bool],
    tokens: int = 16384,
    hidden: int = 2048,
) -> Iterator[Shape]:
    """Yield shapes that all have ``tokens`` tokens and ``heads * head_dim = hidden``."""
    lengths, causal = tuple(lengths), tuple(causal)
    for D in head_dims:
        for c in causal:
            for N in lengths:
                yield Shape(max(1, tokens // N), max(1, hidden // D), N, D, c)


@dataclass
class Row:
    """One contestant at one shape.

    Parameters
    ----------
    shape : Shape
    name : str
        Recipe or peer.
    backend : str
        Kernel, or the peer's library.
    stage : {"kernel", "with quantisation", "quantisation", "peer"}
        What was timed: the operator on quantised inputs, everything from float16 inputs on, the
        quantiser alone, or a peer on bfloat16 inputs.
    milliseconds, low, high : float
        Median, 10th and 90th percentile.
    tops : float
        Operations / time / 1e12; 0 for the quantiser alone.
    peak : float
        Share of the card's INT8 peak at its highest clock; for the quantiser alone, share of the
        measured copy bandwidth.
    nbytes : int
        Bytes of Q, K and V as stored; for the quantiser alone, bytes read and written once.
    error : float or None
        Relative L2 error of sampled rows against float64.
    ratios : dict of str to float
        Speed over each peer's in this run.
    """

    shape: Shape
    name: str
    backend: str
    stage: str
    milliseconds: float
    low: float
    high: float
    tops: float
    peak: float
    nbytes: int = 0
    error: float | None = None
    ratios: dict[str, float] = field(default_factory=dict)


@dataclass
class BenchResult:
    """All rows, and the machine and versions that they hold for.

    ``missing`` says why a contestant, by its label, has no row.
    """

    machine: dict[str, Any]
    rows: list[Row]
    missing: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON, in which a peak that is not known is null."""
        rows = [
            {
                **asdict(row),
                "peak": None if math.isnan(row.peak) else row.peak,
                "shape": {**asdict(row.shape), "label": str(row.shape)},
            }
            for row in self.rows
        ]
        return {"machine": self.machine, "rows": rows, "missing": self.missing}

    @classmethod
    def from_dict(cls, document: dict[str, Any]) -> BenchResult:
        """Read back what :meth:`as_dict` wrote."""
        rows = []
        for entry in document["rows"]:
            shape = {k: v for k, v in entry["shape"].items() if k != "label"}
            peak = math.nan if entry["peak"] is None else entry["peak"]
            rows.append(Row(**{**entry, "shape": Shape(**shape), "peak": peak}))
        return cls(document["machine"], rows, document.get("missing", {}))

    def reasons(self) -> dict[str, list[str]]:
        """Return `missing` the other way round: the contestants for each reason."""
        found: dict[str, list[str]] = {}
        for contestant, reason in self.missing.items():
            found.setdefault(reason, []).append(contestant)
        return found

    def shapes(self) -> list[Shape]:
        """Return the shapes in the order measured."""
        return list(dict.fromkeys(row.shape for row in self.rows))


#: Median, 10th and 90th percentile in milliseconds.
Times = tuple[float, float, float]


class _Timer:
    """Times calls on one stream that CuPy and torch share."""

    def __init__(self, repeats: int):
        import cupy

        self.cp = cupy
        self.stream = cupy.cuda.Stream(non_blocking=True)
        self.repeats = repeats
        with self.stream:
            self.flush = cupy.empty(_FLUSH_BYTES, cupy.uint8)

    @contextmanager
    def torch_stream(self) -> Iterator[None]:
        import torch

        with torch.cuda.stream(torch.cuda.ExternalStream(self.stream.ptr)):
            yield

    def prepare(self, call: Callable[[], Any], *, graph: bool) -> Callable[[], Any]:
        """Warm a call up and return what launches it; a replay of its CUDA graph if ``graph``."""
        with self.stream:
            for _ in range(3):
                kept = call()
            if not graph:
                return call
            self.stream.begin_capture()
            kept = call()
            captured = self.stream.end_capture()

        def replay(kept: Any = kept) -> None:  # the captured outputs' memory lives as long as the replay
            captured.launch(self.stream)

        replay()
        return replay

    def rounds(self, runs: Sequence[Callable[[], Any]]) -> list[Times]:
        """Launch all in turn, ``repeats`` times over; return each one's median and percentiles."""
        event = self.cp.cuda.Event
        marks: list[list[tuple[Any, Any]]] = [[] for _ in runs]
        with self.stream:
            for turn in range(self.repeats):
                for i in range(len(runs)):
                    i = (i + turn) % len(runs)
                    begin, end = event(), event()
                    self.flush.fill(1)
                    begin.record(self.stream)
                    runs[i]()
                    end.record(self.stream)
                    marks[i].append((begin, end))
            self.stream.synchronize()
        elapsed = [[self.cp.cuda.get_elapsed_time(a, b) for a, b in pairs] for pairs in marks]
        return [tuple(float(np.percentile(t, p)) for p in (50, 10, 90)) for t in elapsed]  # type: ignore[misc]


def bench(
    shapes: Iterable[Shape],
    recipes: Iterable[str],
    *,
    backends: Iterable[str] | None = None,
    peers: bool = True,
    repeats: int = 30,
    errors: bool = True,
    progress: Callable[[str], None] | None = None,
) -> BenchResult:
    """Time recipes on every kernel that serves them, and the peers that can be imported.

    Parameters
    ----------
    shapes : iterable of Shape
    recipes : iterable of str
    backends : iterable of str, optional
        Kernels to time, ``"auto"`` among them; by default the one that ``"auto"`` takes. One that serves
        a recipe under two names is timed once.
    peers : bool
        Also time torch's scaled_dot_product_attention in bfloat16 with the cuDNN and the flash
        (FlashAttention-2) backends, where torch is installed.
    repeats : int
        Timed launches per figure.
    errors : bool
        Also measure the error of 64 sampled rows against float64.
    progress : callable, optional
        Told what is measured next.

    Returns
    -------
    BenchResult

    Raises
    ------
    BenchUnavailable
        No GPU, or no CuPy.
    """
    from . import gpu

    reason = gpu.unavailable()
    if reason is not None:
        raise BenchUnavailable(f"bench needs a GPU: {reason}")
    timer = _Timer(repeats)
    machine = _machine(timer)
    rows: list[Row] = []
    missing: dict[str, str] = {}
    tell = progress or (lambda _: None)
    recipes, kernels = tuple(recipes), tuple(backends or ("auto",))
    for shape in shapes:
        tell(f"{shape}: compile, check")
        arrays = _inputs(shape)
        exact = _Sample(shape, arrays) if errors else None
        contestants = _own(timer, shape, arrays, recipes, kernels, exact, missing)
        if peers:
            contestants += _peers(timer, shape, arrays, exact, missing)
        tell(f"{shape}: time {len(contestants)} calls in {repeats} rounds")
        # Captured only now that all that lives on is allocated: a graph goes on writing to what its call
        # gave back to the memory pool, which must not have become another contestant's input.
        times = timer.rounds([timer.prepare(c.call, graph=c.graph) for c in contestants])
        at_shape = [_row(machine, shape, c, t) for c, t in zip(contestants, times, strict=True)]
        references = {row.name: row.milliseconds for row in at_shape if row.stage == "peer"}
        for row in at_shape:
            if row.stage != "quantisation":
                row.ratios = {peer: time / row.milliseconds for peer, time in references.items()}
        rows += at_shape
    return BenchResult(machine, rows, missing)


def _inputs(shape: Shape) -> list[Any]:
    """Normal float16 Q, K, V on the GPU, (B, H, N, D)."""
    import cupy

    generator = cupy.random.default_rng(shape.N * 1000 + shape.D)
    size = (shape.B, shape.H, shape.N, shape.D)
    return [generator.standard_normal(size, dtype=cupy.float32).astype(cupy.float16) for _ in range(3)]


class _Sample:
    """Exact attention of 64 rows of one head."""

    def __init__(self, shape: Shape, arrays: list[Any]):
        rng = np.random.default_rng(0)
        self.b, self.h = shape.B - 1, shape.H // 2
        self.rows = np.sort(rng.choice(shape.N, min(64, shape.N), replace=False))
        q, k, v = (x[self.b, self.h].get().astype(np.float64) for x in arrays)
        s = q[self.rows] @ k.T / math.sqrt(shape.D)
        if shape.causal:
            s[np.arange(shape.N)[None, :] > self.rows[:, None]] = -np.inf
        p = np.exp(s - s.max(axis=1, keepdims=True))
        self.exact = p @ v / p.sum(axis=1, keepdims=True)

    def error(self, out: np.ndarray) -> float:
        """Relative L2 error of an output head (N, D)."""
        return float(np.linalg.norm(out[self.rows] - self.exact) / np.linalg.norm(self.exact))


@dataclass(frozen=True)
class _Contestant:
    """A call to be timed, as a CUDA graph if ``graph``, and what its row says besides the time."""

    name: str
    backend: str
    stage: str
    call: Callable[[], Any]
    nbytes: int
    error: float | None = None
    graph: bool = False


def _own(
    timer: _Timer,
    shape: Shape,
    arrays: list[Any],
    recipes: Sequence[str],
    backends: Sequence[str],
    exact: _Sample | None,
    missing: dict[str, str],
) -> list[_Contestant]:
    """Three contestants for each recipe and kernel that serves it; ``missing`` gets the reasons of others."""
    from . import api
    from .dispatch import UnsupportedError

    found: list[_Contestant] = []
    for name in recipes:
        plans: dict[str, str] = {}
        for backend in backends:
            try:
                plan = api.explain(*arrays, recipe=name, is_causal=shape.causal, backend=backend)
            except UnsupportedError as error:
                missing[label(name, backend)] = str(error)
                continue
            if plan.backend == "numpy":
                missing[label(name, backend)] = "the NumPy model is no contestant"
                continue
            plans.setdefault(plan.backend, backend)
        for kernel in plans:
            found += _calls(timer, shape, arrays, name, kernel, exact)
    return found


def label(name: str, backend: str) -> str:
    """Return what a contestant is called in tables and pictures."""
    return f"{name} ({backend})"


def _calls(
    timer: _Timer, shape: Shape, arrays: list[Any], name: str, backend: str, exact: _Sample | None
) -> list[_Contestant]:
    from . import api

    kwargs: dict[str, Any] = {"is_causal": shape.causal, "backend": backend}
    with timer.stream:
        qkv = api.quantize_qkv(*arrays, recipe=name, backend=backend)
        kernel = lambda: api.attention_quantized(qkv, out_dtype="float16", **kwargs)  # noqa: E731
        error = exact.error(kernel()[exact.b, exact.h].get().astype(np.float64)) if exact else None
    whole = lambda: api.attention(*arrays, recipe=name, **kwargs)  # noqa: E731
    alone = lambda: api.quantize_qkv(*arrays, recipe=name, backend=backend)  # noqa: E731
    source = sum(x.nbytes for x in arrays)
    return [
        _Contestant(name, backend, "kernel", kernel, qkv.nbytes, error),
        _Contestant(name, backend, "with quantisation", whole, source, error, graph=True),
        _Contestant(name, backend, "quantisation", alone, source + qkv.nbytes, graph=True),
    ]


def _peers(
    timer: _Timer, shape: Shape, arrays: list[Any], exact: _Sample | None, missing: dict[str, str]
) -> list[_Contestant]:
    try:
        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel
    except ImportError:
        missing.update(dict.fromkeys(PEERS, "torch is not installed"))
        return []
    found = []
    with timer.torch_stream():
        q, k, v = (torch.from_dlpack(x).to(torch.bfloat16) for x in arrays)
    libraries = (f"cuDNN {torch.backends.cudnn.version()}", f"torch {torch.__version__}")
    which = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION)
    for name, library, choice in zip(PEERS, libraries, which, strict=True):

        def call(choice: Any = choice) -> Any:
            with timer.torch_stream(), sdpa_kernel(choice):
                return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=shape.causal)

        try:
            out = call()
        except RuntimeError as problem:  # this backend of torch does not serve the shape or the card
            missing[name] = str(problem).partition("\n")[0]
            continue
        with timer.torch_stream():
            error = exact.error(out[exact.b, exact.h].float().cpu().numpy()) if exact else None
        nbytes = 3 * q.numel() * q.element_size()
        found.append(_Contestant(name, library, "peer", call, nbytes, error))
    return found


def _row(machine: dict[str, Any], shape: Shape, c: _Contestant, times: Times) -> Row:
    median, low, high = times
    if c.stage == "quantisation":
        tops, peak = 0.0, c.nbytes / median / 1e9 / machine["copy_TBps"]
    else:
        tops = shape.operations / median / 1e9
        limit = machine["int8_peak_tops"]
        peak = math.nan if limit is None else tops / limit
    return Row(shape, c.name, c.backend, c.stage, median, low, high, tops, peak, c.nbytes, c.error)


def _machine(timer: _Timer) -> dict[str, Any]:
    """The card, its limits and the versions; the INT8 peak is None for an architecture not listed."""
    import cupy

    from . import records

    machine = records.machine()
    clock = cupy.cuda.Device().attributes["ClockRate"] * 1e3
    per_clock = _INT8_PER_CLOCK.get(machine["compute_capability"])
    source = cupy.zeros(_COPY_BYTES, cupy.uint8)
    target = cupy.empty_like(source)
    copy = timer.prepare(lambda: cupy.copyto(target, source), graph=False)
    return {
        **machine,
        "clock_MHz": clock / 1e6,
        "int8_peak_tops": None if per_clock is None else machine["sms"] * clock * per_clock / 1e12,
        "copy_TBps": 2 * _COPY_BYTES / timer.rounds([copy])[0][0] / 1e9,
    }
