"""The public interface: kinds of arrays, dtypes, texts, imports, and the examples in docstrings."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
import subprocess
import sys
import textwrap
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import strategies as sts

import intfa_cupy as intfa
from intfa_cupy import QuantizedQKV

CASE = sts.Case(B=2, H=4, Hkv=2, Sq=40, Sk=70, D=32, is_causal=True, layout="bshd")


def expected(dtype: str = "float32") -> tuple[np.ndarray, np.ndarray]:
    q, k, v = CASE.replace(dtype=dtype).arrays()
    return intfa.attention(q, k, v, return_lse=True, **CASE.call)


# -- dtypes and kinds -------------------------------------------------------------------------


@pytest.mark.parametrize("name", sts.DTYPES)
def test_result_has_the_inputs_dtype(name: str) -> None:
    out, lse = expected(name)
    assert out.dtype == sts.dtype(name) and lse.dtype == np.float32
    assert out.flags.writeable and lse.flags.writeable
    ref = intfa.reference_attention(*CASE.replace(dtype=name).arrays(), **CASE.call)
    assert ref.dtype == np.float64
    assert intfa.error_report(out, ref).relative_l2 < 0.02


@pytest.mark.parametrize(
    "name", ["float16", "bfloat16", "float32", "float64", np.float16, ml_dtypes.bfloat16]
)
def test_out_dtype_of_quantised_inputs(name: Any) -> None:
    qkv = intfa.quantize_qkv(*CASE.arrays(), layout="bshd")
    assert intfa.attention_quantized(qkv).dtype == np.float32  # of what was quantised
    out = intfa.attention_quantized(qkv, out_dtype=name, is_causal=True)
    assert out.dtype == np.dtype(getattr(ml_dtypes, name, name) if isinstance(name, str) else name)
    exact = intfa.attention_quantized(qkv, is_causal=True)
    np.testing.assert_array_equal(out, exact.astype(out.dtype))


@pytest.mark.parametrize("name", sts.DTYPES)
@pytest.mark.parametrize("storage", ["contiguous", "every-second", "other-layout", "reversed"])
def test_out_is_written_and_returned(name: str, storage: str) -> None:
    q, k, v = CASE.replace(dtype=name).arrays()
    out = sts.stored(np.full_like(q, 7), storage)
    result = intfa.attention(q, k, v, out=out, **CASE.call)
    assert result is out
    np.testing.assert_array_equal(out, expected(name)[0])
    again, lse = intfa.attention(q, k, v, out=out, return_lse=True, **CASE.call)
    assert again is out and lse.shape == (2, 4, 40)


def test_out_may_be_an_input() -> None:
    q, k, v = CASE.arrays()
    q = q.copy()
    intfa.attention(q, k, v, out=q, **CASE.call)
    np.testing.assert_array_equal(q, expected()[0])


def test_inputs_are_left_alone() -> None:
    for recipe in sts.NAMES:
        given = CASE.arrays()
        before = [x.copy() for x in given]
        intfa.attention(*given, recipe=recipe, **CASE.call)
        for x, y in zip(given, before, strict=True):
            np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32", "float64"])
def test_torch_tensors(name: str) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    # Through float64, which holds every value exactly: nothing is rounded twice.
    given = CASE.replace(dtype=name).arrays()
    q, k, v = (torch.from_numpy(x.astype(np.float64)).to(getattr(torch, name)) for x in given)
    out, lse = intfa.attention(q.requires_grad_(), k, v, return_lse=True, **CASE.call)
    assert isinstance(out, torch.Tensor) and out.dtype == q.dtype and lse.dtype == torch.float32
    exact, exact_lse = expected(name)
    np.testing.assert_array_equal(out.double().numpy(), exact.astype(np.float64))
    np.testing.assert_array_equal(lse.numpy(), exact_lse)
    mine = torch.empty_like(q).transpose(0, 1).contiguous().transpose(0, 1).detach()
    assert intfa.attention(q, k, v, out=mine, **CASE.call) is mine and torch.equal(mine, out)
    with pytest.raises(TypeError, match="k must be a torch array as q is, got a numpy array"):
        intfa.attention(q, CASE.arrays()[1], v)


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32"])
def test_jax_arrays(name: str) -> None:
    jax = pytest.importorskip("jax", reason="JAX is not installed")
    q, k, v = (jax.numpy.asarray(x) for x in CASE.replace(dtype=name).arrays())
    out, lse = intfa.attention(q, k, v, return_lse=True, backend="numpy", **CASE.call)
    assert isinstance(out, jax.Array) and out.dtype == q.dtype and isinstance(lse, jax.Array)
    np.testing.assert_array_equal(np.asarray(out), expected(name)[0])
    with pytest.raises(TypeError, match="out must be None for JAX arrays"):
        intfa.attention(q, k, v, out=out, backend="numpy", **CASE.call)


class _Tensor:
    """Looks like a torch tensor to `arrays.kind`, whose module name decides."""

    __module__ = "torch"
    dtype, shape = "torch.float32", (2, 3)


def test_kinds_must_agree() -> None:
    x = np.zeros((2, 3), np.float32)
    with pytest.raises(TypeError, match="k must be a numpy array as q is, got a torch array"):
        intfa.attention(x, _Tensor(), x)


# -- defaults and equivalences ------------------------------------------------------------------


def test_scale_defaults_to_one_over_sqrt_d() -> None:
    q, k, v = CASE.logical()
    np.testing.assert_array_equal(intfa.attention(q, k, v), intfa.attention(q, k, v, scale=32**-0.5))
    np.testing.assert_allclose(
        intfa.reference_attention(q, k, v),
        intfa.reference_attention(q, k, v, scale=np.float64(32**-0.5)),
        atol=1e-14,
    )


def test_a_recipe_is_as_good_as_its_name() -> None:
    q, k, v = CASE.logical()
    for name, recipe in intfa.recipes().items():
        assert recipe.name == name
        np.testing.assert_array_equal(
            intfa.attention(q, k, v, recipe=name), intfa.attention(q, k, v, recipe=recipe)
        )


def test_recipes_are_values() -> None:
    """Equal by what they do, hashable, and the table cannot be changed from outside."""
    first = intfa.recipes()
    assert set(first) == {
        "int8", "int8-fast", "paper-int8", "half-int8", "half-int8-plus", "int4", "k4",
        "fp16", "fp8-e4m3", "fp8-e5m2",
    }  # fmt: skip
    assert len(set(first.values())) == len(first)
    renamed = first["int8"].replace(name="mine")
    assert renamed == first["int8"] and hash(renamed) == hash(first["int8"]) and renamed.name == "mine"
    assert first["int8"].replace().name == "custom"
    with pytest.raises(AttributeError):
        first["int8"].hadamard = False  # type: ignore[misc]
    first.clear()
    assert "int8" in intfa.recipes()


def test_recipes_say_what_the_paper_and_the_notes_say() -> None:
    r = intfa.recipes()
    paper = r["paper-int8"]
    assert (paper.p_format, paper.p_levels, paper.p_max) == ("int8", 127, "running")
    assert (paper.q_granularity, paper.k_granularity, paper.v_granularity) == ("token", "token", "head")
    assert not (paper.smooth_k or paper.equalize or paper.hadamard) and paper.rounded_sum
    best = r["int8"]
    assert best.folded_v and best.p_max == "tile" and best.p_levels == 255 and not best.rounded_sum
    assert best.smooth_k and best.equalize and best.hadamard and best.k_granularity == "group"
    fast = r["int8-fast"]
    assert (
        (fast.k_granularity, fast.v_granularity) == ("group", "channel")
        and fast.rounded_sum
        and not fast.folded_v
    )
    assert fast.smooth_k and fast.equalize and fast.hadamard
    assert (r["int4"].bits, r["k4"].bits) == (
        {"q": 4, "k": 4, "v": 8, "p": 8},
        {"q": 8, "k": 4, "v": 8, "p": 8},
    )
    assert [n for n, x in r.items() if not x.integer_p] == [
        "half-int8",
        "half-int8-plus",
        "fp16",
        "fp8-e4m3",
        "fp8-e5m2",
    ]


# -- texts ----------------------------------------------------------------------------------------


def test_reprs_say_what_they_hold() -> None:
    qkv = intfa.quantize_qkv(*CASE.logical(), recipe="int8-fast")
    text, page = repr(qkv), qkv._repr_html_()
    for part in ("int8-fast", f"{qkv.nbytes:,} bytes", "(2, 4, 40, 32)", "group", "channel", "% of fp16"):
        assert part in text and part in page
    assert page.startswith("<table>") and page.count("<tr>") == 4
    assert (
        repr(qkv.k)
        == f"QuantizedTensor(k, int8, shape=(2, 2, 70, 32), scale per group, {qkv.k.nbytes:,} bytes)"
    )
    assert eval(repr(intfa.Recipe()), {"Recipe": intfa.Recipe}) == intfa.Recipe()


def test_repr_of_nothing() -> None:
    x = np.zeros((1, 1, 0, 8), np.float32)
    assert "0 bytes" in repr(intfa.quantize_qkv(x, x, x, recipe="fp8-e5m2"))


def test_html_is_escaped() -> None:
    recipe = intfa.Recipe(name="<b>&")
    assert "<b>" not in intfa.quantize_qkv(*CASE.logical(), recipe=recipe)._repr_html_()


def test_error_report_prints_as_a_table() -> None:
    report = intfa.error_report(np.array([1.0, 2.0]), np.array([1.0, 2.5]))
    lines = str(report).splitlines()
    assert [line.split("  ")[0] for line in lines] == ["relative L2", "cosine", "MRE", "sum ratio", "max abs"]
    assert "18.57 %" in lines[0] and "0.5" in lines[4] and "all elements" in lines[2]
    assert report._repr_html_().count("<tr>") == 6 and "18.57 %" in report._repr_html_()


def test_backends_give_a_reason_each() -> None:
    found = intfa.backends()
    assert list(found) == ["wgmma", "mma", "wmma", "numpy"]
    assert found["numpy"].available
    for name, status in found.items():
        assert status.name == name and status.reason
        assert name in str(status) and status.reason in str(status)
        assert ("not available" in str(status)) is not status.available


def test_explain_says_what_and_why_not() -> None:
    plan = intfa.explain(*CASE.arrays(), recipe="int8-fast", return_lse=True, **CASE.call)
    assert plan.backend == "numpy" and plan.problem.return_lse
    assert [name for name, _ in plan.rejected] == ["wgmma", "mma", "wmma"]
    text = str(plan)
    for part in ("numpy", "int8-fast", "B=2 H=4 Hkv=2 Sq=40 Sk=70 D=32", "window=(-1, 0)", "not wgmma: "):
        assert part in text
    assert all(reason for _, reason in plan.rejected)
    assert "<pre>" in plan._repr_html_() and "Recipe(" in plan._repr_html_()
    assert intfa.explain(*CASE.arrays(), backend="numpy", **CASE.call).rejected == ()
    assert hash(plan.problem) == hash(
        intfa.explain(*CASE.arrays(), recipe="int8-fast", return_lse=True, **CASE.call).problem
    )


# -- quantised containers ---------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", [n for n in sts.NAMES if intfa.recipes()[n].integer_p])
def test_from_arrays_takes_what_it_says(recipe: str) -> None:
    """Strided integers and float64 scales; INT4 not packed."""
    made = sts.integer_arrays(intfa.recipes()[recipe], CASE)
    plain = QuantizedQKV.from_arrays(**made, recipe=recipe)
    strided = {
        n: sts.stored(x, "every-second").astype(np.float64) if "scale" in n and x.ndim > 1 else x
        for n, x in made.items()
    }
    strided |= {n: np.ascontiguousarray(made[n].swapaxes(1, 2)).swapaxes(1, 2) for n in "qkv"}
    other = QuantizedQKV.from_arrays(**strided, recipe=recipe)
    a, b = (intfa.attention_quantized(x, is_causal=True) for x in (plain, other))
    assert a.shape == (2, 4, 40, 32) and a.dtype == np.float32
    np.testing.assert_array_equal(a, b)
    for name, t in (("q", plain.q), ("k", plain.k), ("v", plain.v)):
        np.testing.assert_array_equal(t.numbers(), made[name])


def test_lse_shift_is_added_times_the_scale() -> None:
    made = sts.integer_arrays(intfa.recipes()["paper-int8"], CASE)
    shift = np.random.default_rng(0).standard_normal((2, 4, 40)).astype(np.float32)
    plain = intfa.attention_quantized(QuantizedQKV.from_arrays(**made), scale=0.25, return_lse=True)
    moved = intfa.attention_quantized(
        QuantizedQKV.from_arrays(**made, lse_shift=shift), scale=0.25, return_lse=True
    )
    np.testing.assert_array_equal(plain[0], moved[0])
    np.testing.assert_allclose(moved[1], plain[1] + 0.25 * shift, rtol=1e-6, atol=1e-6)


# -- import and documentation -----------------------------------------------------------------------

IMPORT = """
    import sys, time
    BLOCKED = {"cupy", "torch", "jax", "gguf", "tokenizers", "triton"}
    class Blocker:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] in BLOCKED:
                raise ImportError(f"{name} is blocked")
    sys.meta_path.insert(0, Blocker())
    start = time.process_time()
    import intfa_cupy
    seconds = time.process_time() - start
    heavy = {"matplotlib", "rich", "typer", "scipy"} & {name.partition(".")[0] for name in sys.modules}
    import numpy
    x = numpy.ones((4, 8), numpy.float32)
    assert (intfa_cupy.attention(x, x, x) == 1).all()
    reasons = [s.reason for s in intfa_cupy.backends().values()]
    print(seconds, *heavy)
