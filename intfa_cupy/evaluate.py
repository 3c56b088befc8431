"""Does a language model still work when the attention of all its layers is replaced?

`evaluate` runs SmolLM2-135M (`intfa_cupy.smollm2`) on real text, once with exact attention and
once for every recipe, and compares the distributions of the next token. It also measures, inside
each run, every layer's and head's error against exact attention on the same inputs, and how much
probability the heads put on the first token (the attention sink).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from . import api, records
from .capture import sink_mass
from .corpus import corpus_fingerprint, text_corpus
from .dispatch import UnsupportedError
from .recipes import Recipe, get_recipe
from .smollm2 import AttentionHook, SmolLM2, exact_attention, load_smollm2

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["DEFAULT_RECIPES", "Evaluation", "RecipeResult", "evaluate", "heat_map", "recorded"]

#: What is worth the minutes on a CPU: ours, the paper's, and the FP8 to beat.
DEFAULT_RECIPES = ("int8", "int8-fast", "half-int8-plus", "paper-int8", "fp8-e4m3")

#: Rows of next-token distributions compared at a time: 128 x 49,152 float32 are 25 MB.
_ROWS = 128

#: ``progress(what, done)`` with done from 0 to 1.
Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class RecipeResult:
    """What one recipe did to the model.

    Parameters
    ----------
    recipe : str
        Its name; ``"exact"`` for the run that the others are compared with.
    perplexity : float
        exp of the mean negative log-likelihood of the text's tokens.
    kl : float
        Mean over positions of KL(exact || recipe) of the next token's distribution, in nats.
    top1_agreement : float
        Part of the positions whose likeliest next token is the exact run's.
    error : ndarray (layers, heads)
        Relative L2 error of each head's output against exact attention on the inputs that the
        layer got in this run; first sequence.
    attention_seconds : float
        Time in the attention of all layers and sequences.
    backend : str
        What computed the attention.
    """

    recipe: str
    perplexity: float
    kl: float
    top1_agreement: float
    error: NDArray[np.float64] = field(repr=False)
    attention_seconds: float
    backend: str


@dataclass(frozen=True)
class Evaluation:
    """Results of `evaluate`; prints as a table.

    Parameters
    ----------
    exact : RecipeResult
    results : tuple of RecipeResult
    sink_mass : ndarray (layers, heads)
        Mean probability of the first token under exact attention, first sequence.
    tokens, sequences : int
    text : str
        Name of the text: the first digits of its SHA-256.
    seconds : float
        All the time taken, loading the model left out.
    machine : dict
        Where and when, as `records` keeps it.
    """

    exact: RecipeResult
    results: tuple[RecipeResult, ...]
    sink_mass: NDArray[np.float64] = field(repr=False)
    tokens: int
    sequences: int
    text: str
    seconds: float
    machine: dict[str, Any] = field(repr=False)

    def __getitem__(self, recipe: str) -> RecipeResult:
        for result in (self.exact, *self.results):
            if result.recipe == recipe:
                return result
        raise KeyError(recipe)

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain numbers and lists, ready for JSON."""

        def plain(result: RecipeResult) -> dict[str, Any]:
            return {**vars(result), "error": result.error.round(7).tolist()}

        return {
            **vars(self),
            "exact": plain(self.exact),
            "results": [plain(result) for result in self.results],
            "sink_mass": self.sink_mass.round(5).tolist(),
        }

    @classmethod
    def from_dict(cls, document: dict[str, Any]) -> Evaluation:
        """Read back what :meth:`as_dict` wrote."""

        def result(entry: dict[str, Any]) -> RecipeResult:
            return RecipeResult(**{**entry, "error": np.array(entry["error"])})

        return cls(**{
            **document,
            "exact": result(document["exact"]),
            "results": tuple(map(result, document["results"])),
            "sink_mass": np.array(document["sink_mass"]),
        })  # fmt: skip

    def __str__(self) -> str:
        lines = [
            f"SmolLM2-135M, {self.sequences} x {self.tokens:,} tokens of English (text {self.text})",
            f"{'recipe':<16}{'perplexity':>11}{'KL, nats':>12}{'top-1':>9}"
            f"{'error mean':>12}{'max':>9}{'attention':>12}",
        ]
        for r in (self.exact, *self.results):
            lines.append(
                f"{r.recipe:<16}{r.perplexity:>11.4f}{r.kl:>12.6f}{100 * r.top1_agreement:>8.2f}%"
                f"{100 * r.error.mean():>11.2f}%{100 * r.error.max():>8.2f}%"
                f"{_seconds(r.attention_seconds):>10} s"
            )
        machine = self.machine.get("gpu") or self.machine["device"]
        lines += [
            "KL: of the next token, KL(exact || recipe), mean over positions. top-1: same likeliest token.",
            "error: relative L2 of a head's output on the inputs that its layer got; mean and maximum over",
            f"{self.exact.error.size} heads of all layers. attention: time of all layers, in "
            f"{', '.join(sorted({r.backend for r in self.results}))}.",
            f"{machine}, {self.machine['date']}: {_seconds(self.seconds)} s.",
        ]
        return "\n".join(lines)


