"""Exact attention in float64, block by block: what every error is measured against."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import arrays
from .problem import Problem, default_scale, normalize_window, shape_of_qkv
from .recipes import get_recipe

__all__ = ["attention_float64", "reference_attention"]

Array = Any  # numpy.ndarray or cupy.ndarray
_ROWS = 128


def reference_attention(
    q: object,
    k: object,
    v: object,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    layout: str = "bhsd",
    window: tuple[int, int] | None = None,
    return_lse: bool = False,
) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
    """Compute softmax(scale * Q K^T) V in float64 on the CPU.

    Parameters
    ----------
    q, k, v, is_causal, scale, layout, window, return_lse
        As in :func:`intfa_cupy.attention`.

    Returns
    -------
    out : numpy.ndarray of float64
        q's shape. A row without a visible key is 0.
    lse : numpy.ndarray of float64
        The natural logarithm of the sum of exponentials, (B, H, Sq) without the dimensions that
        q lacks; only with ``return_lse``.

    Raises
    ------
    TypeError, ValueError
        As :func:`intfa_cupy.attention`.

    Notes
    -----
    A block of 128 queries is held against all keys at a time, so memory grows with Sk and not with
    Sq * Sk.

    Examples
    --------
    >>> import numpy as np, intfa_cupy as intfa
    >>> q = k = v = np.eye(4)[None, None]
    >>> intfa.reference_attention(q, k, v).shape
    (1, 1, 4, 4)
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        arrays.check_floating(name, x)
    shape = shape_of_qkv(arrays.shape(q), arrays.shape(k), arrays.shape(v), layout)
    left, right = normalize_window(window, is_causal)
    problem = Problem(
        *shape, recipe=get_recipe("fp16"), left=left, right=right, scale=default_scale(scale, shape[-1])
    )
    q4, k4, v4 = (arrays.to_bhsd(arrays.to_numpy(x), layout) for x in (q, k, v))
    out, lse = attention_float64(q4, k4, v4, problem)
    result = arrays.from_bhsd(out, layout, len(arrays.shape(q)))
    return (result, arrays.squeeze_lse(lse, len(arrays.shape(q)))) if return_lse else result


def attention_float64(q: Array, k: Array, v: Array, problem: Problem) -> tuple[Array, Array]:
    """Return output and log-sum-exp in float64, computed where the arrays are.

    Parameters
    ----------
    q, k, v : numpy.ndarray or cupy.ndarray
        (B, H, Sq, D), (B, Hkv, Sk, D), (B, Hkv, Sk, D).
    problem : Problem
    """
    p, xp = problem, arrays.module_of(q)
    out = xp.zeros((p.B, p.H, p.Sq, p.D))
    lse = xp.full((p.B, p.H, p.Sq), -np.inf)
    for b in range(p.B):
        for hk in range(p.Hkv if p.H else 0):
            key, value = k[b, hk].astype(np.float64), v[b, hk].astype(np.float64)
            for h in range(hk * p.group, (hk + 1) * p.group):
                for i0 in range(0, p.Sq, _ROWS):
                    i1 = min(i0 + _ROWS, p.Sq)
                    j0, j1 = p.key_range(i0, i1)
                    if j0 == j1:
                        continue
                    block = _block(q[b, h, i0:i1], key[j0:j1], value[j0:j1], p, i0, j0)
                    out[b, h, i0:i1], lse[b, h, i0:i1] = block
    return out, lse


def _block(q: Array, k: Array, v: Array, problem: Problem, i0: int, j0: int) -> tuple[Array, Array]:
    """Exact attention of a block of queries over the keys that some of them see."""
    xp = arrays.module_of(q)
    with np.errstate(invalid="ignore", over="ignore"):
        s = q.astype(np.float64) @ k.T * problem.scale
        if problem.masked:
            shift = problem.Sk - problem.Sq
            distance = xp.arange(j0, j0 + len(k))[None, :] - (xp.arange(i0, i0 + len(q)) + shift)[:, None]
            if problem.left >= 0:
                s[distance < -problem.left] = -np.inf
            if problem.right >= 0:
                s[distance > problem.right] = -np.inf
        m = s.max(axis=1)
        m_safe = np.where(m == -np.inf, 0, m)
        p = np.exp(s - m_safe[:, None])
        total = p.sum(axis=1)
        seen = m != -np.inf
        with np.errstate(divide="ignore"):
            lse = np.where(seen, m_safe + np.log(np.where(seen, total, 1)), -np.inf)
        return p @ v / np.where(seen, total, 1)[:, None], lse
