"""The benchmark's arithmetic, tables and records, on made-up timings: what it measures needs a GPU."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from intfa_cupy import bench, bench_report, dispatch, jit, plots, records
from intfa_cupy.cli import app

MACHINE = {
    "gpu": "Made-up GPU", "date": "2026-01-01", "sms": 100, "clock_MHz": 1000.0, "int8_peak_tops": 800.0,
    "copy_TBps": 2.0, "nvrtc": "13.0", "cupy": "14", "intfa_cupy": "0", "kernel_sources": "0" * 64,
}  # fmt: skip


def made_up() -> bench.BenchResult:
    rows = []
    for shape in bench.equal_token_shapes((64, 128), (1024, 4096), (False, True)):
        ours = shape.operations / 400e9  # ms at 400 TOPS
        for name, stage, time, ratio in (
            ("int8-fast", "kernel", ours, 2.0),
            ("int8-fast", "with quantisation", 1.25 * ours, 1.6),
            ("cuDNN bf16", "peer", 2 * ours, 1.0),
        ):
            tops = shape.operations / time / 1e9
            row = bench.Row(
                shape, name, "wgmma", stage, time, 0.9 * time, 1.1 * time, tops, tops / 800, 3 << 20
            )
            row.ratios = {"cuDNN bf16": ratio}
            rows.append(row)
        rows.append(bench.Row(shape, "int8-fast", "wgmma", "quantisation", 0.1, 0.1, 0.1, 0.0, 0.75, 3 << 20))
    return bench.BenchResult(dict(MACHINE), rows)


@pytest.mark.parametrize("causal", [False, True])
def test_operations_count_visible_pairs(causal: bool) -> None:
    shape = bench.Shape(2, 3, 7, 16, causal)
    pairs = np.tril(np.ones((7, 7))).sum() if causal else 49
    assert shape.operations == 2 * 3 * pairs * (2 * 16 + 2 * 16)


def test_shapes_hold_tokens_and_hidden_size() -> None:
    shapes = list(bench.equal_token_shapes((64, 128, 256), (1024, 16384), (False, True)))
    assert len(shapes) == len(set(shapes)) == 12
    assert {s.B * s.N for s in shapes} == {16384} and {s.H * s.D for s in shapes} == {2048}
    assert [s.N for s in bench.PAPER_SHAPES] == [1024, 2048, 4096, 8192, 16384]


def test_json_round_trip() -> None:
    result = made_up()
    text = json.dumps(result.as_dict(), allow_nan=False)
    assert bench.BenchResult.from_dict(json.loads(text)) == result


@pytest.mark.parametrize("width", [80, 200])
def test_table_shows_every_row_and_fits(width: int) -> None:
    stream = io.StringIO()
    bench_report.print_bench(Console(file=stream, width=width, color_system=None), made_up())
    lines = stream.getvalue().splitlines()
    assert max(map(len, lines)) <= max(width, 110)
    assert "B16 H32 N1024 d64" in lines and "B4 H16 N4096 d128 causal" in lines
    kernel = next(line for line in lines if line.startswith("int8-fast (wgmma) "))
    if width == 200:
        assert kernel.split()[4:6] == ["400", "50"], kernel  # TOPS and % of peak
        assert "2.00" in kernel
    assert any("75*" in line for line in lines)


def test_markdown_has_a_row_for_each_head_dimension() -> None:
    table = bench_report.markdown(made_up(), "int8-fast", "with quantisation", "cuDNN bf16").splitlines()
    assert table[0] == "| | 1k | 4k | causal 1k | causal 4k |"
    assert table[2:] == [f"| d = {D} | " + " | ".join(["320 (1.60x)"] * 4) + " |" for D in (64, 128)]


def test_figure_is_a_picture(tmp_path: Path) -> None:
    file = tmp_path / "bench.png"
    plots.save(bench_report.bench_figure(made_up()), file)
    assert file.read_bytes().startswith(b"\x89PNG") and file.stat().st_size > 20_000


@pytest.mark.parametrize("text", ["1,2,3", "1,2,3,x", "0,1,1,64", "1,1,1,257", "1,1,1,64,full", ""])
def test_bad_shapes_are_named(text: str) -> None:
    with pytest.raises(ValueError, match="got"):
        bench_report.shape_from_text(text)
    assert bench_report.shape_from_text("2,4,1000,80,causal") == bench.Shape(2, 4, 1000, 80, True)


def test_a_record_says_whether_it_is_of_these_sources(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert records.load("bench") is None or "rows" in records.load("bench")
    with pytest.raises(ValueError, match="'other'"):
        records.load("other")
    document = made_up().as_dict()
    monkeypatch.setattr(records, "load", lambda name: document)
    assert "OTHER kernel sources" in records.freshness("bench")
    document["machine"]["kernel_sources"] = jit.strip_comments_fingerprint()
    assert records.freshness("bench") == "Made-up GPU, 2026-01-01, of these kernel sources"
    monkeypatch.setattr(records, "load", lambda name: None)
    assert records.freshness("bench") == "nothing recorded"


def test_without_a_gpu_the_command_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    from intfa_cupy import gpu

    monkeypatch.setattr(gpu, "unavailable", lambda: "no card in this machine")
    assert dispatch.backends()["numpy"].available
    result = CliRunner().invoke(app, ["bench", "--shape", "1,1,64,64"])
    assert result.exit_code == 2
    assert "bench needs a GPU: no card in this machine" in result.output
    assert CliRunner().invoke(app, ["bench", "--recipe", "nope"]).exit_code == 2
