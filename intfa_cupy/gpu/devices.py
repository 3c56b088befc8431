"""The device to work on, the stream to work in, and the kernels loaded there."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from typing import Any

from .. import arrays, jit
from ..tiles import Device

__all__ = ["current", "device", "kernel", "matrix_library", "unavailable", "where"]


def unavailable() -> str | None:
    """Return why no kernel can run in this process, or None."""
    try:
        import cupy
    except ImportError:
        return 'CuPy is not installed: pip install "cupy-cuda12x[ctk]" or "cupy-cuda13x[ctk]"'
    except Exception as error:  # a broken installation fails in its own ways
        return f"CuPy cannot be imported: {error}"
    try:
        if cupy.cuda.runtime.getDeviceCount() == 0:
            return "there is no CUDA device"
        jit.nvrtc()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"there is no usable CUDA device: {error}"
    except jit.CompilerNotFoundError as error:
        return str(error)
    return None


@lru_cache(maxsize=64)
def _device(ordinal: int) -> Device:
    import cupy

    properties = cupy.cuda.runtime.getDeviceProperties(ordinal)
    return Device(
        name=properties["name"].decode(),
        capability=properties["major"] * 10 + properties["minor"],
        sms=properties["multiProcessorCount"],
        shared_memory=cupy.cuda.Device(ordinal).attributes["MaxSharedMemoryPerBlockOptin"],
    )


def current() -> int:
    """Return the number of the current device."""
    import cupy

    return int(cupy.cuda.runtime.getDevice())


def device() -> Device:
    """Return the current device."""
    return _device(current())


def matrix_library() -> Any:
    """Return CuPy where it can multiply matrices: with cuBLAS, which the kernels do without.

    Raises
    ------
    ImportError
        CuPy or cuBLAS is missing; the message holds the command that installs it.
    """
    import cupy

    try:
        import cupy.cublas
    except ImportError as error:
        cuda = cupy.cuda.runtime.runtimeGetVersion() // 1000
        wheel = f"nvidia-cublas-cu{cuda}" if cuda < 13 else "nvidia-cublas"
        raise ImportError(f"CuPy needs cuBLAS for this: pip install {wheel}") from error
    return cupy


@contextmanager
def _placed(ordinal: int, stream: Any) -> Iterator[None]:
    import cupy

    with cupy.cuda.Device(ordinal), stream:
        yield


class _Foreign:
    """A stream of another library, as CuPy takes it since version 14, whatever the other one's version."""

    def __init__(self, pointer: int) -> None:
        self.pointer = pointer

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.pointer


@lru_cache(maxsize=64)
def _adopted(pointer: int, ordinal: int) -> AbstractContextManager[Any]:
    """Return a device's stream of another library as CuPy's; it stays the other's to destroy."""
    import cupy

    adopt = getattr(cupy.cuda.Stream, "from_external", None)
    with cupy.cuda.Device(ordinal):
        found: AbstractContextManager[Any] = (
            cupy.cuda.ExternalStream(pointer, ordinal) if adopt is None else adopt(_Foreign(pointer))
        )
    return found


_HERE: AbstractContextManager[Any] = nullcontext()


def where(x: Any) -> AbstractContextManager[Any]:
    """The context in which to work on x: its device, and the stream that its library is using."""
    import cupy

    which = arrays.kind(x)
    if which == "torch" and x.is_cuda:
        import torch

        ordinal, stream = x.device.index, torch.cuda.current_stream(x.device).cuda_stream
        here = ordinal == current()
        if here and stream == cupy.cuda.get_current_stream().ptr:
            return _HERE
        found = _adopted(stream, ordinal)
        return found if here else _placed(ordinal, found)
    if which == "cupy" and x.device.id != current():
        elsewhere: AbstractContextManager[Any] = x.device
        return elsewhere
    return _HERE


_kernels: dict[Hashable, Any] = {}


def kernel(
    source: str, entry: str, key: Hashable, defines: Callable[[], dict[str, int]], smem: int = 0
) -> Any:
    """Return a kernel of the current device that can be called, compiled and loaded at the first request.

    Parameters
    ----------
    source, entry, smem
        As for :func:`intfa_cupy.jit.get_function`.
    key : hashable
        What `defines` follow from: looked up faster than the macros themselves.
    defines : callable
        Returns the macros.
    """
    place = (current(), entry, key)
    found = _kernels.get(place)
    if found is None:
        raw = jit.get_function(source, entry, defines(), smem=smem)
        # Without the look-ups that RawKernel does on every call, where there is one.
        found = _kernels[place] = getattr(raw, "kernel", raw)
    return found
