"""Asynchronous work on the host shim: what it comes to, and planted mistakes that must be noticed."""

from __future__ import annotations

from typing import Any

import cpu_cuda
import numpy as np
import pytest

pytestmark = pytest.mark.skipif(cpu_cuda.unavailable() is not None, reason=str(cpu_cuda.unavailable()))

SCHEDULES = [(order, when) for order in ("ascending", "descending", 5) for when in ("late", "early")]


@pytest.fixture(scope="module")
def kernels() -> cpu_cuda.Module:
    names = ("product", "transfer")
    return cpu_cuda.build(cpu_cuda.KERNELS / "asynchronous.cu", entries=names)


class Call:
    """One kernel with its operands and the result that is right."""

    def __init__(self, entry: str) -> None:
        self.entry = entry
        rng = np.random.default_rng(0)
        if entry == "product":
            a, b = (rng.integers(-128, 128, (rows, 128)).astype(np.int8) for rows in (64, 128))
            self.inputs, self.threads, self.smem = [a, b], 128, 192 * 128
            self.expected = a.astype(np.int32) @ b.T.astype(np.int32)
        else:
            self.inputs, self.threads, self.smem = [np.arange(132, dtype=np.int32)], 64, 16 + 256
            self.expected = np.arange(128, dtype=np.int32)

    def run(self, kernels: cpu_cuda.Module, bad: int, order: Any, when: Any) -> np.ndarray:
        out = cpu_cuda.empty(self.expected.shape, np.int32, "out")
        arguments = [*(cpu_cuda.array(x) for x in self.inputs), out, bad]
        kernels.launch(
            self.entry, 1, self.threads, arguments, self.smem, order, check_races=False, asynchronous=when
        )
        return out.numpy()


@pytest.mark.parametrize(("order", "when"), SCHEDULES)
@pytest.mark.parametrize("entry", ["product", "transfer"])
def test_right_under_every_schedule(kernels: cpu_cuda.Module, entry: str, order: Any, when: Any) -> None:
    call = Call(entry)
    np.testing.assert_array_equal(call.run(kernels, 0, order, when), call.expected)


@pytest.mark.parametrize(
    ("entry", "bad", "error", "message"),
    [
        ("product", 1, cpu_cuda.UndefinedBehaviourError, "a product without a fence"),
        ("transfer", 1, cpu_cuda.DivergenceError, "a barrier in memory at asynchronous.cu"),
        ("transfer", 2, cpu_cuda.UndefinedBehaviourError, "one arrival too many"),
        ("transfer", 3, cpu_cuda.UndefinedBehaviourError, "multiple of 16 bytes"),
        ("transfer", 4, cpu_cuda.UninitialisedError, "byte 16 of shared"),
        ("transfer", 5, cpu_cuda.DivergenceError, "threads 1-63: a barrier in memory"),
    ],
)
def test_planted_mistake_is_reported(
    kernels: cpu_cuda.Module, entry: str, bad: int, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Call(entry).run(kernels, bad, "ascending", "late")


@pytest.mark.parametrize("bad", [2, 3], ids=["operand is overwritten", "result is read too soon"])
def test_late_products_come_out_wrong_without_their_wait(kernels: cpu_cuda.Module, bad: int) -> None:
    call = Call("product")
    assert (call.run(kernels, bad, "ascending", "late") != call.expected).any()
    if bad == 3:
        np.testing.assert_array_equal(call.run(kernels, bad, "ascending", "early"), call.expected)
