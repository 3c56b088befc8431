"""Which backend serves a call, and why not the faster ones. Pure: nothing here launches anything."""

from __future__ import annotations

import html
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from .problem import Problem

__all__ = ["BACKENDS", "BackendStatus", "Plan", "UnsupportedError", "backends", "select"]

#: Fastest first. ``auto`` takes the first that serves the problem.
BACKENDS = ("wgmma", "mma", "wmma", "numpy")


class UnsupportedError(ValueError):
    """The backend asked for cannot serve this call; the message says what is missing and what would serve."""


@dataclass(frozen=True)
class BackendStatus:
    """Whether a backend can be used on this machine.

    Parameters
    ----------
    name : str
    available : bool
    reason : str
        What it is, or why it is not available.
    """

    name: str
    available: bool
    reason: str

    def __str__(self) -> str:
        return f"{self.name:<6} {'available' if self.available else 'not available'}: {self.reason}"


@dataclass(frozen=True)
class Plan:
    """What a call would use.

    Parameters
    ----------
    backend : str
        One of :data:`BACKENDS`.
    problem : Problem
    tile : object or None
        The kernel's tile, None for NumPy.
    rejected : tuple of (str, str)
        The faster backends and why each was not taken.
    """

    backend: str
    problem: Problem
    tile: Any = None
    rejected: tuple[tuple[str, str], ...] = ()
    #: Launches that are worked out already. Not carried into a copy.
    prepared: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __str__(self) -> str:
        p = self.problem
        lines = [
            f"backend  {self.backend}",
            f"tile     {self.tile if self.tile is not None else '128 keys per maximum of P'}",
            f"recipe   {p.recipe.name}: {p.recipe}",
            f"problem  B={p.B} H={p.H} Hkv={p.Hkv} Sq={p.Sq} Sk={p.Sk} D={p.D} "
            f"window=({p.left}, {p.right}) scale={p.scale:.6g} out={p.out_dtype}",
        ]
        lines += [f"not {name}: {reason}" for name, reason in self.rejected]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"


@lru_cache(maxsize=1)
def _gpu_problem() -> str | None:
    """Why no GPU can be used, or None. Asked once: a process does not gain a GPU."""
    from . import gpu

    return gpu.unavailable()


def backends() -> dict[str, BackendStatus]:
    """Return every backend with whether it is available here, or the reason why not.

    Returns
    -------
    dict of str to BackendStatus
        In order of speed, fastest first.

    Examples
    --------
    >>> import intfa_cupy as intfa
    >>> intfa.backends()["numpy"].available
    True
    """
    found = {}
    for name in BACKENDS:
        if name == "numpy":
            found[name] = BackendStatus(name, True, "exact model of the arithmetic, on the CPU")
            continue
        reason = _gpu_problem() or _kernel_problem(name)
        found[name] = BackendStatus(name, reason is None, reason or _describe(name))
    return found


def _kernel_problem(name: str) -> str | None:
    from . import gpu, tiles

    return tiles.device_problem(name, gpu.device())


def _describe(name: str) -> str:
    from . import tiles

    return tiles.DESCRIPTION[name]


def select(problem: Problem, backend: str, *, on_gpu: bool) -> Plan:
    """Choose the backend and tile of a call.

    Parameters
    ----------
    problem : Problem
    backend : str
        ``"auto"``, or one of :data:`BACKENDS` to insist on it.
    on_gpu : bool
        The inputs lie on a GPU. With ``"auto"``, inputs in host memory stay on the host.

    Returns
    -------
    Plan

    Raises
    ------
    ValueError
        ``backend`` is not known.
    UnsupportedError
        The backend insisted on cannot serve the problem; or the inputs lie on a GPU and no kernel can
        (``backend="numpy"`` then serves, through host memory).
    """
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(
            f"backend must be 'auto' or one of {', '.join(map(repr, BACKENDS))}; got {backend!r}"
        )
    if backend == "numpy":
        return Plan("numpy", problem)
    rejected: list[tuple[str, str]] = []
    for name in BACKENDS[:-1] if backend == "auto" else (backend,):
        reason = _gpu_problem()
        if reason is None and backend == "auto" and not on_gpu:
            reason = "inputs in host memory stay there; pass backend= by name to copy them to the GPU"
        if reason is None:
            from . import gpu, tiles

            tile, reason = tiles.find(name, problem, gpu.device())
            if reason is None:
                return Plan(name, problem, tile, tuple(rejected))
        rejected.append((name, reason))
    if backend == "auto" and not on_gpu:
        return Plan("numpy", problem, rejected=tuple(rejected))
    reasons = "; ".join(f"{name}: {reason}" for name, reason in rejected)
    raise UnsupportedError(f"no GPU kernel can serve this call ({reasons}); backend='numpy' would serve it")
