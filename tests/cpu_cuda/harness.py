"""Launches kernels on the host and turns what the runtime finds into exceptions."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .memory import Buffer
from .toolchain import DYNAMIC_SHARED_BYTES, Built, compile_kernels, runtime, unavailable

__all__ = ["Module", "build", "build_all", "unavailable"]

Order = Literal["ascending", "descending"] | int
#: When asynchronous work is done: when somebody waits for it, or at once.
Asynchronous = Literal["late", "early"]
Dim = int | Sequence[int]


class KernelError(RuntimeError):
    """A kernel did something it must not."""


class OutOfBoundsError(KernelError):
    """An access outside of every buffer, or outside of shared memory."""


class DataRaceError(KernelError):
    """Two threads touched a byte, one of them writing, without a barrier in between."""


class UninitialisedError(KernelError):
    """A read of memory that nobody wrote."""


class DivergenceError(KernelError):
    """Threads wait for each other at different places."""


class UndefinedBehaviourError(KernelError):
    """Undefined behaviour of C++ or misuse of a CUDA function."""


class UnsupportedError(KernelError):
    """The shim gives up."""


_FAULTS: dict[int, type[KernelError]] = {
    1: OutOfBoundsError,
    2: DataRaceError,
    3: UninitialisedError,
    4: DivergenceError,
    5: UndefinedBehaviourError,
    6: UnsupportedError,
}
_ORDERS = {"ascending": 0, "descending": 1}


class _SharedVariable(ctypes.Structure):
    _fields_ = [("name", ctypes.c_char_p), ("offset", ctypes.c_uint64), ("bytes", ctypes.c_uint64)]


class _Launch(ctypes.Structure):
    """struct Launch of runtime/runtime.h."""

    _fields_ = [
        ("entry", ctypes.c_void_p),
        ("arguments", ctypes.c_void_p),
        ("shared_base", ctypes.c_void_p),
        ("shared_bytes", ctypes.c_uint64),
        ("shared_variables", ctypes.c_void_p),
        ("shared_variable_count", ctypes.c_uint64),
        ("seed", ctypes.c_uint64),
        ("access_limit", ctypes.c_uint64),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("order", ctypes.c_uint32),
        ("uninitialised_shared_is_a_fault", ctypes.c_uint32),
        ("races_are_faults", ctypes.c_uint32),
        ("asynchronous_is_late", ctypes.c_uint32),
        ("accesses", ctypes.c_uint64),
        ("fault_pc", ctypes.c_uint64),
        ("fault", ctypes.c_int),
        ("message", ctypes.c_char * 1024),
    ]


# The runtime runs one launch at a time.
_LOCK = threading.Lock()


def _dim3(value: Dim) -> tuple[int, int, int]:
    sizes = (value,) if isinstance(value, int) else tuple(value)
    x, y, z = (*sizes, 1, 1)[:3]
    return x, y, z


class Module:
    """Kernels built for the host. Made by `build`."""

    def __init__(self, built: Built, entries: Mapping[str, str]) -> None:
        runtime()
        self._built = built
        self._library = ctypes.CDLL(str(built.library))
        self._library.cpu_cuda_locate.restype = ctypes.c_void_p
        self._entries = dict(entries)

    def _parameter_sizes(self, entry: str) -> list[int]:
        function = self._library[f"cpu_cuda_sizes_{entry}"]
        function.restype = ctypes.POINTER(ctypes.c_size_t)
        sizes = function()
        result: list[int] = []
        while sizes[len(result)] != 0:
            result.append(sizes[len(result)])
        return result

    def launch(
        self,
        entry: str,
        grid: Dim,
        block: Dim,
        args: Sequence[Any],
        smem: int = 0,
        order: Order = "ascending",
        check_uninitialised_shared: bool = True,
        check_races: bool = True,
        asynchronous: Asynchronous = "late",
        access_limit: int = 1 << 32,
    ) -> int:
        """Run a kernel to its end.

        Parameters
        ----------
        entry : str
            The kernel.
        grid, block : int or sequence of int
            Blocks of the grid, threads of a block.
        args : sequence
            `Buffer` for a pointer, NumPy scalars and structures by value, Python numbers.
        smem : int
            Bytes of dynamic shared memory.
        order : {"ascending", "descending"} or int
            The order in which blocks, and warps and lanes between two barriers, run; a number is the seed of
            a random one.
        check_uninitialised_shared : bool
            Whether reading shared memory that nobody wrote is an error. The memory is all ones if not.
        check_races : bool
            Whether accesses by two threads without a barrier between them are an error.
        asynchronous : {"late", "early"}
            When asynchronous copies and products are done: when somebody waits for them, or at once.
        access_limit : int
            Memory accesses after which the kernel is taken to run for ever.

        Returns
        -------
        int
            Accesses to global and shared memory.

        Raises
        ------
        KernelError
            If the kernel did something it must not.
        """
        if not 0 <= smem <= DYNAMIC_SHARED_BYTES:
            raise ValueError(f"no block may have {smem} bytes of dynamic shared memory")
        threads = np.prod(_dim3(block))
        if not 1 <= threads <= 1024:
            raise ValueError(f"no block may have {threads} threads")
        values = self._marshal(entry, args)
        pointers = (ctypes.c_void_p * max(len(values), 1))(*(ctypes.addressof(v) for v in values))
        with _LOCK:
            shared = [
                _SharedVariable(s.name.encode(), s.offset, smem if s.dynamic else s.size)
                for s in self._built.shared
            ]
            variables = (_SharedVariable * max(len(shared), 1))(*shared)
            request = _Launch(
                entry=ctypes.cast(self._library[f"cpu_cuda_call_{entry}"], ctypes.c_void_p),
                arguments=ctypes.addressof(pointers),
                shared_base=self._library.cpu_cuda_locate() - self._built.anchor_offset,
                shared_bytes=self._built.block_bytes,
                shared_variables=ctypes.addressof(variables),
                shared_variable_count=len(shared),
                seed=order if isinstance(order, int) else 0,
                access_limit=access_limit,
                grid=_dim3(grid),
                block=_dim3(block),
                order=_ORDERS[order] if isinstance(order, str) else 2,
                uninitialised_shared_is_a_fault=int(check_uninitialised_shared),
                races_are_faults=int(check_races),
                asynchronous_is_late=int(asynchronous == "late"),
            )
            fault = runtime().cpu_cuda_launch(ctypes.byref(request))
        if fault:
            where = self._source_line(request.fault_pc) if request.fault_pc else ""
            text = f"{entry}: {request.message.decode()}{where}"
            raise _FAULTS.get(fault, KernelError)(text)
        return int(request.accesses)

    def _marshal(self, entry: str, args: Sequence[Any]) -> list[Any]:
        sizes = self._parameter_sizes(entry)
        if len(sizes) != len(args):
            raise TypeError(f"{entry} has {len(sizes)} parameters, not {len(args)}")
        values = []
        for number, (size, value) in enumerate(zip(sizes, args, strict=True)):
            if isinstance(value, Buffer):
                data = value.pointer.to_bytes(8, "little")
            elif isinstance(value, (bool, int)):
                data = int(value).to_bytes(size, "little", signed=value < 0)
            elif isinstance(value, float):
                data = (np.float32 if size == 4 else np.float64)(value).tobytes()
            else:
                data = value.tobytes()
            if len(data) != size:
                raise TypeError(f"parameter {number} of {entry} has {size} bytes, not {len(data)}")
            # Aligned for any parameter.
            store = (ctypes.c_longdouble * (size // 16 + 1))()
            ctypes.memmove(store, data, size)
            values.append(store)
        return values

    def _source_line(self, address: int) -> str:
        """Name the source line of an address in the library."""
        locate = ctypes.cast(self._library.cpu_cuda_locate, ctypes.c_void_p).value or 0
        offset = address - (locate - self._built.locate_offset) - 1
        if offset < 0 or shutil.which("addr2line") is None:
            return ""
        command = ["addr2line", "-s", "-e", str(self._built.library), hex(offset)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        line = done.stdout.strip().split(" ")[0]
        return "" if done.returncode or line.startswith("??") else f" ({line})"


def build(
    source: Path | str,
    defines: Mapping[str, object] | None = None,
    entries: Mapping[str, str] | Iterable[str] = (),
    include: Sequence[Path] = (),
    flags: Sequence[str] = (),
) -> Module:
    """Build kernels for the host.

    Parameters
    ----------
    source : Path or str
        A file, or the source itself.
    defines : mapping, optional
        Macros; None for one without a value.
    entries : iterable of str, or mapping
        The kernels' names; or names and the C++ expressions they stand for, such as ``scale<float>``.
    include : sequence of Path
        Folders of headers beside the source's own.
    flags : sequence of str
        More compiler flags.
    """
    names = dict(entries) if isinstance(entries, Mapping) else {name: name for name in entries}
    return Module(compile_kernels(source, defines or {}, names, include, flags), names)


def build_all(requests: Iterable[Mapping[str, Any]], workers: int = 2) -> list[Module]:
    """Build several modules side by side; each request holds the arguments of `build`."""
    runtime()
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(lambda request: build(**request), requests))
