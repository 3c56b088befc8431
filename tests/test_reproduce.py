"""`intfa-cupy reproduce`: the definition found and the claims that hold on planted figures; the command."""

from __future__ import annotations

import itertools
import json
import math
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import intfa_cupy as intfa
from intfa_cupy import bench, gpu, jit, paper, plots, records, reproduce, reproduce_speed
from intfa_cupy.bench import BenchResult, Row, Shape
from intfa_cupy.cli import app
from intfa_cupy.dispatch import BackendStatus, UnsupportedError
from intfa_cupy.metrics import ErrorReport, error_report
from intfa_cupy.reproduce import FP8, METRICS, RECIPES, SCALES, TableResult, tables

DEFINITIONS = list(itertools.product(METRICS, FP8, SCALES))


def report(**errors: float) -> ErrorReport:
    return ErrorReport(
        **{"relative_l2": 1.0, "cosine": 1.0, "mre": 1.0, "sum_ratio": 1.0, "max_abs": 1.0} | errors
    )


def planted(errors: Any, lengths: tuple[int, ...] = (1024, 4096), name: str = "table1") -> TableResult:
    """A table in which ``errors(recipe, metric, scale, N)`` was found, by three seeds 1 % apart."""
    found = {
        scale: {
            recipe: {
                n: tuple(
                    report(**{m: seed * errors(recipe, m, scale, n) for m in METRICS})
                    for seed in (0.99, 1, 1.01)
                )
                for n in lengths
            }
            for recipe in RECIPES
        }
        for scale in SCALES
    }
    return TableResult(name, lengths, found)


@pytest.mark.parametrize("name", paper.TABLES)
@pytest.mark.parametrize(("metric", "fp8", "scale"), DEFINITIONS)
def test_the_definition_that_matches_the_paper_is_found(
    name: str, metric: str, fp8: str, scale: float
) -> None:
    printed = paper.TABLES[name].rows

    def errors(recipe: str, m: str, s: float, n: int) -> float:
        row = "fp8" if recipe in FP8 else recipe
        figure = dict(zip(paper.LENGTHS, printed.get(row, printed["paper-int8"]), strict=True))[n]
        wrong = 3 * (m != metric) + 2 * (s != scale) + 1.5 * (recipe in FP8 and recipe != fp8)
        return figure * (wrong or 1.02)

    table = planted(errors, name=name)
    assert (table.nearest.metric, table.nearest.fp8, table.nearest.scale) == (metric, fp8, scale)
    assert table.nearest.factor == pytest.approx(1.02)
    ranking = table.definitions()
    assert len(ranking) == len(DEFINITIONS) and ranking[1].factor > 1.1
    assert table.ties() == []
    assert table.error("paper-int8", metric) == pytest.approx(
        1.02 * np.mean([printed["paper-int8"][i] for i in (0, 2)])
    )
    assert table.spread("int8", metric) == pytest.approx(0.01)


def constant(**by_recipe: dict[str, float] | float) -> TableResult:
    def errors(recipe: str, metric: str, scale: float, n: int) -> float:
        value = by_recipe.get(recipe.replace("-", "_"), 0.05)
        return value[metric] if isinstance(value, dict) else value

    return planted(errors)


def test_reductions_and_verdicts() -> None:
    table = constant(fp8_e5m2=0.10, fp8_e4m3=0.05, paper_int8=0.04, int8_fast=0.02, int8=0.2)
    assert table.reduction("paper-int8", "fp8-e5m2", "mre") == pytest.approx(0.6)
    assert table.reduction("paper-int8", "fp8-e4m3", "relative_l2") == pytest.approx(0.2)
    assert table.reduction("int8", "fp8-e5m2", "mre") == pytest.approx(-1.0)
    verdicts = dict(line.split(" 46 % below FP8: ") for line in table.verdicts())
    assert verdicts == {
        "paper-int8": "only against fp8-e5m2 (60 %); not against fp8-e4m3 (20 %)",
        "int8-fast": "holds against fp8-e5m2 (80 %) and against fp8-e4m3 (60 %)",
        "int8": "does not hold against fp8-e5m2 (-100 %) nor against fp8-e4m3 (-300 %)",
    }


