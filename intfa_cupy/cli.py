"""The command line. One function per command; the work is in the module that it imports when called."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
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
    causal: Annotated[
        bool | None,
        typer.Option(
            "--causal/--no-causal",
            help="Causal or full attention; by default what the input says of itself, else full.",
            show_default=False,
        ),
    ] = None,
    layout: Annotated[
        str, typer.Option(metavar="LAYOUT", help="Order of the dimensions of your arrays: bhsd or bshd.")
    ] = "bhsd",
    recipe: Annotated[
        list[str] | None,
        typer.Option(
            "--recipe",
            "-r",
            metavar="NAME",
            help="A recipe to run, repeatable; all by default. fp8-e4m3 is always there.",
            show_default=False,
        ),
    ] = None,
    backend: Annotated[
        list[str] | None,
        typer.Option(
            "--backend",
            "-b",
            metavar="NAME",
            help="A backend to time, repeatable; all available by default.",
            show_default=False,
        ),
    ] = None,
    plot: Annotated[
        Path, typer.Option("--plot", metavar="FILE.png", help="Where to draw the comparison.")
    ] = Path("intfa_compare.png"),
    no_plot: Annotated[bool, typer.Option("--no-plot", help="Draw nothing.")] = False,
    json_file: Annotated[
        Path | None,
        typer.Option(
            "--json",
            metavar="FILE",
            help="Also write everything, head by head, as JSON; - is standard output, without tables.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Compare all recipes on real data: error against exact attention, bytes and time."""
    from . import compare as work
    from .problem import LAYOUTS
    from .recipes import recipes

    if layout not in LAYOUTS:
        _fail(f"--layout must be one of {', '.join(LAYOUTS)}; got {layout!r}")
    for name in recipe or ():
        if name not in recipes():
            _fail(f"--recipe must be one of {', '.join(recipes())}; got {name!r}")
    chosen = _chosen_backends(backend)
    for target in (None if no_plot else plot, json_file):
        if target is not None and not target.resolve().parent.is_dir():
            _fail(f"{target}: no such folder")
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

        try:
            plots.save(plots.compare_figure(result), plot)
        except OSError as error:
            _fail(f"{plot}: {error.strerror}")
        typer.echo(f"drawn: {plot}", err=True)


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
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from .compare import BASELINE, compare
    from .recipes import recipes

    console = Console(stderr=True)
    columns = (TextColumn("{task.description:<26}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    count = len({*recipe, BASELINE} if recipe else recipes())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=len(inputs.layers) * (count + 1))
        begun = 0

        def step(what: str) -> None:
            nonlocal begun
            bar.update(task, description=what, completed=begun)
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
            help="Repeatable; 64, 128 and 256 by default.",
            show_default=False,
        ),
    ] = None,
    length: Annotated[
        list[int] | None,
        typer.Option(
            "--length",
            "-n",
            metavar="N",
            help="Repeatable; 1024, 4096 and 16384 by default.",
            show_default=False,
        ),
    ] = None,
    causal: Annotated[
        bool | None,
        typer.Option(
            "--causal/--no-causal", help="Only causal or only full; both by default.", show_default=False
        ),
    ] = None,
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
    recipe: Annotated[
        list[str] | None,
        typer.Option(
            "--recipe",
            "-r",
            metavar="NAME",
            help="Repeatable; int8-fast, int8 and paper-int8 by default.",
            show_default=False,
        ),
    ] = None,
    backend: Annotated[
        list[str] | None,
        typer.Option(
            "--backend",
            "-b",
            metavar="NAME",
            help="A kernel, repeatable; what auto takes by default.",
            show_default=False,
        ),
    ] = None,
    repeats: Annotated[int, typer.Option(min=3, help="Launches per figure.")] = 30,
    no_peers: Annotated[bool, typer.Option("--no-peers", help="Leave torch's attention out.")] = False,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE.png", help="Draw it.", show_default=False)
    ] = None,
    json_file: Annotated[
        Path | None,
        typer.Option(
            "--json", metavar="FILE", help="Also write it as JSON; - is standard output.", show_default=False
        ),
    ] = None,
    record: Annotated[
        bool, typer.Option("--record", help="Keep it in the package as the recorded run (in a checkout).")
    ] = False,
) -> None:
    """Time the kernels beside torch's cuDNN and FlashAttention-2, in one run on this GPU."""
    from . import bench as work
    from . import bench_report, records
    from .recipes import recipes

    names = recipe or ["int8-fast", "int8", "paper-int8"]
    for name in names:
        if name not in recipes():
            _fail(f"--recipe must be one of {', '.join(recipes())}; got {name!r}")
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
        last = records.freshness("bench")
        _fail(f"{error}. Last recorded run: {last}")
    if json_file != _STDOUT:
        from .tables import stdout_console

        bench_report.print_bench(stdout_console(), result)
    if json_file is not None:
        _write_json(json_file, result.as_dict())
    if record:
        typer.echo(f"recorded: {records.save('bench', result.as_dict())}", err=True)
    if plot is not None:
        from . import plots

        plots.save(bench_report.bench_figure(result), plot)
        typer.echo(f"drawn: {plot}", err=True)
