"""The CUDA sources themselves, unmodified, on the host shim against the NumPy model.

Every example runs with warps in ascending and in descending order; the shim also reports races, reads past
the end or of memory never written, and undefined behaviour, so that a run that returns has passed those.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from dataclasses import dataclass
from typing import Any

import cpu_cuda
import host_kernels as hk
import numpy as np
import pytest
import strategies as sts
from agreement import EPS, Rounding, check_against_model
from hypothesis import given, settings
from hypothesis import strategies as st

import intfa_cupy as intfa
from intfa_cupy import QuantizedQKV, Recipe, tiles
from intfa_cupy.problem import Problem
from intfa_cupy.quantize import quantize_numpy
from intfa_cupy.quantized import scale_shape
from intfa_cupy.tiles import Tile

pytestmark = pytest.mark.skipif(cpu_cuda.unavailable() is not None, reason=str(cpu_cuda.unavailable()))

ORDERS = ("ascending", "descending")


@dataclass(frozen=True)
class Variant:
    """One compiled kernel."""

    recipe: Recipe
    Dp: int
    tile: Tile
    out_dtype: str

    def __repr__(self) -> str:
        options = "".join(str(self.tile.defines(self.out_dtype)[f"INTFA_{name}"]) for name in OPTIONS)
        recipe = self.recipe.name if self.recipe.name != "custom" else self.recipe.k_granularity
        return f"{recipe}-{self.Dp}-{self.tile.rows}rows-{options}-{self.out_dtype}"

    def problem(self, case: sts.Case) -> Problem:
        return case.problem(self.recipe, out_dtype=self.out_dtype)


OPTIONS = ("BUFFERS", "QUERY_IN_REGISTERS", "KEEP_SCORES")
R = intfa.recipes()
RECIPES = (
    R["int8"],
    R["int8-fast"],
    R["paper-int8"],
    R["half-int8"],
    Recipe(k_granularity="tile", v_granularity="head", p_levels=127),
    Recipe(p_max="running", v_granularity="token"),
)


def _variants() -> list[Variant]:
    """Every tile of the first recipe, and for the others one tile for each width of D, taking turns."""
    chosen: list[tuple[Recipe, int, Tile]] = []
    for i, recipe in enumerate(RECIPES):
        by_width: dict[int, list[Tile]] = {}
        for tile in tiles.variants("wmma", recipe, "sm_90"):
            by_width.setdefault(dict(tile.macros)["INTFA_DP"], []).append(tile)
        for Dp, options in by_width.items():
            chosen += [(recipe, Dp, t) for t in (options if i == 0 else [options[i % len(options)]])]
    dtypes = itertools.cycle(("float32", "float16", "float32", "bfloat16"))
    return [Variant(recipe, Dp, tile, next(dtypes)) for recipe, Dp, tile in chosen]


VARIANTS = _variants()


def first(**wanted: Any) -> Variant:
    """The first variant of some recipe and width."""
    return next(v for v in VARIANTS if all(getattr(v, name) == x for name, x in wanted.items()))


@pytest.fixture(scope="module", autouse=True)
def build_all_kernels() -> None:
    """Compile on all cores; the tests then find the libraries in the cache."""
    cpu_cuda.build_all(hk.attention_request(v.tile, v.out_dtype) for v in VARIANTS)


def run_both_orders(
    qkv: QuantizedQKV, problem: Problem, variant: Variant, **options: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Run the kernel once in each order of warps; the results must agree to the bit."""
    operands = hk.packed_operands(qkv)
    runs = [hk.attention(operands, problem, variant.tile, order, **options) for order in ORDERS]
    for one, other in zip(*runs, strict=True):
        assert one.tobytes() == other.tobytes(), "the result depends on the order of warps"
    return runs[0]  # type: ignore[return-value]


@settings(max_examples=60)
@given(data=st.data(), variant=st.sampled_from(VARIANTS))
def test_attention_wmma(data: st.DataObject, variant: Variant) -> None:
    """Any shape, mask and distribution."""
    case = data.draw(
        sts.kernel_cases(
            variant.Dp, (1, 2, 15, 16, 17, 33, 64, 65, 100, 127, 128, 129, 160, 257, 300), max_heads=3
        )
    )
    qkv = quantize_numpy(*case.logical(), variant.recipe)
    out, lse = run_both_orders(qkv, variant.problem(case), variant)
    check_against_model(qkv, case, variant.problem(case), out, lse)


