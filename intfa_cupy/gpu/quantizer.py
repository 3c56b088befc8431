"""Quantisation on the device into the packed layout."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np

from .. import arrays, packing
from ..dispatch import Plan
from ..problem import Problem
from ..quantized import CHANNEL_GROUP, TILE, QuantizedQKV, QuantizedTensor, tiles_of
from ..recipes import Recipe
from ..tiles import OUTPUTS
from . import devices
from .arena import Arena
from .params import QUANTIZE_PARAMS, by_value
from .views import View, view

__all__ = ["OPERANDS", "Quantizer", "container", "quantize", "quantizer", "quantizer_defines"]

Array = Any

# The constants of quantize.cu.
_STATISTICS_THREADS = 256
_STATISTICS_STEPS = 16
_FINISH_THREADS = 1024


def quantizer_defines(recipe: Recipe, D: int, dtype: str, lse_shift: bool = True) -> dict[str, int]:
    """Return the macros of quantize.cu; `lse_shift` as for :class:`Quantizer`."""
    return {
        "INTFA_D": D,
        "INTFA_DP": packing.padded_head_dim(D),
        "INTFA_IN": OUTPUTS[dtype],
        "INTFA_SMOOTH": int(recipe.smooth_k),
        "INTFA_EQUALIZE": int(recipe.equalize),
        "INTFA_HADAMARD": int(recipe.hadamard),
        "INTFA_LSE_SHIFT": int(recipe.smooth_k and lse_shift),
        "INTFA_Q_FORMAT": packing.FORMATS[recipe.q_format],
        "INTFA_K_FORMAT": packing.FORMATS[recipe.k_format],
        "INTFA_V_FORMAT": packing.FORMATS[recipe.v_format],
        "INTFA_Q_SCALE": packing.SCALES[recipe.q_granularity],
        "INTFA_K_SCALE": packing.SCALES[recipe.k_granularity],
        "INTFA_V_SCALE": packing.V_SCALES[recipe.v_granularity],
    }


#: Names of the operands in the order of struct AttentionParams.
OPERANDS = ("q8", "q_scale", "k8", "k_scale", "v8", "v_scale", "v_fold", "guard", "lse_shift")
_POINTERS = tuple(name for name in QUANTIZE_PARAMS.names or () if QUANTIZE_PARAMS[name] == np.uint64)


class Quantizer:
    """The launches of a problem's quantiser on the current device.

    Parameters
    ----------
    problem : Problem
    dtype : str
        The inputs'.
    lse_shift : bool
        Whether to work out what corrects the log-sum-exp for smoothed K, which nothing else needs.
    """

    def __init__(self, problem: Problem, dtype: str, lse_shift: bool = True) -> None:
        p, recipe = problem, problem.recipe
        Dp, tiles = packing.padded_head_dim(p.D), tiles_of(p.Sk)
        lanes = Dp // 8
        chunk = _STATISTICS_THREADS // lanes * _STATISTICS_STEPS
        q_chunks, k_chunks = -(-p.Sq // chunk), -(-p.Sk // chunk)
        key_heads, query_heads = p.B * p.Hkv, p.B * p.H
        self.result = Arena(*_results(p, Dp, tiles, lse_shift))
        self.scratch = Arena(*_scratch(p, Dp, q_chunks, k_chunks))
        self.empty = not (query_heads and p.Sk)
        self.zero_value = packing.V_BIAS if recipe.v_format == "int8" else 0  # how V's 0 is stored
        self.places = [(self.result.offset(name), self.scratch.offset(name)) for name in _POINTERS]
        self.operands = [self.result.offset(name) for name in OPERANDS]
        self.sizes = struct.pack("<9i", p.B, p.H, p.Hkv, p.Sq, p.Sk, p.D, tiles, q_chunks, k_chunks)

        statistics = key_heads * k_chunks  # V's
        if recipe.smooth_k or recipe.equalize:
            statistics += key_heads * k_chunks
        if recipe.equalize:
            statistics += query_heads * q_chunks
        q_tiles = tiles_of(p.Sq)
        pack_memory = Dp * (TILE // 4 + 1) * 4 + TILE * 4
        launches = [
            ("statistics", statistics, _STATISTICS_THREADS, _STATISTICS_THREADS * 8 * 4),
            ("finish", key_heads, _FINISH_THREADS, _FINISH_THREADS * (8 + 3 * 4)),
            ("pack", 2 * key_heads * tiles + query_heads * q_tiles, 2 * Dp, pack_memory),
        ]
        if "head" in (recipe.q_granularity, recipe.k_granularity):
            launches.insert(2, ("ranges", key_heads * tiles + query_heads * q_tiles, 2 * Dp, pack_memory))

        def defines() -> dict[str, int]:
            return quantizer_defines(recipe, p.D, dtype, lse_shift)

        key = (recipe, p.D, dtype, lse_shift)
        self.launches = [
            (devices.kernel("quantize", f"quantize_{entry}", key, defines), (grid,), (block,), smem)
            for entry, grid, block, smem in launches
            if grid and not self.empty
        ]

    def __call__(self, q: View, k: View, v: View) -> Any:
        """Launch the kernels and return the memory that :attr:`result` describes."""
        memory = self.result.allocate()
        if self.empty:
            return memory
        scratch = self.scratch.allocate()
        here, there = memory.ptr, scratch.ptr
        params = struct.pack(
            f"<15q{len(_POINTERS)}Q36s3i",
            q.pointer, *q.strides, k.pointer, *k.strides, v.pointer, *v.strides,
            *[here + a if a is not None else 0 if b is None else there + b for a, b in self.places],
            self.sizes,
            q.vector, k.vector, v.vector,
        )  # fmt: skip
        args = (by_value(params, QUANTIZE_PARAMS),)
        for kernel, grid, block, smem in self.launches:
            kernel(grid, block, args, shared_mem=smem)
        return memory

    def arrays(self, memory: Any) -> dict[str, Array]:
        """Return the packed operands by the names of struct QuantizeParams."""
        made = self.result.arrays(memory)
        if self.empty:  # nothing was launched, nor will be
            for name, x in made.items():
                x.fill(self.zero_value if name == "v8" else 0)
        return made


def _results(p: Problem, Dp: int, tiles: int, lse_shift: bool) -> list[tuple[str, tuple[int, ...], Any]]:
    """What the kernels leave behind."""
    recipe, f32 = p.recipe, np.float32
    B, H, Hkv, Sq = p.B, p.H, p.Hkv, p.Sq
    groups = Dp // CHANNEL_GROUP
    q_scale = (B, H, Sq, groups) if recipe.q_granularity == "channel" else (B, H, Sq)
    k_scale: dict[str, tuple[int, ...]] = {
        "token": (B, Hkv, tiles * TILE),
        "group": (B, Hkv, tiles, 4),
        "tile": (B, Hkv, tiles),
        "channel": (B, Hkv, tiles, groups, TILE),
        "head": (B, Hkv),
        "none": (B, Hkv),
    }
    results: list[tuple[str, tuple[int, ...], Any]] = [
        ("q8", *packing.storage(recipe.q_format, "q", B, H, Sq, Dp)),
        ("q_scale", q_scale, f32),
        ("k8", *packing.storage(recipe.k_format, "k", B, Hkv, p.Sk, Dp)),
        ("k_scale", k_scale[recipe.k_granularity], f32),
        ("v8", *packing.storage(recipe.v_format, "v", B, Hkv, p.Sk, Dp)),
        ("v_scale", (B, Hkv, Dp), f32),
        ("guard", (B, Hkv), f32),
    ]
    if recipe.q_granularity == "head":
        results += [("q_head_scale", (B, H), f32)]
    if recipe.folded_v:
        results += [("v_fold", (B, Hkv, tiles, 2, TILE), f32), ("v_token", (B, Hkv, tiles * TILE), f32)]
    if recipe.smooth_k:
        results += [("k_mean", (B, Hkv, Dp), f32)]
        if lse_shift:
            results += [("lse_shift", (B, H, Sq), f32)]
    if recipe.equalize:
        results += [("equalizer", (B, Hkv, 2, Dp), f32)]
    return results


def _scratch(p: Problem, Dp: int, q_chunks: int, k_chunks: int) -> list[tuple[str, tuple[int, ...], Any]]:
    """What the kernels tell each other."""
    recipe, f32 = p.recipe, np.float32
    scratch: list[tuple[str, tuple[int, ...], Any]] = [
        ("v_statistic", (p.B, p.Hkv, Dp), f32),
        ("v_partial", (p.B, p.Hkv, k_chunks, 2 if recipe.folded_v else Dp), f32),
    ]
    if recipe.smooth_k or recipe.equalize:
        scratch += [("k_partial", (p.B, p.Hkv, k_chunks, 3, Dp), f32)]
    if recipe.equalize:
        scratch += [("q_partial", (p.B, p.H, q_chunks, Dp), f32)]
    if "head" in (recipe.q_granularity, recipe.k_granularity):
        scratch += [
            ("q_range", (p.B, p.H, tiles_of(p.Sq)), f32),
            ("k_range", (p.B, p.Hkv, tiles_of(p.Sk)), f32),
        ]
    return scratch


def quantizer(plan: Plan, dtype: str, lse_shift: bool = True) -> Quantizer:
    """Return a plan's quantiser on the current device, made at the first request."""
    lse_shift = lse_shift and plan.problem.recipe.smooth_k  # else there is none in any case
    key = ("quantizer", devices.current(), dtype, lse_shift)
    found: Quantizer | None = plan.prepared.get(key)
    if found is None:
        found = plan.prepared[key] = Quantizer(plan.problem, dtype, lse_shift)
    return found


