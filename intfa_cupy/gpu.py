"""Quantisation and attention on the GPU: buffers, launches, and the caller's stream.

Nothing here waits for the device: kernels go to the current stream of CuPy, or of torch for torch tensors,
and the calls can be captured in a CUDA graph. Two structs carry all arguments; their fields are those of
``cuda_src/params.cuh``.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
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


def _scalar(packed: bytes, dtype: np.dtype) -> Any:
    """A struct as CuPy takes it by value: a NumPy scalar, in memory that may be written to."""
    return np.frombuffer(bytearray(packed), dtype)[0]


# --- devices ------------------------------------------------------------------------------------------------


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


# --- arrays of any library as strided memory ----------------------------------------------------------------


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
    return _View(x.data.ptr, x.shape, tuple(s // size for s in x.strides), _dtype_name(x.dtype), x)


#: NumPy works a dtype's name out anew at every call.
_dtype_name = lru_cache(maxsize=64)(str)


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


# --- one allocation for many arrays -------------------------------------------------------------------------

_Shape = tuple[int, ...]


class _Plan:
    """Where arrays lie in one allocation."""

    def __init__(self, *arrays: tuple[str, _Shape, type]) -> None:
        self.places: list[tuple[str, _Shape, np.dtype, int]] = []
        self.size = 0
        for name, shape, dtype in arrays:
            self.places.append((name, shape, np.dtype(dtype), self.size))
            self.size += -(-math.prod(shape) * np.dtype(dtype).itemsize // 256) * 256

    def allocate(self) -> dict[str, Array]:
        """Return the arrays, cut from CuPy's pool on the current stream."""
        import cupy

        memory, ndarray = cupy.cuda.alloc(max(self.size, 1)), cupy.ndarray
        return {name: ndarray(shape, dtype, memory + offset) for name, shape, dtype, offset in self.places}


# --- quantisation -------------------------------------------------------------------------------------------

_V_SCALES = {"channel": 0, "head": 1, "token": 2}
# The constants of quantize.cu.
_STATISTICS_THREADS = 256
_STATISTICS_STEPS = 16
_FINISH_THREADS = 1024
_functions: dict[Any, Any] = {}


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


def _function(source: str, entry: str, defines: dict[str, int], smem: int = 0) -> Any:
    """A kernel that can be called; without the look-ups of RawKernel on every call where there is one."""
    kernel = jit.get_function(source, entry, defines, smem=smem)
    return getattr(kernel, "kernel", kernel)


def _quantizer(recipe: Recipe, D: int, dtype: str) -> list[Any]:
    """The three kernels of quantize.cu."""
    import cupy

    key = (cupy.cuda.runtime.getDevice(), recipe, D, dtype)
    found = _functions.get(key)
    if found is None:
        defines = quantizer_defines(recipe, D, dtype)
        found = [_function("quantize", f"quantize_{e}", defines) for e in ("statistics", "finish", "pack")]
        _functions[key] = found
    return found


@dataclass(frozen=True)
class _QuantizerLaunch:
    """Everything about a call of the quantiser that follows from its shapes."""

    result: _Plan
    scratch: _Plan
    sizes: bytes  # of QuantizeParams, after the pointers and before the vector flags
    statistics_blocks: int
    finish_blocks: int
    pack_blocks: int
    pack_threads: int
    pack_memory: int


_QUANTIZER_POINTERS = tuple(
    name for name in QUANTIZE_PARAMS.names or () if QUANTIZE_PARAMS[name] == np.uint64
)


