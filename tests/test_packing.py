"""The packed layout that the kernels read, against its addresses spelled out byte by byte."""

from __future__ import annotations

import numpy as np
import pytest
import strategies as sts
from hypothesis import given
from hypothesis import strategies as st

import intfa_cupy as intfa
from intfa_cupy import packing
from intfa_cupy.quantized import QuantizedQKV, tiles_of

LENGTHS = (1, 31, 127, 128, 129, 256, 300)


def integers(seed: int, S: int, D: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(-127, 128, (2, 2, S, D)).astype(np.int8)


@given(seed=st.integers(0, 99), S=st.sampled_from((0, *LENGTHS)), D=st.sampled_from(sts.HEAD_DIMS))
def test_round_trip(seed: int, S: int, D: int) -> None:
    x = integers(seed, S, D)
    Dp, nT = packing.padded_head_dim(D), tiles_of(S)
    k, v, q = packing.pack_k(x), packing.pack_v(x), packing.pack_q(x)
    assert k.shape == (2, 2, nT, 128 * Dp) and v.shape == (2, 2, nT, Dp * 128) and q.shape == (2, 2, S, Dp)
    np.testing.assert_array_equal(packing.unpack_k(k, S, D), x)
    np.testing.assert_array_equal(packing.unpack_v(v, S, D), x)
    np.testing.assert_array_equal(q[..., :D], x)
    for packed in (k, v, q):  # what is no element is 0
        assert np.count_nonzero(packed) == np.count_nonzero(x)


@pytest.mark.parametrize("D", [17, 64, 80, 128, 129, 256])
def test_address_of_a_key_element(D: int) -> None:
    x, S, Dp = integers(0, 300, D), 300, packing.padded_head_dim(D)
    packed = packing.pack_k(x)
    for j, d in np.random.default_rng(1).integers((S, D), size=(400, 2)):
        t, r = divmod(int(j), 128)
        slab, c = (0, int(d)) if Dp == 64 else divmod(int(d), 128)
        chunk, byte = divmod(c, 16)
        width = 64 if Dp == 64 else 128
        chunk ^= (r // 2) % 4 if Dp == 64 else r % 8
        assert packed[1, 1, t, slab * 128 * width + r * width + chunk * 16 + byte] == x[1, 1, j, d]


@pytest.mark.parametrize("D", [17, 64, 128, 256])
def test_address_of_a_value_element(D: int) -> None:
    x = integers(0, 300, D)
    packed = packing.pack_v(x)
    # Where each key of a tile goes: 32-key groups, inside them h (16), q (4), b (1).
    position = {
        32 * g + 16 * h + 8 * (b >> 1) + 2 * q + (b & 1): 32 * g + 16 * h + 4 * q + b
        for g in range(4) for h in range(2) for q in range(4) for b in range(4)
    }  # fmt: skip
    for j, d in np.random.default_rng(1).integers((300, D), size=(400, 2)):
        t, r = divmod(int(j), 128)
        chunk, byte = divmod(position[r], 16)
        assert packed[1, 1, t, d * 128 + (chunk ^ d % 8) * 16 + byte] == x[1, 1, j, d]


def test_position_order_is_a_permutation_that_matches_the_score_fragment() -> None:
    """Four consecutive positions hold the keys of one lane: columns 2q, 2q+1, 8+2q, 8+2q+1."""
    keys = packing.key_of_position()
    assert sorted(keys) == list(range(128))
    for p in range(0, 128, 4):
        lane, base = p // 4 % 4, p // 16 * 16
        assert keys[p : p + 4].tolist() == [
            base + 2 * lane,
            base + 2 * lane + 1,
            base + 8 + 2 * lane,
            base + 9 + 2 * lane,
        ]


@pytest.mark.parametrize("name", ["int8", "int8-fast", "paper-int8"])
def test_a_packed_call_gives_the_plain_result(name: str) -> None:
    """attention_quantized reads packed tensors on the host as well."""
    case = sts.Case(B=2, H=4, Hkv=2, Sq=70, Sk=300, D=80, is_causal=True)
    plain = intfa.quantize_qkv(*case.logical(), recipe=name)

    def packed(t: intfa.QuantizedTensor) -> intfa.QuantizedTensor:
        pack = {"q": packing.pack_q, "k": packing.pack_k, "v": packing.pack_v}[t.which]
        scale = t.scale
        if t.granularity == "token" and t.which != "q":  # padded to whole tiles
            scale = np.pad(scale, ((0, 0), (0, 0), (0, tiles_of(t.shape[2]) * 128 - t.shape[2])))  # type: ignore
        if t.granularity == "channel":
            scale = np.pad(scale, ((0, 0), (0, 0), (0, packing.padded_head_dim(t.shape[3]) - t.shape[3])))  # type: ignore
        return intfa.QuantizedTensor(
            pack(t.values), scale, t.format, t.granularity, t.shape, t.which, "packed"
        )

    there = QuantizedQKV(packed(plain.q), packed(plain.k), packed(plain.v), plain.recipe, plain.lse_shift)
    np.testing.assert_array_equal(there.k.dequantize(), plain.k.dequantize())
    out, lse = intfa.attention_quantized(there, is_causal=True, return_lse=True, backend="numpy")
    expected, lse_expected = intfa.attention_quantized(
        plain, is_causal=True, return_lse=True, backend="numpy"
    )
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(lse, lse_expected)
