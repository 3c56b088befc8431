"""Inputs at which rounding to FP8 can go wrong, for the host shim and for the device alike."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from intfa_cupy import Recipe

FP8 = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}


def fp8_edges(fmt: str) -> np.ndarray:
    """Every number of a format, what lies halfway between two, and the float32 on both sides of each.

    Also zeros, subnormals of float32, and numbers beyond the range, which saturate. Shape (1, 1, S, 64).
    """
    codes = np.arange(256, dtype=np.uint8).view(FP8[fmt]).astype(np.float32)
    numbers = np.unique(codes[np.isfinite(codes) & (codes >= 0)])
    halfway = (numbers[1:] + numbers[:-1]) / 2
    largest = numbers[-1]
    beyond = np.array([1e-45, 1e-38, 2 * largest, 65536, 1e20, 3e38], np.float32)
    points = np.concatenate([numbers, halfway, beyond])
    around = [np.nextafter(points, np.float32(to)) for to in (0, np.float32(np.inf))]
    one_sign = np.concatenate([points, *around])
    both = np.concatenate([one_sign, -one_sign])
    both = both[np.isfinite(both)]
    return np.resize(both, (1, 1, -(-both.size // 64), 64)).astype(np.float32)


def unscaled(fmt: str) -> Recipe:
    """A recipe that stores Q, K and V in an FP8 format as they are."""
    tensors = {f"{which}_format": fmt for which in "qkvp"}
    scales = {f"{which}_granularity": "none" for which in "qkv"}
    return Recipe(**tensors, **scales, p_levels=1, p_max="running")  # type: ignore[arg-type]
