"""How near each recipe comes to exact attention: bars on fixed data, and the margin measured on each."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import strategies as sts

import intfa_cupy as intfa
from intfa_cupy.capture import load_capture


def error(out: np.ndarray, ref: np.ndarray) -> float:
    return intfa.error_report(out, ref).relative_l2


@cache
def data(distribution: str, Sk: int = 4096, D: int = 64, seed: int = 0) -> tuple[np.ndarray, ...]:
    """q, k, v of one head, and the exact output; 512 queries are as good a sample as all."""
    case = sts.Case(H=1, Hkv=1, Sq=512, Sk=Sk, D=D, distribution=distribution, seed=seed)
    q, k, v = case.logical()
    return q, k, v, intfa.reference_attention(q, k, v)


def measured(distribution: str, recipe: str | intfa.Recipe, Sk: int = 4096, D: int = 64) -> float:
    q, k, v, ref = data(distribution, Sk, D)
    return error(intfa.attention(q, k, v, recipe=recipe, backend="numpy"), ref)


#: The most accurate fully INT8 attention.
KEY_SCALES = intfa.recipes()["int8"].replace(name="int8, key scales", k_granularity="token")

# In percent: the bar, and what was measured when it was set.
BARS = [
    ("normal", 64, "int8", 1.5, 1.31),
    ("normal", 64, "int8-fast", 1.8, 1.43),
    ("normal", 64, "paper-int8", 3.8, 3.12),
    ("normal", 64, "half-int8", 0.95, 0.81),
    ("normal", 64, "half-int8-plus", 0.95, 0.81),
    ("normal", 64, "fp8-e4m3", 6.0, 5.11),
    ("normal", 64, "fp16", 0.05, 0.039),
    ("sink", 64, "int8", 1.2, 0.97),
    ("sink", 128, "int8", 1.2, 0.76),
    ("small_sink", 64, "int8", 2.2, 1.85),
    ("small_sink", 64, "half-int8-plus", 0.6, 0.42),
    ("channel_scales", 64, "int8", 1.6, 1.32),
]


@pytest.mark.parametrize(("distribution", "D", "recipe", "bar", "when_set"), BARS)
def test_bar(distribution: str, D: int, recipe: str, bar: float, when_set: float) -> None:
    percent = 100 * measured(distribution, recipe, D=D)
    margin = 100 * (1 - percent / bar)
    print(f"{distribution} D={D} {recipe}: {percent:.3f} %, bar {bar} %, margin {margin:.0f} %")
    assert percent <= bar
    # Much better than when the bar was set is a change of arithmetic too: set the bar anew.
    assert percent > 0.8 * when_set


def test_the_sink_is_one() -> None:
    """The data that the bar is held on: key 0 has about 70 % of every row."""
    q, k, *_ = data("sink")
    scores = (q.astype(np.float64) @ k.astype(np.float64).swapaxes(2, 3))[0, 0] / 8
    p = np.exp(scores - scores.max(axis=1, keepdims=True))
    mass = p[:, 0] / p.sum(axis=1)
    assert 0.6 < mass.mean() < 0.8 and mass.min() > 0.3


def test_the_error_does_not_grow_with_the_length() -> None:
    """What P against its own tile's maximum is for; against the running one it grows."""
    short, long = (measured("normal", "int8-fast", Sk) for Sk in (1024, 16384))
    assert long < 1.12 * short
    short, long = (measured("normal", "paper-int8", Sk) for Sk in (1024, 16384))
    assert long > 1.3 * short


@pytest.mark.parametrize("D", [32, 128, 256])
def test_other_head_dimensions(D: int) -> None:
    assert measured("normal", "int8", 1024, D) < 0.016
    assert measured("normal", "int8-fast", 1024, D) < 0.019


def test_order_of_recipes() -> None:
    """The order of the table for normal data: what a user chooses by."""
    order = ["fp16", "half-int8", "int8", "int8-fast", "paper-int8", "fp8-e4m3", "fp8-e5m2", "int4"]
    errors = [measured("normal", name) for name in order]
    assert errors == sorted(errors), dict(zip(order, errors, strict=True))


def test_what_each_choice_buys() -> None:
    """Every part of ``int8`` earns its place on the data that it is for."""
    full = intfa.recipes()["int8"]
    cases = [
        ("small_sink", {"v_granularity": "channel"}, 5.0),
        ("small_sink", {"p_max": "running"}, 4.0),
        ("normal", {"p_max": "running"}, 1.3),
        ("shifted_keys", {"smooth_k": False, "equalize": False}, 2.0),
        ("channel_scales", {"equalize": False, "hadamard": False}, 3.0),
        ("channel_scales", {"equalize": False}, 2.0),
    ]
    for distribution, change, factor in cases:
        worse = measured(distribution, full.replace(**change))
        assert worse > factor * measured(distribution, full), (distribution, change, worse)


