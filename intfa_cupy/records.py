"""Recorded runs on a GPU, shipped as data, and whether they still describe these kernel sources.

Neither a laptop nor continuous integration has the GPU that the README's figures come from.
They are therefore recorded with the machine, the versions and a fingerprint of the kernel
sources (comments and blank space aside); anyone can see whether a figure belongs to the
sources at hand.
"""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

__all__ = ["NAMES", "freshness", "host", "load", "machine", "save"]

#: What can be recorded: timings, those of the paper's speed figure, the run of the GPU test suite, and the
#: evaluation of a language model.
NAMES = ("bench", "speed", "gpu_suite", "evaluation")


def _file(name: str) -> str:
    if name not in NAMES:
        raise ValueError(f"name must be one of {', '.join(map(repr, NAMES))}; got {name!r}")
    return f"recorded_{name}.json"


def load(name: str) -> dict[str, Any] | None:
    """Return a recorded run, or None where none is shipped.

    Parameters
    ----------
    name : {"bench", "speed", "gpu_suite", "evaluation"}
    """
    path = resources.files("intfa_cupy.data") / _file(name)
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def save(name: str, document: dict[str, Any]) -> Path:
    """Write a recorded run into the package's data folder (of a checkout) and return the path."""
    path = Path(__file__).parent / "data" / _file(name)
    path.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return path


def machine() -> dict[str, Any]:
    """Return what a record says of the current device, the versions, the sources and the day."""
    import datetime
    import platform

    import cupy

    from . import __version__, jit

    properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.runtime.getDevice())
    return {
        "gpu": properties["name"].decode(),
        "compute_capability": properties["major"] * 10 + properties["minor"],
        "sms": properties["multiProcessorCount"],
        "driver_cuda": cupy.cuda.runtime.driverGetVersion(),
        "nvrtc": ".".join(map(str, cupy.cuda.nvrtc.getVersion())),
        "cupy": cupy.__version__,
        "python": platform.python_version(),
        "intfa_cupy": __version__,
        "kernel_sources": jit.strip_comments_fingerprint(),
        "date": datetime.date.today().isoformat(),
    }


def host() -> dict[str, Any]:
    """Return what a record says where the NumPy model did the work: the CPU, the versions and the day."""
    import datetime
    import platform

    import numpy

    from . import __version__
    from .compare import device_name

    return {
        "device": device_name("numpy"),
        "numpy": numpy.__version__,
        "python": platform.python_version(),
        "intfa_cupy": __version__,
        "date": datetime.date.today().isoformat(),
    }


def freshness(name: str) -> str:
    """Say in one line what a recorded run is of, and whether the kernel sources have changed since.

    Parameters
    ----------
    name : {"bench", "speed", "gpu_suite", "evaluation"}
    """
    from . import jit

    document = load(name)
    if document is None:
        return "nothing recorded"
    machine = document["machine"]
    what = f"{machine.get('gpu') or machine['device']}, {machine['date']}"
    if "kernel_sources" not in machine:  # computed by the NumPy model
        return f"{what}, intfa-cupy {machine['intfa_cupy']}"
    if machine["kernel_sources"] == jit.strip_comments_fingerprint():
        return f"{what}, of these kernel sources"
    return f"{what}, of OTHER kernel sources ({machine['kernel_sources'][:12]}): measure again"
