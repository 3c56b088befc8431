"""Compile kernels with NVRTC to cubins, cache them on disk, load them per device.

Why not ``cupy.RawModule(code=...)``: it appends its own ``-arch`` (never ``sm_90a``), hides the log that
tells registers and spills, and its cache key does not see included headers. NVRTC itself needs no GPU, so
:func:`compile_kernel` works on any machine; only :func:`load` and :func:`get_function` need a device.

Environment
-----------
INTFA_DUMP=DIR
    Write the inlined source, options, log, report and cubin of every kernel there.
INTFA_NO_CACHE=1
    Neither read nor write the disk cache.
INTFA_LINEINFO=1
    Compile with ``-lineinfo``: profilers and compute-sanitizer then name files and lines. Same code.
INTFA_CUDA_INCLUDE=DIRS
    Include directories of the CUDA headers, instead of searching.
CUPY_CACHE_DIR=DIR
    As for CuPy; ours is the folder ``intfa_cupy`` in it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .cuda_env import (
    CompilerNotFoundError,
    HeaderDir,
    HeaderNotFoundError,
    compiler_id,
    find_header,
    header_dirs,
    missing_header_error,
    nvrtc,
)
from .kernel_source import SourceError, inline_source, source_dir, strip_comments_fingerprint
from .ptxas import CompileReport, FunctionReport, parse_log

__all__ = [
    "CompileError",
    "CompileReport",
    "Compiled",
    "CompilerNotFoundError",
    "FunctionReport",
    "HeaderNotFoundError",
    "SharedMemoryError",
    "SourceError",
    "cache_dir",
    "compile_kernel",
    "device_arch",
    "get_function",
    "inline_source",
    "load",
    "source_dir",
    "strip_comments_fingerprint",
]

_log = logging.getLogger(__name__)

_FORMAT = 1  # of the cache entries; part of the key
_BASE_OPTIONS = (
    "--std=c++17",
    "--device-as-default-execution-space",  # lambdas and helpers need no __device__
    "--ptxas-options=-v",  # registers, spills and shared memory go to the log
)
_STATIC_SMEM_LIMIT = 48 * 1024  # a kernel that wants more dynamic shared memory must opt in


class CompileError(RuntimeError):
    """The compiler rejected a kernel; the message holds its log.

    Attributes
    ----------
    name : str
        The kernel source.
    options : tuple of str
        The options it was compiled with.
    log : str
        The compiler's log.
    """

    def __init__(self, name: str, options: Sequence[str], log: str) -> None:
        super().__init__(name, tuple(options), log)
        self.name = name
        self.options = tuple(options)
        self.log = log

    def __str__(self) -> str:
        return f"{self.name} does not compile ({' '.join(self.options)}):\n{self.log.strip()}"


class SharedMemoryError(RuntimeError):
    """A kernel wants more shared memory per block than the device has."""


@dataclass(frozen=True)
class Compiled:
    """One compiled kernel source.

    Attributes
    ----------
    name, arch : str
        Source file and architecture, such as ``sm_90a``.
    options : tuple of str
        All options but the include directories.
    cubin : bytes
        The binary.
    report : CompileReport
        Registers, spills, warnings.
    key : str
        Cache key.
    path : Path or None
        The cubin in the disk cache, None if it could not be kept there.
    cached : bool
        Whether it came from the disk cache.
    seconds : float
        Time that this call took.
    """

    name: str
    arch: str
    options: tuple[str, ...]
    cubin: bytes
    report: CompileReport
    key: str
    path: Path | None
    cached: bool
    seconds: float

    def __repr__(self) -> str:
        how = "cached" if self.cached else f"compiled in {self.seconds:.2f} s"
        return f"<Compiled {self.name} {self.arch} {len(self.cubin)} B, {how}>"


def compile_kernel(
    name: str,
    defines: Mapping[str, object] | None = None,
    arch: str = "sm_80",
    *,
    extra_options: Sequence[str] = (),
    root: Path | None = None,
) -> Compiled:
    """Compile a kernel source to a cubin, or take it from the disk cache.

    Parameters
    ----------
    name : str
        Source in ``cuda_src``; ``.cu`` may be left out.
    defines : mapping
        Macros. True and False become 1 and 0, None defines without a value, the rest is ``str(value)``.
        The order does not matter.
    arch : str
        ``sm_XX`` or ``sm_XXa``.
    extra_options : sequence of str
        More NVRTC options, such as ``-maxrregcount=128`` or ``--use_fast_math``.
    root : Path, optional
        Directory of the sources, for tests.

    Raises
    ------
    CompilerNotFoundError, HeaderNotFoundError
        With the pip command that helps.
    CompileError
        With the compiler's log.
    """
    start = time.perf_counter()
    name = name if name.endswith(".cu") else name + ".cu"
    source = inline_source(name, root)
    module, version = nvrtc()
    line_info = () if os.environ.get("INTFA_LINEINFO", "0") in ("", "0") else ("-lineinfo",)
    # NVRTC 12.9 and later keeps cubins of its own. From there they would come without the assembler's report.
    own_cache = ("--no-cache",) if version >= (12, 9) else ()
    options = (
        f"-arch={_arch(arch)}",
        *_BASE_OPTIONS,
        *own_cache,
        *line_info,
        *_define_options(defines or {}),
        *extra_options,
    )
    includes = header_dirs(version)
    key = _key(name, source, options, includes)

    use_cache = os.environ.get("INTFA_NO_CACHE", "0") in ("", "0")
    entry = _read(key) if use_cache else None
    path: Path | None = None
    if entry is not None:
        cubin, log, path = entry
    else:
        try:
            cubin, log = _run_nvrtc(module, version, name, source, options, includes)
        except CompileError as error:
            _dump(name, arch, key, source, options, error.log, None)
            raise
        if use_cache:
            path = _write(key, name, options, cubin, log)
    _dump(name, arch, key, source, options, log, cubin)
    return Compiled(
        name=name,
        arch=_arch(arch),
        options=options,
        cubin=cubin,
        report=parse_log(log),
        key=key,
        path=path,
        cached=entry is not None,
        seconds=time.perf_counter() - start,
    )


def _arch(arch: str) -> str:
    match = re.fullmatch(r"(?:sm_)?(\d{2,3}[af]?)", arch)
    if match is None:
        raise ValueError(f"arch must look like sm_80 or sm_90a, not {arch!r}")
    return f"sm_{match[1]}"


def _define_options(defines: Mapping[str, object]) -> tuple[str, ...]:
    options = []
    for name in sorted(defines):
        value = defines[name]
        if not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise ValueError(f"not a macro name: {name!r}")
        if value is None:
            options.append(f"-D{name}")
        else:
            options.append(f"-D{name}={int(value) if isinstance(value, bool) else value}")
    return tuple(options)


def _run_nvrtc(
    module: Any,
    version: tuple[int, int],
    name: str,
    source: str,
    options: Sequence[str],
    includes: Sequence[HeaderDir],
) -> tuple[bytes, str]:
    """The cubin and the log. CuPy releases the GIL while NVRTC works."""
    program = module.createProgram(source, name, (), ())
    try:
        try:
            module.compileProgram(program, (*options, *(f"-I{d.path}" for d in includes)))
            # CuPy drops the last byte as if it ended a string. The driver does not mind, disassemblers do.
            return bytes(module.getCUBIN(program)) + b"\0", module.getProgramLog(program).strip("\0 \n")
        except module.NVRTCError as error:
            log = module.getProgramLog(program).strip("\0 \n") or str(error)
    finally:
        module.destroyProgram(program)
    if missing := re.search(r'(?:could not|cannot) open source file "([^"]+)"', log):
        raise missing_header_error(missing[1], version)
    if "--gpu-architecture" in log:
        known = " ".join(str(a) for a in module.getSupportedArchs())
        log += f"\nNVRTC {version[0]}.{version[1]} knows {known}"
    raise CompileError(name, options, log)


# --- disk cache -------------------------------------------------------------------------------------------
#
# An entry is KEY.json, which names its cubin file by content. Both are written under another name and moved
# into place, the json last: whatever other processes do, a json that can be read names a whole cubin, or one
# whose checksum does not fit, which counts as absent.


def cache_dir() -> Path:
    """Directory of the compiled kernels."""
    base = os.environ.get("CUPY_CACHE_DIR") or os.path.expanduser("~/.cupy/kernel_cache")
    return Path(base) / "intfa_cupy"


def _key(name: str, source: str, options: Sequence[str], includes: Sequence[HeaderDir]) -> str:
    parts = [str(_FORMAT), name, source, compiler_id(), *options]
    for header in re.findall(r"^[ \t]*#[ \t]*include[ \t]*<([^>]+)>", source, re.MULTILINE):
        parts.append(f"{header} {_header_digest(header, tuple(includes))}")
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


_digests: dict[tuple[str, tuple[HeaderDir, ...]], str] = {}


def _header_digest(header: str, includes: tuple[HeaderDir, ...]) -> str:
    """Content of a CUDA header and of the files that are split off from it (cuda_fp16.hpp, crt/mma.h).

    By content and not by path, so that environments with the same CUDA share cache entries.
    """
    if (header, includes) not in _digests:
        digest = hashlib.sha256()
        stem = header.removesuffix(".h")
        for name in (header, f"{stem}.hpp", f"crt/{header}", f"crt/{stem}.hpp"):
            if path := find_header(name, includes):
                digest.update(path.read_bytes())
            digest.update(b"\0")
        _digests[header, includes] = digest.hexdigest()
    return _digests[header, includes]


def _checksum(cubin: bytes, log: str) -> str:
    return hashlib.sha256(cubin + b"\0" + log.encode()).hexdigest()


def _read(key: str) -> tuple[bytes, str, Path] | None:
    directory = cache_dir()
    try:
        meta = json.loads((directory / f"{key}.json").read_bytes())
        path = directory / Path(meta["cubin"]).name
        cubin, log = path.read_bytes(), meta["log"]
        if meta["key"] != key or meta["checksum"] != _checksum(cubin, log):
            raise ValueError("checksum")
        return cubin, log, path
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        _log.warning("cache entry %s is damaged (%s); compiling again", directory / key, error)
        return None


def _write(key: str, name: str, options: Sequence[str], cubin: bytes, log: str) -> Path | None:
    """Keep an entry; None where the cache can't be written, which costs a compile and nothing else."""
    directory = cache_dir()
    path = directory / f"{Path(name).stem}-{hashlib.sha256(cubin).hexdigest()[:32]}.cubin"
    meta = {
        "key": key,
        "name": name,
        "options": list(options),
        "cubin": path.name,
        "checksum": _checksum(cubin, log),
        "log": log,
    }
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _replace(path, cubin)
        _replace(directory / f"{key}.json", json.dumps(meta, indent=1).encode())
    except OSError as error:
        _log.info("kernel cache %s cannot be written: %s", directory, error)
        return None
    return path


