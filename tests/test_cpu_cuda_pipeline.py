"""quantize.cu and the launches of intfa_cupy/gpu on the host shim: the public functions on a fake device.

The quantisation kernels are bit-equal to the NumPy quantiser given the same statistics of a sequence, whose
sums they form in another order; the whole call is compared with the model.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import cpu_cuda
import fake_cupy
import numpy as np
import pytest
import strategies as sts
from agreement import Rounding, check_against_model, statistics_of
from hypothesis import given, settings
from hypothesis import strategies as st
from rounding import FP8, fp8_edges, unscaled

import intfa_cupy as intfa
from intfa_cupy import QuantizedQKV, QuantizedTensor, Recipe, dispatch, gpu, model, packing
from intfa_cupy.gpu import transfer
from intfa_cupy.gpu.quantizer import quantizer
from intfa_cupy.gpu.views import view
from intfa_cupy.quantize import head_statistics, quantize_numpy

pytestmark = pytest.mark.skipif(cpu_cuda.unavailable() is not None, reason=str(cpu_cuda.unavailable()))

ORDERS = ("ascending", "descending")
R = intfa.recipes()


@dataclass(frozen=True)
class Variant:
    """What the quantisation kernels are compiled for."""

    recipe: Recipe
    D: int
    dtype: str

    def __repr__(self) -> str:
        recipe = self.recipe
        if recipe.name != "custom":
            return f"{recipe.name}-{self.D}-{self.dtype}"
        steps = "".join(x[0] for x in ("smooth_k", "equalize", "hadamard") if getattr(recipe, x))
        return f"{recipe.k_granularity}-{recipe.v_granularity}-{steps}-{self.D}-{self.dtype}"


E5M2_V: dict[str, Any] = {"v_format": "e5m2", "p_format": "e5m2", "v_granularity": "none", "p_max": "running"}
# Every input type, format, granularity, preparation and kind of D: powers of two, sums of them, odd, tiny.
VARIANTS = [
    Variant(R["int8"], 64, "float16"),
    Variant(R["int8"], 80, "float32"),
    Variant(R["int8"], 1, "float32"),
    Variant(R["int8-fast"], 128, "bfloat16"),
    Variant(R["int8-fast"], 63, "float32"),
    Variant(R["paper-int8"], 33, "float16"),
    Variant(R["paper-int8"], 64, "bfloat16"),
    Variant(R["half-int8"], 96, "float32"),
    Variant(R["half-int8-plus"], 256, "float16"),
    Variant(Recipe(k_granularity="tile", v_granularity="head", smooth_k=True), 192, "float32"),
    Variant(Recipe(k_granularity="token", v_granularity="channel", equalize=True), 40, "float16"),
    Variant(Recipe(k_granularity="group", v_granularity="token", hadamard=True), 129, "bfloat16"),
    Variant(R["int4"], 64, "float16"),
    Variant(R["int4"], 80, "float32"),
    Variant(R["k4"], 128, "bfloat16"),
    Variant(R["k4"], 129, "float16"),
    Variant(R["fp16"], 64, "float16"),
    Variant(R["fp16"], 96, "float32"),
    Variant(R["fp16"], 256, "bfloat16"),
    Variant(R["fp8-e4m3"], 64, "float16"),
    Variant(R["fp8-e4m3"], 33, "float32"),
    Variant(R["fp8-e5m2"], 128, "bfloat16"),
    Variant(R["fp8-e5m2"], 17, "float32"),
    Variant(R["fp8-e4m3"].replace(smooth_k=True, equalize=True, hadamard=True), 80, "float16"),
    Variant(R["fp16"].replace(hadamard=True), 128, "float16"),
    Variant(R["fp8-e5m2"].replace(k_granularity="head"), 48, "float16"),
    Variant(Recipe(k_granularity="channel", q_format="int4", v_granularity="head"), 40, "float32"),
    Variant(Recipe(k_format="int4", q_granularity="channel", **E5M2_V), 200, "float32"),
]
# Those whose attention kernels are compiled too.
WHOLE_CALLS = [VARIANTS[i] for i in (0, 3, 5, 8, 9)]


@pytest.fixture(scope="module", autouse=True)
def build_all_kernels() -> None:
    """Compile on all cores; the tests then find the libraries in the cache."""
    cpu_cuda.build_all(
        [fake_cupy.quantizer_request(v.recipe, v.D, v.dtype) for v in VARIANTS]
        + [fake_cupy.quantizer_request(v.recipe, v.D, v.dtype, lse_shift=False) for v in WHOLE_CALLS]
        + [fake_cupy.attention_request(v.recipe, v.D, v.dtype) for v in WHOLE_CALLS]
    )


def cases_of(variant: Variant, **options: Any) -> st.SearchStrategy[sts.Case]:
    lengths = (1, 2, 31, 33, 64, 100, 127, 128, 129, 257, 300, 520)
    return sts.cases(lengths=lengths, head_dims=(variant.D,), dtypes=(variant.dtype,), max_heads=3, **options)


def quantize_both_orders(case: sts.Case, variant: Variant, inputs: sts.Arrays) -> QuantizedQKV:
    """Quantise on the stand-in device in both orders of warps; the results must agree to the bit."""
    runs = []
    for order in ORDERS:
        with fake_cupy.installed(order=order):
            arrays = [fake_cupy.strided(x) for x in inputs]
            # Not through quantize_qkv, which refuses what no attention kernel takes.
            plan = dispatch.Plan("", case.problem(variant.recipe))
            runs.append(gpu.quantize(*arrays, plan, layout=case.layout))
    first, second = ({name: x.get() for name, x in run.extra["operands"].items()} for run in runs)
    for name in first:
        assert first[name].tobytes() == second[name].tobytes(), f"{name} depends on the order of warps"
    return runs[0]


def as_numbers(t: QuantizedTensor) -> np.ndarray:
    """Stored numbers in a type in which NaN equals NaN."""
    return t.numbers().astype(np.float32)


def assert_packed_equal(got: QuantizedQKV, want: QuantizedQKV) -> None:
    """Compare what the kernels wrote with the NumPy quantiser's: integers, scales, padding, marks."""
    made = {name: x.get() for name, x in got.extra["operands"].items()}
    host = packing.to_host(got)
    marks = np.isnan(model.guard(want))
    np.testing.assert_array_equal(np.isnan(made["guard"]), marks)
    assert (np.isnan(made["guard"]) | (made["guard"] == 0)).all()
    for name in ("q", "k", "v"):
        one, other = getattr(host, name), getattr(want, name)
        sound = np.full(other.shape[:2], True) if name == "q" else ~marks
        assert one.values.dtype == other.values.dtype
        np.testing.assert_array_equal(as_numbers(one)[sound], as_numbers(other)[sound], err_msg=f"{name}")
        assert (one.scale is None) == (other.scale is None)
        if one.scale is not None:
            np.testing.assert_array_equal(one.scale[sound], other.scale[sound], err_msg=f"{name}'s scale")
    # Padding is zero: it takes part in products, or hides behind a mask only where it is finite.
    np.testing.assert_array_equal(made["q8"], packing.pack_q(host.q.numbers(), host.q.format))
    np.testing.assert_array_equal(made["k8"], packing.pack_k(host.k.numbers(), host.k.format))
    np.testing.assert_array_equal(made["v8"], packing.pack_v(host.v.numbers(), host.v.format))
    # What the kernels read beside the container is what an upload of it would bring, but for padding.
    uploaded = transfer.operands(want)
    for name in ("q_scale", "k_scale", "v_scale"):
        sound = np.full(want.q.shape[:2], True) if name == "q_scale" else ~marks
        one, other = made[name][sound], uploaded[name][sound]
        assert one.shape == other.shape
        np.testing.assert_array_equal(one[other != 0], other[other != 0], err_msg=name)
    assert np.isfinite(made["k_scale"][~marks]).all()
    if want.recipe.folded_v:
        S = want.v.shape[2]
        scale = want.v.scale[~marks]
        largest = scale.max(axis=1, keepdims=True)
        fold, other = made["v_fold"][~marks], uploaded["v_fold"][~marks]
        assert np.isfinite(fold).all()
        real = packing.pack_fold(np.ones((1, 1, 2, S), np.float32))[0, 0] != 0
        np.testing.assert_allclose(fold[:, real], other[:, real], rtol=1.2e-7)
        true = packing.pack_fold(np.stack([np.log2(scale / largest), largest / scale], axis=1)[None])[0]
        np.testing.assert_array_equal(fold[:, :, 1][:, real[:, 1]], true[:, :, 1][:, real[:, 1]])
        logs = fold[:, :, 0] - packing.FOLD_OFFSET
        np.testing.assert_allclose(logs[:, real[:, 0]], true[:, :, 0][:, real[:, 0]], rtol=2e-6, atol=2e-6)
        np.testing.assert_array_equal(
            made["v_scale"][~marks], np.broadcast_to(largest, made["v_scale"][~marks].shape)
        )