@pytest.mark.parametrize("variant", VARIANTS, ids=repr)
def test_scores_are_exact_integers(variant: Variant) -> None:
    """Each row sees one key, so that its log-sum-exp is one score: the int32 product can be read off."""
    case = sts.Case(B=1, H=2, Hkv=1, Sq=140, Sk=140, D=variant.Dp, window=(0, 0), scale=1.0)
    rng = np.random.default_rng(3)
    q, k, v = (rng.integers(-127, 128, (1, heads, 140, case.D)) for heads in (2, 1, 1))
    qkv = with_integers(variant.recipe, q, k, v)
    out, lse = run_both_orders(qkv, variant.problem(case), variant)
    expected = np.einsum("bhid,bgid->bhi", q, k)
    np.testing.assert_array_equal(np.rint(lse.astype(np.float64) * 2.0**10), expected)
    # The only probability is 1: out is V's row, but for R / R.
    assert_close(out, np.broadcast_to(v * 2.0**-5, out.shape), variant)


@pytest.mark.parametrize("value", [127, -127, None], ids=["largest", "smallest", "random"])
@pytest.mark.parametrize("variant", VARIANTS, ids=repr)
def test_weighted_values_are_exact_integers(variant: Variant, value: int | None) -> None:
    """All scores are equal, so that every P is R: O is R times an integer sum, at the ends of int8 too."""
    Sk = 2 * 128 + 5
    case = sts.Case(B=1, H=2, Hkv=2, Sq=17, Sk=Sk, D=variant.Dp)
    rng = np.random.default_rng(4)
    k = rng.integers(-127, 128, (1, 2, Sk, case.D))
    v = rng.integers(-127, 128, k.shape) if value is None else np.full(k.shape, value)
    qkv = with_integers(variant.recipe, np.zeros((1, 2, 17, case.D)), k, v)
    out, _ = run_both_orders(qkv, variant.problem(case), variant)
    # The sum is exact in float32; a reciprocal, two products and the output's dtype round after it.
    assert_close(out, v.sum(axis=2, keepdims=True) / Sk * 2.0**-5, variant)


def assert_close(out: np.ndarray, expected: np.ndarray, variant: Variant) -> None:
    error = np.abs(out.astype(np.float64) - expected)
    assert (error <= np.abs(expected) * (2.0**-22 + EPS[variant.out_dtype])).all()