def test_readings_that_the_figures_do_not_tell_apart_are_said() -> None:
    printed = paper.TABLES["table1"].rows

    def errors(recipe: str, metric: str, scale: float, n: int) -> float:
        row = printed["fp8" if recipe in FP8 else recipe if recipe in printed else "paper-int8"]
        off = {"relative_l2": 1.10, "sum_ratio": 1.12, "mre": 4.0}[metric] * (1 if scale == 1 else 2)
        return row[paper.LENGTHS.index(n)] * off

    table = planted(errors)
    assert (table.nearest.metric, table.nearest.scale) == ("relative_l2", 1)
    assert {(d.metric, d.fp8) for d in table.ties()} == {
        ("relative_l2", FP8[1]), ("sum_ratio", FP8[0]), ("sum_ratio", FP8[1]),
    }  # fmt: skip
    lines = str(reproduce.TablesResult({"table1": table}, 3, 1, None, {})).splitlines()
    assert sum(line.endswith("which is as near") for line in lines) == 3
    assert not any("MRE, fp8" in line and "as near" in line for line in lines)


def test_a_claim_that_needs_one_metric_names_it() -> None:
    table = constant(
        fp8_e5m2=0.10, fp8_e4m3=0.01, paper_int8={"mre": 0.01, "sum_ratio": 0.09, "relative_l2": 0.02}
    )
    (verdict,) = [v for v in table.verdicts() if v.startswith("paper-int8")]
    only, fails = verdict.split("; ")
    assert only.endswith("only against fp8-e5m2 by MRE (90 %), against fp8-e5m2 by relative L2 (80 %)")
    assert fails.startswith("not against fp8-e5m2 by sum|e| / sum|r| (10 %), against fp8-e4m3 (")


def test_the_papers_figures_give_its_own_claims() -> None:
    for table in paper.TABLES.values():
        per_length = [
            1 - full / fp8 for full, fp8 in zip(table.rows["paper-int8"], table.rows["fp8"], strict=True)
        ]
        assert any(abs(reduction - table.claim) < 0.006 for reduction in per_length)
        assert all(len(row) == len(paper.LENGTHS) for row in table.rows.values())
    assert list(paper.SPEED.saved.values()) == sorted(paper.SPEED.saved.values())


@pytest.mark.parametrize(("name", "activations"), [("table1", "normal"), ("table2", "uniform")])
def test_errors_are_over_all_elements_of_the_stated_draw(name: str, activations: str) -> None:
    result = tables([name], lengths=[256], seeds=2, heads=2, recipes=["int8"])
    assert result[name].recipes == (*RECIPES[:4], "int8")
    for scale, seed, recipe in itertools.product(SCALES, range(2), ("paper-int8", "fp8-e5m2", "int8")):
        q, k, v = reproduce.draw(activations, 256, reproduce.QUERIES, 2, seed)
        assert q.shape == k.shape == (1, 2, 256, 64)
        out = intfa.attention(q, k, v, recipe=recipe, scale=scale, backend="numpy")
        want = error_report(out, intfa.reference_attention(q, k, v, scale=scale))
        assert result[name].errors[scale][recipe][256][seed] == want
    assert json.loads(json.dumps(result.as_dict(), allow_nan=False))["tables"][name]["lengths"] == [256]


def test_exact_attention_is_computed_beside_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """By CuPy if there is a GPU and cuBLAS, else by NumPy."""
    cupy = types.SimpleNamespace(asarray=np.asarray)
    problem: list[str | None] = [None]
    monkeypatch.setattr(gpu, "unavailable", lambda: problem[0])
    monkeypatch.setattr(gpu, "matrix_library", lambda: cupy)
    assert reproduce._module("numpy") is np and reproduce._module("mma") is cupy
    problem[0] = "no card"
    assert reproduce._module("mma") is np
    problem[0] = None

    def lacks_cublas() -> Any:
        raise ImportError("no cuBLAS")

    monkeypatch.setattr(gpu, "matrix_library", lacks_cublas)
    assert reproduce._module("mma") is np