"""


def run_python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_needs_no_gpu_library_and_is_quick() -> None:
    """Under 0.5 s of processor time, NumPy's own import included; the best of a few, on a busy machine."""
    times = []
    for _ in range(6):
        seconds, *heavy = run_python(IMPORT).split()
        assert not heavy, f"importing intfa_cupy brought {heavy}"
        times.append(float(seconds))
        if times[-1] < 0.5:
            return
    pytest.fail(f"importing took {min(times):.2f} s at best")


MODULES = sorted(m.name for m in pkgutil.iter_modules(intfa.__path__) if m.name != "__main__")


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name: str) -> None:
    module = importlib.import_module(f"intfa_cupy.{name}")
    assert doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE).failed == 0


def test_public_names_are_documented() -> None:
    for name in intfa.__all__:
        documentation = inspect.getdoc(getattr(intfa, name))
        assert documentation and len(documentation.splitlines()[0]) > 20, name
    for function in (
        intfa.attention,
        intfa.quantize_qkv,
        intfa.attention_quantized,
        intfa.reference_attention,
        intfa.explain,
    ):
        text = inspect.getdoc(function) or ""
        for section in ("Parameters", "Returns", "Raises", "Examples"):
            assert f"{section}\n{'-' * len(section)}" in text, f"{function.__name__}: {section}"
        for parameter in inspect.signature(function).parameters:
            assert parameter in text, f"{function.__name__}: {parameter}"