@lru_cache(maxsize=1024)
def _quantizer_launch(recipe: Recipe, B: int, H: int, Hkv: int, Sq: int, Sk: int, D: int) -> _QuantizerLaunch:
    Dp, tiles = packing.padded_head_dim(D), tiles_of(Sk)
    chunk = _STATISTICS_THREADS // (Dp // 8) * _STATISTICS_STEPS
    q_chunks, k_chunks = -(-Sq // chunk), -(-Sk // chunk)
    f32, key_statistics = np.float32, recipe.smooth_k or recipe.equalize

    v8: Any = ("v8", (B, Hkv, tiles, Dp * TILE), np.int8)
    if recipe.v_format == "fp16":
        v8 = ("v8", (B, Hkv, tiles * TILE, Dp), np.float16)
    result: list[Any] = [
        ("q8", (B, H, Sq, Dp), np.int8),
        ("q_scale", (B, H, Sq), f32),
        ("k8", (B, Hkv, tiles, TILE * Dp), np.int8),
        ("k_scale", _k_scale_shape(recipe, B, Hkv, tiles), f32),
        v8,
        ("v_scale", (B, Hkv, Dp), f32),
        ("guard", (B, Hkv), f32),
    ]
    scratch: list[Any] = [
        ("v_statistic", (B, Hkv, Dp), f32),
        ("v_partial", (B, Hkv, k_chunks, 2 if recipe.folded_v else Dp), f32),
    ]
    statistics = B * Hkv * k_chunks
    if recipe.folded_v:
        result += [("v_fold", (B, Hkv, tiles * TILE, 2), f32), ("v_token", (B, Hkv, tiles * TILE), f32)]
    if recipe.smooth_k:
        result += [("lse_shift", (B, H, Sq), f32), ("k_mean", (B, Hkv, Dp), f32)]
    if key_statistics:
        scratch += [("k_partial", (B, Hkv, k_chunks, 3, Dp), f32)]
        statistics += B * Hkv * k_chunks
    if recipe.equalize:
        result += [("equalizer", (B, Hkv, 2, Dp), f32)]
        scratch += [("q_partial", (B, H, q_chunks, Dp), f32)]
        statistics += B * H * q_chunks
    return _QuantizerLaunch(
        _Plan(*result),
        _Plan(*scratch),
        struct.pack("<9i", B, H, Hkv, Sq, Sk, D, tiles, q_chunks, k_chunks),
        statistics_blocks=statistics,
        finish_blocks=B * Hkv,
        pack_blocks=2 * B * Hkv * tiles + B * H * -(-Sq // TILE),
        pack_threads=2 * Dp,
        pack_memory=Dp * (TILE // 4 + 1) * 4,
    )


def _quantize(q: _View, k: _View, v: _View, recipe: Recipe) -> dict[str, Array]:
    """Launch the quantiser; return the packed operands by the names of struct QuantizeParams."""
    B, H, Sq, D = q.shape
    launch = _quantizer_launch(recipe, B, H, k.shape[1], Sq, k.shape[2], D)
    made = launch.result.allocate()
    if not (B * H and k.shape[2]):  # without a head or a key nothing is launched, here or later
        for x in made.values():
            x.fill(0)
        return made
    statistics, finish, pack = _quantizer(recipe, D, q.dtype)
    held = launch.scratch.allocate()
    pointers = {name: x.data.ptr for x_by_name in (made, held) for name, x in x_by_name.items()}
    params = struct.pack(
        f"<15q{len(_QUANTIZER_POINTERS)}Q36s3i",
        *(q.pointer, *q.strides, k.pointer, *k.strides, v.pointer, *v.strides),
        *(pointers.get(name, 0) for name in _QUANTIZER_POINTERS),
        launch.sizes,
        *(q.vector(), k.vector(), v.vector()),
    )
    args = (_scalar(params, QUANTIZE_PARAMS),)
    threads = _STATISTICS_THREADS
    statistics((launch.statistics_blocks,), (threads,), args, shared_mem=threads * 8 * 4)
    finish((launch.finish_blocks,), (_FINISH_THREADS,), args, shared_mem=_FINISH_THREADS * (8 + 3 * 4))
    pack((launch.pack_blocks,), (launch.pack_threads,), args, shared_mem=launch.pack_memory)
    return made


def _k_scale_shape(recipe: Recipe, B: int, Hkv: int, tiles: int) -> _Shape:
    return {
        "token": (B, Hkv, tiles * TILE),
        "group": (B, Hkv, tiles, 4),
        "tile": (B, Hkv, tiles),
    }[recipe.k_granularity]


def _packed(made: dict[str, Array], recipe: Recipe, shapes: tuple[Any, ...], out_dtype: str) -> QuantizedQKV:
    """The container of packed operands."""
    v_scale = made["v_scale"]
    if recipe.folded_v:
        v_scale = made["v_token"]
    elif recipe.v_granularity != "channel":
        v_scale = v_scale[:, :, 0]
    q_shape, k_shape, v_shape = shapes
    return QuantizedQKV(
        QuantizedTensor(made["q8"], made["q_scale"], "int8", "token", q_shape, "q", "packed"),
        QuantizedTensor(made["k8"], made["k_scale"], "int8", recipe.k_granularity, k_shape, "k", "packed"),
        QuantizedTensor(made["v8"], v_scale, recipe.v_format, recipe.v_granularity, v_shape, "v", "packed"),
        recipe,
        lse_shift=made.get("lse_shift"),
        out_dtype=out_dtype,
        extra={"operands": made},
    )


def quantize(q: Array, k: Array, v: Array, plan: Plan, *, layout: str = "bhsd") -> QuantizedQKV:
    """Quantise on the device into the packed layout. See :func:`intfa_cupy.quantize_qkv`."""
    with _where(q):
        views = _views(q, k, v, layout)
        recipe = plan.problem.recipe
        made = _quantize(*views, recipe)
        return _packed(made, recipe, tuple(x.shape for x in views), arrays.dtype_name(q))


def _views(q: Array, k: Array, v: Array, layout: str) -> tuple[_View, _View, _View]:
    return _view(q, layout), _view(k, layout), _view(v, layout)


def upload(qkv: QuantizedQKV) -> QuantizedQKV:
    """Bring a plain QuantizedQKV from host memory to the device in the packed layout."""
    import cupy

    from .model import guard

    recipe = qkv.recipe
    v_token: Any = qkv.v.scale
    B, Hkv, Sk, D = qkv.k.shape
    Dp, tiles = packing.padded_head_dim(D), tiles_of(Sk)

    def padded(x: Any, axis: int, size: int) -> np.ndarray:
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
            largest = v_token.max(axis=2, keepdims=True, initial=0)
            pairs = np.stack([np.log2(v_token / largest), largest / v_token], axis=3)
        values["v_fold"] = padded(pairs, 2, tiles * TILE)
        values["v_token"] = padded(v_token, 2, tiles * TILE)
        v_scale[:] = largest
    elif recipe.v_granularity == "channel":
        v_scale[..., :D] = v_token
    else:
        v_scale[:] = v_token[..., None]
    values["v_scale"] = v_scale
    values["guard"] = guard(qkv)
    if qkv.lse_shift is not None:
        values["lse_shift"] = qkv.lse_shift
    made = {name: cupy.asarray(np.ascontiguousarray(x)) for name, x in values.items()}

    return _packed(made, recipe, (qkv.q.shape, qkv.k.shape, qkv.v.shape), qkv.out_dtype)


# --- attention ----------------------------------------------------------------------------------------------

_OPERANDS = ("q8", "q_scale", "k8", "k_scale", "v8", "v_scale", "v_fold", "guard", "lse_shift")
_Strides = tuple[int, int, int, int]


@dataclass(frozen=True)
class _Launch:
    """A kernel with everything filled in that does not change from call to call on the same operands."""

    tile: Tile
    kernel: Any
    grid: tuple[int]
    block: tuple[int]
    operands: bytes  # AttentionParams up to the output
    sizes: bytes  # and after its strides

    def __call__(self, problem: Problem, out: int, strides: _Strides, lse: int) -> None:
        left, right, scale = problem.left, problem.right, problem.scale
        params = struct.pack(
            "<72sQQ4q32sii2f",
            self.operands,
            out,
            lse,
            *strides,
            self.sizes,
            left if 0 <= left < _UNBOUNDED else _UNBOUNDED,
            right if 0 <= right < _UNBOUNDED else _UNBOUNDED,
            scale,
            scale * _LOG2E,
        )
        args = (_scalar(params, ATTENTION_PARAMS),)
        self.kernel(self.grid, self.block, args, shared_mem=self.tile.shared_memory)


def _prepare(operands: dict[str, Array], problem: Problem, tile: Tile, out_dtype: str) -> _Launch:
    row_blocks = -(-problem.Sq // tile.rows)
    blocks = problem.B * problem.H * row_blocks
    pointers = [0 if (x := operands.get(name)) is None else x.data.ptr for name in _OPERANDS]
    p = problem
    return _Launch(
        tile,
        _attention_function(device_number(), tile, out_dtype),
        (min(blocks, device().sms) if tile.persistent else blocks,),
        (tile.threads,),
        struct.pack("<9Q", *pointers),
        struct.pack("<8i", p.B, p.H, p.Hkv, p.Sq, p.Sk, p.D, tiles_of(p.Sk), row_blocks),
    )


def device_number() -> int:
    """Return the number of the current device."""
    import cupy

    return int(cupy.cuda.runtime.getDevice())


def _attention_function(ordinal: int, tile: Tile, out_dtype: str) -> Any:
    key = (ordinal, tile, out_dtype)
    found = _functions.get(key)
    if found is None:
        defines = tile.defines(out_dtype)
        found = _functions[key] = _function(tile.entry, tile.entry, defines, tile.shared_memory)
    return found


def attention_quantized(qkv: QuantizedQKV, plan: Plan) -> Any:
    """Run the operator on quantised inputs. See :func:`intfa_cupy.attention_quantized`."""
    import cupy

    if qkv.q.layout == "plain":
        return _on_host(attention_quantized(upload(qkv), plan))
    home = qkv.q.values.device.id
    if home != cupy.cuda.runtime.getDevice():
        with cupy.cuda.Device(home):
            return attention_quantized(qkv, plan)
    problem, tile = plan.problem, plan.tile
    B, H, Sq, D = shape = (problem.B, problem.H, problem.Sq, problem.D)
    out_dtype = "float32" if problem.out_dtype == "float64" else problem.out_dtype
    out = cupy.empty(shape, _dtype(out_dtype))
    lse = cupy.empty((B, H, Sq), np.float32) if problem.return_lse else None
    if problem.Sk == 0:
        _fill_empty(out, lse)
    elif B * H * Sq:
        launches = qkv.extra.setdefault("launches", {})
        launch = launches.get((id(tile), out_dtype))
        if launch is None or launch.tile is not tile:
            launch = _prepare(qkv.extra["operands"], problem, tile, out_dtype)
            launches[id(tile), out_dtype] = launch
        launch(problem, out.data.ptr, (H * Sq * D, Sq * D, D, 1), 0 if lse is None else lse.data.ptr)
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
        operands = _quantize(*_views(q, k, v, layout), problem.recipe)
        in_place = out is not None and _on_device(out) and problem.out_dtype != "float64"
        result = out if in_place else _empty_like(q, problem.out_dtype)
        lse = cupy.empty((problem.B, problem.H, problem.Sq), np.float32) if problem.return_lse else None
        if problem.Sk == 0:
            _fill_empty(result if arrays.kind(result) == "cupy" else _as_cupy(result), lse)
        elif problem.B * problem.H * problem.Sq:
            target = _view(result, layout)
            launch = _prepare(operands, problem, plan.tile, target.dtype)
            launch(problem, target.pointer, target.strides, 0 if lse is None else lse.data.ptr)
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
            _copy(out, result)
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


def _copy(out: Array, x: Array) -> None:
    """Copy between two arrays of the same library."""
    if arrays.kind(out) == "torch":
        out.copy_(x)
    else:
        out[...] = x
