"""What must hold of the operator whatever the input: against a dense oracle, and when a call changes."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import oracle
import pytest
import strategies as sts
from hypothesis import given
from hypothesis import strategies as st

import intfa_cupy as intfa
from intfa_cupy import QuantizedQKV, Recipe, model

RECIPES = intfa.recipes()
#: P against the maximum of its own tile, integers throughout.
TILE_RECIPES = ("int8", "int8-fast", "int4", "k4")


def run(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, recipe: str | Recipe, **call: object
) -> tuple[np.ndarray, np.ndarray]:
    return intfa.attention(q, k, v, recipe=recipe, return_lse=True, backend="numpy", **call)


def error(out: np.ndarray, ref: np.ndarray) -> float:
    """Relative L2; 0 where there is nothing."""
    norm = np.linalg.norm(ref.astype(np.float64))
    return (
        float(np.linalg.norm(out.astype(np.float64) - ref) / norm)
        if norm
        else float(np.abs(out).max(initial=0))
    )


def assert_equal(a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray]) -> None:
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x.astype(np.float64), y.astype(np.float64))


def assert_within(exact: oracle.Exact, out: np.ndarray, lse: np.ndarray) -> None:
    """The output and lse are within what rounding P explains."""
    excess = np.abs(out - exact.out) / exact.out_bound
    assert excess.max(initial=0) <= 1, (
        f"{excess.max():.3f} times the bound at {np.unravel_index(excess.argmax(), out.shape)}"
    )
    np.testing.assert_array_equal(np.isfinite(lse), np.isfinite(exact.lse))
    seen = np.isfinite(lse)
    assert (np.abs(lse[seen] - exact.lse[seen]) <= exact.lse_bound[seen]).all()


# -- against the oracle -------------------------------------------------------------------


@given(
    case=sts.cases(empty=True, memory=False),
    recipe=sts.any_recipe(),
    tile=st.sampled_from((128, 128, 96, 64, 17)),
)
def test_only_the_rounding_of_p_separates_it_from_exact(case: sts.Case, recipe: Recipe, tile: int) -> None:
    """Every recipe, mask, length and tile size, element by element."""
    qkv = intfa.quantize_qkv(*case.logical(), recipe=recipe)
    problem = case.problem(recipe)
    out, lse = model.attention_numpy(qkv, problem, tile=tile)
    if qkv.lse_shift is not None:
        lse = lse - qkv.lse_shift * np.float32(problem.scale)  # of the smoothed K, which the oracle sees
        shift = np.abs(qkv.lse_shift * problem.scale).max(initial=0)
    exact = oracle.exact_given_quantized(qkv, case.visible(), problem.scale, tile=tile)
    if qkv.lse_shift is not None:
        exact.lse_bound[...] += 2.0**-22 * shift
    assert_within(exact, out, lse)


@given(
    case=sts.cases(memory=False, distributions=("rising", "peaked", "sink")),
    recipe=st.sampled_from(sts.INTEGER_NAMES),
)
def test_moving_maximum(case: sts.Case, recipe: str) -> None:
    """The maximum rises by hundreds over the keys, or one key has all: sums of earlier tiles are carried."""
    case = case.replace(Sk=case.Sk + 900, window=None)
    qkv = intfa.quantize_qkv(*case.logical(), recipe=recipe)
    problem = case.problem(qkv.recipe)
    out, lse = model.attention_numpy(qkv, problem)
    shift = 0 if qkv.lse_shift is None else qkv.lse_shift * np.float32(problem.scale)
    exact = oracle.exact_given_quantized(qkv, case.visible(), problem.scale)
    exact.lse_bound[...] += 2.0**-22 * np.abs(shift)
    assert_within(exact, out, lse - shift)


@pytest.mark.parametrize("recipe", sts.INTEGER_NAMES)
@pytest.mark.parametrize("order", [1, -1], ids=["rising", "falling"])
@pytest.mark.parametrize("window", [None, (300, 0), (300, 40)])
def test_more_keys_than_are_held_at_once(recipe: str, order: int, window: tuple[int, int] | None) -> None:
    """Scores that rise or fall by thousands over 1,100 keys; some rows see nothing of the last keys."""
    case = sts.Case(Sq=200, Sk=1100, distribution="rising", is_causal=window is None, window=window)
    q, k, v = case.logical()
    qkv = intfa.quantize_qkv(q, k[:, :, ::order], v, recipe=recipe)
    problem = case.problem(qkv.recipe)
    out, lse = model.attention_numpy(qkv, problem)
    shift = 0 if qkv.lse_shift is None else qkv.lse_shift * np.float32(problem.scale)
    exact = oracle.exact_given_quantized(qkv, case.visible(), problem.scale)
    exact.lse_bound[...] += 2.0**-22 * np.abs(shift)
    assert_within(exact, out, lse - shift)


P_DTYPES = {"fp16": np.float16, "e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}


def algorithm_1(qkv: QuantizedQKV, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """The paper's loop over tiles for one head, line by line in float64."""
    q8, k8, v8 = (t.numbers()[0, 0].astype(np.float64) for t in (qkv.q, qkv.k, qkv.v))
    s_q, s_k, s_v = qkv.q.scale[0, 0], qkv.k.scale[0, 0], qkv.v.scale[0, 0]  # type: ignore[index]
    R = qkv.recipe.p_levels
    m, l = np.full(len(q8), -np.inf), np.zeros(len(q8))
    o = np.zeros_like(q8)
    for j in range(0, len(k8), 128):
        s = scale * s_q[:, None] * s_k[None, j : j + 128] * (q8 @ k8[j : j + 128].T)
        m_new = s.max(axis=1)
        if qkv.recipe.p_max == "running":
            m_new = np.maximum(m, m_new)
        e = R * np.exp(s - m_new[:, None])
        p = np.rint(e) if qkv.recipe.integer_p else e.astype(P_DTYPES[qkv.recipe.p_format]).astype(np.float64)
        # Against the tile's own maximum what lay before is carried to it in the same way.
        carry = np.exp(m - m_new)
        l = l * carry + (p if qkv.recipe.integer_p else e).sum(axis=1)
        o, m = o * carry[:, None] + p @ v8[j : j + 128], m_new
    return s_v * o / l[:, None], m + np.log(l / R)


