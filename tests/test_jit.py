"""Source inlining, NVRTC, disk cache, compile report and probe. No GPU needed but for the last test."""

from __future__ import annotations

import concurrent.futures
import json
import os
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any, ClassVar

import pytest

from intfa_cupy import cuda_env, jit, kernel_source, probe, ptxas

REPO = Path(__file__).resolve().parents[1]

try:
    NVRTC_VERSION: tuple[int, int] | None = cuda_env.nvrtc()[1]
    WHY_NOT = ""
except ImportError as error:
    NVRTC_VERSION, WHY_NOT = None, str(error)

needs_nvrtc = pytest.mark.skipif(NVRTC_VERSION is None, reason=f"no NVRTC: {WHY_NOT}")

SCALE = """\
#pragma once
#ifndef FACTOR
#define FACTOR 2
#endif
// a comment
__device__ int scale(int x) { return FACTOR * x; }
"""
KERNEL = """\
#include "scale.cuh"
#include "sub/other.cuh"
extern "C" __global__ void kernel(int *p) { p[threadIdx.x] = scale(p[threadIdx.x]) + other(1); }
"""
OTHER = """\
#pragma once
#include "../scale.cuh"
__device__ int other(int x) { return scale(x) + 1; }
"""
WMMA = """\
#include <cuda_fp16.h>
#include <mma.h>
using namespace nvcuda;
extern "C" __global__ void tile(const signed char *a, const signed char *b, int *c) {
  __shared__ int s[256];
  wmma::fragment<wmma::matrix_a, 16, 16, 16, signed char, wmma::row_major> fa;
  wmma::fragment<wmma::matrix_b, 16, 16, 16, signed char, wmma::col_major> fb;
  wmma::fragment<wmma::accumulator, 16, 16, 16, int> fc;
  wmma::fill_fragment(fc, 0);
  wmma::load_matrix_sync(fa, a, 16);
  wmma::load_matrix_sync(fb, b, 16);
  wmma::mma_sync(fc, fa, fb, fc);
  wmma::store_matrix_sync(s, fc, 16, wmma::mem_row_major);
  __syncthreads();
  c[threadIdx.x] = s[threadIdx.x];
}
"""
# 64 live floats, of which -maxrregcount=32 must spill some.
SPILL = """\
extern "C" __global__ void spill(float *p, int n) {
  float x[64];
  #pragma unroll
  for (int i = 0; i < 64; i++) x[i] = p[i * 32 + threadIdx.x];
  for (int j = 0; j < n; j++) {
    #pragma unroll
    for (int i = 0; i < 64; i++) x[i] = x[i] * x[(i + 7) % 64] + p[j];
  }
  #pragma unroll
  for (int i = 0; i < 64; i++) p[i * 32 + threadIdx.x] = x[i];
}
"""
# With TOUCH an accumulator is written between issue and wait, which ptxas can only serialise.
WGMMA = """\
typedef unsigned long long u64;
extern "C" __global__ void __launch_bounds__(128) wg(int *out, u64 a, u64 b, int n) {
  int d[4] = {0, 0, 0, 0};
  for (int i = 0; i < n; i++) {
    asm volatile("wgmma.fence.sync.aligned;");
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n8k32.s32.s8.s8 {%0,%1,%2,%3}, %4, %5, 1;"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3]) : "l"(a), "l"(b));
    asm volatile("wgmma.commit_group.sync.aligned;");
#ifdef TOUCH
    d[0] += n * i;
#endif
    asm volatile("wgmma.wait_group.sync.aligned 0;");
  }
  for (int i = 0; i < 4; i++) out[threadIdx.x * 4 + i] = d[i];
}
"""


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of small sources, and an empty cache."""
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "cache"))
    for name in ("INTFA_NO_CACHE", "INTFA_DUMP", "INTFA_CUDA_INCLUDE"):
        monkeypatch.delenv(name, raising=False)
    src = tmp_path / "src"
    (src / "sub").mkdir(parents=True)
    (src / "kernel.cu").write_text(KERNEL)
    (src / "scale.cuh").write_text(SCALE)
    (src / "sub/other.cuh").write_text(OTHER)
    (src / "wmma.cu").write_text(WMMA)
    (src / "spill.cu").write_text(SPILL)
    (src / "wgmma.cu").write_text(WGMMA)
    return src


@pytest.fixture
def compiles(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the sources that really went through the compiler."""
    names: list[str] = []
    original = jit._run_nvrtc

    def counting(module: Any, version: Any, name: str, *rest: Any) -> tuple[bytes, str]:
        names.append(name)
        return original(module, version, name, *rest)

    monkeypatch.setattr(jit, "_run_nvrtc", counting)
    return names


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


