"""The command line. One function per command; the work is in the module that it imports when called."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .bench import BenchResult
    from .compare import Comparison, Inputs

__all__ = ["app"]

app = typer.Typer(
    name="intfa-cupy",
    help="INT8 attention for NVIDIA GPUs, with an exact NumPy model that runs anywhere.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

#: A file name that stands for standard output.
_STDOUT = Path("-")

# Options that several commands share. What a command does by default stands in its own help.
RecipeOption = Annotated[
    list[str] | None,
    typer.Option(
        "--recipe",
        "-r",
        metavar="NAME",
        help="A recipe, repeatable; see the defaults above.",
        show_default=False,
    ),
]
BackendsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--backend",
        "-b",
        metavar="NAME",
        help="A backend, repeatable; see the defaults above.",
        show_default=False,
    ),
]
BackendOption = Annotated[
    str | None,
    typer.Option(
        "--backend",
        "-b",
        metavar="NAME",
        help="What computes it; by default the fastest available that serves the recipe.",
        show_default=False,
    ),
]
LengthsOption = Annotated[
    list[int] | None,
    typer.Option(
        "--length", "-n", metavar="N", min=1, help="Repeatable; see the defaults above.", show_default=False
    ),
]
CausalOption = Annotated[
    bool | None,
    typer.Option(
        "--causal/--no-causal", help="Causal or full attention; see the defaults above.", show_default=False
    ),
]
RepeatsOption = Annotated[int, typer.Option(min=3, help="Launches per figure.")]
NoPeersOption = Annotated[bool, typer.Option("--no-peers", help="Leave torch's attention out.")]
JsonOption = Annotated[
    Path | None,
    typer.Option(
        "--json",
        metavar="FILE",
        help="Also write everything as JSON; - is standard output, without tables.",
        show_default=False,
    ),
]
PlotOption = Annotated[
    Path | None, typer.Option("--plot", metavar="FILE.png", help="Draw it.", show_default=False)
]
NoPlotOption = Annotated[bool, typer.Option("--no-plot", help="Draw nothing.")]
RecordOption = Annotated[
    bool, typer.Option("--record", help="Keep it in the package as the recorded run (in a checkout).")
]


def _fail(message: str) -> NoReturn:
    """Print one line to standard error and end with status 2, as for a wrong option."""
    typer.echo(f"error: {' '.join(message.split())}", err=True)
    raise typer.Exit(2)


def _write_json(path: Path, document: dict[str, Any]) -> None:
    import json

    text = json.dumps(document, indent=2, allow_nan=False) + "\n"
    if path == _STDOUT:
        typer.echo(text, nl=False)
        return
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        _fail(f"{path}: {error.strerror}")


def _show_version(wanted: bool) -> None:
    if wanted:
        from . import __version__

        typer.echo(f"intfa-cupy {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    pass


@app.command()
def compare(
    input_file: Annotated[
        Path | None,
        typer.Option(
            "--input",
            "-i",
            metavar="FILE.npz",
            help="Your own arrays: q, k and v, or layer0_q, layer0_k, layer0_v, layer1_q, ... "
            "The shipped capture of SmolLM2-135M by default.",
            show_default=False,
        ),
    ] = None,
    causal: CausalOption = None,
    layout: Annotated[
        str, typer.Option(metavar="LAYOUT", help="Order of the dimensions of your arrays: bhsd or bshd.")
    ] = "bhsd",
    recipe: RecipeOption = None,
    backend: BackendsOption = None,
    plot: Annotated[
        Path, typer.Option("--plot", metavar="FILE.png", help="Where to draw the comparison.")
    ] = Path("intfa_compare.png"),
    no_plot: NoPlotOption = False,
    json_file: JsonOption = None,
) -> None:
    """Compare all recipes on real data: error against exact attention, bytes and time.

    By default all recipes (fp8-e4m3 is always there), timed on every backend available.

    The mask is by default what the input says of itself, or else none.
    """
    from . import compare as work
    from .problem import LAYOUTS

    if layout not in LAYOUTS:
        _fail(f"--layout must be one of {', '.join(LAYOUTS)}; got {layout!r}")
    _check_recipes(recipe)
    chosen = _chosen_backends(backend)
    _check_folders(None if no_plot else plot, json_file)
    try:
        inputs = work.shipped_inputs() if input_file is None else work.load_inputs(input_file, layout)
    except work.InputError as error:
        _fail(str(error))
    result = _compare_with_progress(inputs, recipe, chosen, causal, insist=bool(backend))
    if json_file != _STDOUT:
        _print_comparison(result)
    if json_file is not None:
        _write_json(json_file, result.as_dict())
    if not no_plot:
        from . import plots

        _save_picture(plots.compare_figure(result), plot)


def _check_recipes(names: list[str] | None) -> None:
    from .recipes import recipes

    for name in names or ():
        if name not in recipes():
            _fail(f"--recipe must be one of {', '.join(recipes())}; got {name!r}")


def _check_folders(*targets: Path | None) -> None:
    """Refuse before the work what could not be written after it."""
    for target in targets:
        if target is not None and not target.resolve().parent.is_dir():
            _fail(f"{target}: no such folder")


def _save_picture(figure: Figure, path: Path) -> None:
    from . import plots

    try:
        plots.save(figure, path)
    except OSError as error:
        _fail(f"{path}: {error.strerror}")
    typer.echo(f"drawn: {path}", err=True)


@contextmanager
def _progress_bar() -> Iterator[Callable[[str, float], None]]:
    """A bar on a terminal: called with what begins and the part done, 0 to 1."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description:<34}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=1.0)
        yield lambda what, done: bar.update(task, description=what, completed=done)


