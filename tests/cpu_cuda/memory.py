"""Buffers in the runtime's global memory: every byte outside of an array's elements is out of bounds."""

from __future__ import annotations

import ctypes
import math
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .toolchain import runtime


def contiguous(shape: Sequence[int], itemsize: int) -> tuple[int, ...]:
    """Return the strides of a C-contiguous array."""
    return tuple(itemsize * math.prod(shape[i + 1 :]) for i in range(len(shape)))


class Memory:
    """Reserved addresses. Kernels may touch what `open` has opened, and nothing else.

    Parameters
    ----------
    nbytes : int
        Size; only what is opened costs memory.
    name : str
        Name in error messages.

    Attributes
    ----------
    address : int
        Of the first byte; a multiple of 16384.
    """

    def __init__(self, nbytes: int, name: str) -> None:
        self.nbytes = max(nbytes, 1)
        self.address: int = runtime().cpu_cuda_reserve(self.nbytes, name.encode())
        if self.address is None:
            raise MemoryError(f"no room for {nbytes} bytes")
        weakref.finalize(self, runtime().cpu_cuda_release, self.address)

    def open(self, offsets: npt.NDArray[np.int64], nbytes: int, written: bool) -> None:
        """Open runs of bytes that start at some offsets; what is not written is all ones."""
        runtime().cpu_cuda_open(self.address, offsets.ctypes.data, offsets.size, nbytes, int(written))
        if not written:
            for offset in offsets.tolist():
                ctypes.memset(self.address + offset, 0xFF, nbytes)

    def written(self, offset: int, nbytes: int) -> npt.NDArray[np.bool_]:
        """Say which bytes hold values."""
        flags = np.empty(nbytes, np.bool_)
        runtime().cpu_cuda_written(self.address + offset, nbytes, flags.ctypes.data)
        return flags

    def view(
        self, offset: int, shape: Sequence[int], dtype: npt.DTypeLike, strides: Sequence[int]
    ) -> npt.NDArray[Any]:
        """View opened memory as an array, which keeps this object alive."""
        if math.prod(shape) == 0:
            return np.empty(shape, dtype)
        memory = (ctypes.c_char * self.nbytes).from_address(self.address)
        memory.owner = self  # type: ignore[attr-defined]
        return np.ndarray(shape, dtype, memory, offset, strides)


class Buffer:
    """An array in global memory.

    Parameters
    ----------
    shape : sequence of int
        Shape.
    dtype : dtype
        Element type.
    strides : sequence of int, optional
        Strides in bytes; they may leave gaps of any size, which cost nothing and which no kernel may touch.
    name : str
        Name in error messages.
    written : bool
        Whether the elements hold values yet; reading one that does not is an error.

    Attributes
    ----------
    pointer : int
        Address of the first element.
    """

    def __init__(
        self,
        shape: Sequence[int],
        dtype: npt.DTypeLike,
        strides: Sequence[int] | None = None,
        name: str = "array",
        written: bool = False,
    ) -> None:
        self.shape = tuple(shape)
        self.dtype = np.dtype(dtype)
        itemsize = self.dtype.itemsize
        self.strides = contiguous(self.shape, itemsize) if strides is None else tuple(strides)
        reach = [(max(n, 1) - 1) * s for n, s in zip(self.shape, self.strides, strict=True)]
        before = -sum(min(r, 0) for r in reach)
        self.memory = Memory(before + sum(max(r, 0) for r in reach) + itemsize, name)
        self.pointer = self.memory.address + before
        if math.prod(self.shape) == 0:
            return
        # Trailing dimensions without gaps are one run of bytes.
        run, outer = itemsize, len(self.shape)
        while outer and (self.strides[outer - 1] == run or self.shape[outer - 1] == 1):
            run *= self.shape[outer - 1]
            outer -= 1
        offsets = np.full((1,), before, np.int64)
        for n, stride in zip(self.shape[:outer], self.strides[:outer], strict=True):
            offsets = (offsets[:, None] + np.arange(n, dtype=np.int64) * stride).reshape(-1)
        self.memory.open(offsets, run, written)

    def view(self) -> npt.NDArray[Any]:
        """View the memory itself."""
        return self.memory.view(self.pointer - self.memory.address, self.shape, self.dtype, self.strides)

    def numpy(self) -> npt.NDArray[Any]:
        """Copy the elements to an ordinary array."""
        return self.view().copy()

    def written(self) -> npt.NDArray[np.bool_]:
        """Say of each element whether all its bytes hold a value."""
        size = self.dtype.itemsize
        first = self.pointer - self.memory.address
        if self.strides == contiguous(self.shape, size) and math.prod(self.shape):
            return self.memory.written(first, self.memory.nbytes).reshape(*self.shape, size).all(axis=-1)
        result = np.empty(self.shape, np.bool_)
        for index in np.ndindex(*self.shape):
            offset = first + sum(i * s for i, s in zip(index, self.strides, strict=True))
            result[index] = self.memory.written(offset, size).all()
        return result


def array(values: npt.ArrayLike, name: str = "array", strides: Sequence[int] | None = None) -> Buffer:
    """Copy an array to global memory, contiguously or with the strides given (in bytes)."""
    source = np.asarray(values)
    buffer = Buffer(source.shape, source.dtype, strides, name, written=True)
    buffer.view()[...] = source
    return buffer


def empty(
    shape: int | Sequence[int],
    dtype: npt.DTypeLike,
    name: str = "array",
    strides: Sequence[int] | None = None,
) -> Buffer:
    """Make an array without values: its bits are all set, and reading what no kernel wrote is an error."""
    return Buffer((shape,) if isinstance(shape, int) else shape, dtype, strides, name)
