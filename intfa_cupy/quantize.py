"""The quantiser in NumPy: the contract that cuda_src/quantize.cu matches bit for bit.

Everything is float32 arithmetic in a stated order, so that two machines agree. Statistics
over a sequence (K's mean, the channel factors, folded V's floor) are rounded to a coarse
grid: any value near the true one is as good, and a coarse one does not depend on the
order of summation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from .quantized import CHANNEL_GROUP, TILE, QuantizedQKV, QuantizedTensor, group_of_key, pack_int4, tiles_of
from .recipes import Recipe

__all__ = ["ABSMAX_FLOOR", "HeadStatistics", "hadamard_blocks", "head_statistics", "quantize_numpy", "rotate"]

#: Smallest range that a scale is made for: an all-zero token would divide 0 by 0.
ABSMAX_FLOOR = np.float32(1e-30)

_LEVELS = {"int8": np.float32(127), "int4": np.float32(7)}
_FP8 = {"e4m3": (ml_dtypes.float8_e4m3fn, 448.0), "e5m2": (ml_dtypes.float8_e5m2, 57344.0)}


def round_bf16(x: np.ndarray) -> np.ndarray:
    """Round float to the nearest bfloat16, as float32."""
    return np.asarray(x, np.float32).astype(ml_dtypes.bfloat16).astype(np.float32)


def hadamard_blocks(D: int) -> list[int]:
    """Return the powers of two that sum to D, largest first: the blocks of the rotation."""
    return [1 << bit for bit in range(D.bit_length() - 1, -1, -1) if D >> bit & 1]


def _normalization(D: int) -> np.ndarray:
    """Return what makes the butterflies orthonormal: 1 / sqrt of the size of each channel's block."""
    return np.concatenate([np.full(b, 1 / math.sqrt(b), np.float32) for b in hadamard_blocks(D)])