# How near float32 comes to the line-by-line result: a tie of P may be rounded otherwise.
LITERAL = {
    "paper": (RECIPES["paper-int8"], 5e-4),
    "tile": (RECIPES["paper-int8"].replace(p_max="tile"), 5e-4),
    "fp16": (RECIPES["half-int8"], 3e-5),
    "e4m3": (Recipe(v_format="e4m3", p_format="e4m3", v_granularity="head", p_max="running"), 2e-3),
    "e5m2": (Recipe(v_format="e5m2", p_format="e5m2", v_granularity="head", p_max="running"), 2e-3),
}


@pytest.mark.parametrize("name", LITERAL)
@pytest.mark.parametrize("Sk", [100, 700, 2500])
def test_algorithm_1_line_by_line(name: str, Sk: int) -> None:
    """Not just within the bound, but the same P: rounded otherwise, it is several times further away."""
    case = sts.Case(H=1, Hkv=1, Sq=130, Sk=Sk, seed=Sk)
    recipe, tolerance = LITERAL[name]
    qkv = intfa.quantize_qkv(*case.logical(), recipe=recipe)
    expected, expected_lse = algorithm_1(qkv, 1 / 8)
    out, lse = model.attention_numpy(qkv, case.problem(recipe))
    assert error(out[0, 0], expected) < tolerance
    np.testing.assert_allclose(lse[0, 0], expected_lse, atol=1e-4)
    exact = oracle.exact_given_quantized(qkv, case.visible(), 1 / 8)
    assert error(exact.out[0, 0], expected) > 3 * tolerance


