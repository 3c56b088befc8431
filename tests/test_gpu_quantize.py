"""The quantiser on the device: the integers of the NumPy quantiser, given the same statistics."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import strategies as sts
from hypothesis import given, settings
from hypothesis import strategies as st

import intfa_cupy as intfa
from intfa_cupy import QuantizedQKV, Recipe, model, packing
from intfa_cupy.quantize import HeadStatistics, quantize_numpy

pytestmark = pytest.mark.gpu
R = intfa.recipes()
RECIPES = [R[n] for n in ("int8", "int8-fast", "paper-int8", "half-int8", "half-int8-plus")] + [
    Recipe(k_granularity="tile", v_granularity="head", smooth_k=True),
    Recipe(k_granularity="group", v_granularity="token", hadamard=True),
    Recipe(v_granularity="channel", equalize=True),
]
# A kernel is compiled for each recipe, head dimension and input type: a few of them, every kind of rotation.
HEAD_DIMS = (1, 33, 64, 80, 128, 255, 256)
DTYPES = ("float16", "bfloat16", "float32", "float64")


def to_device(x: np.ndarray) -> Any:
    """A CuPy array of the same strides, as `sts.stored` made them."""
    import cupy
    from numpy.lib.array_utils import byte_bounds

    low, high = byte_bounds(x)
    memory = np.frombuffer(_bytes(low, high - low), np.uint8)
    held = cupy.asarray(memory)
    start = x.__array_interface__["data"][0] - low
    return cupy.ndarray(x.shape, x.dtype, held.data + start, strides=x.strides)


def _bytes(address: int, nbytes: int) -> bytes:
    import ctypes

    return ctypes.string_at(address, nbytes)


def statistics_of(qkv: QuantizedQKV) -> dict[tuple[int, int], HeadStatistics]:
    """What the kernels found for each key/value head."""
    made = qkv.extra["operands"]
    B, Hkv, _, D = qkv.k.shape
    mean = made["k_mean"].get() if "k_mean" in made else np.zeros((B, Hkv, D), np.float32)
    factor = made["equalizer"].get()[:, :, 0] if "equalizer" in made else np.ones((B, Hkv, D), np.float32)
    return {(b, h): HeadStatistics(mean[b, h, :D], factor[b, h, :D]) for b in range(B) for h in range(Hkv)}


@settings(max_examples=300)
@given(
    case=sts.cases(head_dims=HEAD_DIMS, dtypes=DTYPES, masks=False),
    recipe=st.sampled_from(RECIPES),
)
def test_integers_and_scales_are_those_of_numpy(case: sts.Case, recipe: Recipe) -> None:
    """Any shape, strides, type and distribution."""
    q, k, v = case.logical()
    kernel = {"recipe": recipe, "backend": "wmma"}
    got = intfa.quantize_qkv(*map(to_device, case.arrays()), layout=case.layout, **kernel)
    want = quantize_numpy(q, k, v, recipe, statistics=statistics_of(got))
    host = packing.to_host(got)
    sound = np.isfinite(model.guard(want))
    np.testing.assert_array_equal(np.isnan(got.extra["operands"]["guard"].get()), ~sound)
    for name in ("q", "k", "v"):
        one, other = getattr(host, name), getattr(want, name)
        heads = np.full(other.shape[:2], True) if name == "q" else sound
        np.testing.assert_array_equal(one.values[heads], other.values[heads], err_msg=name)
        np.testing.assert_array_equal(one.scale[heads], other.scale[heads], err_msg=f"{name}'s scale")


@pytest.mark.parametrize("name", ["int8", "int8-fast", "paper-int8", "half-int8"])
def test_two_runs_are_equal_to_the_bit(name: str) -> None:
    import cupy

    x = [to_device(a) for a in sts.Case(B=2, H=4, Hkv=2, Sq=1000, Sk=3000, D=128, dtype="float16").logical()]
    first, second = (intfa.quantize_qkv(*x, recipe=name).extra["operands"] for _ in range(2))
    for key in first:
        assert bool((first[key].view(cupy.uint8) == second[key].view(cupy.uint8)).all()), key
