"""attention_mma.cu itself on the host shim against the NumPy model, tensor cores and all.

`cpu_cuda/include/{mma,copy,shared_memory}.cuh` stand in for the kernel's headers of inline PTX; everything
else is the kernel. The shim reports races, uninitialised reads and accesses out of bounds. Copies of whole
tiles are done as late as the kernel lets them be, or at once.
"""

from __future__ import annotations

import dataclasses
import functools
import re
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
from intfa_cupy import Recipe, tiles
from intfa_cupy.kernel_source import source_dir
from intfa_cupy.quantize import quantize_numpy
from intfa_cupy.tiles import Tile

pytestmark = pytest.mark.skipif(cpu_cuda.unavailable() is not None, reason=str(cpu_cuda.unavailable()))

R = intfa.recipes()
RUNNING_FOLDED = Recipe(p_max="running", v_granularity="token", p_levels=100)
RECIPES = (
    *(recipe for name, recipe in R.items() if name != "half-int8-plus"),
    Recipe(k_granularity="tile", v_granularity="head", p_levels=127),
    RUNNING_FOLDED,
    Recipe(q_format="int4", k_granularity="channel", v_granularity="head"),
    Recipe(k_format="int4", k_granularity="token"),
)


@dataclass(frozen=True)
class Variant:
    """One compiled kernel."""

    recipe: Recipe
    Dp: int
    tile: Tile
    bulk: bool  # copies of whole tiles by one thread
    pairs: bool
    out_dtype: str

    def __repr__(self) -> str:
        name = (
            self.recipe.name
            if self.recipe.name != "custom"
            else f"{self.recipe.k_granularity}-{self.recipe.k_format}"
        )
        return f"{name}-{self.Dp}{'-bulk' * self.bulk}{'-unmasked' * (not self.tile.masked)}"

    def request(self) -> dict[str, Any]:
        """Arguments of `cpu_cuda.build`. Source given as text finds the shim's mma.cuh, not its neighbour."""
        text = (source_dir() / f"{self.tile.entry}.cu").read_text()
        # Without bulk copies the kernel is as on sm_80, which has no instruction that rounds to bytes either.
        text = f"#define CPU_CUDA_BULK\n{text}" if self.bulk else re.sub(r"\bkRoundsBytes\b", "false", text)
        request = hk.attention_request(self.tile, self.out_dtype, text)
        return {**request, "defines": self.tile.defines(self.out_dtype, self.pairs)}


@functools.cache
def variants() -> list[Variant]:
    """The tiles of every recipe, the ways of copying and of masking taking turns."""
    found = []
    for i, recipe in enumerate(RECIPES):
        for j, tile in enumerate(tiles.variants("mma", recipe, "sm_90")):
            Dp = tile.defines("float32")["INTFA_DP"]
            if Dp == 256 and i % 3:
                continue
            masked = (i + j) % 3 > 0
            found.append(
                Variant(
                    recipe, Dp, dataclasses.replace(tile, masked=masked), (i + j) % 2 == 0,
                    not masked, ("float32", "float16", "bfloat16")[i % 3],
                )
            )  # fmt: skip
    return found


@pytest.fixture(scope="module", autouse=True)
def build_all_kernels() -> None:
    """Compile on all cores; the tests then find the libraries in the cache."""
    cpu_cuda.build_all(v.request() for v in variants())


class _Module:
    """A module whose launches do not look for races: of barriers in shared memory the shim knows nothing."""

    def __init__(self, module: cpu_cuda.Module) -> None:
        self.module = module

    def launch(self, *args: Any, **options: Any) -> int:
        return self.module.launch(*args, check_races=False, **options)


@functools.cache
def module_of(variant: Variant) -> Any:
    built = cpu_cuda.build(**variant.request())
    return _Module(built) if variant.bulk else built


@pytest.mark.parametrize("variant", variants(), ids=repr)
@settings(max_examples=4)
@given(data=st.data())
def test_attention_mma(variant: Variant, data: st.DataObject) -> None:
    """Any shape, mask and distribution; where the kernel was compiled for unmasked problems, those."""
    masked = variant.tile.masked
    lengths = (1, 15, 33, 64, 65, 127, 128, 129, 257) if masked else (1, 33, 64, 128, 256)
    case = data.draw(sts.kernel_cases(variant.Dp, lengths, masked=masked, plain=not masked))
    problem = case.problem(variant.recipe, out_dtype=variant.out_dtype)
    qkv = quantize_numpy(*case.logical(), variant.recipe)
    operands = hk.packed_operands(qkv)
    runs = [
        hk.attention(
            operands, problem, variant.tile, order, module=module_of(variant), asynchronous=asynchronous
        )
        for order, asynchronous in (("ascending", "late"), ("descending", "early"))
    ]
    for one, other in zip(runs[0], runs[-1], strict=True):
        assert one is not None and other is not None
        assert one.tobytes() == other.tobytes(), "the result depends on the order of warps"
    out, lse = runs[0]
    assert lse is not None
    check_against_model(qkv, case, problem, out, lse, ROUNDING["mma"])


