"""The quantiser: half a step, ranges, scales, and preparations that leave the scores alone."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
import strategies as sts
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import block_diag, hadamard

import intfa_cupy as intfa
from intfa_cupy import quantize
from intfa_cupy.quantized import pack_int4, unpack_int4

PLAIN = intfa.recipes()["paper-int8"]
ROTATED = ("int8", "int8-fast", "half-int8-plus", "int4", "k4")


def wide(t: intfa.QuantizedTensor) -> tuple[np.ndarray, np.ndarray]:
    """Stored numbers, and the step of each element, in float64."""
    shape = t.shape
    return t.numbers().astype(np.float64), np.broadcast_to(np.asarray(t.element_scale(), np.float64), shape)


def matrix(D: int) -> np.ndarray:
    """The rotation in float64, from SciPy's Hadamard matrices and D's binary digits."""
    blocks = [int(b) for b in (2**i for i in range(9)) if D & b]
    return block_diag(*(hadamard(b) / math.sqrt(b) for b in reversed(blocks)))


def prepared(case: sts.Case, recipe: intfa.Recipe) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Q and K as they should be before rounding, and lse_shift, from dense matrices in float64."""
    q, k, _ = (x.astype(np.float32) for x in case.logical())
    shift = np.zeros(q.shape[:3])
    q64, k64 = q.astype(np.float64), k.astype(np.float64)
    group = case.H // case.Hkv
    for b in range(case.B):
        for hk in range(case.Hkv):
            heads = slice(hk * group, (hk + 1) * group)
            stats = quantize.head_statistics(q[b, heads], k[b, hk], recipe)
            if recipe.smooth_k:
                shift[b, heads] = q64[b, heads] @ stats.mean.astype(np.float64)
                k64[b, hk] -= stats.mean
            factor = stats.factor.astype(np.float64)
            q64[b, heads] *= factor
            k64[b, hk] /= factor
    if recipe.hadamard:
        q64, k64 = q64 @ matrix(case.D), k64 @ matrix(case.D)
    return q64, k64, shift


# -- rounding -----------------------------------------------------------------------------


@given(case=sts.cases(empty=True, masks=False, memory=False), recipe=sts.any_recipe(integer=True))
def test_error_is_at_most_half_a_step(case: sts.Case, recipe: intfa.Recipe) -> None:
    qkv = intfa.quantize_qkv(*case.logical(), recipe=recipe)
    q, k, shift = prepared(case, recipe)
    v = case.logical()[2].astype(np.float32).astype(np.float64)
    for t, x in ((qkv.q, q), (qkv.k, k), (qkv.v, v)):
        numbers, step = wide(t)
        # float32's rounding of the preparation is relative to the token's largest element.
        slack = 4e-6 * np.abs(x).max(axis=3, keepdims=True, initial=0) + 1e-36
        if t.which == "k":
            slack = slack + 4e-7 * np.abs(case.logical()[1].astype(np.float64)).max(initial=0)
        error = np.abs(numbers * step - x)
        assert (error <= 0.5 * step + slack).all(), f"{t}: {(error / step).max():.4f} steps"
    if recipe.smooth_k:
        assert qkv.lse_shift is not None
        size = np.abs(case.logical()[0].astype(np.float64)).sum(axis=3) * (1 + np.abs(shift).max(initial=0))
        assert (np.abs(qkv.lse_shift - shift) <= 1e-5 * size + 1e-30).all()
    else:
        assert qkv.lse_shift is None


@given(case=sts.cases(empty=True, masks=False, memory=False), recipe=sts.any_recipe(integer=True))
def test_values_use_their_range_and_no_more(case: sts.Case, recipe: intfa.Recipe) -> None:
    qkv = intfa.quantize_qkv(*case.logical(), recipe=recipe)
    for t in (qkv.q, qkv.k, qkv.v):
        numbers, step = wide(t)
        most = 7 if t.format == "int4" else 127
        assert numbers.min(initial=0) >= -most and numbers.max(initial=0) <= most
        assert np.isfinite(step).all() and (step > 0).all()
        if t.granularity == "token" and t.which != "v":  # folded V has a floor
            reached = np.abs(numbers).max(axis=3)
            assert ((reached == most) | (reached == 0)).all(), (
                "a token's largest element is stored as the largest integer"
            )


