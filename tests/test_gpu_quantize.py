"""The quantiser on the device: the integers of the NumPy quantiser, given the same statistics."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import strategies as sts
from agreement import statistics_of
from hypothesis import given, settings
from hypothesis import strategies as st
from rounding import FP8, fp8_edges, unscaled

import intfa_cupy as intfa
from intfa_cupy import QuantizedQKV, Recipe, dispatch, gpu, model, packing
from intfa_cupy.problem import Problem, shape_of_qkv
from intfa_cupy.quantize import quantize_numpy

pytestmark = pytest.mark.gpu
R = intfa.recipes()
RECIPES = [R[n] for n in ("int8", "int8-fast", "paper-int8", "half-int8", "half-int8-plus")] + [
    Recipe(k_granularity="tile", v_granularity="head", smooth_k=True),
    Recipe(k_granularity="group", v_granularity="token", hadamard=True),
    Recipe(v_granularity="channel", equalize=True),
    *(R[n] for n in ("int4", "k4", "fp16", "fp8-e4m3", "fp8-e5m2")),
    R["fp8-e4m3"].replace(smooth_k=True, equalize=True, hadamard=True),
    Recipe(q_format="int4", k_granularity="channel", v_granularity="head"),
]
# A kernel is compiled for each recipe, head dimension and input type: a few of them, every kind of rotation.
HEAD_DIMS = (1, 33, 64, 80, 128, 255, 256)
DTYPES = ("float16", "bfloat16", "float32")


def dtypes_of(recipe: Recipe) -> tuple[str, ...]:
    """All input types for the main recipes, one for each of the others: they share the code that reads."""
    if recipe.name in ("int8", "int8-fast", "half-int8"):
        return (*DTYPES, "float64")
    turn = RECIPES.index(recipe) if recipe in RECIPES else 0
    return (DTYPES[turn % len(DTYPES)],)


def with_dtype(case: sts.Case, recipe: Recipe) -> sts.Case:
    """The case, in a type that is tested with the recipe."""
    return case if case.dtype in dtypes_of(recipe) else replace(case, dtype=dtypes_of(recipe)[0])


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


def quantize(arrays: Any, recipe: Recipe, layout: str = "bhsd") -> QuantizedQKV:
    """Quantise on the device, also for recipes that no attention kernel takes."""
    q, k, v = map(to_device, arrays)
    problem = Problem(*shape_of_qkv(q.shape, k.shape, v.shape, layout), recipe=recipe)
    return gpu.quantize(q, k, v, dispatch.Plan("", problem), layout=layout)


@settings(max_examples=300)
@given(
    case=sts.cases(head_dims=HEAD_DIMS, dtypes=(*DTYPES, "float64"), masks=False),
    recipe=st.sampled_from(RECIPES),
)
def test_integers_and_scales_are_those_of_numpy(case: sts.Case, recipe: Recipe) -> None:
    """Any shape, strides, type and distribution."""
    case = with_dtype(case, recipe)
    q, k, v = case.logical()
    got = quantize(case.arrays(), recipe, case.layout)
    want = quantize_numpy(q, k, v, recipe, statistics=statistics_of(got))
    host = packing.to_host(got)
    sound = np.isfinite(model.guard(want))
    np.testing.assert_array_equal(np.isnan(got.extra["operands"]["guard"].get()), ~sound)
    for name in ("q", "k", "v"):
        one, other = getattr(host, name), getattr(want, name)
        heads = np.full(other.shape[:2], True) if name == "q" else sound
        # As float32, in which NaN equals NaN.
        values = [x.numbers().astype(np.float32)[heads] for x in (one, other)]
        np.testing.assert_array_equal(*values, err_msg=name)
        assert (one.scale is None) == (other.scale is None)
        if one.scale is not None:
            np.testing.assert_array_equal(one.scale[heads], other.scale[heads], err_msg=f"{name}'s scale")


@pytest.mark.parametrize("fmt", FP8)
def test_fp8_is_rounded_as_ml_dtypes_rounds_it(fmt: str) -> None:
    """Every tie, subnormal and number out of range, by the device's own conversion if it has one."""
    x = fp8_edges(fmt)
    got = packing.to_host(quantize((x, x, x), unscaled(fmt)))
    want = quantize_numpy(x, x, x, unscaled(fmt))
    for name in ("q", "k", "v"):
        one, other = getattr(got, name), getattr(want, name)
        np.testing.assert_array_equal(one.values.view(np.uint8), other.values.view(np.uint8), err_msg=name)


@pytest.mark.parametrize("name", ["int8", "int8-fast", "paper-int8", "half-int8", "fp8-e4m3", "int4"])
def test_two_runs_are_equal_to_the_bit(name: str) -> None:
    import cupy

    x = sts.Case(B=2, H=4, Hkv=2, Sq=1000, Sk=3000, D=128, dtype="float16").logical()
    first, second = (quantize(x, R[name]).extra["operands"] for _ in range(2))
    for key in first:
        assert bool((first[key].view(cupy.uint8) == second[key].view(cupy.uint8)).all()), key