def _butterflies(x: np.ndarray) -> np.ndarray:
    """Return x (S, D) times the rotation's signs, 1 and -1.

    In Sylvester's order in float32: each output is the same sequence of additions on every machine.
    """
    out = np.empty_like(x)
    start = 0
    for block in hadamard_blocks(x.shape[1]):
        part = x[:, start : start + block].copy()
        h = 1
        while h < block:
            pairs = part.reshape(len(x), block // (2 * h), 2, h)
            a, b = pairs[:, :, 0], pairs[:, :, 1]
            pairs[:, :, 0], pairs[:, :, 1] = a + b, a - b
            h *= 2
        out[:, start : start + block] = part
        start += block
    return out


def rotate(x: np.ndarray) -> np.ndarray:
    """Return x (S, D) times an orthonormal Hadamard matrix, block-diagonal where D is not a power of two.

    The normalisation comes first, then butterflies.
    """
    return _butterflies(x * _normalization(x.shape[1]))


@dataclass(frozen=True)
class HeadStatistics:
    """What the quantiser must know of a whole sequence, for one key/value head.

    Parameters
    ----------
    mean : numpy.ndarray of float32 (D,)
        Subtracted from K: its mean per channel, the largest and the smallest value left out; zeros without
        smoothing.
    factor : numpy.ndarray of float32 (D,)
        Q is multiplied by it and K by its reciprocal; ones without equalisation.
    """

    mean: np.ndarray
    factor: np.ndarray


def _trimmed_mean(k: np.ndarray, largest: np.ndarray, smallest: np.ndarray) -> np.ndarray:
    """Return each channel's mean without its largest and its smallest value.

    Smoothing may subtract any constant, and this one is not moved by a single huge token, after which
    every other token's range would be the mean's and not its own.
    """
    total, count = k.sum(axis=0, dtype=np.float64), len(k)
    if count > 2:
        total, count = total - largest - smallest, count - 2
    return round_bf16(total / count)


def head_statistics(q: np.ndarray, k: np.ndarray, recipe: Recipe) -> HeadStatistics:
    """Return the statistics of one key/value head.

    Parameters
    ----------
    q : numpy.ndarray of float32 (n, Sq, D)
        The query heads of the group. Non-finite elements do not count.
    k : numpy.ndarray of float32 (Sk, D)
    recipe : Recipe
    """
    Sk, D = k.shape
    mean, factor = np.zeros(D, np.float32), np.ones(D, np.float32)
    if Sk == 0 or q.size == 0:
        return HeadStatistics(mean, factor)
    largest, smallest = k.max(axis=0), k.min(axis=0)
    if recipe.smooth_k:
        mean = _trimmed_mean(k, largest, smallest)
    if recipe.equalize:
        k_range = np.maximum(largest - mean, mean - smallest)
        q_range = np.maximum(q.max(axis=(0, 1)), -q.min(axis=(0, 1)))
        if not np.isfinite(q_range).all():
            q_range = np.where(np.isfinite(q), np.abs(q), 0).max(axis=(0, 1))
        usable = np.isfinite(k_range) & np.isfinite(q_range) & (k_range > 0) & (q_range > 0)
        log2_ratio = np.zeros(D, np.float32)
        # The difference of logarithms: the quotient of two extreme ranges would overflow.
        log2_ratio[usable] = np.float32(0.5) * (np.log2(k_range[usable]) - np.log2(q_range[usable]))
        centred = log2_ratio - log2_ratio.mean(dtype=np.float64)
        factor = round_bf16(np.clip(np.exp2(centred), 1e-3, 1e3))
    return HeadStatistics(mean, factor)


def _absmax_scale(absmax: np.ndarray, levels: np.float32) -> tuple[np.ndarray, np.ndarray]:
    """Return (scale, reciprocal) for ranges; NaN and 0 where a range is not finite."""
    finite = np.isfinite(absmax)
    safe = np.where(finite, np.maximum(absmax, ABSMAX_FLOOR), np.float32(1)).astype(np.float32)
    scale = np.where(finite, safe / levels, np.float32(np.nan)).astype(np.float32)
    inverse = np.where(finite, levels / safe, np.float32(0)).astype(np.float32)
    return scale, inverse


def _to_int(x: np.ndarray, inverse: np.ndarray, levels: np.float32) -> np.ndarray:
    """Round x * inverse to integers, half to even; what is not finite becomes 0.

    The product is not rounded before, as in an FMA: float64 holds it exactly.
    """
    y = np.multiply(x, inverse, dtype=np.float64)
    np.rint(y, out=y)
    np.clip(y, -levels, levels, out=y)
    if not np.isfinite(y).all():
        np.nan_to_num(y, copy=False, nan=0.0)
    return y.astype(np.int8)


def quantize_rows(x: np.ndarray, fmt: str, granularity: str) -> tuple[np.ndarray, np.ndarray]:
    """Quantise one head of Q or K, x (S, D), to integers.

    Returns
    -------
    values : numpy.ndarray of int8 (S, D)
    scale : numpy.ndarray of float32
        The head's part of the shapes in :class:`QuantizedTensor`.
    """
    levels = _LEVELS[fmt]
    S, D = x.shape
    if granularity == "channel":
        groups = -(-D // CHANNEL_GROUP)
        padded = np.zeros((S, groups * CHANNEL_GROUP), np.float32)
        padded[:, :D] = x
        absmax = np.abs(padded).reshape(S, groups, CHANNEL_GROUP).max(axis=2)
        # A row is poisoned as a whole.
        absmax = np.where(np.isfinite(absmax).all(axis=1, keepdims=True), absmax, np.float32(np.nan))
        scale, inverse = _absmax_scale(absmax, levels)
        return _to_int(x, inverse.repeat(CHANNEL_GROUP, axis=1)[:, :D], levels), scale
    absmax = np.abs(x).max(axis=1)
    if granularity == "token":
        scale, inverse = _absmax_scale(absmax, levels)
        return _to_int(x, inverse[:, None], levels), scale
    # Scales shared by keys of a tile. np.maximum hands a NaN on, so a poisoned key poisons its sharers.
    shape: tuple[int, ...]
    if granularity == "tile":
        index, count, shape = np.arange(S) // TILE, tiles_of(S), (tiles_of(S),)
    else:
        index, count, shape = group_of_key(S), tiles_of(S) * 4, (tiles_of(S), 4)
    shared = np.zeros(count, np.float32)
    np.maximum.at(shared, index, absmax)
    scale, inverse = _absmax_scale(shared, levels)
    return _to_int(x, inverse[index][:, None], levels), scale.reshape(shape)


def folded_v_floor(absmax: np.ndarray) -> np.float32:
    """Return the least range that folded V makes a token's scale for.

    A sixteenth of the mean range, rounded down to a power of two. Without it a near-zero
    token would get a scale so small that its logarithm dominates the exponent; from the
    mean and not the maximum, since one huge token must not ruin the rest.
    """
    finite = absmax[np.isfinite(absmax)].astype(np.float64)
    mean = finite.mean() / 16 if finite.size else 0.0
    if mean < float(ABSMAX_FLOOR):
        return ABSMAX_FLOOR
    return np.float32(2.0 ** math.floor(math.log2(mean)))


def quantize_v(v: np.ndarray, granularity: str) -> tuple[np.ndarray, np.ndarray]:
    """Quantise one head of V, (Sk, D), to int8; the scale is per token (folded), channel or head."""
    levels = _LEVELS["int8"]
    if granularity == "channel":
        absmax = np.abs(v).max(axis=0, initial=0)
    elif granularity == "head":
        absmax = np.abs(v).max(initial=0)
    else:
        absmax = np.abs(v).max(axis=1)
        absmax = np.maximum(absmax, folded_v_floor(absmax))
    scale, inverse = _absmax_scale(absmax, levels)
    return _to_int(v, inverse[:, None] if granularity == "token" else inverse, levels), scale


def _finite_absmax(x: np.ndarray, which: str) -> tuple[np.ndarray, np.ndarray]:
    """Return (x, its range) for formats with one scale per head.

    A non-finite element of Q is stored as NaN and leaves the scale alone, since it must poison its row
    and no other; one of K or V makes the range NaN.
    """
    absmax = np.abs(x).max(initial=0)
    if which == "q" and not np.isfinite(absmax):
        x = np.where(np.isfinite(x), x, np.float32(np.nan))
        absmax = np.where(np.isfinite(x), np.abs(x), 0).max(initial=0)
    return x, np.asarray(absmax, np.float32)


def _to_fp16(x: np.ndarray, which: str, as_given: bool) -> tuple[np.ndarray, np.ndarray]:
    """Store x in fp16 under a power-of-two scale that keeps it in range, 1 for what came as float16."""
    x, absmax = _finite_absmax(x, which)
    if not np.isfinite(absmax):
        return np.zeros(x.shape, np.float16), np.asarray(np.nan, np.float32)
    scale = 1.0
    if not as_given and absmax > 0:
        scale = 2.0 ** min(max(math.frexp(float(absmax))[1] - 12, -126), 126)
    return (x * np.float32(1 / scale)).astype(np.float16), np.asarray(scale, np.float32)


def _to_fp8(x: np.ndarray, which: str, fmt: str, granularity: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Store x in FP8, saturating, scaled to its head's range or not; what is not finite becomes NaN."""
    dtype, largest = _FP8[fmt]
    if granularity == "none":
        # Saturation is for finite numbers only: an infinity must not come back as one.
        x = np.where(np.isfinite(x), np.clip(x, -largest, largest), np.float32(np.nan))
        return x.astype(dtype), None
    x, absmax = _finite_absmax(x, which)
    scale, inverse = _absmax_scale(absmax, np.float32(largest))
    if not np.isfinite(scale):
        return np.zeros(x.shape, dtype), scale
    return np.clip(x * inverse, -largest, largest).astype(dtype), scale


def _quantize_head(
    x: np.ndarray, which: str, recipe: Recipe, is_half: bool
) -> tuple[np.ndarray, np.ndarray | None]:
    fmt, granularity = getattr(recipe, f"{which}_format"), getattr(recipe, f"{which}_granularity")
    if fmt == "fp16":
        prepared = which != "v" and (recipe.smooth_k or recipe.equalize or recipe.hadamard)
        return _to_fp16(x, which, is_half and not prepared)
    if fmt in _FP8:
        return _to_fp8(x, which, fmt, granularity)
    if which == "v":
        return quantize_v(x, granularity)
    values, scale = quantize_rows(x, fmt, granularity)
    return (pack_int4(values) if fmt == "int4" else values), scale


def prepare(x: np.ndarray, factor: np.ndarray, recipe: Recipe) -> np.ndarray:
    """Equalise and rotate one head of Q or K: x (S, D) * factor, then the Hadamard rotation.

    x is multiplied once, by the rounded product of the factor and the rotation's normalisation.
    """
    if recipe.hadamard:
        return _butterflies(x * (factor * _normalization(x.shape[1])))
    return x * factor if recipe.equalize else x


class _Collector:
    """The quantised heads of one operand, put together into one tensor."""

    def __init__(self, which: str, recipe: Recipe, shape: tuple[int, int, int, int]):
        self.which, self.shape = which, shape
        self.format: str = getattr(recipe, f"{which}_format")
        self.granularity: str = getattr(recipe, f"{which}_granularity")
        self.values: np.ndarray | None = None
        self.scale: np.ndarray | None = None

    def put(self, b: int, head: int, values: np.ndarray, scale: np.ndarray | None) -> None:
        if self.values is None:
            self.values = np.empty((*self.shape[:2], *values.shape), values.dtype)
            if scale is not None:
                self.scale = np.empty((*self.shape[:2], *scale.shape), np.float32)
        self.values[b, head] = values
        if self.scale is not None:
            self.scale[b, head] = scale

    def tensor(self, recipe: Recipe) -> QuantizedTensor:
        if self.values is None:  # no batch or no head: learn the dtypes from a head of zeros
            values, scale = _quantize_head(np.zeros(self.shape[2:], np.float32), self.which, recipe, True)
            self.values = np.empty((*self.shape[:2], *values.shape), values.dtype)
            self.scale = None if scale is None else np.empty((*self.shape[:2], *scale.shape), np.float32)
        return QuantizedTensor(self.values, self.scale, self.format, self.granularity, self.shape, self.which)


def quantize_numpy(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    recipe: Recipe,
    *,
    statistics: dict[tuple[int, int], HeadStatistics] | None = None,
) -> QuantizedQKV:
    """Quantise q (B, H, Sq, D), k and v (B, Hkv, Sk, D) of any floating dtype and strides.

    One head at a time, so that nothing beside the result is larger than a head.

    Parameters
    ----------
    statistics : dict, optional
        The statistics of each (b, key/value head), to use instead of computing them.
    """
    B, H, Sq, D = q.shape
    Hkv, Sk = k.shape[1:3]
    group = H // max(Hkv, 1)
    is_half = q.dtype == np.float16
    parts = {
        "q": _Collector("q", recipe, (B, H, Sq, D)),
        "k": _Collector("k", recipe, (B, Hkv, Sk, D)),
        "v": _Collector("v", recipe, (B, Hkv, Sk, D)),
    }
    lse_shift = np.zeros((B, H, Sq), np.float32) if recipe.smooth_k else None
    with np.errstate(invalid="ignore", over="ignore"):
        for b in range(B):
            for hk in range(Hkv):
                heads = q[b, hk * group : (hk + 1) * group].astype(np.float32, copy=False)
                key = k[b, hk].astype(np.float32, copy=False)
                stats = statistics[b, hk] if statistics else head_statistics(heads, key, recipe)
                for n, head in enumerate(heads):
                    h = hk * group + n
                    if lse_shift is not None:
                        # float64, so that the order of summation, which is the BLAS's choice, does not show.
                        lse_shift[b, h] = head.astype(np.float64) @ stats.mean
                    prepared = prepare(head, stats.factor, recipe)
                    parts["q"].put(b, h, *_quantize_head(prepared, "q", recipe, is_half))
                if recipe.smooth_k:
                    key = key - stats.mean
                prepared = prepare(key, np.float32(1) / stats.factor, recipe)
                parts["k"].put(b, hk, *_quantize_head(prepared, "k", recipe, is_half))
                value = v[b, hk].astype(np.float32, copy=False)
                parts["v"].put(b, hk, *_quantize_head(value, "v", recipe, is_half))
    q_part, k_part, v_part = (part.tensor(recipe) for part in parts.values())
    return QuantizedQKV(q_part, k_part, v_part, recipe, lse_shift, str(q.dtype))
