"""Recipes: every numerical choice of one attention, named in one frozen object.

A :class:`Recipe` says *what* is rounded and how; it says nothing of tiles of threads or
of which kernel runs. The NumPy model, the quantisers and the CUDA kernels all read it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

__all__ = ["Recipe", "get_recipe", "recipes"]

#: Storage formats of one element of Q, K and V.
Format = Literal["int8", "int4", "fp16", "e4m3", "e5m2"]
#: Storage formats of one probability.
PFormat = Literal["uint8", "int8", "fp16", "e4m3", "e5m2"]
QGranularity = Literal["token", "channel", "head", "none"]
KGranularity = Literal["token", "group", "tile", "channel", "head", "none"]
VGranularity = Literal["token", "channel", "head", "none"]

BITS = {"int4": 4, "int8": 8, "uint8": 8, "e4m3": 8, "e5m2": 8, "fp16": 16}
_INTEGER = ("int8", "int4")

# What each field may hold. Which combinations make sense is checked in __post_init__.
_ALLOWED: dict[str, tuple[object, ...]] = {
    "q_format": ("int8", "int4", "fp16", "e4m3", "e5m2"),
    "k_format": ("int8", "int4", "fp16", "e4m3", "e5m2"),
    "v_format": ("int8", "fp16", "e4m3", "e5m2"),
    "p_format": ("uint8", "int8", "fp16", "e4m3", "e5m2"),
    "q_granularity": ("token", "channel", "head", "none"),
    "k_granularity": ("token", "group", "tile", "channel", "head", "none"),
    "v_granularity": ("token", "channel", "head", "none"),
    "p_max": ("tile", "running"),
    "smooth_k": (True, False),
    "equalize": (True, False),
    "hadamard": (True, False),
}


@dataclass(frozen=True)
class Recipe:
    """All numerical choices of one attention.

    Parameters
    ----------
    name : str
        A label for tables; ``"custom"`` unless given. It takes no part in comparisons.
    q_format, k_format : {"int8", "int4", "fp16", "e4m3", "e5m2"}
        Storage of Q and K. Both integer, or both the same floating format.
    v_format : {"int8", "fp16", "e4m3", "e5m2"}
        Storage of V.
    p_format : {"uint8", "int8", "fp16", "e4m3", "e5m2"}
        Storage of the probabilities that enter the second product: an integer with an
        ``int8`` V, else V's own format.
    q_granularity : {"token", "channel", "head", "none"}
        What shares one scale of Q: a token, a token's group of 32 channels, a head.
        ``"none"`` stores Q unscaled (floating formats only).
    k_granularity : {"token", "group", "tile", "channel", "head", "none"}
        The same for K, and also: ``"group"``, the 32 keys of a 128-key tile that one thread
        of a tensor-core fragment holds (keys with equal ``(j % 8) // 2``), and ``"tile"``,
        all 128.
    v_granularity : {"token", "channel", "head", "none"}
        The same for V. ``"token"`` is *folded V*: a token's scale moves into the exponent
        of its probability, so that what is rounded is the probability times the scale.
    p_levels : int
        R, the value that the largest probability is stored as: at most 255 for ``uint8``,
        127 for ``int8``, 256 for ``e4m3``, 1 for ``fp16`` and 16384 for ``e5m2``.
    p_max : {"tile", "running"}
        The maximum that P is taken against before rounding: that of its own 128-key tile,
        or the running one of the online softmax (Algorithm 1 of arXiv 2409.16997).
    smooth_k : bool
        Subtract K's mean over the tokens, per channel, its two extremes left out. Softmax does not change.
    equalize : bool
        Multiply Q and divide K by one factor per channel that gives both the same range.
        Q K^T does not change.
    hadamard : bool
        Rotate Q and K by a Hadamard matrix, which spreads outlier channels. Q K^T does
        not change.

    Raises
    ------
    ValueError
        A field holds something not allowed, or two fields contradict each other. The
        message names the field, what came and what is allowed.

    Examples
    --------
    >>> import intfa_cupy as intfa
    >>> mine = intfa.recipes()["int8"].replace(name="no-rotation", hadamard=False)
    >>> mine.folded_v, mine.hadamard
    (True, False)
    """

    name: str = dataclasses.field(default="custom", compare=False)
    q_format: Format = "int8"
    k_format: Format = "int8"
    v_format: Format = "int8"
    p_format: PFormat = "uint8"
    q_granularity: QGranularity = "token"
    k_granularity: KGranularity = "token"
    v_granularity: VGranularity = "channel"
    p_levels: int = 255
    p_max: Literal["tile", "running"] = "tile"
    smooth_k: bool = False
    equalize: bool = False
    hadamard: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"Recipe.name must be a non-empty string, got {self.name!r}")
        for field, allowed in _ALLOWED.items():
            value = getattr(self, field)
            if isinstance(allowed[0], bool):
                if not isinstance(value, bool):
                    raise ValueError(f"Recipe.{field} must be True or False, got {value!r}")
            elif value not in allowed:
                raise ValueError(
                    f"Recipe.{field} must be one of {', '.join(map(repr, allowed))}; got {value!r}"
                )
        self._check_formats()
        self._check_granularities()
        limit = {"uint8": 255, "int8": 127, "fp16": 1, "e4m3": 256, "e5m2": 16384}[self.p_format]
        if isinstance(self.p_levels, bool) or not isinstance(self.p_levels, int):
            raise ValueError(f"Recipe.p_levels must be an int, got {self.p_levels!r}")
        if not 1 <= self.p_levels <= limit:
            raise ValueError(
                f"Recipe.p_levels must be in 1..{limit} for p_format={self.p_format!r}, got {self.p_levels}"
            )

    def _check_formats(self) -> None:
        q_integer, k_integer = self.q_format in _INTEGER, self.k_format in _INTEGER
        if q_integer != k_integer or (not q_integer and self.q_format != self.k_format):
            raise ValueError(
                "Recipe.q_format and Recipe.k_format must both be integers or be the same floating format; "
                f"got {self.q_format!r} and {self.k_format!r}"
            )
        if (self.v_format == "int8") != (self.p_format in ("uint8", "int8")):
            raise ValueError(
                "Recipe.p_format must be 'uint8' or 'int8' exactly when v_format is 'int8'; "
                f"got p_format={self.p_format!r}, v_format={self.v_format!r}"
            )
        if self.v_format != "int8" and self.p_format != self.v_format:
            raise ValueError(
                "Recipe.p_format must equal v_format for a floating V; "
                f"got {self.p_format!r} and {self.v_format!r}"
            )

    def _check_granularities(self) -> None:
        for which in ("q", "k", "v"):
            fmt, granularity = getattr(self, f"{which}_format"), getattr(self, f"{which}_granularity")
            allowed: tuple[str, ...]
            if fmt in ("e4m3", "e5m2"):
                allowed = ("head", "none")
            elif fmt == "fp16":
                allowed = ("head",)
            elif fmt == "int4" or which == "q":
                allowed = ("token", "channel")
            elif which == "k":
                allowed = ("token", "group", "tile", "channel")
            else:
                allowed = ("token", "channel", "head")
            if granularity not in allowed:
                raise ValueError(
                    f"Recipe.{which}_granularity must be one of {', '.join(map(repr, allowed))} "
                    f"for {which}_format={fmt!r}; got {granularity!r}"
                )

    # -- what other modules ask ------------------------------------------------------------

    @property
    def folded_v(self) -> bool:
        """bool : V's scale is per token and lives in the exponent of P."""
        return self.v_granularity == "token"

    @property
    def integer_p(self) -> bool:
        """bool : P is an integer, so that the second product is int8 x int8 -> int32."""
        return self.p_format in ("uint8", "int8")

    @property
    def rounded_sum(self) -> bool:
        """bool : the softmax denominator sums the rounded P (its rounding cancels) and not the exact one.

        True for integers, but not for folded V, where numerator and denominator are rounded
        against different quantities; false for floating P, as in FlashAttention.
        """
        return self.integer_p and not self.folded_v

    @property
    def bits(self) -> dict[str, int]:
        """dict : bits of one element of q, k, v and p."""
        return {
            "q": BITS[self.q_format],
            "k": BITS[self.k_format],
            "v": BITS[self.v_format],
            "p": BITS[self.p_format],
        }

    def replace(self, **changes: object) -> Recipe:
        """Return a copy with some fields changed, validated again.

        Parameters
        ----------
        **changes
            Fields of :class:`Recipe`. The copy is named ``"custom"`` unless ``name`` is given.

        Returns
        -------
        Recipe
        """
        changes.setdefault("name", "custom")
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]


