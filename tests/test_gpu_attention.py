"""Attention kernels on the device against the NumPy model, through the public functions."""

from __future__ import annotations

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import strategies as sts
from agreement import ROUNDING, check_against_model
from hypothesis import given, settings
from hypothesis import strategies as st
from test_gpu_quantize import to_device, with_dtype

import intfa_cupy as intfa
from intfa_cupy import Recipe, dispatch, gpu, packing, tiles
from intfa_cupy.problem import Problem

pytestmark = pytest.mark.gpu
R = intfa.recipes()
KERNELS = ("wgmma", "mma", "wmma")
TOKENS = R["int8"].replace(k_granularity="token")
RECIPES = [R[n] for n in ("int8", "int8-fast", "paper-int8", "half-int8", "half-int8-plus")] + [
    Recipe(k_granularity="tile", v_granularity="head", p_levels=127),
    Recipe(p_max="running", v_granularity="token"),
    TOKENS,
    *(R[n] for n in ("int4", "k4", "fp16", "fp8-e4m3", "fp8-e5m2")),
]
HEAD_DIMS = (1, 33, 64, 80, 128, 256)
LENGTHS = (*sts.LENGTHS, 513, 1000)


#: Examples that passed, by kernel; ``gpu_suite.py`` adds them up.
EXAMPLES: Counter[str] = Counter()


