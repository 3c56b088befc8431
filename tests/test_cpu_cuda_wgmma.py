"""attention_wgmma.cu itself on the host shim against the NumPy model: Hopper's products, copies and barriers.

`cpu_cuda/include/{wgmma,copy,shared_memory}.cuh` stand in for the kernel's headers of inline PTX; everything
else is the kernel. Asynchronous work is done as late as the kernel lets it be, or at once. Late, what a copy
writes holds no value until the wait for it, and what a product writes holds a wrong one.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import cpu_cuda
import host_kernels as hk
import numpy as np
import pytest
import strategies as sts
from agreement import ROUNDING, check_against_model
from hypothesis import given, settings
from hypothesis import strategies as st

import intfa_cupy as intfa
from intfa_cupy import QuantizedQKV, Recipe, tiles
from intfa_cupy.kernel_source import source_dir
from intfa_cupy.problem import Problem
from intfa_cupy.quantize import quantize_numpy
from intfa_cupy.tiles import Tile

pytestmark = pytest.mark.skipif(cpu_cuda.unavailable() is not None, reason=str(cpu_cuda.unavailable()))

R = intfa.recipes()
RUNNING = Recipe(p_max="running", k_granularity="group")
TOKENS = R["int8"].replace(k_granularity="token")


@functools.cache
def source() -> str:
    """The kernel and its own header as one text, which finds the shim's headers and not its neighbours."""
    header = "wgmma_block.cuh"
    kernel = (source_dir() / "attention_wgmma.cu").read_text()
    before, after = kernel.split(f'#include "{header}"\n')
    line = before.count("\n") + 2
    inlined = (source_dir() / header).read_text()
    return f'{before}#line 1 "{header}"\n{inlined}#line {line} "attention_wgmma.cu"\n{after}'


@dataclass(frozen=True)
class Variant:
    """One compiled kernel."""

    recipe: Recipe
    tile: Tile
    pairs: bool  # D = Dp and channels side by side, stored two at a time
    out_dtype: str

    @property
    def Dp(self) -> int:
        return self.tile.defines("float32")["DP"]

    def __repr__(self) -> str:
        r = self.recipe
        recipe = r.name if r.name != "custom" else f"{r.p_max}-{r.k_granularity}-{r.v_granularity}"
        options = "-two" * (self.tile.rows == 128 and self.Dp < 256) + "-four" * (self.tile.rows == 256)
        options += "-pairs" * self.pairs
        options += "-unmasked" * (not self.tile.masked)
        return f"{recipe}-{self.Dp}-{self.out_dtype}{options}"

    def request(self, text: str | None = None) -> dict[str, Any]:
        """Arguments of `cpu_cuda.build`."""
        request = hk.attention_request(self.tile, self.out_dtype, text or source())
        return {**request, "defines": self.tile.defines(self.out_dtype, self.pairs)}

    def problem(self, case: sts.Case) -> Problem:
        return case.problem(self.recipe, out_dtype=self.out_dtype)


def kernel_for(recipe: Recipe, Dp: int, out_dtype: str, options: str = "") -> Variant:
    """The kernel of three warpgroups, two at Dp = 256, or of as many as the options say."""
    rows = {"two": 128, "four": 256}
    wanted = next((rows[o] for o in options.split() if o in rows), 128 if Dp == 256 else 192)
    found = [t for t in tiles.variants("wgmma", recipe, "sm_90a") if t.defines(out_dtype)["DP"] == Dp]
    (tile,) = [t for t in found if t.rows == wanted]
    tile = dataclasses.replace(tile, masked="unmasked" not in options)
    return Variant(recipe, tile, "pairs" in options, out_dtype)


VARIANTS = (
    kernel_for(R["int8-fast"], 64, "float16"),
    kernel_for(R["int8-fast"], 64, "float16", "two"),
    kernel_for(R["int8-fast"], 64, "bfloat16", "four pairs unmasked"),
    kernel_for(R["int8-fast"], 64, "float32", "four unmasked"),
    kernel_for(R["int8-fast"], 128, "bfloat16", "pairs unmasked"),
    kernel_for(R["int8-fast"], 256, "float32", "pairs"),
    kernel_for(R["int8"], 64, "bfloat16"),
    kernel_for(R["int8"], 128, "float32", "pairs"),
    kernel_for(R["int8"], 256, "float16", "pairs unmasked"),
    kernel_for(TOKENS, 128, "float16"),
    kernel_for(R["paper-int8"], 64, "float32"),
    kernel_for(RUNNING, 128, "float16"),
    kernel_for(RUNNING, 64, "float32", "unmasked"),
    kernel_for(Recipe(p_max="running", v_granularity="token"), 64, "float16", "pairs"),
    kernel_for(Recipe(v_granularity="head", p_levels=127), 128, "bfloat16"),
)
#: Those that take any problem.
ANY = tuple(v for v in VARIANTS if v.tile.masked and not v.pairs)

