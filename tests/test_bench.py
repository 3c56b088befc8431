"""The benchmark's arithmetic, tables and records, on made-up timings: what it measures needs a GPU."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from intfa_cupy import api, bench, bench_report, dispatch, jit, plots, records
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
        share = 100 * (3 << 20) / (3 * 2 * 16 * 32 * 1024 * 64)  # bytes of Q, K, V against 16 bits
        assert kernel.split()[-1] == f"{share:.0f}", kernel
    assert any("75*" in line for line in lines)


def test_markdown_has_a_row_for_each_head_dimension() -> None:
    table = bench_report.markdown(made_up(), "int8-fast", "with quantisation", "cuDNN bf16").splitlines()
    assert table[0] == "| | 1k | 4k | causal 1k | causal 4k |"
    assert table[2:] == [f"| d = {D} | " + " | ".join(["320 (1.60x)"] * 4) + " |" for D in (64, 128)]


def test_figure_is_a_picture(tmp_path: Path) -> None:
    file = tmp_path / "bench.png"
    plots.save(bench_report.bench_figure(made_up()), file)
    assert file.read_bytes().startswith(b"\x89PNG") and file.stat().st_size > 20_000


class FakeCuPy:
    """Events on a clock that calls move forward, as far as the timer needs CuPy."""

    def __init__(self) -> None:
        self.now = 0.0
        self.order: list[str] = []
        outer = self

        class Event:
            def record(self, stream: object) -> None:
                self.at = outer.now

        self.cuda = types.SimpleNamespace(Event=Event, get_elapsed_time=lambda a, b: b.at - a.at)

    def timer(self, repeats: int) -> bench._Timer:
        timer = bench._Timer.__new__(bench._Timer)
        timer.cp, timer.repeats = self, repeats
        timer.stream = contextlib.nullcontext()
        timer.stream.synchronize = lambda: None
        timer.flush = types.SimpleNamespace(fill=lambda x: self.order.append("flush"))
        return timer

    def call(self, name: str, milliseconds: float) -> Callable[[], None]:
        def run() -> None:
            self.order.append(name)
            # The card gets slower with every launch, down to a half over the whole run.
            self.now += milliseconds * (1 + self.order.count("flush") / 300)

        return run


def test_contestants_take_turns_and_none_is_always_first() -> None:
    cupy = FakeCuPy()
    times = cupy.timer(100).rounds([cupy.call("a", 1.0), cupy.call("b", 1.0), cupy.call("c", 2.0)])
    assert cupy.order[:12:2] == ["flush"] * 6  # before every launch
    assert cupy.order[1:18:2] == ["a", "b", "c", "b", "c", "a", "c", "a", "b"]
    assert [cupy.order.count(x) for x in "abc"] == [100] * 3
    (a, *_), (b, *_), (c, *_) = times
    assert a == pytest.approx(b, rel=0.01) and c == pytest.approx(2 * a, rel=0.01)
    for median, low, high in times:
        assert low < median < high
        assert (high - low) / median == pytest.approx(0.8 / 1.5, rel=0.05)


def test_who_is_not_timed_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def explain(*arrays: object, recipe: str, is_causal: bool, backend: str) -> object:
        if recipe == "int4":
            raise dispatch.UnsupportedError(f"{backend} has no int4")
        return types.SimpleNamespace(backend="mma" if backend == "auto" else backend)

    monkeypatch.setattr(api, "explain", explain)
    monkeypatch.setattr(bench, "_calls", lambda timer, shape, arrays, name, backend, exact: [(name, backend)])
    missing: dict[str, str] = {}
    shape = bench.Shape(1, 1, 64, 64)
    found = bench._own(None, shape, [], ["int8", "int4"], ["mma", "wmma", "auto"], None, missing)
    assert found == [("int8", "mma"), ("int8", "wmma")]  # auto is mma here, timed once
    assert missing == {f"int4 ({b})": f"{b} has no int4" for b in ("mma", "wmma", "auto")}
    result = dataclasses.replace(made_up(), missing=missing)
    stream = io.StringIO()
    bench_report.print_bench(Console(file=stream, width=200, color_system=None), result)
    assert "int4 (wmma): not measured: wmma has no int4" in stream.getvalue()
    assert bench.BenchResult.from_dict(json.loads(json.dumps(result.as_dict()))).missing == missing


def test_a_run_times_all_contestants_of_a_shape_together(monkeypatch: pytest.MonkeyPatch) -> None:
    from intfa_cupy import gpu

    events: list[str] = []

    class Timer:
        def __init__(self, repeats: int) -> None:
            assert repeats == 5

        def prepare(self, call: Callable[[], float], *, graph: bool) -> Callable[[], float]:
            events.append("capture" if graph else "warm up")
            return call

        def rounds(self, runs: list[Callable[[], float]]) -> list[tuple[float, float, float]]:
            events.append(f"time {len(runs)}")
            return [(run(), run(), run()) for run in runs]

    def own(*args: object) -> list[bench._Contestant]:
        events.append("inputs")
        return [
            bench._Contestant("int8", "mma", "kernel", lambda: 2.0, 1),
            bench._Contestant("int8", "mma", "with quantisation", lambda: 4.0, 1, graph=True),
            bench._Contestant("int8", "mma", "quantisation", lambda: 2.0, 1, graph=True),
        ]

    def peers(*args: object) -> list[bench._Contestant]:
        events.append("inputs")
        return [bench._Contestant("cuDNN bf16", "cuDNN", "peer", lambda: 3.0, 1)]

    monkeypatch.setattr(gpu, "unavailable", lambda: None)
    for name, stand_in in (
        ("_Timer", Timer), ("_machine", lambda timer: MACHINE), ("_inputs", lambda shape: []), ("_own", own),
        ("_peers", peers),
    ):  # fmt: skip
        monkeypatch.setattr(bench, name, stand_in)
    shapes = [bench.Shape(1, 1, n, 64) for n in (64, 128)]
    result = bench.bench(shapes, ["int8"], repeats=5, errors=False)
    # A captured graph keeps writing where its call did: no input may be allocated after it.
    assert events == ["inputs", "inputs", "warm up", "capture", "capture", "warm up", "time 4"] * 2
    assert result.shapes() == shapes
    assert [row.ratios for row in result.rows[:4]] == [{"cuDNN bf16": x} for x in (1.5, 0.75)] + [
        {},
        {"cuDNN bf16": 1.0},
    ]


def test_a_card_without_a_known_peak_still_has_a_table() -> None:
    result = made_up()
    machine = {**MACHINE, "int8_peak_tops": None}
    contestant = bench._Contestant("int8", "mma", "kernel", lambda: None, 3 << 20, 0.01)
    row = bench._row(machine, bench.Shape(1, 1, 1024, 64), contestant, (1.0, 0.9, 1.1))
    assert row.tops == pytest.approx(4 * 64 * 1024 * 1024 / 1e-3 / 1e12) and np.isnan(row.peak)
    document = json.loads(json.dumps(bench.BenchResult(machine, [row]).as_dict(), allow_nan=False))
    assert np.isnan(bench.BenchResult.from_dict(document).rows[0].peak)
    stream = io.StringIO()
    bench_report.print_bench(
        Console(file=stream, width=200, color_system=None), bench.BenchResult(machine, [row])
    )
    assert "INT8 peak unknown" in stream.getvalue() and "nan" not in stream.getvalue()
    quantiser = bench._Contestant("int8", "mma", "quantisation", lambda: None, 10**9, None)
    assert bench._row(MACHINE, result.rows[0].shape, quantiser, (1.0, 1.0, 1.0)).peak == pytest.approx(0.5)


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


def test_the_recorded_run_is_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(records, "load", lambda name: None)
    result = CliRunner().invoke(app, ["bench", "--recorded"])
    assert result.exit_code == 2 and "no run is recorded" in result.output
    document = made_up().as_dict()
    monkeypatch.setattr(records, "load", lambda name: document if name == "bench" else None)
    picture = tmp_path / "bench.png"
    result = CliRunner().invoke(app, ["bench", "--recorded", "--plot", str(picture)])
    assert result.exit_code == 0, result.output
    assert "not of this machine: Made-up GPU, 2026-01-01, of OTHER kernel sources" in result.stdout
    assert {str(shape) for shape in made_up().shapes()} <= set(result.stdout.splitlines())
    assert picture.read_bytes().startswith(b"\x89PNG")
    as_json = CliRunner().invoke(app, ["bench", "--recorded", "--json", "-"])
    assert json.loads(as_json.stdout) == json.loads(json.dumps(document))


def test_without_a_gpu_the_command_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    from intfa_cupy import gpu

    monkeypatch.setattr(gpu, "unavailable", lambda: "no card in this machine")
    assert dispatch.backends()["numpy"].available
    result = CliRunner().invoke(app, ["bench", "--shape", "1,1,64,64"])
    assert result.exit_code == 2
    assert "bench needs a GPU: no card in this machine" in result.output
    assert CliRunner().invoke(app, ["bench", "--recipe", "nope"]).exit_code == 2
