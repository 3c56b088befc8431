"""Plain quantised tensors brought from host memory to the device."""

from __future__ import annotations

import numpy as np

from .. import packing
from ..model import guard
from ..quantized import CHANNEL_GROUP, TILE, QuantizedQKV, QuantizedTensor, tiles_of
from .quantizer import container

__all__ = ["operands", "upload"]


def _padded(x: np.ndarray, axis: int, size: int) -> np.ndarray:
    width = [(0, 0)] * x.ndim
    width[axis] = (0, size - x.shape[axis])
    return np.pad(x, width)


def _query_scale(q: QuantizedTensor, groups: int) -> np.ndarray:
    """A scale for each row, or each of its groups of channels; NaN where the row is poisoned."""
    if q.granularity == "token":
        return np.asarray(q.scale)
    if q.granularity == "channel":
        return _padded(np.asarray(q.scale), 3, groups)
    head = np.ones(q.shape[:2], np.float32) if q.scale is None else q.scale
    sound = np.isfinite(q.values.astype(np.float32)).all(axis=3)
    return np.where(sound, head[:, :, None], np.float32(np.nan)).astype(np.float32)


def _key_scale(k: QuantizedTensor, groups: int) -> np.ndarray:
    B, Hkv, Sk, _ = k.shape
    if k.scale is None:
        return np.ones((B, Hkv), np.float32)
    if k.granularity not in ("token", "channel"):
        return np.asarray(k.scale)
    padded = _padded(np.asarray(k.scale), 2, tiles_of(Sk) * TILE)
    if k.granularity == "token":
        return padded
    padded = _padded(padded, 3, groups).reshape(B, Hkv, -1, TILE, groups)
    return np.ascontiguousarray(padded.swapaxes(3, 4))


def operands(qkv: QuantizedQKV) -> dict[str, np.ndarray]:
    """Return what the kernels read, packed, in host memory, by the names of struct QuantizeParams.

    Parameters
    ----------
    qkv : QuantizedQKV
        Plain, of NumPy arrays.
    """
    recipe = qkv.recipe
    B, Hkv, Sk, D = qkv.k.shape
    Dp = packing.padded_head_dim(D)
    groups = Dp // CHANNEL_GROUP
    values = {
        "q8": packing.pack_q(qkv.q.numbers(), recipe.q_format),
        "k8": packing.pack_k(qkv.k.numbers(), recipe.k_format),
        "v8": packing.pack_v(qkv.v.numbers(), recipe.v_format),
        "q_scale": _query_scale(qkv.q, groups),
        "k_scale": _key_scale(qkv.k, groups),
        "guard": guard(qkv),
    }
    v_scale = np.zeros((B, Hkv, Dp), np.float32)
    if recipe.folded_v:
        token = np.asarray(qkv.v.scale)
        with np.errstate(invalid="ignore"):
            largest = token.max(axis=2, keepdims=True, initial=0)
            fold = np.stack([packing.FOLD_OFFSET + np.log2(token / largest), largest / token], axis=2)
        values["v_fold"] = packing.pack_fold(fold)
        values["v_token"] = _padded(token, 2, tiles_of(Sk) * TILE)
        v_scale[:] = largest
    elif recipe.v_granularity == "channel":
        v_scale[..., :D] = qkv.v.scale
    else:
        v_scale[:] = 1 if qkv.v.scale is None else qkv.v.scale[..., None]
    values["v_scale"] = v_scale
    if recipe.q_granularity == "head":
        values["q_head_scale"] = np.asarray(qkv.q.scale)
    if qkv.lse_shift is not None:
        values["lse_shift"] = qkv.lse_shift
    return values


def upload(qkv: QuantizedQKV) -> QuantizedQKV:
    """Bring a plain QuantizedQKV from host memory to the device in the packed layout."""
    import cupy

    made = {name: cupy.asarray(np.ascontiguousarray(x)) for name, x in operands(qkv).items()}
    return container(made, qkv.recipe, (qkv.q.shape, qkv.k.shape, qkv.v.shape), qkv.out_dtype)
