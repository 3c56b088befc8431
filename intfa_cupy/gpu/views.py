"""Arrays of any library as strided memory on the device, and results handed back as the caller's kind."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from .. import arrays

__all__ = ["View", "as_cupy", "empty_like", "hand_back", "named_dtype", "on_device", "view"]

Array = Any
Four = tuple[int, int, int, int]


@lru_cache(maxsize=16)
def named_dtype(name: str) -> np.dtype:
    """Return the dtype of a name, ml_dtypes' for bfloat16."""
    import ml_dtypes

    return np.dtype(getattr(ml_dtypes, name, name))


class View(NamedTuple):
    """(B, heads, S, D) somewhere on the device.

    Parameters
    ----------
    pointer : int
    shape, strides : tuple of int
        Strides in elements.
    dtype : str
    vector : bool
        Eight channels can be read 16 bytes at a time.
    owner : array
        Keeps the memory alive.
    """

    pointer: int
    shape: Four
    strides: Four
    dtype: str
    vector: bool
    owner: Any


@lru_cache(maxsize=1024)
def _vector(shape: Four, strides: Four, itemsize: int) -> bool:
    """Whether rows of eight channels are whole, and each begins at a multiple of 16 bytes from the first."""
    apart = (s * itemsize % 16 == 0 or n == 1 for s, n in zip(strides[:3], shape[:3], strict=True))
    return shape[3] % 8 == 0 and strides[3] == 1 and all(apart)


def view(x: Array, layout: str) -> View:
    """View an array of a call's q, k, v or out; float64 is converted first, host memory copied."""
    which = arrays.kind(x)
    if which == "torch" and x.is_cuda:
        x = x.detach()
        name = arrays.dtype_name(x)
        if name == "float64":
            x, name = x.float(), "float32"
        x = x if x.ndim == 4 and layout == "bhsd" else arrays.to_bhsd(x, layout)
        pointer, shape, strides = x.data_ptr(), tuple(x.shape), tuple(x.stride())
    else:
        if which != "cupy":
            x = _to_device(x)
        name = arrays.dtype_name(x)
        if name == "float64":
            x, name = x.astype(np.float32), "float32"
        x = x if x.ndim == 4 and layout == "bhsd" else arrays.to_bhsd(x, layout)
        size = x.itemsize
        b, h, s, d = x.strides
        pointer, shape, strides = x.data.ptr, x.shape, (b // size, h // size, s // size, d // size)
    vector = pointer % 16 == 0 and _vector(shape, strides, 4 if name == "float32" else 2)
    return View(pointer, shape, strides, name, vector, x)


def _to_device(x: Array) -> Array:
    """A CuPy array of NumPy's, JAX's or a host torch tensor's contents; JAX's GPU memory is used in place."""
    import cupy

    if arrays.kind(x) == "jax" and any(d.platform == "gpu" for d in x.devices()):
        x.block_until_ready()  # JAX has streams of its own that cannot be waited for otherwise
        if str(x.dtype) != "bfloat16":
            return cupy.from_dlpack(x)
        memory = cupy.cuda.UnownedMemory(x.unsafe_buffer_pointer(), x.nbytes, x)
        return cupy.ndarray(x.shape, np.dtype(x.dtype), cupy.cuda.MemoryPointer(memory, 0))
    return cupy.asarray(arrays.to_numpy(x))


def on_device(x: Array) -> bool:
    """Whether kernels can write to x where it is."""
    which = arrays.kind(x)
    return which == "cupy" or (which == "torch" and bool(x.is_cuda))


def empty_like(q: Array, dtype: str) -> Array:
    """Return an uninitialised array of q's shape on the device: torch's for torch on the GPU, else CuPy's."""
    dtype = "float32" if dtype == "float64" else dtype
    if arrays.kind(q) == "torch" and q.is_cuda:
        import torch

        return torch.empty(q.shape, dtype=getattr(torch, dtype), device=q.device)
    import cupy

    return cupy.ndarray(arrays.shape(q), named_dtype(dtype))


def as_cupy(x: Array) -> Array:
    """Return a CuPy view of a result's memory: of torch's as bits where CuPy lacks the type."""
    if arrays.kind(x) == "cupy":
        return x
    import cupy
    import torch

    return cupy.from_dlpack(x.view(torch.int16) if x.dtype == torch.bfloat16 else x)


def hand_back(result: Array, q: Array, dtype: str, out: Array | None = None) -> Array:
    """Turn a result on the device into q's kind, written to `out` if there is one."""
    have, want = arrays.kind(result), arrays.kind(q)
    if dtype == "float64":
        result = result.astype(np.float64) if have == "cupy" else result.double()
    if out is not None:
        return _write(out, result, q, dtype)
    if have == want:
        return result
    if want == "torch" and q.is_cuda:
        import torch

        return torch.from_dlpack(result)
    if want == "jax" and all(d.platform == "gpu" for d in q.devices()):
        import cupy
        import jax

        cupy.cuda.get_current_stream().synchronize()
        return jax.dlpack.from_dlpack(result)
    host = result.get()
    return host if want == "numpy" else arrays.like(host, q, dtype)


def _write(out: Array, result: Array, q: Array, dtype: str) -> Array:
    which = arrays.kind(out)
    if which == "numpy":
        np.copyto(out, result.get())
    elif which == "torch":
        out.copy_(result if arrays.kind(result) == "torch" else arrays.like(result.get(), q, dtype))
    else:
        out[...] = result
    return out
