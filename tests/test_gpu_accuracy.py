"""What the README says of accuracy, on the device: the error of each recipe, and very long sequences."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import strategies as sts
from agreement import ROUNDING, check_against_model
from test_gpu_attention import KERNELS, quantize_and_attend
from test_gpu_quantize import to_device

import intfa_cupy as intfa
from intfa_cupy import Recipe, dispatch

pytestmark = pytest.mark.gpu
R = intfa.recipes()

# In percent, relative L2, on normal data of 16k keys: the bar.
BARS = [("int8", 1.6), ("int8-fast", 1.8), ("paper-int8", 5.0), ("half-int8", 0.95), ("half-int8-plus", 0.95)]


def attend(x: list[Any], **call: Any) -> tuple[np.ndarray, np.ndarray]:
    out, lse = intfa.attention(*x, return_lse=True, **call)
    return out.get(), lse.get()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize(("recipe", "bar"), BARS)
def test_error_on_normal_data_is_the_models(recipe: str, bar: float, D: int, kernel: str) -> None:
    """Against exact attention it is below the bar, and the model's own error but for a tenth of it."""
    case = sts.Case(H=1, Hkv=1, Sq=512, Sk=16384, D=D, dtype="float16")
    q, k, v = case.logical()
    try:
        out = intfa.attention(*map(to_device, (q, k, v)), recipe=recipe, backend=kernel).get()
    except dispatch.UnsupportedError as error:
        pytest.skip(str(error))
    exact = intfa.reference_attention(q, k, v)
    model = intfa.attention(q, k, v, recipe=recipe, backend="numpy")
    error, models = (100 * intfa.error_report(x, exact).relative_l2 for x in (out, model))
    print(f"{kernel} {recipe} D={D}: {error:.3f} %, the model {models:.3f} %")
    assert error <= bar
    assert abs(error - models) <= 0.1 * models


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("recipe", ["int8", "int8-fast", "paper-int8"])
def test_sums_over_more_than_66_000_keys(recipe: str, kernel: str) -> None:
    """Products of one tile fit in int32; those of all tiles would not: 255 * 127 * 66,313 is 2^31."""
    case = sts.Case(H=1, Hkv=1, Sq=40, Sk=140_001, D=64, distribution="positive_values", scale=1e-3)
    qkv, out, lse = quantize_and_attend(case, R[recipe], kernel)
    check_against_model(qkv, case, case.problem(R[recipe]), out, lse, ROUNDING[kernel])
    exact = intfa.reference_attention(*case.logical(), scale=1e-3)
    assert intfa.error_report(out, exact).relative_l2 < 0.005


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    "recipe", [R["int8"], R["int8-fast"], Recipe(p_max="running", v_granularity="channel")]
)
@pytest.mark.parametrize("D", [64, 128, 256])
def test_maximum_that_outgrows_its_reference(D: int, recipe: Recipe, kernel: str) -> None:
    """Sums are kept relative to an early maximum; scores that rise by hundreds move it, tile after tile."""
    case = sts.Case(H=2, Hkv=1, Sq=200, Sk=1500, D=D, distribution="rising", scale=4.0)
    qkv, out, lse = quantize_and_attend(case, recipe, kernel)
    assert np.isfinite(lse).all() and np.isfinite(out).all()
    check_against_model(qkv, case, case.problem(recipe), out, lse, ROUNDING[kernel])


#: One recipe for each way to exponents, its Q and K taken as they are.
UNPREPARED = {
    name: R[name].replace(smooth_k=False, equalize=False, hadamard=False)
    for name in ("int8", "int8-fast", "paper-int8", "half-int8", "int4", "fp16", "fp8-e4m3")
}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("D", [64, 128, 256])
@pytest.mark.parametrize("recipe", UNPREPARED.values(), ids=UNPREPARED)
def test_huge_scores_give_right_rows_or_nan(recipe: Recipe, D: int, kernel: str) -> None:
    """With scores so large that one key takes all, a row is its value, or NaN; never anything else."""
    q, k, v = sts.one_key_takes_all(sts.Case(H=2, Hkv=2, Sq=150, Sk=700, D=D), 650)
    score = intfa.attention(q, k, v, recipe=recipe, backend="numpy", return_lse=True, scale=1.0)[1]
    x = [to_device(a) for a in (q, k, v)]
    for exponent in (0, 4, 6, 7, 9, 12):
        try:
            out, lse = attend(x, recipe=recipe, backend=kernel, scale=10.0**exponent)
        except dispatch.UnsupportedError as error:
            pytest.skip(str(error))
        lost = np.isnan(out)
        assert (lost.all(axis=-1) == lost.any(axis=-1)).all()
        assert exponent > 4 or not (lost.any() or np.isnan(lse).any())
        error = np.abs(out - v[:, :, 650:651])[~lost]
        assert error.max(initial=0) < (0.3 if recipe.v_format == "e4m3" else 0.05), exponent
        assert np.nanmax(np.abs(lse / 10.0**exponent - score), initial=0) < 1, exponent


@pytest.mark.parametrize("kernel", KERNELS)
def test_values_at_the_end_of_float16_do_not_become_infinite(kernel: str) -> None:
    """A rounded P can carry an output past the largest V; in float16 it saturates, as in the model."""
    case = sts.Case(H=2, Hkv=2, Sq=150, Sk=300, D=64, dtype="float16", distribution="huge")
    x = [to_device(a) for a in case.logical()]
    tried = 0
    for recipe in ("int8", "int8-fast", "half-int8"):
        try:
            out = intfa.attention(*x, recipe=recipe, backend=kernel).get()
        except dispatch.UnsupportedError:
            continue
        tried += 1
        assert np.isfinite(out).all(), recipe
    if not tried:
        pytest.skip(f"{kernel} serves none of them here")
