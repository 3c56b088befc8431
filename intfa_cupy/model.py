"""The NumPy backend: the exact model of the kernels' arithmetic.

    x_ij = (q8_i . k8_j) * s_q[i] * s_k[j] * scale * log2(e)         (+ log2 s_v[j], folded V)
    P_ij = round(R * 2^(x_ij - m))      m: the tile's maximum, or the running one
    O_i  = sum over tiles of 2^(m - m_ref) * (P @ v8)
    l_i  = sum over tiles of 2^(m - m_ref) * rowsum(P)
    out  = s_v * O / l

That is Algorithm 1 of INT-FlashAttention (arXiv 2409.16997) with the choices of a
:class:`~intfa_cupy.Recipe`. It runs in blocks of queries by chunks of keys, so that nothing
larger than a block of scores is in memory.

Why float32 BLAS gives exact integers: an int8 dot product over D <= 256 channels is at most
256 * 127 * 127 = 4,129,024 in magnitude, and so is each partial sum in any order; a tile of
P @ V at most 128 * 255 * 127 = 4,145,280. Both are below 2^24 = 16,777,216, up to which float32
holds every integer, so no addition rounds.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from threadpoolctl import ThreadpoolController

from .problem import MAX_HEAD_DIM, Problem
from .quantized import CHANNEL_GROUP, TILE, QuantizedQKV, QuantizedTensor

__all__ = ["attention_numpy", "guard"]

_EXACT = 1 << 24
assert MAX_HEAD_DIM * 127 * 127 < _EXACT and TILE * 255 * 127 < _EXACT

LOG2E = math.log2(math.e)
_NEG_INF = np.float32(-np.inf)
# Queries and keys of one block of scores: 128 x 1024 float32 is 512 KB, which stays in the cache.
_ROWS, _KEYS = 128, 1024


def guard(qkv: QuantizedQKV) -> np.ndarray:
    """Return (B, Hkv) float32: 0, or NaN for a key/value head that a non-finite K or V poisoned."""
    B, Hkv = qkv.k.shape[:2]
    bad = np.zeros((B, Hkv), bool)
    for t in (qkv.k, qkv.v):
        # Formats with scales carry the mark there; unscaled ones in the values.
        data = t.values if t.scale is None else t.scale
        bad |= ~np.isfinite(data.astype(np.float32)).all(axis=tuple(range(2, data.ndim)))
    return np.where(bad, np.float32(np.nan), np.float32(0)).astype(np.float32)


@dataclass(frozen=True)
class _KeyValueHead:
    """One key/value head, ready for BLAS."""

    k: np.ndarray  # (Sk, D) float32 holding the stored numbers
    k_scale: np.ndarray  # (Sk,) per key, or (Sk, G) for channel groups
    v: np.ndarray  # (Sk, D) float32 holding the stored numbers
    v_scale: np.ndarray  # (D,) or scalar: factor of the output
    v_log2: np.ndarray | None  # (Sk,) folded V: log2 of the token's scale over the head's largest
    v_inverse: np.ndarray | None  # (Sk,) folded V: its reciprocal
    guard: np.float32


def _numbers(t: QuantizedTensor, b: int, h: int) -> np.ndarray:
    one = QuantizedTensor(
        t.values[b : b + 1, h : h + 1], None, t.format, "none", (1, 1, *t.shape[2:]), t.which
    )
    return one.numbers()[0, 0].astype(np.float32)


def _row_scale(t: QuantizedTensor, b: int, h: int) -> np.ndarray:
    """The scale of each token, (S,), or of each token's channel groups, (S, G)."""
    S = t.shape[2]
    if t.scale is None:
        return np.ones(S, np.float32)
    if t.granularity == "channel":
        return t.scale[b, h]
    one = QuantizedTensor(
        t.values, t.scale[b : b + 1, h : h + 1], t.format, t.granularity, (1, 1, *t.shape[2:]), t.which
    )
    return np.broadcast_to(one.element_scale()[0, 0, :, 0], (S,))


def _key_value_head(qkv: QuantizedQKV, b: int, hk: int, mark: np.float32) -> _KeyValueHead:
    v_log2 = v_inverse = None
    v_scale: np.ndarray
    if qkv.v.scale is None:
        v_scale = np.float32(1)  # type: ignore[assignment]
    elif qkv.recipe.folded_v:
        token = qkv.v.scale[b, hk]
        v_scale = token.max(initial=0)
        v_log2, v_inverse = np.log2(token / v_scale), v_scale / token
    else:
        v_scale = qkv.v.scale[b, hk]
    return _KeyValueHead(
        k=_numbers(qkv.k, b, hk),
        k_scale=_row_scale(qkv.k, b, hk),
        v=_numbers(qkv.v, b, hk),
        v_scale=v_scale,
        v_log2=v_log2,
        v_inverse=v_inverse,
        guard=mark,
    )


