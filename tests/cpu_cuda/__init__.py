"""Runs CUDA kernels on a machine without a GPU, to check them rather than to be fast.

The kernel's source is compiled unmodified by g++ against the headers in ``include``; every CUDA thread
becomes a fibre of ``runtime``. Reported as errors: accesses outside of a buffer or of shared memory, to bytes
never written, by two threads without a barrier between them; threads that wait for each other in different
places; undefined behaviour of C++.

Use::

    module = build(Path("kernel.cu"), {"D": 64}, entries=["kernel"])
    x = array(np.arange(64, dtype=np.float32), "x")
    module.launch("kernel", grid=1, block=64, args=[x, 64], order="descending")
    print(x.numpy())
"""

from pathlib import Path

from .harness import (
    DataRaceError,
    DivergenceError,
    KernelError,
    Module,
    OutOfBoundsError,
    UndefinedBehaviourError,
    UninitialisedError,
    UnsupportedError,
    build,
    build_all,
    unavailable,
)
from .memory import Buffer, Memory, array, empty

#: The kernels that the shim's own tests run.
KERNELS = Path(__file__).parent / "kernels"

__all__ = [
    "KERNELS",
    "Buffer",
    "DataRaceError",
    "DivergenceError",
    "KernelError",
    "Memory",
    "Module",
    "OutOfBoundsError",
    "UndefinedBehaviourError",
    "UninitialisedError",
    "UnsupportedError",
    "array",
    "build",
    "build_all",
    "empty",
    "unavailable",
]
