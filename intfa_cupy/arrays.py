"""What kind of array came in, and how to hand the same kind back.

NumPy, CuPy, torch and JAX arrays are told apart by their type's module, so that none of the
three optional libraries is imported for a user who does not use it.
"""

from __future__ import annotations

import sys
from functools import lru_cache
from typing import Any

import ml_dtypes
import numpy as np

__all__ = [
    "FLOATING",
    "check_floating",
    "dtype_name",
    "floating_name",
    "from_bhsd",
    "kind",
    "like",
    "module_of",
    "shape",
    "squeeze_lse",
    "to_bhsd",
    "to_numpy",
    "write",
]

#: Input dtypes of the operator.
FLOATING = ("float16", "bfloat16", "float32", "float64")
_KINDS = {"numpy": "numpy", "cupy": "cupy", "torch": "torch", "jax": "jax", "jaxlib": "jax"}


def kind(x: Any) -> str | None:
    """Return ``"numpy"``, ``"cupy"``, ``"torch"`` or ``"jax"``; None for anything else."""
    return _kind_of(type(x))  # type: ignore[arg-type]  # mypy does not take a class for hashable


@lru_cache(maxsize=256)
def _kind_of(cls: type) -> str | None:
    if issubclass(cls, np.ndarray):
        return "numpy"
    for base in cls.__mro__:
        found = _KINDS.get(base.__module__.partition(".")[0])
        if found is not None and hasattr(cls, "dtype") and hasattr(cls, "shape"):
            return found
    return None


def module_of(x: Any) -> Any:
    """Return NumPy, or CuPy for a CuPy array: the module whose functions make arrays like x."""
    return sys.modules["cupy"] if kind(x) == "cupy" else np


def shape(x: Any) -> tuple[int, ...]:
    """Return an array's shape as a tuple of ints."""
    return tuple(int(n) for n in x.shape)


def dtype_name(x: Any) -> str:
    """Return NumPy's name of an array's dtype (``"float16"`` for ``torch.float16``)."""
    return _name_of(x.dtype)


@lru_cache(maxsize=256)
def _name_of(dtype: Any) -> str:
    # NumPy would work it out anew at every call.
    return str(dtype).removeprefix("torch.")


def floating_name(name: str, dtype: Any) -> str:
    """Return NumPy's name of a dtype that the operator can return.

    Raises
    ------
    ValueError
        Names the argument, what came and what is allowed.
    """
    try:
        found = str(np.dtype(dtype))
    except TypeError:
        found = str(dtype).removeprefix("torch.")
    if dtype is None or found not in FLOATING:
        raise ValueError(f"{name} must be one of {', '.join(FLOATING)}; got {dtype!r}")
    return found


def check_floating(name: str, x: Any, like: Any = None) -> Any:
    """Return x if it is an array of a floating dtype that the operator takes.

    Parameters
    ----------
    name : str
        The argument, for the message.
    x : object
    like : array, optional
        Another argument, ``q``, whose kind and dtype x must have.

    Raises
    ------
    TypeError
        Names the argument, what came and what is allowed.
    """
    if kind(x) is None:
        raise TypeError(f"{name} must be a NumPy, CuPy, torch or JAX array, got {type(x).__name__}")
    if dtype_name(x) not in FLOATING:
        raise TypeError(f"{name} must have a dtype of {', '.join(FLOATING)}; got {dtype_name(x)}")
    if like is not None:
        if kind(x) != kind(like):
            raise TypeError(f"{name} must be a {kind(like)} array as q is, got a {kind(x)} array")
        if dtype_name(x) != dtype_name(like):
            raise TypeError(f"{name} must have q's dtype {dtype_name(like)}, got {dtype_name(x)}")
    return x


def to_numpy(x: Any) -> np.ndarray:
    """Return x as a NumPy array on the host, without a copy where that is possible."""
    which = kind(x)
    if which == "cupy":
        return x.get()
    if which == "torch":
        import torch

        x = x.detach().cpu()
        if x.dtype == torch.bfloat16:  # NumPy has no bfloat16 of its own: same bits, other name
            return x.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return x.numpy()
    return np.asarray(x)


def like(result: np.ndarray, x: Any, dtype: str) -> Any:
    """Return a NumPy result as an array of x's kind, on x's device, with the named dtype.

    float16 saturates: a rounded P can carry an output past the largest V by a fraction of a percent,
    and near 65504 that must not become an infinity.
    """
    if dtype == "float16":
        result = np.clip(result, -65504, 65504)
    result = result.astype(np.dtype(getattr(ml_dtypes, dtype, dtype)), copy=False)
    which = kind(x)
    if which == "cupy":
        import cupy

        return cupy.asarray(result)
    if which == "torch":
        import torch

        if dtype == "bfloat16":
            return torch.from_numpy(result.view(np.int16)).view(torch.bfloat16).to(x.device)
        return torch.from_numpy(result).to(x.device)
    if which == "jax":
        import jax

        return jax.device_put(result, next(iter(x.devices())))
    return result


def write(out: Any, result: np.ndarray, q: Any) -> Any:
    """Copy a NumPy result into the caller's ``out`` and return it."""
    if kind(out) == "torch":
        out.copy_(like(result, q, dtype_name(out)))
    elif kind(out) == "cupy":
        out[...] = like(result, q, dtype_name(out))
    else:
        np.copyto(out, like(result, q, dtype_name(out)))
    return out


def to_bhsd(x: Any, layout: str) -> Any:
    """Return a view (B, heads, S, D) of an array with 2, 3 or 4 dimensions in a layout."""
    if x.ndim == 2:
        return x[None, None]
    if x.ndim == 3:
        x = x[None]
    return x.swapaxes(1, 2) if layout == "bshd" else x


def from_bhsd(x: Any, layout: str, ndim: int) -> Any:
    """Undo :func:`to_bhsd`."""
    if ndim == 2:
        return x[0, 0]
    if layout == "bshd":
        x = x.swapaxes(1, 2)
    return x[0] if ndim == 3 else x


def squeeze_lse(lse: Any, ndim: int) -> Any:
    """Drop from lse (B, H, Sq) the dimensions that q with ``ndim`` lacks."""
    return lse[0, 0] if ndim == 2 else lse[0] if ndim == 3 else lse
