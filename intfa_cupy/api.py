"""The public functions: check, plan, run, and hand back the caller's kind of array."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import arrays, dispatch
from .problem import Problem, default_scale, normalize_window, shape_of_qkv
from .quantized import QuantizedQKV
from .recipes import Recipe, get_recipe

__all__ = ["attention", "attention_quantized", "explain", "quantize_qkv"]


def _problem(
    q: Any,
    k: Any,
    v: Any,
    recipe: str | Recipe,
    is_causal: bool,
    scale: Any,
    layout: str,
    window: Any,
    lse: bool,
) -> Problem:
    """Check a call's arguments and freeze them."""
    chosen = get_recipe(recipe)
    arrays.check_floating("q", q)
    arrays.check_floating("k", k, like=q)
    arrays.check_floating("v", v, like=q)
    shape = shape_of_qkv(arrays.shape(q), arrays.shape(k), arrays.shape(v), layout)
    left, right = normalize_window(window, is_causal)
    return Problem(
        *shape,
        recipe=chosen,
        left=left,
        right=right,
        scale=default_scale(scale, shape[-1]),
        out_dtype=arrays.dtype_name(q),
        return_lse=bool(lse),
    )


#: What calls on arrays on a GPU were found to do, by all that it follows from.
_plans: dict[Any, dispatch.Plan] = {}
_MOST = 1024


def _plan(
    q: Any,
    k: Any,
    v: Any,
    recipe: str | Recipe,
    is_causal: bool,
    scale: Any,
    layout: str,
    window: Any,
    lse: bool,
    backend: str,
) -> dispatch.Plan:
    """Check a call's arguments and choose what serves it. Remembered on a GPU, where a call is short."""

    def select(on_gpu: bool) -> dispatch.Plan:
        problem = _problem(q, k, v, recipe, is_causal, scale, layout, window, lse)
        return dispatch.select(problem, backend, on_gpu=on_gpu)

    if backend == "numpy" or not _on_gpu(q) or None in (arrays.kind(k), arrays.kind(v)):
        return select(_on_gpu(q))
    from . import gpu

    arguments = (recipe, getattr(recipe, "name", None), is_causal, scale, layout, window, lse, backend)
    key = (
        *(gpu.device(), type(q), type(k), type(v), q.dtype, k.dtype, v.dtype, q.shape, k.shape, v.shape),
        *arguments,
    )
    try:
        found = _plans.get(key)
    except TypeError:  # an argument that cannot be hashed, as a window in a list
        return select(True)
    if found is None:
        found = select(True)
        if len(_plans) >= _MOST:
            _plans.clear()
        _plans[key] = found
    return found


def _quantize_on_host(q: Any, k: Any, v: Any, recipe: Recipe, layout: str) -> QuantizedQKV:
    from .quantize import quantize_numpy

    q4, k4, v4 = (arrays.to_bhsd(arrays.to_numpy(x), layout) for x in (q, k, v))
    return quantize_numpy(q4, k4, v4, recipe)


def _on_gpu(x: Any) -> bool:
    which = arrays.kind(x)
    if which == "torch":
        return bool(x.is_cuda)
    if which == "jax":
        return any(d.platform == "gpu" for d in x.devices())
    return which == "cupy"


def _check_out(out: Any, q: Any) -> None:
    if out is None:
        return
    if arrays.kind(out) != arrays.kind(q):
        raise TypeError(f"out must be a {arrays.kind(q)} array as q is, got {type(out).__name__}")
    if arrays.kind(out) == "jax":
        raise TypeError("out must be None for JAX arrays, which cannot be written to")
    if arrays.shape(out) != arrays.shape(q):
        raise ValueError(f"out must have q's shape {arrays.shape(q)}, got {arrays.shape(out)}")
    if arrays.dtype_name(out) != arrays.dtype_name(q):
        raise TypeError(f"out must have q's dtype {arrays.dtype_name(q)}, got {arrays.dtype_name(out)}")
    if arrays.kind(out) == "numpy" and not out.flags.writeable:
        raise ValueError("out must be writeable, got a read-only array")


def attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    recipe: str | Recipe = "int8",
    is_causal: bool = False,
    scale: float | None = None,
    layout: str = "bhsd",
    window: tuple[int, int] | None = None,
    return_lse: bool = False,
    out: Any = None,
    backend: str = "auto",
) -> Any:
    """Compute softmax(scale * Q K^T) V with quantised Q, K, V and probabilities.

    Parameters
    ----------
    q : array (B, H, Sq, D)
        NumPy, CuPy, torch or JAX; float16, bfloat16, float32 or float64; any strides. Computed in
        float32 and integers, whatever the dtype. D is 1 to 256. Without B: (H, Sq, D); without B and H:
        (Sq, D).
    k, v : array (B, Hkv, Sk, D)
        q's kind, dtype and number of dimensions. H is a multiple of Hkv (grouped-query and multi-query
        attention): query head h uses key/value head ``h // (H // Hkv)``.
    recipe : str or Recipe
        A name from :func:`recipes` or a :class:`Recipe`.
    is_causal : bool
        Query i sees keys ``j <= i + Sk - Sq``, aligned to the bottom right as in FlashAttention. With
        Sq = 2, Sk = 4 the visible pairs are ::

            1 1 1 0
            1 1 1 1

        and with Sq = 4, Sk = 2, where the first two queries see nothing, ::

            0 0
            0 0
            1 0
            1 1

    scale : float, optional
        1/sqrt(D) by default.
    layout : {"bhsd", "bshd"}
        Order of the dimensions of q, k, v and the result.
    window : (int, int), optional
        ``(left, right)``: query i sees keys from ``i + Sk - Sq - left`` to ``i + Sk - Sq + right``; -1 is
        unbounded. ``is_causal`` sets right to 0.
    return_lse : bool
        Also return the log-sum-exp.
    out : array, optional
        Where to write: q's shape, dtype and kind.
    backend : str
        ``"auto"`` takes the fastest kernel for inputs on a GPU and ``"numpy"`` for inputs in host memory;
        a name from :func:`backends` insists on it, copying between host and device as needed.

    Returns
    -------
    out : array
        q's shape, kind and dtype. A row without a visible key is 0.
    lse : array of float32 (B, H, Sq)
        Natural logarithm of sum(exp(scale * q . k)) over the visible keys, of the *original* K (corrected
        for K smoothing); -inf for a row without one. Only with ``return_lse``. Lacks the dimensions that
        q lacks. Not affected by ``layout``.

    Raises
    ------
    TypeError, ValueError
        An argument of the wrong kind, dtype or shape; the message names it, what came and what is allowed.
    UnsupportedError
        A ValueError: the backend insisted on cannot serve the call; says what is missing and what would.

    Notes
    -----
    A NaN or an infinity in a row of Q makes that row of the result NaN. One anywhere in a head of K or
    V makes every row of every query head that uses it NaN, whether or not the row could see the key:
    scales and means are shared over the sequence. "Not finite" is judged in float32, so a float64 beyond
    3.4e38 counts. Scores beyond float32 (q . k above 1e38) give NaN too. A float16 result saturates at
    65504.

    INT-FlashAttention, arXiv 2409.16997, Algorithm 1, is ``recipe="paper-int8"``.

    Examples
    --------
    >>> import numpy as np, intfa_cupy as intfa
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = rng.standard_normal((3, 1, 4, 256, 64), dtype=np.float32)
    >>> out = intfa.attention(q, k, v, is_causal=True)
    >>> ref = intfa.reference_attention(q, k, v, is_causal=True)
    >>> intfa.error_report(out, ref).relative_l2 < 0.02
    True
    """
    plan = _plan(q, k, v, recipe, is_causal, scale, layout, window, return_lse, backend)
    _check_out(out, q)
    if plan.backend != "numpy":
        from . import gpu

        return gpu.attention(q, k, v, plan, layout=layout, out=out)
    from .model import attention_numpy

    problem, ndim = plan.problem, len(arrays.shape(q))
    qkv = _quantize_on_host(q, k, v, problem.recipe, layout)
    result, lse = attention_numpy(qkv, problem)
    result = arrays.from_bhsd(result, layout, ndim)
    done = arrays.like(result, q, problem.out_dtype) if out is None else arrays.write(out, result, q)
    return (done, arrays.like(arrays.squeeze_lse(lse, ndim), q, "float32")) if return_lse else done


def quantize_qkv(
    q: Any, k: Any, v: Any, *, recipe: str | Recipe = "int8", layout: str = "bhsd", backend: str = "auto"
) -> QuantizedQKV:
    """Quantise Q, K and V for :func:`attention_quantized`.

    Parameters
    ----------
    q, k, v, recipe, layout, backend
        As in :func:`attention`.

    Returns
    -------
    QuantizedQKV
        In host memory for the NumPy backend, else on the GPU in the kernels' packed layout.

    Raises
    ------
    TypeError, ValueError
        As :func:`attention`.

    Examples
    --------
    >>> import numpy as np, intfa_cupy as intfa
    >>> x = np.ones((1, 2, 128, 64), np.float16)
    >>> intfa.quantize_qkv(x, x, x).q
    QuantizedTensor(q, int8, shape=(1, 2, 128, 64), scale per token, 17,408 bytes)
    """
    plan = _plan(q, k, v, recipe, False, None, layout, None, False, backend)
    if plan.backend != "numpy":
        from . import gpu

        return gpu.quantize(q, k, v, plan, layout=layout)
    return _quantize_on_host(q, k, v, plan.problem.recipe, layout)


