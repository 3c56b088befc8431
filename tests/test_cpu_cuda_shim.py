"""Tests of the host shim itself: its primitives against NumPy, and planted mistakes that it must catch."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cpu_cuda
import ml_dtypes
import numpy as np
import pytest

pytestmark = pytest.mark.skipif(cpu_cuda.unavailable() is not None, reason=str(cpu_cuda.unavailable()))

KERNELS = cpu_cuda.KERNELS
ORDERS = ["ascending", "descending", 5]


def entries(source: Path) -> list[str]:
    """List the kernels of a source, those that macros make included."""
    text = source.read_text()
    names = re.findall(r"__global__ void (?:__launch_bounds__\(\d+\) )?(\w+)\(", text)
    return [n for n in names if n != "name"] + re.findall(r"^PRODUCT\((\w+),", text, re.MULTILINE)


@pytest.fixture(scope="module")
def modules() -> dict[str, cpu_cuda.Module]:
    sources = [KERNELS / "primitives.cu", KERNELS / "faults.cu"]
    built = cpu_cuda.build_all([{"source": s, "entries": entries(s)} for s in sources])
    return {s.stem: m for s, m in zip(sources, built, strict=True)}


@pytest.fixture(scope="module")
def primitives(modules: dict[str, cpu_cuda.Module]) -> cpu_cuda.Module:
    return modules["primitives"]


@pytest.fixture(scope="module")
def faults(modules: dict[str, cpu_cuda.Module]) -> cpu_cuda.Module:
    return modules["faults"]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


# --- indices and barriers -------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
def test_indices_and_structures_by_value(primitives: cpu_cuda.Module, order: Any) -> None:
    n = 2 * 3 * 2 * 40 - 7
    out = cpu_cuda.empty(n, np.int32, "data")
    fields = np.dtype([("data", np.uint64), ("n", np.int32), ("unused", np.float32, 3)], align=True)
    params = np.zeros((), fields)
    params["data"], params["n"] = out.pointer, n
    primitives.launch("indices", (2, 3, 2), (5, 4, 2), [params[()], np.int16(-3)], order=order)
    assert np.array_equal(out.numpy(), np.arange(n) - 3)
    assert out.written().all()


@pytest.mark.parametrize("order", ORDERS)
def test_block_reduction_in_shared_memory(
    primitives: cpu_cuda.Module, rng: np.random.Generator, order: Any
) -> None:
    x = rng.integers(-9, 9, (3, 200)).astype(np.float32)
    out = cpu_cuda.empty(3, np.float32, "out")
    primitives.launch("block_sum", 3, 64, [cpu_cuda.array(x, "x"), out, 200], smem=256, order=order)
    assert np.array_equal(out.numpy(), x.sum(1))


def test_dynamic_shared_memory_under_two_names(primitives: cpu_cuda.Module, rng: np.random.Generator) -> None:
    x = rng.standard_normal(64).astype(np.float32)
    out = cpu_cuda.empty(64, np.uint32, "out")
    primitives.launch("reinterpret", 1, 64, [cpu_cuda.array(x, "x"), out], smem=256)
    assert np.array_equal(out.numpy(), x[::-1].view(np.uint32))


@pytest.mark.parametrize("x", [np.zeros(96), np.ones(96), np.arange(96) % 3], ids=["none", "all", "some"])
def test_block_votes(primitives: cpu_cuda.Module, x: np.ndarray) -> None:
    out = cpu_cuda.empty(96, np.int32, "out")
    primitives.launch("block_votes", 1, 96, [cpu_cuda.array(x.astype(np.int32), "x"), out])
    expected = np.count_nonzero(x) | int(x.all()) << 16 | int(x.any()) << 17
    assert np.array_equal(out.numpy(), np.full(96, expected))


@pytest.mark.parametrize("order", ORDERS)
def test_ended_threads_do_not_hold_up_a_barrier(primitives: cpu_cuda.Module, order: Any) -> None:
    out = cpu_cuda.empty(64, np.int32, "out")
    primitives.launch("early_exit", 1, 64, [out, 40], order=order)
    assert np.array_equal(out.numpy()[:40], np.arange(40)[::-1])
    assert np.array_equal(out.written(), np.arange(64) < 40)


# --- warps ----------------------------------------------------------------------------------------


def shuffled(x: np.ndarray, operand: int, width: int) -> np.ndarray:
    """Apply the four shuffles as the programming guide defines them."""
    lanes = np.arange(x.size)
    base = lanes % 32 // width * width
    lane = lanes % 32
    sources = [
        base + operand % width,
        np.where(lane - operand < base, lane, lane - operand),
        np.where(lane + operand >= base + width, lane, lane + operand),
        np.where((lane ^ operand) >= base + width, lane, lane ^ operand),
    ]
    return np.stack([x[lanes // 32 * 32 + s] for s in sources])


@pytest.mark.parametrize(("operand", "width"), [(0, 32), (1, 32), (17, 32), (3, 8), (5, 4), (2, 2), (1, 16)])
@pytest.mark.parametrize("order", ORDERS)
def test_shuffles(
    primitives: cpu_cuda.Module, rng: np.random.Generator, operand: int, width: int, order: Any
) -> None:
    x = rng.standard_normal(64).astype(np.float32)
    out = cpu_cuda.empty((4, 64), np.float32, "out")
    primitives.launch("shuffles", 1, 64, [cpu_cuda.array(x, "x"), out, operand, width], order=order)
    assert np.array_equal(out.numpy(), shuffled(x, operand, width))


def test_shuffle_of_eight_bytes(primitives: cpu_cuda.Module, rng: np.random.Generator) -> None:
    x = rng.standard_normal(32)
    out = cpu_cuda.empty(32, np.float64, "out")
    primitives.launch("wide_shuffle", 1, 32, [cpu_cuda.array(x, "x"), out])
    assert np.array_equal(out.numpy(), x[np.arange(32) ^ 9])


@pytest.mark.parametrize("order", ORDERS)
def test_halves_of_a_warp_apart(primitives: cpu_cuda.Module, rng: np.random.Generator, order: Any) -> None:
    x = rng.integers(-99, 99, 64).astype(np.int32)
    out = cpu_cuda.empty(64, np.int32, "out")
    primitives.launch("half_warps", 1, 64, [cpu_cuda.array(x, "x"), out], order=order)
    quarters = x.reshape(4, 16)
    expected = [quarters[i].sum() if i % 2 == 0 else quarters[i].max() for i in range(4)]
    assert np.array_equal(out.numpy(), np.repeat(expected, 16))


@pytest.mark.parametrize("threads", [64, 40])
def test_votes_also_of_a_warp_that_is_not_full(
    primitives: cpu_cuda.Module, rng: np.random.Generator, threads: int
) -> None:
    x = rng.integers(0, 2, threads).astype(np.int32)
    x[32:] = 1
    out = cpu_cuda.empty((threads, 3), np.uint32, "out")
    primitives.launch("votes", 1, threads, [cpu_cuda.array(x, "x"), out])
    for first in range(0, threads, 32):
        lanes = x[first : first + 32]
        ballot = sum(int(v) << i for i, v in enumerate(lanes))
        assert np.array_equal(out.numpy()[first], [ballot, lanes.any(), lanes.all()])


def test_warp_reductions(primitives: cpu_cuda.Module, rng: np.random.Generator) -> None:
    x = rng.integers(-(2**31), 2**31, 64).astype(np.int32)
    out = cpu_cuda.empty((8, 64), np.int32, "out")
    primitives.launch("reductions", 1, 64, [cpu_cuda.array(x, "x"), out])
    for w in range(2):
        s, u = x[32 * w : 32 * w + 32], x[32 * w : 32 * w + 32].view(np.uint32)
        unsigned = [u.min(), u.max(), *(f.reduce(u) for f in (np.bitwise_and, np.bitwise_or, np.bitwise_xor))]
        signed = [s.sum(dtype=np.int32), s.min(), s.max(), *np.array(unsigned, np.uint32).view(np.int32)]
        assert np.array_equal(out.numpy()[:, 32 * w], signed)


@pytest.mark.parametrize("order", ORDERS)
def test_warp_barrier_orders_memory(primitives: cpu_cuda.Module, order: Any) -> None:
    x = np.arange(64, dtype=np.int32)
    out = cpu_cuda.empty(64, np.int32, "out")
    primitives.launch("warp_transpose", 1, 64, [cpu_cuda.array(x, "x"), out], order=order)
    assert np.array_equal(out.numpy(), x.reshape(2, 32)[:, ::-1].reshape(-1))


def test_atomics(primitives: cpu_cuda.Module, rng: np.random.Generator) -> None:
    x = rng.integers(-99, 99, (3, 40)).astype(np.int32)
    sums = cpu_cuda.empty(3, np.int32, "sums")
    total, largest, last = (
        cpu_cuda.array(np.array([v], t)) for v, t in [(0, np.float32), (-100, np.int32), (7, np.int32)]
    )
    primitives.launch("atomics", 3, 40, [cpu_cuda.array(x, "x"), sums, total, largest, last])
    assert np.array_equal(sums.numpy(), x.sum(1))
    assert [total.numpy()[0], largest.numpy()[0], last.numpy()[0]] == [x.sum(), x.max(), 8]


# --- matrix fragments -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dtype", "sum_dtype"),
    [
        ("product_s8", np.int8, np.int32),
        ("product_u8", np.uint8, np.int32),
        ("product_half", np.float16, np.float32),
        ("product_bf16", ml_dtypes.bfloat16, np.float32),
    ],
)
@pytest.mark.parametrize("columns", [0, 1], ids=["rows", "columns"])
def test_matrix_products(
    primitives: cpu_cuda.Module, rng: np.random.Generator, name: str, dtype: Any, sum_dtype: Any, columns: int
) -> None:
    low, high = (np.iinfo(dtype).min, np.iinfo(dtype).max + 1) if sum_dtype is np.int32 else (-20, 20)
    k = 48
    a = rng.integers(low, high, (16, k)).astype(dtype)
    b = rng.integers(low, high, (k, 16)).astype(dtype)
    c = rng.integers(-99, 99, (16, 16)).astype(sum_dtype)
    d = cpu_cuda.empty((16, 16), sum_dtype, "d")
    operands = [m.T if columns else m for m in (a, b, c)]
    buffers = [cpu_cuda.array(np.ascontiguousarray(m)) for m in operands]
    primitives.launch(name, 1, 32, [*buffers, d, k, columns])
    expected = a.astype(np.float64) @ b.astype(np.float64) + c
    assert np.array_equal(d.numpy().T if columns else d.numpy(), expected)


def test_fragments_are_laid_out_unlike_any_hardware(primitives: cpu_cuda.Module) -> None:
    numbers = np.arange(256, dtype=np.int32)
    out = cpu_cuda.empty((32, 8), np.int32, "out")
    primitives.launch("layout_of_fragments", 1, 32, [cpu_cuda.array(numbers), out])
    held = out.numpy()
    assert np.array_equal(np.sort(held.reshape(-1)), numbers)
    # Hardware lets a lane hold one or two rows only, and neighbours in pairs.
    assert np.median([np.unique(lane // 16).size for lane in held]) > 4


def test_elementwise_work_on_fragments(primitives: cpu_cuda.Module) -> None:
    out = cpu_cuda.empty((16, 16), np.float32, "out")
    primitives.launch("scaled_fill", 1, 32, [out, 3.0, 0.5])
    assert np.array_equal(out.numpy(), np.full((16, 16), 1.5))


# --- numbers --------------------------------------------------------------------------------------


def test_every_16_bit_number_becomes_the_right_float(primitives: cpu_cuda.Module) -> None:
    bits = np.arange(65536, dtype=np.uint16)
    halves, bfloats = bits.view(np.float16), bits.view(ml_dtypes.bfloat16)
    outs = [cpu_cuda.empty(bits.size, np.float32) for _ in range(2)]
    primitives.launch("widen", 8, 64, [cpu_cuda.array(halves), cpu_cuda.array(bfloats), *outs, bits.size])
    for out, source in zip(outs, (halves, bfloats), strict=True):
        got, expected = out.numpy(), source.astype(np.float32)
        assert np.array_equal(np.isnan(got), np.isnan(expected))
        finite = ~np.isnan(expected)
        assert np.array_equal(got[finite].view(np.uint32), expected[finite].view(np.uint32))


def test_floats_round_to_nearest_even(primitives: cpu_cuda.Module, rng: np.random.Generator) -> None:
    # Numbers of either format, the midpoint above each and the floats next to the midpoint; and random bits.
    samples = [rng.integers(0, 2**32, 20000, np.uint32).view(np.float32)]
    for dtype in (np.float16, ml_dtypes.bfloat16):
        values = np.arange(65536, dtype=np.uint16).view(dtype).astype(np.float32)
        values = values[np.isfinite(values)][::3]
        with np.errstate(over="ignore"):
            above = (values.astype(dtype).view(np.uint16) + np.uint16(1)).view(dtype).astype(np.float64)
            middle = ((values + above) / 2).astype(np.float32)
        samples += [values, middle, *(np.nextafter(middle, np.float32(to)) for to in (np.inf, -np.inf))]
    x = np.concatenate(samples)
    outs = [cpu_cuda.empty(x.size, t) for t in (np.float16, ml_dtypes.bfloat16)]
    primitives.launch("narrow", 8, 64, [cpu_cuda.array(x), *outs, x.size])
    for out in outs:
        with np.errstate(all="ignore"):
            expected = x.astype(out.dtype)
        got = out.numpy()
        assert np.array_equal(np.isnan(got), np.isnan(expected))
        finite = ~np.isnan(x)
        assert np.array_equal(got[finite].view(np.uint16), expected[finite].view(np.uint16))


def test_half_arithmetic_rounds_once(primitives: cpu_cuda.Module, rng: np.random.Generator) -> None:
    n = 4000
    x, y, z = (rng.integers(0, 65536, (n, 2)).astype(np.uint16).view(np.float16) for _ in range(3))
    # Sums that cancel and midpoints with a distant addend are where rounding twice shows.
    x[: n // 2], y[: n // 2] = rng.standard_normal((2, n // 2, 2)).astype(np.float16)
    z[: n // 4] = (-(x[: n // 4].astype(np.float64) * y[: n // 4])).astype(np.float16)
    out = cpu_cuda.empty((5, n, 2), np.float16, "out")
    primitives.launch("half_arithmetic", 4, 64, [*(cpu_cuda.array(v) for v in (x, y, z)), out, n])
    with np.errstate(all="ignore"):
        exact = np.array(
            [
                [float_fraction(*t) for t in zip(*(v[:, i].tolist() for v in (x, y, z)), strict=True)]
                for i in range(2)
            ]
        ).T
        expected = np.stack([x + y, x * y, exact.astype(np.float16), np.fmax(x, y), x[:, ::-1]])
    got = out.numpy()
    assert np.array_equal(np.isnan(got), np.isnan(expected))
    assert np.array_equal(got[~np.isnan(got)], expected[~np.isnan(got)])


def float_fraction(x: float, y: float, z: float) -> float:
    """Return a double that rounds to half precision as x * y + z does."""
    from fractions import Fraction

    if not np.isfinite([x, y, z]).all():
        return float(np.float64(x) * y + z)
    exact = Fraction(x) * Fraction(y) + Fraction(z)
    near = float(exact)
    # If the double is a midpoint of halves by rounding, step off it to the side where the exact sum lies.
    if Fraction(near) != exact:
        near = float(np.nextafter(near, np.inf if exact > Fraction(near) else -np.inf))
    return near


def test_conversions(primitives: cpu_cuda.Module) -> None:
    x = np.array([0.5, 1.5, 2.5, -0.5, -1.5, 3e9, -3e9, 5e9, np.inf, -np.inf, np.nan, 2147483520], np.float32)
    outs = [cpu_cuda.empty(x.size, t) for t in (np.int32, np.uint32, np.int32)]
    primitives.launch("conversions", 1, 32, [cpu_cuda.array(x), *outs, x.size])
    rounded = np.rint(np.nan_to_num(x.astype(np.float64), nan=0.0, posinf=1e30, neginf=-1e30))
    assert np.array_equal(outs[0].numpy(), np.clip(rounded, -(2**31), 2**31 - 1))
    assert np.array_equal(outs[1].numpy(), np.clip(rounded, 0, 2**32 - 1))
    assert np.array_equal(outs[2].numpy(), x.view(np.int32))


def test_byte_functions(primitives: cpu_cuda.Module, rng: np.random.Generator) -> None:
    n = 500
    words = rng.integers(0, 2**32, (n, 2), np.uint32)
    selectors = rng.integers(0, 2**16, n, np.uint32)
    out = cpu_cuda.empty((n, 4), np.uint32, "out")
    primitives.launch("bytes", 2, 64, [cpu_cuda.array(words), cpu_cuda.array(selectors), out, n])
    got = out.numpy()
    pairs = words.view(np.uint8)  # the eight bytes of (b, a), lowest first
    nibbles = selectors[:, None] >> np.arange(0, 16, 4, dtype=np.uint32) & 15
    picked = np.take_along_axis(pairs, (nibbles & 7).astype(np.int64), 1)
    picked = np.where(nibbles & 8, np.where(picked & 128, 255, 0), picked).astype(np.uint8)
    assert np.array_equal(got[:, 0], picked.view(np.uint32)[:, 0])
    left, right = pairs[:, :4], pairs[:, 4:]
    signed = (left.view(np.int8).astype(np.int32) * right.view(np.int8)).sum(1, dtype=np.int32) + 7
    assert np.array_equal(got[:, 1].view(np.int32), signed)
    assert np.array_equal(got[:, 2], (left.astype(np.uint32) * right).sum(1, dtype=np.uint32) + 7)
    wide = words[:, 1].astype(np.uint64) << np.uint64(32) | words[:, 0]
    assert np.array_equal(got[:, 3], (wide >> (selectors & 31).astype(np.uint64)).astype(np.uint32))


def test_negative_bytes_and_largest_of_three(primitives: cpu_cuda.Module, rng: np.random.Generator) -> None:
    x = rng.integers(-(2**31), 2**31, (200, 4)).astype(np.int32)
    out = cpu_cuda.empty((200, 2), np.int32, "out")
    primitives.launch("negative_and_largest", 2, 64, [cpu_cuda.array(x), out, 200])
    negative = (0 - x[:, :1].copy().view(np.uint8)).view(np.int32)[:, 0]
    np.testing.assert_array_equal(out.numpy(), np.stack([negative, x[:, 1:].max(axis=1)], 1))


def test_arithmetic(primitives: cpu_cuda.Module, rng: np.random.Generator) -> None:
    x = rng.standard_normal((500, 4)).astype(np.float32)
    out = cpu_cuda.empty((500, 4), np.float32, "out")
    primitives.launch("arithmetic", 2, 64, [cpu_cuda.array(x), out, 500])
    got = out.numpy()
    assert np.array_equal(got[:, 1], x[:, 0] * x[:, 1])
    assert np.array_equal(got[:, 2], x[:, 0] / x[:, 1])
    # The fused product keeps bits that a product and a sum lose; a double holds nearly all of them.
    fused = (x[:, 0].astype(np.float64) * x[:, 1] + x[:, 2]).astype(np.float32)
    assert np.array_equal(got[:, 0], fused)
    assert not np.array_equal(fused, x[:, 0] * x[:, 1] + x[:, 2])
    np.testing.assert_allclose(got[:, 3], np.exp2(x[:, 3].astype(np.float64)), rtol=2e-7)


# --- planted mistakes -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Planted:
    """A kernel with a switchable mistake: what it needs, and what the shim must say."""

    entry: str
    args: Sequence[Any]
    error: type[cpu_cuda.KernelError]
    message: str
    grid: int = 1
    block: int = 32
    smem: int = 0


INTS = np.zeros(64, np.int32)
WIDE = np.zeros((16, 16), np.int32)
PADDED = np.zeros((32, 32), np.uint8)[:, :16]
BYTES = np.ones((16, 16), np.int8)
RACE = cpu_cuda.DataRaceError
OUTSIDE = cpu_cuda.OutOfBoundsError
UNWRITTEN = cpu_cuda.UninitialisedError
DIVERGED = cpu_cuda.DivergenceError
UNDEFINED = cpu_cuda.UndefinedBehaviourError

PLANTED = [
    Planted("missing_barrier", [INTS], RACE, "shared `words`", block=64),
    Planted("missing_second_barrier", [np.zeros(192, np.int32), INTS, 3], RACE, "shared `words`", block=64),
    Planted("missing_warp_barrier", [INTS], RACE, "no barrier between this and thread"),
    Planted("missing_fragment_barrier", [WIDE], RACE, "shared `tile`"),
    Planted("blocks_collide", [INTS], RACE, "another block", grid=2),
    Planted("one_flag", [INTS], RACE, "write of 4 bytes at byte 0 of buffer `data`", block=64),
    Planted("blocks_communicate", [INTS], RACE, "another block", grid=2),
    Planted("global_read", [INTS[:32], INTS, 32], OUTSIDE, "read of 4 bytes at byte 128 of buffer"),
    Planted("global_write", [INTS], OUTSIDE, r"write of 4 bytes at byte -4 of buffer"),
    Planted("wide_read", [PADDED, np.zeros((32, 4), np.int32), 32], OUTSIDE, "read of 16 bytes"),
    Planted("shared_read", [INTS], OUTSIDE, "byte 128 of shared `dynamic shared memory`", smem=128),
    Planted("static_shared_write", [INTS], UNDEFINED, "index \\d+ outside of"),
    Planted("fragment_read", [BYTES, WIDE], OUTSIDE, "read of 16 bytes"),
    Planted("misaligned_fragment", [BYTES, INTS], UNDEFINED, "multiple of"),
    Planted("null_pointer", [INTS], UNDEFINED, r"faults\.cu:\d+:\d+: null pointer"),
    Planted("wild_pointer", [INTS], OUTSIDE, "in no buffer"),
    Planted("foreign_local", [INTS], OUTSIDE, "local variable of another thread"),
    Planted("uninitialised_shared", [INTS], UNWRITTEN, "byte 20 of shared `words`"),
    Planted("divergent_barrier", [INTS], DIVERGED, "__syncthreads at faults.cu", block=64),
    Planted("divergent_warps", [INTS], DIVERGED, "threads 0-31: __syncthreads.*threads 32-63", block=64),
    Planted("closed_memory_barrier", [INTS], DIVERGED, "threads 0-0: a barrier in memory.*ended", block=64),
    Planted("divergent_shuffle", [INTS], DIVERGED, "threads 3-3: ended"),
    Planted("divergent_product", [WIDE], DIVERGED, "store_matrix_sync.*threads 31-31: ended"),
    Planted("lane_outside_of_mask", [INTS], DIVERGED, "mask 0x0000ffff"),
    Planted("signed_overflow", [INTS, 2**31 - 1], UNDEFINED, r"faults\.cu:\d+:\d+: overflow: 2147483647 \+"),
    Planted("wide_shift", [INTS], UNDEFINED, "shift"),
    Planted("float_to_int", [INTS, 1.5], UNDEFINED, "outside of the range"),
    Planted("array_index", [INTS], UNDEFINED, "index . outside of"),
    Planted("misaligned_vector", [np.zeros(132, np.int32), np.zeros((32, 4), np.int32)], UNDEFINED, "misal"),
    Planted("endless", [INTS], cpu_cuda.UnsupportedError, "endless"),
]


@pytest.mark.parametrize("order", ["ascending", "descending"])
@pytest.mark.parametrize("planted", PLANTED, ids=lambda p: p.entry)
def test_planted_mistake_is_caught(faults: cpu_cuda.Module, planted: Planted, order: Any) -> None:
    args = [
        cpu_cuda.array(a, "data", strides=a.strides) if isinstance(a, np.ndarray) else a for a in planted.args
    ]

    def launch(bad: int) -> None:
        p = planted
        faults.launch(p.entry, p.grid, p.block, [*args, bad], p.smem, order, access_limit=100_000)

    launch(0)
    with pytest.raises(planted.error, match=planted.message) as caught:
        launch(1)
    assert str(caught.value).startswith(planted.entry)
    launch(0)  # and the shim goes on afterwards


def test_missing_barrier_shows_in_the_two_orders_alone(faults: cpu_cuda.Module) -> None:
    """Without the detector: what a warp reads depends on which warp ran first."""

    def run(order: Any, bad: int) -> np.ndarray:
        out = cpu_cuda.empty(64, np.int32, "out")
        faults.launch("missing_barrier", 1, 64, [out, bad], order=order, check_races=False)
        return out.numpy()

    assert np.array_equal(run("ascending", 0), run("descending", 0))
    assert not np.array_equal(run("ascending", 1), run("descending", 1))


def test_reading_global_memory_without_a_value(faults: cpu_cuda.Module) -> None:
    x = cpu_cuda.array(INTS)

    def launch(bad: int) -> None:
        faults.launch("uninitialised_global", 1, 32, [x, cpu_cuda.empty(32, np.int32, "scratch"), x, bad])

    launch(0)
    with pytest.raises(cpu_cuda.UninitialisedError, match="buffer `scratch`"):
        launch(1)


def test_uninitialised_shared_memory_is_all_ones_if_allowed(faults: cpu_cuda.Module) -> None:
    out = cpu_cuda.array(INTS)
    faults.launch("uninitialised_shared", 1, 32, [out, 1], check_uninitialised_shared=False)
    assert out.numpy()[31 - 5] == -1


def test_gaps_of_a_strided_array_are_out_of_bounds(faults: cpu_cuda.Module) -> None:
    """A view with 2**35 bytes between its rows costs two rows, and what lies between is not accessible."""
    x = np.arange(8, dtype=np.int32).reshape(2, 4)
    spread = cpu_cuda.array(x, "spread", strides=(2**35, 8))
    assert np.array_equal(spread.numpy(), x)
    with pytest.raises(cpu_cuda.OutOfBoundsError, match="byte 4 of buffer `spread`"):
        faults.launch("global_read", 1, 32, [spread, cpu_cuda.array(INTS), 32, 0])


def test_fibres_without_assembly() -> None:
    """The way to switch fibres that other machines than x86_64 use, in a process of its own."""
    program = """
