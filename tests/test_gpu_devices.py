"""What the GPU package asks of CuPy and of the libraries beside it, by version."""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest

from intfa_cupy.gpu import devices, matrix_library


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """CuPy's part in streams; ``entered`` lists the devices that are current."""
    module: Any = types.ModuleType("cupy")
    module.entered = []

    @contextlib.contextmanager
    def device(ordinal: int) -> Iterator[None]:
        module.entered.append(ordinal)
        yield
        module.entered.pop()

    runtime = types.SimpleNamespace(runtimeGetVersion=lambda: 12090)
    module.cuda = types.SimpleNamespace(Device=device, Stream=type("Stream", (), {}), runtime=runtime)
    monkeypatch.setitem(sys.modules, "cupy", module)
    devices._adopted.cache_clear()
    yield module
    devices._adopted.cache_clear()


def test_cupy_13_adopts_a_stream_by_its_pointer(cupy: Any) -> None:
    cupy.cuda.ExternalStream = lambda pointer, ordinal: ("external", pointer, ordinal)
    assert devices._adopted(1234, 1) == ("external", 1234, 1)


def test_cupy_14_adopts_a_stream_by_the_protocol(cupy: Any) -> None:
    """On its own device, and once: a stream that CuPy let go of is still the other library's."""
    made = []

    def from_external(stream: Any) -> Any:
        made.append((*stream.__cuda_stream__(), *cupy.entered))
        return object()

    cupy.cuda.Stream.from_external = staticmethod(from_external)
    first = devices._adopted(1234, 1)
    assert devices._adopted(1234, 1) is first is not devices._adopted(1234, 0)
    assert made == [(0, 1234, 1), (0, 1234, 0)] and cupy.entered == []


@pytest.mark.parametrize(("cuda", "wheel"), [(12090, "nvidia-cublas-cu12"), (13000, "nvidia-cublas")])
def test_missing_cublas_comes_with_the_command(cupy: Any, cuda: int, wheel: str) -> None:
    cupy.cuda.runtime.runtimeGetVersion = lambda: cuda
    with pytest.raises(ImportError, match=rf"needs cuBLAS for this: pip install {wheel}$"):
        matrix_library()


def test_cublas_is_found(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cupy.cublas = types.ModuleType("cupy.cublas")
    monkeypatch.setitem(sys.modules, "cupy.cublas", cupy.cublas)
    assert matrix_library() is cupy
