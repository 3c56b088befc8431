"""The packed layout that every kernel reads, spelled out for NumPy and CuPy arrays.

The quantisation kernels write it directly; this module is its definition, used to bring
tensors made elsewhere to the GPU, to bring packed ones back, and by the tests.

K, one tile of 128 keys, D padded with zeros to Dp = 64, 128 or 256:
    Dp = 64     128 rows (keys) of 64 bytes; 16-byte chunk c of row r lies at c ^ (r / 2) % 4
    Dp >= 128   slabs of 128 channels, each 128 rows of 128 bytes; chunk c of row r at c ^ r % 8
V, one tile, transposed because 8-bit tensor-core operands run along the summed index:
    Dp rows (channels) of 128 bytes (key positions); chunk c of row r at c ^ r % 8
    position 16h + 4q + b of a group of 32 holds key 16h + 8(b / 2) + 2q + b % 2, so that the keys
    that a thread holds after Q K^T are the four consecutive ones that P @ V wants of it.
The XORs are the tensor cores' own shared-memory swizzles: a tile is copied as it lies.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from .quantized import TILE, QuantizedQKV, QuantizedTensor, tiles_of

__all__ = [
    "key_of_position",
    "pack_k",
    "pack_q",
    "pack_v",
    "padded_head_dim",
    "to_host",
    "unpack",
    "unpack_k",
    "unpack_v",
]

Array = Any
_CHUNK = 16


def padded_head_dim(D: int) -> int:
    """Return Dp: 64, 128 or 256."""
    return next(Dp for Dp in (64, 128, 256) if Dp >= D)


def key_of_position() -> np.ndarray:
    """Return for each of the 128 positions of a packed V row the key of the tile that it holds."""
    p = np.arange(TILE)
    h, quad, b = p % 32 // 16, p % 16 // 4, p % 4
    return p // 32 * 32 + 16 * h + 8 * (b // 2) + 2 * quad + b % 2


def _swizzle(rows: int, chunks: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices (row, chunk) that apply the XOR to an array (..., rows, chunks, 16); their own inverse."""
    r = np.arange(rows)[:, None]
    c = np.arange(chunks)[None, :]
    return r, c ^ (r % 8 if chunks == 8 else r // 2 % 4)


def _padded(x: Array, S: int, Dp: int) -> Array:
    """Zero-pad (B, heads, S', D) to (B, heads, S, Dp)."""
    B, heads, rows, D = x.shape
    out = (np if isinstance(x, np.ndarray) else _cupy()).zeros((B, heads, S, Dp), x.dtype)
    out[:, :, :rows, :D] = x
    return out


def _cupy() -> Any:
    import cupy

    return cupy


def pack_q(q: Array) -> Array:
    """Pad (B, H, Sq, D) int8 to (B, H, Sq, Dp)."""
    return _padded(q, q.shape[2], padded_head_dim(q.shape[3]))


def pack_k(k: Array) -> Array:
    """Pack (B, Hkv, Sk, D) int8 into (B, Hkv, nT, 128 * Dp)."""
    B, Hkv, Sk, D = k.shape
    nT, Dp = tiles_of(Sk), padded_head_dim(D)
    slab = min(Dp, 128)
    x = _padded(k, nT * TILE, Dp).reshape(B, Hkv, nT, TILE, Dp // slab, slab // _CHUNK, _CHUNK)
    x = x.transpose(0, 1, 2, 4, 3, 5, 6)
    row, chunk = _swizzle(TILE, slab // _CHUNK)
    return x[:, :, :, :, row, chunk].reshape(B, Hkv, nT, TILE * Dp)


def unpack_k(packed: Array, Sk: int, D: int) -> Array:
    """Undo :func:`pack_k`: (B, Hkv, Sk, D)."""
    B, Hkv, nT, size = packed.shape
    Dp = size // TILE
    slab = min(Dp, 128)
    row, chunk = _swizzle(TILE, slab // _CHUNK)
    x = packed.reshape(B, Hkv, nT, Dp // slab, TILE, slab // _CHUNK, _CHUNK)[:, :, :, :, row, chunk]
    return x.transpose(0, 1, 2, 4, 3, 5, 6).reshape(B, Hkv, nT * TILE, Dp)[:, :, :Sk, :D]


def pack_v(v: Array) -> Array:
    """Transpose, permute and pack (B, Hkv, Sk, D) int8 into (B, Hkv, nT, Dp * 128)."""
    B, Hkv, Sk, D = v.shape
    nT, Dp = tiles_of(Sk), padded_head_dim(D)
    x = _padded(v, nT * TILE, Dp).reshape(B, Hkv, nT, TILE, Dp)[:, :, :, key_of_position()]
    x = x.transpose(0, 1, 2, 4, 3).reshape(B, Hkv, nT, Dp, TILE // _CHUNK, _CHUNK)
    row, chunk = _swizzle(Dp, TILE // _CHUNK)
    return x[:, :, :, row, chunk].reshape(B, Hkv, nT, Dp * TILE)


def unpack_v(packed: Array, Sk: int, D: int) -> Array:
    """Undo :func:`pack_v`: (B, Hkv, Sk, D)."""
    B, Hkv, nT, size = packed.shape
    Dp = size // TILE
    row, chunk = _swizzle(Dp, TILE // _CHUNK)
    x = packed.reshape(B, Hkv, nT, Dp, TILE // _CHUNK, _CHUNK)[:, :, :, row, chunk]
    x = x.reshape(B, Hkv, nT, Dp, TILE).transpose(0, 1, 2, 4, 3)
    position = np.argsort(key_of_position())
    return x[:, :, :, position].reshape(B, Hkv, nT * TILE, Dp)[:, :, :Sk, :D]


def unpack(t: QuantizedTensor) -> Array:
    """Return the stored numbers of a packed tensor, (B, heads, S, D)."""
    _, _, S, D = t.shape
    if t.which == "q" or t.format == "fp16":
        return t.values[:, :, :S, :D]
    return unpack_k(t.values, S, D) if t.which == "k" else unpack_v(t.values, S, D)


def to_host(qkv: QuantizedQKV) -> QuantizedQKV:
    """Bring a packed QuantizedQKV to host memory in plain layout."""

    def plain(t: QuantizedTensor) -> QuantizedTensor:
        scale = t.scale
        if scale is not None:
            scale = _host(scale)
            if t.granularity == "token":
                scale = scale[..., : t.shape[2]]
            elif t.which == "v" and t.granularity == "channel":
                scale = scale[..., : t.shape[3]]
        return dataclasses.replace(
            t, values=np.ascontiguousarray(_host(unpack(t))), scale=scale, layout="plain"
        )

    shift = None if qkv.lse_shift is None else _host(qkv.lse_shift)
    return dataclasses.replace(qkv, q=plain(qkv.q), k=plain(qkv.k), v=plain(qkv.v), lse_shift=shift, extra={})


def _host(x: Array) -> np.ndarray:
    return x if isinstance(x, np.ndarray) else x.get()
