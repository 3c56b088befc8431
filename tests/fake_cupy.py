"""The little of CuPy that intfa_cupy/gpu uses, over the host shim: its launches run without a GPU.

`installed` puts it in CuPy's place. Arrays lie in the shim's memory with exact bounds, so that a launch with
too small a buffer, too little shared memory or a wrong grid fails here as it would on a device, but louder.
"""

from __future__ import annotations

import contextlib
import functools
import math
import re
import sys
import types
from collections.abc import Iterator, Mapping
from typing import Any

import cpu_cuda
import numpy as np

from intfa_cupy import Recipe, api, dispatch, gpu, jit, tiles
from intfa_cupy.gpu import devices
from intfa_cupy.gpu.arena import Arena
from intfa_cupy.kernel_source import source_dir
from intfa_cupy.problem import Problem


class Pointer:
    """A place in an allocation (cupy.cuda.MemoryPointer)."""

    def __init__(self, memory: cpu_cuda.Memory, offset: int = 0, opened: set[int] | None = None) -> None:
        self.memory, self.offset = memory, offset
        self.opened: set[int] = set() if opened is None else opened  # where kernels may go already

    @property
    def ptr(self) -> int:
        return self.memory.address + self.offset

    def __add__(self, offset: int) -> Pointer:
        return Pointer(self.memory, self.offset + offset, self.opened)


def alloc(nbytes: int) -> Pointer:
    """Reserve memory; only the arrays made in it are accessible to kernels."""
    return Pointer(cpu_cuda.Memory(nbytes, "allocation"))


def allocate(arena: Arena) -> Pointer:
    """Stand in for Arena.allocate: kernels may go where its arrays will be, and not between them."""
    memory = alloc(max(arena.size, 1))
    for x in arena.arrays(memory).values():
        memory.opened.add(x.data.offset)
    return memory


class ndarray:
    """A NumPy view of the shim's memory that calls itself CuPy's."""

    __module__ = "cupy"
    device = types.SimpleNamespace(id=0)

    def __init__(self, shape: Any, dtype: Any = np.float32, memptr: Pointer | None = None) -> None:
        shape, dtype = tuple(np.atleast_1d(shape).tolist()), np.dtype(dtype)
        nbytes = math.prod(shape) * dtype.itemsize
        self.data = memptr or alloc(nbytes)
        if self.data.offset not in self.data.opened:
            self._open(nbytes, written=False)
        strides = tuple(dtype.itemsize * math.prod(shape[i + 1 :]) for i in range(len(shape)))
        self._view = self.data.memory.view(self.data.offset, shape, dtype, strides)

    def _open(self, nbytes: int, written: bool) -> None:
        self.data.memory.open(np.array([self.data.offset], np.int64), nbytes, written)

    def _part(self, view: np.ndarray) -> ndarray:
        memory = self.data.memory
        offset = view.__array_interface__["data"][0] - memory.address
        if not 0 <= offset < memory.nbytes:  # indices, say, made a copy
            return asarray(view)
        made = object.__new__(ndarray)
        made._view, made.data = view, Pointer(memory, offset)
        return made

    @property
    def shape(self) -> tuple[int, ...]:
        return self._view.shape

    @property
    def strides(self) -> tuple[int, ...]:
        return self._view.strides

    @property
    def dtype(self) -> np.dtype:
        return self._view.dtype

    @property
    def ndim(self) -> int:
        return self._view.ndim

    @property
    def itemsize(self) -> int:
        return self._view.itemsize

    @property
    def nbytes(self) -> int:
        return self._view.nbytes

    def __getitem__(self, index: Any) -> ndarray:
        return self._part(self._view[index])

    def __setitem__(self, index: Any, values: Any) -> None:
        self._view[index] = values._view if isinstance(values, ndarray) else values
        self._open(self.nbytes, written=True)

    def swapaxes(self, a: int, b: int) -> ndarray:
        return self._part(self._view.swapaxes(a, b))

    def transpose(self, *axes: int) -> ndarray:
        return self._part(self._view.transpose(*axes))

    def reshape(self, *shape: Any) -> ndarray:
        return self._part(self._view.reshape(*shape))

    def fill(self, value: Any) -> None:
        self[...] = value

    def astype(self, dtype: Any, copy: bool = True) -> ndarray:
        return asarray(self._view.astype(dtype))

    def get(self) -> np.ndarray:
        if self._view.size and self._view.flags.c_contiguous:
            assert self.data.memory.written(self.data.offset, self.nbytes).all(), (
                "a result was left unwritten"
            )
        return self._view.copy()