def _seconds(x: float) -> str:
    """A time of milliseconds or hours, in seconds."""
    return f"{x:.0f}" if x >= 10 else f"{x:#.2g}".rstrip(".")


@dataclass
class _Sums:
    """Running sums over positions and sequences for one recipe."""

    error: NDArray[np.float64]
    backend: str
    nll: float = 0.0
    kl: float = 0.0
    agree: int = 0
    seconds: float = 0.0

    def result(self, name: str, positions: int, targets: int) -> RecipeResult:
        return RecipeResult(
            recipe=name,
            perplexity=float(np.exp(self.nll / targets)),
            kl=self.kl / positions,
            top1_agreement=self.agree / positions,
            error=self.error,
            attention_seconds=self.seconds,
            backend=self.backend,
        )


def _head_errors(out: Any, ref: Any) -> NDArray[np.float64]:
    """Relative L2 error of each head, (H,), of NumPy or CuPy arrays (1, H, S, D)."""
    norms = [np.sqrt(((x * x)[0]).sum(axis=(1, 2))) for x in (out - ref, ref)]
    return np.array([float(e) / float(r) for e, r in zip(*norms, strict=True)])


def _run(
    model: SmolLM2,
    tokens: NDArray[Any],
    attend: AttentionHook,
    sums: _Sums,
    measure: Callable[[int, Any, Any, Any, Any], None] | None,
) -> Any:
    """Hidden states of the model under one attention, whose time is added to ``sums``.

    ``measure(layer, q, k, v, out)`` looks at what every layer got and gave, off the clock.
    """

    def hook(layer: int, q: Any, k: Any, v: Any) -> Any:
        start = time.perf_counter()
        out = model.xp.asarray(attend(layer, q, k, v), dtype=np.float32)
        if model.xp is not np:
            model.xp.cuda.Device().synchronize()
        sums.seconds += time.perf_counter() - start
        if measure is not None:
            measure(layer, q, k, v, out)
        return out

    return model.hidden(tokens, hook)


def _compare(model: SmolLM2, tokens: NDArray[Any], exact: Any, others: list[tuple[Any, _Sums]]) -> None:
    """Add likelihood, divergence and agreement of hidden states, a few positions at a time."""
    xp = model.xp
    for start in range(0, len(tokens), _ROWS):
        rows = slice(start, start + _ROWS)
        target = xp.asarray(tokens[start + 1 : start + 1 + _ROWS])  # one short in the last step
        exact_log = model.log_probs(exact[rows])
        exact_p, exact_best = np.exp(exact_log), exact_log.argmax(axis=-1)
        for hidden, sums in others:
            log = exact_log if hidden is exact else model.log_probs(hidden[rows])
            sums.nll -= float(log[xp.arange(len(target)), target].sum(dtype=np.float64))
            sums.agree += int((log.argmax(axis=-1) == exact_best).sum())
            if hidden is not exact:
                sums.kl += float(np.einsum("rv,rv->r", exact_p, exact_log - log).sum(dtype=np.float64))