# --- sources ----------------------------------------------------------------------------------------------


def test_inlining_includes_each_header_once(root: Path) -> None:
    text = jit.inline_source("kernel", root)
    assert text.count("int scale(int x)") == 1
    assert text.count("int other(int x)") == 1
    assert "#pragma once" not in text
    assert '"scale.cuh"' in text and str(root) not in text  # relative names: the key must not know the path


def test_system_headers_are_left_to_the_compiler(root: Path) -> None:
    assert "#include <mma.h>" in jit.inline_source("wmma", root)


def test_includes_in_comments_are_not_followed(root: Path) -> None:
    edit(root / "kernel.cu", KERNEL[:1], '/*\n#include "nowhere.cuh"\n*/\n// #include "nowhere.cuh"\n#')
    assert "scale(int x)" in jit.inline_source("kernel", root)


def test_missing_header_names_the_including_line(root: Path) -> None:
    (root / "sub/other.cuh").write_text('\n\n#include "gone.cuh"\n')
    with pytest.raises(jit.SourceError, match=r'sub/other\.cuh:3: "gone\.cuh"'):
        jit.inline_source("kernel", root)


def test_mutual_includes_end(root: Path) -> None:
    (root / "scale.cuh").write_text('#pragma once\n#include "sub/other.cuh"\n' + SCALE)
    assert jit.inline_source("kernel", root).count("int other(int x)") == 1


@needs_nvrtc
def test_header_first_included_under_a_condition(root: Path) -> None:
    (root / "kernel.cu").write_text(f'#ifdef NEVER\n#include "scale.cuh"\n#endif\n{KERNEL}')
    assert jit.compile_kernel("kernel", {}, "sm_80", root=root).report["kernel"]
    assert jit.compile_kernel("kernel", {"NEVER": None}, "sm_80", root=root).report["kernel"]


@needs_nvrtc
@pytest.mark.parametrize(
    ("file", "line"),
    [("scale.cuh", 6), ("sub/other.cuh", 3), ("kernel.cu", 3)],
    ids=["header", "nested", "main"],
)
def test_compiler_errors_name_file_and_line(root: Path, file: str, line: int) -> None:
    lines = (root / file).read_text().split("\n")
    lines[line - 1] = lines[line - 1].replace("{", "{ planted_error;", 1)
    (root / file).write_text("\n".join(lines))
    with pytest.raises(jit.CompileError) as caught:
        jit.compile_kernel("kernel", {}, "sm_80", root=root)
    assert f'{file}({line}): error: identifier "planted_error"' in caught.value.log
    assert "planted_error" in str(caught.value)


def test_fingerprint_ignores_comments_and_layout_only(root: Path) -> None:
    before = jit.strip_comments_fingerprint(root)
    edit(root / "scale.cuh", "// a comment\n", "/* quite\n another */\n\n")
    edit(root / "scale.cuh", "return FACTOR * x;", "return  FACTOR * x ;  // twice\n")
    assert jit.strip_comments_fingerprint(root) == before
    edit(root / "scale.cuh", "FACTOR 2", "FACTOR 3")
    after = jit.strip_comments_fingerprint(root)
    assert after != before
    edit(root / "wgmma.cu", "wgmma.fence", "// wgmma.fence")  # inside a string it is no comment
    assert jit.strip_comments_fingerprint(root) != after