def test_a_scale_for_every_key() -> None:
    """``int8`` without the sharing of K's scale: about a tenth less error."""
    for distribution, bar in (("normal", 1.35), ("channel_scales", 1.35)):
        own, shared = (100 * measured(distribution, recipe) for recipe in (KEY_SCALES, "int8"))
        print(f"{distribution}: int8 {shared:.3f} %, with a scale for every key {own:.3f} %")
        assert own <= bar and own < 0.95 * shared


def test_sink_breaks_the_running_maximum() -> None:
    """The trap: Algorithm 1 flushes what is below 1/254 of the sink's probability."""
    assert measured("sink", "paper-int8") > 0.3
    assert measured("sink", "half-int8-plus") < 0.01


# Largest relative L2 error in percent on these data at 1,024 keys. Distributions that are a recipe's known
# weakness are not listed for it.
WORST = {
    "int8": {"normal": 1.5, "uniform": 1.5, "sink": 1.2, "small_sink": 3.0, "channel_scales": 1.6,
             "shifted_keys": 1.7, "positive_values": 0.6, "huge": 1.6, "zero_tokens": 1.6, "huge_token": 5.0},
    "int8-fast": {"normal": 1.8, "uniform": 1.8, "channel_scales": 2.0, "shifted_keys": 2.0,
                  "positive_values": 0.5, "huge": 1.8, "zero_tokens": 2.0},
    "paper-int8": {"normal": 3.8, "uniform": 2.5, "positive_values": 0.8, "huge": 3.8, "zero_tokens": 4.5},
    "half-int8": {"normal": 1.0, "uniform": 0.6, "positive_values": 0.3, "huge": 1.0, "zero_tokens": 1.2},
    "half-int8-plus": {"normal": 1.0, "uniform": 0.6, "sink": 1.0, "channel_scales": 1.2, "shifted_keys": 1.2,
                       "positive_values": 0.3, "huge": 1.0, "zero_tokens": 1.2, "huge_token": 1.5},
    "int4": {"normal": 17, "uniform": 9, "channel_scales": 18, "shifted_keys": 19, "zero_tokens": 18},
    "k4": {"normal": 13, "uniform": 7, "channel_scales": 14, "shifted_keys": 15, "zero_tokens": 14},
    "fp16": dict.fromkeys(("normal", "uniform", "sink", "positive_values", "huge", "zero_tokens"), 0.2),
    "fp8-e4m3": {"normal": 6.0, "uniform": 5.0, "positive_values": 2.0, "zero_tokens": 7.0},
    "fp8-e5m2": {"normal": 12.0, "uniform": 9.5, "positive_values": 4.0, "zero_tokens": 13.0},
}  # fmt: skip


@pytest.mark.parametrize(("recipe", "distribution"), [(r, d) for r, bars in WORST.items() for d in bars])
def test_error_bound_by_distribution(recipe: str, distribution: str) -> None:
    percent = 100 * measured(distribution, recipe, 1024)
    assert percent <= WORST[recipe][distribution], f"{percent:.3f} %"


# -- extreme numbers ----------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["int8", "int8-fast", "paper-int8", "half-int8", "half-int8-plus", "fp16"])
def test_float16_near_its_largest(recipe: str) -> None:
    """V at 65504 everywhere, Q near it: rounding must not carry the output past float16."""
    q, k, v = sts.Case(H=1, Hkv=1, Sq=200, Sk=500, dtype="float16", distribution="huge").logical()
    top = np.full_like(v, 65504)
    out = intfa.attention(q, k, top, recipe=recipe)
    assert np.isfinite(out).all()
    np.testing.assert_allclose(out.astype(np.float64), 65504, rtol=0.01)
    assert error(intfa.attention(q, k, v, recipe=recipe), intfa.reference_attention(q, k, v)) < 0.05


@pytest.mark.parametrize("recipe", ["int8", "int8-fast", "paper-int8", "half-int8", "half-int8-plus", "fp16"])
@pytest.mark.parametrize("size", [1e-7, 1e-20])
def test_tiny_numbers(recipe: str, size: float) -> None:
    """Scores are 0 and the output is V's mean, however small; in float16 to within its spacing of 6e-8."""
    q, k, v = (np.float32(size) * x for x in sts.Case(H=1, Hkv=1, Sq=50, Sk=200).logical())
    assert error(intfa.attention(q, k, v, recipe=recipe), intfa.reference_attention(q, k, v)) < 0.03
    if size > 1e-10:
        q, k, v = (x.astype(np.float16) for x in (q, k, np.abs(v) + np.float16(1e-7)))
        out, ref = intfa.attention(q, k, v, recipe=recipe), intfa.reference_attention(q, k, v)
        assert np.abs(out - ref).max() <= 2.0**-24 and out.any()


