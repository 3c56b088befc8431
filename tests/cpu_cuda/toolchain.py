"""Compiles the runtime and kernels into shared libraries, once for each content."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
COMPILER = os.environ.get("CPU_CUDA_CXX", "g++")
COMMON = ("-std=c++17", "-fPIC", "-g1", "-gdwarf-4", "-Wall", "-Wextra")
RUNTIME = ("-O3", *os.environ.get("CPU_CUDA_RUNTIME_FLAGS", "").split())
# -fsanitize=thread only adds a call before each load and store: the runtime implements those calls, and those
# of -fsanitize=undefined, so that neither sanitizer's own library is needed.
KERNEL = (
    "-O1",
    "-Wno-unknown-pragmas",
    "-fno-exceptions",
    "-fno-rtti",
    "-fno-strict-aliasing",
    "-fno-extern-tls-init",
    "-ffp-contract=off",
    "-fsanitize=thread,undefined,float-cast-overflow",
    "-fno-sanitize=vptr",
    "-fno-sanitize-recover=all",
)
# The most dynamic shared memory a block may have on any architecture, and a red zone behind it.
DYNAMIC_SHARED_BYTES = 227 * 1024
RED_ZONE_BYTES = 16 * 1024
# Builds older than this are removed from the cache by the next one.
KEEP_SECONDS = 7 * 24 * 3600


class BuildError(RuntimeError):
    """The compiler refused a source. The message is the compiler's own."""


def unavailable() -> str | None:
    """Say why kernels cannot be built here, or return None."""
    if not sys.platform.startswith("linux"):
        return "the host shim for CUDA kernels needs Linux"
    if platform.machine() not in ("x86_64", "aarch64"):
        return f"the host shim for CUDA kernels has not been tried on {platform.machine()}"
    for tool in (COMPILER, "readelf"):
        if shutil.which(tool) is None:
            return f"the host shim for CUDA kernels needs {tool}"
    return None


def run(command: Sequence[str | os.PathLike[str]]) -> str:
    """Run a tool and return what it prints; raise `BuildError` with its complaints if it fails."""
    done = subprocess.run([os.fspath(c) for c in command], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BuildError(f"{' '.join(os.fspath(c) for c in command)}\n{done.stderr}")
    return done.stdout


@functools.cache
def compiler_version() -> str:
    return run([COMPILER, "--version"]).splitlines()[0] + platform.machine()


def cache_root() -> Path:
    """Return the folder of built libraries, private to this user."""
    root = os.environ.get("CPU_CUDA_CACHE_DIR")
    path = Path(root) if root else Path(tempfile.gettempdir()) / f"cpu-cuda-{os.getuid()}"
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path


def digest(parts: Iterable[str], files: Iterable[Path]) -> str:
    h = hashlib.sha256()
    for part in (compiler_version(), *parts):
        h.update(part.encode() + b"\0")
    for file in sorted(files):
        h.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return h.hexdigest()[:24]


def publish(work: Path, target: Path) -> None:
    """Move a finished build to its place; another process may have been faster."""
    for old in work.parent.iterdir():
        with contextlib.suppress(OSError):  # another process may have removed it already
            if time.time() - old.stat().st_mtime > KEEP_SECONDS:
                shutil.rmtree(old)
    try:
        work.rename(target)
    except OSError:
        if not target.is_dir():
            raise
        shutil.rmtree(work, ignore_errors=True)


@functools.cache
def runtime_library() -> Path:
    """Build the runtime; return the library's path."""
    sources = sorted((HERE / "runtime").glob("*.cpp"))
    headers = [*(HERE / "runtime").glob("*.h"), *(HERE / "include").glob("*.h")]
    key = digest([*COMMON, *RUNTIME], [*sources, *headers])
    target = cache_root() / f"runtime-{key}"
    library = target / f"libcpu_cuda_{key}.so"
    if not library.is_file():
        work = Path(tempfile.mkdtemp(prefix="build-", dir=cache_root()))
        run([COMPILER, *COMMON, *RUNTIME, "-shared", *sources, "-o", work / library.name])
        publish(work, target)
    return library


@functools.cache
def runtime() -> ctypes.CDLL:
    """Build and load the runtime."""
    library = ctypes.CDLL(str(runtime_library()), mode=ctypes.RTLD_GLOBAL)
    library.cpu_cuda_reserve.restype = ctypes.c_void_p
    library.cpu_cuda_reserve.argtypes = [ctypes.c_uint64, ctypes.c_char_p]
    library.cpu_cuda_open.restype = None
    library.cpu_cuda_open.argtypes = [ctypes.c_void_p] * 2 + [ctypes.c_uint64] * 2 + [ctypes.c_int]
    library.cpu_cuda_release.restype = None
    library.cpu_cuda_release.argtypes = [ctypes.c_void_p]
    library.cpu_cuda_written.restype = None
    library.cpu_cuda_written.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_void_p]
    return library


@dataclass(frozen=True)
class SharedSymbol:
    """A shared variable's place in the library's thread-local block."""

    name: str
    offset: int
    size: int
    dynamic: bool


@dataclass(frozen=True)
class Built:
    """A kernel library and what the harness must know about it."""

    library: Path
    shared: tuple[SharedSymbol, ...]
    block_bytes: int  # of the thread-local block
    anchor_offset: int  # of the symbol cpu_cuda_anchor, in that block
    locate_offset: int  # of the function cpu_cuda_locate, in the library