def _exponents(q: np.ndarray, q_scale: np.ndarray, kv: _KeyValueHead, j0: int, j1: int) -> np.ndarray:
    """The base-2 exponents x of a block of queries against keys [j0, j1).

    ``q_scale`` includes scale * log2(e).
    """
    k, k_scale = kv.k[j0:j1], kv.k_scale[j0:j1]
    if q_scale.ndim == 1 and k_scale.ndim == 1:
        x = q @ k.T
        x *= q_scale[:, None]
        x *= k_scale[None, :]
    else:
        # INT4: an exact integer product per group of 32 channels, summed in float32 under its scales.
        x = np.zeros((len(q), j1 - j0), np.float32)
        for g in range(-(-q.shape[1] // CHANNEL_GROUP)):
            c = slice(g * CHANNEL_GROUP, (g + 1) * CHANNEL_GROUP)
            part = q[:, c] @ k[:, c].T
            part *= (q_scale if q_scale.ndim == 1 else q_scale[:, g])[:, None]
            part *= (k_scale if k_scale.ndim == 1 else k_scale[:, g])[None, :]
            x += part
    if kv.v_log2 is not None:
        x += kv.v_log2[j0:j1]
    return x


def _mask(x: np.ndarray, problem: Problem, i0: int, j0: int) -> None:
    """Set the exponents of invisible pairs to -inf, in place."""
    shift = problem.Sk - problem.Sq
    distance = np.arange(j0, j0 + x.shape[1])[None, :] - (np.arange(i0, i0 + len(x)) + shift)[:, None]
    if problem.left >= 0:
        x[distance < -problem.left] = _NEG_INF
    if problem.right >= 0:
        x[distance > problem.right] = _NEG_INF


def _round_p(e: np.ndarray, p_format: str) -> np.ndarray:
    """Round R * e, in place where it can be, to what P's format stores, as float32."""
    if p_format in ("uint8", "int8"):
        return np.rint(e, out=e)
    if p_format == "fp16":
        return e.astype(np.float16).astype(np.float32)
    import ml_dtypes

    dtype = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}[p_format]
    return e.astype(dtype).astype(np.float32)


class _Accumulator:
    """The state of the online softmax for a block of queries."""

    def __init__(self, rows: int, D: int, qkv: QuantizedQKV, tile: int):
        self.o = np.zeros((rows, D), np.float32)
        self.l = np.zeros(rows, np.float32)
        self.m = np.full(rows, _NEG_INF, np.float32)  # the reference exponent of o and l
        self.recipe, self.tile = qkv.recipe, tile

    def add(self, x: np.ndarray, kv: _KeyValueHead, j0: int) -> None:
        """Add a chunk of keys from j0 on, a whole number of tiles but for the last one's end."""
        rows, n = x.shape
        recipe, tile = self.recipe, self.tile
        tiles = -(-n // tile)
        if tiles * tile != n:
            padded = np.full((rows, tiles * tile), _NEG_INF, np.float32)
            padded[:, :n] = x
            x = padded
        x = x.reshape(rows, tiles, tile)
        m_tile = x.max(axis=2)
        if recipe.p_max == "running":
            np.maximum(m_tile, self.m[:, None], out=m_tile)
            np.maximum.accumulate(m_tile, axis=1, out=m_tile)
        m_new = np.maximum(self.m, m_tile.max(axis=1))
        # A row that has seen nothing yet has m = -inf; any finite stand-in gives e = 0 there.
        x -= np.where(m_tile == _NEG_INF, np.float32(0), m_tile)[:, :, None]
        e = np.exp2(x, out=x)
        e *= np.float32(recipe.p_levels)
        reference = np.where(m_new == _NEG_INF, np.float32(0), m_new)
        weight = np.exp2(m_tile - reference[:, None])
        old = np.exp2(self.m - reference)
        if not recipe.rounded_sum:
            if kv.v_inverse is None:
                sums = e.sum(axis=2)
            else:
                inverse = np.zeros(tiles * tile, np.float32)
                inverse[:n] = kv.v_inverse[j0 : j0 + n]
                sums = np.stack([e[:, t] @ inverse[t * tile : (t + 1) * tile] for t in range(tiles)], axis=1)
        p = _round_p(e, recipe.p_format)
        if recipe.rounded_sum:
            sums = p.sum(axis=2)
        self.l = self.l * old + (sums * weight).sum(axis=1)
        self.o *= old[:, None]
        for t in range(tiles):
            # Integer P: an exact integer product, weighted in float32 afterwards, as the kernels do.
            v = kv.v[j0 + t * tile : min(j0 + (t + 1) * tile, j0 + n)]
            product = p[:, t, : len(v)] @ v
            product *= weight[:, t, None]
            self.o += product
        self.m = m_new

    def finish(self, kv: _KeyValueHead) -> tuple[np.ndarray, np.ndarray]:
        """Return the block's output and its base-e log-sum-exp (before the smoothing correction)."""
        seen = self.m != _NEG_INF
        l = np.where(seen, self.l, np.float32(1))
        out = self.o / l[:, None] * kv.v_scale + kv.guard
        lse = (
            np.where(seen, (self.m + np.log2(l / self.recipe.p_levels)) / np.float32(LOG2E), _NEG_INF)
            + kv.guard
        )
        out[~seen] = kv.guard
        return out, lse.astype(np.float32)


def attention_numpy(
    qkv: QuantizedQKV, problem: Problem, *, tile: int = TILE, threads: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Run the operator on quantised inputs in plain layout.

    Parameters
    ----------
    qkv : QuantizedQKV
    problem : Problem
    tile : int
        Keys that share one maximum of P. The kernels use 128; other values are for experiments.
    threads : int, optional
        Worker threads, by default one per available core, at most 4.

    Returns
    -------
    out : numpy.ndarray of float32 (B, H, Sq, D)
    lse : numpy.ndarray of float32 (B, H, Sq)
    """
    if not 1 <= tile <= TILE:
        raise ValueError(f"tile must be in 1..{TILE} (up to which P @ V is exact), got {tile}")
    B, H, Sq, D = qkv.q.shape
    out = np.empty((B, H, Sq, D), np.float32)
    lse = np.empty((B, H, Sq), np.float32)
    marks = guard(qkv)
    keys = max(tile, _KEYS // tile * tile)
    factor = np.float32(problem.scale * LOG2E)

    def rows(i0: int, b: int, h: int, q: np.ndarray, q_scale: np.ndarray, kv: _KeyValueHead) -> None:
        i1 = min(i0 + _ROWS, Sq)
        j0, j1 = problem.key_range(i0, i1)
        state = _Accumulator(i1 - i0, D, qkv, tile)
        # NumPy's error state is per thread, so it is set where the work is done.
        with np.errstate(invalid="ignore", over="ignore", under="ignore"):
            for j in range(j0 // tile * tile, j1, keys):
                stop = min(j + keys, j1)
                x = _exponents(q[i0:i1], q_scale[i0:i1], kv, j, stop)
                if problem.masked:
                    _mask(x, problem, i0, j)
                state.add(x, kv, j)
            out[b, h, i0:i1], lse[b, h, i0:i1] = state.finish(kv)

    with np.errstate(invalid="ignore", over="ignore", under="ignore", divide="ignore"):
        # One thread per block of queries, and BLAS alone in each: its own threads would only contend.
        with _blas().limit(limits=1, user_api="blas"), ThreadPoolExecutor(threads or _cores()) as pool:
            for b in range(B):
                for hk in range(problem.Hkv if H else 0):
                    kv = _key_value_head(qkv, b, hk, marks[b, hk])
                    for h in range(hk * problem.group, (hk + 1) * problem.group):
                        q, q_scale = _numbers(qkv.q, b, h), _row_scale(qkv.q, b, h) * factor
                        jobs = [pool.submit(rows, i0, b, h, q, q_scale, kv) for i0 in range(0, Sq, _ROWS)]
                        for job in jobs:
                            job.result()
        if qkv.lse_shift is not None:
            lse += qkv.lse_shift * np.float32(problem.scale)
    return out, lse


@lru_cache(maxsize=1)
def _blas() -> ThreadpoolController:
    return ThreadpoolController()


def _cores() -> int:
    import os

    affinity = getattr(os, "sched_getaffinity", None)
    return min(4, len(affinity(0)) if affinity else os.cpu_count() or 1)
