"""What INT-FlashAttention (arXiv 2409.16997) prints: the figures that `reproduce` stands beside."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["HEAD_DIM", "LENGTHS", "SPEED", "TABLES", "PaperSpeed", "PaperTable"]

#: Sequence lengths of all its tables and of its speed figure; the head dimension is 64.
LENGTHS = (1024, 2048, 4096, 8192, 16384)
HEAD_DIM = 64


@dataclass(frozen=True)
class PaperTable:
    """One table of errors.

    Parameters
    ----------
    title : str
    activations : {"normal", "uniform"}
        What Q, K and V are drawn from: N(0, 1), or U(-0.5, 0.5), which has no mean.
    rows : dict of str to tuple of float
        Mean relative error at `LENGTHS`, as fractions; ``fp8``, ``half-int8`` and ``paper-int8``
        (its full INT8).
    claim : float
        How far below its FP8 the abstract says that full INT8 is.
    """

    title: str
    activations: str
    rows: dict[str, tuple[float, ...]]
    claim: float


def _percent(*figures: float) -> tuple[float, ...]:
    return tuple(x / 100 for x in figures)


TABLES = {
    "table1": PaperTable(
        "Table 1: normal activations, N(0, 1)",
        "normal",
        {
            "fp8": _percent(7.46, 7.50, 7.66, 7.51, 7.57),
            "half-int8": _percent(0.890, 0.802, 0.843, 0.932, 0.775),
            "paper-int8": _percent(4.05, 4.18, 4.21, 4.38, 4.52),
        },
        0.46,
    ),
    "table2": PaperTable(
        "Table 2: uniform activations, U(-0.5, 0.5)",
        "uniform",
        {
            "fp8": _percent(8.94, 9.15, 8.89, 9.02, 8.97),
            "half-int8": _percent(0.317, 0.300, 0.280, 0.299, 0.316),
            "paper-int8": _percent(1.69, 1.62, 1.65, 1.85, 1.82),
        },
        0.82,
    ),
}


@dataclass(frozen=True)
class PaperSpeed:
    """The speed figure: part of the time of a FlashAttention in FP16 (Triton) that full INT8 saves."""

    card: str
    saved: dict[int, float]


SPEED = PaperSpeed("RTX 4090", dict(zip(LENGTHS, _percent(31, 52, 66, 72, 73), strict=True)))
