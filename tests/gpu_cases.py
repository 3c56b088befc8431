"""A representative set of calls for compute-sanitizer: every kernel, every path, small shapes.

Run under the tool by ``gpu_suite.py``; as a plain program it checks that results are finite and repeat.
CuPy's memory pool is off, so that every array has an allocation of its own whose ends the tool knows.
"""

from __future__ import annotations

import sys

import numpy as np

import intfa_cupy as intfa
from intfa_cupy import dispatch

RECIPES = {
    "int8": (64, 80, 256),
    "int8-fast": (33, 128, 256),
    "paper-int8": (64, 128),
    "half-int8": (64, 128),
    "half-int8-plus": (40,),
    "int4": (64, 128),
    "k4": (64,),
    "fp16": (64, 128),
    "fp8-e4m3": (64,),
    "fp8-e5m2": (128,),
}
#: B, H, Hkv, Sq, Sk and the mask: ragged, causal with grouped heads, a window, more queries than keys.
CALLS = (
    ((1, 2, 2, 70, 301), {}),
    ((2, 4, 2, 200, 200), {"is_causal": True}),
    ((1, 2, 1, 140, 270), {"window": (40, 13)}),
    ((1, 1, 1, 150, 33), {"is_causal": True}),
)


def main(kernels: list[str]) -> int:
    """Run the cases of some kernels; return how many calls there were."""
    import cupy

    cupy.cuda.set_allocator(None)
    rng = np.random.default_rng(0)
    done = 0
    for recipe, head_dims in RECIPES.items():
        for i, D in enumerate(head_dims):
            for j, ((B, H, Hkv, Sq, Sk), mask) in enumerate(CALLS):
                dtype = (np.float16, np.float32)[(i + j) % 2]
                shapes = ((B, H, Sq, D), (B, Hkv, Sk, D), (B, Hkv, Sk, D))
                q, k, v = (cupy.asarray(rng.standard_normal(shape).astype(dtype)) for shape in shapes)
                for kernel in kernels:
                    try:
                        out, _ = intfa.attention(
                            q, k, v, recipe=recipe, backend=kernel, return_lse=True, **mask
                        )
                    except dispatch.UnsupportedError:
                        continue
                    assert bool(cupy.isfinite(out).all()), (kernel, recipe, D, mask)
                    qkv = intfa.quantize_qkv(q, k, v, recipe=recipe, backend=kernel)
                    again = intfa.attention_quantized(qkv, backend=kernel, **mask)
                    assert out.get().tobytes() == again.get().tobytes(), (kernel, recipe, D, mask)
                    done += 1
    print(f"{done} calls of {', '.join(kernels)}")
    return done


if __name__ == "__main__":
    sys.exit(0 if main(sys.argv[1:] or ["wgmma", "mma", "wmma"]) else "no kernel served any call")
