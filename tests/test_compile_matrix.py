"""Every kernel compiles for every architecture without a GPU, and keeps all registers.

Prints the report as a table (``pytest -s tests/test_compile_matrix.py``). The compiler's results are kept in
the kernel cache, so that a second run takes seconds.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

import intfa_cupy as intfa
from intfa_cupy import gpu, jit, tiles
from intfa_cupy.kernel_source import strip_comments
from intfa_cupy.problem import Problem

try:
    jit.nvrtc()
except jit.CompilerNotFoundError as error:
    pytest.skip(f"no NVRTC: {error}", allow_module_level=True)

ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_90a", "sm_100", "sm_120")
# The recipes that take different paths through a kernel. Of mma, which is short of registers, all of them are
# compiled everywhere; of the others, the last two on every other architecture only.
RECIPES = ("int8", "int8-fast", "paper-int8", "half-int8", "int8-tokens")
ALL_RECIPES_ON = ("sm_75", "sm_80", "sm_90a", "sm_120")
# Formats that only the mma kernel has.
FORMATS = ("int4", "k4", "fp16", "fp8-e4m3")
# Of those that wgmma takes the code with masks for in any case, the one with the most values to keep.
ALWAYS_MASKED = ("int8-running",)
R = intfa.recipes()
R["int8-tokens"] = R["int8"].replace(k_granularity="token")
R["int8-running"] = R["int8-tokens"].replace(p_max="running")
# Where the variants for unmasked problems and plain outputs are compiled too.
UNMASKED_ON = ("sm_80", "sm_90a")


@dataclass(frozen=True)
class Job:
    """One compilation."""

    source: str
    arch: str
    label: str
    defines: tuple[tuple[str, int], ...]


def chosen(kernel: str, name: str, arch: str, Sk: int) -> list[tiles.Tile]:
    """The tiles that `find` takes on an architecture, for all padded head dimensions, few queries or many."""
    capability = int(arch.removeprefix("sm_").rstrip("a"))
    if kernel == "wgmma" and arch != "sm_90a":
        return []
    device = tiles.Device(arch, capability, 1, tiles.SHARED_MEMORY[capability] * 1024)
    right = -1 if Sk == tiles.TILE else 0  # with a mask, the queries decide between two and three warpgroups
    problems = [
        Problem(1, 1, 1, Sq, Sk, Dp, R[name], right=right) for Dp in (64, 128, 256) for Sq in (128, 192)
    ]
    found = [tile for p in problems if (tile := tiles.find(kernel, p, device)[0]) is not None]
    return list(dict.fromkeys(found))


def attention_jobs(kernel: str) -> Iterator[Job]:
    for arch in ARCHITECTURES:
        names = RECIPES + FORMATS if kernel == "mma" or arch in ALL_RECIPES_ON else RECIPES[:2]
        for name in names + ALWAYS_MASKED if kernel == "wgmma" else names:
            found = chosen(kernel, name, arch, 1)
            if arch in UNMASKED_ON:
                found += [tile for tile in chosen(kernel, name, arch, tiles.TILE) if not tile.masked]
            for tile in found:
                # wgmma has few registers left: how it stores may decide.
                for pairs in (False, True) if kernel == "wgmma" else (not tile.masked,):
                    defines = tile.defines("float16", pairs=pairs)
                    Dp = defines.get("INTFA_DP", defines.get("DP"))
                    label = f"{name} d={Dp} {tile.rows} rows {tile.shared_memory:,} B"
                    label += " unmasked" * (not tile.masked) + " pairs" * pairs
                    yield Job(tile.entry, arch, label, tuple(defines.items()))


def quantizer_jobs() -> Iterator[Job]:
    cases = [("int8", 64, "float16"), ("int8", 128, "float16"), ("int8-fast", 256, "bfloat16")]
    cases += [("half-int8-plus", 81, "float32")]
    others = [("int4", 80, "float16"), ("fp16", 256, "float32"), ("fp8-e4m3", 64, "bfloat16")]
    for arch in ARCHITECTURES:
        for name, D, dtype in cases + (others if arch in ALL_RECIPES_ON else []):
            defines = gpu.quantizer_defines(R[name], D, dtype)
            yield Job("quantize", arch, f"{name} d={D} {dtype}", tuple(defines.items()))
        lean = gpu.quantizer_defines(R["int8"], 64, "float16", lse_shift=False)
        yield Job("quantize", arch, "int8 d=64 float16 without lse", tuple(lean.items()))


def compile_all(jobs: Iterable[Job]) -> list[tuple[Job, jit.CompileReport]]:
    """Compile on two threads: NVRTC runs outside the interpreter's lock."""
    jobs = list(jobs)
    with ThreadPoolExecutor(2) as pool:
        compiled = pool.map(lambda job: jit.compile_kernel(job.source, dict(job.defines), job.arch), jobs)
        return [(job, one.report) for job, one in zip(jobs, compiled, strict=True)]