def attention_quantized(
    qkv: QuantizedQKV,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    window: tuple[int, int] | None = None,
    return_lse: bool = False,
    out_dtype: str | None = None,
    backend: str = "auto",
) -> Any:
    """Run the operator on inputs that are quantised already.

    Parameters
    ----------
    qkv : QuantizedQKV
    is_causal, scale, window, return_lse, backend
        As in :func:`attention`.
    out_dtype : str or dtype, optional
        ``"float16"``, ``"bfloat16"``, ``"float32"`` or ``"float64"``; the dtype that was quantised by
        default.

    Returns
    -------
    out : array (B, H, Sq, D)
        NumPy for inputs in host memory, CuPy for inputs on the GPU.
    lse : array of float32 (B, H, Sq)
        Only with ``return_lse``.

    Raises
    ------
    TypeError, ValueError
        As :func:`attention`.

    Examples
    --------
    >>> import numpy as np, intfa_cupy as intfa
    >>> x = np.random.default_rng(0).standard_normal((1, 2, 128, 64), dtype=np.float32)
    >>> qkv = intfa.quantize_qkv(x, x, x, recipe="int8-fast")
    >>> intfa.attention_quantized(qkv, out_dtype="float16").dtype
    dtype('float16')
    """
    if not isinstance(qkv, QuantizedQKV):
        raise TypeError(f"qkv must be a QuantizedQKV, got {type(qkv).__name__}")
    arguments = (is_causal, scale, window, return_lse, out_dtype, backend)
    try:
        call = qkv.calls.get(arguments)
    except TypeError:  # one that cannot be hashed, as a window in a list
        return _quantized_call(qkv, *arguments)()
    if call is None:
        call = _quantized_call(qkv, *arguments)
        if len(qkv.calls) >= _MOST:
            qkv.calls.clear()
        qkv.calls[arguments] = call
    return call()


def _quantized_call(
    qkv: QuantizedQKV,
    is_causal: bool,
    scale: Any,
    window: Any,
    return_lse: bool,
    out_dtype: str | None,
    backend: str,
) -> Callable[[], Any]:
    """Check the arguments of attention_quantized and return what serves it, ready to be called."""
    dtype = qkv.out_dtype if out_dtype is None else arrays.floating_name("out_dtype", out_dtype)
    B, H, Sq, D = qkv.q.shape
    Hkv, Sk = qkv.k.shape[1:3]
    left, right = normalize_window(window, is_causal)
    problem = Problem(
        B, H, Hkv, Sq, Sk, D, qkv.recipe, left, right, default_scale(scale, D), dtype, bool(return_lse)
    )
    plan = dispatch.select(problem, backend, on_gpu=arrays.kind(qkv.q.values) == "cupy")
    if plan.backend != "numpy":
        from . import gpu

        return gpu.bind(qkv, plan)

    def on_host() -> Any:
        from .model import attention_numpy

        plain = qkv
        if qkv.q.layout == "packed":
            from . import packing

            plain = packing.to_host(qkv)
        result, lse = attention_numpy(plain, problem)
        done = arrays.like(result, result, dtype)
        return (done, lse) if return_lse else done

    return on_host


def explain(
    q: Any,
    k: Any,
    v: Any,
    *,
    recipe: str | Recipe = "int8",
    is_causal: bool = False,
    scale: float | None = None,
    layout: str = "bhsd",
    window: tuple[int, int] | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> dispatch.Plan:
    """Say which backend, tile and recipe :func:`attention` would use, and why not the faster ones.

    Parameters
    ----------
    q, k, v, recipe, is_causal, scale, layout, window, return_lse, backend
        As in :func:`attention`.

    Returns
    -------
    Plan
        Prints as text.

    Raises
    ------
    TypeError, ValueError
        As :func:`attention`.

    Examples
    --------
    >>> import numpy as np, intfa_cupy as intfa
    >>> x = np.ones((1, 2, 128, 64), np.float16)
    >>> intfa.explain(x, x, x).backend
    'numpy'
    """
    return _plan(q, k, v, recipe, is_causal, scale, layout, window, return_lse, backend)
