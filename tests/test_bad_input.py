"""Every refusal names the argument, what came and what is allowed; numbers that are not finite stay so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import strategies as sts

import intfa_cupy as intfa
from intfa_cupy import QuantizedQKV


def x(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(dtype)


def good(**changes: Any) -> dict[str, Any]:
    """A call that works, with some arguments replaced."""
    return {"q": x(1, 4, 5, 8), "k": x(1, 2, 6, 8), "v": x(1, 2, 6, 8), **changes}


DTYPES = "float16, bfloat16, float32, float64"

# What is changed, the exception, and every part that its message must have.
SHARED: list[tuple[dict[str, Any], type[Exception], list[str]]] = [
    ({"q": x(8)}, ValueError, ["q must have 2, 3 or 4 dimensions", "(8,)"]),
    ({"q": x(1, 1, 4, 5, 8)}, ValueError, ["q must have 2, 3 or 4 dimensions", "(1, 1, 4, 5, 8)"]),
    ({"k": x(2, 6, 8)}, ValueError, ["k must have 4 dimensions as q has", "(2, 6, 8)", "(1, 4, 5, 8)"]),
    ({"v": x(6, 8)}, ValueError, ["v must have 4 dimensions as q has", "(6, 8)"]),
    ({"k": x(2, 2, 6, 8)}, ValueError, ["k must have q's batch size 1", "got 2", "(2, 2, 6, 8)"]),
    ({"v": x(2, 2, 6, 8)}, ValueError, ["v must have q's batch size 1", "got 2"]),
    ({"k": x(1, 2, 6, 9)}, ValueError, ["k must have q's head dimension D = 8", "got 9", "(1, 2, 6, 9)"]),
    ({"v": x(1, 2, 6, 7)}, ValueError, ["v must have q's head dimension D = 8", "got 7"]),
    ({"v": x(1, 2, 7, 8)}, ValueError, ["v must have k's length Sk = 6", "got 7", "(1, 2, 7, 8)"]),
    ({"v": x(1, 1, 6, 8)}, ValueError, ["v must have k's number of heads 2", "got 1"]),
    ({"q": x(1, 3, 5, 8)}, ValueError, ["q's number of heads must be a multiple of k's", "H = 3", "Hkv = 2"]),
    ({"k": x(1, 0, 6, 8), "v": x(1, 0, 6, 8)}, ValueError, ["multiple of k's", "H = 4", "Hkv = 0"]),
    ({n: x(1, 2, 6, 0) for n in "qkv"}, ValueError, ["head dimension D must be in 1..256", "got 0"]),
    ({n: x(1, 2, 6, 257) for n in "qkv"}, ValueError, ["head dimension D must be in 1..256", "got 257"]),
    ({"q": [[1.0, 2.0]]}, TypeError, ["q must be a NumPy, CuPy, torch or JAX array", "got list"]),
    ({"k": None}, TypeError, ["k must be a NumPy, CuPy, torch or JAX array", "got NoneType"]),
    ({"q": x(1, 4, 5, 8).astype(np.int8)}, TypeError, ["q must have a dtype of", DTYPES, "got int8"]),
    ({"k": x(1, 2, 6, 8).astype(np.int64)}, TypeError, ["k must have a dtype of", DTYPES, "got int64"]),
    ({"v": x(1, 2, 6, 8).astype(np.complex64)}, TypeError, ["v must have a dtype of", "got complex64"]),
    ({"q": x(1, 4, 5, 8) > 0}, TypeError, ["q must have a dtype of", "got bool"]),
    ({"q": x(1, 4, 5, 8, dtype=ml_dtypes.float8_e4m3fn)}, TypeError, ["q must have a dtype", "float8"]),
    ({"layout": "bsdh"}, ValueError, ["layout must be one of 'bhsd', 'bshd'", "got 'bsdh'"]),
    ({"layout": None}, ValueError, ["layout must be one of", "got None"]),
]  # fmt: skip
MASKS: list[tuple[dict[str, Any], type[Exception], list[str]]] = [
    ({"window": (-2, 0)}, ValueError, ["window parts must be -1 (unbounded) or at least 0", "(-2, 0)"]),
    ({"window": (0, -5)}, ValueError, ["window parts must be -1", "(0, -5)"]),
    ({"window": 3}, TypeError, ["window must be None or a pair (left, right) of ints", "got 3"]),
    ({"window": (1, 2, 3)}, TypeError, ["window must be None or a pair", "(1, 2, 3)"]),
    ({"window": (1.5, 2)}, TypeError, ["window must be a pair of ints", "(1.5, 2)"]),
    ({"window": "ab"}, TypeError, ["window must be None or a pair", "'ab'"]),
    ({"scale": np.nan}, ValueError, ["scale must be finite", "nan"]),
    ({"scale": np.inf}, ValueError, ["scale must be finite", "inf"]),
    ({"scale": 1e39}, ValueError, ["scale must be finite in float32", "1e+39"]),
    ({"scale": -3e38}, ValueError, ["scale must be finite in float32", "-3e+38"]),
    ({"scale": "0.5"}, TypeError, ["scale must be a real number or None", "'0.5'"]),
    ({"scale": 1j}, TypeError, ["scale must be a real number or None", "1j"]),
]
SAME_DTYPE: list[tuple[dict[str, Any], type[Exception], list[str]]] = [
    ({"k": x(1, 2, 6, 8, dtype=np.float16)}, TypeError, ["k must have q's dtype float32", "got float16"]),
    ({"v": x(1, 2, 6, 8, dtype=np.float64)}, TypeError, ["v must have q's dtype float32", "got float64"]),
]
RECIPES: list[tuple[dict[str, Any], type[Exception], list[str]]] = [
    ({"recipe": "int9"}, ValueError, ["recipe must be one of", "'int8-fast'", "or a Recipe", "got 'int9'"]),
    ({"recipe": 8}, TypeError, ["recipe must be a name or a Recipe", "got int"]),
    (
        {"backend": "cuda"},
        ValueError,
        ["backend must be 'auto' or one of", "'wgmma'", "'numpy'", "got 'cuda'"],
    ),
    ({"backend": None}, ValueError, ["backend must be 'auto' or one of", "got None"]),
]
OUT: list[tuple[dict[str, Any], type[Exception], list[str]]] = [
    ({"out": x(1, 4, 5, 9)}, ValueError, ["out must have q's shape (1, 4, 5, 8)", "got (1, 4, 5, 9)"]),
    ({"out": x(1, 4, 5, 8, dtype=np.float16)}, TypeError, ["out must have q's dtype float32", "got float16"]),
    ({"out": [0]}, TypeError, ["out must be a numpy array as q is", "got list"]),
    (
        {"out": np.broadcast_to(np.float32(0), (1, 4, 5, 8))},
        ValueError,
        ["out must be writeable", "read-only"],
    ),
]


def check(
    function: Callable[..., Any], changes: dict[str, Any], kind: type[Exception], parts: list[str]
) -> None:
    with pytest.raises(kind) as caught:
        function(**good(**changes))
    message = str(caught.value)
    for part in parts:
        assert part in message, f"{part!r} is not in {message!r}"


def names(rows: list[Any]) -> list[str]:
    return [" ".join(f"{k}={getattr(v, 'shape', v)}" for k, v in row[0].items()) for row in rows]


ATTENTION = SHARED + MASKS + SAME_DTYPE + RECIPES + OUT
EXPLAIN = SHARED + MASKS + SAME_DTYPE + RECIPES
QUANTIZE = SHARED + SAME_DTYPE + RECIPES
REFERENCE = SHARED + MASKS


@pytest.mark.parametrize(("changes", "kind", "parts"), ATTENTION, ids=names(ATTENTION))
def test_attention_refuses(changes: dict[str, Any], kind: type[Exception], parts: list[str]) -> None:
    check(intfa.attention, changes, kind, parts)


@pytest.mark.parametrize(("changes", "kind", "parts"), EXPLAIN, ids=names(EXPLAIN))
def test_explain_refuses(changes: dict[str, Any], kind: type[Exception], parts: list[str]) -> None:
    check(intfa.explain, changes, kind, parts)


@pytest.mark.parametrize(("changes", "kind", "parts"), QUANTIZE, ids=names(QUANTIZE))
def test_quantize_refuses(changes: dict[str, Any], kind: type[Exception], parts: list[str]) -> None:
    check(intfa.quantize_qkv, changes, kind, parts)


@pytest.mark.parametrize(("changes", "kind", "parts"), REFERENCE, ids=names(REFERENCE))
def test_reference_refuses(changes: dict[str, Any], kind: type[Exception], parts: list[str]) -> None:
    check(intfa.reference_attention, changes, kind, parts)


def test_what_is_refused_leaves_out_alone() -> None:
    out = np.full((1, 4, 5, 8), 7, np.float32)
    with pytest.raises(ValueError, match="scale"):
        intfa.attention(**good(out=out, scale=np.nan))
    assert (out == 7).all()


@pytest.mark.parametrize("backend", ["wgmma", "mma", "wmma"])
def test_a_backend_that_cannot_serve_says_why(backend: str) -> None:
    status = intfa.backends()[backend]
    if status.available:
        pytest.skip("this machine has it")
    for function in (intfa.attention, intfa.quantize_qkv, intfa.explain):
        with pytest.raises(intfa.UnsupportedError) as caught:
            function(**good(backend=backend))
        message = str(caught.value)
        assert f"{backend}: {status.reason}" in message and "backend='numpy'" in message
        assert isinstance(caught.value, ValueError)


# -- attention_quantized and from_arrays ------------------------------------------------------


def arrays(recipe: str = "paper-int8", **changes: Any) -> dict[str, Any]:
    """Arguments of from_arrays that work, with some replaced."""
    case = sts.Case(B=1, H=4, Hkv=2, Sq=5, Sk=200, D=40)
    chosen = intfa.recipes().get(recipe, intfa.recipes()["paper-int8"])
    return {**sts.integer_arrays(chosen, case), "recipe": recipe, **changes}


def ints(*shape: int, high: int = 127) -> np.ndarray:
    return np.random.default_rng(0).integers(-high, high + 1, shape).astype(np.int8)


def lowest(*shape: int) -> np.ndarray:
    """Integers the last of which has no negative in int8."""
    x = ints(*shape)
    x[..., -1, -1] = -128
    return x


def ones(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


FROM_ARRAYS: list[tuple[dict[str, Any], type[Exception], list[str]]] = [
    ({"q": [1]}, TypeError, ["q must be a NumPy array", "got list"]),
    ({"k": None}, TypeError, ["k must be a NumPy array", "got NoneType"]),
    ({"q": ones(1, 4, 5, 40)}, TypeError, ["q must be int8 for format 'int8'", "got float32"]),
    ({"v": ints(1, 2, 200, 40).astype(np.uint8)}, TypeError, ["v must be int8 for", "got uint8"]),
    ({"q": lowest(1, 4, 5, 40)}, ValueError, ["q must hold INT8 values in -127..127, got -128"]),
    ({"k": lowest(1, 2, 200, 40)}, ValueError, ["k must hold INT8 values in -127..127, got -128"]),
    ({"v": lowest(1, 2, 200, 40)}, ValueError, ["v must hold INT8 values in -127..127, got -128"]),
    ({"k": ints(1, 2, 200, 41)}, ValueError, ["k must have q's head dimension D = 40", "got 41"]),
    ({"v": ints(1, 2, 201, 40)}, ValueError, ["v must have k's length Sk = 200", "got 201"]),
    ({"q": ints(4, 5, 40), "k": ints(2, 200, 40), "v": ints(2, 200, 40)}, ValueError,
     ["q must have 4 dimensions (B, H, Sq, D)", "(4, 5, 40)"]),
    ({"q_scale": ones(1, 4, 6)}, ValueError, ["q_scale must have shape (1, 4, 5)", "got (1, 4, 6)"]),
    ({"k_scale": ones(1, 2)}, ValueError, ["k_scale must have shape (1, 2, 200)", "got (1, 2)"]),
    ({"v_scale": ones(1, 2, 40)}, ValueError, ["v_scale must have shape (1, 2)", "got (1, 2, 40)"]),
    ({"v_scale": None}, ValueError, ["v_scale must be an array of shape (1, 2)"]),
    ({"q_scale": np.ones((1, 4, 5), int)}, TypeError, ["q_scale must be floating", "got int64"]),
    ({"q_scale": 0 * ones(1, 4, 5)}, ValueError, ["q_scale must be finite and positive"]),
    ({"q_scale": -ones(1, 4, 5)}, ValueError, ["q_scale must be finite and positive"]),
    ({"k_scale": np.inf * ones(1, 2, 200)}, ValueError, ["k_scale must be finite and positive"]),
    ({"v_scale": np.nan * ones(1, 2)}, ValueError, ["v_scale must be finite and positive"]),
    ({"v_scale": 1e300 * np.ones((1, 2))}, ValueError, ["v_scale must be finite and positive"]),
    ({"lse_shift": ones(1, 4, 6)}, ValueError, ["lse_shift must have shape (1, 4, 5)", "got (1, 4, 6)"]),
    ({"recipe": "nonsense"}, ValueError, ["recipe must be one of", "got 'nonsense'"]),
    ({"out_dtype": "int8"}, ValueError, ["out_dtype must be one of", DTYPES, "got 'int8'"]),
    ({"out_dtype": "half precision"}, ValueError, ["out_dtype must be one of", "got 'half precision'"]),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "kind", "parts"), FROM_ARRAYS, ids=names(FROM_ARRAYS))
def test_from_arrays_refuses(changes: dict[str, Any], kind: type[Exception], parts: list[str]) -> None:
    with pytest.raises(kind) as caught:
        QuantizedQKV.from_arrays(**arrays(**changes))
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("recipe", "changes", "parts"),
    [
        (
            "int8-fast",
            {"k_scale": ones(1, 2, 200)},
            ["k_scale must have shape (1, 2, 2, 4)", "got (1, 2, 200)"],
        ),
        ("int8-fast", {"v_scale": ones(1, 2)}, ["v_scale must have shape (1, 2, 40)", "got (1, 2)"]),
        ("int8", {"v_scale": ones(1, 2)}, ["v_scale must have shape (1, 2, 200)", "got (1, 2)"]),
        ("int4", {"k_scale": ones(1, 2, 200)}, ["k_scale must have shape (1, 2, 200, 2)", "got (1, 2, 200)"]),
        ("int4", {"q": ints(1, 4, 5, 40, high=9)}, ["q must hold INT4 values in -8..7", "-9..9"]),
        ("k4", {"k": ints(1, 2, 200, 40)}, ["k must hold INT4 values in -8..7", "-127..127"]),
    ],
)
def test_from_arrays_refuses_by_recipe(recipe: str, changes: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        QuantizedQKV.from_arrays(**arrays(recipe, **changes))
    for part in parts:
        assert part in str(caught.value)


def test_from_arrays_refuses_scales_where_there_are_none() -> None:
    values = x(1, 1, 4, 8, dtype=ml_dtypes.float8_e5m2)
    scales = {"q_scale": None, "k_scale": None, "v_scale": None}
    assert QuantizedQKV.from_arrays(values, values, values, recipe="fp8-e5m2", **scales).q.scale is None
    with pytest.raises(ValueError, match="k_scale must be None"):
        QuantizedQKV.from_arrays(
            values, values, values, recipe="fp8-e5m2", **{**scales, "k_scale": ones(1, 1)}
        )


@pytest.mark.parametrize(("changes", "kind", "parts"), MASKS, ids=names(MASKS))
def test_attention_quantized_refuses(
    changes: dict[str, Any], kind: type[Exception], parts: list[str]
) -> None:
    with pytest.raises(kind) as caught:
        intfa.attention_quantized(QuantizedQKV.from_arrays(**arrays()), **changes)
    for part in parts:
        assert part in str(caught.value)


def test_attention_quantized_refuses_what_is_not_quantised() -> None:
    with pytest.raises(TypeError, match="qkv must be a QuantizedQKV, got ndarray"):
        intfa.attention_quantized(x(1, 1, 2, 8))
    for bad in ("int8", "complex64", np.int32):
        with pytest.raises(
            ValueError, match="out_dtype must be one of float16, bfloat16, float32, float64; got"
        ):
            intfa.attention_quantized(QuantizedQKV.from_arrays(**arrays()), out_dtype=bad)
    with pytest.raises(ValueError, match="backend must be 'auto' or one of"):
        intfa.attention_quantized(QuantizedQKV.from_arrays(**arrays()), backend="gpu")


# -- recipes ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"q_format": "int16"}, ["q_format must be one of 'int8', 'int4'", "got 'int16'"]),
        ({"k_format": ["int8"]}, ["k_format must be one of", "got ['int8']"]),
        ({"v_format": "int4"}, ["v_format must be one of 'int8', 'fp16'", "got 'int4'"]),
        ({"p_format": "int4"}, ["p_format must be one of", "got 'int4'"]),
        ({"q_format": "fp16"}, ["q_format and Recipe.k_format must both be integers", "'fp16' and 'int8'"]),
        ({"q_format": "e4m3", "k_format": "e5m2"}, ["same floating format", "'e4m3' and 'e5m2'"]),
        ({"p_format": "fp16"}, ["p_format must be 'uint8' or 'int8' exactly when v_format is 'int8'"]),
        ({"v_format": "fp16"}, ["p_format must be 'uint8' or 'int8' exactly when", "p_format='uint8'"]),
        ({"v_format": "fp16", "p_format": "e4m3"}, ["p_format must equal v_format", "'e4m3' and 'fp16'"]),
        ({"q_granularity": "tile"}, ["q_granularity must be one of 'token', 'channel'", "got 'tile'"]),
        ({"k_granularity": "head"}, ["k_granularity must be one of", "for k_format='int8'", "got 'head'"]),
        ({"k_format": "int4", "k_granularity": "group"}, ["'token', 'channel' for k_format='int4'"]),
        ({"v_granularity": "none"}, ["v_granularity must be one of 'token', 'channel', 'head'", "'none'"]),
        ({"p_levels": 256}, ["p_levels must be in 1..255 for p_format='uint8'", "got 256"]),
        ({"p_levels": 0}, ["p_levels must be in 1..255", "got 0"]),
        ({"p_format": "int8"}, ["p_levels must be in 1..127 for p_format='int8'", "got 255"]),
        ({"p_levels": 127.0}, ["p_levels must be an int", "got 127.0"]),
        ({"p_levels": True}, ["p_levels must be an int", "got True"]),
        ({"p_max": "global"}, ["p_max must be one of 'tile', 'running'", "got 'global'"]),
        ({"smooth_k": 1}, ["smooth_k must be True or False", "got 1"]),
        ({"hadamard": None}, ["hadamard must be True or False", "got None"]),
        ({"name": ""}, ["name must be a non-empty string", "got ''"]),
    ],
)  # fmt: skip
def test_recipe_refuses(fields: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        intfa.Recipe(**fields)
    for part in ["Recipe.", *parts]:
        assert part in str(caught.value)
    with pytest.raises(ValueError, match="Recipe"):
        intfa.Recipe().replace(**fields)


def test_error_report_refuses() -> None:
    with pytest.raises(ValueError, match=r"out must have ref's shape \(3,\), got \(2,\)"):
        intfa.error_report(np.zeros(2), np.zeros(3))
    with pytest.raises(ValueError, match=r"out must have at least one element, got shape \(0,\)"):
        intfa.error_report(np.zeros(0), np.zeros(0))


# -- empty ----------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", sts.NAMES)
@pytest.mark.parametrize("causal", [False, True])
def test_empty_lengths(recipe: str, causal: bool) -> None:
    for function in (lambda *a, **kw: intfa.attention(*a, recipe=recipe, **kw), intfa.reference_attention):
        options = {"is_causal": causal, "return_lse": True}
        out, lse = function(x(2, 4, 0, 8), x(2, 2, 6, 8), x(2, 2, 6, 8), **options)
        assert out.shape == (2, 4, 0, 8) and lse.shape == (2, 4, 0)
        out, lse = function(x(2, 4, 5, 8), x(2, 2, 0, 8), x(2, 2, 0, 8), **options)
        assert out.shape == (2, 4, 5, 8) and not out.any() and (lse == -np.inf).all()
        out, lse = function(x(0, 4, 5, 8), x(0, 2, 6, 8), x(0, 2, 6, 8), **options)
        assert out.shape == (0, 4, 5, 8) and lse.shape == (0, 4, 5)
        for Hkv in (0, 2):
            out, lse = function(x(2, 0, 5, 8), x(2, Hkv, 6, 8), x(2, Hkv, 6, 8), **options)
            assert out.shape == (2, 0, 5, 8) and lse.shape == (2, 0, 5)


# -- not finite -------------------------------------------------------------------------------

BAD = [np.nan, np.inf, -np.inf]


@pytest.mark.parametrize("recipe", sts.NAMES)
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_bad_query_poisons_its_row_alone(recipe: str, bad: float, dtype: str) -> None:
    q, k, v = (x(1, 2, 140, 64).astype(dtype) for _ in "qkv")
    q[0, 1, 5] = 0
    clean, clean_lse = intfa.attention(q, k, v, recipe=recipe, return_lse=True)
    q[0, 1, 5, 3] = bad
    out, lse = intfa.attention(q, k, v, recipe=recipe, return_lse=True)
    assert np.isnan(out[0, 1, 5]).all() and np.isnan(lse[0, 1, 5])
    others = np.ones((1, 2, 140), bool)
    others[0, 1, 5] = False
    np.testing.assert_array_equal(out[others], clean[others])
    np.testing.assert_array_equal(lse[others], clean_lse[others])


@pytest.mark.parametrize("recipe", sts.NAMES)
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("where", ["k", "v"])
@pytest.mark.parametrize("causal", [False, True])
def test_a_bad_key_or_value_poisons_every_row_of_its_head(
    recipe: str, bad: float, where: str, causal: bool
) -> None:
    """All rows, those that could not see it too, as the docstring says; other heads keep their bits."""
    arguments = {"q": x(2, 4, 150, 64), "k": x(2, 2, 300, 64), "v": x(2, 2, 300, 64)}
    clean, clean_lse = intfa.attention(**arguments, recipe=recipe, is_causal=causal, return_lse=True)
    arguments[where][1, 0, 299, 7] = bad
    out, lse = intfa.attention(**arguments, recipe=recipe, is_causal=causal, return_lse=True)
    assert np.isnan(out[1, :2]).all() and np.isnan(lse[1, :2]).all()
    others = np.ones((2, 4), bool)
    others[1, :2] = False
    np.testing.assert_array_equal(out[others], clean[others])
    np.testing.assert_array_equal(lse[others], clean_lse[others])


@pytest.mark.parametrize("recipe", sts.NAMES)
def test_float64_beyond_float32_counts_as_not_finite(recipe: str) -> None:
    for where in "qkv":
        arguments = good(**{n: x(1, 1, 6, 8).astype(np.float64) for n in "qkv"}, recipe=recipe)
        arguments[where][0, 0, 2, 1] = 1e300
        out = intfa.attention(**arguments)
        assert np.isnan(out[0, 0, 2] if where == "q" else out).all()
        if where == "q":
            assert np.isfinite(np.delete(out, 2, axis=2)).all()


@pytest.mark.parametrize("recipe", sts.NAMES)
def test_scores_beyond_float32_are_not_finite_garbage(recipe: str) -> None:
    big = np.float32(1e25) * x(1, 1, 40, 64)
    out = intfa.attention(big, big, x(1, 1, 40, 64), recipe=recipe)
    if recipe != "fp8-e5m2":  # which saturates what it stores
        assert np.isnan(out).any()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("recipe", sts.NAMES)
def test_nothing_warns(recipe: str) -> None:
    """Neither ordinary calls nor NaN, rows without keys or saturating floats."""
    for name in ("normal", "huge", "tiny", "zero_tokens", "rising"):
        q, k, v = sts.Case(Sq=140, Sk=70, distribution=name, dtype="float16").logical()
        intfa.attention(q, k, v, recipe=recipe, is_causal=True, return_lse=True)
    v[0, 0, 0, 0] = q[0, 0, 0, 0] = np.inf
    intfa.attention(q, k, v, recipe=recipe, return_lse=True)
    intfa.reference_attention(q, k, v, return_lse=True)
