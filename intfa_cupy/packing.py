"""The packed layout that every kernel reads, spelled out for NumPy and CuPy arrays.

The quantisation kernels write it directly; this module is its definition, used to bring
tensors made elsewhere to the GPU, to bring packed ones back, and by the tests.

Q   rows of its elements, D padded with zeros to Dp = 64, 128 or 256
K   one tile of 128 keys after the other. A row (key) of W bytes is cut into slabs of at most 128 bytes; a
    slab is its 128 keys' bytes one after the other, in chunks of 16 bytes; chunk c of key r lies at
    c ^ r % 8 in a slab of 128 bytes, c ^ (r / 2) % 4 in one of 64, c ^ (r / 4) % 2 in one of 32
V   of one byte, a tile: transposed because 8-bit tensor-core operands run along the summed index:
    Dp rows (channels) of 128 bytes (key positions); chunk c of row r at c ^ r % 8;
    position 16h + 4q + b of a group of 32 holds key 16h + 8(b / 2) + 2q + b % 2, so that the keys
    that a thread holds after Q K^T are the four consecutive ones that P @ V wants of it;
    INT8 is stored as v + 128, for P @ V then has only products that are not negative
    of two bytes: rows as they are, zero-padded to whole tiles
V's scales per token, a tile: FOLD_OFFSET + their binary logarithms relative to the head's largest, then
    that one divided by each; 128 floats each, in the order of V's positions

INT4: a group of 32 channels is 16 bytes, byte c of which holds channel c below and channel 16 + c above.
The XORs are the tensor cores' own shared-memory swizzles: a tile is copied as it lies.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import ml_dtypes
import numpy as np

from .quantized import CHANNEL_GROUP, TILE, QuantizedQKV, QuantizedTensor, pack_int4, tiles_of

__all__ = [
    "FOLD_OFFSET",
    "FORMATS",
    "SCALES",
    "V_BIAS",
    "V_SCALES",
    "key_of_position",
    "pack_fold",
    "pack_k",
    "pack_q",
    "pack_v",
    "padded_head_dim",
    "storage",
    "to_host",
    "unpack",
    "unpack_k",
    "unpack_scale",
    "unpack_v",
]

Array = Any
_CHUNK = 16
#: What is added to V of INT8: adding it to a byte and inverting the byte's highest bit are the same.
V_BIAS = 128
#: What is added to the logarithms of folded V's scales (cuda_src/params.cuh).
FOLD_OFFSET = np.float32(32)
#: Storage formats and their numbers in cuda_src/params.cuh.
FORMATS = {"int8": 0, "int4": 1, "fp16": 2, "e4m3": 4, "e5m2": 5}
#: What one scale of Q or K covers, and of V, with its number there.
SCALES = {"token": 0, "group": 1, "tile": 2, "channel": 3, "head": 4, "none": 5}
V_SCALES = {"channel": 0, "head": 1, "token": 2, "none": 3}
_FP8 = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}


def padded_head_dim(D: int) -> int:
    """Return Dp: 64, 128 or 256."""
    return next(Dp for Dp in (64, 128, 256) if Dp >= D)


def storage(
    fmt: str, which: str, B: int, heads: int, S: int, Dp: int
) -> tuple[tuple[int, ...], type[np.generic]]:
    """Return shape and dtype of a packed operand; INT4, FP8 and V of INT8 are bytes."""
    integer = np.uint8 if which == "v" else np.int8
    dtypes: dict[str, type[np.generic]] = {"int8": integer, "fp16": np.float16}
    dtype = dtypes.get(fmt, np.uint8)
    width = Dp // 2 if fmt == "int4" else Dp
    if which == "q":
        return (B, heads, S, width), dtype
    if which == "v" and fmt == "fp16":
        return (B, heads, tiles_of(S) * TILE, Dp), dtype
    return (B, heads, tiles_of(S), TILE * width), dtype


def key_of_position() -> np.ndarray:
    """Return for each of the 128 positions of a packed V row the key of the tile that it holds."""
    p = np.arange(TILE)
    h, quad, b = p % 32 // 16, p % 16 // 4, p % 4
    return p // 32 * 32 + 16 * h + 8 * (b // 2) + 2 * quad + b % 2


def _swizzle(rows: int, chunks: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices (row, chunk) that apply the XOR to an array (..., rows, chunks, 16); their own inverse."""
    r = np.arange(rows)[:, None]
    c = np.arange(chunks)[None, :]
    return r, c ^ (r * chunks // 8 % chunks)


def _padded(x: Array, S: int, Dp: int) -> Array:
    """Zero-pad (B, heads, S', D) to (B, heads, S, Dp)."""
    B, heads, rows, D = x.shape
    out = (np if isinstance(x, np.ndarray) else _cupy()).zeros((B, heads, S, Dp), x.dtype)
    out[:, :, :rows, :D] = x
    return out


def _cupy() -> Any:
    import cupy

    return cupy


def _bytes(x: Array, fmt: str) -> Array:
    """The elements of rows padded to Dp as they are stored, one item each, INT4 two to an item."""
    if fmt in _FP8:
        return x.view(np.uint8)
    if fmt != "int4":
        return x
    groups = x.shape[-1] // CHANNEL_GROUP
    pair = x.reshape(*x.shape[:-1], groups, 2, CHANNEL_GROUP // 2).astype(np.uint8)
    both = (pair[..., 0, :] & 15) | (pair[..., 1, :] << 4)
    return both.reshape(*x.shape[:-1], x.shape[-1] // 2)


def _numbers(x: Array, fmt: str) -> Array:
    """Undo :func:`_bytes`. FP8 becomes float32 in CuPy, which has no such type."""
    if fmt in _FP8:
        x = x.view(np.uint8)
        if isinstance(x, np.ndarray):
            return x.view(_FP8[fmt])
        table = np.arange(256, dtype=np.uint8).view(_FP8[fmt]).astype(np.float32)
        return _cupy().asarray(table)[x]
    if fmt != "int4":
        return x
    half = CHANNEL_GROUP // 2
    both = x.reshape(*x.shape[:-1], x.shape[-1] // half, half)
    out = (np if isinstance(x, np.ndarray) else _cupy()).empty((*both.shape[:-1], 2, half), np.int8)
    out[..., 0, :] = (both << 4).view(np.int8) >> 4
    out[..., 1, :] = both.view(np.int8) >> 4
    return out.reshape(*x.shape[:-1], x.shape[-1] * 2)


def pack_q(q: Array, fmt: str = "int8") -> Array:
    """Pad numbers (B, H, Sq, D) to Dp channels and store them in a format."""
    return _bytes(_padded(q, q.shape[2], padded_head_dim(q.shape[3])), fmt)


def pack_k(k: Array, fmt: str = "int8") -> Array:
    """Pack numbers (B, Hkv, Sk, D) into (B, Hkv, nT, 128 * W items)."""
    nT = tiles_of(k.shape[2])
    rows = _bytes(_padded(k, nT * TILE, padded_head_dim(k.shape[3])), fmt)
    B, Hkv, _, W = rows.shape
    slab, chunk = _slab(rows)
    x = rows.reshape(B, Hkv, nT, TILE, W // slab, slab // chunk, chunk).transpose(0, 1, 2, 4, 3, 5, 6)
    row, place = _swizzle(TILE, slab // chunk)
    return x[:, :, :, :, row, place].reshape(B, Hkv, nT, TILE * W)


def _slab(x: Array, width: int | None = None) -> tuple[int, int]:
    """Items of a slab and of a chunk of K, given rows of some width."""
    width = x.shape[-1] if width is None else width
    return min(width, 128 // x.dtype.itemsize), _CHUNK // x.dtype.itemsize


def unpack_k(packed: Array, Sk: int, D: int, fmt: str = "int8") -> Array:
    """Undo :func:`pack_k`: (B, Hkv, Sk, D)."""
    B, Hkv, nT, size = packed.shape
    W = size // TILE
    slab, chunk = _slab(packed, W)
    row, place = _swizzle(TILE, slab // chunk)
    x = packed.reshape(B, Hkv, nT, W // slab, TILE, slab // chunk, chunk)[:, :, :, :, row, place]
    x = x.transpose(0, 1, 2, 4, 3, 5, 6).reshape(B, Hkv, nT * TILE, W)
    return _numbers(x, fmt)[:, :, :Sk, :D]


def pack_v(v: Array, fmt: str = "int8") -> Array:
    """Pack numbers (B, Hkv, Sk, D): transposed and permuted into (B, Hkv, nT, Dp * 128), or padded fp16."""
    B, Hkv, Sk, D = v.shape
    nT, Dp = tiles_of(Sk), padded_head_dim(D)
    x = _bytes(_padded(v, nT * TILE, Dp), fmt)
    if fmt == "fp16":
        return x
    x = x.reshape(B, Hkv, nT, TILE, Dp)[:, :, :, key_of_position()]
    x = x.transpose(0, 1, 2, 4, 3).reshape(B, Hkv, nT, Dp, TILE // _CHUNK, _CHUNK)
    row, chunk = _swizzle(Dp, TILE // _CHUNK)
    x = x[:, :, :, row, chunk].reshape(B, Hkv, nT, Dp * TILE)
    return x.view(np.uint8) ^ np.uint8(V_BIAS) if fmt == "int8" else x


def pack_fold(fold: Array) -> Array:
    """Pack two numbers of each key (B, Hkv, 2, Sk): into (B, Hkv, nT, 2, 128), in the order of V's keys."""
    B, Hkv, _, Sk = fold.shape
    nT = tiles_of(Sk)
    x = _padded(fold, 2, nT * TILE).reshape(B, Hkv, 2, nT, TILE)
    return np.ascontiguousarray(x.swapaxes(2, 3)[..., key_of_position()], np.float32)


def unpack_v(packed: Array, Sk: int, D: int, fmt: str = "int8") -> Array:
    """Undo :func:`pack_v`: (B, Hkv, Sk, D)."""
    if fmt == "fp16":
        return packed[:, :, :Sk, :D]
    B, Hkv, nT, size = packed.shape
    Dp = size // TILE
    row, chunk = _swizzle(Dp, TILE // _CHUNK)
    if fmt == "int8":
        packed = (packed ^ np.uint8(V_BIAS)).view(np.int8)
    x = packed.reshape(B, Hkv, nT, Dp, TILE // _CHUNK, _CHUNK)[:, :, :, row, chunk]
    x = x.reshape(B, Hkv, nT, Dp, TILE).transpose(0, 1, 2, 4, 3)
    position = np.argsort(key_of_position())
    return _numbers(x[:, :, :, position].reshape(B, Hkv, nT * TILE, Dp), fmt)[:, :, :Sk, :D]


def unpack(t: QuantizedTensor) -> Array:
    """Return the stored numbers of a packed tensor, (B, heads, S, D); int8 for INT4."""
    _, _, S, D = t.shape
    if t.which == "q":
        return _numbers(t.values, t.format)[:, :, :S, :D]
    return (unpack_k if t.which == "k" else unpack_v)(t.values, S, D, t.format)


def unpack_scale(t: QuantizedTensor) -> Array | None:
    """Return the scale of a packed tensor in the shape of a plain one."""
    _, _, S, D = t.shape
    if t.scale is None:
        return None
    if t.granularity == "token":
        return t.scale[..., :S]
    if t.granularity != "channel":
        return t.scale
    if t.which == "v":
        return t.scale[..., :D]
    groups = -(-D // CHANNEL_GROUP)
    if t.which == "q":
        return t.scale[..., :groups]
    B, heads, tiles, G, _ = t.scale.shape  # per tile by group, then by key
    return t.scale.swapaxes(3, 4).reshape(B, heads, tiles * TILE, G)[:, :, :S, :groups]


def to_host(qkv: QuantizedQKV) -> QuantizedQKV:
    """Bring a packed QuantizedQKV to host memory in plain layout."""

    def plain(t: QuantizedTensor) -> QuantizedTensor:
        scale = None if t.scale is None else _host(t.scale)
        here = dataclasses.replace(t, values=_host(t.values), scale=scale)
        scale = unpack_scale(here)
        values = np.ascontiguousarray(unpack(here))
        return dataclasses.replace(
            t,
            values=pack_int4(values) if t.format == "int4" else values,
            scale=None if scale is None else np.ascontiguousarray(scale),
            layout="plain",
        )

    shift = None if qkv.lse_shift is None else _host(qkv.lse_shift)
    return dataclasses.replace(qkv, q=plain(qkv.q), k=plain(qkv.k), v=plain(qkv.v), lse_shift=shift, extra={})


def _host(x: Array) -> np.ndarray:
    return x if isinstance(x, np.ndarray) else x.get()