def with_integers(recipe: Recipe, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> QuantizedQKV:
    """Q, K and V of the given integers, under scales of 1/32."""
    v_dtype = np.float16 if recipe.v_format == "fp16" else np.int8
    shapes = {
        "q_scale": scale_shape(recipe.q_granularity, *q.shape),
        "k_scale": scale_shape(recipe.k_granularity, *k.shape),
        "v_scale": scale_shape(recipe.v_granularity, *k.shape, of_v=True),
    }
    scales = {name: np.full(shape, 2.0**-5, np.float32) for name, shape in shapes.items()}
    integers = (q.astype(np.int8), k.astype(np.int8), v.astype(v_dtype))
    return QuantizedQKV.from_arrays(*integers, **scales, recipe=recipe)


def test_far_strided_output() -> None:
    """Offsets beyond 2**31 elements, channels apart, rows backwards; what lies between stays untouched."""
    variant = first(Dp=64)
    case = sts.Case(B=2, H=2, Hkv=1, Sq=20, Sk=40, D=16)
    qkv = quantize_numpy(*case.logical(), variant.recipe)
    plain = run_both_orders(qkv, variant.problem(case), variant)
    for strides in ((2**33, 2**32 + 4, 100, 3), (2**32, 2**31 + 1, -33, 2)):
        far = run_both_orders(qkv, variant.problem(case), variant, out_strides=strides)
        np.testing.assert_array_equal(far[0], plain[0])
        np.testing.assert_array_equal(far[1], plain[1])


def test_without_lse() -> None:
    variant = first(Dp=64)
    case = sts.Case(Sq=20, Sk=140, D=16)
    qkv = quantize_numpy(*case.logical(), variant.recipe)
    operands, problem = hk.packed_operands(qkv), variant.problem(case)
    out, none = hk.attention(operands, problem, variant.tile, return_lse=False)
    assert none is None
    np.testing.assert_array_equal(out, hk.attention(operands, problem, variant.tile)[0])


@pytest.mark.parametrize("operand", ["q", "k", "v"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("recipe", RECIPES[:4], ids=lambda r: r.name)
def test_poison_spreads_as_far_as_stated(recipe: Recipe, operand: str, bad: float) -> None:
    """A bad query poisons its row, a bad key or value all rows of the heads that use it, visible or not."""
    variant = first(recipe=recipe, Dp=64)
    case = sts.Case(B=2, H=4, Hkv=2, Sq=20, Sk=140, D=16, is_causal=True)
    q, k, v = case.logical()
    {"q": q, "k": k, "v": v}[operand][1, 1, 7, 3] = bad
    out, lse = run_both_orders(quantize_numpy(q, k, v, recipe), variant.problem(case), variant)
    expected = np.zeros((2, 4, 20), bool)
    expected[(1, 1, 7) if operand == "q" else (1, slice(2, 4))] = True
    assert np.array_equal(np.isnan(out), np.broadcast_to(expected[..., None], out.shape))
    assert np.array_equal(np.isnan(lse), expected)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v.recipe.p_max == "tile"], ids=repr)
def test_reference_moves(variant: Variant) -> None:
    """Tiles whose maximum rises by far more than 60 binary orders make O and l change their reference."""
    recipe = variant.recipe.replace(smooth_k=False, equalize=False, hadamard=False)
    case = sts.Case(B=1, H=1, Hkv=1, Sq=33, Sk=4 * 128, D=variant.Dp, is_causal=True)
    q, k, v = case.logical()
    q[..., 0] = 10
    k[..., 0] = np.repeat([0, 100, 80, 300], 128)  # up, down, up again, each step far beyond the slack
    qkv = quantize_numpy(q, k, v, recipe)
    out, lse = run_both_orders(qkv, variant.problem(case), variant)
    # Exponents of hundreds have few bits left after the point, so that many a P is at a tie.
    check_against_model(qkv, case, variant.problem(case), out, lse, Rounding(same_rows=0.0))


def test_results_do_not_depend_on_the_tile() -> None:
    """How the work is divided changes no bit of the result."""
    same = [v for v in VARIANTS if v.recipe == R["int8"] and v.Dp == 256]
    case = sts.Case(B=1, H=2, Hkv=1, Sq=70, Sk=260, D=140, is_causal=True)
    qkv = quantize_numpy(*case.logical(), R["int8"])
    problem = case.problem(R["int8"], out_dtype="float32")
    results = [run_both_orders(qkv, problem, variant) for variant in same]
    assert len(results) > 1
    for out, lse in results[1:]:
        np.testing.assert_array_equal(out, results[0][0])
        np.testing.assert_array_equal(lse, results[0][1])


def test_outputs_are_rounded_once() -> None:
    """float16 and bfloat16 outputs are the float32 one, rounded."""
    variant = first(recipe=R["int8-fast"], Dp=64)
    case = sts.Case(Sq=40, Sk=140, D=16)
    qkv = quantize_numpy(*case.logical(), variant.recipe)
    results = {
        name: run_both_orders(qkv, case.problem(variant.recipe, out_dtype=name), variant)[0]
        for name in tiles.OUTPUTS
    }
    for name in ("float16", "bfloat16"):
        np.testing.assert_array_equal(results[name], results["float32"].astype(sts.dtype(name)))


def test_every_barrier_is_needed_and_missed() -> None:
    """Take each __syncthreads out of the source in turn: the shim must object to what is left."""
    variant = next(v for v in VARIANTS if v.Dp == 64 and dict(v.tile.macros)["INTFA_BUFFERS"] == 1)
    case = sts.Case(B=1, H=1, Hkv=1, Sq=100, Sk=400, D=variant.Dp)
    qkv = quantize_numpy(*case.logical(), variant.recipe)
    operands, problem = hk.packed_operands(qkv), variant.problem(case)
    source = (hk.source_dir() / "attention_wmma.cu").read_text()
    barriers = list(re.finditer(r"__syncthreads\(\)", source))
    assert barriers
    mutants = [source[: b.start()] + "static_cast<void>(0)" + source[b.end() :] for b in barriers]
    modules = cpu_cuda.build_all(hk.attention_request(variant.tile, variant.out_dtype, m) for m in mutants)
    for module, order in itertools.product(modules, ORDERS):
        with pytest.raises(cpu_cuda.KernelError):
            hk.attention(operands, problem, variant.tile, order, module=module)


def test_memory_is_used_to_its_end_and_no_further() -> None:
    """With any operand one element short, or shared memory 16 bytes, the kernel leaves its bounds."""
    variant = first(recipe=R["int8"], Dp=64)
    case = sts.Case(B=1, H=1, Hkv=1, Sq=variant.tile.rows, Sk=256, D=variant.Dp)
    qkv = quantize_numpy(*case.logical(), variant.recipe)
    operands, problem = hk.packed_operands(qkv), variant.problem(case)
    hk.attention(operands, problem, variant.tile)
    for name, values in operands.items():
        short = {**operands, name: np.ascontiguousarray(values).reshape(-1)[:-1]}
        with pytest.raises(cpu_cuda.OutOfBoundsError, match=f"buffer `{name}`"):
            hk.attention(short, problem, variant.tile)
    less = dataclasses.replace(variant.tile, shared_memory=variant.tile.shared_memory - 16)
    module = cpu_cuda.build(**hk.attention_request(variant.tile, variant.out_dtype))
    with pytest.raises(cpu_cuda.OutOfBoundsError, match="dynamic shared memory"):
        hk.attention(operands, problem, less, module=module)