@settings(max_examples=60)
@given(data=st.data(), variant=st.sampled_from(VARIANTS))
def test_quantizer_is_bit_equal(data: st.DataObject, variant: Variant) -> None:
    """Any shape, strides and distribution: the integers and scales of the NumPy quantiser, and its layout."""
    case = data.draw(cases_of(variant, masks=False))
    q, k, v = case.logical()
    got = quantize_both_orders(case, variant, case.arrays())
    statistics = statistics_of(got)
    want = quantize_numpy(q, k, v, variant.recipe, statistics=statistics)
    assert_packed_equal(got, want)
    group = case.H // case.Hkv
    for (b, h), found in statistics.items():
        heads, key = q[b, h * group : (h + 1) * group].astype(np.float32), k[b, h].astype(np.float32)
        expected = head_statistics(heads, key, variant.recipe)
        # A sum in another order, rounded to bfloat16.
        slack = 2.0**-20 * np.abs(key).max(axis=0)
        assert (np.abs(found.mean - expected.mean) <= 2.0**-7 * np.abs(expected.mean) + slack).all()
        if np.array_equal(found.mean, expected.mean):
            np.testing.assert_allclose(found.factor, expected.factor, rtol=2.0**-7)
    if want.lse_shift is not None:
        size = np.abs(q.astype(np.float64)).max(initial=0) * max(
            np.abs(s.mean).max() for s in statistics.values()
        )
        np.testing.assert_allclose(
            packing.to_host(got).lse_shift, want.lse_shift, rtol=1e-5, atol=1e-5 * size
        )


