"""Hypothesis strategies of attention calls: shapes, masks, dtypes, layouts in memory, distributions, recipes.

What is drawn is small and printable (a `Case`); its arrays are made from its seed. Nothing here runs
the operator, so that tests of every backend can share it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
from hypothesis import strategies as st

from intfa_cupy import Recipe, packing, recipes
from intfa_cupy.problem import Problem, default_scale, normalize_window
from intfa_cupy.quantized import TILE, scale_shape

#: Lengths around the ends of a tile (128 keys), a tensor-core step (32) and a block of queries.
LENGTHS = (1, 2, 7, 8, 31, 32, 33, 63, 64, 65, 100, 127, 128, 129, 130, 255, 256, 257, 300)
#: Head dimensions: every padded width, its neighbours, and ones that are no power of two.
HEAD_DIMS = (1, 2, 3, 8, 16, 31, 32, 33, 40, 63, 64, 65, 80, 96, 112, 127, 128, 129, 160, 192, 255, 256)
DTYPES = ("float16", "bfloat16", "float32", "float64")
STORAGES = (
    "contiguous",
    "other-layout",
    "every-second",
    "reversed",
    "fortran",
    "inner-strided",
    "slice",
    "broadcast",
)
LAYOUTS = ("bhsd", "bshd")


def dtype(name: str) -> np.dtype:
    """NumPy's dtype of a name, bfloat16 included."""
    return np.dtype(getattr(ml_dtypes, name, name))


# -- distributions ------------------------------------------------------------------------
# Each takes a generator and the shapes of q and of k and v, (B, heads, S, D), and returns float64 arrays.

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray]
Shape = tuple[int, ...]


def normal(rng: np.random.Generator, q: Shape, k: Shape) -> Arrays:
    return rng.standard_normal(q), rng.standard_normal(k), rng.standard_normal(k)


def uniform(rng: np.random.Generator, q: Shape, k: Shape) -> Arrays:
    """Zero mean, as the paper's "uniform" must be."""
    return rng.uniform(-0.5, 0.5, q), rng.uniform(-0.5, 0.5, k), rng.uniform(-0.5, 0.5, k)


def sink(rng: np.random.Generator, q: Shape, k: Shape, mass: float = 0.7) -> Arrays:
    """Key 0 takes about ``mass`` of every row that sees all keys."""
    x, y, z = normal(rng, q, k)
    Sk, D = k[2:]
    # One direction carries the sink: all queries have a component along it, and so has key 0 alone.
    direction = np.zeros(D)
    direction[0] = 1
    x[..., 0] = 4.0
    y[..., 0] = 0
    others = max(Sk - 1, 1) * math.exp((D - 1) / D / 2)  # expected sum of exp(score) over the others
    y[:, :, :1] = direction * math.log(mass / (1 - mass) * others) * math.sqrt(D) / 4
    return x, y, z


def small_sink(rng: np.random.Generator, q: Shape, k: Shape) -> Arrays:
    """A sink whose value is small, as in language models: all of the output comes from the other 30 %."""
    x, y, z = sink(rng, q, k)
    z[:, :, :1] *= 0.05
    return x, y, z


def channel_scales(rng: np.random.Generator, q: Shape, k: Shape) -> Arrays:
    """Log-normal factors that K's channels have and Q's lack, so that scores are as for normal data."""
    x, y, z = normal(rng, q, k)
    factor = np.exp(rng.standard_normal(q[-1]))
    return x / factor, y * factor, z


def shifted_keys(rng: np.random.Generator, q: Shape, k: Shape) -> Arrays:
    """K with a large common offset per channel, which softmax does not see."""
    x, y, z = normal(rng, q, k)
    return x, y + 8 * rng.standard_normal(k[-1]), z


def positive_values(rng: np.random.Generator, q: Shape, k: Shape) -> Arrays:
    """V of one sign: an error of the softmax's denominator shows in full."""
    x, y, z = normal(rng, q, k)
    return x, y, np.abs(z) + 1


def huge(rng: np.random.Generator, q: Shape, k: Shape) -> Arrays:
    """Q near float16's end with K to match; V near it too."""
    x, y, z = normal(rng, q, k)
    return np.clip(x * 16384, -65504, 65504), y / 16384, np.clip(z * 16384, -65504, 65504)


def tiny(rng: np.random.Generator, q: Shape, k: Shape) -> Arrays:
    """Every number among float16's subnormals."""
    return tuple(1e-7 * x for x in uniform(rng, q, k))  # type: ignore[return-value]


def zero_tokens(rng: np.random.Generator, q: Shape, k: Shape) -> Arrays:
    """A third of the tokens of each operand are exactly 0."""
    x, y, z = normal(rng, q, k)
    for a in (x, y, z):
        a[rng.random(a.shape[:3]) < 1 / 3] = 0
    return x, y, z


