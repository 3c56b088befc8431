"""The compiler and the CUDA headers of this machine; nothing here needs a GPU.

CuPy is imported inside the functions only: the package must import without it.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import importlib.util
import logging
import os
import platform
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = [
    "CompilerNotFoundError",
    "HeaderDir",
    "HeaderNotFoundError",
    "compiler_id",
    "cuda_version_of",
    "find_header",
    "header_dirs",
    "nvrtc",
    "pip_command",
]

_log = logging.getLogger(__name__)

Version = tuple[int, int]


class CompilerNotFoundError(ImportError):
    """CuPy or NVRTC cannot be loaded."""


class HeaderNotFoundError(RuntimeError):
    """NVRTC is there, a CUDA header is not."""


@dataclass(frozen=True)
class HeaderDir:
    """An include directory, where it was found, and the CUDA version of its headers if known."""

    path: Path
    origin: str
    version: Version | None


def nvrtc() -> tuple[Any, Version]:
    """CuPy's NVRTC binding and the version of the library.

    Raises
    ------
    CompilerNotFoundError
        With the pip command that helps.
    """
    try:
        from cupy.cuda import nvrtc as module
    except Exception as error:  # a broken CuPy raises more than ImportError
        raise CompilerNotFoundError(
            f"CuPy cannot be imported ({type(error).__name__}: {error}).\n"
            'Install it with: pip install "cupy-cuda12x[ctk]"   (or "cupy-cuda13x[ctk]" for a CUDA 13 driver)'
        ) from error
    try:
        try:
            major, minor = module.getVersion()
        except RuntimeError:
            if not _preload_nvrtc():
                raise
            major, minor = module.getVersion()
    except Exception as error:
        first = str(error).strip().split("\n")[0]
        raise CompilerNotFoundError(
            f"CuPy cannot load NVRTC ({type(error).__name__}: {first}).\n"
            f"Install it with: {pip_command('nvrtc', cupy_cuda_major())}"
        ) from error
    return module, (int(major), int(minor))


def _preload_nvrtc() -> bool:
    """Load the NVRTC of a wheel, which CuPy before 14 leaves to the dynamic linker's search path.

    The linker then finds it by name, since it is loaded already.
    """
    major = cupy_cuda_major()
    for site in _package_paths("nvidia"):
        for folder in (f"cu{major}", "cuda_nvrtc"):
            library = site / folder / "lib" / f"libnvrtc.so.{major}"
            if library.is_file():
                ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
                return True
    return False


def cupy_cuda_major() -> int:
    """CUDA major version of the installed CuPy wheel; 12 if that can't be told."""
    for major in (13, 12):
        try:
            importlib.metadata.version(f"cupy-cuda{major}x")
        except importlib.metadata.PackageNotFoundError:
            continue
        return major
    return 12


def pip_command(what: str, major: int, minor: int | None = None) -> str:
    """The pip command that brings NVRTC (``what="nvrtc"``) or a header (``what="crt/mma.h"``)."""
    if what == "nvrtc":
        package = "nvidia-cuda-nvrtc"
    elif what.startswith("crt/"):
        # Up to CUDA 12 the crt headers come with the compiler's wheel.
        package = "nvidia-cuda-crt" if major >= 13 else "nvidia-cuda-nvcc"
    elif what.startswith(("cuda/", "nv/", "cub/", "thrust/")):
        package = "nvidia-cuda-cccl"
    else:
        package = "nvidia-cuda-runtime"
    suffix = "" if major >= 13 else f"-cu{major}"
    return f'pip install "{package}{suffix}=={major}.{"*" if minor is None else f"{minor}.*"}"'


@functools.lru_cache(maxsize=1)
def compiler_id() -> str:
    """Names the compiler build, for cache keys.

    NVRTC tells only major.minor; builds of one minor version differ, so the size of the library that is
    loaded (where the system lets us see it) joins in.
    """
    _, (major, minor) = nvrtc()
    text = f"nvrtc {major}.{minor}"
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
            paths = {line.split(maxsplit=5)[5].strip() for line in maps if "/libnvrtc.so" in line}
        for path in sorted(paths):
            real = Path(path).resolve()
            text += f" {real.name} {real.stat().st_size}"
    except (OSError, IndexError):
        pass
    return text


def header_dirs(version: Version) -> tuple[HeaderDir, ...]:
    """Include directories fit for NVRTC ``version``, best first.

    ``INTFA_CUDA_INCLUDE`` (a path list) replaces the search. Otherwise directories whose headers have
    another CUDA major version are left out: mixed with this NVRTC they fail in ways nobody can read.
    """
    return tuple(d for d in all_header_dirs(version) if d.version is None or d.version[0] == version[0])


def all_header_dirs(version: Version) -> tuple[HeaderDir, ...]:
    """As :func:`header_dirs`, with those of other CUDA versions at the end."""
    keys = ("INTFA_CUDA_INCLUDE", "CUDA_PATH", "CUDA_HOME", "CONDA_PREFIX")
    return _all_header_dirs(version, tuple(os.environ.get(k, "") for k in keys))