def table(reports: list[tuple[Job, jit.CompileReport]]) -> str:
    """Registers and spills by kernel and tile, one column per architecture."""
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for job, report in reports:
        registers = "/".join(str(e.registers) for e in report.entries)
        spills = f"!{report.spill_bytes}" if report.spill_bytes else ""
        cells.setdefault((job.source, job.label), {})[job.arch] = registers + spills
    lines = [f"{'registers (! spilled bytes)':<62}" + "".join(f"{a:>12}" for a in ARCHITECTURES)]
    for (source, label), row in cells.items():
        lines.append(f"{source + ' ' + label:<62}" + "".join(f"{row.get(a, '-'):>12}" for a in ARCHITECTURES))
    return "\n".join(lines)


@pytest.mark.slow
@pytest.mark.parametrize("source", ["quantize", *tiles.DESCRIPTION])
def test_compiles_for_every_architecture_without_spills(source: str) -> None:
    """Every tile; what the compiler had to undo (wgmma in parallel, register reallocation) counts, too."""
    reports = compile_all(quantizer_jobs() if source == "quantize" else attention_jobs(source))
    assert reports
    print("\n" + table(reports))
    bad = []
    for job, report in reports:
        faults = [*report.serialized, *report.setmaxnreg_ignored]
        if report.spill_bytes:
            faults.append(f"{report.spill_bytes} bytes of registers spilled to memory")
        if job.source == "attention_wgmma":
            # Warpgroups exchange the registers that the block starts with, and would wait for ever for more.
            start = 65536 // (128 * (1 + dict(job.defines)["CONSUMERS"])) // 8 * 8
            found = [e.registers for e in report.entries]
            faults += [f"starts with {n} registers, not {start}" for n in found if n != start]
        bad += [f"{job.source} {job.arch} {job.label}: {fault}" for fault in faults]
    assert not bad, "\n".join(bad)


def test_every_architecture_has_a_kernel_for_every_recipe_and_head_dimension() -> None:
    """The portable kernel serves what it claims to everywhere; fp16 V of d = 256 lacks memory on Turing."""
    for arch in ARCHITECTURES:
        for name in RECIPES:
            served = {t.defines("float16")["INTFA_DP"] for t in tiles.variants("wmma", R[name], arch)}
            lacking = {256} if arch == "sm_75" and name == "half-int8" else set()
            assert served == {64, 128, 256} - lacking, (arch, name)


@pytest.mark.parametrize(
    ("N", "right", "rows"),
    [
        *((0, -1, 256), (1, -1, 128), (128, -1, 256), (192, -1, 192)),
        *((1024, -1, 256), (2048, -1, 256), (16384, -1, 256)),
        *((1024, 0, 128), (4096, 0, 192), (16384, 0, 192)),
    ],
)
def test_hopper_takes_the_block_that_wastes_few_rows(N: int, right: int, rows: int) -> None:
    """At d = 64, four warpgroups are for what is not masked; of three and two, the estimate chooses."""
    device = tiles.Device("H200", 90, 132, 227 * 1024)
    for name, expected in (("int8-fast", rows), ("int8", 192), ("paper-int8", 192)):
        problem = Problem(max(1, 16384 // max(N, 1)), 32, 32, N, N, 64, R[name], right=right)
        tile, reason = tiles.find("wgmma", problem, device)
        assert reason is None and tile is not None and tile.rows == expected, (name, tile)


@pytest.mark.parametrize(
    ("struct", "mirror"),
    [("AttentionParams", gpu.ATTENTION_PARAMS), ("QuantizeParams", gpu.QUANTIZE_PARAMS)],
)
def test_structs_are_those_of_the_kernels(struct: str, mirror: np.dtype, tmp_path: Path) -> None:
    """Order, sizes and the sum of sizes of the fields in NumPy equal those of the compiler.

    NVRTC has no offsetof; without padding, which the sum rules out, order and sizes give the offsets.
    """
    text = strip_comments((jit.source_dir() / "params.cuh").read_text())
    body = re.search(rf"struct {struct} {{(.*?)}};", text, re.DOTALL)
    assert body is not None
    assert re.findall(r"(\w+);", body[1]) == list(mirror.names or ())
    shutil.copy(jit.source_dir() / "params.cuh", tmp_path)
    checks = [f"static_assert(sizeof(intfa::{struct}) == {mirror.itemsize});"]
    for name in mirror.names or ():
        field = mirror.fields[name][0]  # type: ignore[index]
        checks.append(f"static_assert(sizeof(intfa::{struct}::{name}) == {field.itemsize});")
    source = '#include "params.cuh"\n' + "\n".join(checks) + '\nextern "C" __global__ void nothing() {}\n'
    (tmp_path / "layout.cu").write_text(source)
    jit.compile_kernel("layout", arch="sm_80", root=tmp_path)
    wrong = source.replace(f"== {mirror.itemsize})", f"== {mirror.itemsize + 8})", 1)
    (tmp_path / "layout.cu").write_text(wrong)
    with pytest.raises(jit.CompileError, match="static assertion"):
        jit.compile_kernel("layout", arch="sm_80", root=tmp_path)


def test_shared_memory_of_wmma_tiles_is_what_the_kernel_lays_out() -> None:
    """A wrong number in the table is refused by the compiler, not found out by the device."""
    tile = tiles.variants("wmma", R["int8"], "sm_80")[0]
    defines = tile.defines("float16")
    with pytest.raises(jit.CompileError, match="disagree on shared memory"):
        jit.compile_kernel(tile.entry, {**defines, "INTFA_SMEM": tile.shared_memory + 16}, "sm_80")
