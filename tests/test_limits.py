"""Memory and time of the NumPy backend."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable

import numpy as np
import pytest

import intfa_cupy as intfa

MEMORY = """
    import time
    import numpy as np
    import intfa_cupy as intfa

    def status(key):
        with open("/proc/self/status") as lines:
            return next(int(line.split()[1]) / 1000 for line in lines if line.startswith(key))

    rng = np.random.default_rng(0)
    shape = (1, 8, 16384, 64)
    # Made in float32, so that nothing larger has been in memory before.
    q, k, v = (rng.standard_normal(shape, dtype=np.float32) for _ in "qkv")
    before = status("VmRSS")
    start = time.perf_counter()
    out = intfa.attention(q, k, v, recipe="int8-fast", backend="numpy")
    print(status("VmHWM") - before, time.perf_counter() - start, float(np.abs(out).max()))
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not os.path.exists("/proc/self/status"), reason="needs Linux's /proc to read the peak memory"
)
def test_sixteen_thousand_tokens_add_less_than_300_mb() -> None:
    """H = 8, Sq = Sk = 16,384, D = 64; the scores alone would be 8.6 GB.

    The peak is VmHWM: getrusage's would start from the peak of the process that started this one.
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(MEMORY)], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    added, seconds, largest = map(float, done.stdout.split())
    print(f"added {added:.0f} MB in {seconds:.1f} s")
    assert added < 300
    assert 0 < largest < 1  # and it computed something


def plain(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Attention as one would write it in NumPy, in place where that is quicker."""
    p = (q * np.float32(q.shape[-1] ** -0.5)) @ k.swapaxes(2, 3)
    p -= p.max(axis=-1, keepdims=True)
    np.exp(p, out=p)
    return p @ v / p.sum(axis=-1, keepdims=True)


def best_ratio(first: Callable[[], object], second: Callable[[], object], rounds: int) -> float:
    """Least time of ``first`` over that of ``second``, taken alternately: other load hits both."""
    times: list[list[float]] = [[], []]
    for _ in range(rounds):
        for function, seconds in zip((first, second), times, strict=True):
            start = time.perf_counter()
            function()
            seconds.append(time.perf_counter() - start)
    print("seconds:", *(f"{min(t):.2f}" for t in times))
    return min(times[0]) / min(times[1])


def test_at_most_four_times_plain_numpy() -> None:
    """int8-fast at B1 H8 S4096 D64, quantisation included, against plain NumPy float32 attention."""
    q, k, v = np.random.default_rng(0).standard_normal((3, 1, 8, 4096, 64), dtype=np.float32)
    ratio = best_ratio(
        lambda: intfa.attention(q, k, v, recipe="int8-fast", backend="numpy"),
        lambda: plain(q, k, v),
        rounds=2,
    )
    print(f"{ratio:.2f} times plain NumPy")
    assert ratio <= 4


def test_a_window_costs_what_it_shows() -> None:
    """Keys outside of a window are not computed: 1/16 of the keys takes well under half of the time."""
    q, k, v = np.random.default_rng(0).standard_normal((3, 1, 2, 4096, 64), dtype=np.float32)
    ratio = best_ratio(
        lambda: intfa.attention(q, k, v, recipe="int8-fast", window=(128, 128)),
        lambda: intfa.attention(q, k, v, recipe="int8-fast"),
        rounds=3,
    )
    assert ratio < 0.6
