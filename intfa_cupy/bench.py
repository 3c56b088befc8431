"""``intfa-cupy bench``: our kernels beside their peers, timed in one run.

Times are medians of single launches with the L2 cache overwritten before each. The overwriting also
hides the host: it takes longer than enqueueing the call behind it, and calls of several kernels are
captured in a CUDA graph first. Absolute times move from machine to machine; the ratios are what
is claimed, and they are of one run on one card.
"""

from __future__ import annotations

import datetime
import math
import platform
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

__all__ = ["PAPER_SHAPES", "BenchResult", "BenchUnavailable", "Row", "Shape", "bench", "equal_token_shapes"]

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

    def __str__(self) -> str:
        return f"B{self.B} H{self.H} N{self.N} d{self.D}{' causal' if self.causal else ''}"


#: The shapes of INT-FlashAttention's speed figure (arXiv 2409.16997, section 4).
PAPER_SHAPES = tuple(Shape(4, 32, n, 64) for n in (1024, 2048, 4096, 8192, 16384))


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
    """All rows, and the machine and versions that they hold for."""

    machine: dict[str, Any]
    rows: list[Row]

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        rows = [{**asdict(row), "shape": {**asdict(row.shape), "label": str(row.shape)}} for row in self.rows]
        return {"machine": self.machine, "rows": rows}

    @classmethod
    def from_dict(cls, document: dict[str, Any]) -> BenchResult:
        """Read back what :meth:`as_dict` wrote."""
        rows = []
        for entry in document["rows"]:
            shape = {k: v for k, v in entry["shape"].items() if k != "label"}
            rows.append(Row(**{**entry, "shape": Shape(**shape)}))
        return cls(document["machine"], rows)

    def shapes(self) -> list[Shape]:
        """Return the shapes in the order measured."""
        return list(dict.fromkeys(row.shape for row in self.rows))


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

    def __call__(self, call: Callable[[], Any], *, graph: bool) -> tuple[float, float, float]:
        """Return (median, 10th, 90th percentile) of one launch in milliseconds."""
        with self.stream:
            for _ in range(3):
                keep = call()
            run: Callable[[], Any] = call
            if graph:
                self.stream.begin_capture()
                keep = call()  # holds the captured outputs' memory while the graph is replayed
                captured = self.stream.end_capture()
                run = lambda: captured.launch(self.stream)  # noqa: E731
                run()
            begin = [self.cp.cuda.Event() for _ in range(self.repeats)]
            end = [self.cp.cuda.Event() for _ in range(self.repeats)]
            for a, b in zip(begin, end, strict=True):
                self.flush.fill(1)
                a.record(self.stream)
                run()
                b.record(self.stream)
            self.stream.synchronize()
            del keep
        times = np.array([self.cp.cuda.get_elapsed_time(a, b) for a, b in zip(begin, end, strict=True)])
        return tuple(float(np.percentile(times, p)) for p in (50, 10, 90))  # type: ignore[return-value]


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
        Kernels to time; by default the one that ``backend="auto"`` takes.
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
    tell = progress or (lambda _: None)
    for shape in shapes:
        arrays = _inputs(shape)
        exact = _Sample(shape, arrays) if errors else None
        at_shape: list[Row] = []
        for name in recipes:
            for backend in backends or ("auto",):
                tell(f"{shape} {name}")
                at_shape += _own_rows(timer, machine, shape, arrays, name, backend, exact)
        if peers:
            tell(f"{shape} peers")
            at_shape += _peer_rows(timer, machine, shape, arrays, exact)
        references = {row.name: row.milliseconds for row in at_shape if row.stage == "peer"}
        for row in at_shape:
            if row.stage != "quantisation":
                row.ratios = {peer: time / row.milliseconds for peer, time in references.items()}
        rows += at_shape
    return BenchResult(machine, rows)


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