#: One of those in which V has barriers of its own.
APART = kernel_for(R["int8-fast"], 256, "float16")
#: Calls to take out of a kernel, after which it must fail under some schedule.
WAITS = (
    (ANY[0], "barrier_wait(map.key_empty"),
    (ANY[0], "wgmma_wait<0>(product"),
    (ANY[0], "wgmma_wait<1>(s"),
    (APART, "barrier_wait(map.key_empty"),
    (APART, "barrier_wait(map.value_empty"),
    (APART, "barrier_wait(map.value_full"),
)


def without(variant: Variant, call: str) -> dict[str, Any]:
    """Arguments of `cpu_cuda.build` for a kernel without a call."""
    mutant = re.sub(rf"(?<=[ )]){re.escape(call)}.*?;", ";", source())
    assert mutant != source(), f"the kernel has no {call}"
    return variant.request(mutant)


@pytest.fixture(scope="module", autouse=True)
def build_all_kernels() -> None:
    """Compile on all cores; the tests then find the libraries in the cache."""
    kernels = [v.request() for v in (*VARIANTS, APART)]
    cpu_cuda.build_all([*kernels, *(without(*wait) for wait in WAITS)])


@functools.cache
def module_of(variant: Variant) -> cpu_cuda.Module:
    return cpu_cuda.build(**variant.request())


def run(
    qkv: QuantizedQKV,
    problem: Problem,
    variant: Variant,
    order: Any = "ascending",
    asynchronous: str = "late",
    module: cpu_cuda.Module | None = None,
    **options: Any,
) -> tuple[np.ndarray, np.ndarray]:
    """Launch the kernel. Of barriers in shared memory the shim's search for races knows nothing."""
    out, lse = hk.attention(
        hk.packed_operands(qkv), problem, variant.tile, order, module=module or module_of(variant),
        check_races=False, asynchronous=asynchronous, **options,
    )  # fmt: skip
    assert lse is not None
    return out, lse


