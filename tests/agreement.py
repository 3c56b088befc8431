"""How closely a kernel must agree with the NumPy model, for the host shim and for the device alike."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import oracle
import strategies as sts

from intfa_cupy import QuantizedQKV, model
from intfa_cupy.problem import Problem
from intfa_cupy.quantize import HeadStatistics

# Half a unit in the last place of an output, relative, and among the subnormals.
EPS = {"float32": 0.0, "float16": 2.0**-11, "bfloat16": 2.0**-8}
TINY = {"float32": 2.0**-149, "float16": 2.0**-25, "bfloat16": 2.0**-134}


@dataclass(frozen=True)
class Rounding:
    """How a kernel rounds the probabilities.

    Parameters
    ----------
    counts : float
        Largest distance of an integer P from R e. Half a count is the least that rounding can do.
    floating_sum : bool
        Whether the sum of floating P is over the rounded ones.
    same_rows : float
        Share of rows without a P at a tie, where only float32 is between the kernel and the model.
    score_units : float
        Error of a score in units of its integer, where several keys share a scale.
    value_bias : float
        What is added to INT8 V and taken away from the sum over tiles again, in float32.
    """

    counts: float = 0.51
    floating_sum: bool = False
    same_rows: float = 0.5
    score_units: float = 0.0
    value_bias: float = 0.0


#: All kernels round P once, from a float32 exponential; mma and wgmma are held to the looser bound of a P
#: that is rounded to a float16 first, which is off by up to 2**-12, and so by 255 / 4096 of a count.
#: Where K's scale is shared, mma has 12582912 + score as a float of the tensor cores, and one FMA takes
#: 12582912 times the scale away again, rounded down: up to a unit in the last place of that product.
ROUNDING = {
    "wmma": Rounding(),
    "mma": Rounding(
        counts=0.51 + 255 / 4096, floating_sum=True, same_rows=0.0, score_units=1.5, value_bias=128.0
    ),
    "wgmma": Rounding(counts=0.51 + 255 / 4096, same_rows=0.0, value_bias=128.0),
}


def statistics_of(qkv: QuantizedQKV) -> dict[tuple[int, int], HeadStatistics]:
    """What the kernels found for each key/value head."""
    made = qkv.extra["operands"]
    B, Hkv, _, D = qkv.k.shape
    mean = made["k_mean"].get() if "k_mean" in made else np.zeros((B, Hkv, D), np.float32)
    factor = made["equalizer"].get()[:, :, 0] if "equalizer" in made else np.ones((B, Hkv, D), np.float32)
    return {(b, h): HeadStatistics(mean[b, h, :D], factor[b, h, :D]) for b in range(B) for h in range(Hkv)}


def check_against_model(
    qkv: QuantizedQKV,
    case: sts.Case,
    problem: Problem,
    out: np.ndarray,
    lse: np.ndarray,
    rounding: Rounding = ROUNDING["wmma"],
) -> None:
    """Assert that a kernel's result is that of exact attention but for the rounding of P and of floats.

    `oracle` bounds element by element what the rounding of P may do to a result. Where most rows have no P
    at a tie, these must be the model's but for float32's rounding.
    """
    bound = oracle.exact_given_quantized(
        qkv,
        case.visible(),
        problem.scale,
        counts=rounding.counts,
        floating_sum=rounding.floating_sum,
        score_units=rounding.score_units,
        value_bias=rounding.value_bias,
    )
    expected, _ = model.attention_numpy(qkv, problem)
    out = out.astype(np.float64)
    to_dtype = EPS[problem.out_dtype] * np.maximum(np.abs(expected), np.abs(bound.out) + bound.out_bound)
    to_dtype += TINY[problem.out_dtype]
    error = np.abs(out - bound.out)
    assert (error <= bound.out_bound + to_dtype).all(), f"out is off by {error.max():.3g}"
    seen = np.isfinite(bound.lse)
    assert np.array_equal(np.isneginf(lse), ~seen)
    lse_shift = 0.0 if qkv.lse_shift is None else qkv.lse_shift.astype(np.float64) * problem.scale
    lse_error = np.abs(lse[seen] - (bound.lse + lse_shift)[seen])
    lse_bound = (bound.lse_bound + 2.0**-21 * np.abs(lse_shift))[seen]
    assert (lse_error <= lse_bound).all(), f"lse is off by {lse_error.max(initial=0):.3g}"
    size = np.abs(expected).max(axis=3, keepdims=True, initial=0)
    same = np.abs(out - expected) <= to_dtype + 2.0**-17 * size
    alike = case.distribution == "constant" or out.shape[2] < 20  # all rows have the same ties, or are few
    assert alike or same.all(axis=3).mean() >= rounding.same_rows
