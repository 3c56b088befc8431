"""A dense float64 oracle: exact attention over quantised tensors, and how far rounding P may move it.

Written from the definition and not from the model: no tiles of queries, no online softmax. It takes a
recipe's stored Q, K and V as given, so what it allows is the rounding of P alone, element by element,
which no mistake in masks, scales or sums survives.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from intfa_cupy import QuantizedQKV, Recipe
from intfa_cupy.packing import FOLD_OFFSET
from intfa_cupy.quantized import TILE


@dataclass(frozen=True)
class Exact:
    """Exact results and the largest deviation that rounding allows, float64 (B, H, Sq, D) or (B, H, Sq)."""

    out: np.ndarray
    lse: np.ndarray
    out_bound: np.ndarray
    lse_bound: np.ndarray


def dense_attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, visible: np.ndarray, scale: float
) -> tuple[np.ndarray, np.ndarray]:
    """softmax(scale * q k^T) v and the log-sum-exp in float64; q (B, H, Sq, D), k and v (B, Hkv, Sk, D)."""
    x = scores(q, k, visible, scale)
    v = np.repeat(v.astype(np.float64), q.shape[1] // max(v.shape[1], 1), axis=1)
    m = np.where(visible.any(axis=1)[:, None], x.max(axis=3, keepdims=True, initial=-np.inf), 0)
    e = np.exp(x - m)
    total = e.sum(axis=3, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = (m + np.log(total))[..., 0]
    return e @ v / np.where(total, total, 1), lse


def scores(q: np.ndarray, k: np.ndarray, visible: np.ndarray, scale: float) -> np.ndarray:
    """scale * q k^T in float64, -inf where not visible."""
    k = np.repeat(k.astype(np.float64), q.shape[1] // max(k.shape[1], 1), axis=1)
    return np.where(visible, q.astype(np.float64) @ k.swapaxes(2, 3) * scale, -np.inf)


def exact_given_quantized(
    qkv: QuantizedQKV,
    visible: np.ndarray,
    scale: float,
    *,
    tile: int = TILE,
    counts: float = 0.5,
    floating_sum: bool = False,
    score_units: float = 0.0,
    value_bias: float = 0.0,
) -> Exact:
    """Exact attention of dequantised tensors, and the bound on what rounding P may change.

    Let e_j be a key's probability against the maximum m that its P is taken against, w = exp(m - max) and
    P_j = R (e_j + d_j), with |d_j| <= min(counts / R, e_j): ``counts`` is 0.5 when P is rounded from an exact
    e, and what is below half a count becomes 0. The output is sum w (e + d) v / sum w (e + d), hence

        out - exact = sum w d (v - exact) / sum w (e + d)

    and for folded V, where v8 is what multiplies P and the denominator is not rounded,

        out - exact = sum w d v8 / sum exp(x - max).

    Floating P has an error relative to e instead, and an exact denominator unless ``floating_sum``. Added to
    all is float32's share: the exponent x has an error of a few 2^-24 |x|, a relative error of each
    probability; and ``score_units`` of what one unit of the integer score is worth. A kernel that sums
    w P (v8 + ``value_bias``) tile by tile, and takes ``value_bias`` sum w P away, rounds both sums in
    every tile. To the exponents of folded V ``packing.FOLD_OFFSET`` is added.
    """
    recipe, group = qkv.recipe, qkv.q.shape[1] // max(qkv.k.shape[1], 1)
    q, k, v = (
        t.numbers().astype(np.float64) * np.asarray(t.element_scale(), np.float64)
        for t in (qkv.q, qkv.k, qkv.v)
    )
    out, lse = dense_attention(q, k, v, visible, scale)
    v = np.repeat(v, group, axis=1)
    seen = visible.any(axis=1)[:, None]

    x = scores(q, k, visible, scale)
    x_max = np.where(seen, x.max(axis=3, keepdims=True, initial=-np.inf), 0)
    p = np.exp(x - x_max)
    total = np.where(seen, p.sum(axis=3, keepdims=True), 1)
    # y: the exponents that P is rounded at, which include the logarithm of a folded token scale.
    y = x
    if recipe.folded_v:
        token = np.asarray(qkv.v.scale, np.float64)
        y = x + np.log(np.repeat(token, group, axis=1))[:, :, None, :]
    m = _maximum(y, tile, running=recipe.p_max == "running")
    y_max = np.where(seen, y.max(axis=3, keepdims=True, initial=-np.inf), 0)
    e = np.exp(y - np.where(np.isfinite(m), m, 0))
    wd = np.exp(m - y_max) * np.minimum(_p_error(recipe, e, counts), e * (2 * counts))  # largest w |d|

    denominator_error = np.zeros_like(total)
    if recipe.folded_v:
        v8 = np.repeat(qkv.v.numbers().astype(np.float64), group, axis=1)
        out_bound = wd @ np.abs(v8) * np.exp(y_max - x_max) / total
    elif recipe.integer_p:
        denominator_error = wd.sum(axis=3, keepdims=True)
        # sum w d |v - exact| without an array (Sq, Sk, D): <= sum w d |v - c| + |c - exact| sum w d, any c.
        centre = v.mean(axis=2, keepdims=True) if v.size else 0.0
        out_bound = wd @ np.abs(v - centre) + denominator_error * np.abs(centre - out)
        out_bound /= total - np.minimum(denominator_error, 0.9999 * total)
    else:
        denominator_error = floating_sum * wd.sum(axis=3, keepdims=True)
        out_bound = (wd @ np.abs(v) + denominator_error * np.abs(out)) / (total - denominator_error)

    # Scores of integers are rounded a few times; those of floating numbers and of channel groups are sums.
    size = np.where(np.isfinite(x), np.abs(x), 0).max(axis=3, keepdims=True, initial=0)
    if "channel" in (recipe.q_granularity, recipe.k_granularity) or not recipe.q_format.startswith("int"):
        magnitude = np.abs(q) @ np.repeat(np.abs(k), group, axis=1).swapaxes(2, 3) * abs(scale)
        size = size + 8 * magnitude.max(axis=3, keepdims=True, initial=0)
    size = size + recipe.folded_v * math.log(2) * float(FOLD_OFFSET)
    relative = 2.0**-24 * (32 + 6 * size + math.sqrt(x.shape[3]))
    if score_units and recipe.k_granularity in ("group", "tile"):
        k_scale = np.asarray(qkv.k.element_scale(), np.float64).max(axis=(2, 3), initial=0)
        unit = np.asarray(qkv.q.scale, np.float64) * np.repeat(k_scale, group, axis=1)[..., None] * abs(scale)
        relative = relative + score_units * unit[..., None]
    out_bound += 2 * relative * (p @ np.abs(v) / total + np.abs(out)) + 1e-37
    if value_bias and recipe.v_format == "int8":
        step = np.broadcast_to(np.asarray(qkv.v.element_scale(), np.float64), qkv.v.shape)
        roundings = 4 + -(-x.shape[3] // tile)
        out_bound += 2.0**-23 * roundings * value_bias * (p @ np.repeat(step, group, axis=1)) / total
    lse_bound = -np.log1p(-np.minimum(denominator_error / total, 0.9999)) + relative
    lse_bound = lse_bound[..., 0] + 2.0**-22 * np.where(np.isfinite(lse), np.abs(lse), 0)
    return Exact(out, lse, out_bound, lse_bound)


def _maximum(y: np.ndarray, tile: int, *, running: bool) -> np.ndarray:
    """For each key the maximum that its P is taken against; -inf where a row has seen nothing."""
    m = np.empty_like(y)
    so_far = np.full(y.shape[:3], -np.inf)
    for j in range(0, y.shape[3], tile):
        here = y[..., j : j + tile].max(axis=3)
        so_far = np.maximum(so_far, here) if running else here
        m[..., j : j + tile] = so_far[..., None]
    return m


def _p_error(recipe: Recipe, e: np.ndarray, counts: float) -> np.ndarray:
    """Largest error of a stored probability e, in units of e = 1."""
    if recipe.integer_p:
        return np.full_like(e, counts / recipe.p_levels)
    bits, smallest = {"fp16": (11, 2.0**-24), "e4m3": (4, 2.0**-9), "e5m2": (3, 2.0**-16)}[recipe.p_format]
    return np.maximum(e * 2.0**-bits, smallest / 2 / recipe.p_levels) * (2 * counts)