_ROTATED = {"smooth_k": True, "equalize": True, "hadamard": True}
_FLOAT16_PV = {
    "v_format": "fp16",
    "p_format": "fp16",
    "v_granularity": "head",
    "p_levels": 1,
    "p_max": "running",
}
_FLOAT16_QK = {"q_format": "fp16", "k_format": "fp16", "q_granularity": "head", "k_granularity": "head"}
_INT4_K = {"k_format": "int4", "k_granularity": "channel", "v_granularity": "token", **_ROTATED}


def _named(name: str, **fields: object) -> Recipe:
    return Recipe(name=name, **fields)  # type: ignore[arg-type]


_RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        _named("int8", k_granularity="group", v_granularity="token", **_ROTATED),
        _named("int8-fast", k_granularity="group", v_granularity="channel", **_ROTATED),
        _named("paper-int8", p_format="int8", p_levels=127, p_max="running", v_granularity="head"),
        _named("half-int8", **_FLOAT16_PV),
        _named("half-int8-plus", **_FLOAT16_PV, **_ROTATED),
        _named("int4", q_format="int4", q_granularity="channel", **_INT4_K),
        _named("k4", **_INT4_K),
        _named("fp16", **_FLOAT16_QK, **_FLOAT16_PV),
        _named(
            "fp8-e4m3",
            q_format="e4m3", k_format="e4m3", v_format="e4m3", p_format="e4m3",
            q_granularity="head", k_granularity="head", v_granularity="head",
            p_levels=256, p_max="running",
        ),
        _named(
            "fp8-e5m2",
            q_format="e5m2", k_format="e5m2", v_format="e5m2", p_format="e5m2",
            q_granularity="none", k_granularity="none", v_granularity="none",
            p_levels=1, p_max="running",
        ),
    )
}  # fmt: skip