@pytest.mark.parametrize("operand", ["q", "k", "v"])
@pytest.mark.parametrize("variant", VARIANTS, ids=repr)
def test_quantizer_marks_what_is_not_finite(variant: Variant, operand: str) -> None:
    bad = (np.nan, np.inf, -np.inf)[VARIANTS.index(variant) % 3]
    case = sts.Case(B=2, H=4, Hkv=2, Sq=150, Sk=140, D=variant.D, dtype=variant.dtype)
    q, k, v = (x.copy() for x in case.logical())
    {"q": q, "k": k, "v": v}[operand][1, 1, 131, -1] = bad
    got = quantize_both_orders(case, variant, (q, k, v))
    want = quantize_numpy(q, k, v, variant.recipe, statistics=statistics_of(got))
    assert_packed_equal(got, want)
    nan_rows = np.isnan(got.extra["operands"]["q_scale"].get()).reshape(2, 4, 150, -1).all(axis=3)
    assert nan_rows[1, 1, 131] == (operand == "q") and nan_rows.sum() == (operand == "q")


@pytest.mark.parametrize("fmt", FP8)
def test_fp8_is_rounded_as_ml_dtypes_rounds_it(fmt: str) -> None:
    """Every tie, subnormal and number out of range, to the bit."""
    x = fp8_edges(fmt)
    case = sts.Case(B=1, H=1, Hkv=1, Sq=x.shape[2], Sk=x.shape[2], D=64, dtype="float32")
    got = quantize_both_orders(case, Variant(unscaled(fmt), 64, "float32"), (x, x, x))
    want = quantize_numpy(x, x, x, unscaled(fmt))
    for name in ("q", "k", "v"):
        one, other = getattr(packing.to_host(got), name), getattr(want, name)
        np.testing.assert_array_equal(one.values.view(np.uint8), other.values.view(np.uint8), err_msg=name)