@pytest.mark.parametrize("recipe", sts.NAMES)
def test_zero_tokens(recipe: str) -> None:
    zero = np.zeros((1, 1, 200, 64), np.float32)
    x = np.random.default_rng(0).standard_normal(zero.shape).astype(np.float32)
    out, lse = intfa.attention(zero, zero, zero, recipe=recipe, return_lse=True)
    assert not out.any()
    np.testing.assert_allclose(lse, np.log(200), atol=1e-4)
    for q, k in ((zero, x), (x, zero), (zero, zero)):  # every score is 0
        out = intfa.attention(q, k, x, recipe=recipe)
        assert np.abs(out - x.mean(axis=2, keepdims=True)).max() < 0.02


@pytest.mark.parametrize(
    "recipe",
    ["int8", KEY_SCALES, "half-int8-plus", "fp16"],
    ids=["int8", "key-scales", "half-int8-plus", "fp16"],
)
@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_one_huge_token(recipe: str | intfa.Recipe, where: str) -> None:
    """The last token of one operand is far larger: the rows before it, which do not see it, stay accurate.

    The mean that smoothing subtracts leaves out each channel's extremes: with a huge key in it, it would
    lie far past all other keys. Keys that share their scale with the huge one, up to 31, lose their scores.
    """
    bar = 0.03 if where == "k" and recipe == "int8" else 0.02
    for factor in (100, 1e4):
        q, k, v = np.random.default_rng(0).standard_normal((3, 1, 1, 600, 64)).astype(np.float32)
        {"q": q, "k": k, "v": v}[where][0, 0, -1] *= factor
        out = intfa.attention(q, k, v, recipe=recipe, is_causal=True)
        assert np.isfinite(out).all()
        ref = intfa.reference_attention(q, k, v, is_causal=True)
        before = np.s_[:, :, :-1]
        assert error(out[before], ref[before]) < bar, factor


# -- real activations -----------------------------------------------------------------------


@cache
def capture_errors(recipe: str) -> np.ndarray:
    """Relative L2 error of every head of the shipped capture."""
    errors = []
    for q, k, v in load_capture()[0].values():
        out = intfa.attention(q, k, v, recipe=recipe, is_causal=True, backend="numpy")
        ref = intfa.reference_attention(q, k, v, is_causal=True)
        errors += [error(out[:, h], ref[:, h]) for h in range(q.shape[1])]
    return np.array(errors)


def test_capture_int8() -> None:
    errors = capture_errors("int8")
    print(f"int8 on the capture: mean {100 * errors.mean():.3f} %, worst head {100 * errors.max():.3f} %")
    assert errors.mean() <= 0.016
    assert errors.max() <= 0.03


def test_capture_against_fp8() -> None:
    """At least 80 % below FP8 with a scale per head."""
    gain = 1 - capture_errors("int8").mean() / capture_errors("fp8-e4m3").mean()
    print(f"int8 is {100 * gain:.1f} % below fp8-e4m3")
    assert gain >= 0.8


def test_capture_order() -> None:
    order = ["fp16", "half-int8-plus", "int8", "fp8-e4m3"]
    means = [capture_errors(name).mean() for name in order]
    assert means == sorted(means), dict(zip(order, means, strict=True))


# -- the measure itself -----------------------------------------------------------------------


def test_error_report_by_hand() -> None:
    report = intfa.error_report(np.array([1.0, 2.0, -2.0]), np.array([1.0, 4.0, 0.0]))
    assert report.relative_l2 == pytest.approx(np.sqrt(8 / 17))
    assert report.cosine == pytest.approx(9 / (3 * np.sqrt(17)))
    assert report.mre == pytest.approx((2 / 4.00001 + 2 / 1e-5) / 3)
    assert report.sum_ratio == pytest.approx(4 / 5)
    assert report.max_abs == 2
    assert report.as_dict()["max_abs"] == 2


def test_error_report_of_zeros_and_nan() -> None:
    zero, one = np.zeros(3), np.ones(3)
    assert intfa.error_report(zero, zero).relative_l2 == 0 and intfa.error_report(zero, zero).cosine == 1
    assert intfa.error_report(one, zero).relative_l2 == np.inf
    assert np.isnan(intfa.error_report(np.array([np.nan, 1, 1]), one).relative_l2)