def huge_token(rng: np.random.Generator, q: Shape, k: Shape) -> Arrays:
    """One key is a thousand times the others, along a direction that no query has; one value likewise."""
    x, y, z = normal(rng, q, k)
    if k[2] and k[3] > 1:
        j = int(rng.integers(k[2]))
        x[..., 0] = 0
        y[:, :, j] = 0
        y[:, :, j, 0] = 1000
    if k[2]:
        z[:, :, int(rng.integers(k[2]))] *= 30
    return x, y, z


def peaked(rng: np.random.Generator, q: Shape, k: Shape) -> Arrays:
    """Scores eight times as wide as usual: a few keys take all of a row."""
    x, y, z = normal(rng, q, k)
    return 8 * x, y, z


def rising(rng: np.random.Generator, q: Shape, k: Shape) -> Arrays:
    """Every key's score exceeds the one before: the running maximum moves all the time, by far in the end."""
    x, y, z = normal(rng, q, k)
    x[..., 0] = math.sqrt(k[3])
    y[..., 0] = np.linspace(0, 0.5 * k[2], k[2])
    return x, y, z


def constant(rng: np.random.Generator, q: Shape, k: Shape) -> Arrays:
    """All tokens alike: K smoothed is 0, and every row the mean of V."""
    x, y, z = normal(rng, q, k)
    return x * 0 + x[..., :1, :], y * 0 + y[..., :1, :], z


Distribution = Callable[[np.random.Generator, Shape, Shape], Arrays]
DISTRIBUTIONS: dict[str, Distribution] = {
    f.__name__: f
    for f in (
        normal, uniform, sink, small_sink, channel_scales, shifted_keys, positive_values, huge, tiny,
        zero_tokens, huge_token, peaked, rising, constant,
    )
}  # fmt: skip


# -- layout in memory -----------------------------------------------------------------------


def stored(x: np.ndarray, storage: str) -> np.ndarray:
    """Return an equal array that lies in memory otherwise; ``"broadcast"`` repeats the first head."""
    if storage == "contiguous" or x.ndim < 2:
        return np.ascontiguousarray(x)
    if storage == "other-layout":  # the bytes of bshd for bhsd, and the other way round
        return (
            np.ascontiguousarray(x.swapaxes(-3, -2)).swapaxes(-3, -2) if x.ndim > 2 else np.asfortranarray(x)
        )
    if storage == "every-second":
        wide = np.full((*x.shape[:-2], 2 * x.shape[-2], x.shape[-1]), np.nan, x.dtype)
        wide[..., ::2, :] = x
        return wide[..., ::2, :]
    if storage == "reversed":
        return np.ascontiguousarray(x[..., ::-1, ::-1])[..., ::-1, ::-1]
    if storage == "fortran":
        return np.asfortranarray(x)
    if storage == "inner-strided":
        wide = np.full((*x.shape[:-1], 3 * x.shape[-1]), np.nan, x.dtype)
        wide[..., ::3] = x
        return wide[..., ::3]
    if storage == "slice":  # a window of a larger array, off any alignment
        pad = np.full(tuple(n + 3 for n in x.shape), np.nan, x.dtype)
        pad[tuple(slice(1, 1 + n) for n in x.shape)] = x
        return pad[tuple(slice(1, 1 + n) for n in x.shape)]
    if storage == "broadcast":
        return np.broadcast_to(x[:1], x.shape)
    raise ValueError(f"storage must be one of {STORAGES}, got {storage!r}")


# -- recipes --------------------------------------------------------------------------------

NAMES = tuple(recipes())
#: Those that store Q, K, V and P as integers.
INTEGER_NAMES = tuple(name for name, r in recipes().items() if r.integer_p)

_STORED = {
    "int8": {
        "q": ("token", "channel"),
        "k": ("token", "group", "tile", "channel"),
        "v": ("token", "channel", "head"),
    },
    "int4": {"q": ("token", "channel"), "k": ("token", "channel")},
    "fp16": {"q": ("head",), "k": ("head",), "v": ("head",)},
    "e4m3": {"q": ("head", "none"), "k": ("head", "none"), "v": ("head", "none")},
    "e5m2": {"q": ("head", "none"), "k": ("head", "none"), "v": ("head", "none")},
}
_LEVELS = {
    "uint8": (255, 254, 127, 64),
    "int8": (127, 126, 31),
    "fp16": (1,),
    "e4m3": (256, 128),
    "e5m2": (1, 16384),
}