@functools.lru_cache(maxsize=8)
def _all_header_dirs(version: Version, environment: tuple[str, ...]) -> tuple[HeaderDir, ...]:
    explicit, *roots = environment
    if explicit:
        return tuple(HeaderDir(Path(p), "INTFA_CUDA_INCLUDE", None) for p in explicit.split(os.pathsep) if p)
    found: dict[Path, HeaderDir] = {}
    for path, origin, known in _candidates(version[0], roots):
        if _has_headers(path) and (real := path.resolve()) not in found:
            found[real] = HeaderDir(path, origin, cuda_version_of(path) or known)
    # Stable sort: the same minor version first, then the same major, in the order of the search.
    return tuple(
        sorted(
            found.values(),
            key=lambda d: (
                1 if d.version is None else 0 if d.version == version else 1 + (d.version[0] != version[0])
            ),
        )
    )


def _candidates(major: int, roots: list[str]) -> Iterator[tuple[Path, str, Version | None]]:
    cuda_path, cuda_home, conda = roots
    for name, root in (("CUDA_PATH", cuda_path), ("CUDA_HOME", cuda_home)):
        if root:
            yield Path(root) / "include", name, None
    for site in _package_paths("nvidia"):
        yield site / f"cu{major}" / "include", f"wheel nvidia/cu{major}", None
        if major == 12:
            for folder, package in (
                ("cuda_runtime", "runtime"),
                ("cuda_nvcc", "nvcc"),
                ("cuda_cccl", "cccl"),
            ):
                name = f"nvidia-cuda-{package}-cu12"
                # The folders carry no number, and CUDA 11 wheels used the same ones: ask the package.
                if installed := _installed_version(name):
                    yield site / folder / "include", f"wheel {name}", installed
    if conda:
        machine = {"aarch64": "sbsa"}.get(platform.machine(), platform.machine())
        yield Path(conda) / "targets" / f"{machine}-linux" / "include", "conda", None
    for site in _package_paths("cupy"):
        for bundled in sorted((site / "_core/include/cupy/_cuda").glob(f"cuda-{major}*"), reverse=True):
            yield bundled, "bundled with CuPy", (major, 0)
    try:
        import cupy.cuda

        if root := cupy.cuda.get_cuda_path():
            yield Path(root) / "include", "CUDA toolkit known to CuPy", None
    except (ImportError, OSError, RuntimeError):
        _log.debug("CuPy tells no CUDA path", exc_info=True)
    yield Path("/usr/local/cuda/include"), "CUDA toolkit", None
    yield Path(f"/usr/local/cuda-{major}/include"), "CUDA toolkit", None
    for site in _package_paths("triton"):  # brings crt/mma.h too; often there with PyTorch
        yield site / "backends/nvidia/include", "bundled with Triton", None


def _has_headers(directory: Path) -> bool:
    return any((directory / name).exists() for name in ("cuda_fp16.h", "crt/mma.h", "cuda/std"))


def _package_paths(name: str) -> list[Path]:
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return []
    return [Path(p) for p in (spec.submodule_search_locations if spec else None) or ()]


def _installed_version(package: str) -> Version | None:
    try:
        major, minor = importlib.metadata.version(package).split(".")[:2]
        return int(major), int(minor)
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return None


def cuda_version_of(directory: Path) -> Version | None:
    """CUDA version that the headers of a directory state."""
    for name, macro in (("cuda_runtime_api.h", "CUDART_VERSION"), ("cuda.h", "CUDA_VERSION")):
        try:
            with open(directory / name, encoding="utf-8", errors="replace") as file:
                head = file.read(1 << 16)
        except OSError:
            continue
        if match := re.search(rf"#define\s+{macro}\s+(\d+)", head):
            number = int(match[1])
            return number // 1000, number % 1000 // 10
    return None


def find_header(name: str, dirs: tuple[HeaderDir, ...]) -> Path | None:
    """First file ``name`` in the include directories."""
    for directory in dirs:
        if (directory.path / name).is_file():
            return directory.path / name
    return None


def missing_header_error(name: str, version: Version) -> HeaderNotFoundError:
    """The error for a header that NVRTC did not find, saying where was looked and what to install."""
    lines = [f"CUDA header {name} not found for NVRTC {version[0]}.{version[1]}."]
    lines.append(f"Install it with: {pip_command(name, *version)}")
    lines.append("or set CUDA_PATH to a CUDA toolkit, or INTFA_CUDA_INCLUDE to its include directory.")
    for directory in all_header_dirs(version):
        shown = "?" if directory.version is None else "{}.{}".format(*directory.version)
        note = ""
        if directory.version is not None and directory.version[0] != version[0]:
            note = ": other CUDA version, not used"
        lines.append(f"  looked in {directory.path} ({directory.origin}, CUDA {shown}{note})")
    return HeaderNotFoundError("\n".join(lines))