@given(
    case=sts.cases(
        memory=False, dtypes=("float32",), distributions=set(sts.DISTRIBUTIONS) - {"peaked", "rising"}
    ),
    recipe=st.sampled_from(sts.NAMES),
)
def test_lse_is_that_of_the_original_k(case: sts.Case, recipe: str) -> None:
    """Corrected for smoothing: against q and k as given, unquantised, within the error of their scores."""
    q, k, v = case.logical()
    _, lse = run(q, k, v, recipe, **case.mask)
    _, exact = intfa.reference_attention(q, k, v, return_lse=True, **case.mask)
    np.testing.assert_array_equal(np.isfinite(lse), np.isfinite(exact))
    seen = np.isfinite(lse)
    # |error of lse| <= largest error of a score <= |dq||k| + |q||dk|, steps relative to a token's range; the
    # preparation spreads channels, so norms of the original over-estimate where one channel dominates.
    step = {"fp16": 2e-3, "fp8-e4m3": 0.15, "fp8-e5m2": 0.3, "int4": 0.3, "k4": 0.3}.get(recipe, 0.03)
    group = case.H // case.Hkv
    smooth = RECIPES[recipe].smooth_k
    spread = k - k.mean(axis=2, keepdims=True) if smooth else k
    reach = np.linalg.norm(spread.astype(np.float64), axis=3).max(axis=2).repeat(group, axis=1)[..., None]
    size = np.linalg.norm(q.astype(np.float64), axis=3) * reach * case.problem(RECIPES[recipe]).scale
    rounding_p = 0.5 * case.Sk / 127 if recipe == "paper-int8" else 0.5 * 128 / 255
    room = (
        np.broadcast_to(step * size, lse.shape)[seen]
        + np.log1p(rounding_p)
        + 1e-4
        + 1e-5 * np.abs(exact[seen])
    )
    assert (np.abs(lse[seen] - exact[seen]) <= room).all()


@pytest.mark.parametrize("recipe", sts.NAMES)
def test_lse_on_typical_data(recipe: str) -> None:
    """Averaged over many keys the error of lse is tiny; a missing correction is about 1."""
    case = sts.Case(H=2, Hkv=1, Sq=300, Sk=700, distribution="normal", is_causal=False, seed=3)
    q, k, v = case.logical()
    k = k + np.float32(1)
    _, lse = run(q, k, v, recipe)
    _, exact = intfa.reference_attention(q, k, v, return_lse=True)
    assert np.abs(lse - exact).max() < {"fp8-e4m3": 0.3, "fp8-e5m2": 0.5, "int4": 0.2, "k4": 0.2}.get(
        recipe, 0.05
    )


# -- convexity ----------------------------------------------------------------------------


