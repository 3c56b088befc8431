"""The kernels' arguments: NumPy mirrors of the structs in ``cuda_src/params.cuh``."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["ATTENTION_PARAMS", "QUANTIZE_PARAMS", "by_value"]

_STRIDED = np.dtype(
    [("data", np.uint64)] + [(name, np.int64) for name in ("batch", "head", "row", "channel")]
)

#: struct AttentionParams
ATTENTION_PARAMS = np.dtype(
    [
        (name, np.uint64)
        for name in ("q", "q_scale", "k", "k_scale", "v", "v_scale", "v_fold", "guard", "lse_shift")
    ]
    + [(name, np.uint64) for name in ("out", "lse")]
    + [(name, np.int64) for name in ("out_batch", "out_head", "out_row", "out_channel")]
    + [(name, np.int32) for name in ("batches", "heads", "kv_heads", "queries", "keys", "channels", "tiles")]
    + [(name, np.int32) for name in ("row_blocks", "left", "right")]
    + [(name, np.float32) for name in ("scale", "scale_log2")]
)

#: struct QuantizeParams
QUANTIZE_PARAMS = np.dtype(
    [(name, _STRIDED) for name in ("q", "k", "v")]
    + [(name, np.uint64) for name in ("q_partial", "k_partial", "v_partial", "q_range", "k_range")]
    + [(name, np.uint64) for name in ("k_mean", "equalizer", "v_statistic")]
    + [(name, np.uint64) for name in ("q8", "q_scale", "q_head_scale", "lse_shift", "k8", "k_scale")]
    + [(name, np.uint64) for name in ("v8", "v_scale", "v_fold", "v_token", "guard")]
    + [(name, np.int32) for name in ("batches", "heads", "kv_heads", "queries", "keys", "channels", "tiles")]
    + [(name, np.int32) for name in ("q_chunks", "k_chunks", "vector_q", "vector_k", "vector_v")]
)


def by_value(packed: bytes, dtype: np.dtype) -> Any:
    """Return a struct as CuPy takes it by value: a NumPy scalar, in memory that may be written to."""
    return np.frombuffer(bytearray(packed), dtype)[0]