def _own_rows(
    timer: _Timer,
    machine: dict[str, Any],
    shape: Shape,
    arrays: list[Any],
    name: str,
    backend: str,
    exact: Any,
) -> list[Row]:
    from . import api
    from .dispatch import UnsupportedError

    kwargs: dict[str, Any] = {"is_causal": shape.causal, "backend": backend}
    try:
        plan = api.explain(*arrays, recipe=name, **kwargs)
    except UnsupportedError:
        return []
    if plan.backend == "numpy":
        return []
    with timer.stream:
        qkv = api.quantize_qkv(*arrays, recipe=name, backend=backend)
        run = lambda: api.attention_quantized(qkv, out_dtype="float16", **kwargs)  # noqa: E731
        error = exact.error(run()[exact.b, exact.h].get().astype(np.float64)) if exact else None
    common: dict[str, Any] = {"shape": shape, "name": name, "backend": plan.backend}
    nbytes = qkv.nbytes
    source = sum(x.nbytes for x in arrays)
    kernel = timer(run, graph=False)
    whole = timer(lambda: api.attention(*arrays, recipe=name, **kwargs), graph=True)
    alone = timer(lambda: api.quantize_qkv(*arrays, recipe=name, backend=backend), graph=True)
    return [
        _row(machine, stage="kernel", times=kernel, nbytes=nbytes, error=error, **common),
        _row(machine, stage="with quantisation", times=whole, nbytes=source, error=error, **common),
        _row(machine, stage="quantisation", times=alone, nbytes=source + nbytes, **common),
    ]


def _peer_rows(
    timer: _Timer, machine: dict[str, Any], shape: Shape, arrays: list[Any], exact: Any
) -> list[Row]:
    try:
        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel
    except ImportError:
        return []
    rows = []
    with timer.torch_stream():
        q, k, v = (torch.from_dlpack(x).to(torch.bfloat16) for x in arrays)
        attend = torch.nn.functional.scaled_dot_product_attention
        for name, library, which in (
            ("cuDNN bf16", f"cuDNN {torch.backends.cudnn.version()}", SDPBackend.CUDNN_ATTENTION),
            ("FlashAttention-2 bf16", f"torch {torch.__version__}", SDPBackend.FLASH_ATTENTION),
        ):
            try:
                with sdpa_kernel(which):
                    call = lambda: attend(q, k, v, is_causal=shape.causal)  # noqa: E731
                    out = call()
                    times = timer(call, graph=False)
            except RuntimeError:  # this backend of torch does not serve the shape or the card
                continue
            error = exact.error(out[exact.b, exact.h].float().cpu().numpy()) if exact else None
            peer: dict[str, Any] = {"shape": shape, "name": name, "backend": library, "stage": "peer"}
            nbytes = 3 * q.numel() * q.element_size()
            rows.append(_row(machine, times=times, nbytes=nbytes, error=error, **peer))
    return rows


def _row(
    machine: dict[str, Any],
    *,
    shape: Shape,
    name: str,
    backend: str,
    stage: str,
    times: tuple[float, float, float],
    nbytes: int,
    error: float | None = None,
) -> Row:  # fmt: skip
    median, low, high = times
    if stage == "quantisation":
        tops, peak = 0.0, nbytes / median / 1e9 / machine["copy_TBps"]
    else:
        tops = shape.operations / median / 1e9
        peak = tops / machine["int8_peak_tops"]
    return Row(shape, name, backend, stage, median, low, high, tops, peak, nbytes, error)


def _machine(timer: _Timer) -> dict[str, Any]:
    """The card, its limits and the versions."""
    import cupy

    from . import __version__, jit

    device = cupy.cuda.Device()
    properties = cupy.cuda.runtime.getDeviceProperties(device.id)
    capability = properties["major"] * 10 + properties["minor"]
    clock = device.attributes["ClockRate"] * 1e3
    per_clock = _INT8_PER_CLOCK.get(capability, math.nan)
    source = cupy.zeros(_COPY_BYTES, cupy.uint8)
    target = cupy.empty_like(source)
    copy = timer(lambda: cupy.copyto(target, source), graph=False)[0]
    return {
        "gpu": properties["name"].decode(),
        "compute_capability": capability,
        "sms": properties["multiProcessorCount"],
        "clock_MHz": clock / 1e6,
        "int8_peak_tops": properties["multiProcessorCount"] * clock * per_clock / 1e12,
        "copy_TBps": 2 * _COPY_BYTES / copy / 1e9,
        "driver_cuda": cupy.cuda.runtime.driverGetVersion(),
        "nvrtc": ".".join(map(str, cupy.cuda.nvrtc.getVersion())),
        "cupy": cupy.__version__,
        "python": platform.python_version(),
        "intfa_cupy": __version__,
        "kernel_sources": jit.strip_comments_fingerprint(),
        "date": datetime.date.today().isoformat(),
    }