def check_on_schedules(
    qkv: QuantizedQKV, case: sts.Case, variant: Variant, seeds: Iterable[int] = (1,), **options: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Run the kernel on one block and, to the same bits, on more in other orders; compare with the model."""
    problem = variant.problem(case)
    runs = [run(qkv, problem, variant, blocks=1, **options)]
    for seed in seeds:
        asynchronous = ("late", "early")[seed % 2]
        runs.append(run(qkv, problem, variant, seed, asynchronous, blocks=2 + seed % 2, **options))
    for other in runs[1:]:
        for one, two in zip(runs[0], other, strict=True):
            assert one.tobytes() == two.tobytes(), "the result depends on the order of threads or on the grid"
    check_against_model(qkv, case, problem, *runs[0], ROUNDING["wgmma"])
    return runs[0]


@pytest.mark.parametrize("variant", VARIANTS, ids=repr)
@settings(max_examples=2)
@given(data=st.data())
def test_attention_wgmma(variant: Variant, data: st.DataObject) -> None:
    """Any shape, mask, distribution and place of the output, so far as the kernel was compiled for it."""
    masked = variant.tile.masked
    lengths = (1, 15, 63, 65, 129, 193)[: 5 if variant.Dp == 256 else 6] if masked else (1, 64, 129)
    case = data.draw(sts.kernel_cases(variant.Dp, lengths, masked=masked, plain=variant.pairs))
    case = case.replace(scale=data.draw(st.sampled_from((case.scale, -0.2, 0.0))))
    strides = {
        "bhsd": None,
        "bshd": (case.Sq * case.H * case.D, case.D, case.H * case.D, 1),
        "apart": (case.H * case.Sq * case.D * 3 + 1, case.Sq * case.D * 3, -case.D * 3, 3),
    }
    layout = data.draw(st.sampled_from(("bhsd", "bshd") if variant.pairs else tuple(strides)))
    qkv = quantize_numpy(*case.logical(), variant.recipe)
    seed = data.draw(st.integers(1, 1000))
    check_on_schedules(qkv, case, variant, [seed], out_strides=strides[layout])


@pytest.mark.parametrize("Sk", [100, 300])
@pytest.mark.parametrize("variant", ANY[:4], ids=repr)
def test_a_block_takes_many_items(variant: Variant, Sk: int) -> None:
    """Buffers, records and the ring come round again, with items of one tile and of several."""
    case = sts.Case(B=2, H=2, Hkv=1, Sq=140, Sk=Sk, D=variant.Dp - 24, window=(150, 10))
    check_on_schedules(quantize_numpy(*case.logical(), variant.recipe), case, variant, (2, 3))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("variant", [v for v in ANY if v.Dp < 256 and v.recipe in R.values()], ids=repr)
def test_the_grid_changes_no_bit(variant: Variant, is_causal: bool) -> None:
    """What is left after whole rounds is dealt in items of one to three groups of 64 rows, by the grid."""
    case = sts.Case(B=1, H=3, Hkv=1, Sq=5 * 64 - 9, Sk=300, D=variant.Dp - 24, is_causal=is_causal)
    qkv = quantize_numpy(*case.logical(), variant.recipe)
    problem = variant.problem(case)
    runs = [run(qkv, problem, variant, 2, "late", blocks=blocks) for blocks in (1, 2, 5, 9, 15)]
    for other in runs[1:]:
        for one, two in zip(runs[0], other, strict=True):
            assert one.tobytes() == two.tobytes()
    check_against_model(qkv, case, problem, *runs[0], ROUNDING["wgmma"])


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v.Dp == 256 and v.tile.masked], ids=repr)
def test_a_stage_is_not_read_once_given_back(variant: Variant) -> None:
    """Schedules under which the next scales of K arrived before a new item's rows had read their own."""
    case = sts.Case(B=1, H=2, Hkv=1, Sq=129, Sk=129, D=256)
    check_on_schedules(quantize_numpy(*case.logical(), variant.recipe), case, variant, (2, 4, 6))


@pytest.mark.parametrize("variant", ANY, ids=repr)
def test_rows_that_see_nothing(variant: Variant) -> None:
    """More queries than keys under a causal mask: whole blocks of rows see no key, before ones that do."""
    case = sts.Case(B=1, H=1, Hkv=1, Sq=270, Sk=33, D=variant.Dp - 24, is_causal=True)
    qkv = quantize_numpy(*case.logical(), variant.recipe)
    out, lse = check_on_schedules(qkv, case, variant)
    assert np.isneginf(lse[0, 0, :237]).all() and not out[0, 0, :237].any()


@pytest.mark.parametrize("scale", [-0.3, 0.0])
@pytest.mark.parametrize("variant", ANY, ids=repr)
def test_scores_of_the_other_sign_or_none(variant: Variant, scale: float) -> None:
    """A negative softmax scale turns the order of the scores; with 0 the mask must still hide keys."""
    case = sts.Case(B=1, H=2, Hkv=1, Sq=70, Sk=200, D=variant.Dp - 24, scale=scale, is_causal=True)
    check_on_schedules(quantize_numpy(*case.logical(), variant.recipe), case, variant)


@pytest.mark.parametrize("variant", ANY, ids=repr)
def test_reference_moves(variant: Variant) -> None:
    """Tiles whose maximum rises by far more than 60 binary orders make O and l change their reference."""
    case = sts.Case(B=1, H=1, Hkv=1, Sq=33, Sk=4 * 128, D=variant.Dp, is_causal=True)
    q, k, v = case.logical()
    q[..., 0] = 10
    k[..., 0] = np.repeat([0, 100, 80, 300], 128)  # up, down, up again, each step far beyond the slack
    recipe = variant.recipe.replace(smooth_k=False, equalize=False, hadamard=False)
    check_on_schedules(quantize_numpy(q, k, v, recipe), case, variant)


@pytest.mark.parametrize("variant", ANY, ids=repr)
def test_exponents_below_zero(variant: Variant) -> None:
    """The maximum of a row is far below zero, where floats order unlike integers."""
    case = sts.Case(B=1, H=1, Hkv=1, Sq=33, Sk=3 * 128, D=variant.Dp)
    q, k, v = case.logical()
    q[..., 0] = 10
    k[..., 0] = -100
    recipe = variant.recipe.replace(smooth_k=False, equalize=False, hadamard=False)
    check_on_schedules(quantize_numpy(q, k, v, recipe), case, variant)


@pytest.mark.parametrize("operand", ["q", "k", "v"])
@pytest.mark.parametrize("variant", ANY, ids=repr)
def test_poison_spreads_as_far_as_stated(variant: Variant, operand: str) -> None:
    """A bad query poisons its row, a bad key or value all rows of the heads that use it, visible or not."""
    case = sts.Case(B=2, H=2, Hkv=1, Sq=20, Sk=140, D=variant.Dp - 24, is_causal=True)
    q, k, v = case.logical()
    {"q": q, "k": k, "v": v}[operand][1, 0, 7, 3] = np.inf if operand == "k" else np.nan
    qkv = quantize_numpy(q, k, v, variant.recipe)
    out, lse = run(qkv, variant.problem(case), variant, blocks=2)
    expected = np.zeros((2, 2, 20), bool)
    expected[(1, 0, 7) if operand == "q" else 1] = True
    assert np.array_equal(np.isnan(out), np.broadcast_to(expected[..., None], out.shape))
    assert np.array_equal(np.isnan(lse), expected)


@pytest.mark.parametrize("variant", ANY, ids=repr)
def test_scores_beyond_their_floats_give_nan_and_nothing_else(variant: Variant) -> None:
    """With scores so large that one key takes all, a row is its value, until its sum is lost: then NaN."""
    case = sts.Case(B=1, H=1, Hkv=1, Sq=20, Sk=260, D=variant.Dp - 24)
    q, k, v = sts.one_key_takes_all(case, 200)
    qkv = quantize_numpy(q, k, v, variant.recipe.replace(smooth_k=False, equalize=False, hadamard=False))
    for exponent, all_lost in (
        (3, False),
        (5, False),
        (6, None),
        (7, None),
        (8, None),
        (12, True),
        (36, True),
    ):
        scaled = case.replace(scale=10.0**exponent)
        out, lse = run(qkv, variant.problem(scaled), variant)
        lost = np.isnan(lse)
        assert np.array_equal(np.isnan(out), np.broadcast_to(lost[..., None], out.shape))
        assert all_lost is None or (lost == all_lost).all()
        value, score = v[0, 0, 200], 100 * 10.0**exponent
        assert np.abs(out.astype(np.float32)[~lost] - value).max(initial=0) < 0.05
        assert np.abs(lse[~lost] - score).max(initial=0) < 0.02 * score


def test_far_strided_output() -> None:
    """Offsets beyond 2**31 elements, channels apart, rows backwards; what lies between stays untouched."""
    variant = ANY[0]
    case = sts.Case(B=2, H=2, Hkv=1, Sq=20, Sk=40, D=17)
    qkv = quantize_numpy(*case.logical(), variant.recipe)
    plain = run(qkv, variant.problem(case), variant)
    for strides in ((2**33, 2**32 + 4, 100, 3), (2**32, 2**31 + 1, -33, 2)):
        far = run(qkv, variant.problem(case), variant, "descending", out_strides=strides)
        np.testing.assert_array_equal(far[0], plain[0])
        np.testing.assert_array_equal(far[1], plain[1])


def test_without_lse() -> None:
    variant = ANY[0]
    case = sts.Case(Sq=20, Sk=140, D=17)
    qkv = quantize_numpy(*case.logical(), variant.recipe)
    operands, problem = hk.packed_operands(qkv), variant.problem(case)
    module = module_of(variant)
    out, none = hk.attention(
        operands, problem, variant.tile, return_lse=False, module=module, check_races=False
    )
    assert none is None
    np.testing.assert_array_equal(out, run(qkv, problem, variant)[0])


@pytest.mark.parametrize(("variant", "call"), WAITS, ids=str)
def test_every_wait_is_needed_and_missed(variant: Variant, call: str) -> None:
    """The shim and these schedules would notice."""
    module = cpu_cuda.build(**without(variant, call))
    case = sts.Case(B=1, H=2, Hkv=1, Sq=140, Sk=1200, D=16 if variant is ANY[0] else 130)
    qkv = quantize_numpy(*case.logical(), variant.recipe)
    problem = variant.problem(case)
    expected = run(qkv, problem, variant)
    for order, asynchronous in itertools.product(("ascending", 1, 2, 3), ("late", "early")):
        try:
            found = run(qkv, problem, variant, order, asynchronous, module)
        except cpu_cuda.KernelError:
            return
        if found[0].tobytes() != expected[0].tobytes():
            return
    pytest.fail("nothing is wrong")