@st.composite
def custom_recipes(draw: st.DrawFn, *, integer: bool = False) -> Recipe:
    """Any valid Recipe; with ``integer``, Q, K, V and P all stored as integers."""
    q_format = draw(st.sampled_from(("int8", "int4") if integer else tuple(_STORED)))
    k_format = draw(st.sampled_from(("int8", "int4"))) if q_format in ("int8", "int4") else q_format
    v_format = "int8" if integer else draw(st.sampled_from(("int8", "fp16", "e4m3", "e5m2")))
    p_format = draw(st.sampled_from(("uint8", "int8"))) if v_format == "int8" else v_format
    choice = {"q": q_format, "k": k_format, "v": v_format}
    return Recipe(
        q_format=q_format,
        k_format=k_format,
        v_format=v_format,  # type: ignore[arg-type]
        p_format=p_format,
        p_levels=draw(st.sampled_from(_LEVELS[p_format])),
        p_max=draw(st.sampled_from(("tile", "running"))),
        smooth_k=draw(st.booleans()),
        equalize=draw(st.booleans()),
        hadamard=draw(st.booleans()),
        **{f"{x}_granularity": draw(st.sampled_from(_STORED[fmt][x])) for x, fmt in choice.items()},  # type: ignore
    )


def any_recipe(*, integer: bool = False) -> st.SearchStrategy[Recipe]:
    """A named recipe or a custom one."""
    named = [recipes()[name] for name in (INTEGER_NAMES if integer else NAMES)]
    return st.one_of(st.sampled_from(named), custom_recipes(integer=integer))


# -- calls ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One call of the operator: what it is given, but for the recipe and backend."""

    B: int = 1
    H: int = 2
    Hkv: int = 2
    Sq: int = 128
    Sk: int = 128
    D: int = 64
    dtype: str = "float32"
    distribution: str = "normal"
    is_causal: bool = False
    window: tuple[int, int] | None = None
    scale: float | None = None
    layout: str = "bhsd"
    ndim: int = 4
    storage: str = "contiguous"
    seed: int = 0

    def replace(self, **changes: Any) -> Case:
        return replace(self, **changes)

    def logical(self) -> Arrays:
        """q (B, H, Sq, D), k and v (B, Hkv, Sk, D), contiguous, in the case's dtype."""
        rng = np.random.default_rng(self.seed)
        make = DISTRIBUTIONS[self.distribution]
        made = make(rng, (self.B, self.H, self.Sq, self.D), (self.B, self.Hkv, self.Sk, self.D))
        if self.storage == "broadcast":
            made = tuple(x * 0 + x[:1] for x in made)  # type: ignore[assignment]
        return tuple(x.astype(dtype(self.dtype)) for x in made)  # type: ignore[return-value]

    def arrays(self) -> Arrays:
        """q, k and v as the call takes them: in the case's layout, number of dimensions and storage."""
        return tuple(stored(self.shaped(x), self.storage) for x in self.logical())  # type: ignore[return-value]

    def shaped(self, x: np.ndarray) -> np.ndarray:
        """Bring (B, heads, S, ...) into the case's layout and number of dimensions."""
        if self.layout == "bshd":
            x = x.swapaxes(1, 2)
        return (
            x
            if self.ndim == 4
            else x[0]
            if self.ndim == 3
            else x.reshape(x.shape[1] * x.shape[2], x.shape[3])
        )

    def logical_again(self, out: np.ndarray) -> np.ndarray:
        """Bring a result back to (B, H, Sq, D)."""
        if self.ndim == 2:
            return out.reshape(1, 1, self.Sq, self.D)
        if self.ndim == 3:
            out = out[None]
        return out.swapaxes(1, 2) if self.layout == "bshd" else out

    @property
    def mask(self) -> dict[str, Any]:
        """Keyword arguments that say what is visible, and the scale."""
        return {"is_causal": self.is_causal, "window": self.window, "scale": self.scale}

    @property
    def call(self) -> dict[str, Any]:
        """Keyword arguments of the call."""
        return {**self.mask, "layout": self.layout}

    def visible(self) -> np.ndarray:
        """The (Sq, Sk) visibility, pair by pair from the definition."""
        left, right = self.window or (-1, -1)
        right = 0 if self.is_causal else right
        seen = np.ones((self.Sq, self.Sk), bool)
        for i in range(self.Sq):
            p = i + self.Sk - self.Sq
            for j in range(self.Sk):
                seen[i, j] = (left < 0 or j >= p - left) and (right < 0 or j <= p + right)
        return seen

    def problem(self, recipe: Recipe, **fields: Any) -> Problem:
        """The Problem that the call is for a backend."""
        left, right = normalize_window(self.window, self.is_causal)
        return Problem(
            self.B, self.H, self.Hkv, self.Sq, self.Sk, self.D, recipe, left, right,
            default_scale(self.scale, self.D), fields.pop("out_dtype", self.dtype), **fields,
        )  # fmt: skip


