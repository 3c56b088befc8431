"""Containers of quantised tensors, the same for NumPy and CuPy arrays."""

from __future__ import annotations

import html
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from . import arrays
from .recipes import BITS, Recipe, get_recipe

__all__ = ["CHANNEL_GROUP", "TILE", "QuantizedQKV", "QuantizedTensor", "pack_int4", "tiles_of", "unpack_int4"]

#: Keys of one tile: the block that P's maximum, K's shared scales and the packed layout refer to.
TILE = 128
#: Channels that share one INT4 scale: one tensor-core step in k.
CHANNEL_GROUP = 32

Array = Any  # numpy.ndarray or cupy.ndarray


def tiles_of(S: int) -> int:
    """Return the number of tiles that hold S keys."""
    return -(-S // TILE)


def scale_shape(
    granularity: str, B: int, heads: int, S: int, D: int, *, of_v: bool = False
) -> tuple[int, ...] | None:
    """Return the shape of a scale array, None where nothing is scaled."""
    if granularity == "channel":
        return (B, heads, D) if of_v else (B, heads, S, -(-D // CHANNEL_GROUP))
    return {
        "token": (B, heads, S),
        "group": (B, heads, tiles_of(S), 4),
        "tile": (B, heads, tiles_of(S)),
        "head": (B, heads),
        "none": None,
    }[granularity]


def group_of_key(S: int) -> np.ndarray:
    """Return for each key its index in a (nT * 4) list of group scales.

    A thread of the quad q = 0..3 holds columns 8i + 2q and 8i + 2q + 1 of a tensor-core
    accumulator, so the keys of a tile with equal (j % 8) // 2 share a scale.
    """
    j = np.arange(S)
    return (j // TILE) * 4 + (j % 8) // 2


def pack_int4(values: np.ndarray) -> np.ndarray:
    """Pack int8 values in -8..7 two to a byte along the last axis, even index in the low nibble."""
    if values.shape[-1] % 2:
        values = np.concatenate([values, np.zeros_like(values[..., :1])], axis=-1)
    low, high = values[..., 0::2].astype(np.uint8), values[..., 1::2].astype(np.uint8)
    return (low & 0xF) | (high << 4).astype(np.uint8)


def unpack_int4(packed: np.ndarray, D: int) -> np.ndarray:
    """Undo :func:`pack_int4`: int8 values with last axis D."""
    out = np.empty((*packed.shape[:-1], packed.shape[-1] * 2), np.int8)
    out[..., 0::2] = (packed << 4).astype(np.int8) >> 4
    out[..., 1::2] = packed.astype(np.int8) >> 4
    return out[..., :D]


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """One quantised tensor: stored values and the scale that gives them their size.

    Parameters
    ----------
    values : array
        (B, heads, S, D) of the stored format; INT4 is packed two to a byte along D.
        On a GPU the kernels' own packed layout (``layout="packed"``).
    scale : array of float32, or None
        Its shape follows ``granularity``: token (B, heads, S); channel (B, heads, S, D/32) for
        Q and K and (B, heads, D) for V; group (B, heads, tiles, 4); tile (B, heads, tiles); head
        (B, heads). A NaN marks what a non-finite input poisoned.
    format, granularity : str
        As in :class:`Recipe`.
    shape : tuple of int
        (B, heads, S, D).
    which : {"q", "k", "v"}
        The operand.
    layout : {"plain", "packed"}
        How ``values`` lie in memory.
    """

    values: Array
    scale: Array | None
    format: str
    granularity: str
    shape: tuple[int, int, int, int]
    which: str = "q"
    layout: str = "plain"

    @property
    def bits(self) -> int:
        """int : bits of one stored element."""
        return BITS[self.format]

    @property
    def nbytes(self) -> int:
        """int : bytes held, values and scales."""
        return int(self.values.nbytes) + (0 if self.scale is None else int(self.scale.nbytes))

    def numbers(self) -> Array:
        """Return the stored values unpacked: (B, heads, S, D), int8 for INT4."""
        if self.layout == "packed":
            from . import packing

            return packing.unpack(self)
        return unpack_int4(self.values, self.shape[3]) if self.format == "int4" else self.values

    def element_scale(self) -> Array:
        """Return the scale of each element, broadcastable to (B, heads, S, D)."""
        B, heads, S, D = self.shape
        scale: Any = self.scale
        if scale is None:
            return np.float32(1)
        if self.layout == "packed":
            from . import packing

            scale = packing.unpack_scale(self)
        if self.granularity == "token":
            return scale[..., None]
        if self.granularity == "head":
            return scale[..., None, None]
        if self.granularity == "channel":
            if self.which == "v":
                return scale[..., None, :]
            return scale.repeat(CHANNEL_GROUP, axis=-1)[..., :D]
        if self.granularity == "tile":
            return scale.repeat(TILE, axis=-1)[..., :S, None]
        return scale.reshape(B, heads, -1)[..., group_of_key(S), None]

    def dequantize(self) -> Array:
        """Return the float32 tensor that the stored numbers stand for, (B, heads, S, D).

        For Q and K that is the prepared tensor: smoothed, equalised and rotated as the recipe says.
        """
        return self.numbers().astype(np.float32) * self.element_scale()

    def __repr__(self) -> str:
        return (
            f"QuantizedTensor({self.which}, {self.format}, shape={self.shape}, scale per {self.granularity}, "
            f"{self.nbytes:,} bytes)"
        )


@dataclass(frozen=True, eq=False)
class QuantizedQKV:
    """Quantised Q, K and V of one attention, and what the operator needs beside them.

    Made by :func:`intfa_cupy.quantize_qkv` or :meth:`from_arrays`; taken by
    :func:`intfa_cupy.attention_quantized`.

    Parameters
    ----------
    q, k, v : QuantizedTensor
        Shapes (B, H, Sq, D), (B, Hkv, Sk, D), (B, Hkv, Sk, D).
    recipe : Recipe
        How they were made, and how P will be rounded.
    lse_shift : array of float32 (B, H, Sq), or None
        q . mean(K), which K smoothing took out of the scores: times the scale it is added to the
        log-sum-exp.
    out_dtype : str
        The inputs' dtype, the output's default.
    extra : dict
        What a backend keeps beside (the packed layout's auxiliary arrays). Not part of the interface.
    """

    q: QuantizedTensor
    k: QuantizedTensor
    v: QuantizedTensor
    recipe: Recipe
    lse_shift: Array | None = None
    out_dtype: str = "float32"
    extra: dict[str, Any] = field(default_factory=dict, repr=False)
    #: Calls of attention_quantized that are worked out already, by its arguments. Not carried into a copy.
    calls: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    @property
    def nbytes(self) -> int:
        """int : bytes of the three tensors, values and scales."""
        return self.q.nbytes + self.k.nbytes + self.v.nbytes

    @classmethod
    def from_arrays(
        cls,
        q: Array,
        k: Array,
        v: Array,
        *,
        q_scale: Array | None,
        k_scale: Array | None,
        v_scale: Array | None,
        recipe: str | Recipe = "paper-int8",
        lse_shift: Array | None = None,
        out_dtype: str = "float32",
    ) -> QuantizedQKV:
        """Wrap integers and scales made elsewhere.

        Parameters
        ----------
        q, k, v : numpy.ndarray
            (B, H, Sq, D), (B, Hkv, Sk, D), (B, Hkv, Sk, D) in the recipe's formats: int8 from -127 to 127
            (-128 has no negative), also for INT4, -7..7, not packed; float16; or ml_dtypes' float8 types.
            Whatever preparation of Q and K the recipe names (smoothing, equalisation, rotation) was done by
            the caller.
        q_scale, k_scale, v_scale : numpy.ndarray of float32, or None
            Shapes by the recipe's granularities, see :class:`QuantizedTensor`; None only where the
            recipe says ``"none"``. Finite and positive.
        recipe : str or Recipe
            How to read them, and how to round P.
        lse_shift : numpy.ndarray of float32 (B, H, Sq), optional
            Added, times the scale, to the log-sum-exp.
        out_dtype : str or dtype
            The output's default dtype, as :func:`intfa_cupy.attention_quantized` takes it.

        Returns
        -------
        QuantizedQKV

        Raises
        ------
        TypeError, ValueError
            An array of another dtype or shape, an integer out of range, or a scale that is not finite and
            positive; the message names it.
        """
        from .problem import shape_of_qkv

        recipe = get_recipe(recipe)
        for name, x in (("q", q), ("k", k), ("v", v)):
            if not isinstance(x, np.ndarray):
                raise TypeError(f"{name} must be a NumPy array, got {type(x).__name__}")
        out_dtype = arrays.floating_name("out_dtype", out_dtype)
        B, H, Hkv, Sq, Sk, D = shape_of_qkv(q.shape, k.shape, v.shape, "bhsd")
        if q.ndim != 4:
            raise ValueError(f"q must have 4 dimensions (B, H, Sq, D), got shape {q.shape}")
        tensors = []
        for which, x, scale, heads, S in (
            ("q", q, q_scale, H, Sq),
            ("k", k, k_scale, Hkv, Sk),
            ("v", v, v_scale, Hkv, Sk),
        ):
            fmt = getattr(recipe, f"{which}_format")
            granularity = getattr(recipe, f"{which}_granularity")
            _check_values(which, x, fmt)
            want = scale_shape(granularity, B, heads, S, D, of_v=which == "v")
            scale = _check_scale(f"{which}_scale", scale, want)
            tensors.append(
                QuantizedTensor(
                    pack_int4(x) if fmt == "int4" else np.ascontiguousarray(x),
                    scale, fmt, granularity, (B, heads, S, D), which,
                )
            )  # fmt: skip
        if lse_shift is not None:
            lse_shift = np.asarray(lse_shift, np.float32)
            if lse_shift.shape != (B, H, Sq):
                raise ValueError(f"lse_shift must have shape {(B, H, Sq)}, got {lse_shift.shape}")
        return cls(tensors[0], tensors[1], tensors[2], recipe, lse_shift, out_dtype)

    def _rows(self) -> list[tuple[str, ...]]:
        rows: list[tuple[str, ...]] = []
        for name, t in (("q", self.q), ("k", self.k), ("v", self.v)):
            plain = 2 * math.prod(t.shape)
            share = f"{t.nbytes / plain:.0%} of fp16" if plain else "-"
            rows.append((name, t.format, str(t.shape), t.granularity, f"{t.nbytes:,}", share))
        return rows

    def __repr__(self) -> str:
        body = "\n".join("  " + "  ".join(row) for row in self._rows())
        return f"QuantizedQKV(recipe={self.recipe.name!r}, {self.nbytes:,} bytes\n{body})"

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{h}</th>" for h in ("", "format", "shape", "scale per", "bytes", "size"))
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
            for row in self._rows()
        )
        title = f"QuantizedQKV, recipe {html.escape(self.recipe.name)}, {self.nbytes:,} bytes"
        return f"<table><caption>{title}</caption><tr>{head}</tr>{body}</table>"


def _check_values(which: str, x: Array, fmt: str) -> None:
    want = {
        "int8": "int8",
        "int4": "int8",
        "fp16": "float16",
        "e4m3": "float8_e4m3fn",
        "e5m2": "float8_e5m2",
    }[fmt]
    if str(x.dtype) != want:
        raise TypeError(f"{which} must be {want} for format {fmt!r}, got {x.dtype}")
    if fmt == "int4" and x.size and (int(x.min()) < -8 or int(x.max()) > 7):
        raise ValueError(f"{which} must hold INT4 values in -8..7, got {int(x.min())}..{int(x.max())}")
    if fmt == "int8" and x.size and int(x.min()) < -127:  # a kernel negates Q where the scale is negative
        raise ValueError(f"{which} must hold INT8 values in -127..127, got -128")


def _check_scale(name: str, scale: Array | None, want: tuple[int, ...] | None) -> Array | None:
    if want is None or scale is None:
        if want is not None or scale is not None:
            raise ValueError(
                f"{name} must be {'None' if want is None else f'an array of shape {want}'} for this recipe"
            )
        return None
    scale = np.asarray(scale)
    if scale.shape != want:
        raise ValueError(f"{name} must have shape {want}, got {scale.shape}")
    if scale.dtype.kind != "f":
        raise TypeError(f"{name} must be floating, got {scale.dtype}")
    with np.errstate(over="ignore"):  # float64 beyond float32 is refused just below
        scale = np.ascontiguousarray(scale, np.float32)
    if not (np.isfinite(scale).all() and (scale > 0).all()):
        raise ValueError(f"{name} must be finite and positive")
    return scale
