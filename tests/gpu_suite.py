"""Run the GPU tests and compute-sanitizer on this machine, side by side, and record the run.

    python tests/gpu_suite.py [--record] [--no-sanitizer] [--seeds N] [--logs FOLDER]

Kernels are compiled first, on all cores. Tests drawn by hypothesis run several times with different seeds,
each in a process of its own. ``--record`` writes what ran, on what and with which kernel sources to
``intfa_cupy/data/recorded_gpu_suite.json``, if all of it passed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent
ROOT = TESTS.parent
sys.path[:0] = [str(ROOT), str(TESTS)]

KERNELS = ("wgmma", "mma", "wmma")
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
AGREEMENT = "test_gpu_attention.py::test_kernels_agree_with_the_model"


@dataclass(frozen=True)
class Job:
    """One process."""

    name: str
    command: tuple[str, ...]
    passes: str = ""  # what its output must say besides an exit code of 0


def jobs(sanitizer: bool, seeds: int) -> list[Job]:
    """Return all processes, the longest first."""
    pytest = (
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-m",
        "gpu",
        "--rootdir",
        str(ROOT),
    )
    found = []
    for seed in range(1, seeds + 1):
        option = f"--hypothesis-seed={seed}"
        for kernel in KERNELS:
            found.append(
                Job(f"agreement-{kernel}-{seed}", (*pytest, option, f"{TESTS / AGREEMENT}[{kernel}]"))
            )
        found.append(Job(f"quantizer-{seed}", (*pytest, option, str(TESTS / "test_gpu_quantize.py"))))
    for name in ("attention", "accuracy"):
        test = str(TESTS / f"test_gpu_{name}.py")
        found.append(Job(f"other-{name}", (*pytest, test, "-k", "not agree_with_the_model")))
    exact = (str(TESTS / f"test_{name}.py") for name in ("evaluate", "reproduce"))
    found.append(Job("other-exact", (*pytest, *exact)))
    if sanitizer:
        for kernel in KERNELS:
            for tool in TOOLS:
                command = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable)
                cases = (str(TESTS / "gpu_cases.py"), kernel)
                found.insert(0, Job(f"{tool}-{kernel}", (*command, *cases), r"SUMMARY: 0 (errors|hazards)"))
    return found


def run(job: Job, logs: Path, environment: dict[str, str]) -> tuple[Job, str, str]:
    """Run one process; return its verdict ("clean" of all that passed) and its output."""
    environment = {**environment, "INTFA_GPU_EXAMPLES": str(logs / f"{job.name}.examples")}
    begin = time.monotonic()
    done = subprocess.run(job.command, cwd=ROOT, env=environment, capture_output=True, text=True)
    output = done.stdout + done.stderr
    (logs / f"{job.name}.log").write_text(output)
    passed = done.returncode == 0 and re.search(job.passes, output) is not None
    verdict = "clean" if passed else "errors"
    if not passed and job.name.startswith("racecheck") and only_bulk_copies(output):
        verdict = "bulk copies only"
    last = (output.strip().splitlines() or [""])[-1]
    took = time.monotonic() - begin
    print(
        f"{'FAIL' if verdict == 'errors' else 'ok  '} {job.name:<22} {took:6.1f} s  {last[:90]}", flush=True
    )
    return job, verdict, output


def only_bulk_copies(output: str) -> bool:
    """Whether all of racecheck's hazards are between a bulk copy and what an mbarrier keeps apart from it.

    The tool takes the thread that issues ``cp.async.bulk`` for the writer and does not follow completion, nor
    the consumers' arrivals, through mbarriers; it reports every shared-memory load of what was copied so.
    """
    hazards = re.split(r"Race reported between", output)[1:]
    ends = [re.findall(r"access at intfa::(\w+)", hazard) for hazard in hazards]
    finished = re.search(rf"SUMMARY: {len(hazards)} hazards", output) is not None
    return finished and bool(ends) and all(found.count("bulk_copy") == 1 for found in ends)


# --- compiling ----------------------------------------------------------------------------------------------


def compilations() -> list[tuple[str, dict[str, int]]]:
    """Return the source and macros of every kernel that the tests launch."""
    import gpu_cases
    import test_gpu_accuracy
    import test_gpu_attention
    import test_gpu_quantize

    from intfa_cupy import gpu, recipes, tiles
    from intfa_cupy.packing import padded_head_dim
    from intfa_cupy.problem import Problem
    from intfa_cupy.quantized import TILE

    calls, quantized = (
        {
            (recipe, D, dtype)
            for recipe in module.RECIPES
            for D in module.HEAD_DIMS
            for dtype in test_gpu_quantize.dtypes_of(recipe)
            if dtype != "float64"
        }
        for module in (test_gpu_attention, test_gpu_quantize)
    )
    for name, head_dims in gpu_cases.RECIPES.items():
        calls |= {(recipes()[name], D, t) for D in head_dims for t in ("float16", "float32")}
    calls |= {
        (recipe, D, "float32") for recipe in test_gpu_accuracy.UNPREPARED.values() for D in (64, 128, 256)
    }
    found: dict[Any, tuple[str, dict[str, int]]] = {}

    def add(source: str, defines: dict[str, int]) -> None:
        found[source, tuple(defines.items())] = (source, defines)

    device = gpu.device()
    for recipe, D, dtype in calls:
        for right, pairs, Sq in itertools.product((-1, 0), (False, True), (1, 192)):
            problem = Problem(1, 1, 1, Sq, TILE, D, recipe, right=right)
            # A padded D rules pairs out; a full tile of keys is rare without.
            if pairs != (padded_head_dim(D) == D) and (pairs or right < 0):
                continue
            for kernel in KERNELS:
                tile, _ = tiles.find(kernel, problem, device)
                if tile is not None:
                    add(tile.entry, tile.defines(dtype, pairs))
                    quantized.add((recipe, D, dtype))
    for recipe, D, dtype in quantized:
        for lse_shift in (True, False):
            add("quantize", gpu.quantizer_defines(recipe, D, dtype, lse_shift))
    return list(found.values())


def compile_one(job: tuple[str, dict[str, int], str]) -> int:
    """Compile into the disk cache; return the bytes of registers spilled."""
    from intfa_cupy import jit

    return jit.compile_kernel(*job).report.spill_bytes


def compile_all() -> None:
    from intfa_cupy import jit

    begin, arch = time.monotonic(), jit.device_arch()
    work = [(source, defines, arch) for source, defines in compilations()]
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        spills = pool.map(compile_one, work, chunksize=1)
    print(f"{len(work)} kernels compiled in {time.monotonic() - begin:.0f} s", flush=True)
    for (source, defines, _), spilled in zip(work, spills, strict=True):
        if spilled:
            print(f"{source} spills {spilled} bytes: {' '.join(f'{k}={v}' for k, v in defines.items())}")


# --- the record ---------------------------------------------------------------------------------------------


def outcome(results: list[tuple[Job, str, str]], logs: Path) -> dict[str, Any]:
    """Return what ran, as counts."""
    tests: Counter[str] = Counter()
    for job, _, output in results:
        if "pytest" in job.command:
            for count, what in re.findall(r"(\d+) (passed|failed|skipped|error)", output.splitlines()[-1]):
                tests[what] += int(count)
    examples: Counter[str] = Counter()
    for path in logs.glob("*.examples"):
        examples.update(json.loads(path.read_text()))
    tools = {job.name: verdict for job, verdict, _ in results if job.name.split("-")[0] in TOOLS}
    return {
        "tests": dict(tests),
        "examples": dict(sorted(examples.items())),
        "sanitizer": dict(sorted(tools.items())),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--record", action="store_true", help="write the run into the package's data")
    parser.add_argument("--no-sanitizer", action="store_true", help="leave compute-sanitizer out")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each hypothesis test (default 3)")
    parser.add_argument("--logs", type=Path, help="where to keep each process's output")
    options = parser.parse_args()
    sanitizer = not options.no_sanitizer
    if sanitizer and shutil.which("compute-sanitizer") is None:
        parser.error("compute-sanitizer is not on PATH (it comes with the CUDA toolkit); or --no-sanitizer")

    from intfa_cupy import records

    os.environ["INTFA_LINEINFO"] = "1"  # compute-sanitizer then names functions and lines
    compile_all()
    paths = os.pathsep.join(filter(None, (str(ROOT), str(TESTS), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        logs = options.logs or Path(folder)
        logs.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            results = list(pool.map(lambda job: run(job, logs, environment), jobs(sanitizer, options.seeds)))
        document = {"machine": records.machine(), **outcome(results, logs)}
    print(json.dumps(document, indent=1))
    if any(verdict == "errors" for _, verdict, _ in results):
        return 1
    if options.record:
        print(f"recorded in {records.save('gpu_suite', document)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