def _chosen_backends(wanted: list[str] | None) -> list[str]:
    from .dispatch import backends

    found = backends()
    if not wanted:
        return [name for name, status in found.items() if status.available]
    for name in wanted:
        if name not in found:
            _fail(f"--backend must be one of {', '.join(found)}; got {name!r}")
        if not found[name].available:
            _fail(f"--backend {name} is not available: {found[name].reason}")
    return list(dict.fromkeys(wanted))


def _compare_with_progress(
    inputs: Inputs, recipe: list[str] | None, backends: list[str], causal: bool | None, *, insist: bool
) -> Comparison:
    from .compare import BASELINE, compare
    from .recipes import recipes

    count = len({*recipe, BASELINE} if recipe else recipes())
    total = len(inputs.layers) * (count + 1)
    begun = 0
    with _progress_bar() as bar:

        def step(what: str) -> None:
            nonlocal begun
            bar(what, begun / total)
            begun += 1

        return compare(
            inputs, recipe_names=recipe, backends=backends, is_causal=causal, insist=insist, progress=step
        )


def _print_comparison(result: Comparison) -> None:
    from .compare import BASELINE
    from .tables import Column, print_table, stdout_console

    console = stdout_console()
    console.print(result.title, markup=False)
    for layer in result.layers:
        console.print(f"\n{layer.title}", style="bold", markup=False)
        console.print(" ".join(f"{k}={v}" for k, v in layer.shape.items()), markup=False)
        print_table(console, Column("\nrecipe", result.order), result.columns(layer), bold="int8")
    console.print()
    for line in result.legend():
        console.print(line, markup=False)
    console.print()
    for name in result.order:
        if name.startswith("int8"):
            change = result.against_baseline(name)
            console.print(
                f"{name}: {100 * result.mean(name):.2f} % mean error over heads and layers, "
                f"{100 * abs(change):.0f} % {'below' if change < 0 else 'above'} {BASELINE}",
                markup=False,
            )