def container(
    made: dict[str, Array], recipe: Recipe, shapes: tuple[Any, ...], out_dtype: str
) -> QuantizedQKV:
    """Return the container of packed operands."""
    q_scale = made["q_scale"]
    if recipe.q_granularity in ("head", "none"):
        q_scale = made.get("q_head_scale")
    k_scale = None if recipe.k_granularity == "none" else made["k_scale"]
    v_scale = made["v_scale"]
    if recipe.folded_v:
        v_scale = made["v_token"]
    elif recipe.v_granularity == "head":
        v_scale = v_scale[:, :, 0]
    elif recipe.v_granularity == "none":
        v_scale = None

    def tensor(which: str, scale: Array | None, shape: Any) -> QuantizedTensor:
        fmt, granularity = getattr(recipe, f"{which}_format"), getattr(recipe, f"{which}_granularity")
        return QuantizedTensor(made[f"{which}8"], scale, fmt, granularity, shape, which, "packed")

    q, k, v = (tensor(*each) for each in zip("qkv", (q_scale, k_scale, v_scale), shapes, strict=True))
    return QuantizedQKV(
        q,
        k,
        v,
        recipe,
        lse_shift=made.get("lse_shift"),
        out_dtype=out_dtype,
        extra={"operands": made},
    )


def quantize(q: Array, k: Array, v: Array, plan: Plan, *, layout: str = "bhsd") -> QuantizedQKV:
    """Quantise on the device into the packed layout. See :func:`intfa_cupy.quantize_qkv`."""
    with devices.where(q):
        views = view(q, layout), view(k, layout), view(v, layout)
        prepared = quantizer(plan, views[0].dtype)
        made = prepared.arrays(prepared(*views))
        return container(made, plan.problem.recipe, tuple(x.shape for x in views), arrays.dtype_name(q))
