"""What this machine has to offer, for ``intfa-cupy info`` and for bug reports.

Nothing here raises: whatever is missing is reported with its reason.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from . import cuda_env
from .jit import cache_dir
from .kernel_source import source_dir, strip_comments_fingerprint

__all__ = ["Gpu", "Headers", "Probe", "probe"]

#: Headers whose absence is worth knowing: those of the kernels, and the one that most installs lack.
HEADERS = ("cuda_fp16.h", "mma.h", "crt/mma.h")

T = TypeVar("T")


@dataclass(frozen=True)
class Gpu:
    """One device. ``arch`` is what the kernels are compiled for; ``None`` if the compiler can't."""

    index: int
    name: str
    compute_capability: str
    multiprocessors: int
    memory_bytes: int
    smem_per_block: int
    arch: str | None


@dataclass(frozen=True)
class Headers:
    """Include directories in use, those of another CUDA version, and where each header was found."""

    directories: tuple[str, ...]
    other_versions: tuple[str, ...]
    found: dict[str, str | None]


@dataclass(frozen=True)
class Probe:
    """Result of :func:`probe`. Where a field is empty or None, ``reasons`` says why, under its name."""

    python: str
    platform: str
    cupy: str | None
    gpus: tuple[Gpu, ...]
    driver: str | None
    driver_cuda: str | None
    nvrtc: str | None
    headers: Headers | None
    cache_dir: str
    cache_writable: bool
    sources: str | None
    fingerprint: str | None
    reasons: dict[str, str]

    def as_dict(self) -> dict[str, Any]:
        """Plain dictionaries, fit for JSON."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        def reason(name: str) -> str:
            return "none: " + self.reasons.get(name, "unknown").replace("\n", "\n  ")

        rows = [("python", f"{self.python} on {self.platform}"), ("cupy", self.cupy or reason("cupy"))]
        for g in self.gpus:
            text = f"{g.name}, {g.compute_capability} ({g.arch or 'no compiler for it'}), "
            text += f"{g.multiprocessors} SMs, {g.memory_bytes / 2**30:.0f} GiB, "
            text += f"{g.smem_per_block} B shared memory per block"
            rows.append((f"gpu {g.index}", text))
        if not self.gpus:
            rows.append(("gpu", reason("gpus")))
        driver = ", ".join(t for t in (self.driver, self.driver_cuda and f"CUDA {self.driver_cuda}") if t)
        rows.append(("driver", driver or reason("driver")))
        rows.append(("nvrtc", self.nvrtc or reason("nvrtc")))
        if self.headers is None:
            rows.append(("headers", reason("headers")))
        else:
            for name, path in self.headers.found.items():
                rows.append((name, path or reason(name)))
            rows += [("not used", other) for other in self.headers.other_versions]
        rows.append(("cache", self.cache_dir + ("" if self.cache_writable else " (not writable)")))
        rows.append(("sources", self.sources or reason("sources")))
        if self.fingerprint:
            rows.append(("fingerprint", self.fingerprint))
        return "\n".join(f"{label:<12} {text}" for label, text in rows)


def probe() -> Probe:
    """Look at GPU, CuPy, NVRTC, CUDA headers and cache; never raises."""
    reasons: dict[str, str] = {}

    def attempt(name: str, function: Callable[[], T]) -> T | None:
        try:
            return function()
        except Exception as error:  # a broken install can raise anything
            text = str(error).strip() or "no message"
            known = isinstance(error, (cuda_env.CompilerNotFoundError, RuntimeError))
            reasons[name] = text if known else f"{type(error).__name__}: {text}"
            return None

    cupy_version = attempt("cupy", _cupy_version)
    version = attempt("nvrtc", lambda: cuda_env.nvrtc()[1])
    headers = attempt("headers", lambda: _headers(version, reasons))
    cache = attempt("cache_dir", lambda: str(cache_dir()))
    sources = attempt("sources", lambda: str(source_dir()))
    return Probe(
        python=platform.python_version(),
        platform=f"{platform.system()} {platform.machine()}",
        cupy=cupy_version,
        gpus=attempt("gpus", _gpus) or (),
        driver=attempt("driver", _driver),
        driver_cuda=attempt("driver_cuda", _driver_cuda),
        nvrtc=None if version is None else "{}.{}".format(*version),
        headers=headers,
        cache_dir=cache or "",
        cache_writable=bool(cache) and bool(attempt("cache_writable", lambda: _writable(Path(cache or "")))),
        sources=sources,
        fingerprint=None if sources is None else attempt("fingerprint", strip_comments_fingerprint),
        reasons=reasons,
    )


def _cupy_version() -> str:
    import cupy

    return str(cupy.__version__)


def _gpus() -> tuple[Gpu, ...]:
    import cupy

    from .jit import device_arch

    runtime = cupy.cuda.runtime
    gpus = []
    for index in range(runtime.getDeviceCount()):
        properties = runtime.getDeviceProperties(index)
        try:
            arch: str | None = device_arch(index)
        except ImportError:
            arch = None
        gpus.append(
            Gpu(
                index=index,
                name=properties["name"].decode(errors="replace"),
                compute_capability=f"{properties['major']}.{properties['minor']}",
                multiprocessors=int(properties["multiProcessorCount"]),
                memory_bytes=int(properties["totalGlobalMem"]),
                smem_per_block=int(cupy.cuda.Device(index).attributes["MaxSharedMemoryPerBlockOptin"]),
                arch=arch,
            )
        )
    if not gpus:
        raise RuntimeError("the CUDA driver sees no device")
    return tuple(gpus)


def _driver() -> str:
    version = Path("/proc/driver/nvidia/version")
    if not version.is_file():
        raise RuntimeError("no NVIDIA driver is loaded")
    text = version.read_text(encoding="utf-8", errors="replace")
    match = re.search(r"\b(\d+\.\d+(?:\.\d+)?)\b", text)
    if match is None:
        raise RuntimeError("no version in /proc/driver/nvidia/version")
    return match[1]


def _driver_cuda() -> str:
    import cupy

    number = int(cupy.cuda.runtime.driverGetVersion())
    if number == 0:
        raise RuntimeError("no CUDA driver")
    return f"{number // 1000}.{number % 1000 // 10}"


def _headers(version: tuple[int, int] | None, reasons: dict[str, str]) -> Headers:
    if version is None:
        raise RuntimeError("which headers fit is known only with NVRTC")
    used = cuda_env.header_dirs(version)
    found: dict[str, str | None] = {}
    for name in HEADERS:
        path = cuda_env.find_header(name, used)
        found[name] = None if path is None else str(path)
        if path is None:
            reasons[name] = cuda_env.pip_command(name, *version)
    return Headers(
        directories=tuple(str(d.path) for d in used),
        other_versions=tuple(
            f"{d.path} ({d.origin}, CUDA {'{}.{}'.format(*d.version)})"
            for d in cuda_env.all_header_dirs(version)
            if d not in used and d.version is not None
        ),
        found=found,
    )


def _writable(directory: Path) -> bool:
    """Whether the cache could be written, without creating it."""
    while not directory.exists() and directory != directory.parent:
        directory = directory.parent
    return directory.is_dir() and os.access(directory, os.W_OK | os.X_OK)