@settings(max_examples=30)
@given(data=st.data(), variant=st.sampled_from(WHOLE_CALLS))
def test_whole_call(data: st.DataObject, variant: Variant) -> None:
    """Quantise and attend through the public functions, with any shape, mask and strides."""
    case = data.draw(cases_of(variant, distributions=[d for d in sts.DISTRIBUTIONS if d != "huge"]))
    inputs = case.arrays()
    with fake_cupy.installed() as cupy:
        arrays = [fake_cupy.strided(x) for x in inputs]
        kernel = {"recipe": variant.recipe, "backend": "wmma"}
        qkv = packing.to_host(intfa.quantize_qkv(*arrays, recipe=variant.recipe, layout=case.layout))
        out, lse = intfa.attention(*arrays, **kernel, **case.call, return_lse=True)
        assert isinstance(out, cupy.ndarray) and out.shape == inputs[0].shape and out.dtype == inputs[0].dtype
        # Into the caller's memory, as strided as q.
        target = fake_cupy.strided(inputs[0], written=False)
        if case.storage != "broadcast":
            assert intfa.attention(*arrays, **kernel, **case.call, out=target) is target
            np.testing.assert_array_equal(target.get(), out.get())
        out, lse = case.logical_again(out.get()), lse.get().reshape(case.B, case.H, case.Sq)
    check_against_model(qkv, case, case.problem(variant.recipe), out, lse)


@pytest.mark.parametrize("variant", WHOLE_CALLS, ids=repr)
def test_without_lse_the_quantizer_leaves_its_shift_out(variant: Variant) -> None:
    """A quantiser of its own, with the same bits otherwise, whichever call of a plan came first."""
    case = sts.Case(H=4, Hkv=2, Sq=150, Sk=300, D=variant.D, dtype=variant.dtype)
    recipe, kernel = variant.recipe, {"recipe": variant.recipe, "backend": "wmma"}
    with fake_cupy.installed():
        arrays = [fake_cupy.asarray(x) for x in case.logical()]
        out = intfa.attention(*arrays, **kernel)
        other, lse = intfa.attention(*arrays, **kernel, return_lse=True)
        assert out.get().tobytes() == other.get().tobytes()

        plan = intfa.explain(*arrays, **kernel)
        views = [view(x, "bhsd") for x in arrays]
        lean, full = (quantizer(plan, variant.dtype, lse_shift) for lse_shift in (False, True))
        made, wanted = (
            {name: x.get() for name, x in one.arrays(one(*views)).items()} for one in (lean, full)
        )
        assert set(wanted) - set(made) == ({"lse_shift"} if recipe.smooth_k else set())
        for name in made:
            assert made[name].tobytes() == wanted[name].tobytes(), name
        # The containers have it, though the same plan serves the attention without.
        qkv = gpu.quantize(*arrays, plan)
        assert (qkv.lse_shift is not None) == recipe.smooth_k
        again, again_lse = intfa.attention_quantized(qkv, backend="wmma", return_lse=True)
    assert again.get().tobytes() == out.get().tobytes() and again_lse.get().tobytes() == lse.get().tobytes()


@pytest.mark.parametrize("variant", WHOLE_CALLS, ids=repr)
def test_host_arrays_go_through_the_device(variant: Variant) -> None:
    """NumPy in, NumPy out, with a backend asked for by name; plain quantised inputs are uploaded."""
    case = sts.Case(Sq=70, Sk=150, D=variant.D, dtype=variant.dtype, is_causal=True)
    q, k, v = case.logical()
    options = {"is_causal": True, "return_lse": True, "backend": "wmma"}
    with fake_cupy.installed():
        out, lse = intfa.attention(q, k, v, recipe=variant.recipe, **options)
        plain = quantize_numpy(q, k, v, variant.recipe)
        again, _ = intfa.attention_quantized(plain, **options)
    assert type(out) is np.ndarray and type(again) is np.ndarray and out.dtype == q.dtype
    problem = case.problem(variant.recipe)
    check_against_model(plain, case, problem, again, lse, Rounding(same_rows=0.0))
    check_against_model(plain, case, problem, out, lse, Rounding(same_rows=0.0))


