"""Problem: what one call computes, checked once and frozen."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass

from .recipes import Recipe

__all__ = ["MAX_HEAD_DIM", "Problem", "default_scale", "normalize_window", "shape_of_qkv"]

#: The largest head dimension: int32 and float32 sums stay exact, and every kernel has a tile for it.
MAX_HEAD_DIM = 256

LAYOUTS = ("bhsd", "bshd")
_FLOAT32_MAX = 3.4028234e38
Window = tuple[int, int]


@dataclass(frozen=True)
class Problem:
    """What one call computes: hashable, so that it can key tables of tiles and of compiled kernels.

    Parameters
    ----------
    B, H, Hkv, Sq, Sk, D : int
        Batch, query heads, key/value heads, query and key lengths, head dimension.
    recipe : Recipe
        The numerical choices.
    left, right : int
        Keys ``p - left .. p + right`` are visible to query i, with ``p = i + Sk - Sq``
        (aligned to the bottom right, as FlashAttention); -1 is unbounded. Causal is right = 0.
    scale : float
        Factor on Q K^T.
    out_dtype : str
        NumPy's name of the output's dtype (``"float16"``, ``"bfloat16"``, ``"float32"``, ``"float64"``).
    return_lse : bool
        Whether the log-sum-exp is wanted.
    """

    B: int
    H: int
    Hkv: int
    Sq: int
    Sk: int
    D: int
    recipe: Recipe
    left: int = -1
    right: int = -1
    scale: float = 1.0
    out_dtype: str = "float32"
    return_lse: bool = False

    @property
    def group(self) -> int:
        """int : query heads per key/value head (GQA)."""
        return self.H // self.Hkv

    @property
    def masked(self) -> bool:
        """bool : some query cannot see every key."""
        return self.left >= 0 or self.right >= 0

    def key_range(self, i0: int, i1: int) -> tuple[int, int]:
        """Return the keys [j0, j1) that some query of rows [i0, i1) can see."""
        shift = self.Sk - self.Sq
        j0 = 0 if self.left < 0 else max(0, i0 + shift - self.left)
        j1 = self.Sk if self.right < 0 else min(self.Sk, i1 - 1 + shift + self.right + 1)
        return j0, max(j0, j1)


def normalize_window(window: object, is_causal: bool) -> Window:
    """Return (left, right) with causal folded in: right = 0 at most.

    Raises
    ------
    TypeError, ValueError
        ``window`` is not a pair of ints, each -1 or more.
    """
    if window is None:
        left, right = -1, -1
    else:
        if isinstance(window, (str, bytes)) or not isinstance(window, Sequence) or len(window) != 2:
            raise TypeError(f"window must be None or a pair (left, right) of ints, got {window!r}")
        try:
            left, right = (operator.index(w) for w in window)
        except TypeError:
            raise TypeError(f"window must be a pair of ints, got {window!r}") from None
        if left < -1 or right < -1:
            raise ValueError(f"window parts must be -1 (unbounded) or at least 0, got {window!r}")
    if is_causal:
        right = 0
    return left, right


def default_scale(scale: object, D: int) -> float:
    """Return ``scale`` as a float, 1/sqrt(D) for None.

    Raises
    ------
    TypeError, ValueError
        Not a real number, or not finite.
    """
    if scale is None:
        return 1.0 / math.sqrt(D)
    try:
        if isinstance(scale, (str, bytes)):  # float() would read it
            raise TypeError
        value = float(scale)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise TypeError(f"scale must be a real number or None, got {scale!r}") from None
    # Every backend multiplies by scale * log2(e) in float32.
    if not abs(value) * math.log2(math.e) < _FLOAT32_MAX:
        raise ValueError(f"scale must be finite in float32, got {value}")
    return value


def shape_of_qkv(
    q_shape: tuple[int, ...], k_shape: tuple[int, ...], v_shape: tuple[int, ...], layout: str
) -> tuple[int, int, int, int, int, int]:
    """Check the three shapes against each other and return (B, H, Hkv, Sq, Sk, D).

    Raises
    ------
    ValueError
        Names the argument, its shape, and what is allowed.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(map(repr, LAYOUTS))}; got {layout!r}")
    ndim = len(q_shape)
    if ndim not in (2, 3, 4):
        raise ValueError(f"q must have 2, 3 or 4 dimensions, got shape {q_shape}")
    for name, shape in (("k", k_shape), ("v", v_shape)):
        if len(shape) != ndim:
            raise ValueError(
                f"{name} must have {ndim} dimensions as q has, got shape {shape} (q has shape {q_shape})"
            )

    def full(shape: tuple[int, ...]) -> tuple[int, int, int, int]:
        """(B, heads, S, D), with the lacking dimensions as 1."""
        B = shape[0] if ndim == 4 else 1
        head, seq = (-3, -2) if layout == "bhsd" else (-2, -3)
        if ndim == 2:
            return B, 1, shape[0], shape[1]
        return B, shape[head], shape[seq], shape[-1]

    B, H, Sq, D = full(q_shape)
    kB, Hkv, Sk, kD = full(k_shape)
    vB, vH, vS, vD = full(v_shape)
    for name, shape, batch in (("k", k_shape, kB), ("v", v_shape, vB)):
        if batch != B:
            raise ValueError(f"{name} must have q's batch size {B}, got {batch} (shape {shape}, q {q_shape})")
    if not 1 <= D <= MAX_HEAD_DIM:
        raise ValueError(f"q's head dimension D must be in 1..{MAX_HEAD_DIM}, got {D} (shape {q_shape})")
    for name, shape, dim in (("k", k_shape, kD), ("v", v_shape, vD)):
        if dim != D:
            raise ValueError(
                f"{name} must have q's head dimension D = {D}, got {dim} (shape {shape}, q {q_shape})"
            )
    if vS != Sk:
        raise ValueError(f"v must have k's length Sk = {Sk}, got {vS} (shape {v_shape}, k {k_shape})")
    if vH != Hkv:
        raise ValueError(f"v must have k's number of heads {Hkv}, got {vH} (shape {v_shape}, k {k_shape})")
    if Hkv == 0 and H == 0:
        return B, 0, 1, Sq, Sk, D
    if Hkv == 0 or H % Hkv:
        raise ValueError(f"q's number of heads must be a multiple of k's: got H = {H}, Hkv = {Hkv}")
    return B, H, Hkv, Sq, Sk, D
