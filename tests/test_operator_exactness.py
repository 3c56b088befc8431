"""Both products of the NumPy model are those of int8 x int8 -> int32, to the last bit."""

from __future__ import annotations

import numpy as np
import pytest
import strategies as sts
from hypothesis import given
from hypothesis import strategies as st

import intfa_cupy as intfa
from intfa_cupy import model
from intfa_cupy.problem import MAX_HEAD_DIM
from intfa_cupy.quantized import CHANNEL_GROUP, TILE

FLOAT32_EXACT = 2**24
#: Of the integers that a container takes.
LOWEST = -127


def head(k: np.ndarray, v: np.ndarray, k_scale: np.ndarray | None = None) -> model._KeyValueHead:
    """A key/value head whose scales are all 1."""
    scale = np.ones(len(k), np.float32) if k_scale is None else k_scale
    k, v = k.astype(np.float32), v.astype(np.float32)
    return model._KeyValueHead(k, scale, v, np.float32(1), None, None, np.float32(0))  # type: ignore[arg-type]


def accumulate(x: np.ndarray, v: np.ndarray, recipe: str) -> tuple[np.ndarray, np.ndarray]:
    """Add one tile of exponents to an empty state; return O and the P that entered it."""
    seen = []
    original = model._round_p

    def spy(e: np.ndarray, p_format: str) -> np.ndarray:
        seen.append(original(e, p_format).copy())
        return seen[-1].copy()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "_round_p", spy)
        rows = v[:1].astype(np.int8)
        qkv = intfa.QuantizedQKV.from_arrays(
            *(rows[None, None],) * 3,
            q_scale=np.ones((1, 1, 1)), k_scale=np.ones((1, 1, 1)), v_scale=np.ones((1, 1)), recipe=recipe,
        )  # fmt: skip
        state = model._Accumulator(len(x), v.shape[1], qkv, TILE)
        state.add(x.astype(np.float32).copy(), head(v, v), 0)
    return state.o, seen[0][:, 0, : len(v)]


@given(
    seed=st.integers(0, 2**16),
    D=st.sampled_from(sts.HEAD_DIMS),
    rows=st.integers(1, 140),
    keys=st.sampled_from((1, 7, 128, 129, 500)),
    low=st.sampled_from((LOWEST, -1, 126)),
)
def test_scores_are_the_int32_ones(seed: int, D: int, rows: int, keys: int, low: int) -> None:
    rng = np.random.default_rng(seed)
    q, k = rng.integers(low, 128, (rows, D)), rng.integers(low, 128, (keys, D))
    x = model._exponents(q.astype(np.float32), np.ones(rows, np.float32), head(k, k), 0, keys)
    np.testing.assert_array_equal(x.astype(np.int64), q @ k.T)


@given(seed=st.integers(0, 2**16), D=st.sampled_from(sts.HEAD_DIMS))
def test_scores_of_channel_groups_are_sums_of_int32_ones(seed: int, D: int) -> None:
    rng = np.random.default_rng(seed)
    q, k = rng.integers(-7, 8, (40, D)), rng.integers(-7, 8, (50, D))
    groups = -(-D // CHANNEL_GROUP)
    # Powers of two keep the weighted sum exact too, so that a wrong group or scale shows.
    q_scale = np.exp2(rng.integers(-2, 3, (40, groups))).astype(np.float32)
    k_scale = np.exp2(rng.integers(-2, 3, (50, groups))).astype(np.float32)
    x = model._exponents(q.astype(np.float32), q_scale, head(k, k, k_scale), 0, 50)
    wide = [
        s.repeat(CHANNEL_GROUP, axis=1)[:, :D]
        for s in (q_scale.astype(np.float64), k_scale.astype(np.float64))
    ]
    np.testing.assert_array_equal(x, (q * wide[0]) @ (k * wide[1]).T)


@given(
    seed=st.integers(0, 2**16),
    D=st.sampled_from(sts.HEAD_DIMS),
    keys=st.sampled_from((1, 31, 127, 128)),
    recipe=st.sampled_from(("int8-like", "paper-int8")),
)
def test_weighted_values_are_the_int32_ones(seed: int, D: int, keys: int, recipe: str) -> None:
    rng = np.random.default_rng(seed)
    v = rng.integers(LOWEST, 128, (keys, D))
    x = rng.standard_normal((64, keys)) * rng.choice([0.01, 3, 30])
    o, p = accumulate(x, v, recipe if recipe in intfa.recipes() else tile_recipe())  # type: ignore[arg-type]
    levels = 127 if recipe == "paper-int8" else 255
    assert p.max() == levels and p.min() >= 0
    np.testing.assert_array_equal(p, np.rint(p))
    np.testing.assert_array_equal(o.astype(np.int64), p.astype(np.int64) @ v)


def tile_recipe() -> intfa.Recipe:
    return intfa.Recipe(v_granularity="head")


@pytest.mark.parametrize("sign_q", [1, -1])
@pytest.mark.parametrize("value", [127, LOWEST])
def test_extreme_scores(sign_q: int, value: int) -> None:
    """D = 256 and every product at its largest: the sum, and each partial sum, is still exact."""
    q = np.full((33, MAX_HEAD_DIM), value * sign_q if value == 127 else value)
    k = np.full((40, MAX_HEAD_DIM), value)
    k[1::2, 0] -= np.sign(value)  # an odd neighbour
    x = model._exponents(q.astype(np.float32), np.ones(33, np.float32), head(k, k), 0, 40)
    np.testing.assert_array_equal(x.astype(np.int64), q @ k.T)
    assert abs(x).max() == MAX_HEAD_DIM * value * value < FLOAT32_EXACT


@pytest.mark.parametrize("value", [127, LOWEST])
def test_extreme_weighted_values(value: int) -> None:
    """All P at 255 and all V at the end of int8."""
    v = np.full((TILE, 65), value)
    v[0, ::2] += 1 if value < 0 else -1
    o, p = accumulate(np.zeros((20, TILE)), v, tile_recipe())  # type: ignore[arg-type]
    assert (p == 255).all()
    np.testing.assert_array_equal(o.astype(np.int64), p.astype(np.int64) @ v)


def test_bound_holds_for_every_format() -> None:
    """No partial sum, in any order, can leave the integers that float32 holds: sum |a||b| < 2^24."""
    largest_p = 255
    with pytest.raises(ValueError, match=rf"p_levels must be in 1..{largest_p}"):
        intfa.Recipe(p_levels=largest_p + 1)
    assert MAX_HEAD_DIM * LOWEST * LOWEST < FLOAT32_EXACT
    assert TILE * largest_p * -LOWEST < FLOAT32_EXACT


def test_bound_is_needed() -> None:
    """A tile of 519 keys could hold a sum that float32 cannot, so the model refuses more than 128."""
    total = 255 * 127 * 519
    assert int(np.float32(total)) != total
    qkv = intfa.quantize_qkv(*np.zeros((3, 4, 8), np.float32))
    case = sts.Case(Sq=4, Sk=4, H=1, Hkv=1, D=8)
    for tile in (0, TILE + 1, 519):
        with pytest.raises(ValueError, match=f"tile must be in 1..128 .*got {tile}"):
            model.attention_numpy(qkv, case.problem(qkv.recipe), tile=tile)