_SYMBOL = re.compile(r"^\s*\d+: ([0-9a-f]+)\s+(\S+)\s+(\S+)\s+\S+\s+\S+\s+(\S+) (\S+)$", re.MULTILINE)


def symbols(binary: Path) -> list[tuple[int, int, str, str, str]]:
    """List (value, size, type, section, name) of an object file's symbols."""
    found = _SYMBOL.findall(run(["readelf", "-sW", binary]))
    return [(int(value, 16), int(size, 0), kind, section, name) for value, size, kind, section, name in found]


def demangled(name: str) -> str:
    """Name a variable of a function by the variable: the last part of an Itanium-mangled local name."""
    match = re.match(r"_ZZ.*E(\d+)(\w+?)(_\d+)?$", name)
    return match.group(2)[: int(match.group(1))] if match else name


def _stub(dynamic: Sequence[str]) -> str:
    """Write the source that gives `extern __shared__` arrays, whatever they are called, their memory."""
    size = DYNAMIC_SHARED_BYTES + RED_ZONE_BYTES
    lines = [
        f'alignas(1024) thread_local unsigned char cpu_cuda_dynamic[{size}] asm("{name}");'
        for name in dynamic[:1]
    ]
    lines += [
        f'extern thread_local unsigned char cpu_cuda_alias_{i}[{size}] asm("{name}") '
        f'__attribute__((alias("{dynamic[0]}")));'
        for i, name in enumerate(dynamic[1:])
    ]
    lines.append("thread_local unsigned char cpu_cuda_anchor;")
    lines.append('extern "C" void* cpu_cuda_locate() { return &cpu_cuda_anchor; }')
    return "\n".join(lines) + "\n"


def compile_kernels(
    source: Path | str,
    defines: Mapping[str, object],
    entries: Mapping[str, str],
    include: Sequence[Path] = (),
    flags: Sequence[str] = (),
) -> Built:
    """Build a library of kernels, or find it in the cache.

    Parameters
    ----------
    source : Path or str
        A file, or the source itself.
    defines : mapping
        Macros.
    entries : mapping
        C identifiers to the C++ expressions of the kernels they stand for.
    include : sequence of Path
        Folders of headers.
    flags : sequence of str
        More compiler flags.
    """
    folders = [*include, *([source.parent] if isinstance(source, Path) else [])]
    macros = [f"-D{name}" if value is None else f"-D{name}={value}" for name, value in defines.items()]
    options = [*COMMON, *KERNEL, *flags, *macros]
    shim = runtime_library()
    key = digest(
        [*options, *(f"{k}={v}" for k, v in entries.items()), str(source), shim.name],
        [
            f
            for folder in (*folders, HERE / "include")
            for f in folder.iterdir()
            if f.suffix in (".cu", ".cuh", ".h")
        ],
    )
    target = cache_root() / f"kernel-{key}"
    if not (target / "built.json").is_file():
        work = Path(tempfile.mkdtemp(prefix="build-", dir=cache_root()))
        try:
            _compile(work, source, options, entries, folders, shim)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise
        publish(work, target)
    facts = json.loads((target / "built.json").read_text())
    facts["shared"] = tuple(SharedSymbol(**s) for s in facts["shared"])
    return Built(library=target / "kernels.so", **facts)


def _compile(
    work: Path,
    source: Path | str,
    options: Sequence[str],
    entries: Mapping[str, str],
    folders: Sequence[Path],
    shim: Path,
) -> None:
    if isinstance(source, str):
        (work / "kernel.cu").write_text(source)
        source = work / "kernel.cu"
    exports = "".join(f"CPU_CUDA_EXPORT({symbol}, {expression})\n" for symbol, expression in entries.items())
    (work / "unit.cpp").write_text(f'#include "{source}"\n{exports}')
    unit, library = work / "unit.o", work / "kernels.so"
    paths = [f"-I{folder}" for folder in (HERE / "include", *folders)]
    run([COMPILER, *options, "-include", "cuda_runtime.h", *paths, "-c", work / "unit.cpp", "-o", unit])
    dynamic = sorted(name for _, _, kind, where, name in symbols(unit) if (kind, where) == ("TLS", "UND"))
    (work / "stub.cpp").write_text(_stub(dynamic))
    linking = ["-shared", f"-Wl,-rpath,{shim.parent}", "-Wl,-z,defs", "-o", library]
    run([COMPILER, *COMMON, unit, work / "stub.cpp", shim, *linking])
    found = {(kind, name): (value, size) for value, size, kind, _, name in symbols(library)}
    variables = {name: place for (kind, name), place in found.items() if kind == "TLS"}
    anchor, _ = variables.pop("cpu_cuda_anchor")
    shared = [
        {
            "name": "dynamic shared memory" if name in dynamic else demangled(name),
            "offset": offset,
            "size": size,
            "dynamic": name in dynamic,
        }
        for name, (offset, size) in variables.items()
        if name not in dynamic[1:]
    ]
    facts = {
        "shared": shared,
        "block_bytes": max([anchor + 1, *(s["offset"] + s["size"] for s in shared)]),
        "anchor_offset": anchor,
        "locate_offset": found["FUNC", "cpu_cuda_locate"][0],
    }
    (work / "built.json").write_text(json.dumps(facts))