@app.command()
def info(
    json_file: Annotated[
        Path | None,
        typer.Option(
            "--json",
            metavar="FILE",
            help="Write it as JSON instead; - is standard output.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Show what was found: GPU, CuPy, compiler and headers, backends and why not, versions."""
    from . import info as work

    document, found = work.collect()
    if json_file is not None:
        _write_json(json_file, document)
        return
    for title, rows in work.report(document, found):
        typer.secho(title, bold=True)
        width = max(len(label) for label, _ in rows)
        for label, text in rows:
            for i, line in enumerate(text.splitlines() or [""]):
                typer.echo(f"  {'' if i else label:<{width}}  {line}")


@app.command()
def bench(
    head_dim: Annotated[
        list[int] | None,
        typer.Option(
            "--head-dim",
            "-d",
            metavar="D",
            help="Repeatable; see the defaults above.",
            show_default=False,
        ),
    ] = None,
    length: LengthsOption = None,
    causal: CausalOption = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens in all: the batch is tokens / N.")] = 16384,
    hidden: Annotated[int, typer.Option(min=1, help="Heads times head dimension.")] = 2048,
    shape: Annotated[
        list[str] | None,
        typer.Option(
            metavar="B,H,N,D[,causal]", help="Shapes of your own, repeatable, instead.", show_default=False
        ),
    ] = None,
    paper: Annotated[
        bool, typer.Option("--paper", help="The paper's shapes instead: B4 H32 d64, 1k to 16k.")
    ] = False,
    recipe: RecipeOption = None,
    backend: BackendsOption = None,
    repeats: RepeatsOption = 30,
    no_peers: NoPeersOption = False,
    plot: PlotOption = None,
    json_file: JsonOption = None,
    record: RecordOption = False,
    recorded: Annotated[
        bool, typer.Option("--recorded", help="Measure nothing: show the recorded run, without a GPU too.")
    ] = False,
) -> None:
    """Time the kernels beside torch's cuDNN and FlashAttention-2, in one run on this GPU.

    By default int8-fast, int8 and paper-int8, each by the kernel that serves it fastest.

    Shapes: by default head dimensions 64, 128 and 256, lengths 1024, 4096 and 16384, full and causal.
    """
    from . import bench as work
    from . import bench_report, records

    names = recipe or ["int8-fast", "int8", "paper-int8"]
    _check_recipes(names)
    _check_folders(plot, json_file)
    if recorded:
        document = records.load("bench")
        if document is None:
            _fail("no run is recorded: intfa-cupy bench --record on a GPU writes one")
        if json_file != _STDOUT:
            typer.echo(f"A recorded run, not of this machine: {records.freshness('bench')}")
        _show_bench(work.BenchResult.from_dict(document), json_file, plot)
        return
    try:
        if shape:
            shapes = [bench_report.shape_from_text(text) for text in shape]
        elif paper:
            shapes = list(work.PAPER_SHAPES)
        else:
            masks = (False, True) if causal is None else (causal,)
            lengths = length or (1024, 4096, 16384)
            shapes = list(work.equal_token_shapes(head_dim or (64, 128, 256), lengths, masks, tokens, hidden))
        chosen = None if not backend else _chosen_backends(backend)
        result = work.bench(
            shapes, names, backends=chosen, peers=not no_peers, repeats=repeats,
            progress=lambda what: typer.echo(what, err=True),
        )  # fmt: skip
    except ValueError as error:
        _fail(str(error))
    except work.BenchUnavailable as error:
        shown = " (--recorded shows it)" if records.load("bench") else ""
        _fail(f"{error}. Last recorded run: {records.freshness('bench')}{shown}")
    if record:
        typer.echo(f"recorded: {records.save('bench', result.as_dict())}", err=True)
    _show_bench(result, json_file, plot)


def _show_bench(result: BenchResult, json_file: Path | None, plot: Path | None) -> None:
    from . import bench_report

    if json_file != _STDOUT:
        from .tables import stdout_console

        bench_report.print_bench(stdout_console(), result)
    if json_file is not None:
        _write_json(json_file, result.as_dict())
    if plot is not None:
        _save_picture(bench_report.bench_figure(result), plot)


class Part(str, Enum):
    """What `reproduce` reproduces."""

    table1 = "table1"
    table2 = "table2"
    speed = "speed"
    all = "all"


@app.command()
def reproduce(
    part: Annotated[
        list[Part] | None,
        typer.Argument(
            metavar="PART", help="One or more of table1, table2, speed and all.", show_default="all"
        ),
    ] = None,
    length: LengthsOption = None,
    seeds: Annotated[int, typer.Option(min=1, help="Draws of Q, K and V, for the tables.")] = 3,
    heads: Annotated[int, typer.Option(min=1, help="Heads per draw, for the tables.")] = 2,
    full: Annotated[
        bool,
        typer.Option(
            "--full", help="Tables over all N queries, not 512: half an hour on 2 cores, seconds on a GPU."
        ),
    ] = False,
    backend: BackendOption = None,
    repeats: RepeatsOption = 30,
    no_peers: NoPeersOption = False,
    plot: Annotated[
        Path,
        typer.Option("--plot", metavar="FILE.png", help="Where to draw; NAME_tables.png and NAME_speed.png."),
    ] = Path("intfa_reproduce.png"),
    no_plot: NoPlotOption = False,
    json_file: JsonOption = None,
    record: RecordOption = False,
) -> None:
    """Reproduce the INT-FlashAttention paper: its two tables of errors and its speed figure.

    By default all of it at the paper's lengths, 1k to 16k.

    The tables need no GPU. Without one, the speed figure is that of the recorded run.
    """
    parts = set(part or [Part.all])
    wanted = [p.value for p in (Part.table1, Part.table2) if parts & {p, Part.all}]
    with_speed = bool(parts & {Part.speed, Part.all})
    if record and not with_speed:
        _fail("--record keeps the speed figure: use it with speed or all")
    chosen = _chosen_backends([backend])[0] if backend else "auto"
    _check_folders(None if no_plot else plot, json_file)
    document: dict[str, Any] = {}
    if wanted:
        document["tables"] = _reproduce_tables(
            wanted, length, seeds, heads, full, chosen, json_file != _STDOUT, None if no_plot else plot
        )
    if with_speed:
        document["speed"] = _reproduce_speed(
            length, repeats, not no_peers, record, json_file != _STDOUT, None if no_plot else plot
        )
    if json_file is not None:
        _write_json(json_file, document)


def _reproduce_tables(
    names: list[str],
    length: list[int] | None,
    seeds: int,
    heads: int,
    full: bool,
    backend: str,
    printed: bool,
    plot: Path | None,
) -> dict[str, Any]:
    from . import paper
    from .reproduce import tables

    with _progress_bar() as bar:
        result = tables(
            names,
            lengths=length or paper.LENGTHS,
            seeds=seeds,
            heads=heads,
            full=full,
            backend=backend,
            progress=bar,
        )
    if printed:
        from .reproduce_report import print_tables
        from .tables import stdout_console

        print_tables(stdout_console(), result)
    if plot is not None:
        _save_picture(result.figure(), plot.with_name(f"{plot.stem}_tables.png"))
    return result.as_dict()


def _reproduce_speed(
    length: list[int] | None, repeats: int, peers: bool, record: bool, printed: bool, plot: Path | None
) -> dict[str, Any] | None:
    """Measure, or without a GPU show what was recorded; None where that does not exist either."""
    from . import paper, records, reproduce_speed
    from .bench import BenchUnavailable
    from .reproduce_report import print_speed
    from .tables import stdout_console

    result: reproduce_speed.SpeedResult | None
    try:
        result = reproduce_speed.speed(
            lengths=length or paper.LENGTHS,
            repeats=repeats,
            peers=peers,
            progress=lambda what: typer.echo(what, err=True),
        )
    except BenchUnavailable as error:
        reason = str(error).removeprefix("bench needs a GPU: ")
        if record:
            _fail(f"--record needs a GPU: {reason}")
        typer.echo(
            f"Speed: not measured here: {reason}.\n"
            "It needs an NVIDIA GPU of compute capability 8.0 or later with 16 GB, CuPy (the extra\n"
            "[cuda12] or [cuda13]) and, for the peers, torch; then: intfa-cupy reproduce speed",
            err=not printed,
        )
        result = reproduce_speed.recorded()
        typer.echo(f"Last recorded run: {records.freshness('speed')}", err=not printed)
    if result is None:
        return None
    if printed:
        typer.echo()
        print_speed(stdout_console(), result)
    if record:
        typer.echo(f"recorded: {records.save('speed', result.as_dict())}", err=True)
    if plot is not None:
        _save_picture(result.figure(), plot.with_name(f"{plot.stem}_speed.png"))
    return result.as_dict()


@app.command()
def evaluate(
    recipe: RecipeOption = None,
    tokens: Annotated[int, typer.Option(min=2, max=8192, help="Length of a sequence.")] = 2048,
    sequences: Annotated[int, typer.Option(min=1, help="Sequences, one after another in the text.")] = 2,
    text_file: Annotated[
        Path | None,
        typer.Option(
            "--text",
            metavar="FILE",
            help="English text; Python's language reference by default.",
            show_default=False,
        ),
    ] = None,
    backend: BackendOption = None,
    plot: Annotated[
        Path, typer.Option("--plot", metavar="FILE.png", help="Where to draw the error of every head.")
    ] = Path("intfa_evaluate.png"),
    no_plot: NoPlotOption = False,
    json_file: JsonOption = None,
    record: RecordOption = False,
) -> None:
    """Run SmolLM2-135M with the attention of all its layers replaced, and see whether it still works.

    Perplexity, divergence of the next token's distribution, top-1 agreement, and the error of every head.

    By default int8, int8-fast, half-int8-plus, paper-int8 and fp8-e4m3.
    """
    from . import evaluate as work
    from . import records
    from .smollm2 import load_smollm2

    _check_recipes(recipe)
    chosen = _chosen_backends([backend])[0] if backend else "auto"
    _check_folders(None if no_plot else plot, json_file)
    try:
        text = None if text_file is None else text_file.read_text(encoding="utf-8")
    except OSError as error:
        _fail(f"{text_file}: {error.strerror}")
    except UnicodeDecodeError:
        _fail(f"{text_file}: not UTF-8 text")
    names = list(dict.fromkeys(recipe or work.DEFAULT_RECIPES))
    try:
        on_gpu = chosen != "numpy" and len(_chosen_backends(None)) > 1
        model = load_smollm2(device="gpu" if on_gpu else "cpu")
        with _progress_bar() as bar:
            result = work.evaluate(
                names,
                tokens=tokens,
                sequences=sequences,
                text=text,
                model=model,
                backend=chosen,
                progress=bar,
            )
    except ImportError as error:
        last = work.recorded()
        if last is not None and json_file != _STDOUT:
            typer.echo(f"Not run here. The recorded run:\n\n{last}\n")
        _fail(str(error))
    except ValueError as error:
        _fail(str(error))
    document = result.as_dict()
    if json_file != _STDOUT:
        typer.echo(str(result))
    if json_file is not None:
        _write_json(json_file, document)
    if record:
        typer.echo(f"recorded: {records.save('evaluation', document)}", err=True)
    if not no_plot:
        _save_picture(work.heat_map(result), plot)