import numpy as np, cpu_cuda
module = cpu_cuda.build(cpu_cuda.KERNELS / "faults.cu", entries=["missing_second_barrier"])
x, out = cpu_cuda.array(np.arange(192, dtype=np.int32)), cpu_cuda.empty(64, np.int32)
module.launch("missing_second_barrier", 1, 64, [x, out, 3, 0])
assert np.array_equal(np.roll(out.numpy(), 32), np.arange(192).reshape(3, 64).sum(0))
"""
    env = {**os.environ, "CPU_CUDA_RUNTIME_FLAGS": "-DCPU_CUDA_UCONTEXT -O1"}
    folder = Path(cpu_cuda.__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", program], env=env, cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_compiler_errors_reach_the_caller() -> None:
    with pytest.raises(RuntimeError, match="undeclared_name"):
        cpu_cuda.build('extern "C" __global__ void f(int* x) { *x = undeclared_name; }', entries=["f"])


def test_wrong_arguments_are_refused(primitives: cpu_cuda.Module) -> None:
    with pytest.raises(TypeError, match="3 parameters, not 1"):
        primitives.launch("block_sum", 1, 32, [1])
    with pytest.raises(TypeError, match="parameter 2 of block_sum has 4 bytes, not 8"):
        primitives.launch("block_sum", 1, 32, [0, 0, np.int64(1)])
    with pytest.raises(ValueError, match="2048 threads"):
        primitives.launch("block_sum", 1, 2048, [0, 0, 0])
