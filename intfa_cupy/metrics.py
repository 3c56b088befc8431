"""How far an output is from the exact one, under every definition in use."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from . import arrays

__all__ = ["ErrorReport", "error_report"]

_MEANING = {
    "relative_l2": ("relative L2", "||o - r|| / ||r||"),
    "cosine": ("cosine", "o . r / (||o|| ||r||)"),
    "mre": ("MRE", "mean of |o - r| / (|r| + 1e-5), all elements"),
    "sum_ratio": ("sum ratio", "sum|o - r| / sum|r|"),
    "max_abs": ("max abs", "max |o - r|"),
}


@dataclass(frozen=True)
class ErrorReport:
    """Errors of an output against a reference, as plain fractions (0.01 is 1 %).

    Parameters
    ----------
    relative_l2 : float
        ||out - ref|| / ||ref||.
    cosine : float
        Cosine of the angle between the two, all elements as one vector.
    mre : float
        Mean of |out - ref| / (|ref| + 1e-5) over all elements. Dominated by elements near zero.
    sum_ratio : float
        sum|out - ref| / sum|ref|; the magnitudes of INT-FlashAttention's tables match this one.
    max_abs : float
        The largest |out - ref|.
    """

    relative_l2: float
    cosine: float
    mre: float
    sum_ratio: float
    max_abs: float

    def as_dict(self) -> dict[str, float]:
        """Return the figures by name."""
        return asdict(self)

    def _lines(self) -> Iterator[tuple[str, str, str]]:
        for f in fields(self):
            label, meaning = _MEANING[f.name]
            value = getattr(self, f.name)
            if f.name in ("cosine", "max_abs"):
                yield label, f"{value:.7g}", meaning
            else:
                yield label, f"{100 * value:.4g} %", meaning

    def __str__(self) -> str:
        return "\n".join(f"{label:<12} {value:>12}  {meaning}" for label, value, meaning in self._lines())

    def _repr_html_(self) -> str:
        rows = "".join(f"<tr><td>{a}</td><td>{b}</td><td>{c}</td></tr>" for a, b, c in self._lines())
        return f"<table><tr><th>error</th><th>value</th><th>definition</th></tr>{rows}</table>"


def error_report(out: Any, ref: Any) -> ErrorReport:
    """Measure an output against a reference.

    Parameters
    ----------
    out, ref : array
        Equal shapes; any kind of array that :func:`intfa_cupy.attention` takes. Computed in float64.

    Returns
    -------
    ErrorReport
        Prints as a table. A reference of zeros gives infinite relative errors unless ``out`` is zero too;
        NaN in either gives NaN.

    Raises
    ------
    ValueError
        The shapes differ, or there are no elements.

    Examples
    --------
    >>> import numpy as np, intfa_cupy as intfa
    >>> intfa.error_report(np.array([1.0, 2.0]), np.array([1.0, 2.5])).max_abs
    0.5
    """
    o = np.asarray(arrays.to_numpy(out)).astype(np.float64)
    r = np.asarray(arrays.to_numpy(ref)).astype(np.float64)
    if o.shape != r.shape:
        raise ValueError(f"out must have ref's shape {r.shape}, got {o.shape}")
    if o.size == 0:
        raise ValueError(f"out must have at least one element, got shape {o.shape}")
    error = np.abs(o - r)
    o_norm, r_norm = float(np.linalg.norm(o)), float(np.linalg.norm(r))

    def ratio(a: float, b: float) -> float:
        return a / b if b else (0.0 if a == 0 else float("nan") if np.isnan(a) else float("inf"))

    same_zero = o_norm == r_norm == 0
    return ErrorReport(
        relative_l2=ratio(float(np.linalg.norm(error)), r_norm),
        cosine=1.0
        if same_zero
        else ratio(float(np.vdot(o, r)), o_norm * r_norm)
        if o_norm and r_norm
        else 0.0,
        mre=float(np.mean(error / (np.abs(r) + 1e-5))),
        sum_ratio=ratio(float(error.sum()), float(np.abs(r).sum())),
        max_abs=float(error.max()),
    )
