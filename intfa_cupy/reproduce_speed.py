"""The paper's speed figure on the GPU at hand: every number format in one framework, and the peers.

The paper sets its INT8 kernel against a FlashAttention in FP16 of the same framework (Triton) on an RTX
4090. Here one kernel skeleton computes all the formats that it has, so that the difference is
the format and not the programming, and FlashAttention-2 and cuDNN stand beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from . import paper, records
from .bench import PAPER_SHAPES, PEERS, BenchResult, Row, Shape, bench, label
from .recipes import recipes as named_recipes
from .tables import span

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["AGAINST", "RECIPES", "SKELETON", "SpeedResult", "recorded", "speed"]

#: FP16, FP8, half-INT8 and full INT8 as in the paper, then this library's.
RECIPES = ("fp16", "fp8-e5m2", "fp8-e4m3", "half-int8", "paper-int8", "int8", "int8-fast")
#: The kernel in which the formats are compared: mma.sync, which every card from Ampere on has.
SKELETON = "mma"
#: What time is saved against, and what to call it.
AGAINST = {"fp16": "our own FP16 kernel (the same skeleton)", PEERS[1]: "FlashAttention-2 (torch, bfloat16)"}


@dataclass(frozen=True)
class SpeedResult:
    """Times at the paper's shapes; prints as tables.

    Parameters
    ----------
    bench : BenchResult
        All that was timed.
    skeleton : str
        The kernel in which the formats are compared.
    recorded : bool
        Read from the package's data, not measured now.
    """

    bench: BenchResult
    skeleton: str = SKELETON
    recorded: bool = False

    @property
    def machine(self) -> dict[str, Any]:
        """dict : card, versions, kernel sources and date."""
        return self.bench.machine

    @property
    def missing(self) -> dict[str, str]:
        """dict of str to str : why a contestant was not timed."""
        return self.bench.missing

    @property
    def shapes(self) -> list[Shape]:
        """list of Shape : in order of length."""
        return sorted(self.bench.shapes(), key=lambda s: s.N)

    @property
    def lengths(self) -> list[int]:
        """list of int : sequence lengths."""
        return [s.N for s in self.shapes]

    @cached_property
    def _rows(self) -> dict[tuple[str, str, int], Row]:
        return {(_label(row), row.stage, row.shape.N): row for row in self.bench.rows}

    @property
    def labels(self) -> list[str]:
        """list of str : contestants, as ``recipe (kernel)`` or a peer's name."""
        return list(dict.fromkeys(_label(row) for row in self.bench.rows if row.stage in ("kernel", "peer")))

    def milliseconds(self, contestant: str, length: int, *, quantise: bool = False) -> float | None:
        """Return the time of the kernel (with ``quantise``, of the whole call), or None if not measured."""
        stage = "peer" if contestant in PEERS else "with quantisation" if quantise else "kernel"
        row = self._rows.get((contestant, stage, length))
        return None if row is None else row.milliseconds

    def saved(
        self, contestant: str, length: int, against: str = PEERS[1], *, quantise: bool = False
    ) -> float | None:
        """Return the part of another's time that a contestant saves, or None where one was not measured.

        Parameters
        ----------
        contestant : str
            One of `labels`.
        length : int
        against : str
            One of `labels`, or a recipe for that recipe in the common skeleton (``"fp16"``).
        quantise : bool
            Count the contestant's quantiser.
        """
        other = against if against in PEERS or "(" in against else label(against, self.skeleton)
        mine, theirs = (
            self.milliseconds(contestant, length, quantise=quantise),
            self.milliseconds(other, length),
        )
        return None if mine is None or theirs is None else 1 - mine / theirs

    def verdicts(self) -> Iterator[str]:
        """Yield in words where our fully INT8 kernels save the part of the time that the paper's does."""
        for contestant in self.labels:
            recipe = named_recipes().get(contestant.partition(" (")[0])
            if recipe is None or not recipe.integer_p:
                continue
            for against in AGAINST:
                ours = {n: self.saved(contestant, n, against) for n in self.lengths if n in paper.SPEED.saved}
                found = {n: s for n, s in ours.items() if s is not None}
                if not found:
                    continue
                reached = [n for n, s in found.items() if s >= paper.SPEED.saved[n] - 0.005]
                where = f"N = {', '.join(f'{n:,}' for n in reached)} only" if reached else "no length"
                other = label(against, self.skeleton) if against == "fp16" else against
                yield (
                    f"{contestant} saves {span(list(found.values()))} of the time of {other}: "
                    f"as much as in the paper at {'all lengths' if len(reached) == len(found) else where}"
                )

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON; what `from_dict` reads."""
        return {
            **self.bench.as_dict(),
            "skeleton": self.skeleton,
            "recorded": self.recorded,
            "paper": {"card": paper.SPEED.card, "saved": {str(n): s for n, s in paper.SPEED.saved.items()}},
            "saved": {
                against: {c: {str(n): self.saved(c, n, against) for n in self.lengths} for c in self.labels}
                for against in ("fp16", *PEERS)
            },
            "verdicts": list(self.verdicts()),
        }

    @classmethod
    def from_dict(cls, document: dict[str, Any], *, recorded: bool = False) -> SpeedResult:
        """Read back what :meth:`as_dict` wrote."""
        return cls(BenchResult.from_dict(document), document["skeleton"], recorded)

    def __str__(self) -> str:
        from .reproduce_report import speed_text

        return speed_text(self)

    def figure(self) -> Figure:
        """Draw the times and the time saved by sequence length, the paper's figures as crosses."""
        from .reproduce_report import speed_figure

        return speed_figure(self)


def _label(row: Row) -> str:
    return row.name if row.stage == "peer" else label(row.name, row.backend)


def speed(
    *,
    lengths: Sequence[int] = paper.LENGTHS,
    recipes: Sequence[str] = RECIPES,
    skeleton: str = SKELETON,
    repeats: int = 30,
    peers: bool = True,
    progress: Callable[[str], None] | None = None,
) -> SpeedResult:
    """Time the paper's formats and ours at B = 4, H = 32, d = 64 on this GPU.

    Parameters
    ----------
    lengths : sequence of int
    recipes : sequence of str
        One that no kernel serves is in `SpeedResult.missing` with the reason.
    skeleton : str
        The kernel in which all formats are timed; the one that ``backend="auto"`` takes is timed beside it.
    repeats : int
        Launches per figure.
    peers : bool
        Also time torch's cuDNN and FlashAttention-2, where torch is installed.
    progress : callable, optional
        Told what is measured next.

    Returns
    -------
    SpeedResult

    Raises
    ------
    BenchUnavailable
        No GPU, or no CuPy; `recorded` may have a run.
    """
    batch, heads = PAPER_SHAPES[0].B, PAPER_SHAPES[0].H
    shapes = [Shape(batch, heads, n, paper.HEAD_DIM) for n in sorted(set(lengths))]
    result = bench(
        shapes, recipes, backends=(skeleton, "auto"), peers=peers, repeats=repeats, progress=progress
    )
    return SpeedResult(result, skeleton)


def recorded() -> SpeedResult | None:
    """Return the run that the package ships, or None where it ships none.

    `records.freshness("speed")` says whether it is of the kernel sources at hand.
    """
    document = records.load("speed")
    return None if document is None else SpeedResult.from_dict(document, recorded=True)
