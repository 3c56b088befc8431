"""Many arrays in one allocation."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

__all__ = ["Arena"]

Array = Any
_ALIGN = 256


class Arena:
    """Where arrays lie in one allocation.

    Parameters
    ----------
    *arrays : tuple of (str, tuple of int, dtype)
        Name, shape and type of each.
    """

    def __init__(self, *arrays: tuple[str, tuple[int, ...], Any]) -> None:
        self.places: dict[str, tuple[tuple[int, ...], np.dtype, int]] = {}
        self.size = 0
        for name, shape, dtype in arrays:
            self.places[name] = shape, np.dtype(dtype), self.size
            self.size += -(-math.prod(shape) * np.dtype(dtype).itemsize // _ALIGN) * _ALIGN

    def allocate(self) -> Any:
        """Return the memory, cut from CuPy's pool on the current stream."""
        import cupy

        return cupy.cuda.alloc(max(self.size, 1))

    def offset(self, name: str) -> int | None:
        """Return how far an array is from the start, None for one that is not here."""
        place = self.places.get(name)
        return None if place is None else place[2]

    def arrays(self, memory: Any) -> dict[str, Array]:
        """Return the arrays in an allocation."""
        import cupy

        make = cupy.ndarray
        return {name: make(shape, dtype, memory + at) for name, (shape, dtype, at) in self.places.items()}