@pytest.mark.gpu
def test_exact_attention_is_the_same_on_the_gpu() -> None:
    cupy = pytest.importorskip("cupy")
    qkv = reproduce.draw("normal", 600, None, 2, 0)
    for scale in SCALES:
        exact = [reproduce._exact(qkv, scale, xp) for xp in (np, cupy)]
        np.testing.assert_array_equal(exact[0], intfa.reference_attention(*qkv, scale=scale))
        np.testing.assert_allclose(exact[1], exact[0], rtol=0, atol=1e-12)


def test_draws() -> None:
    normal, uniform = (reproduce.draw(a, 4096, None, 1, 0) for a in ("normal", "uniform"))
    assert np.std(normal[1]) == pytest.approx(1, abs=0.01)
    assert abs(np.mean(uniform[1])) < 0.003 and np.abs(uniform[1]).max() <= 0.5
    assert np.std(uniform[1]) == pytest.approx(math.sqrt(1 / 12), abs=0.003)
    assert reproduce.draw("normal", 4096, 512, 1, 0)[0].shape == (1, 1, 512, 64)
    assert not np.array_equal(normal[1], reproduce.draw("normal", 4096, None, 1, 1)[1])


def test_what_was_computed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def attention(q: Any, k: Any, v: Any, *, recipe: str, scale: float, backend: str) -> Any:
        if backend == "mma" and recipe.startswith("fp8"):
            raise UnsupportedError("mma has no FP8")
        return intfa.attention(q, k, v, recipe=recipe, scale=scale, backend="numpy")

    monkeypatch.setattr(reproduce, "attention", attention)
    monkeypatch.setattr(reproduce, "QUERIES", 32)
    sampled = tables(["table1"], lengths=[64], seeds=1, heads=1, recipes=["int8"], backend="mma")
    assert sampled.backends == {
        "fp8-e5m2": "numpy", "fp8-e4m3": "numpy", "half-int8": "mma", "paper-int8": "mma", "int8": "mma",
    }  # fmt: skip
    text = str(sampled)
    assert "computed by mma: half-int8, paper-int8, int8" in text
    assert "32 queries of each head stand for all N" in text
    statuses = {name: BackendStatus(name, name != "wgmma", "") for name in ("wgmma", "mma", "wmma", "numpy")}
    monkeypatch.setattr("intfa_cupy.dispatch.backends", lambda: statuses)
    fastest = tables(["table1"], lengths=[64], seeds=1, heads=1, recipes=["int8"], backend="auto")
    assert fastest.backends == {**sampled.backends, "fp8-e5m2": "wmma", "fp8-e4m3": "wmma"}
    whole = tables(["table1"], lengths=[64], seeds=1, heads=1, full=True)
    assert whole.queries is None and "stand for all" not in str(whole)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"which": ["table3"]}, "'table3'"),
        ({"which": []}, "which and lengths must not be empty"),
        ({"lengths": [0]}, "must be at least 1"),
        ({"seeds": 0}, "seeds=0"),
        ({"recipes": ["int9"]}, "recipe must be one of"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tables(**({"which": ["table1"], "lengths": [64]} | change))


# -- the speed figure ----------------------------------------------------------------------

MACHINE = {
    "gpu": "Made-up GPU", "date": "2026-01-01", "sms": 100, "clock_MHz": 1000.0, "int8_peak_tops": None,
    "copy_TBps": 2.0, "nvrtc": "13.0", "cupy": "14", "intfa_cupy": "0", "kernel_sources": "0" * 64,
}  # fmt: skip


def timed(with_fp16: bool = False) -> reproduce_speed.SpeedResult:
    """Made-up times: milliseconds are N / 1024 times what stands here."""
    times = [
        ("paper-int8", "mma", "kernel", 6.0), ("paper-int8", "mma", "with quantisation", 8.0),
        ("int8-fast", "wgmma", "kernel", 2.0), ("FlashAttention-2 bf16", "torch", "peer", 10.0),
        ("cuDNN bf16", "cuDNN", "peer", 4.0),
    ]  # fmt: skip
    times += [("fp16", "mma", "kernel", 12.0)] * with_fp16
    rows = []
    for n in (1024, 4096):
        for name, backend, stage, ms in times:
            ms *= n / 1024
            rows.append(Row(Shape(4, 32, n, 64), name, backend, stage, ms, ms, ms, 1.0, math.nan, 8, 0.01))
    missing = {} if with_fp16 else {"fp16 (mma)": "no kernel for it", "fp16 (auto)": "no kernel for it"}
    return reproduce_speed.SpeedResult(BenchResult(dict(MACHINE), rows, missing))


def test_time_saved() -> None:
    result = timed(with_fp16=True)
    assert result.saved("paper-int8 (mma)", 4096) == pytest.approx(0.4)
    assert result.saved("paper-int8 (mma)", 4096, quantise=True) == pytest.approx(0.2)
    assert result.saved("paper-int8 (mma)", 1024, "fp16") == pytest.approx(0.5)
    assert result.saved("cuDNN bf16", 1024, "int8-fast (wgmma)") == pytest.approx(-1.0)
    assert timed().saved("paper-int8 (mma)", 1024, "fp16") is None
    assert result.saved("paper-int8 (mma)", 2048) is None


@pytest.mark.parametrize("with_fp16", [False, True])
def test_speed_prints_draws_and_reads_back(tmp_path: Path, with_fp16: bool) -> None:
    result = timed(with_fp16)
    document = json.loads(json.dumps(result.as_dict(), allow_nan=False))
    assert reproduce_speed.SpeedResult.from_dict(document).as_dict() == result.as_dict()
    ours, flash = str(result).split("% of the time saved against")[1:]
    assert ("not measured" in ours) is not with_fp16
    lines = {line.split("  ")[0].strip(): line.split()[-2:] for line in flash.splitlines()}
    assert lines["paper, RTX 4090: full INT8"] == ["31", "66"]
    assert lines["paper-int8 (mma)"] == ["40", "40"] and lines["int8-fast (wgmma)"] == ["80", "80"]
    assert ("fp16 (mma), fp16 (auto): not measured: no kernel for it" in flash) is not with_fp16
    verdicts = list(result.verdicts())
    assert [v for v in verdicts if v.startswith("paper-int8 (mma)") and "FlashAttention-2" in v] == [
        "paper-int8 (mma) saves 40 % of the time of FlashAttention-2 bf16: "
        "as much as in the paper at N = 1,024 only"
    ]
    assert any(v.startswith("int8-fast") and v.endswith("at all lengths") for v in verdicts)
    assert any("50 % of the time of fp16 (mma)" in v for v in verdicts) is with_fp16
    assert not any(v.startswith(("fp16", "cuDNN")) for v in verdicts)
    assert all(f"Claim: {v}." in " ".join(str(result).split()) for v in verdicts)
    plots.save(result.figure(), tmp_path / "speed.png")
    assert (tmp_path / "speed.png").stat().st_size > 20_000


# -- the command ---------------------------------------------------------------------------


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from intfa_cupy import dispatch, gpu

    monkeypatch.setattr(gpu, "unavailable", lambda: "no card in this machine")
    monkeypatch.setattr(dispatch, "_gpu_problem", gpu.unavailable)


def run(*args: object) -> Any:
    return CliRunner().invoke(app, ["reproduce", *(str(a) for a in args)])


def flat(text: str) -> str:
    """The text without line breaks, which depend on the width of the terminal."""
    return " ".join(text.split())


def test_tables_from_the_command_line(no_gpu: None, tmp_path: Path) -> None:
    document, picture = tmp_path / "r.json", tmp_path / "r.png"
    small = ("--length", 1024, "--seeds", 1, "--heads", 1)
    result = run("table2", *small, "--json", document, "--plot", picture)
    assert result.exit_code == 0, result.output
    assert "Table 2: uniform activations" in result.stdout and "Table 1" not in result.stdout
    table = json.loads(document.read_text())["tables"]["tables"]["table2"]
    rows = {
        line.split("  ")[0].strip(): line.split() for line in result.stdout.splitlines()[::-1] if line.strip()
    }
    assert rows["paper: FP8"][2] == "8.94"
    for entry in table["errors"]:
        if entry["scale"] == table["nearest"]["scale"]:
            figure = entry["seeds"][0][table["nearest"]["metric"]]
            assert float(rows[entry["recipe"]][1]) == pytest.approx(100 * figure, rel=6e-3)
    assert any(f"Claim: {verdict}." in flat(result.stdout) for verdict in table["verdicts"])
    assert (tmp_path / "r_tables.png").read_bytes().startswith(b"\x89PNG")
    assert (
        run("table1", "table2", "--length", 64, "--seeds", 1, "--heads", 1, "--no-plot").stdout.count(
            "; d = 64, full attention"
        )
        == 2
    )
    assert not (tmp_path / "r_speed.png").exists() and not picture.exists()


def test_without_a_gpu_speed_shows_what_was_recorded(
    no_gpu: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    picture = tmp_path / "r.png"
    monkeypatch.setattr(records, "load", lambda name: None)
    result = run("speed", "--plot", picture)
    assert result.exit_code == 0
    assert "not measured here: no card in this machine" in result.stdout
    assert "Last recorded run: nothing recorded" in result.stdout and "RTX" not in result.stdout
    assert not (tmp_path / "r_speed.png").exists()

    document = timed().as_dict()
    monkeypatch.setattr(records, "load", lambda name: document if name == "speed" else None)
    result = run("speed", "--plot", picture)
    assert "A recorded run, not of this machine: Made-up GPU, 2026-01-01, of OTHER kernel sources" in flat(
        result.stdout
    )
    assert "int8-fast (wgmma)" in result.stdout and (tmp_path / "r_speed.png").exists()
    document["machine"]["kernel_sources"] = jit.strip_comments_fingerprint()
    assert "Made-up GPU, 2026-01-01, of these kernel sources" in flat(run("speed", "--no-plot").stdout)

    as_json = run("speed", "--no-plot", "--json", "-")
    assert json.loads(as_json.stdout)["speed"]["recorded"] is True


def test_nothing_is_recorded_without_a_gpu(no_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "save", lambda *_: pytest.fail("recorded what was not measured"))
    result = run("speed", "--record", "--no-plot")
    assert result.exit_code == 2 and "no card in this machine" in result.output
    assert run("table1", "--record").exit_code == 2


def test_a_measured_run_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    saved: dict[str, Any] = {}
    asked: dict[str, Any] = {}

    def measured(shapes: Any, recipes: Any, **options: Any) -> BenchResult:
        asked.update(options, shapes=list(shapes), recipes=list(recipes))
        return timed().bench

    monkeypatch.setattr(reproduce_speed, "bench", measured)
    monkeypatch.setattr(records, "save", lambda name, document: saved.setdefault(name, document))
    result = run("speed", "--record", "--no-plot", "--repeats", 7)
    assert result.exit_code == 0, result.output
    assert asked["shapes"] == list(bench.PAPER_SHAPES) and asked["repeats"] == 7 and asked["peers"]
    assert asked["backends"] == ("mma", "auto")  # one skeleton for all formats, and the fastest
    assert {"fp16", "half-int8", "paper-int8", "int8", "int8-fast"} <= set(asked["recipes"])
    assert saved["speed"]["recorded"] is False and saved["speed"]["machine"]["gpu"] == "Made-up GPU"
    assert "A recorded run" not in result.stdout


@pytest.mark.parametrize(
    ("args", "word"),
    [
        (("table3",), "table3"),
        (("table1", "--backend", "abacus"), "abacus"),
        (("table1", "--plot", "/nowhere/x.png"), "no such folder"),
    ],
)
def test_bad_options(no_gpu: None, args: tuple[str, ...], word: str) -> None:
    result = run(*args)
    assert result.exit_code == 2 and word in result.output
