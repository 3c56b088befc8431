"""The command line: what it prints, writes, draws and refuses."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

import intfa_cupy as intfa
from intfa_cupy import cli
from intfa_cupy import compare as work
from intfa_cupy.capture import load_capture
from intfa_cupy.dispatch import BackendStatus
from intfa_cupy.tables import Column, percent, print_table

# Most accurate first: what the recipes are for, so it must hold on the shipped activations.
ORDER = [
    "fp16",
    "half-int8-plus",
    "int8",
    "int8-fast",
    "half-int8",
    "paper-int8",
    "fp8-e4m3",
    "k4",
    "int4",
    "fp8-e5m2",
]


def run(*args: object) -> Any:
    return CliRunner().invoke(cli.app, [str(a) for a in args])


def environment(**changes: str) -> dict[str, str]:
    root = str(Path(intfa.__file__).parents[1])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    kept = {k: v for k, v in os.environ.items() if k != "COLUMNS"}
    return {**kept, "PYTHONPATH": path, **changes}


@dataclasses.dataclass
class Shared:
    stdout: str
    stderr: str
    document: dict[str, Any]
    png: Path


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Shared:
    """One run of the main job on the shipped capture, on the CPU, each recipe timed once."""
    folder = tmp_path_factory.mktemp("compare")
    png, document = folder / "errors.png", folder / "errors.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(work, "_ENOUGH_S", 0.0)
        patch.delenv("COLUMNS", raising=False)
        result = run("compare", "--plot", png, "--json", document, "--backend", "numpy")
    assert result.exit_code == 0, result.output
    return Shared(result.stdout, result.stderr, json.loads(document.read_text()), png)


def tables(stdout: str) -> list[list[list[str]]]:
    """The cells of each table of recipes in the output."""
    found: list[list[list[str]]] = []
    for line in stdout.splitlines():
        cells = line.split()
        if cells[:1] == ["recipe"]:
            found.append([])
        elif found and cells and cells[0] in intfa.recipes() and line.startswith(cells[0] + " "):
            found[-1].append(cells)
    return found


def test_all_recipes_in_order_of_accuracy(shared: Shared) -> None:
    assert set(ORDER) == set(intfa.recipes())
    assert [r["recipe"] for r in shared.document["summary"]] == ORDER
    layers, _ = load_capture()
    printed = tables(shared.stdout)
    assert len(printed) == len(layers) >= 2
    for table in printed:
        assert [cells[0] for cells in table] == ORDER


def test_table_shows_the_figures_of_the_json(shared: Shared) -> None:
    for table, layer in zip(tables(shared.stdout), shared.document["layers"], strict=True):
        for cells, row in zip(table, layer["recipes"], strict=True):
            overall = row["runs"]["numpy"]["overall"]
            want = [row["relative_l2_mean"], row["relative_l2_worst"]]
            assert [float(c) for c in cells[1:3]] == pytest.approx([100 * x for x in want], rel=6e-3)
            assert float(cells[3]) == pytest.approx(100 * row["vs_baseline"], abs=0.06)
            assert float(cells[4]) == pytest.approx(overall["cosine"], abs=1e-5)
            assert float(cells[5]) == pytest.approx(100 * overall["mre"], rel=6e-3)
            assert float(cells[6]) == pytest.approx(100 * overall["sum_ratio"], rel=6e-3)
            assert int(cells[7].replace(",", "")) == round(row["input_bytes"] / 1024)
            assert float(cells[8]) == pytest.approx(100 * row["input_bytes"] / row["fp16_bytes"], abs=0.51)


@pytest.mark.parametrize("recipe", ["int8", "fp8-e4m3", "int4"])
def test_json_agrees_with_the_library(shared: Shared, recipe: str) -> None:
    layers, _ = load_capture()
    assert [layer["name"] for layer in shared.document["layers"]] == [f"layer {i}" for i in layers]
    for (q, k, v), layer in zip(layers.values(), shared.document["layers"], strict=True):
        ref = intfa.reference_attention(q, k, v, is_causal=True)
        out = intfa.attention(q, k, v, recipe=recipe, is_causal=True, backend="numpy")
        (row,) = [r for r in layer["recipes"] if r["recipe"] == recipe]
        numbers = row["runs"]["numpy"]
        assert numbers["overall"] == pytest.approx(intfa.error_report(out, ref).as_dict(), rel=1e-9)
        heads = [intfa.error_report(out[0, h], ref[0, h]) for h in range(q.shape[1])]
        assert [h["relative_l2"] for h in numbers["heads"]] == pytest.approx(
            [h.relative_l2 for h in heads], rel=1e-9
        )
        assert row["relative_l2_mean"] == pytest.approx(np.mean([h.relative_l2 for h in heads]), rel=1e-9)
        assert row["worst_head"] == int(np.argmax([h.relative_l2 for h in heads]))
        assert row["input_bytes"] == intfa.quantize_qkv(q, k, v, recipe=recipe, backend="numpy").nbytes
        assert row["fp16_bytes"] == q.nbytes + k.nbytes + v.nbytes
        assert numbers["seconds"] > 0


def test_int8_is_accurate_on_real_activations(shared: Shared) -> None:
    assert shared.document["is_causal"] is True
    for layer in shared.document["layers"]:
        rows = {r["recipe"]: r for r in layer["recipes"]}
        assert rows["int8"]["relative_l2_mean"] <= 0.016, layer["name"]
        assert rows["int8"]["vs_baseline"] <= -0.80, layer["name"]
        assert rows["int8"]["input_bytes"] < 0.54 * rows["fp16"]["input_bytes"]


def test_picture_is_an_image_with_something_on_it(shared: Shared) -> None:
    pixels = matplotlib.image.imread(shared.png)
    height, width, _ = pixels.shape
    assert width > 1000 and height > 500
    ink = np.any(pixels[..., :3] < 0.9, axis=-1)
    for part in np.array_split(ink, 4, axis=1):
        assert 0.005 < part.mean() < 0.6


def test_no_progress_bar_in_a_pipe(shared: Shared) -> None:
    assert shared.stderr == f"drawn: {shared.png}\n"
    assert "\x1b" not in shared.stdout


# -- the user's arrays ---------------------------------------------------------------------


def arrays(seed: int = 0, H: int = 2, Hkv: int = 1, S: int = 40, D: int = 16) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {"q": (1, H, S, D), "k": (1, Hkv, S, D), "v": (1, Hkv, S, D)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def compare_file(path: Path, *args: object) -> dict[str, Any]:
    result = run("compare", "--input", path, "--no-plot", "--json", "-", "--recipe", "int8", *args)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def errors(document: dict[str, Any]) -> list[float]:
    return [r["relative_l2_mean"] for layer in document["layers"] for r in layer["recipes"]]


def test_own_arrays_by_layer(tmp_path: Path) -> None:
    path = tmp_path / "mine.npz"
    layers = {10: arrays(10), 9: arrays(9)}
    np.savez(path, **{f"layer{i:02}_{name}": x for i, qkv in layers.items() for name, x in qkv.items()})
    document = compare_file(path)
    assert [layer["name"] for layer in document["layers"]] == ["layer 9", "layer 10"]
    # The baseline joins the recipe that was asked for.
    assert {r["recipe"] for r in document["layers"][0]["recipes"]} == {"int8", "fp8-e4m3"}
    for i, layer in zip((9, 10), document["layers"], strict=True):
        q, k, v = layers[i].values()
        want = intfa.error_report(intfa.attention(q, k, v), intfa.reference_attention(q, k, v))
        (row,) = [r for r in layer["recipes"] if r["recipe"] == "int8"]
        assert row["runs"]["numpy"]["overall"]["relative_l2"] == pytest.approx(want.relative_l2, rel=1e-9)


def test_own_mask(tmp_path: Path) -> None:
    plain, says = tmp_path / "plain.npz", tmp_path / "says.npz"
    np.savez(plain, **arrays())
    np.savez(says, is_causal=True, **arrays())
    full, causal = compare_file(plain), compare_file(plain, "--causal")
    assert (full["is_causal"], causal["is_causal"]) == (False, True)
    assert errors(full) != errors(causal)
    assert errors(compare_file(says)) == errors(causal)
    assert errors(compare_file(says, "--no-causal")) == errors(full)


def test_own_layout_and_fewer_dimensions(tmp_path: Path) -> None:
    bhsd, bshd, flat = (tmp_path / f"{n}.npz" for n in ("bhsd", "bshd", "flat"))
    np.savez(bhsd, **arrays(Hkv=2))
    np.savez(bshd, **{name: x.swapaxes(1, 2) for name, x in arrays(Hkv=2).items()})
    np.savez(flat, **{name: x[0] for name, x in arrays(Hkv=2).items()})
    want = errors(compare_file(bhsd))
    assert errors(compare_file(bshd, "--layout", "bshd")) == want
    assert errors(compare_file(flat)) == want


def test_a_capture_is_an_input(tmp_path: Path) -> None:
    from intfa_cupy.capture import save_capture

    layers, metadata = load_capture()
    short = {25: tuple(x[:, :, :64] for x in layers[25])}
    save_capture(tmp_path / "short.npz", short, {**metadata, "layers": [25]})  # type: ignore[arg-type]
    assert compare_file(tmp_path / "short.npz")["is_causal"] is True


def spoiled(**changes: Any) -> dict[str, Any]:
    return {name: x for name, x in {**arrays(), **changes}.items() if x is not None}


def with_nan() -> np.ndarray:
    k = arrays()["k"]
    k[0, 0, 3, 5] = np.nan
    return k


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ["no such file"]),
        (b"q,k,v\n1,2,3\n", ["not a NumPy .npz file"]),
        (b"", ["not a NumPy .npz file"]),
        (b"PK\x03\x04 cut off", ["not a NumPy .npz file"]),
        (np.zeros((4, 4)), ["one array"]),
        ({"weights": np.zeros(3)}, ["no arrays q, k, v", "'weights'"]),
        (spoiled(v=None), ["'v' is missing"]),
        ({"layer3_q": np.zeros((2, 4, 8))}, ["'layer3_k' is missing"]),
        (spoiled(k=with_nan()), ["'k'", "1 of 640 elements", "not finite"]),
        (spoiled(v=np.full((1, 1, 40, 16), 1e300)), ["'v'", "not finite in float32"]),
        (spoiled(q=np.ones((1, 2, 40, 16), int)), ["q must have a dtype of float16", "got int64"]),
        (spoiled(k=np.ones((1, 1, 40, 16), np.float16)), ["k must have q's dtype float32", "got float16"]),
        (spoiled(v=np.ones((1, 1, 40, 8), np.float32)), ["v must have q's head dimension", "16", "got 8"]),
        (spoiled(k=np.ones((40, 16), np.float32)), ["k must have 4 dimensions"]),
        (spoiled(q=np.ones((1, 3, 40, 16), np.float32), k=np.ones((1, 2, 40, 16), np.float32),
                 v=np.ones((1, 2, 40, 16), np.float32)), ["multiple", "H = 3, Hkv = 2"]),
        (spoiled(q=np.ones((1, 2, 0, 16), np.float32)), ["nothing to compare", "Sq = 0"]),
        (spoiled(q=np.array([None, 1])), ["'q'", "Python objects"]),
        (spoiled(q=np.zeros((1, 2, 40, 16), "V2")), ["'q'", "bfloat16"]),
        (spoiled(is_causal=np.array([True, False])), ["'is_causal'", "one boolean"]),
    ],
    ids=lambda x: x[0].replace(" ", "-") if isinstance(x, list) else "",
)  # fmt: skip
def test_bad_input_is_one_clear_line(tmp_path: Path, content: Any, words: list[str]) -> None:
    path = tmp_path / "bad.npz"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, np.ndarray):
        with open(path, "wb") as file:
            np.save(file, content)
    elif content is not None:
        np.savez(path, **content)
    result = run("compare", "--input", path, "--no-plot")
    assert result.exit_code == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: {path}: ")
    for word in words:
        assert word in line


def test_damaged_array_is_named(tmp_path: Path) -> None:
    path = tmp_path / "damaged.npz"
    np.savez(path, **arrays())
    data = bytearray(path.read_bytes())
    at = data.index(b"k.npy") + 400
    data[at : at + 64] = bytes(64)
    path.write_bytes(data)
    result = run("compare", "--input", path, "--no-plot")
    assert (result.exit_code, result.stderr) == (2, f"error: {path}: array 'k' is damaged\n")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--recipe", "int9"], ["--recipe", "int8-fast", "'int9'"]),
        (["--backend", "cuda"], ["--backend", "wgmma", "'cuda'"]),
        (["--layout", "sbhd"], ["--layout", "bshd", "'sbhd'"]),
        (["--plot", "no/such/folder/x.png"], ["no/such/folder/x.png", "no such folder"]),
        (["--json", "no/such/folder/x.json"], ["no/such/folder/x.json", "no such folder"]),
    ],
)
def test_bad_options(args: list[str], words: list[str]) -> None:
    result = run("compare", *args)
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    for word in words:
        assert word in line


# -- backends ------------------------------------------------------------------------------


@pytest.fixture
def own_file(tmp_path: Path) -> Path:
    np.savez(tmp_path / "own.npz", **arrays())
    return tmp_path / "own.npz"


def pretend_gpu(monkeypatch: pytest.MonkeyPatch, on_gpu: Any) -> None:
    statuses = {
        "wgmma": BackendStatus("wgmma", True, "pretended"),
        "mma": BackendStatus("mma", False, "compute capability 7.0 is below 8.0"),
        "numpy": BackendStatus("numpy", True, "exact model"),
    }
    monkeypatch.setattr("intfa_cupy.dispatch.backends", lambda: statuses)
    monkeypatch.setattr(work, "_on_gpu", on_gpu)
    device = work.device_name
    monkeypatch.setattr(work, "device_name", lambda b: "Pretended GPU" if b == "wgmma" else device(b))


def test_unavailable_backend_says_why(monkeypatch: pytest.MonkeyPatch, own_file: Path) -> None:
    pretend_gpu(monkeypatch, None)
    result = run("compare", "--input", own_file, "--backend", "mma")
    assert result.exit_code == 2
    assert result.stderr == "error: --backend mma is not available: compute capability 7.0 is below 8.0\n"


def test_times_of_every_available_backend(monkeypatch: pytest.MonkeyPatch, own_file: Path) -> None:
    def on_gpu(call: Any, qkv: Any) -> tuple[np.ndarray, float]:
        return intfa.attention(*qkv) * np.float32(1.5), 0.0125

    pretend_gpu(monkeypatch, on_gpu)
    result = run("compare", "--input", own_file, "--no-plot", "--recipe", "int8")
    assert result.exit_code == 0, result.output
    (table,) = tables(result.stdout)
    assert [cells[-2] for cells in table] == ["12.5", "12.5"]
    assert "Pretended GPU" in result.stdout
    # Errors are those of the exact model, and how far the GPU is from it is said: here 50 %.
    assert float(table[0][1]) < 2
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("wgmma: mean errors within")]
    assert 45 < float(line.split()[4]) < 55


def test_a_failing_gpu_does_not_cost_the_comparison(monkeypatch: pytest.MonkeyPatch, own_file: Path) -> None:
    def on_gpu(*args: object) -> None:
        raise RuntimeError("CUDA header crt/mma.h not found\nInstall it with: ...")

    pretend_gpu(monkeypatch, on_gpu)
    result = run("compare", "--input", own_file, "--no-plot", "--recipe", "int8")
    assert result.exit_code == 0, result.output
    (table,) = tables(result.stdout)
    assert [cells[-2] for cells in table] == ["-", "-"]
    said = " ".join(result.stdout.split())  # a narrow terminal wraps it
    assert "wgmma: not measured for int8, fp8-e4m3: RuntimeError: CUDA header crt/mma.h not found" in said
    assert "Install it" not in said
    # Who insists on it gets the failure itself.
    result = run("compare", "--input", own_file, "--no-plot", "--backend", "wgmma")
    assert isinstance(result.exception, RuntimeError)


# -- tables --------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [40, 60, 80, 100, 120, 200])
@pytest.mark.parametrize("backends", [["numpy"], ["wgmma", "mma", "wmma", "numpy"]])
def test_tables_are_whole_at_any_width(width: int, backends: list[str]) -> None:
    cells = [f"{n}.{n}{n}{n}" for n in range(len(ORDER))]
    groups = [
        [Column(f"error{g}\n%", cells) for g in range(3)],
        [Column(f"other{g}\n%", cells) for g in range(3)],
        [Column(f"{b}\nms", cells) for b in backends],
    ]
    text = io.StringIO()
    print_table(Console(file=text, width=width), Column("\nrecipe", ORDER), groups)
    assert max(map(len, text.getvalue().splitlines())) <= width
    assert "…" not in text.getvalue()
    printed = tables(text.getvalue())
    for i, name in enumerate(ORDER):
        rows = [table[i] for table in printed]
        assert all(row[0] == name for row in rows)
        assert [c for row in rows for c in row[1:]] == [cells[i]] * sum(map(len, groups))
    if width >= 120:
        assert len(printed) == 1


def test_percent_keeps_three_digits() -> None:
    shown = [percent(x) for x in (0.000217, 0.00732, 0.014, 0.1281, 1.4, 9.994, 42.5, float("nan"))]
    assert shown == ["0.0217", "0.732", "1.40", "12.8", "140", "999", "4,250", "-"]


def test_narrow_terminal_and_pipe(own_file: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "intfa_cupy",
        "compare",
        "--no-plot",
        "--backend",
        "numpy",
        "--input",
        str(own_file),
    ]
    narrow = subprocess.run(
        command, env=environment(COLUMNS="80"), capture_output=True, text=True, check=True
    )
    piped = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    assert max(map(len, narrow.stdout.splitlines())) <= 80
    assert [len(t) for t in tables(narrow.stdout)] == [len(ORDER)]
    assert [len(cells) for cells in tables(piped.stdout)[0]] == [10] * len(ORDER)
    assert piped.stderr == ""


# -- the rest ------------------------------------------------------------------------------


def test_info_lists_backends_and_versions() -> None:
    result = run("info")
    assert result.exit_code == 0, result.output
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    for name, status in intfa.backends().items():
        first = status.reason.splitlines()[0]
        assert f"{name} {'yes' if status.available else 'no'}: {first}" in lines
    assert {"Backends", "GPU", "Compiler", "Packages"} <= set(lines)
    assert f"intfa-cupy {intfa.__version__}" in lines
    assert f"numpy {np.__version__}" in lines
    labels = {line.split()[0] for line in lines if line}
    assert {"gpu", "driver", "cupy", "nvrtc", "cache", "python"} <= labels


def test_info_as_json() -> None:
    result = run("info", "--json", "-")
    document = json.loads(result.stdout)
    assert document["packages"]["numpy"] == np.__version__
    assert document["backends"]["numpy"]["available"] is True
    assert all(b["reason"] for b in document["backends"].values())
    machine = document["machine"]
    # Whatever was not found has its reason.
    for name in ("cupy", "nvrtc", "headers"):
        assert machine[name] is not None or machine["reasons"][name]
    assert machine["gpus"] or machine["reasons"]["gpus"]


def test_version_and_help() -> None:
    assert run("--version").stdout == f"intfa-cupy {intfa.__version__}\n"
    text = run("--help").stdout
    for command in ("compare", "info"):
        assert command in text


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys, intfa_cupy.cli\n"
        "heavy = {'matplotlib', 'cupy', 'scipy', 'torch', 'triton', 'rich.table', 'rich.progress'}\n"
        "print(*sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == ""