_counter = itertools.count()


def _replace(path: Path, data: bytes) -> None:
    # Not mkstemp: its mode 0600 would make a cache filled by one user unreadable for the next.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.{next(_counter)}")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _dump(
    name: str, arch: str, key: str, source: str, options: Sequence[str], log: str, cubin: bytes | None
) -> None:
    target = os.environ.get("INTFA_DUMP")
    if not target:
        return
    stem = f"{Path(name).stem}-{_arch(arch)}-{key[:12]}"
    directory = Path(target)
    directory.mkdir(parents=True, exist_ok=True)
    _replace(directory / f"{stem}.cu", source.encode())
    report = "\n".join(["# options", *options, "", "# report", str(parse_log(log)), "", "# log", log])
    _replace(directory / f"{stem}.txt", report.encode())
    if cubin is not None:
        _replace(directory / f"{stem}.cubin", cubin)


# --- devices ----------------------------------------------------------------------------------------------


def device_arch(device: int | None = None, *, specific: bool = False) -> str:
    """Architecture to compile for.

    Parameters
    ----------
    device : int, optional
        Device id, the current device by default.
    specific : bool
        Ask for the architecture-specific instructions (``sm_100a``) on devices newer than Hopper as well.
        On Hopper it is always ``sm_90a``, which has wgmma.

    Raises
    ------
    CompilerNotFoundError
        If NVRTC is too old for the device and has no binary-compatible architecture either.
    """
    import cupy

    capability = int(cupy.cuda.Device(device).compute_capability)
    if capability == 90 or (specific and capability > 90):
        return f"sm_{capability}a"
    module, version = nvrtc()
    known = [int(a) for a in module.getSupportedArchs()]
    # A cubin runs on later minor versions of its major version.
    fitting = [a for a in known if a // 10 == capability // 10 and a <= capability]
    if not fitting:
        raise CompilerNotFoundError(
            f"NVRTC {version[0]}.{version[1]} does not know sm_{capability}; it needs a newer CUDA: "
            'pip install -U "cupy-cuda13x[ctk]"'
        )
    return f"sm_{max(fitting)}"


class _Once:
    """Thread-safe memo: each value is made once, and makers of different keys run side by side."""

    def __init__(self) -> None:
        self._values: dict[Hashable, Any] = {}
        self._locks: dict[Hashable, threading.Lock] = {}
        self._guard = threading.Lock()

    def __call__(self, key: Hashable, make: Callable[[], Any]) -> Any:
        try:
            return self._values[key]
        except KeyError:
            pass
        with self._guard:
            lock = self._locks.setdefault(key, threading.Lock())
        with lock:
            if key not in self._values:
                self._values[key] = make()
            return self._values[key]


_compiled = _Once()
_modules = _Once()
_functions = _Once()
_arches = _Once()
_smem_limits: dict[Hashable, int] = {}
_smem_lock = threading.Lock()
_private_dir: tempfile.TemporaryDirectory[str] | None = None
_private_lock = threading.Lock()


def load(compiled: Compiled) -> Any:
    """``cupy.RawModule`` of a compiled kernel on the current device, loaded once per device."""
    import cupy

    def make() -> Any:
        # From a path: given code, RawModule would compile it for an architecture of its own choice.
        return cupy.RawModule(path=str(_cubin_path(compiled)))

    return _modules((cupy.cuda.runtime.getDevice(), compiled.key), make)


def _cubin_path(compiled: Compiled) -> Path:
    """A file that holds the cubin; a private one where the cache has none."""
    global _private_dir
    if compiled.path is not None and compiled.path.is_file():
        return compiled.path
    with _private_lock:
        if _private_dir is None:
            _private_dir = tempfile.TemporaryDirectory(prefix="intfa_cupy-")
        directory = Path(_private_dir.name)
    path = directory / f"{Path(compiled.name).stem}-{hashlib.sha256(compiled.cubin).hexdigest()[:32]}.cubin"
    if not path.is_file():
        _replace(path, compiled.cubin)
    return path


def get_function(
    name: str,
    entry: str,
    defines: Mapping[str, object] | None = None,
    arch: str | None = None,
    smem: int = 0,
    *,
    extra_options: Sequence[str] = (),
    root: Path | None = None,
) -> Any:
    """Kernel ``entry`` of source ``name``, ready to launch on the current device.

    Compiled and loaded at the first call, then found in a dictionary; threads may call it freely.

    Parameters
    ----------
    name, defines, extra_options, root
        As for :func:`compile_kernel`.
    entry : str
        An ``extern "C"`` function of the source.
    arch : str, optional
        :func:`device_arch` by default.
    smem : int
        Dynamic shared memory of the launch in bytes; above 48 KiB the kernel is opted in to it.

    Returns
    -------
    cupy.RawKernel
    """
    import cupy

    device = cupy.cuda.runtime.getDevice()
    if arch is None:
        arch = _arches(device, lambda: device_arch(device))
    source_key = (name, _define_options(defines or {}), arch, tuple(extra_options), root)
    key = (device, entry, source_key)

    def make() -> Any:
        compiled: Compiled = _compiled(
            source_key,
            lambda: compile_kernel(name, defines, arch, extra_options=extra_options, root=root),
        )
        entries = [e.name for e in compiled.report.entries]
        if entry not in entries:
            raise KeyError(f"{compiled.name} has no entry {entry!r} with these defines; it has {entries}")
        return load(compiled).get_function(entry)

    kernel = _functions(key, make)
    if smem > _STATIC_SMEM_LIMIT and smem > _smem_limits.get(key, 0):
        with _smem_lock:
            if smem > _smem_limits.get(key, 0):
                _allow_smem(cupy, kernel, entry, device, smem)
                _smem_limits[key] = smem
    return kernel


def _allow_smem(cupy: Any, kernel: Any, entry: str, device: int, smem: int) -> None:
    limit = cupy.cuda.Device(device).attributes.get("MaxSharedMemoryPerBlockOptin", 0)
    if limit and smem + kernel.shared_size_bytes > limit:
        raise SharedMemoryError(
            f"{entry} needs {smem} bytes of dynamic and {kernel.shared_size_bytes} of static shared memory "
            f"per block; device {device} allows {limit}"
        )
    kernel.max_dynamic_shared_size_bytes = smem
