"""The packed layout that the kernels read, against its addresses spelled out byte by byte."""

from __future__ import annotations

import numpy as np
import pytest
import strategies as sts
from hypothesis import given
from hypothesis import strategies as st

import intfa_cupy as intfa
from intfa_cupy import packing
from intfa_cupy.gpu import transfer
from intfa_cupy.gpu.quantizer import container

LENGTHS = (1, 31, 127, 128, 129, 256, 300)


FORMATS = ("int8", "int4", "fp16", "e4m3", "e5m2")
BITS = {"int8": 8, "int4": 4, "fp16": 16, "e4m3": 8, "e5m2": 8}


def integers(seed: int, S: int, D: int, fmt: str = "int8") -> np.ndarray:
    """Numbers of a format, (2, 2, S, D): all of its bits but for those of fp16 that say that it is none."""
    rng = np.random.default_rng(seed)
    if fmt == "int4":
        return rng.integers(-7, 8, (2, 2, S, D)).astype(np.int8)
    if fmt == "fp16":
        return rng.standard_normal((2, 2, S, D)).astype(np.float16)
    x = rng.integers(-127, 128, (2, 2, S, D)).astype(np.int8)
    return x if fmt == "int8" else x.view(sts.dtype({"e4m3": "float8_e4m3fn", "e5m2": "float8_e5m2"}[fmt]))


def as_bits(x: np.ndarray) -> np.ndarray:
    return x.view({1: np.uint8, 2: np.uint16}[x.dtype.itemsize])


@given(
    seed=st.integers(0, 99),
    S=st.sampled_from((0, *LENGTHS)),
    D=st.sampled_from(sts.HEAD_DIMS),
    fmt=st.sampled_from(FORMATS),
)
def test_round_trip(seed: int, S: int, D: int, fmt: str) -> None:
    x = integers(seed, S, D, fmt)
    Dp = packing.padded_head_dim(D)
    for which, pack in (("q", packing.pack_q), ("k", packing.pack_k), ("v", packing.pack_v)):
        if which == "v" and fmt == "int4":  # there is none
            continue
        packed = pack(x, fmt)
        shape, dtype = packing.storage(fmt, which, 2, 2, S, Dp)
        assert packed.shape == shape and packed.dtype == dtype
        tensor = intfa.QuantizedTensor(packed, None, fmt, "none", x.shape, which, "packed")
        assert packing.unpack(tensor).dtype == x.dtype
        np.testing.assert_array_equal(as_bits(packing.unpack(tensor)), as_bits(x))
        # what is no element is 0
        zero = 128 if which == "v" and fmt == "int8" else 0
        if fmt == "int4":
            assert np.unpackbits(packed).sum() == np.unpackbits(as_bits(x & 15)).sum()
        else:
            assert np.count_nonzero(as_bits(packed) != zero) == np.count_nonzero(as_bits(x))


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("D", [17, 64, 80, 128, 129, 256])
def test_address_of_a_key_element(D: int, fmt: str) -> None:
    x, S, Dp, bits = integers(0, 300, D, fmt), 300, packing.padded_head_dim(D), BITS[fmt]
    packed = np.ascontiguousarray(packing.pack_k(x, fmt)).view(np.uint8)[1, 1]
    row = Dp * bits // 8
    width = min(row, 128)
    shift = {128: 1, 64: 2, 32: 4}[width]  # keys that share a swizzle
    for j, d in np.random.default_rng(1).integers((S, D), size=(400, 2)):
        t, r = divmod(int(j), 128)
        # INT4: a group's channels 0..15 lie in the low halves of its 16 bytes, 16..31 in the high ones.
        byte = int(d) // 32 * 16 + int(d) % 16 if bits == 4 else int(d) * bits // 8
        slab, within = divmod(byte, width)
        chunk = within // 16 ^ r // shift % (width // 16)
        at = slab * 128 * width + r * width + chunk * 16 + within % 16
        if bits == 4:
            assert packed[t, at] >> (d // 16 % 2 * 4) & 15 == x[1, 1, j, d] & 15
        else:
            stored = packed[t, at : at + bits // 8].tobytes()
            assert stored == x[1, 1, j, d].tobytes()


@pytest.mark.parametrize("fmt", ["int8", "e4m3"])
@pytest.mark.parametrize("D", [17, 64, 128, 256])
def test_address_of_a_value_element(D: int, fmt: str) -> None:
    """INT8 is stored as v + 128, FP8 as it is."""
    x = integers(0, 300, D, fmt)
    expected = x.astype(np.int32) + 128 if fmt == "int8" else as_bits(x)
    packed = packing.pack_v(x, fmt)
    # Where each key of a tile goes: 32-key groups, inside them h (16), q (4), b (1).
    position = {
        32 * g + 16 * h + 8 * (b >> 1) + 2 * q + (b & 1): 32 * g + 16 * h + 4 * q + b
        for g in range(4) for h in range(2) for q in range(4) for b in range(4)
    }  # fmt: skip
    for j, d in np.random.default_rng(1).integers((300, D), size=(400, 2)):
        t, r = divmod(int(j), 128)
        chunk, byte = divmod(position[r], 16)
        stored = packed[1, 1, t, d * 128 + (chunk ^ d % 8) * 16 + byte]
        assert stored == expected[1, 1, j, d]


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


@pytest.mark.parametrize("name", intfa.recipes())
def test_a_packed_call_gives_the_plain_result(name: str) -> None:
    """attention_quantized reads packed tensors on the host as well."""
    case = sts.Case(B=2, H=4, Hkv=2, Sq=70, Sk=300, D=80, is_causal=True)
    plain = intfa.quantize_qkv(*case.logical(), recipe=name)
    made = transfer.operands(plain)
    there = container(made, plain.recipe, (plain.q.shape, plain.k.shape, plain.v.shape), plain.out_dtype)
    assert there.k.layout == "packed"
    for which in ("q", "k", "v"):
        one, other = getattr(there, which), getattr(plain, which)
        np.testing.assert_array_equal(one.dequantize(), other.dequantize())
        again = getattr(packing.to_host(there), which)
        assert again.values.dtype == other.values.dtype
        np.testing.assert_array_equal(as_bits(again.values), as_bits(other.values))
        np.testing.assert_array_equal(again.scale, other.scale)
    out, lse = intfa.attention_quantized(there, is_causal=True, return_lse=True, backend="numpy")
    expected, lse_expected = intfa.attention_quantized(
        plain, is_causal=True, return_lse=True, backend="numpy"
    )
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(lse, lse_expected)
