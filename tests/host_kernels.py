"""The attention kernels on the host shim: operands in the packed format, launches, results as arrays."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import cpu_cuda
import ml_dtypes
import numpy as np

from intfa_cupy import QuantizedQKV, gpu
from intfa_cupy.gpu import transfer
from intfa_cupy.kernel_source import source_dir
from intfa_cupy.problem import Problem
from intfa_cupy.quantized import tiles_of
from intfa_cupy.tiles import Tile

UNBOUNDED = 2**31 - 1


def packed_operands(qkv: QuantizedQKV) -> dict[str, np.ndarray | None]:
    """Everything that an attention kernel reads, in the packed format, by the names of AttentionParams."""
    made = transfer.operands(qkv)
    names = {name: name for name in ("q_scale", "k_scale", "v_scale", "v_fold", "guard", "lse_shift")}
    names |= {"q": "q8", "k": "k8", "v": "v8"}
    return {name: made.get(source) for name, source in names.items()}


def attention_request(tile: Tile, out_dtype: str, source: str | None = None) -> dict[str, Any]:
    """Arguments of `cpu_cuda.build` for a tile's kernel; ``source`` replaces the kernel's own."""
    return {
        "source": source or source_dir() / f"{tile.entry}.cu",
        "defines": tile.defines(out_dtype),
        "entries": (tile.entry,),
        "include": (source_dir(),),
    }


@functools.cache
def _module(tile: Tile, out_dtype: str) -> cpu_cuda.Module:
    return cpu_cuda.build(**attention_request(tile, out_dtype))


def attention(
    operands: Mapping[str, np.ndarray | None],
    problem: Problem,
    tile: Tile,
    order: Any = "ascending",
    out_strides: tuple[int, ...] | None = None,
    return_lse: bool = True,
    module: cpu_cuda.Module | None = None,
    blocks: int | None = None,
    **launch: Any,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Launch an attention kernel and return out (B, H, Sq, D) in the problem's dtype and lse (B, H, Sq).

    Parameters
    ----------
    operands : mapping
        As `packed_operands` returns them.
    out_strides : tuple of int, optional
        Of out, in elements.
    module : Module, optional
        A kernel other than the source's own.
    blocks : int, optional
        Of the grid, where the kernel is persistent; else one for each item of work.
    **launch
        More options of `cpu_cuda.Module.launch`.
    """
    B, H, Sq, D = problem.B, problem.H, problem.Sq, problem.D
    module = module or _module(tile, problem.out_dtype)
    dtype = np.dtype(getattr(ml_dtypes, problem.out_dtype, problem.out_dtype))
    strides = (H * Sq * D, Sq * D, D, 1) if out_strides is None else out_strides
    buffers = {name: cpu_cuda.array(x, name) for name, x in operands.items() if x is not None}
    out = cpu_cuda.empty((B, H, Sq, D), dtype, "out", [s * dtype.itemsize for s in strides])
    lse = cpu_cuda.empty((B, H, Sq), np.float32, "lse") if return_lse else None
    params = np.zeros((), gpu.ATTENTION_PARAMS)
    for name, buffer in buffers.items():
        params[name] = buffer.pointer
    params["out"], params["lse"] = out.pointer, 0 if lse is None else lse.pointer
    for name, stride in zip(("out_batch", "out_head", "out_row", "out_channel"), strides, strict=True):
        params[name] = stride
    row_blocks = -(-Sq // tile.piece)
    sizes = {
        "batches": B, "heads": H, "kv_heads": problem.Hkv, "queries": Sq, "keys": problem.Sk, "channels": D,
        "tiles": tiles_of(problem.Sk), "row_blocks": row_blocks,
        "left": problem.left if problem.left >= 0 else UNBOUNDED,
        "right": problem.right if problem.right >= 0 else UNBOUNDED,
        "scale": problem.scale, "scale_log2": problem.scale * math.log2(math.e),
    }  # fmt: skip
    for name, size in sizes.items():
        params[name] = size
    items = B * H * row_blocks
    grid = items if blocks is None else min(blocks, items)
    module.launch(tile.entry, grid, tile.threads, [params[()]], tile.shared_memory, order, **launch)
    assert out.written().all(), "elements of out were left unwritten"
    assert lse is None or lse.written().all(), "elements of lse were left unwritten"
    return out.numpy(), None if lse is None else lse.numpy()