def asarray(values: Any) -> ndarray:
    """Copy to the device."""
    if isinstance(values, ndarray):
        return values
    made = ndarray(values.shape, values.dtype)
    if values.size:
        made[...] = values
    return made


def strided(values: np.ndarray, strides: tuple[int, ...] | None = None, written: bool = True) -> ndarray:
    """An array on the device that keeps its strides; what lies between its elements is out of bounds."""
    strides = values.strides if strides is None else strides
    buffer = cpu_cuda.Buffer(values.shape, values.dtype, strides, "strided", written)
    made = object.__new__(ndarray)
    made._view, made.data = buffer.view(), Pointer(buffer.memory, buffer.pointer - buffer.memory.address)
    if written:
        made._view[...] = values
    return made


class Launcher:
    """A kernel, called as cupy.RawKernel is."""

    order: Any = "ascending"

    def __init__(self, module: cpu_cuda.Module, entry: str) -> None:
        self.module, self.entry = module, entry

    def __call__(self, grid: Any, block: Any, args: Any, *, shared_mem: int = 0) -> None:
        self.module.launch(self.entry, grid, block, args, shared_mem, Launcher.order)


def _request(source: str, defines: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `cpu_cuda.build` for a source with all of its kernels."""
    path = source_dir() / f"{source}.cu"
    kernels = re.findall(
        r'extern "C" __global__ void (?:__launch_bounds__\([^)]*\) )?(\w+)\(', path.read_text()
    )
    return {"source": path, "defines": dict(sorted(defines.items())), "entries": tuple(kernels)}


def quantizer_request(recipe: Recipe, D: int, dtype: str, lse_shift: bool = True) -> dict[str, Any]:
    """What to build for a call of quantize_qkv, or of attention with `lse_shift` as it has `return_lse`."""
    return _request("quantize", gpu.quantizer_defines(recipe, D, dtype, lse_shift))


def attention_request(recipe: Recipe, D: int, dtype: str) -> dict[str, Any]:
    """What to build for a call of attention on the device that `installed` makes by default."""
    tile, reason = tiles.find("wmma", Problem(1, 1, 1, 1, 1, D, recipe), device())
    assert tile is not None, reason
    return _request(tile.entry, tile.defines(dtype))


@functools.cache
def _module(source: str, defines: tuple[tuple[str, Any], ...]) -> cpu_cuda.Module:
    return cpu_cuda.build(**_request(source, dict(defines)))


def get_function(source: str, entry: str, defines: dict[str, Any], **_: Any) -> Launcher:
    """Stand in for jit.get_function."""
    return Launcher(_module(source, tuple(sorted(defines.items()))), entry)


def device(capability: int = 80, shared_memory: int = 163 * 1024) -> tiles.Device:
    """The device that `installed` pretends to have."""
    return tiles.Device("the host shim", capability, 1, shared_memory)


def _cupy() -> types.ModuleType:
    module: Any = types.ModuleType("cupy")
    module.ndarray, module.asarray, module.empty = ndarray, asarray, ndarray
    module.cuda = types.SimpleNamespace(alloc=alloc, runtime=types.SimpleNamespace(getDevice=lambda: 0))
    return module


@contextlib.contextmanager
def installed(*of_device: int, order: Any = "ascending") -> Iterator[Any]:
    """Put the stand-in in CuPy's place and yield it; arguments as of `device`."""
    import pytest

    module = _cupy()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "cupy", module)
        patch.setattr(jit, "get_function", get_function)
        patch.setattr(gpu, "unavailable", lambda: None)
        for part in (gpu, devices):
            patch.setattr(part, "device", lambda: device(*of_device))
        patch.setattr(devices, "_kernels", {})
        patch.setattr(api, "_plans", {})
        patch.setattr(Arena, "allocate", allocate)
        patch.setattr(Launcher, "order", order)
        dispatch._gpu_problem.cache_clear()
        try:
            yield module
        finally:
            dispatch._gpu_problem.cache_clear()