@given(case=sts.cases(memory=False), recipe=sts.any_recipe(integer=True))
def test_output_lies_between_the_visible_values(case: sts.Case, recipe: Recipe) -> None:
    """A weighted mean of the dequantised V; folded V's weights do not quite sum to 1."""
    qkv = intfa.quantize_qkv(*case.logical(), recipe=recipe)
    out, _ = model.attention_numpy(qkv, case.problem(recipe))
    v = np.repeat(qkv.v.dequantize(), case.H // case.Hkv, axis=1)
    room = 1e-5 * np.abs(v).max(initial=0)
    if recipe.folded_v:
        room = room + oracle.exact_given_quantized(qkv, case.visible(), case.problem(recipe).scale).out_bound
    for i, seen in enumerate(case.visible()):
        here = v[:, :, seen]
        if here.size:
            extra = room if np.ndim(room) == 0 else room[:, :, i]
            assert (out[:, :, i] <= here.max(axis=2) + extra).all() and (
                out[:, :, i] >= here.min(axis=2) - extra
            ).all()
        else:
            assert not out[:, :, i].any()


# -- changes that change nothing ------------------------------------------------------------


@given(case=sts.cases(empty=True), recipe=sts.any_recipe())
def test_memory_and_layout_do_not_matter(case: sts.Case, recipe: Recipe) -> None:
    """Strides, order of dimensions and their number: the same bits as contiguous (B, heads, S, D)."""
    out, lse = run(*case.arrays(), recipe, **case.call)
    expected, lse_expected = run(*case.logical(), recipe, **case.mask)
    assert out.shape == case.arrays()[0].shape and out.dtype == expected.dtype == sts.dtype(case.dtype)
    assert lse.dtype == np.float32 and lse.shape == (case.B, case.H, case.Sq)[4 - case.ndim :]
    assert_equal((case.logical_again(out), lse.reshape(case.B, case.H, case.Sq)), (expected, lse_expected))


@given(case=sts.cases(memory=False, dtypes=("float64",)), recipe=sts.any_recipe())
def test_float64_is_computed_as_float32(case: sts.Case, recipe: Recipe) -> None:
    wide = case.logical()
    narrow = [x.astype(np.float32) for x in wide]
    assert_equal(run(*wide, recipe, **case.mask), run(*narrow, recipe, **case.mask))


@given(case=sts.cases(memory=False, dtypes=("float32",)), recipe=sts.any_recipe())
def test_heads_and_batches_are_independent(case: sts.Case, recipe: Recipe) -> None:
    """Each (b, key/value head) alone gives the bits that it gives among others."""
    q, k, v = case.logical()
    out, lse = run(q, k, v, recipe, **case.mask)
    group = case.H // case.Hkv
    for b in range(case.B):
        for hk in range(case.Hkv):
            h = slice(hk * group, (hk + 1) * group)
            alone = run(
                q[b : b + 1, h], k[b : b + 1, hk : hk + 1], v[b : b + 1, hk : hk + 1], recipe, **case.mask
            )
            assert_equal(alone, (out[b : b + 1, h], lse[b : b + 1, h]))


@given(case=sts.cases(memory=False), recipe=sts.any_recipe())
def test_grouped_heads_equal_repeated_heads(case: sts.Case, recipe: Recipe) -> None:
    """Query head h uses key/value head h // (H / Hkv)."""
    qkv = intfa.quantize_qkv(*case.logical(), recipe=recipe)
    group = case.H // case.Hkv
    index = [h // group for h in range(case.H)]

    def repeated(t: intfa.QuantizedTensor) -> intfa.QuantizedTensor:
        scale = None if t.scale is None else t.scale[:, index]
        B, _, S, D = t.shape
        return intfa.QuantizedTensor(
            t.values[:, index], scale, t.format, t.granularity, (B, case.H, S, D), t.which
        )

    full = QuantizedQKV(qkv.q, repeated(qkv.k), repeated(qkv.v), recipe, qkv.lse_shift, qkv.out_dtype)
    assert_equal(
        *(intfa.attention_quantized(x, return_lse=True, backend="numpy", **case.mask) for x in (qkv, full))
    )
    if not recipe.equalize:  # whose factors come from a group's queries together
        q, k, v = case.logical()
        assert_equal(run(q, k, v, recipe, **case.mask), run(q, k[:, index], v[:, index], recipe, **case.mask))


@given(case=sts.cases(memory=False, dtypes=("float32",)), recipe=sts.any_recipe(), seed=st.integers(0, 99))
def test_order_of_queries_does_not_matter(case: sts.Case, recipe: Recipe, seed: int) -> None:
    case = case.replace(is_causal=False, window=None)
    q, k, v = case.logical()
    order = np.random.default_rng(seed).permutation(case.Sq)
    out, lse = run(q, k, v, recipe)
    again, lse_again = run(q[:, :, order], k, v, recipe)
    if recipe.integer_p and recipe.rounded_sum and recipe.q_format.startswith("int"):
        assert_equal((again, lse_again), (out[:, :, order], lse[:, :, order]))
    elif recipe.integer_p and recipe.q_format.startswith("int"):
        # Folded V's denominator is a float sum, which a BLAS may order by the row's place.
        np.testing.assert_allclose(again, out[:, :, order], rtol=1e-5)
        np.testing.assert_allclose(lse_again, lse[:, :, order], rtol=1e-5, atol=1e-5)
    else:  # so are the scores or the products, and a tie of P's rounding may fall otherwise
        np.testing.assert_allclose(lse_again, lse[:, :, order], rtol=1e-4, atol=1e-4)


@given(case=sts.cases(memory=False, dtypes=("float32",)), recipe=sts.any_recipe(), seed=st.integers(0, 99))
def test_order_of_keys_hardly_matters(case: sts.Case, recipe: Recipe, seed: int) -> None:
    """Keys and values permuted together: other tiles, so another rounding of P, but the same attention."""
    shared = recipe.k_granularity in ("group", "tile")
    recipe = recipe.replace(k_granularity="token") if shared else recipe
    case = case.replace(is_causal=False, window=None)
    q, k, v = case.logical()
    order = np.random.default_rng(seed).permutation(case.Sk)
    visible = case.visible()
    results = []
    for keys in (np.arange(case.Sk), order):
        qkv = intfa.quantize_qkv(q, k[:, :, keys], v[:, :, keys], recipe=recipe)
        out, lse = model.attention_numpy(qkv, case.problem(recipe))
        results.append((out, lse, oracle.exact_given_quantized(qkv, visible, case.problem(recipe).scale)))
    (out_a, lse_a, exact_a), (out_b, lse_b, exact_b) = results
    # The stored integers are the same, so the two exact answers agree and each result is near it.
    np.testing.assert_allclose(
        exact_a.out, exact_b.out, rtol=1e-9, atol=1e-9 * np.abs(exact_a.out).max(initial=0)
    )
    assert (np.abs(out_a - out_b) <= exact_a.out_bound + exact_b.out_bound).all()
    room = exact_a.lse_bound + exact_b.lse_bound + 1e-6 * np.abs(lse_a)
    assert (np.abs(lse_a - lse_b) <= room).all()
    if case.Sk <= 128 and recipe.p_max == "tile" and recipe.integer_p and not recipe.folded_v:
        assert error(out_a, out_b) < 1e-5  # one tile: P is the same, number for number


@given(
    case=sts.cases(
        memory=False, dtypes=("float32",), distributions=("normal", "uniform", "sink", "zero_tokens")
    ),
    recipe=st.sampled_from([n for n in sts.NAMES if n != "fp8-e5m2"]),
    power=st.sampled_from((-12, -1, 1, 5, 20)),
)
def test_scaling_v_by_a_power_of_two_scales_the_output(case: sts.Case, recipe: str, power: int) -> None:
    q, k, v = case.logical()
    out, lse = run(q, k, v, recipe, **case.mask)
    assert_equal(
        run(q, k, v * np.float32(2.0**power), recipe, **case.mask), (out * np.float32(2.0**power), lse)
    )


@given(case=sts.cases(memory=False, dtypes=("float32",)), recipe=sts.any_recipe())
def test_negative_scale_is_that_of_minus_q(case: sts.Case, recipe: Recipe) -> None:
    q, k, v = case.logical()
    if recipe.smooth_k or recipe.equalize or recipe.hadamard or recipe.q_format.startswith("int"):
        mask = {**case.mask, "scale": 0.1}
        assert_equal(run(q, k, v, recipe, **{**mask, "scale": -0.1}), run(-q, k, v, recipe, **mask))


@given(case=sts.cases(memory=False, dtypes=("float32",)), recipe=sts.any_recipe())
def test_scale_zero_is_the_mean(case: sts.Case, recipe: Recipe) -> None:
    q, k, v = case.logical()
    qkv = intfa.quantize_qkv(q, k, v, recipe=recipe)
    out, lse = intfa.attention_quantized(qkv, scale=0.0, return_lse=True, backend="numpy")
    mean = np.repeat(
        qkv.v.dequantize().astype(np.float64).mean(axis=2, keepdims=True), case.H // case.Hkv, axis=1
    )
    room = oracle.exact_given_quantized(qkv, np.ones((case.Sq, case.Sk), bool), 0.0).out_bound
    assert (np.abs(out - mean) <= room).all()
    np.testing.assert_allclose(
        lse, np.log(case.Sk), atol=0.01 if recipe.folded_v or not recipe.integer_p else 1e-5
    )


@given(case=sts.cases(memory=False), recipe=sts.any_recipe())
def test_threads_do_not_matter(case: sts.Case, recipe: Recipe) -> None:
    qkv = intfa.quantize_qkv(*case.logical(), recipe=recipe)
    problem = case.problem(recipe)
    assert_equal(
        model.attention_numpy(qkv, problem, threads=1), model.attention_numpy(qkv, problem, threads=3)
    )


@pytest.mark.parametrize("recipe", [n for n, r in RECIPES.items() if r.smooth_k])
def test_shifting_k_changes_little_under_smoothing(recipe: str) -> None:
    """A shift of 30 standard deviations: without smoothing it takes all of int8's range."""
    q, k, v = sts.Case(H=1, Hkv=1, Sq=256, Sk=512).logical()
    shift = 30 * np.random.default_rng(9).standard_normal(64).astype(np.float32)
    ref, lse_ref = intfa.reference_attention(q, k, v, return_lse=True)
    plain = error(run(q, k, v, recipe)[0], ref)
    out, lse = run(q, k + shift, v, recipe)
    assert error(out, ref) < 1.2 * plain
    np.testing.assert_allclose(lse, lse_ref + q @ shift / 8, atol=0.2 if "4" in recipe else 0.05)
    # What the shift would do otherwise:
    assert error(run(q, k + shift, v, RECIPES[recipe].replace(smooth_k=False))[0], ref) > 4 * plain


# -- masks --------------------------------------------------------------------------------


@given(case=sts.cases(empty=True))
def test_ranges_of_a_problem_are_those_of_the_mask(case: sts.Case) -> None:
    problem, visible = case.problem(RECIPES["int8"]), case.visible()
    for i0, i1 in ((0, case.Sq), (0, 1), (case.Sq // 2, case.Sq // 2 + 1), (max(case.Sq - 1, 0), case.Sq)):
        j0, j1 = problem.key_range(i0, i1) if i1 <= case.Sq and i0 < i1 else (0, 0)
        seen = np.flatnonzero(visible[i0:i1].any(axis=0))
        if seen.size:
            assert (j0, j1) == (seen[0], seen[-1] + 1)
        elif i1 <= case.Sq and i0 < i1:
            assert j0 >= j1 or not visible[i0:i1].any()


@given(case=sts.cases(dtypes=("float32", "float64"), empty=True))
def test_reference_is_the_dense_definition(case: sts.Case) -> None:
    out, lse = intfa.reference_attention(*case.arrays(), return_lse=True, **case.call)
    expected, lse_expected = oracle.dense_attention(
        *case.logical(), case.visible(), case.problem(RECIPES["fp16"]).scale
    )
    out, lse = case.logical_again(out), lse.reshape(case.B, case.H, case.Sq)
    np.testing.assert_allclose(out, expected, rtol=1e-9, atol=1e-9 * np.abs(expected).max(initial=0))
    np.testing.assert_allclose(lse, lse_expected, rtol=1e-9, atol=1e-9)


@given(case=sts.cases(memory=False), recipe=sts.any_recipe(), data=st.data())
def test_what_is_not_visible_does_not_matter(case: sts.Case, recipe: Recipe, data: st.DataObject) -> None:
    """Change every key and value that a row cannot see, not their scales: its result keeps its bits."""
    qkv = intfa.quantize_qkv(*case.logical(), recipe=recipe)
    visible = case.visible()
    i = data.draw(st.integers(0, case.Sq - 1), label="row")
    hidden = ~visible[i]
    rng = np.random.default_rng(case.seed)

    def changed(t: intfa.QuantizedTensor) -> intfa.QuantizedTensor:
        values = t.values.copy()
        other = rng.permutation(values.reshape(-1, values.shape[-1]))[: hidden.sum()]
        values[:, :, hidden] = np.resize(other, values[:, :, hidden].shape)
        return intfa.QuantizedTensor(values, t.scale, t.format, t.granularity, t.shape, t.which)

    other = QuantizedQKV(qkv.q, changed(qkv.k), changed(qkv.v), recipe, qkv.lse_shift, qkv.out_dtype)
    a, b = (intfa.attention_quantized(x, return_lse=True, backend="numpy", **case.mask) for x in (qkv, other))
    assert_equal((a[0][:, :, i], a[1][:, :, i]), (b[0][:, :, i], b[1][:, :, i]))


@given(
    seed=st.integers(0, 99),
    Sq=st.sampled_from((130, 257, 300)),
    window=st.tuples(st.integers(1, 200), st.integers(0, 200)),
    data=st.data(),
)
def test_tiles_lie_where_the_keys_are(
    seed: int, Sq: int, window: tuple[int, int], data: st.DataObject
) -> None:
    """Tiles begin at multiples of 128 keys whatever a block of queries sees: a row alone rounds P alike."""
    case = sts.Case(H=1, Hkv=1, Sq=Sq, Sk=Sq + 400, D=32, window=window, seed=seed)
    recipe = Recipe(v_granularity="head")
    made = sts.integer_arrays(recipe, case)
    out, lse = intfa.attention_quantized(
        QuantizedQKV.from_arrays(recipe=recipe, **made), window=window, return_lse=True, backend="numpy"
    )
    i = data.draw(st.integers(0, Sq - 1), label="row")
    p = i + case.Sk - Sq
    stop = min(p + window[1] + 1, case.Sk)
    # The row as the last query of keys that end where its window does.
    few = {**made, "q": made["q"][:, :, i : i + 1], "q_scale": made["q_scale"][:, :, i : i + 1]}
    few |= {n: made[n][:, :, :stop] for n in ("k", "v", "k_scale")}
    alone = intfa.attention_quantized(
        QuantizedQKV.from_arrays(recipe=recipe, **few),
        window=(window[0] + stop - 1 - p, 0),
        return_lse=True,
        backend="numpy",
    )
    np.testing.assert_allclose(alone[0][:, :, 0], out[:, :, i], atol=2e-6)
    np.testing.assert_allclose(alone[1][:, :, 0], lse[:, :, i], atol=2e-6)


@pytest.mark.parametrize("recipe", ["fp16", "half-int8"])
@given(case=sts.cases(memory=False, dtypes=("float16",), distributions=("normal", "peaked")), data=st.data())
def test_causal_rows_do_not_know_the_future(recipe: str, case: sts.Case, data: st.DataObject) -> None:
    """Recipes without statistics over the sequence, from floats on: later tokens do not change a bit."""
    case = case.replace(Sk=max(case.Sq, case.Sk), is_causal=True, window=None)
    assert RECIPES[recipe].smooth_k is RECIPES[recipe].equalize is False
    q, k, v = case.logical()
    out, lse = run(q, k, v, recipe, is_causal=True)
    i = data.draw(st.integers(0, case.Sq - 1), label="row")
    future = i + case.Sk - case.Sq + 1
    k[:, :, future:], v[:, :, future:] = 3, -3
    q[:, :, i + 1 :] = 1
    again, lse_again = run(q, k, v, recipe, is_causal=True)
    assert_equal((again[:, :, : i + 1], lse_again[:, :, : i + 1]), (out[:, :, : i + 1], lse[:, :, : i + 1]))


@given(case=sts.cases(memory=False, dtypes=("float32",)), recipe=sts.any_recipe())
def test_a_window_that_holds_everything_is_none(case: sts.Case, recipe: Recipe) -> None:
    q, k, v = case.logical()
    wide = case.Sq + case.Sk
    expected = run(q, k, v, recipe)
    for window in ((-1, -1), (wide, wide), (-1, wide), (wide, -1)):
        assert_equal(run(q, k, v, recipe, window=window), expected)
    assert_equal(run(q, k, v, recipe, window=(wide, 0)), run(q, k, v, recipe, is_causal=True))
    assert_equal(run(q, k, v, recipe, window=(3, 5), is_causal=True), run(q, k, v, recipe, window=(3, 0)))


@pytest.mark.parametrize("recipe", sts.NAMES)
def test_rows_that_see_nothing_are_zero(recipe: str) -> None:
    q, k, v = sts.Case(Sq=300, Sk=70).logical()
    out, lse = run(q, k, v, recipe, is_causal=True)
    assert not out[:, :, :230].any() and (lse[:, :, :230] == -np.inf).all()
    assert out[:, :, 230:].any(axis=3).all() and np.isfinite(lse[:, :, 230:]).all()


# -- composition --------------------------------------------------------------------------


@given(
    case=sts.cases(memory=False, masks=False, lengths=(1, 33, 128, 129, 300)),
    recipe=sts.any_recipe(integer=True), cut=st.sampled_from((1, 2)),
)  # fmt: skip
def test_parts_merged_by_lse_are_the_whole(case: sts.Case, recipe: Recipe, cut: int) -> None:
    """Keys split at a tile's edge, both parts attended to, merged with weights exp(lse)."""
    case = case.replace(Sk=case.Sk + 256)
    given_arrays = sts.integer_arrays(recipe, case)
    whole = QuantizedQKV.from_arrays(recipe=recipe, **given_arrays)

    def part(tiles: slice) -> QuantizedQKV:
        keys = slice(tiles.start * 128, None if tiles.stop is None else tiles.stop * 128)
        few = dict(given_arrays)
        for x in ("k", "v"):
            few[x] = few[x][:, :, keys]
            granularity = getattr(recipe, f"{x}_granularity")
            if granularity in ("group", "tile"):
                few[f"{x}_scale"] = few[f"{x}_scale"][:, :, tiles]
            elif granularity == "token" or (granularity == "channel" and x == "k"):
                few[f"{x}_scale"] = few[f"{x}_scale"][:, :, keys]
        return QuantizedQKV.from_arrays(recipe=recipe, **few)

    call = {"return_lse": True, "scale": case.scale, "backend": "numpy"}
    out, lse = intfa.attention_quantized(whole, **call)
    parts = [intfa.attention_quantized(part(t), **call) for t in (slice(0, cut), slice(cut, None))]
    merged_lse = np.logaddexp(parts[0][1], parts[1][1])
    merged = sum(o * np.exp(l - merged_lse)[..., None] for o, l in parts)
    if recipe.p_max == "tile":
        # Each tile keeps its own maximum, so P is the same. Folded V shifts exponents: a tie may flip.
        assert error(merged, out) < (2e-3 if recipe.folded_v else 2e-5)
        np.testing.assert_allclose(merged_lse, lse, atol=2e-5, rtol=1e-6)
    else:
        exact = oracle.exact_given_quantized(
            whole, np.ones((case.Sq, case.Sk), bool), case.problem(recipe).scale
        )
        assert (np.abs(merged - out) <= 2 * exact.out_bound).all()
        assert (np.abs(merged_lse - lse) <= 2 * exact.lse_bound).all()


@given(case=sts.cases(memory=False, dtypes=sts.DTYPES), recipe=sts.any_recipe())
def test_quantising_first_is_the_same_call(case: sts.Case, recipe: Recipe) -> None:
    q, k, v = case.logical()
    qkv = intfa.quantize_qkv(q, k, v, recipe=recipe)
    apart = intfa.attention_quantized(qkv, return_lse=True, **case.mask)
    together = run(q, k, v, recipe, **case.mask)
    assert apart[0].dtype == together[0].dtype
    assert_equal(apart, together)


@given(case=sts.cases(memory=False), recipe=st.sampled_from(sts.INTEGER_NAMES))
def test_rewrapped_integers_give_the_same_result(case: sts.Case, recipe: str) -> None:
    """What quantize_qkv holds goes through from_arrays unchanged."""
    qkv = intfa.quantize_qkv(*case.logical(), recipe=recipe)
    again = QuantizedQKV.from_arrays(
        qkv.q.numbers(), qkv.k.numbers(), qkv.v.numbers(),
        q_scale=qkv.q.scale, k_scale=qkv.k.scale, v_scale=qkv.v.scale,
        recipe=recipe, lse_shift=qkv.lse_shift, out_dtype=qkv.out_dtype,
    )  # fmt: skip
    a, b = (intfa.attention_quantized(x, return_lse=True, **case.mask) for x in (qkv, again))
    assert_equal(a, b)