@pytest.fixture(scope="module", autouse=True)
def report_examples(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    path = os.environ.get("INTFA_GPU_EXAMPLES")
    if path:
        Path(path).write_text(json.dumps(EXAMPLES))


@cache
def served(kernel: str) -> list[Recipe]:
    """The recipes that a kernel has on this device."""
    device = gpu.device()
    found = [r for r in RECIPES if tiles.find(kernel, Problem(1, 1, 1, 1, 1, 64, r), device)[0] is not None]
    if not found:
        pytest.skip(f"{kernel}: {tiles.device_problem(kernel, device)}")
    return found


def poisoned(shape: tuple[int, ...], dtype: Any) -> Any:
    """Memory full of NaN, which a kernel must overwrite to the last element."""
    import cupy

    nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return cupy.full(nbytes, 255, np.uint8).view(dtype).reshape(shape)


@pytest.mark.parametrize("kernel", KERNELS)
@settings(max_examples=700)  # of each kernel: the three have more than 2,000
@given(
    case=sts.cases(
        lengths=LENGTHS,
        head_dims=HEAD_DIMS,
        dtypes=("float16", "bfloat16", "float32"),
        distributions=[d for d in sts.DISTRIBUTIONS if d != "huge"],
    ),
    data=st.data(),
)
def test_kernels_agree_with_the_model(kernel: str, case: sts.Case, data: st.DataObject) -> None:
    """Any shape, mask, grouping, type and strides, with any recipe that a kernel says it serves."""
    recipe = data.draw(st.sampled_from(served(kernel)))
    case = with_dtype(case, recipe)
    x = [to_device(a) for a in case.arrays()]
    call: dict[str, Any] = {"recipe": recipe, "backend": kernel, **case.call}
    qkv = packing.to_host(intfa.quantize_qkv(*x, recipe=recipe, layout=case.layout, backend=kernel))
    target = poisoned(x[0].shape, x[0].dtype)
    out, lse = intfa.attention(*x, **call, out=target, return_lse=True)
    assert out is target
    again = intfa.attention(*x, **call)
    assert again.get().tobytes() == out.get().tobytes(), "two runs differ"
    logical, lse = case.logical_again(out.get()), lse.get().reshape(case.B, case.H, case.Sq)
    check_against_model(qkv, case, case.problem(recipe), logical, lse, ROUNDING[kernel])
    EXAMPLES[kernel] += 1


@pytest.mark.parametrize("kernel", KERNELS)
def test_output_strides(kernel: str) -> None:
    """A result is written where the caller says and nowhere else."""
    import cupy

    x = [to_device(a) for a in sts.Case(H=2, Sq=100, Sk=150, D=80, dtype="float16").logical()]
    try:
        expected = intfa.attention(*x, backend=kernel)
    except dispatch.UnsupportedError as error:
        pytest.skip(str(error))
    memory = cupy.full((1, 2, 80 * 2, 100 * 3), 7, np.float16)
    target = memory[:, :, ::2, ::3].swapaxes(2, 3)
    intfa.attention(*x, backend=kernel, out=target)
    np.testing.assert_array_equal(target.get(), expected.get())
    memory[:, :, ::2, ::3] = 7
    assert bool((memory == 7).all())


@pytest.mark.parametrize("kernel", KERNELS)
def test_call_in_a_graph_on_another_stream(kernel: str) -> None:
    """Nothing waits for the device: the call can be captured, and replays on its stream."""
    import cupy

    case = sts.Case(H=4, Hkv=2, Sq=300, Sk=300, dtype="float16", is_causal=True)
    x = [to_device(a) for a in case.logical()]
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        try:
            expected = intfa.attention(*x, backend=kernel, is_causal=True)
        except dispatch.UnsupportedError as error:
            pytest.skip(str(error))
        out = intfa.attention(*x, backend=kernel, is_causal=True)
        stream.begin_capture()
        intfa.attention(*x, backend=kernel, is_causal=True, out=out)
        graph = stream.end_capture()
        out.fill(np.nan)
        graph.launch(stream)
    stream.synchronize()
    np.testing.assert_array_equal(out.get(), expected.get())


@pytest.mark.parametrize("D", [64, 128, 256])
@pytest.mark.parametrize("recipe", [R["int8"], TOKENS, R["int8-fast"]], ids=["int8", "tokens", "int8-fast"])
@pytest.mark.parametrize("kernel", ["wgmma", "mma"])
def test_many_launches_give_the_same_bits(kernel: str, recipe: Recipe, D: int) -> None:
    """A buffer that is overwritten while some thread still reads it shows in one launch of ten, if at all."""
    case = sts.Case(B=1, H=2048 // D, Hkv=2048 // D, Sq=8192, Sk=8192, D=D, dtype="float16")
    x = [to_device(a) for a in case.logical()]
    try:
        qkv = intfa.quantize_qkv(*x, recipe=recipe, backend=kernel)
    except dispatch.UnsupportedError as error:
        pytest.skip(str(error))
    first = intfa.attention_quantized(qkv, backend=kernel, out_dtype="float16")
    for _ in range(60):
        again = intfa.attention_quantized(qkv, backend=kernel, out_dtype="float16")
        assert bool((again.view(np.uint16) == first.view(np.uint16)).all())


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
def test_more_than_two_to_the_31_elements(kernel: str) -> None:
    """Offsets are 64 bits wide: the last head of a large call equals the same head alone."""
    import cupy

    B, H, S, D = 17, 256, 4096, 128  # 2.3e9 elements
    if cupy.cuda.Device().mem_info[0] < 30 << 30:
        pytest.skip("needs 30 GB of device memory")
    one = [to_device(a) for a in sts.Case(H=1, Hkv=1, Sq=S, Sk=S, D=D, dtype="float16").logical()]
    try:
        expected = intfa.attention(*one, backend=kernel, recipe="int8-fast")
    except dispatch.UnsupportedError as error:
        pytest.skip(str(error))
    q, k, v = (cupy.zeros((B, n, S, D), np.float16) for n in (H, 1, 1))
    q[-1, -1], k[-1], v[-1] = one[0][0, 0], one[1][0], one[2][0]
    # The group's other heads are zero: without equalisation they have no part in the last one.
    recipe = dataclasses.replace(R["int8-fast"], equalize=False)
    expected = intfa.attention(*one, backend=kernel, recipe=recipe)
    out = intfa.attention(q, k, v, backend=kernel, recipe=recipe)
    np.testing.assert_array_equal(out[-1, -1].get(), expected[0, 0].get())


def quantize_and_attend(
    case: sts.Case, recipe: Recipe, kernel: str
) -> tuple[intfa.QuantizedQKV, np.ndarray, np.ndarray]:
    """What a kernel was given, brought to the host, and what it made of it; skips what it does not serve."""
    x = [to_device(a) for a in case.logical()]
    call: dict[str, Any] = {"recipe": recipe, "backend": kernel}
    try:
        qkv = packing.to_host(intfa.quantize_qkv(*x, **call))
    except dispatch.UnsupportedError as error:
        pytest.skip(str(error))
    out, lse = intfa.attention(*x, **call, **case.call, return_lse=True)
    return qkv, out.get(), lse.get()


@cache
def many_heads(Sk: int, D: int) -> list[Any]:
    """q, k, v of 528 blocks of 128 rows: four for each multiprocessor of the largest GPU so far."""
    case = sts.Case(B=3, H=16, Hkv=4, Sq=1400, Sk=Sk, D=D, dtype="float16")
    return [to_device(a) for a in case.logical()]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("recipe", ["int8-fast", "int8", "paper-int8"])
@pytest.mark.parametrize("D", [64, 128, 256])
@pytest.mark.parametrize(
    ("Sk", "mask"),
    [(640, {}), (700, {"is_causal": True}), (1500, {"window": (200, 50)})],
    ids=["all keys", "causal, half of the rows see nothing", "window"],
)
def test_a_head_does_not_depend_on_those_beside_it(
    Sk: int, mask: dict[str, Any], D: int, recipe: str, kernel: str
) -> None:
    """A persistent block takes several heads in turn; each comes out as in a call of its own."""
    q, k, v = many_heads(Sk, D)
    call: dict[str, Any] = {"recipe": recipe, "backend": kernel, "return_lse": True, **mask}
    try:
        out, lse = intfa.attention(q, k, v, **call)
    except dispatch.UnsupportedError as error:
        pytest.skip(str(error))
    for b, h in ((0, 0), (1, 2), (2, 3)):
        group, head = (slice(b, b + 1), slice(4 * h, 4 * h + 4)), (slice(b, b + 1), slice(h, h + 1))
        one, one_lse = intfa.attention(q[group], k[head], v[head], **call)
        np.testing.assert_array_equal(out[group].get(), one.get())
        np.testing.assert_array_equal(lse[group].get(), one_lse.get())


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("scale", [-0.1, 0.0])
@pytest.mark.parametrize("D", [64, 256])
@pytest.mark.parametrize("recipe", ["int8-fast", "int8", "paper-int8"])
def test_scale_that_is_not_positive(recipe: str, D: int, scale: float, kernel: str) -> None:
    """The largest exponent is then not the largest score's, and a hidden score times 0 must stay hidden."""
    case = sts.Case(H=4, Hkv=2, Sq=200, Sk=300, D=D, dtype="float16", is_causal=True, scale=scale)
    qkv, out, lse = quantize_and_attend(case, R[recipe], kernel)
    check_against_model(qkv, case, case.problem(R[recipe]), out, lse, ROUNDING[kernel])


@pytest.mark.filterwarnings("error:ExternalStream:DeprecationWarning")
def test_torch_tensors_are_used_in_place() -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")
    q, k, v = (torch.randn(2, 3, 200, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        out, lse = intfa.attention(q, k, v, return_lse=True)
        target = torch.full_like(q, float("nan"))
        assert intfa.attention(q, k, v, out=target) is target
    stream.synchronize()
    assert out.dtype == q.dtype and out.device == q.device and lse.dtype == torch.float32
    exact = torch.nn.functional.scaled_dot_product_attention(q.float(), k.float(), v.float())
    assert float((out.float() - exact).norm() / exact.norm()) < 0.03
    assert torch.equal(out, target)


@pytest.mark.parametrize("name", ["int8", "int8-fast", "paper-int8", "half-int8"])
def test_arrays_of_the_host_can_be_sent_to_a_kernel(name: str) -> None:
    """A plain QuantizedQKV is uploaded; the kernel and the model agree on it."""
    case = sts.Case(B=2, H=4, Hkv=2, Sq=130, Sk=200, D=64)
    qkv = intfa.quantize_qkv(*case.logical(), recipe=name, backend="numpy")
    out, lse = intfa.attention_quantized(qkv, return_lse=True, backend="wmma")
    assert isinstance(out, np.ndarray)
    check_against_model(qkv, case, case.problem(R[name]), out, lse)