def windows(Sk: int) -> st.SearchStrategy[tuple[int, int] | None]:
    part = st.one_of(st.just(-1), st.integers(0, max(Sk, 1)))
    return st.one_of(st.none(), st.tuples(part, part))


@st.composite
def cases(
    draw: st.DrawFn,
    *,
    lengths: Sequence[int] = LENGTHS,
    head_dims: Sequence[int] = HEAD_DIMS,
    dtypes: Sequence[str] = DTYPES,
    distributions: Iterable[str] = tuple(DISTRIBUTIONS),
    empty: bool = False,
    masks: bool = True,
    memory: bool = True,
    max_heads: int = 4,
) -> Case:
    """A call of at most a few heads.

    Parameters
    ----------
    lengths, head_dims, dtypes, distributions
        What to draw from.
    empty : bool
        Also draw lengths of 0.
    masks : bool
        Draw causal and window; else every key is visible.
    memory : bool
        Draw layouts, fewer dimensions and strides; else contiguous (B, heads, S, D).
    max_heads : int
        Most query heads.
    """
    ndim = draw(st.sampled_from((4, 4, 4, 3, 2))) if memory else 4
    B = draw(st.integers(1, 2)) if ndim == 4 else 1
    Hkv = draw(st.integers(1, 2)) if ndim > 2 else 1
    H = Hkv * draw(st.integers(1, max_heads // Hkv)) if ndim > 2 else 1
    length = st.sampled_from((0, *lengths) if empty else tuple(lengths))
    Sq, Sk, D = draw(length), draw(length), draw(st.sampled_from(tuple(head_dims)))
    storage = draw(st.sampled_from(STORAGES)) if memory else "contiguous"
    return Case(
        B, H, Hkv, Sq, Sk, D,
        dtype=draw(st.sampled_from(tuple(dtypes))),
        distribution=draw(st.sampled_from(tuple(distributions))),
        is_causal=masks and draw(st.booleans()),
        window=draw(windows(Sk)) if masks else None,
        scale=draw(st.sampled_from((None, None, 1 / math.sqrt(D), 0.3 / math.sqrt(D)))),
        layout=draw(st.sampled_from(LAYOUTS)) if memory else "bhsd",
        ndim=ndim,
        storage="slice" if storage == "broadcast" and ndim != 4 else storage,
        seed=draw(st.integers(0, 2**16)),
    )  # fmt: skip


def integer_arrays(recipe: Recipe, case: Case) -> dict[str, Any]:
    """Arguments of `QuantizedQKV.from_arrays`: random integers and scales for an integer recipe.

    Scores have a spread of a few units at scale 1/sqrt(D).
    """
    rng = np.random.default_rng(case.seed)
    made: dict[str, Any] = {}
    for which, heads, S in (("q", case.H, case.Sq), ("k", case.Hkv, case.Sk), ("v", case.Hkv, case.Sk)):
        most = 7 if getattr(recipe, f"{which}_format") == "int4" else 127
        made[which] = rng.integers(-most, most + 1, (case.B, heads, S, case.D)).astype(np.int8)
        granularity = getattr(recipe, f"{which}_granularity")
        shape = scale_shape(granularity, case.B, heads, S, case.D, of_v=which == "v")
        made[f"{which}_scale"] = (rng.uniform(1, 3, shape) / most).astype(np.float32)
    return made


def one_key_takes_all(case: Case, key: int) -> Arrays:
    """A case's operands, changed so that one key's scores are 100 and no other's more than some tens."""
    q, k, v = case.logical()
    q[..., 0], k[..., 0] = 1, 0
    k[:, :, key] = 0
    k[:, :, key, 0] = 100
    return q, k, v


def kernel_cases(
    Dp: int, lengths: Sequence[int], *, masked: bool = True, plain: bool = False, max_heads: int = 2
) -> st.SearchStrategy[Case]:
    """Calls for a kernel on the host shim: finite scores, contiguous float32 operands.

    Parameters
    ----------
    Dp : int
        The padded head dimension that the kernel was compiled for.
    lengths : sequence of int
    masked : bool
        Whether it was compiled for masks; else every key is visible and Sk a multiple of a tile.
    plain : bool
        Only D = Dp.
    max_heads : int
        Most query heads.
    """
    found = cases(
        lengths=lengths,
        head_dims=(Dp,) if plain else [D for D in HEAD_DIMS if packing.padded_head_dim(D) == Dp],
        dtypes=("float32",),
        distributions=[d for d in DISTRIBUTIONS if d != "huge"],
        masks=masked,
        memory=False,
        max_heads=max_heads,
    )
    return found if masked else found.map(lambda case: case.replace(Sk=-(-case.Sk // TILE) * TILE))