def recipes() -> dict[str, Recipe]:
    """Return the named recipes.

    Returns
    -------
    dict of str to Recipe
        ``int8``
            The default, accurate under attention sinks: folded V, P against its tile's maximum, K's
            scale shared by 32 keys; K smoothed, channels equalised, Q and K rotated. With a scale for
            every key, ``recipes()["int8"].replace(k_granularity="token")``, it is the most accurate
            fully INT8 attention: a tenth less error, for a multiplication more at every score.
        ``int8-fast``
            The fastest: ``int8`` but for V, which has a scale per channel. Not for a strong attention
            sink whose value is small, nor for a V with one huge token: errors of 10 to 20 %, where
            ``int8`` has 1 to 2 %.
        ``paper-int8``
            Algorithm 1 of INT-FlashAttention (arXiv 2409.16997) to the letter.
        ``half-int8``, ``half-int8-plus``
            Q and K in INT8, P and V in fp16, as in the paper; *plus* prepares Q and K.
        ``int4``, ``k4``
            Q and K, or only K, stored in 4 bits with a scale for every 32 channels.
        ``fp16``, ``fp8-e4m3``, ``fp8-e5m2``
            Baselines: 16 bits; FP8 with one scale per head, as FlashAttention-3 does; FP8
            unscaled, as the paper's released benchmark does.

    Examples
    --------
    >>> import intfa_cupy as intfa
    >>> intfa.recipes()["paper-int8"].p_levels
    127
    """
    return dict(_RECIPES)


def get_recipe(recipe: str | Recipe) -> Recipe:
    """Return the recipe for a name, or the recipe itself.

    Raises
    ------
    ValueError
        The name is not known.
    TypeError
        Neither a string nor a :class:`Recipe`.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if not isinstance(recipe, str):
        raise TypeError(f"recipe must be a name or a Recipe, got {type(recipe).__name__}")
    try:
        return _RECIPES[recipe]
    except KeyError:
        raise ValueError(
            f"recipe must be one of {', '.join(map(repr, _RECIPES))}, or a Recipe; got {recipe!r}"
        ) from None