@pytest.mark.parametrize(("Sq", "Sk"), [(0, 5), (5, 0), (0, 0)])
def test_empty_calls(Sq: int, Sk: int) -> None:
    variant = WHOLE_CALLS[0]
    case = sts.Case(B=2, Sq=Sq, Sk=Sk, D=variant.D, dtype=variant.dtype)
    with fake_cupy.installed():
        arrays = [fake_cupy.asarray(x) for x in case.logical()]
        out, lse = intfa.attention(*arrays, recipe=variant.recipe, return_lse=True)
        assert out.shape == (2, 2, Sq, variant.D) and not out.get().any()
        assert lse.shape == (2, 2, Sq) and np.isneginf(lse.get()).all()


@pytest.mark.parametrize("recipe", [R["int8"], R["fp16"]], ids=lambda r: r.name)
def test_without_query_heads_all_is_zero(recipe: Recipe) -> None:
    """No kernel runs, and what it would have written is not left to chance."""
    q, k = np.ones((1, 0, 5, 16), np.float16), np.ones((1, 2, 7, 16), np.float16)
    with fake_cupy.installed() as cupy:
        qkv = packing.to_host(intfa.quantize_qkv(*map(cupy.asarray, (q, k, k)), recipe=recipe))
    for t in (qkv.k, qkv.v):
        assert t.shape == k.shape and not t.numbers().any()


def test_smaller_devices_get_smaller_tiles() -> None:
    """A device with Turing's 64 KiB of shared memory takes other tiles, with the same result."""
    variant = WHOLE_CALLS[1]
    case = sts.Case(Sq=70, Sk=300, D=variant.D, dtype=variant.dtype)
    results, used = [], []
    for capability, shared_memory in ((80, 163 * 1024), (75, 64 * 1024)):
        with fake_cupy.installed(capability, shared_memory):
            arrays = [fake_cupy.asarray(x) for x in case.logical()]
            plan = intfa.explain(*arrays, recipe=variant.recipe, backend="wmma")
            used.append(plan.tile.shared_memory)
            results.append(intfa.attention(*arrays, recipe=variant.recipe, backend="wmma").get())
            assert used[-1] <= shared_memory
    assert used[0] > used[1]
    np.testing.assert_array_equal(*results)


def test_repeated_calls_are_those_that_were_asked_for() -> None:
    """What is remembered of a call serves the same call only, and its results are new arrays."""
    variant = WHOLE_CALLS[0]
    case = sts.Case(Sq=40, Sk=150, D=variant.D, dtype=variant.dtype)
    with fake_cupy.installed():
        arrays = [fake_cupy.asarray(x) for x in case.logical()]
        fixed = {"recipe": variant.recipe, "backend": "wmma"}
        qkv = intfa.quantize_qkv(*arrays, **fixed)
        other = dataclasses.replace(qkv, out_dtype="float32")
        calls: list[dict[str, Any]] = [
            {}, {"is_causal": True}, {"window": (3, 4)}, {"window": [3, 4]}, {"scale": 0.5}, {"scale": 0.25}
        ]  # fmt: skip
        first, second = ([intfa.attention_quantized(qkv, backend="wmma", **c) for c in calls] for _ in "ab")
        whole = [intfa.attention(*arrays, **fixed, **c) for c in calls for _ in "ab"]
        assert len({id(x) for x in (*first, *second, *whole)}) == 4 * len(calls)
        for i, x in enumerate(first):
            for same in (second[i], whole[2 * i], whole[2 * i + 1]):
                np.testing.assert_array_equal(x.get(), same.get())
            differs = [j for j, y in enumerate(first) if (x.get() != y.get()).any()]
            assert len(differs) == len(calls) - (2 if "window" in calls[i] else 1)
        assert intfa.attention_quantized(other, backend="wmma").dtype == np.float32
        assert intfa.attention_quantized(qkv, backend="wmma").dtype == np.float16
        renamed = variant.recipe.replace(name="renamed")
        assert intfa.quantize_qkv(*arrays, recipe=renamed, backend="wmma").recipe.name == "renamed"
        for bad in ({"scale": "1"}, {"window": (1, -2)}, {"out_dtype": "int8"}, {"backend": "none"}):
            for _ in "ab":
                with pytest.raises((TypeError, ValueError)):
                    intfa.attention_quantized(qkv, **bad)  # type: ignore[arg-type]