def test_half_to_even() -> None:
    x = np.zeros((1, 1, 1, 16), np.float32)
    x[..., :9] = [127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, -125.5]  # 127: a step of exactly 1
    for name in ("q", "k", "v"):
        t = getattr(intfa.quantize_qkv(x, x, x, recipe=PLAIN), name)
        assert t.numbers().ravel()[:9].tolist() == [127, 0, 2, 2, 0, -2, -2, 126, -126], name


@pytest.mark.parametrize("granularity", ["token", "group", "tile", "channel"])
def test_k_scale_is_shared_by_whom_it_says(granularity: str) -> None:
    rng = np.random.default_rng(0)
    k = rng.lognormal(0, 2, (2, 3, 300, 80)).astype(np.float32)
    t = intfa.quantize_qkv(k[..., :5, :], k, k, recipe=PLAIN.replace(k_granularity=granularity)).k
    step = wide(t)[1]
    for b, h, j, d in rng.integers((2, 3, 300, 80), size=(60, 4)):
        keys = {
            "token": [j],
            "channel": [j],
            "tile": [i for i in range(300) if i // 128 == j // 128],
            # The columns 8n + 2q and 8n + 2q + 1 of a tensor-core accumulator, which lane q of a quad holds.
            "group": [i for i in range(300) if i // 128 == j // 128 and i % 8 // 2 == j % 8 // 2],
        }[granularity]
        channels = slice(d // 32 * 32, d // 32 * 32 + 32) if granularity == "channel" else slice(None)
        np.testing.assert_allclose(step[b, h, j, d], k[b, h, keys][:, channels].max() / 127, rtol=1e-6)


@pytest.mark.parametrize(("granularity", "axes"), [("channel", (2,)), ("head", (2, 3))])
def test_v_scale_is_shared_by_whom_it_says(granularity: str, axes: tuple[int, ...]) -> None:
    v = np.random.default_rng(0).standard_normal((2, 3, 300, 40)).astype(np.float32)
    t = intfa.quantize_qkv(v, v, v, recipe=PLAIN.replace(v_granularity=granularity)).v
    expected = np.abs(v).max(axis=axes, keepdims=True) / 127
    np.testing.assert_allclose(wide(t)[1], np.broadcast_to(expected, v.shape), rtol=1e-6)


# -- folded V -----------------------------------------------------------------------------


@given(seed=st.integers(0, 1000), spread=st.sampled_from((0.0, 1.0, 4.0)))
def test_folded_v_has_a_floor_from_the_mean(seed: int, spread: float) -> None:
    rng = np.random.default_rng(seed)
    v = (rng.standard_normal((1, 1, 200, 16)) * np.exp(spread * rng.standard_normal((200, 1)))).astype(
        np.float32
    )
    v[0, 0, :20] = 0
    scale = intfa.quantize_qkv(v, v, v, recipe="int8").v.scale[0, 0]  # type: ignore[index]
    absmax = np.abs(v).max(axis=3)[0, 0].astype(np.float64)
    floor = float(scale[:20].max()) * 127
    assert absmax.mean() / 32 < floor * (1 + 1e-6) and floor <= absmax.mean() / 16 * (1 + 1e-6)
    assert math.log2(floor) == pytest.approx(round(math.log2(floor)), abs=1e-6), "a power of two"
    np.testing.assert_allclose(scale, np.maximum(absmax, floor) / 127, rtol=1e-6)


def test_one_huge_value_token_does_not_ruin_the_rest() -> None:
    v = np.random.default_rng(0).standard_normal((1, 1, 1024, 64)).astype(np.float32)
    v[0, 0, 7] *= 100
    t = intfa.quantize_qkv(v, v, v, recipe="int8").v
    rest = np.arange(1024) != 7
    error = np.linalg.norm((t.dequantize() - v)[0, 0, rest]) / np.linalg.norm(v[0, 0, rest])
    assert error < 0.01
    head_wide = intfa.quantize_qkv(v, v, v, recipe="paper-int8").v.dequantize()
    assert (
        np.linalg.norm((head_wide - v)[0, 0, rest]) / np.linalg.norm(v[0, 0, rest]) > 0.3
    )  # what it is there for


# -- preparation --------------------------------------------------------------------------


@pytest.mark.parametrize("D", range(1, 257))
def test_rotation_is_the_hadamard_matrix(D: int) -> None:
    rotation = quantize.rotate(np.eye(D, dtype=np.float32))
    np.testing.assert_allclose(rotation, matrix(D), atol=1e-6)
    np.testing.assert_allclose(rotation.astype(np.float64) @ rotation.T, np.eye(D), atol=2e-6)


def test_rotation_overflows_only_where_its_result_does() -> None:
    """It is normalised first; the four would sum to infinity."""
    got = quantize.rotate(np.full((1, 4), 1e38, np.float32))
    np.testing.assert_array_equal(got, np.array([[2e38, 0, 0, 0]], np.float32))


@pytest.mark.parametrize("D", [1, 64, 80, 128, 255])
def test_factor_and_normalisation_are_rounded_as_one(D: int) -> None:
    rng = np.random.default_rng(D)
    x = rng.lognormal(0, 1, D).astype(np.float32)
    factor = quantize.round_bf16(rng.lognormal(0, 1, D))
    got = quantize.prepare(np.diag(x), factor, PLAIN.replace(equalize=True, hadamard=True))
    signs = np.sign(quantize.rotate(np.eye(D, dtype=np.float32)))
    normalization = np.float32(1) / np.sqrt(np.abs(signs).sum(axis=1))  # of the size of a channel's block
    np.testing.assert_array_equal(got, (x * (factor * normalization))[:, None] * signs)


def test_rotation_has_blocks_by_binary_digits() -> None:
    assert [quantize.hadamard_blocks(D) for D in (1, 64, 80, 96, 255)] == [
        [1], [64], [64, 16], [64, 32], [128, 64, 32, 16, 8, 4, 2, 1],
    ]  # fmt: skip


@given(
    case=sts.cases(
        masks=False,
        memory=False,
        dtypes=("float32",),
        distributions=set(sts.DISTRIBUTIONS) - {"huge", "tiny"},
    ),
    smooth=st.booleans(), equalize=st.booleans(), rotated=st.booleans(),
)  # fmt: skip
def test_preparation_leaves_the_scores(case: sts.Case, smooth: bool, equalize: bool, rotated: bool) -> None:
    """(Q c H) (K - mean) / c H)^T + q . mean is Q K^T, computed with the module's own steps."""
    recipe = PLAIN.replace(smooth_k=smooth, equalize=equalize, hadamard=rotated)
    q, k = (x[0, 0] for x in case.logical()[:2])
    stats = quantize.head_statistics(q[None], k, recipe)
    a = quantize.prepare(q, stats.factor, recipe).astype(np.float64)
    b = quantize.prepare(k - stats.mean, np.float32(1) / stats.factor, recipe).astype(np.float64)
    scores = a @ b.T + (q.astype(np.float64) @ stats.mean)[:, None]
    size = (
        np.linalg.norm(a, axis=1)[:, None] * np.linalg.norm(b, axis=1)
        + np.abs(q) @ (np.abs(k) + np.abs(stats.mean)).T
    )
    assert (np.abs(scores - q.astype(np.float64) @ k.T) <= 2e-6 * size).all()
    if not smooth:
        assert not stats.mean.any()
    if not equalize:
        assert (stats.factor == 1).all()


def test_equalisation_gives_q_and_k_the_same_profile() -> None:
    rng = np.random.default_rng(1)
    q, k, _ = sts.channel_scales(rng, (1, 4, 500, 64), (1, 1, 700, 64))
    recipe = intfa.recipes()["int8"]
    stats = quantize.head_statistics(q[0].astype(np.float32), k[0, 0].astype(np.float32), recipe)
    ratio = np.abs(q[0] * stats.factor).max(axis=(0, 1)) / np.abs((k[0, 0] - stats.mean) / stats.factor).max(
        axis=0
    )
    assert ratio.max() / ratio.min() < 1.03  # two bfloat16 roundings of the factor
    assert np.log(stats.factor).mean() == pytest.approx(0, abs=2e-3)  # geometric mean 1


def test_equalisation_is_clipped_and_survives_dead_channels() -> None:
    q = np.random.default_rng(0).standard_normal((1, 50, 64)).astype(np.float32)
    k = q[0].copy()
    k[:, 3] = 0
    q[:, :, 5] = 0
    k[:, 7] *= 1e30
    stats = quantize.head_statistics(q, k, intfa.recipes()["int8"].replace(smooth_k=False))
    assert np.isfinite(stats.factor).all() and stats.factor.min() >= 0.99e-3 and stats.factor.max() <= 1.01e3


@given(case=sts.cases(masks=False, memory=False), seed=st.integers(0, 100), name=st.sampled_from(ROTATED))
def test_statistics_do_not_depend_on_the_order_of_tokens(case: sts.Case, seed: int, name: str) -> None:
    rng = np.random.default_rng(seed)
    q, k, _ = (x.astype(np.float32) for x in case.logical())
    recipe = intfa.recipes()[name]
    first = quantize.head_statistics(q[0], k[0, 0], recipe)
    again = quantize.head_statistics(
        q[0][:, rng.permutation(case.Sq)], k[0, 0][rng.permutation(case.Sk)], recipe
    )
    for a, b in ((first.mean, again.mean), (first.factor, again.factor)):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(
            a, a.astype(ml_dtypes.bfloat16).astype(np.float32), "on bfloat16's grid"
        )


def test_smoothing_subtracts_the_mean() -> None:
    k = np.random.default_rng(0).standard_normal((500, 32)).astype(np.float32) + 50
    stats = quantize.head_statistics(k[None], k, intfa.recipes()["int8"])
    trimmed = np.sort(k, axis=0)[1:-1].mean(axis=0, dtype=np.float64)
    np.testing.assert_allclose(stats.mean, trimmed, rtol=2**-8)


@pytest.mark.parametrize("Sk", [1, 2, 3, 100])
def test_one_huge_key_does_not_move_the_mean(Sk: int) -> None:
    k = np.random.default_rng(0).standard_normal((Sk, 32)).astype(np.float32)
    calm = quantize.head_statistics(k[None], k, intfa.recipes()["int8"]).mean
    k[Sk // 2] *= 1e4
    moved = quantize.head_statistics(k[None], k, intfa.recipes()["int8"]).mean
    assert (np.abs(calm) < 4).all()
    if Sk > 2:
        assert (np.abs(moved) < 4).all()


# -- what is not finite -------------------------------------------------------------------


@pytest.mark.parametrize("name", sts.NAMES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_row_of_q_leaves_the_others(name: str, bad: float) -> None:
    q, k, v = np.random.default_rng(0).standard_normal((3, 1, 2, 140, 64)).astype(np.float32)
    q[0, 1, 5] = 0
    clean = intfa.quantize_qkv(q, k, v, recipe=name)
    q[0, 1, 5, 3] = bad
    poisoned = intfa.quantize_qkv(q, k, v, recipe=name)
    others = np.ones((1, 2, 140), bool)
    others[0, 1, 5] = False
    for a, b in zip((clean.q, clean.k, clean.v), (poisoned.q, poisoned.k, poisoned.v), strict=True):
        rows = others if a.which == "q" else slice(None)
        np.testing.assert_array_equal(a.dequantize()[rows], b.dequantize()[rows])
    assert np.isnan(poisoned.q.dequantize()[0, 1, 5]).any()


# -- storage ------------------------------------------------------------------------------


@given(D=st.integers(1, 256), rows=st.integers(0, 9), seed=st.integers(0, 2**16))
def test_int4_round_trip(D: int, rows: int, seed: int) -> None:
    x = np.random.default_rng(seed).integers(-8, 8, (2, rows, D)).astype(np.int8)
    packed = pack_int4(x)
    assert packed.dtype == np.uint8 and packed.shape == (2, rows, (D + 1) // 2)
    np.testing.assert_array_equal(unpack_int4(packed, D), x)


def test_int4_puts_the_even_channel_into_the_low_nibble() -> None:
    assert pack_int4(np.array([[1, 2, -1, -8, 7]], np.int8)).tolist() == [[0x21, 0x8F, 0x07]]


def test_bytes_are_those_of_the_formats() -> None:
    x = np.random.default_rng(0).standard_normal((1, 2, 256, 64)).astype(np.float16)
    elements = 2 * 256 * 64
    expected = {
        "int8": (elements + 2 * 256 * 4, elements + 2 * 2 * 4 * 4, elements + 2 * 256 * 4),
        "int8-fast": (elements + 2 * 256 * 4, elements + 2 * 2 * 4 * 4, elements + 2 * 64 * 4),
        "paper-int8": (elements + 2 * 256 * 4, elements + 2 * 256 * 4, elements + 2 * 4),
        "int4": (elements // 2 + 2 * 256 * 2 * 4, elements // 2 + 2 * 256 * 2 * 4, elements + 2 * 256 * 4),
        "fp16": (2 * elements + 2 * 4,) * 3,
        "fp8-e5m2": (elements,) * 3,
    }
    for name, sizes in expected.items():
        qkv = intfa.quantize_qkv(x, x, x, recipe=name)
        assert (qkv.q.nbytes, qkv.k.nbytes, qkv.v.nbytes) == sizes, name
        assert qkv.nbytes == sum(sizes)


@pytest.mark.parametrize("name", ["fp16", "half-int8"])
def test_float16_is_stored_as_it_came(name: str) -> None:
    x = (
        (np.random.default_rng(0).standard_normal((1, 1, 40, 16)) * 3e4)
        .clip(-65504, 65504)
        .astype(np.float16)
    )
    v = intfa.quantize_qkv(x, x, x, recipe=name).v
    np.testing.assert_array_equal(v.numbers(), x)
    assert (v.scale == 1).all()  # type: ignore[attr-defined]


@pytest.mark.parametrize("size", [1e-30, 1e-7, 1.0, 1e6, 1e30])
def test_wider_inputs_reach_fp16_under_a_power_of_two(size: float) -> None:
    x = (np.random.default_rng(0).standard_normal((1, 1, 40, 16)) * size).astype(np.float32)
    v = intfa.quantize_qkv(x, x, x, recipe="fp16").v
    np.testing.assert_allclose(v.dequantize(), x, rtol=2**-11, atol=2e-9 * size)
    assert math.frexp(float(v.scale[0, 0]))[0] == 0.5  # type: ignore[index]


@pytest.mark.parametrize(("name", "bits"), [("fp8-e4m3", 4), ("fp8-e5m2", 3)])
def test_fp8_error_is_half_a_unit(name: str, bits: int) -> None:
    x = np.random.default_rng(0).standard_normal((1, 1, 300, 64)).astype(np.float32)
    for t in (lambda r: (r.q, r.k, r.v))(intfa.quantize_qkv(x, x, x, recipe=name)):
        error = np.abs(t.dequantize() - x)
        smallest = float(np.abs(x).max()) / 448 * 2**-10 if name == "fp8-e4m3" else 2**-17
        assert (error <= np.maximum(np.abs(x) * 2.0**-bits, smallest) * (1 + 1e-5)).all()
        assert error.max() > 2.0 ** -(bits + 2)  # and it is FP8


def test_fp8_saturates() -> None:
    x = np.full((1, 1, 4, 8), 1e9, np.float32)
    assert float(intfa.quantize_qkv(x, x, x, recipe="fp8-e5m2").v.numbers().astype(np.float32).max()) == 57344
    np.testing.assert_allclose(intfa.quantize_qkv(x, x, x, recipe="fp8-e4m3").v.dequantize(), x, rtol=1e-6)