def _nothing(model: SmolLM2, tokens: int) -> Any:
    """q, k and v of a layer, all zeros."""
    c = model.config
    return [
        model.xp.zeros((1, heads, tokens, c.head_dim), np.float32) for heads in (c.heads, *[c.kv_heads] * 2)
    ]


def _backend(model: SmolLM2, recipe: Recipe, backend: str) -> str:
    """What computes a recipe on the model's arrays: the backend asked for, or else the NumPy model."""
    try:
        return api.explain(*_nothing(model, 1), recipe=recipe, is_causal=True, backend=backend).backend
    except UnsupportedError:
        return "numpy"


def evaluate(
    recipes: Sequence[str | Recipe] = DEFAULT_RECIPES,
    *,
    tokens: int = 2048,
    sequences: int = 2,
    text: str | None = None,
    model: SmolLM2 | None = None,
    attention: Callable[..., Any] | None = None,
    backend: str = "auto",
    progress: Progress | None = None,
) -> Evaluation:
    """Run a language model with its attention replaced by every recipe in turn.

    Parameters
    ----------
    recipes : sequence of str or Recipe
    tokens : int
        Length of a sequence, 2 to 8,192 (the model's context).
    sequences : int
        Number of sequences, taken one after another from the text.
    text : str, optional
        English text; by default Python's own language reference (`intfa_cupy.corpus`), whose first
        2 x 2,048 tokens were the same in Python 3.10 to 3.13.
    model : SmolLM2, optional
        From `load_smollm2`, which is called otherwise. One loaded with ``device="gpu"`` hands CuPy
        arrays to the attention and so runs the kernels.
    attention : callable, optional
        Called as ``attention(q, k, v, recipe=recipe, is_causal=True)``; `intfa_cupy.attention` by
        default.
    backend : str
        That of `intfa_cupy.attention`. A recipe that it does not serve is computed by ``"numpy"``, and its
        result says so.
    progress : callable, optional
        ``progress(what, done)`` is called before each run, with ``done`` from 0 to 1.

    Returns
    -------
    Evaluation
        Prints as a table.

    Raises
    ------
    ImportError
        The extra ``[models]`` or the weights are not installed; the message holds the command.
    ValueError
        No or two equal recipes, a length out of range, a text that is too short.

    Examples
    --------
    >>> print(evaluate(["int8"], tokens=256, sequences=1))  # doctest: +SKIP
    """
    chosen = [get_recipe(recipe) for recipe in recipes]
    names = [recipe.name for recipe in chosen]
    if not names or len(set(names)) < len(names) or "exact" in names:
        raise ValueError(f"recipes must be at least one, of different names, none 'exact'; got {names}")
    if sequences < 1:
        raise ValueError(f"sequences must be at least 1, got {sequences}")
    text = text_corpus() if text is None else text
    model = load_smollm2() if model is None else model
    if not 2 <= tokens <= model.config.context:
        raise ValueError(f"tokens must be in 2..{model.config.context}, got {tokens}")
    begin = time.perf_counter()
    ids = model.encode(text)
    if len(ids) < tokens * sequences:
        raise ValueError(f"text must have {sequences} x {tokens} tokens or more, got {len(ids)}")

    shape = (model.config.layers, model.config.heads)
    sinks = np.zeros(shape)
    home = "numpy" if model.xp is np else "cupy"
    names_of = [home, *(_backend(model, r, backend) if attention is None else home for r in chosen)]
    sums = [_Sums(np.zeros(shape), name) for name in names_of]
    steps = sequences * len(sums)

    def replaced(recipe: Recipe, where: str) -> AttentionHook:
        def hook(layer: int, q: Any, k: Any, v: Any) -> Any:
            if attention is not None:
                return attention(q, k, v, recipe=recipe, is_causal=True)
            return api.attention(q, k, v, recipe=recipe, is_causal=True, backend=where)

        return hook

    hooks = [exact_attention, *map(replaced, chosen, names_of[1:])]
    if model.xp is not np:  # kernels are compiled at their first call, which is not to count as attention
        for hook in hooks:
            hook(0, *_nothing(model, tokens))

    def run(step: int, ids_here: NDArray[Any]) -> Any:
        sequence, which = divmod(step, len(sums))
        if progress is not None:
            name = ["exact", *names][which]
            progress(f"sequence {sequence + 1} of {sequences}, {name}", step / steps)

        def measure(layer: int, q: Any, k: Any, v: Any, out: Any) -> None:
            if which == 0:
                sinks[layer] = sink_mass(q, k)
            else:
                sums[which].error[layer] = _head_errors(out, exact_attention(layer, q, k, v))

        return _run(model, ids_here, hooks[which], sums[which], measure if sequence == 0 else None)

    for sequence in range(sequences):
        ids_here = ids[sequence * tokens : (sequence + 1) * tokens]
        hidden = [run(sequence * len(sums) + which, ids_here) for which in range(len(sums))]
        _compare(model, ids_here, hidden[0], list(zip(hidden, sums, strict=True)))
    if progress is not None:
        progress("done", 1.0)

    positions, targets = sequences * tokens, sequences * (tokens - 1)
    exact_result, *results = (
        s.result(name, positions, targets) for s, name in zip(sums, ["exact", *names], strict=True)
    )
    return Evaluation(
        exact=exact_result,
        results=tuple(results),
        sink_mass=sinks,
        tokens=tokens,
        sequences=sequences,
        text=corpus_fingerprint(model.decode(ids[: tokens * sequences])),
        seconds=time.perf_counter() - begin,
        machine=records.host() if model.xp is np else records.machine(),
    )


