"""Launches of the attention kernels."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from typing import Any

import numpy as np

from .. import arrays
from ..dispatch import Plan
from ..packing import padded_head_dim
from ..problem import Problem
from ..quantized import QuantizedQKV, tiles_of
from ..tiles import Tile
from . import devices
from .params import ATTENTION_PARAMS, by_value
from .quantizer import OPERANDS, quantizer
from .transfer import upload
from .views import as_cupy, empty_like, hand_back, named_dtype, on_device, view

__all__ = ["attention", "bind"]

Array = Any
_Strides = tuple[int, int, int, int]

_UNBOUNDED = 2**31 - 1
_LOG2E = math.log2(math.e)


class _Launch:
    """A kernel on the current device with all that follows from the problem filled in."""

    def __init__(self, problem: Problem, tile: Tile, out_dtype: str, pairs: bool) -> None:
        p, blocks = problem, tile.pieces(problem)
        self.kernel = devices.kernel(
            tile.entry,
            tile.entry,
            (tile, out_dtype, pairs),
            lambda: tile.defines(out_dtype, pairs),
            tile.shared_memory,
        )
        self.grid = (min(blocks, devices.device().sms) if tile.persistent else blocks,)
        self.block = (tile.threads,)
        self.shared_memory = tile.shared_memory
        self.tail = struct.pack(
            "<10i2f",
            p.B, p.H, p.Hkv, p.Sq, p.Sk, p.D, tiles_of(p.Sk), -(-p.Sq // tile.piece),
            p.left if 0 <= p.left < _UNBOUNDED else _UNBOUNDED,
            p.right if 0 <= p.right < _UNBOUNDED else _UNBOUNDED,
            p.scale, p.scale * _LOG2E,
        )  # fmt: skip

    def __call__(self, operands: bytes, out: int, lse: int, strides: bytes) -> None:
        """Launch on the current stream; `operands` and `strides` are packed as in struct AttentionParams."""
        params = struct.pack("<72sQQ32s48s", operands, out, lse, strides, self.tail)
        args = (by_value(params, ATTENTION_PARAMS),)
        self.kernel(self.grid, self.block, args, shared_mem=self.shared_memory)


def _launch(plan: Plan, out_dtype: str, out: int, strides: _Strides) -> _Launch:
    """The launch for an output at an address, with its strides in elements."""
    # Rows that start at 16 bytes and have no holes: mma and wgmma store as much at once.
    pairs = (
        plan.tile.specializes
        and padded_head_dim(plan.problem.D) == plan.problem.D
        and strides[3] == 1
        and not (strides[0] | strides[1] | strides[2]) & 7
        and out % 16 == 0
    )
    key = ("attention", devices.current(), out_dtype, pairs)
    found: _Launch | None = plan.prepared.get(key)
    if found is None:
        found = plan.prepared[key] = _Launch(plan.problem, plan.tile, out_dtype, pairs)
    return found


def _pack_strides(strides: _Strides) -> bytes:
    return struct.pack("<4q", *strides)


def _fill_empty(out: Array, lse: Array | None) -> None:
    """The result of rows that see nothing."""
    out.fill(0)
    if lse is not None:
        lse.fill(-np.inf)


# --- quantised inputs ---------------------------------------------------------------------------------------


class _Bound:
    """A plan and packed inputs, with all that can be worked out before a call."""

    def __init__(self, qkv: QuantizedQKV, plan: Plan, ordinal: int) -> None:
        p = plan.problem
        self.ordinal = ordinal
        self.shape = (p.B, p.H, p.Sq, p.D)
        self.wide, self.return_lse = p.out_dtype == "float64", p.return_lse
        out_dtype = "float32" if self.wide else p.out_dtype
        self.dtype, self.lse_dtype = named_dtype(out_dtype), np.dtype(np.float32)
        self.launch: _Launch | None = None
        if p.B * p.H * p.Sq and p.Sk:
            strides = (p.H * p.Sq * p.D, p.Sq * p.D, p.D, 1)
            self.launch = _launch(plan, out_dtype, 0, strides)  # CuPy's memory is aligned
            self.owners = [qkv.extra["operands"].get(name) for name in OPERANDS]
            self.operands = struct.pack("<9Q", *(0 if x is None else x.data.ptr for x in self.owners))
            self.strides = _pack_strides(strides)

    def __call__(self) -> Any:
        """Run on the current stream and return new arrays."""
        import cupy

        if cupy.cuda.runtime.getDevice() != self.ordinal:
            with cupy.cuda.Device(self.ordinal):
                return self()
        out = cupy.ndarray(self.shape, self.dtype)
        lse = cupy.ndarray(self.shape[:3], self.lse_dtype) if self.return_lse else None
        if self.launch is None:
            _fill_empty(out, lse)
        else:
            self.launch(self.operands, out.data.ptr, 0 if lse is None else lse.data.ptr, self.strides)
        if self.wide:
            out = out.astype(np.float64)
        return out if lse is None else (out, lse)


def bind(qkv: QuantizedQKV, plan: Plan) -> Callable[[], Any]:
    """Return a function that runs a plan on quantised inputs, where they are.

    Of inputs in host memory it uploads a copy each time and returns arrays in host memory.
    """
    if qkv.q.layout == "plain":
        return lambda: _to_host(bind(upload(qkv), plan)())
    ordinal = qkv.q.values.device.id
    if ordinal != devices.current():
        import cupy

        with cupy.cuda.Device(ordinal):
            return _Bound(qkv, plan, ordinal)
    return _Bound(qkv, plan, ordinal)


def _to_host(result: Any) -> Any:
    return tuple(x.get() for x in result) if isinstance(result, tuple) else result.get()


# --- quantise and attend ------------------------------------------------------------------------------------


def attention(
    q: Array, k: Array, v: Array, plan: Plan, *, layout: str = "bhsd", out: Array | None = None
) -> Any:
    """Quantise and attend. See :func:`intfa_cupy.attention`."""
    import cupy

    problem = plan.problem
    with devices.where(q):
        in_place = out is not None and problem.out_dtype != "float64" and on_device(out)
        result: Array = out if in_place else empty_like(q, problem.out_dtype)
        lse = cupy.ndarray((problem.B, problem.H, problem.Sq), np.float32) if problem.return_lse else None
        if problem.Sk == 0:
            _fill_empty(as_cupy(result), lse)
        elif problem.B * problem.H * problem.Sq:
            views = view(q, layout), view(k, layout), view(v, layout)
            prepared = quantizer(plan, views[0].dtype, problem.return_lse)
            memory = prepared(*views)
            base = memory.ptr
            operands = struct.pack("<9Q", *[0 if at is None else base + at for at in prepared.operands])
            target = view(result, layout)
            launch = _launch(plan, target.dtype, target.pointer, target.strides)
            strides = _pack_strides(target.strides)
            launch(operands, target.pointer, 0 if lse is None else lse.data.ptr, strides)
        done = hand_back(result, q, problem.out_dtype, None if in_place else out)
        if lse is None:
            return done
        return done, hand_back(arrays.squeeze_lse(lse, len(q.shape)), q, "float32")
