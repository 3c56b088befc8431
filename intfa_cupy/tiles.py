"""The table of tiles: how each kernel divides a problem, and which problems and devices it serves.

Everything here is a pure function of a :class:`~intfa_cupy.problem.Problem` and a :class:`Device`. A tile
carries all macros that its kernel is compiled with, so that it is the cache key, the compiler's options and
the text of ``explain`` in one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from .packing import FORMATS, SCALES, padded_head_dim
from .problem import Problem
from .quantized import CHANNEL_GROUP, TILE
from .recipes import Recipe

__all__ = ["DESCRIPTION", "OUTPUTS", "Device", "Tile", "device_problem", "find", "variants"]

DESCRIPTION = {
    "wgmma": "INT8 tensor cores of Hopper, 64-row instructions on shared memory",
    "mma": "tensor cores by mma.sync, everything in registers; Ampere and later",
    "wmma": "portable WMMA kernel for every NVIDIA GPU since Turing",
}
#: Element types that kernels write, and their numbers in cuda_src/params.cuh.
OUTPUTS = {"float16": 0, "bfloat16": 1, "float32": 2}
# To a kernel, "none" is a head's scale: the quantiser writes ones there.
K_SCALES = SCALES | {"none": SCALES["head"]}

_MAX_BLOCKS = 2**31 - 1
#: Queries of a warpgroup of attention_wgmma.cu.
_WARPGROUP_ROWS = 64
# A block takes this much more of its multiprocessor's shared memory than it asked for.
_RESERVED = 1024


@dataclass(frozen=True)
class Device:
    """What the choice of a kernel depends on.

    Parameters
    ----------
    name : str
    capability : int
        Compute capability, 90 for 9.0.
    sms : int
        Multiprocessors.
    shared_memory : int
        Bytes of shared memory that one block may use.
    """

    name: str
    capability: int
    sms: int
    shared_memory: int


@dataclass(frozen=True)
class Tile:
    """How one kernel divides its work.

    Parameters
    ----------
    kernel : str
        ``cuda_src/attention_{kernel}.cu``, whose entry has the same name.
    rows : int
        Queries of a block.
    threads : int
    shared_memory : int
        Dynamic shared memory of a block in bytes.
    macros : tuple of (str, int)
        What the kernel is compiled with, the output's type apart.
    persistent : bool
        One block per multiprocessor takes work until none is left; else a block does one block of rows.
    masked : bool
        Some row may not see some key, or the last tile of keys may be short. The kernels of which
        `specializes` is true are compiled without what that needs where it is not so.
    """

    kernel: str
    rows: int
    threads: int
    shared_memory: int
    macros: tuple[tuple[str, int], ...]
    persistent: bool = False
    masked: bool = True

    @property
    def entry(self) -> str:
        """str : Source file and entry of the kernel."""
        return f"attention_{self.kernel}"

    @property
    def piece(self) -> int:
        """int : Queries of the smallest piece of work: a block's, of a persistent block a warpgroup's."""
        return _WARPGROUP_ROWS if self.persistent else self.rows

    def pieces(self, problem: Problem) -> int:
        """Return how many pieces a problem is."""
        return problem.B * problem.H * -(-problem.Sq // self.piece)

    @property
    def min_blocks(self) -> int:
        """int : Blocks per multiprocessor that the kernel is compiled for."""
        return dict(self.macros).get("INTFA_MIN_BLOCKS", 1)

    @property
    def specializes(self) -> bool:
        """bool : Whether the kernel has variants for unmasked problems and for plain outputs."""
        return self.kernel != "wmma"

    def defines(self, out_dtype: str, pairs: bool = False) -> dict[str, int]:
        """Return the macros for an output type; `pairs`: whether two channels of it can be stored at once."""
        if not self.specializes:
            return {**dict(self.macros), "INTFA_OUT": OUTPUTS[out_dtype]}
        wgmma = self.kernel == "wgmma"
        prefix = "" if wgmma else "INTFA_"
        return {
            **dict(self.macros),
            "OUT_DTYPE" if wgmma else "INTFA_OUT": OUTPUTS[out_dtype],
            f"{prefix}OUT_PAIRS": int(pairs),
            f"{prefix}MASKED": int(self.masked),
        }

    def __str__(self) -> str:
        options = " ".join(f"{k.removeprefix('INTFA_')}={v}" for k, v in self.macros)
        return (
            f"{self.rows} queries x {TILE} keys, {self.threads} threads, "
            f"{self.shared_memory:,} B shared memory; {options}"
        )


# --- wmma ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Wmma:
    """Options of attention_wmma.cu that change no result. The defaults suit most."""

    warps: int = 4
    buffers: int = 2  # 2: K and V each have shared memory; 1: they take turns
    query_in_registers: bool = True
    keep_scores: bool = True  # exponents stay in registers between maximum and rounding
    min_blocks: int = 1  # blocks per multiprocessor that the compiler leaves registers for


# By padded head dimension, the best first; the first that fits the device is taken. The exponents of 64 keys
# and the output want 168 registers at d = 64 and 255 at d = 128, which allows three and two blocks per
# multiprocessor; at d = 256 there is no room for the exponents.
_WMMA = {
    64: (_Wmma(min_blocks=3), _Wmma(buffers=1)),
    128: (_Wmma(min_blocks=2), _Wmma(buffers=1), _Wmma(warps=2, buffers=1)),
    256: (
        _Wmma(query_in_registers=False, keep_scores=False),
        _Wmma(warps=2, query_in_registers=False, keep_scores=False),
        _Wmma(warps=2, buffers=1, query_in_registers=False, keep_scores=False),
        _Wmma(warps=2, buffers=1, query_in_registers=False),
    ),
}


def _wmma_tile(recipe: Recipe, Dp: int, option: _Wmma) -> Tile:
    # The map of attention_wmma.cu, which checks the sum.
    half = recipe.p_format == "fp16"
    keep = option.keep_scores
    key = TILE * Dp
    value = TILE * (Dp + 8) * 2 if half else Dp * TILE
    block = key + value if option.buffers == 2 else max(key, value)
    block += 4 * TILE if recipe.k_granularity == "token" else 0
    block += 8 * TILE if recipe.folded_v else 0
    warp = 16 * 136 * 4 + 16 * 16
    if not keep:
        warp += 16 * 136 * 2 if half else 16 * TILE
    if not option.query_in_registers:
        warp += 16 * Dp
    shared = block + option.warps * warp
    macros = {
        "INTFA_DP": Dp,
        "INTFA_WARPS": option.warps,
        "INTFA_BUFFERS": option.buffers,
        "INTFA_QUERY_IN_REGISTERS": int(option.query_in_registers),
        "INTFA_KEEP_SCORES": int(keep),
        "INTFA_MIN_BLOCKS": option.min_blocks,
        "INTFA_SMEM": shared,
        "INTFA_P_LEVELS": recipe.p_levels,
        "INTFA_P_RUNNING": int(recipe.p_max == "running"),
        "INTFA_K_SCALE": K_SCALES[recipe.k_granularity],
        "INTFA_V_FOLDED": int(recipe.folded_v),
        "INTFA_HALF_PV": int(half),
    }
    return Tile("wmma", 16 * option.warps, 32 * option.warps, shared, tuple(macros.items()))


def _wmma_missing(recipe: Recipe, _: Device) -> Iterator[str]:
    yield from _int8_qk_missing(recipe, ("token", "group", "tile"))
    if recipe.v_format not in ("int8", "fp16"):
        yield f"V in {recipe.v_format} (has int8, fp16)"
    if recipe.v_format == "fp16" and recipe.p_max != "running":
        yield "fp16 P against the tile's maximum (has the running one)"


def _wmma_tiles(recipe: Recipe, Dp: int, _: int) -> list[Tile]:
    options = _WMMA[Dp]
    if recipe.k_granularity != "token" and Dp < (128 if recipe.folded_v else 256):
        # Without a scale per key one more block fits, if Q leaves the registers.
        options = (_Wmma(query_in_registers=False, min_blocks=3), *options)
    return [_wmma_tile(recipe, Dp, option) for option in options]


# --- wgmma --------------------------------------------------------------------------------------------------


def _wgmma_missing(recipe: Recipe, _: Device) -> Iterator[str]:
    yield from _int8_qk_missing(recipe, ("token", "group"))
    if recipe.v_format != "int8":
        yield f"V in {recipe.v_format} (has int8)"
    if recipe.p_levels not in (127, 255):
        yield f"{recipe.p_levels} levels of P (has 255, 127)"


def _wgmma_tiles(recipe: Recipe, Dp: int, _: int) -> list[Tile]:
    # As many warpgroups as registers allow, to fill each other's gaps: four where nothing is masked; two
    # where three would waste rows.
    choices: tuple[int, ...] = (2,) if Dp == 256 else (3,)
    if Dp == 64 and recipe.p_max == "tile" and recipe.k_granularity == "group" and not recipe.folded_v:
        choices = (4, 3, 2)
    return [_wgmma_tile(recipe, Dp, consumers) for consumers in choices]


def _wgmma_tile(recipe: Recipe, Dp: int, consumers: int) -> Tile:
    # The map of attention_wgmma.cu.
    group = recipe.k_granularity == "group"
    stages, rows = {64: 8, 128: 4, 256: 2}[Dp], _WARPGROUP_ROWS * consumers
    aux = (16 if group else 4 * TILE) + (8 * TILE if recipe.folded_v else 0)
    shared = 2 * rows * (Dp + 4) + stages * (2 * TILE * Dp + aux) + 16 * Dp + 4 * (16 * consumers + 32)
    shared += 32 + 8 * (4 * stages + 6)
    macros = {
        "DP": Dp,
        "K_SCALE": K_SCALES[recipe.k_granularity],
        "V_FOLDED": int(recipe.folded_v),
        "P_TILE_MAX": int(recipe.p_max == "tile"),
        "P_LEVELS": recipe.p_levels,
        "CONSUMERS": consumers,
        "STAGES": stages,
    }
    return Tile("wgmma", rows, 128 * (1 + consumers), shared, tuple(macros.items()), persistent=True)


# A row and a tile of keys are taken to last this much longer in a block of two warpgroups than of three.
_TWO_WARPGROUPS = 1.125


@lru_cache(maxsize=1024)
def _wgmma_fastest(tiles: tuple[Tile, ...], problem: Problem, sms: int) -> Tile:
    """Return the tile of the least estimated time, where there is a choice."""
    masked = _hides_keys(problem)
    tiles = tuple(tile for tile in tiles if masked != (tile.rows == 4 * tile.piece)) or tiles
    if len(tiles) == 1:
        return tiles[0]

    def time(tile: Tile) -> float:
        """Rows times tiles of keys that a multiprocessor goes through; of many blocks, some stand for all."""
        blocks = -(-problem.Sq // tile.rows)
        seen = []
        for block in range(0, blocks, max(1, blocks // 64)):
            begin, end = problem.key_range(block * tile.rows, min((block + 1) * tile.rows, problem.Sq))
            seen.append(max(-(-end // TILE) - begin // TILE, 1))
        heads, groups = problem.B * problem.H, -(-problem.Sq // tile.piece)
        size = tile.rows // tile.piece
        full, end = divmod(groups, size)
        if problem.right >= 0:
            rounds = float(-(-heads * blocks // sms))
        else:  # what whole rounds of full items leave is dealt in small ones, which cost more than their rows
            left = heads * full % sms + heads * (end > 0) * (1 + end) / (1 + size)
            rounds = heads * full // sms + max(left / sms, 2 / (1 + size) if left else 0)
        weight = _TWO_WARPGROUPS if tile.rows == 2 * tile.piece else 1.0
        return rounds * tile.rows * weight * sum(seen) / max(len(seen), 1)

    return min(tiles, key=time)


# --- mma ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Mma:
    """Options of attention_mma.cu that change no result."""

    warps: int = 4
    buffers: int = 2  # of K and of V
    beside: int = 4  # blocks of 16 channels of the second product that are worked out beside exponentials
    fence: int = 0  # how closely the compiler is held to the order of the source
    query_in_registers: bool = True
    min_blocks: int = 1
    stash: int = 0  # of 16 parts of a tile's scores, how many wait in shared memory and not in registers


def _mma_options(recipe: Recipe, Dp: int, capability: int) -> list[_Mma]:
    """Options for a padded head dimension, the best first.

    Where registers are short, small things decide whether they suffice, and other things with the compiler's
    other targets; these were found by trying (test_compile_matrix.py).
    """
    channel_scales = recipe.k_granularity == "channel"
    fp8 = recipe.k_format in _FP8
    fence = 8 if capability >= 100 and (fp8 or channel_scales) else 0
    if Dp == 64:
        if fp8 or channel_scales:
            return _with_less_memory(_Mma(fence=fence, min_blocks=2))
        if not recipe.integer_p:
            return _with_less_memory(_Mma(fence=8, min_blocks=3))
        # The logarithms of folded V take the registers of products.
        three = _Mma(beside=4, query_in_registers=False, min_blocks=3)
        if recipe.folded_v:
            three = replace(three, beside=0, fence=8) if capability >= 120 else replace(three, beside=2)
        four = _Mma(beside=0, fence=1 if capability < 90 else 4, query_in_registers=False, min_blocks=4)
        if recipe.folded_v:
            four = replace(four, fence=0)
        token = recipe.k_granularity == "token"
        if recipe.p_max == "running" or capability >= 100 or (recipe.folded_v and (token or capability < 90)):
            return _with_less_memory(three)
        return [four, *_with_less_memory(three)]
    if Dp == 128:
        if fp8:
            stash = 8 if capability // 10 == 10 else 0
            return [_Mma(buffers=1, fence=8, query_in_registers=False, min_blocks=2, stash=stash)]
        fence |= int(channel_scales and capability // 10 == 10)
        two = _Mma(beside=8, fence=fence, min_blocks=2)
        if channel_scales and recipe.folded_v:
            two = replace(two, beside=4, fence=1 if capability < 100 else fence)
        elif recipe.folded_v and recipe.k_granularity != "token" and capability < 100:
            two = replace(two, fence=2)
        one = int(channel_scales and recipe.folded_v and capability < 100)
        return [two, _Mma(buffers=1, fence=one or fence, min_blocks=2)]
    large = _Mma(buffers=1, beside=0, query_in_registers=False, fence=2)
    if fp8:
        return [replace(large, fence=3, stash=4)]
    if not recipe.integer_p:
        return [replace(large, fence=6 if recipe.q_format == "int8" else 2)]
    if channel_scales:
        if recipe.q_format == "int4":
            return [replace(large, fence=11, stash=8)]
        return [replace(large, fence=15, stash=8)]
    if recipe.folded_v:
        if capability >= 100:
            return [replace(large, fence=10, stash=8), replace(large, fence=10, stash=4)]
        return [replace(large, fence=6) if capability < 90 else replace(large, fence=1, stash=2)]
    if recipe.k_granularity == "token" and capability >= 120:
        return [replace(large, stash=8)]
    if capability >= 100:
        return [replace(large, fence=3 if capability // 10 == 10 else 10)]
    return [replace(large, fence=0 if recipe.k_granularity == "group" and capability < 90 else 2)]


def _with_less_memory(option: _Mma) -> list[_Mma]:
    return [option, replace(option, buffers=1)]


_FP8 = ("e4m3", "e5m2")


def _mma_tile(recipe: Recipe, Dp: int, option: _Mma) -> Tile:
    # The map of attention_mma.cu, which checks the sum.
    scales = {"token": 4 * TILE, "channel": 4 * TILE * Dp // CHANNEL_GROUP}.get(recipe.k_granularity, 0)
    scales += 8 * TILE if recipe.folded_v else 0
    shared = option.buffers * TILE * Dp * (recipe.bits["k"] + recipe.bits["v"]) // 8
    shared += 2 * scales + 64
    shared += option.warps * 32 * 16 * option.stash
    if recipe.q_granularity == "channel" and Dp > 64:
        shared += option.warps * 32 * 8 * (Dp // CHANNEL_GROUP)
    if not option.query_in_registers:  # where 4-bit numbers have become bytes
        shared += option.warps * 16 * Dp * max(recipe.bits["q"], 8) // 8
    macros = {
        "INTFA_DP": Dp,
        "INTFA_WARPS": option.warps,
        "INTFA_BUFFERS": option.buffers,
        "INTFA_BESIDE": option.beside,
        "INTFA_FENCE": option.fence,
        "INTFA_QUERY_IN_REGISTERS": int(option.query_in_registers),
        "INTFA_STASH": option.stash,
        "INTFA_MIN_BLOCKS": option.min_blocks,
        "INTFA_SMEM": shared,
        "INTFA_Q_FORMAT": FORMATS[recipe.q_format],
        "INTFA_K_FORMAT": FORMATS[recipe.k_format],
        "INTFA_V_FORMAT": FORMATS[recipe.v_format],
        "INTFA_P_LEVELS": recipe.p_levels,
        "INTFA_P_RUNNING": int(recipe.p_max == "running"),
        "INTFA_K_SCALE": K_SCALES[recipe.k_granularity],
        "INTFA_Q_CHANNEL_SCALE": int(recipe.q_granularity == "channel"),
        "INTFA_V_FOLDED": int(recipe.folded_v),
    }
    return Tile("mma", 16 * option.warps, 32 * option.warps, shared, tuple(macros.items()))


def _mma_missing(recipe: Recipe, device: Device) -> Iterator[str]:
    fp8 = [fmt for fmt in dict.fromkeys((recipe.k_format, recipe.v_format)) if fmt in _FP8]
    if fp8 and device.capability < 89:
        has = f"{device.name} has {device.capability / 10:.1f}"
        yield f"{' and '.join(fp8)} (needs compute capability 8.9; {has})"
    if recipe.q_granularity == "channel" and recipe.k_granularity != "channel":
        yield f"Q's scale per channel group with K's per {recipe.k_granularity} (has both)"
    if not recipe.integer_p and recipe.p_max != "running":
        yield f"{recipe.p_format} P against the tile's maximum (has the running one)"


def _mma_tiles(recipe: Recipe, Dp: int, capability: int) -> list[Tile]:
    return [_mma_tile(recipe, Dp, option) for option in _mma_options(recipe, Dp, capability)]


# --- choosing -----------------------------------------------------------------------------------------------


def _int8_qk_missing(recipe: Recipe, k_granularities: tuple[str, ...]) -> Iterator[str]:
    for which in ("q", "k"):
        if (fmt := getattr(recipe, f"{which}_format")) != "int8":
            yield f"{which.upper()} in {fmt} (has int8)"
    if recipe.q_granularity != "token":
        yield f"Q's scale per {recipe.q_granularity} (has token)"
    if recipe.k_granularity not in k_granularities:
        yield f"K's scale per {recipe.k_granularity} (has {', '.join(k_granularities)})"


@dataclass(frozen=True)
class _Kernel:
    tiles: Callable[[Recipe, int, int], list[Tile]]  # of padded head dimension and compute capability
    missing: Callable[[Recipe, Device], Iterator[str]]
    architectures: tuple[str, ...]  # that it is compiled and tested for


_KERNELS = {
    "wgmma": _Kernel(_wgmma_tiles, _wgmma_missing, ("sm_90a",)),
    "mma": _Kernel(
        _mma_tiles, _mma_missing, ("sm_80", "sm_86", "sm_89", "sm_90", "sm_90a", "sm_100", "sm_120")
    ),
    "wmma": _Kernel(
        _wmma_tiles,
        _wmma_missing,
        ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_90a", "sm_100", "sm_120"),
    ),
}
#: Bytes of shared memory that one block may use, by architecture.
SHARED_MEMORY = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}


def device_problem(name: str, device: Device) -> str | None:
    """Return why a device cannot run a kernel at all, or None."""
    if name not in _KERNELS:
        return "this build has no such kernel"
    if name == "wgmma" and device.capability != 90:
        return f"needs compute capability 9.0 (Hopper); {device.name} has {device.capability / 10:.1f}"
    if name == "mma" and device.capability < 80:
        return f"needs compute capability 8.0 or later; {device.name} has {device.capability / 10:.1f}"
    if device.capability < 75:
        return f"needs compute capability 7.5 or later; {device.name} has {device.capability / 10:.1f}"
    return None


@lru_cache(maxsize=1024)
def _choose(name: str, recipe: Recipe, Dp: int, device: Device) -> tuple[tuple[Tile, ...], str | None]:
    """The tiles that serve, best first, or why none does."""
    reason = device_problem(name, device)
    if reason is not None:
        return (), reason
    missing = list(_KERNELS[name].missing(recipe, device))
    if missing:
        return (), "lacks " + "; ".join(missing)
    tiles = _KERNELS[name].tiles(recipe, Dp, device.capability)
    # Those that let a multiprocessor hold the blocks they were compiled for, else those that fit.
    for needs in (lambda tile: tile.min_blocks, lambda tile: 1):
        fitting = tuple(
            tile
            for tile in tiles
            if needs(tile) * (tile.shared_memory + _RESERVED) <= device.shared_memory + _RESERVED
        )
        if fitting:
            return fitting, None
    least = min(tile.shared_memory for tile in tiles)
    return (
        (),
        f"needs {least:,} bytes of shared memory per block; {device.name} allows {device.shared_memory:,}",
    )


def find(name: str, problem: Problem, device: Device) -> tuple[Tile | None, str | None]:
    """Return the tile that a kernel serves a problem with on a device, or why it does not.

    Parameters
    ----------
    name : str
        Kernel: a key of :data:`DESCRIPTION`.
    problem : Problem
    device : Device

    Returns
    -------
    tile : Tile or None
    reason : str or None
        What is missing, with what there is; None if there is a tile.
    """
    tiles, reason = _choose(name, problem.recipe, padded_head_dim(problem.D), device)
    if not tiles:
        return None, reason
    tile = _wgmma_fastest(tiles, problem, device.sms) if name == "wgmma" else tiles[0]
    blocks = tile.pieces(problem)
    if blocks > _MAX_BLOCKS or max(problem.Sq, problem.Sk) >= 2**30:
        return (
            None,
            f"needs {blocks:,} blocks for Sq = {problem.Sq}, Sk = {problem.Sk}; the limits are 2^31 and 2^30",
        )
    if tile.specializes and not (_hides_keys(problem) or _keeps_masks(name, problem.recipe)):
        tile = replace(tile, masked=False)
    return tile, None


def _hides_keys(problem: Problem) -> bool:
    """Whether some row may not see some key of a tile."""
    return problem.masked or problem.Sk % TILE != 0


def _keeps_masks(name: str, recipe: Recipe) -> bool:
    """Whether a recipe always takes the code with masks: without, the compiler finds too few registers."""
    return name == "wgmma" and recipe.folded_v and recipe.p_max == "running"


def variants(name: str, recipe: Recipe, arch: str) -> list[Tile]:
    """Return every tile of a kernel that an architecture can run for a recipe, of all head dimensions."""
    kernel = _KERNELS[name]
    capability = int(arch.removeprefix("sm_").rstrip("a"))
    limit = SHARED_MEMORY[capability] * 1024
    if arch not in kernel.architectures or any(
        True for _ in kernel.missing(recipe, Device(arch, capability, 1, limit))
    ):
        return []
    return [
        tile
        for Dp in (64, 128, 256)
        for tile in kernel.tiles(recipe, Dp, capability)
        if tile.shared_memory <= limit
    ]