@pytest.mark.parametrize(("Dp", "buffers"), [(64, 2), (64, 1), (256, 1)])
def test_no_buffer_is_filled_before_all_warps_have_left_it(Dp: int, buffers: int) -> None:
    """More tiles than buffers, copied whole and at once, while the shim holds up some of the warps."""
    tile = next(
        t
        for t in tiles.variants("mma", R["int8-fast"], "sm_90")
        if (t.defines("float32")["INTFA_DP"], t.defines("float32")["INTFA_BUFFERS"]) == (Dp, buffers)
    )
    variant = Variant(R["int8-fast"], Dp, tile, bulk=True, pairs=False, out_dtype="float32")
    case = sts.Case(B=1, H=1, Hkv=1, Sq=64, Sk=5 * 128, D=Dp)
    problem = case.problem(variant.recipe, out_dtype=variant.out_dtype)
    qkv = quantize_numpy(*case.logical(), variant.recipe)
    operands = hk.packed_operands(qkv)
    for order in ("descending", 1, 2, 3, 4):
        out, lse = hk.attention(
            operands, problem, variant.tile, order, module=module_of(variant), asynchronous="early"
        )
        assert lse is not None
        check_against_model(qkv, case, problem, out, lse, ROUNDING["mma"])


@pytest.mark.parametrize("name", ["int8-fast", "fp16"])
def test_rows_that_see_nothing(name: str) -> None:
    """More queries than keys under a causal mask: whole blocks of rows see no key."""
    variant = next(v for v in variants() if v.recipe == R[name] and v.Dp == 64)
    variant = dataclasses.replace(variant, tile=dataclasses.replace(variant.tile, masked=True), bulk=False)
    case = sts.Case(B=1, H=1, Hkv=1, Sq=150, Sk=33, D=64, is_causal=True)
    problem = case.problem(variant.recipe, out_dtype=variant.out_dtype)
    qkv = quantize_numpy(*case.logical(), variant.recipe)
    module = cpu_cuda.build(**variant.request())
    out, lse = hk.attention(hk.packed_operands(qkv), problem, variant.tile, module=module)
    assert lse is not None and np.isneginf(lse[0, 0, :117]).all() and not out[0, 0, :117].any()
    check_against_model(qkv, case, problem, out, lse, ROUNDING["mma"])


@pytest.mark.parametrize("distribution", ["normal", "rising"])
@pytest.mark.parametrize(
    "recipe", [R["int8"], R["int8-fast"], R["paper-int8"], RUNNING_FOLDED], ids=lambda r: r.name
)
def test_sums_follow_the_reference(recipe: Recipe, distribution: str) -> None:
    """Whether it moves little or far: O, which holds 128 sums of P too many, and the sums go with it."""
    variant = next(v for v in variants() if v.recipe == recipe and v.Dp == 64 and v.tile.masked)
    case = sts.Case(B=1, H=1, Hkv=1, Sq=20, Sk=3 * 128 + 5, D=64, distribution=distribution)
    problem = case.problem(recipe, out_dtype=variant.out_dtype)
    qkv = quantize_numpy(*case.logical(), recipe)
    out, lse = hk.attention(hk.packed_operands(qkv), problem, variant.tile, module=module_of(variant))
    assert lse is not None
    check_against_model(qkv, case, problem, out, lse, ROUNDING["mma"])


#: One recipe for each way to exponents: tile's and running maximum, one scale for several keys, for each key
#: and for groups of channels, V folded or not, floating scores and probabilities.
EXPONENTS = ("int8", "int8-fast", "paper-int8", "half-int8", "int4", "fp16", "fp8-e4m3", "fp8-e5m2")


@pytest.mark.parametrize("name", EXPONENTS)
def test_huge_scores_give_right_rows_or_nan(name: str) -> None:
    """With scores so large that one key takes all, a row is its value, or NaN; never anything else."""
    recipe = R[name].replace(smooth_k=False, equalize=False, hadamard=False)
    variant = next(v for v in variants() if v.recipe == R[name] and v.Dp == 64 and v.tile.masked)
    case = sts.Case(B=1, H=1, Hkv=1, Sq=16, Sk=150, D=40)
    q, k, v = sts.one_key_takes_all(case, 140)
    qkv = quantize_numpy(q, k, v, recipe)
    operands = hk.packed_operands(qkv)
    right = []
    for exponent in (0, 4, 6, 7, 9, 38):
        scaled = case.replace(scale=10.0**exponent)
        problem = scaled.problem(recipe, out_dtype=variant.out_dtype)
        out, lse = hk.attention(operands, problem, variant.tile, module=module_of(variant))
        assert lse is not None
        lost = np.isnan(lse)
        assert np.array_equal(np.isnan(out), np.broadcast_to(lost[..., None], out.shape))
        value, score = v[0, 0, 140].astype(np.float32), 100 * 10.0**exponent
        tolerance = 0.05 if recipe.v_format in ("int8", "fp16") else 0.3
        assert np.abs(out.astype(np.float32)[~lost] - value).max(initial=0) < tolerance, exponent
        assert np.abs(lse[~lost].astype(np.float64) - score).max(initial=0) < 0.25 * score, exponent
        right.append(not lost.any())
    assert right[:2] == [True, True] and not right[-1]