def recorded() -> Evaluation | None:
    """Return the evaluation that the package ships, or None where it ships none."""
    document = records.load("evaluation")
    return None if document is None else Evaluation.from_dict(document)


def heat_map(evaluation: Evaluation, path: str | Path | None = None) -> Figure:
    """Draw the sink mass and every recipe's error, per layer and head.

    Parameters
    ----------
    evaluation : Evaluation
    path : path, optional
        Where to write a PNG.

    Returns
    -------
    matplotlib.figure.Figure
    """
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    columns = 1 + len(evaluation.results)
    figure = Figure(figsize=(1.6 + 1.75 * columns, 6.6), layout="constrained")
    first, *axes = figure.subplots(1, columns, sharey=True, squeeze=False)[0]
    common: dict[str, Any] = {"aspect": "auto", "origin": "upper", "interpolation": "nearest"}
    sinks = first.imshow(100 * evaluation.sink_mass, cmap="magma", vmin=0, vmax=100, **common)
    first.set_title("sink mass", fontsize=10)
    first.set_ylabel("layer")
    errors = [100 * result.error for result in evaluation.results]
    # One logarithmic scale for all recipes, so that the panels can be compared.
    low = max(min(float(e.min()) for e in errors), 1e-3)
    high = max(max(float(e.max()) for e in errors), 2 * low)
    norm = LogNorm(low, high)
    image = None
    for axis, error, result in zip(axes, errors, evaluation.results, strict=True):
        image = axis.imshow(error, cmap="viridis", norm=norm, **common)
        axis.set_title(f"{result.recipe}\nmean {error.mean():.2g} %", fontsize=10)
    for axis in (first, *axes):
        axis.set_xlabel("query head")
        axis.set_xticks(range(0, evaluation.sink_mass.shape[1], 2))
    figure.colorbar(sinks, ax=first, location="left", label="probability of the first token, %", pad=0.02)
    assert image is not None  # evaluate() refuses an empty list of recipes
    bar = figure.colorbar(image, ax=axes, label="relative L2 error of the output, %")
    ticks = [t for t in (0.001, 0.01, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if low <= t <= high]
    bar.set_ticks(ticks, labels=[f"{t:g}" for t in ticks])
    bar.minorticks_off()
    figure.suptitle(
        f"SmolLM2-135M, {evaluation.tokens:,} tokens:{' ' if columns > 3 else chr(10)}"
        "attention sink and error by layer and head",
        fontsize=11,
    )
    if path is not None:
        figure.savefig(path, dpi=130)
    return figure