def test_strip_comments_keeps_strings_and_lines() -> None:
    text = "a(\"x // y\"); // gone\nb /* gone\n gone */ c\nint n = 1'000; // it's\nchar q = '\"'; // gone\n"
    assert kernel_source.strip_comments(text).split("\n") == [
        'a("x // y");  ',
        "b  ",
        " c",
        "int n = 1'000;  ",
        "char q = '\"';  ",
        "",
    ]


# --- compiling --------------------------------------------------------------------------------------------


@needs_nvrtc
@pytest.mark.parametrize("arch", ["75", "80", "86", "89", "90", "90a", "100", "120"])
def test_wmma_int8_compiles_for_every_architecture(root: Path, arch: str) -> None:
    module, version = cuda_env.nvrtc()
    if int(arch.rstrip("a")) not in module.getSupportedArchs():
        pytest.skip(f"NVRTC {version} does not know sm_{arch}")
    if cuda_env.find_header("crt/mma.h", cuda_env.header_dirs(version)) is None:
        pytest.skip(f"no crt/mma.h: {cuda_env.pip_command('crt/mma.h', *version)}")
    compiled = jit.compile_kernel("wmma", {}, arch, root=root)
    assert compiled.arch == f"sm_{arch}"
    assert compiled.cubin.startswith(b"\x7fELF")
    entry = compiled.report["tile"]
    assert entry.static_smem >= 1024 and entry.registers > 8 and entry.barriers == 1
    assert compiled.report.problems == ()


@needs_nvrtc
def test_report_of_a_kernel_that_spills(root: Path) -> None:
    free = jit.compile_kernel("spill", {}, "sm_80", root=root).report
    tight = jit.compile_kernel("spill", {}, "sm_80", extra_options=("-maxrregcount=32",), root=root).report
    assert free["spill"].registers > 64 and free.spill_bytes == 0 and free.problems == ()
    entry = tight["spill"]
    assert entry.registers == 32
    assert min(entry.spill_stores, entry.spill_loads, entry.stack_frame) > 0
    assert tight.spill_bytes == entry.spill_stores + entry.spill_loads
    assert "spill" in tight.problems[0] and "SPILLS" in str(tight)


@needs_nvrtc
def test_report_of_serialised_wgmma(root: Path) -> None:
    good = jit.compile_kernel("wgmma", {}, "sm_90a", root=root).report
    assert good.problems == ()
    bad = jit.compile_kernel("wgmma", {"TOUCH": None}, "sm_90a", root=root).report
    assert bad.serialized and bad.serialized[0].startswith("(C75")
    assert set(bad.serialized) <= set(bad.problems)


NVCC_LOG = """\
ptxas info    : (C7508) Potential Performance Loss: 'setmaxnreg' ignored; unable to determine register count
ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to x
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'a' for 'sm_90a'
ptxas info    : Function properties for a
    16 bytes stack frame, 20 bytes spill stores, 24 bytes spill loads
ptxas info    : Used 168 registers, used 3 barriers, 2048+64 bytes smem, 4 bytes cmem[2]
ptxas info    : Function properties for _Z6helperi
    8 bytes stack frame, 4 bytes spill stores, 0 bytes spill loads
ptxas info    : Compiling entry function 'b' for 'sm_90a'
ptxas info    : Function properties for b
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, 400 bytes cmem[0]
"""


@pytest.mark.parametrize("style", ["nvcc", "nvrtc"])
def test_parsing_both_ptxas_styles(style: str) -> None:
    log = NVCC_LOG if style == "nvcc" else NVCC_LOG.replace("\n    ", "\nptxas         .     ")
    report = ptxas.parse_log(log)
    assert report.entries == (
        ptxas.FunctionReport("a", True, 168, 20, 24, 16, 2112, 3),
        ptxas.FunctionReport("b", True, 32),
    )
    assert report.functions == (ptxas.FunctionReport("_Z6helperi", False, 0, 4, 0, 8),)
    assert report.spill_bytes == 48
    assert len(report.serialized) == 1 and len(report.setmaxnreg_ignored) == 1 and len(report.problems) == 4
    assert report.raw == log


