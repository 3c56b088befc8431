"""Quantisation and attention on the GPU: buffers, launches, and the caller's stream.

Nothing here waits for the device: kernels go to the current stream of CuPy, or of torch for torch tensors, and
the calls can be captured in a CUDA graph. Two structs carry all arguments; their fields are those of
``cuda_src/params.cuh``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from . import arrays, jit, packing
from .dispatch import Plan
from .problem import Problem
from .quantized import TILE, QuantizedQKV, QuantizedTensor, tiles_of
from .recipes import Recipe
from .tiles import K_SCALES, OUTPUTS, Device, Tile

__all__ = [
    "ATTENTION_PARAMS",
    "QUANTIZE_PARAMS",
    "attention",
    "attention_quantized",
    "device",
    "quantize",
    "unavailable",
    "upload",
]

Array = Any

_UNBOUNDED = 2**31 - 1
_LOG2E = math.log2(math.e)

_STRIDED = np.dtype(
    [("data", np.uint64)] + [(name, np.int64) for name in ("batch", "head", "row", "channel")]
)

#: struct AttentionParams
ATTENTION_PARAMS = np.dtype(
    [
        (name, np.uint64)
        for name in ("q", "q_scale", "k", "k_scale", "v", "v_scale", "v_fold", "guard", "lse_shift")
    ]
    + [(name, np.uint64) for name in ("out", "lse")]
    + [(name, np.int64) for name in ("out_batch", "out_head", "out_row", "out_channel")]
    + [(name, np.int32) for name in ("batches", "heads", "kv_heads", "queries", "keys", "channels", "tiles")]
    + [(name, np.int32) for name in ("row_blocks", "left", "right")]
    + [(name, np.float32) for name in ("scale", "scale_log2")]
)

#: struct QuantizeParams
QUANTIZE_PARAMS = np.dtype(
    [(name, _STRIDED) for name in ("q", "k", "v")]
    + [
        (name, np.uint64)
        for name in ("q_partial", "k_partial", "v_partial", "k_mean", "equalizer", "v_statistic")
    ]
    + [
        (name, np.uint64)
        for name in ("q8", "q_scale", "lse_shift", "k8", "k_scale", "v8", "v_scale", "v_fold")
    ]
    + [(name, np.uint64) for name in ("v_token", "guard")]
    + [(name, np.int32) for name in ("batches", "heads", "kv_heads", "queries", "keys", "channels", "tiles")]
    + [(name, np.int32) for name in ("q_chunks", "k_chunks", "vector_q", "vector_k", "vector_v")]
)


# --- devices ------------------------------------------------------------------------------------------------------


def unavailable() -> str | None:
    """Return why no kernel can run in this process, or None."""
    try:
        import cupy
    except ImportError:
        return 'CuPy is not installed: pip install "cupy-cuda12x[ctk]" or "cupy-cuda13x[ctk]"'
    except Exception as error:  # a broken installation fails in its own ways
        return f"CuPy cannot be imported: {error}"
    try:
        if cupy.cuda.runtime.getDeviceCount() == 0:
            return "there is no CUDA device"
        jit.nvrtc()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"there is no usable CUDA device: {error}"
    except jit.CompilerNotFoundError as error:
        return str(error)
    return None


@lru_cache(maxsize=64)
def _device(ordinal: int) -> Device:
    import cupy

    properties = cupy.cuda.runtime.getDeviceProperties(ordinal)
    return Device(
        name=properties["name"].decode(),
        capability=properties["major"] * 10 + properties["minor"],
        sms=properties["multiProcessorCount"],
        shared_memory=cupy.cuda.Device(ordinal).attributes["MaxSharedMemoryPerBlockOptin"],
    )


def device() -> Device:
    """Return the current device."""
    import cupy

    return _device(cupy.cuda.runtime.getDevice())


@contextmanager
def _placed(ordinal: int, stream: Any) -> Iterator[None]:
    import cupy

    with cupy.cuda.Device(ordinal), stream:
        yield


def _where(x: Array) -> Any:
    """The context in which to work on x: its device, and the stream that its library is using."""
    import cupy

    which = arrays.kind(x)
    if which == "torch" and x.is_cuda:
        import torch

        stream = cupy.cuda.ExternalStream(torch.cuda.current_stream(x.device).cuda_stream, x.device.index)
        return _placed(x.device.index, stream)
    if which == "cupy" and x.device.id != cupy.cuda.runtime.getDevice():
        return x.device
    return nullcontext()


# --- arrays of any library as strided memory ------------------------------------------------------------------------


@dataclass(frozen=True)
class _View:
    """(B, heads, S, D) somewhere on the device. `owner` keeps the memory alive."""

    pointer: int
    shape: tuple[int, int, int, int]
    strides: tuple[int, int, int, int]  # in elements
    dtype: str
    owner: Any

    def vector(self) -> bool:
        """Whether eight channels can be read 16 bytes at a time."""
        size = 4 if self.dtype == "float32" else 2
        aligned = all(
            s * size % 16 == 0 or n == 1 for s, n in zip(self.strides[:3], self.shape[:3], strict=True)
        )
        unit = self.strides[3] == 1 or self.shape[3] == 1
        return aligned and unit and self.shape[3] % 8 == 0 and self.pointer % 16 == 0

    def fill(self, params: Any) -> None:
        """Write struct Strided."""
        params["data"] = self.pointer
        params["batch"], params["head"], params["row"], params["channel"] = self.strides


def _view(x: Array, layout: str) -> _View:
    """View an array of a call's q, k, v or out; float64 is converted first, host memory copied."""
    which = arrays.kind(x)
    if which == "torch":
        if not x.is_cuda:
            return _view(_to_device(x), layout)
        x = x.detach()
        if arrays.dtype_name(x) == "float64":
            x = x.float()
        x = _bhsd(x, layout)
        return _View(x.data_ptr(), tuple(x.shape), tuple(x.stride()), arrays.dtype_name(x), x)
    if which != "cupy":
        x = _to_device(x)
    if x.dtype == np.float64:
        x = x.astype(np.float32)
    x = _bhsd(x, layout)
    size = x.itemsize
    return _View(x.data.ptr, x.shape, tuple(s // size for s in x.strides), str(x.dtype), x)


def _bhsd(x: Array, layout: str) -> Array:
    if x.ndim == 4 and layout == "bhsd":
        return x
    return arrays.to_bhsd(x, layout)


def _to_device(x: Array) -> Array:
    """A CuPy array of NumPy's, JAX's or a host torch tensor's contents; JAX's GPU memory is used in place."""
    import cupy

    if arrays.kind(x) == "jax" and any(d.platform == "gpu" for d in x.devices()):
        x.block_until_ready()  # JAX has streams of its own that cannot be waited for otherwise
        if str(x.dtype) != "bfloat16":
            return cupy.from_dlpack(x)
        memory = cupy.cuda.UnownedMemory(x.unsafe_buffer_pointer(), x.nbytes, x)
        return cupy.ndarray(x.shape, np.dtype(x.dtype), cupy.cuda.MemoryPointer(memory, 0))
    return cupy.asarray(arrays.to_numpy(x))


# --- one allocation for many arrays -----------------------------------------------------------------------------------


class _Arena:
    """Plans arrays, then cuts them all from one allocation of CuPy's pool."""

    def __init__(self) -> None:
        self._planned: dict[str, tuple[tuple[int, ...], type, int]] = {}
        self._size = 0

    def plan(self, name: str, shape: tuple[int, ...], dtype: type = np.float32) -> None:
        nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        self._planned[name] = (shape, dtype, self._size)
        self._size += -(-nbytes // 256) * 256

    def allocate(self) -> dict[str, Array]:
        import cupy

        memory = cupy.cuda.alloc(max(self._size, 1))
        return {
            name: cupy.ndarray(shape, dtype, memory + offset)
            for name, (shape, dtype, offset) in self._planned.items()
        }


# --- quantisation -----------------------------------------------------------------------------------------------------

_V_SCALES = {"channel": 0, "head": 1, "token": 2}
_STATISTICS_THREADS = 256
_STATISTICS_STEPS = 16
_functions: dict[Any, Any] = {}


@dataclass(frozen=True)
class _Quantizer:
    """The three kernels of quantize.cu for one recipe, head dimension and input type."""

    statistics: Any
    finish: Any
    pack: Any
    chunk: int  # rows of one partial result
    pack_threads: int
    pack_memory: int


def quantizer_defines(recipe: Recipe, D: int, dtype: str) -> dict[str, int]:
    """Return the macros of quantize.cu."""
    return {
        "INTFA_D": D,
        "INTFA_DP": packing.padded_head_dim(D),
        "INTFA_IN": OUTPUTS[dtype],
        "INTFA_SMOOTH": int(recipe.smooth_k),
        "INTFA_EQUALIZE": int(recipe.equalize),
        "INTFA_HADAMARD": int(recipe.hadamard),
        "INTFA_K_SCALE": K_SCALES[recipe.k_granularity],
        "INTFA_V_SCALE": _V_SCALES[recipe.v_granularity],
        "INTFA_V_HALF": int(recipe.v_format == "fp16"),
    }


def _quantizer(recipe: Recipe, D: int, dtype: str) -> _Quantizer:
    import cupy

    key = (cupy.cuda.runtime.getDevice(), recipe, D, dtype)
    found = _functions.get(key)
    if found is None:
        Dp = packing.padded_head_dim(D)
        defines = quantizer_defines(recipe, D, dtype)
        kernels = [
            jit.get_function("quantize", f"quantize_{e}", defines) for e in ("statistics", "finish", "pack")
        ]
        chunk = _STATISTICS_THREADS // (Dp // 8) * _STATISTICS_STEPS
        found = _functions[key] = _Quantizer(*kernels, chunk, 2 * Dp, Dp * (TILE // 4 + 1) * 4)
    return found


def _quantize(q: _View, k: _View, v: _View, recipe: Recipe, out_dtype: str) -> QuantizedQKV:
    B, H, Sq, D = q.shape
    Hkv, Sk = k.shape[1:3]
    Dp, tiles = packing.padded_head_dim(D), tiles_of(Sk)
    half = recipe.v_format == "fp16"

    result = _Arena()
    result.plan("q8", (B, H, Sq, Dp), np.int8)
    result.plan("q_scale", (B, H, Sq))
    result.plan("k8", (B, Hkv, tiles, TILE * Dp), np.int8)
    result.plan("k_scale", _k_scale_shape(recipe, B, Hkv, tiles))
    if half:
        result.plan("v8", (B, Hkv, tiles * TILE, Dp), np.float16)
    else:
        result.plan("v8", (B, Hkv, tiles, Dp * TILE), np.int8)
    result.plan("v_scale", (B, Hkv, Dp))
    result.plan("guard", (B, Hkv))
    if recipe.folded_v:
        result.plan("v_fold", (B, Hkv, tiles * TILE, 2))
        result.plan("v_token", (B, Hkv, tiles * TILE))
    if recipe.smooth_k:
        result.plan("lse_shift", (B, H, Sq))
        result.plan("k_mean", (B, Hkv, Dp))
    if recipe.equalize:
        result.plan("equalizer", (B, Hkv, 2, Dp))
    made = result.allocate()

    if B * H and Sk:
        _launch_quantizer(q, k, v, recipe, made, tiles)
    elif B * H and Sq:  # no key: Q is not looked at, and no kernel is launched
        for x in made.values():
            x.fill(0)

    token = made.get("v_token")
    v_scale = made["v_scale"]
    return QuantizedQKV(
        QuantizedTensor(made["q8"], made["q_scale"], "int8", "token", (B, H, Sq, D), "q", "packed"),
        QuantizedTensor(
            made["k8"], made["k_scale"], "int8", recipe.k_granularity, (B, Hkv, Sk, D), "k", "packed"
        ),
        QuantizedTensor(
            made["v8"],
            token
            if token is not None
            else v_scale
            if recipe.v_granularity == "channel"
            else v_scale[:, :, 0],
            recipe.v_format,
            recipe.v_granularity,
            (B, Hkv, Sk, D),
            "v",
            "packed",
        ),
        recipe,
        lse_shift=made.get("lse_shift"),
        out_dtype=out_dtype,
        extra={"operands": made},
    )


def _k_scale_shape(recipe: Recipe, B: int, Hkv: int, tiles: int) -> tuple[int, ...]:
    return {
        "token": (B, Hkv, tiles * TILE),
        "group": (B, Hkv, tiles, 4),
        "tile": (B, Hkv, tiles),
    }[recipe.k_granularity]


def _launch_quantizer(
    q: _View, k: _View, v: _View, recipe: Recipe, made: dict[str, Array], tiles: int
) -> None:
    B, H, Sq, D = q.shape
    Hkv, Sk = k.shape[1:3]
    Dp = packing.padded_head_dim(D)
    kernels = _quantizer(recipe, D, q.dtype)
    q_chunks, k_chunks = -(-Sq // kernels.chunk), -(-Sk // kernels.chunk)

    scratch = _Arena()
    scratch.plan("v_statistic", (B, Hkv, Dp))
    scratch.plan("v_partial", (B, Hkv, k_chunks, 2 if recipe.folded_v else Dp))
    key_statistics = recipe.smooth_k or recipe.equalize
    if key_statistics:
        scratch.plan("k_partial", (B, Hkv, k_chunks, 3, Dp))
    if recipe.equalize:
        scratch.plan("q_partial", (B, H, q_chunks, Dp))
    held = scratch.allocate()

    params = np.zeros((), QUANTIZE_PARAMS)
    for name, view in (("q", q), ("k", k), ("v", v)):
        view.fill(params[name])
        params[f"vector_{name}"] = view.vector()
    for name, array in (*made.items(), *held.items()):
        params[name] = array.data.ptr
    params["batches"], params["heads"], params["kv_heads"] = B, H, Hkv
    params["queries"], params["keys"], params["channels"], params["tiles"] = Sq, Sk, D, tiles
    params["q_chunks"], params["k_chunks"] = q_chunks, k_chunks
    args = (params[()],)

    chunks = B * Hkv * k_chunks * (2 if key_statistics else 1)
    if recipe.equalize:
        chunks += B * H * q_chunks
    row_tiles = -(-Sq // TILE)
    threads = _STATISTICS_THREADS
    kernels.statistics((chunks,), (threads,), args, shared_mem=threads * 8 * 4)
    kernels.finish((B * Hkv,), (threads,), args, shared_mem=threads * (8 + 3 * 4))
    kernels.pack(
        (2 * B * Hkv * tiles + B * H * row_tiles,),
        (kernels.pack_threads,),
        args,
        shared_mem=kernels.pack_memory,
    )


def quantize(q: Array, k: Array, v: Array, plan: Plan, *, layout: str = "bhsd") -> QuantizedQKV:
    """Quantise on the device into the packed layout. See :func:`intfa_cupy.quantize_qkv`."""
    with _where(q):
        return _quantize(*(_view(x, layout) for x in (q, k, v)), plan.problem.recipe, arrays.dtype_name(q))


def upload(qkv: QuantizedQKV) -> QuantizedQKV:
    """Bring a plain QuantizedQKV from host memory to the device in the packed layout."""
    import cupy

    from .model import guard

    recipe = qkv.recipe
    B, Hkv, Sk, D = qkv.k.shape
    Dp, tiles = packing.padded_head_dim(D), tiles_of(Sk)

    def padded(x: np.ndarray, axis: int, size: int) -> np.ndarray:
        width = [(0, 0)] * x.ndim
        width[axis] = (0, size - x.shape[axis])
        return np.pad(x, width)

    values = {"q8": packing.pack_q(qkv.q.values), "k8": packing.pack_k(qkv.k.values), "q_scale": qkv.q.scale}
    if recipe.v_format == "fp16":
        values["v8"] = padded(padded(qkv.v.values, 3, Dp), 2, tiles * TILE)
    else:
        values["v8"] = packing.pack_v(qkv.v.values)
    by_token = recipe.k_granularity == "token"
    values["k_scale"] = padded(qkv.k.scale, 2, tiles * TILE) if by_token else qkv.k.scale
    v_scale = np.zeros((B, Hkv, Dp), np.float32)
    if recipe.folded_v:
        with np.errstate(invalid="ignore"):
            largest = qkv.v.scale.max(axis=2, keepdims=True, initial=0)
            pairs = np.stack([np.log2(qkv.v.scale / largest), largest / qkv.v.scale], axis=3)
        values["v_fold"] = padded(pairs, 2, tiles * TILE)
        values["v_token"] = padded(qkv.v.scale, 2, tiles * TILE)
        v_scale[:] = largest
    elif recipe.v_granularity == "channel":
        v_scale[..., :D] = qkv.v.scale
    else:
        v_scale[:] = qkv.v.scale[..., None]
    values["v_scale"] = v_scale
    values["guard"] = guard(qkv)
    if qkv.lse_shift is not None:
        values["lse_shift"] = qkv.lse_shift
    made = {name: cupy.asarray(np.ascontiguousarray(x)) for name, x in values.items()}

    def packed(t: QuantizedTensor, scale: Array) -> QuantizedTensor:
        return QuantizedTensor(
            made[f"{t.which}8"], scale, t.format, t.granularity, t.shape, t.which, "packed"
        )

    token = made.get("v_token")
    channel = made["v_scale"] if recipe.v_granularity == "channel" else made["v_scale"][:, :, 0]
    return QuantizedQKV(
        packed(qkv.q, made["q_scale"]),
        packed(qkv.k, made["k_scale"]),
        packed(qkv.v, channel if token is None else token),
        recipe,
        lse_shift=made.get("lse_shift"),
        out_dtype=qkv.out_dtype,
        extra={"operands": made},
    )


# --- attention --------------------------------------------------------------------------------------------------------

_FIELDS = ("q", "q_scale", "k", "k_scale", "v", "v_scale", "v_fold", "guard", "lse_shift")
_OPERAND = {"q": "q8", "k": "k8", "v": "v8"}


@dataclass(frozen=True)
class _Launch:
    """A kernel with everything filled in that does not change from call to call on the same operands."""

    kernel: Any
    grid: tuple[int]
    block: tuple[int]
    shared_memory: int
    params: Any  # numpy.void of ATTENTION_PARAMS

    def __call__(
        self,
        problem: Problem,
        out: int,
        strides: tuple[int, int, int, int],
        lse: int,
    ) -> None:
        params = self.params.copy()
        params["out"], params["lse"] = out, lse
        params["out_batch"], params["out_head"], params["out_row"], params["out_channel"] = strides
        params["left"] = problem.left if 0 <= problem.left < _UNBOUNDED else _UNBOUNDED
        params["right"] = problem.right if 0 <= problem.right < _UNBOUNDED else _UNBOUNDED
        params["scale"], params["scale_log2"] = problem.scale, problem.scale * _LOG2E
        self.kernel(self.grid, self.block, (params,), shared_mem=self.shared_memory)


def _prepare(qkv: QuantizedQKV, tile: Tile, out_dtype: str) -> _Launch:
    """The launch of a tile on these operands, made once and kept with them."""
    launches = qkv.extra.setdefault("launches", {})
    launch = launches.get((tile, out_dtype))
    if launch is not None:
        return launch
    B, H, Sq, D = qkv.q.shape
    Hkv, Sk = qkv.k.shape[1:3]
    row_blocks = -(-Sq // tile.rows)
    params = np.zeros((), ATTENTION_PARAMS)
    operands = qkv.extra["operands"]
    for name in _FIELDS:
        array = operands.get(_OPERAND.get(name, name))
        params[name] = 0 if array is None else array.data.ptr
    sizes = {
        "batches": B, "heads": H, "kv_heads": Hkv, "queries": Sq, "keys": Sk, "channels": D,
        "tiles": tiles_of(Sk), "row_blocks": row_blocks,
    }  # fmt: skip
    for name, size in sizes.items():
        params[name] = size
    blocks = B * H * row_blocks
    kernel = jit.get_function(tile.entry, tile.entry, tile.defines(out_dtype), smem=tile.shared_memory)
    grid = min(blocks, device().sms) if tile.persistent else blocks
    launch = _Launch(kernel, (grid,), (tile.threads,), tile.shared_memory, params[()])
    launches[tile, out_dtype] = launch
    return launch


def _run(qkv: QuantizedQKV, plan: Plan, out: _View, lse: Array | None) -> None:
    """Launch the attention kernel; `out` in a type that kernels write."""
    problem = plan.problem
    if not (problem.B and problem.H and problem.Sq):
        return
    if problem.Sk == 0:
        raise AssertionError("a call without keys launches nothing")
    _prepare(qkv, plan.tile, out.dtype)(problem, out.pointer, out.strides, 0 if lse is None else lse.data.ptr)


def attention_quantized(qkv: QuantizedQKV, plan: Plan) -> Any:
    """Run the operator on quantised inputs. See :func:`intfa_cupy.attention_quantized`."""
    import cupy

    if qkv.q.layout == "plain":
        return _on_host(attention_quantized(upload(qkv), plan))
    problem = plan.problem
    with _where(qkv.q.values):
        shape = (problem.B, problem.H, problem.Sq, problem.D)
        out_dtype = "float32" if problem.out_dtype == "float64" else problem.out_dtype
        out = cupy.empty(shape, _dtype(out_dtype))
        lse = cupy.empty(shape[:3], np.float32) if problem.return_lse else None
        if problem.Sk:
            strides = (shape[1] * shape[2] * shape[3], shape[2] * shape[3], shape[3], 1)
            _run(qkv, plan, _View(out.data.ptr, shape, strides, out_dtype, out), lse)
        else:
            _fill_empty(out, lse)
        if problem.out_dtype == "float64":
            out = out.astype(np.float64)
    return out if lse is None else (out, lse)


def _on_host(result: Any) -> Any:
    return tuple(x.get() for x in result) if isinstance(result, tuple) else result.get()


@lru_cache(maxsize=8)
def _dtype(name: str) -> np.dtype:
    import ml_dtypes

    return np.dtype(getattr(ml_dtypes, name, name))


def _fill_empty(out: Array, lse: Array | None) -> None:
    """The result of rows that see nothing."""
    out.fill(0)
    if lse is not None:
        lse.fill(-np.inf)


def attention(
    q: Array, k: Array, v: Array, plan: Plan, *, layout: str = "bhsd", out: Array | None = None
) -> Any:
    """Quantise and attend. See :func:`intfa_cupy.attention`."""
    import cupy

    problem = plan.problem
    result: Array
    ndim = len(arrays.shape(q))
    with _where(q):
        qkv = _quantize(*(_view(x, layout) for x in (q, k, v)), problem.recipe, problem.out_dtype)
        in_place = out is not None and _on_device(out) and problem.out_dtype != "float64"
        result = out if in_place else _empty_like(q, problem.out_dtype)
        lse = cupy.empty((problem.B, problem.H, problem.Sq), np.float32) if problem.return_lse else None
        if problem.Sk:
            _run(qkv, plan, _view(result, layout), lse)
        else:
            _fill_empty(result if arrays.kind(result) == "cupy" else _as_cupy(result), lse)
        done = _hand_back(result, q, problem.out_dtype, None if in_place else out)
        if lse is None:
            return done
        lse = arrays.squeeze_lse(lse, ndim)
        return done, _hand_back(lse, q, "float32", None)


def _on_device(x: Array) -> bool:
    which = arrays.kind(x)
    return which == "cupy" or (which == "torch" and x.is_cuda)


def _empty_like(q: Array, dtype: str) -> Array:
    """An uninitialised array of q's shape on the device: torch's for torch on the GPU, else CuPy's."""
    import cupy

    dtype = "float32" if dtype == "float64" else dtype
    if arrays.kind(q) == "torch" and q.is_cuda:
        import torch

        return torch.empty(q.shape, dtype=getattr(torch, dtype), device=q.device)
    return cupy.empty(arrays.shape(q), _dtype(dtype))


def _as_cupy(x: Array) -> Array:
    """A CuPy view of a torch tensor's memory, as bytes where CuPy lacks the type."""
    import cupy
    import torch

    return cupy.from_dlpack(x.view(torch.int16) if x.dtype == torch.bfloat16 else x)


def _hand_back(result: Array, q: Array, dtype: str, out: Array | None) -> Array:
    """Turn a result on the device into q's kind, written to `out` if there is one."""
    which = arrays.kind(q)
    if dtype == "float64":
        result = result.astype(np.float64) if arrays.kind(result) == "cupy" else result.double()
    if out is not None:
        if arrays.kind(out) == "numpy":
            np.copyto(out, result.get())
        elif arrays.kind(result) == arrays.kind(out):
            copy: Callable[[Any], Any] = (
                out.copy_ if arrays.kind(out) == "torch" else lambda x: cupy_copyto(out, x)
            )
            copy(result)
        else:
            out.copy_(arrays.like(result.get(), q, dtype))
        return out
    if arrays.kind(result) == which:
        return result
    if which == "numpy":
        return result.get()
    if which == "torch":
        if not q.is_cuda:
            return arrays.like(result.get(), q, dtype)
        import torch

        return torch.from_dlpack(result)
    import jax

    if all(d.platform == "gpu" for d in q.devices()):
        import cupy

        cupy.cuda.get_current_stream().synchronize()
        return jax.dlpack.from_dlpack(result)
    return arrays.like(result.get(), q, dtype)


def cupy_copyto(out: Array, x: Array) -> None:
    """Copy one CuPy array into another."""
    out[...] = x