@needs_nvrtc
def test_unknown_architecture_and_bad_arguments(root: Path) -> None:
    with pytest.raises(jit.CompileError, match="knows"):
        jit.compile_kernel("kernel", {}, "sm_99", root=root)
    with pytest.raises(ValueError, match="arch"):
        jit.compile_kernel("kernel", {}, "hopper", root=root)
    with pytest.raises(ValueError, match="macro"):
        jit.compile_kernel("kernel", {"A B": 1}, "sm_80", root=root)
    with pytest.raises(jit.SourceError, match=r"nothing\.cu"):
        jit.compile_kernel("nothing", {}, "sm_80", root=root)


@needs_nvrtc
def test_missing_cuda_header_says_what_to_install(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert NVRTC_VERSION is not None
    monkeypatch.setenv("INTFA_CUDA_INCLUDE", str(tmp_path))
    with pytest.raises(jit.HeaderNotFoundError, match=r'cuda_fp16\.h(.|\n)*pip install "nvidia-cuda-runtime'):
        jit.compile_kernel("wmma", {}, "sm_80", root=root)
    edit(root / "wmma.cu", "#include <mma.h>", "#include <crt/mma.h>")
    edit(root / "wmma.cu", "#include <cuda_fp16.h>\n", "")
    package = "nvidia-cuda-crt" if NVRTC_VERSION[0] >= 13 else "nvidia-cuda-nvcc-cu12"
    with pytest.raises(jit.HeaderNotFoundError) as caught:
        jit.compile_kernel("wmma", {}, "sm_80", root=root)
    assert f'pip install "{package}==' in str(caught.value) and str(tmp_path) in str(caught.value)


def test_headers_of_another_cuda_version_are_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    include = tmp_path / "include"
    include.mkdir()
    (include / "cuda_fp16.h").touch()
    (include / "cuda.h").write_text("#define CUDA_VERSION 11080\n")
    monkeypatch.setenv("CUDA_PATH", str(tmp_path))
    monkeypatch.delenv("INTFA_CUDA_INCLUDE", raising=False)
    assert include not in [d.path for d in cuda_env.header_dirs((12, 4))]
    assert "CUDA 11.8: other CUDA version" in str(cuda_env.missing_header_error("mma.h", (12, 4)))
    (include / "cuda.h").write_text("#define CUDA_VERSION 12040\n")
    cuda_env._all_header_dirs.cache_clear()
    assert cuda_env.header_dirs((12, 4))[0].path == include


@needs_nvrtc
def test_missing_nvrtc_says_what_to_install(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        @staticmethod
        def getVersion() -> tuple[int, int]:
            raise RuntimeError("libnvrtc.so: cannot open shared object file")

    monkeypatch.setattr("cupy.cuda.nvrtc", Broken)
    with pytest.raises(jit.CompilerNotFoundError, match=r"libnvrtc(.|\n)*pip install .nvidia-cuda-nvrtc"):
        jit.compile_kernel("kernel", {}, "sm_80", root=root)
    found = probe.probe()
    assert found.nvrtc is None and "pip install" in found.reasons["nvrtc"]


@needs_nvrtc
def test_nvrtc_of_a_wheel_is_loaded_for_a_cupy_that_does_not_look_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = tmp_path / "cuda_nvrtc/lib/libnvrtc.so.12"
    library.parent.mkdir(parents=True)
    library.touch()
    loaded: list[str] = []

    class Old:
        @staticmethod
        def getVersion() -> tuple[int, int]:
            if not loaded:
                raise RuntimeError("CuPy failed to load libnvrtc.so.12")
            return 12, 6

    monkeypatch.setattr("cupy.cuda.nvrtc", Old)
    monkeypatch.setattr(cuda_env, "cupy_cuda_major", lambda: 12)
    monkeypatch.setattr(cuda_env, "_package_paths", lambda name: [tmp_path])
    monkeypatch.setattr("ctypes.CDLL", lambda path, mode: loaded.append(path))
    assert cuda_env.nvrtc()[1] == (12, 6) and loaded == [str(library)]


@needs_nvrtc
def test_dump(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTFA_DUMP", str(tmp_path / "dump"))
    compiled = jit.compile_kernel("kernel", {"FACTOR": 5}, "sm_80", root=root)
    files = {p.suffix: p for p in (tmp_path / "dump").iterdir()}
    assert set(files) == {".cu", ".txt", ".cubin"}
    assert files[".cu"].read_text() == jit.inline_source("kernel", root)
    assert files[".cubin"].read_bytes() == compiled.cubin
    assert "-DFACTOR=5" in files[".txt"].read_text() and "registers" in files[".txt"].read_text()
    (root / "kernel.cu").write_text("int x = planted_error;\n")
    with pytest.raises(jit.CompileError):
        jit.compile_kernel("kernel", {}, "sm_80", root=root)
    assert any("planted_error" in p.read_text() for p in (tmp_path / "dump").glob("*.txt"))


# --- cache ------------------------------------------------------------------------------------------------


@needs_nvrtc
def test_key_follows_everything_that_matters(root: Path, compiles: list[str]) -> None:
    def key(defines: dict[str, object], arch: str = "sm_80", *extra: str) -> str:
        return jit.compile_kernel("kernel", defines, arch, extra_options=extra, root=root).key

    base = key({"A": 1, "B": True})
    assert key({"B": 1, "A": 1}) == base  # the order of the defines and the spelling of true do not matter
    keys = {
        base,
        key({"A": 2, "B": 1}),
        key({"A": 1, "B": 1}, "sm_86"),
        key({"A": 1, "B": 1}, "sm_80", "-ftz=true"),
    }
    edit(root / "scale.cuh", "FACTOR * x", "FACTOR * x + 1")
    keys.add(key({"A": 1, "B": 1}))
    assert len(keys) == 5 and len(compiles) == 5
    binaries = {p.read_bytes() for p in jit.cache_dir().glob("*.cubin")}
    assert len(binaries) > 2  # the header's edit and the architecture reached the code


@needs_nvrtc
def test_cuda_headers_are_part_of_the_key(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiles: list[str]
) -> None:
    (root / "kernel.cu").write_text(
        '#include <fake.h>\nextern "C" __global__ void k(int *p) { *p = FAKE; }\n'
    )
    for value in (1, 2):
        include = tmp_path / f"include{value}"
        include.mkdir()
        (include / "fake.h").write_text(f"#define FAKE {value}\n")
        monkeypatch.setenv("INTFA_CUDA_INCLUDE", str(include))
        jit.compile_kernel("kernel", {}, "sm_80", root=root)
    assert len(compiles) == 2


@needs_nvrtc
def test_cache_hit_does_not_compile_and_is_fast(root: Path, compiles: list[str]) -> None:
    first = jit.compile_kernel("wmma", {}, "sm_80", root=root)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        second = jit.compile_kernel("wmma", {}, "sm_80", root=root)
        times.append(time.perf_counter() - start)
    assert compiles == ["wmma.cu"]
    assert second.cached and not first.cached
    # NVRTC has a cache of its own, which gives cubins without a report.
    assert ("--no-cache" in first.options) == (jit.nvrtc()[1] >= (12, 9))
    assert (second.cubin, second.report, second.key, second.path) == (
        first.cubin,
        first.report,
        first.key,
        first.path,
    )
    assert second.path is not None and second.path.read_bytes() == first.cubin
    assert min(times) < 0.1


@needs_nvrtc
def test_no_cache(root: Path, monkeypatch: pytest.MonkeyPatch, compiles: list[str]) -> None:
    monkeypatch.setenv("INTFA_NO_CACHE", "1")
    for _ in range(2):
        assert jit.compile_kernel("kernel", {}, "sm_80", root=root).path is None
    assert len(compiles) == 2 and not jit.cache_dir().exists()


def _damage_truncated(cubin: Path, meta: Path) -> None:
    cubin.write_bytes(cubin.read_bytes()[:100])


def _damage_flipped(cubin: Path, meta: Path) -> None:
    data = bytearray(cubin.read_bytes())
    data[len(data) // 2] ^= 1
    cubin.write_bytes(bytes(data))


def _damage_gone(cubin: Path, meta: Path) -> None:
    cubin.unlink()


def _damage_json(cubin: Path, meta: Path) -> None:
    meta.write_bytes(meta.read_bytes()[:50])


def _damage_json_type(cubin: Path, meta: Path) -> None:
    meta.write_text("[1]")


def _damage_json_binary(cubin: Path, meta: Path) -> None:
    meta.write_bytes(b"\xff\x00\xfe")


def _damage_log(cubin: Path, meta: Path) -> None:
    entry = json.loads(meta.read_text())
    entry["log"] = entry["log"].replace("registers", "registerz")
    meta.write_text(json.dumps(entry))


@needs_nvrtc
@pytest.mark.parametrize(
    "damage",
    [
        _damage_truncated,
        _damage_flipped,
        _damage_gone,
        _damage_json,
        _damage_json_type,
        _damage_json_binary,
        _damage_log,
    ],
)
def test_damaged_cache_entries_are_compiled_again(root: Path, compiles: list[str], damage: Any) -> None:
    first = jit.compile_kernel("kernel", {}, "sm_80", root=root)
    assert first.path is not None
    damage(first.path, jit.cache_dir() / f"{first.key}.json")
    second = jit.compile_kernel("kernel", {}, "sm_80", root=root)
    assert not second.cached and second.cubin == first.cubin and second.report == first.report
    third = jit.compile_kernel("kernel", {}, "sm_80", root=root)
    assert third.cached and len(compiles) == 2


@needs_nvrtc
@pytest.mark.parametrize("kind", ["read-only", "file in the way"])
def test_unwritable_cache(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    blocked = tmp_path / "blocked"
    if kind == "read-only":
        blocked.mkdir(mode=0o500)
        if os.access(blocked, os.W_OK):  # root may write anywhere
            monkeypatch.setattr(Path, "mkdir", _deny)
    else:
        blocked.write_text("")
    monkeypatch.setenv("CUPY_CACHE_DIR", str(blocked))
    compiled = jit.compile_kernel("kernel", {}, "sm_80", root=root)
    assert compiled.path is None
    monkeypatch.undo()
    assert jit._cubin_path(compiled).read_bytes() == compiled.cubin  # still loadable


def _deny(*args: Any, **kwargs: Any) -> None:
    raise PermissionError("read-only file system")


@needs_nvrtc
def test_full_disk_leaves_no_rubbish(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        assert jit.compile_kernel("kernel", {}, "sm_80", root=root).path is None
    assert list(jit.cache_dir().iterdir()) == []


WORKER = """\
import sys
from pathlib import Path
from intfa_cupy import jit
sys.stdin.readline()  # all start together
for k in range(3):
    compiled = jit.compile_kernel("kernel", {"FACTOR": k}, "sm_80", root=Path(sys.argv[1]))
    assert compiled.path.read_bytes() == compiled.cubin
    print(compiled.key, compiled.report["kernel"].registers)
"""


@needs_nvrtc
def test_many_processes_compile_the_same_kernel(root: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(REPO)}
    command = [sys.executable, "-c", WORKER, str(root)]
    pipe = subprocess.PIPE
    workers = [
        subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=env) for _ in range(6)
    ]
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write("\n")
        worker.stdin.flush()
    outputs = [worker.communicate(timeout=120) for worker in workers]
    assert [w.returncode for w in workers] == [0] * len(workers), outputs[0][1]
    assert len({out for out, _ in outputs}) == 1
    names = [p.name for p in jit.cache_dir().iterdir()]
    assert not [n for n in names if n.startswith(".")]  # no temporary file is left
    assert len([n for n in names if n.endswith(".json")]) == 3
    assert all(jit.compile_kernel("kernel", {"FACTOR": k}, "sm_80", root=root).cached for k in range(3))


# --- devices, with a stand-in for the driver --------------------------------------------------------------


class FakeKernel:
    def __init__(self, name: str) -> None:
        self.name = name
        self.shared_size_bytes = 1024
        self.max_dynamic_shared_size_bytes = 0


class FakeModule:
    made: ClassVar[list[str]] = []

    def __init__(self, *, path: str) -> None:
        assert Path(path).read_bytes().startswith(b"\x7fELF")
        FakeModule.made.append(path)

    def get_function(self, name: str) -> FakeKernel:
        return FakeKernel(name)


class FakeDevice:
    capability = "80"

    def __init__(self, device: int | None = None) -> None:
        self.compute_capability = self.capability
        self.attributes = {"MaxSharedMemoryPerBlockOptin": 101376}


@pytest.fixture
def fake_device(root: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Current device id, which the test may change."""
    cupy = pytest.importorskip("cupy")
    current = {"id": 0}
    monkeypatch.setattr(cupy.cuda.runtime, "getDevice", lambda: current["id"])
    monkeypatch.setattr(cupy.cuda, "Device", FakeDevice)
    monkeypatch.setattr(cupy, "RawModule", FakeModule)
    monkeypatch.setattr(FakeModule, "made", [])
    for name in ("_compiled", "_modules", "_functions", "_arches"):
        monkeypatch.setattr(jit, name, jit._Once())
    monkeypatch.setattr(jit, "_smem_limits", {})
    return current


@needs_nvrtc
def test_get_function_compiles_once_for_many_threads(
    root: Path, fake_device: dict[str, int], compiles: list[str]
) -> None:
    barrier = threading.Barrier(8)

    def work(_: int) -> Any:
        barrier.wait()
        return jit.get_function("kernel", "kernel", {"A": 1}, root=root)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        kernels = list(pool.map(work, range(8)))
    assert len(compiles) == 1 and len(FakeModule.made) == 1 and len(set(map(id, kernels))) == 1
    fake_device["id"] = 1
    assert jit.get_function("kernel", "kernel", {"A": 1}, root=root) is not kernels[0]
    assert len(compiles) == 1 and len(FakeModule.made) == 2  # one cubin, a module for each device


@needs_nvrtc
def test_get_function_opts_in_to_shared_memory(root: Path, fake_device: dict[str, int]) -> None:
    kernel = jit.get_function("kernel", "kernel", {}, smem=48 * 1024, root=root)
    assert kernel.max_dynamic_shared_size_bytes == 0
    for smem, expected in ((90_000, 90_000), (60_000, 90_000), (100_000, 100_000)):
        assert jit.get_function("kernel", "kernel", {}, smem=smem, root=root) is kernel
        assert kernel.max_dynamic_shared_size_bytes == expected
    with pytest.raises(jit.SharedMemoryError, match="101376"):  # 1024 of it are static
        jit.get_function("kernel", "kernel", {}, smem=101_000, root=root)


@needs_nvrtc
def test_get_function_names_the_entries_there_are(root: Path, fake_device: dict[str, int]) -> None:
    with pytest.raises(KeyError, match="kernel"):
        jit.get_function("kernel", "kernal", {}, root=root)


@needs_nvrtc
@pytest.mark.parametrize(
    ("capability", "specific", "arch"),
    [
        ("75", False, "sm_75"),
        ("90", False, "sm_90a"),
        ("100", False, "sm_100"),
        ("100", True, "sm_100a"),
        ("129", False, "sm_12"),  # a later minor version runs what the newest known one runs
    ],
)
def test_device_arch(
    fake_device: dict[str, int], monkeypatch: pytest.MonkeyPatch, capability: str, specific: bool, arch: str
) -> None:
    assert NVRTC_VERSION is not None
    if int(capability) >= 100 and NVRTC_VERSION < (12, 8):
        pytest.skip("NVRTC before 12.8 does not know Blackwell")
    monkeypatch.setattr(FakeDevice, "capability", capability)
    assert jit.device_arch(specific=specific).startswith(arch)


@needs_nvrtc
def test_device_newer_than_the_compiler(fake_device: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeDevice, "capability", "990")
    with pytest.raises(jit.CompilerNotFoundError, match="sm_990"):
        jit.device_arch()


# --- the whole machine ------------------------------------------------------------------------------------

WITHOUT_CUPY = """\
import importlib.util, sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("cupy", "cupy_backends"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Block())
from intfa_cupy import jit, probe
assert "cupy" not in sys.modules
assert "int scale" in jit.inline_source("kernel", sys.argv[1])
found = probe.probe()
assert found.cupy is None and found.gpus == () and found.nvrtc is None and found.headers is None, found
assert "cupy" in found.reasons["cupy"] and "pip install" in found.reasons["nvrtc"], found.reasons
str(found)
try:
    jit.compile_kernel("kernel", {}, "sm_80", root=sys.argv[1])
except ImportError as error:
    assert isinstance(error, jit.CompilerNotFoundError)
    print(error)
"""


def test_import_without_cupy(root: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(REPO)}
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_CUPY, str(root)], capture_output=True, text=True, env=env, check=False
    )
    assert result.returncode == 0, result.stderr
    assert 'pip install "cupy-cuda12x[ctk]"' in result.stdout


def test_import_does_not_load_cupy() -> None:
    env = {**os.environ, "PYTHONPATH": str(REPO)}
    code = "import sys, intfa_cupy.jit, intfa_cupy.probe; sys.exit('cupy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=env, check=False).returncode == 0


def test_probe_is_json_and_readable() -> None:
    found = probe.probe()
    assert json.loads(json.dumps(found.as_dict()))["python"] == found.python
    assert "cupy" in str(found)
    for name in ("cupy", "gpus", "nvrtc", "headers"):  # each is there or has a reason
        assert getattr(found, name) or found.reasons[name]
    if found.nvrtc:
        assert found.headers is not None and set(found.headers.found) == set(probe.HEADERS)


def test_package_finds_its_sources(tmp_path: Path) -> None:
    """As in a checkout (beside the package) and as in a wheel (inside it); the inner one wins."""
    package = tmp_path / "intfa_cupy"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "kernel_source.py").write_text(Path(kernel_source.__file__).read_text())
    code = "from intfa_cupy.kernel_source import source_dir; print(source_dir())"

    def found() -> str:
        env = {**os.environ, "PYTHONPATH": str(tmp_path)}
        run = [sys.executable, "-S", "-c", code]  # -S: without what an editable install adds
        result = subprocess.run(run, capture_output=True, text=True, env=env, cwd=tmp_path, check=False)
        return result.stdout.strip() or result.stderr.strip().split("\n")[-1]

    assert "no CUDA sources" in found()
    for place in (tmp_path / "cuda_src", package / "cuda_src"):
        place.mkdir()
        (place / "a.cu").write_text("")
        assert found() == str(place)


def _gpu_reason() -> str:
    found = probe.probe()
    return "" if found.gpus and found.nvrtc else str(found.reasons.get("gpus") or found.reasons.get("nvrtc"))


@pytest.mark.gpu
def test_launch_on_a_gpu(root: Path) -> None:
    if reason := _gpu_reason():
        pytest.skip(f"no GPU: {reason}")
    import cupy

    (root / "launch.cu").write_text(
        textwrap.dedent(
            """\
            #include "scale.cuh"
            extern "C" __global__ void launch(const int *a, int *b) {
              extern __shared__ int s[];
              int last = 16 * 1024 - 1 - threadIdx.x;  // 64 KiB in: beyond what needs no opting in
              s[last] = a[threadIdx.x];
              __syncthreads();
              b[threadIdx.x] = scale(s[last]);
            }
            """
        )
    )
    a = cupy.arange(32, dtype=cupy.int32)
    b = cupy.zeros_like(a)
    for factor in (3, 5):
        kernel = jit.get_function("launch", "launch", {"FACTOR": factor}, smem=65536, root=root)
        kernel((1,), (32,), (a, b), shared_mem=65536)
        assert (b == factor * a).all()
        assert kernel is jit.get_function("launch", "launch", {"FACTOR": factor}, smem=65536, root=root)
