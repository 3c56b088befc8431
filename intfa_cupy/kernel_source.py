"""Where the CUDA sources lie, how they become one string, and their fingerprint.

The headers of ``cuda_src`` are inlined rather than found through ``-I``: the string that is compiled is
then the whole of our code, so its hash is an honest cache key, and an edited header can't be missed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
from pathlib import Path

__all__ = ["SourceError", "inline_source", "source_dir", "strip_comments", "strip_comments_fingerprint"]

_SUFFIXES = (".cu", ".cuh", ".h")

# Comments and literals, so that "//" inside an asm string is not taken for a comment. The lookbehind keeps
# digit separators (1'000) from opening a character literal.
_TOKEN = re.compile(
    r"""
      (?P<comment> //(?:\\\n|[^\n])* | /\*.*?\*/ )
    | (?P<literal> R"(?P<delim>[^()\\\s]{0,16})\(.*?\)(?P=delim)"
                 | "(?:\\.|[^"\\\n])*"
                 | (?<![0-9a-fA-F])'(?:\\.|[^'\\\n])*' )
    """,
    re.DOTALL | re.VERBOSE,
)
_DIRECTIVE = re.compile(r"[ \t]*#[ \t]*(include|ifdef|ifndef|if|endif|pragma)\b[ \t]*(.*)")
_QUOTED = re.compile(r'"([^"]+)"')


class SourceError(FileNotFoundError):
    """A kernel source, or a header that one includes in quotes, does not exist."""


def source_dir() -> Path:
    """Directory of the CUDA sources.

    An installed package carries them as ``intfa_cupy/cuda_src``; in a checkout they lie beside the
    package; an editable install may map them anywhere, which only the import system knows. The nearest
    one wins, so that a checkout on ``PYTHONPATH`` never compiles the kernels of another install.
    """
    package = Path(__file__).resolve().parent
    for candidate in (package / "cuda_src", package.parent / "cuda_src"):
        if _has_sources(candidate):
            return candidate
    try:
        spec = importlib.util.find_spec("intfa_cupy.cuda_src")
    except (ImportError, ValueError):
        spec = None
    for location in (spec.submodule_search_locations if spec else None) or ():
        if _has_sources(Path(location)):
            return Path(location)
    raise SourceError(
        f"no CUDA sources: neither {package / 'cuda_src'} nor {package.parent / 'cuda_src'} has any"
    )


def _has_sources(directory: Path) -> bool:
    return directory.is_dir() and any(directory.glob("*.cu"))


def strip_comments(text: str) -> str:
    """``text`` without comments; line breaks stay, so that line numbers do too."""

    def blank(match: re.Match[str]) -> str:
        if match["literal"] is not None:
            return match[0]
        return " " + "\n" * match[0].count("\n")

    return _TOKEN.sub(blank, text)


def inline_source(name: str, root: Path | None = None) -> str:
    """One string with every quoted include of ``cuda_src`` put in place.

    Parameters
    ----------
    name : str
        File name below ``root``; ``.cu`` may be left out.
    root : Path, optional
        Directory of the sources, :func:`source_dir` by default.

    Returns
    -------
    str
        Every header takes effect once (as if each said ``#pragma once``). ``#line`` directives name the
        file relative to ``root``, so compiler messages read well and the text doesn't depend on where the
        checkout is. ``#include <...>`` lines are left to the compiler.

    Raises
    ------
    SourceError
        If a file is missing, naming the including line.
    """
    base = Path(root) if root is not None else source_dir()
    start = name if name.endswith(_SUFFIXES) else name + ".cu"
    if not (base / start).is_file():
        raise SourceError(f"no kernel source {start} in {base}")
    out: list[str] = []
    numbers: dict[str, int] = {}  # header -> number in its guard macro
    done: set[str] = set()  # headers whose text is already there on every path through the preprocessor

    def emit(rel: str, stack: tuple[str, ...], conditional: bool) -> None:
        text = (base / rel).read_text(encoding="utf-8")
        out.append(f'#line 1 "{rel}"')
        depth = 0
        for number, (line, code) in enumerate(
            zip(text.split("\n"), strip_comments(text).split("\n"), strict=True), start=1
        ):
            match = _DIRECTIVE.match(code)
            word, rest = match.groups() if match else ("", "")
            quoted = _QUOTED.match(rest) if word == "include" else None
            if quoted is None:
                depth += {"if": 1, "ifdef": 1, "ifndef": 1, "endif": -1}.get(word, 0)
                out.append("" if word == "pragma" and rest.strip() == "once" else line)
                continue
            target = _resolve(base, rel, number, quoted[1])
            if target in done or target in stack:
                out.append("")
                continue
            # A header first met under #if must still be there for a later include outside that #if, so its
            # text may come more than once; the guard makes one of them count.
            inner = conditional or depth > 0
            guard = numbers.setdefault(target, len(numbers))
            macro = f"INTFA_INCLUDED_{guard}_" + re.sub(r"\W", "_", target)
            out.extend((f"#ifndef {macro}", f"#define {macro}"))
            emit(target, (*stack, target), inner)
            out.extend(("#endif", f'#line {number + 1} "{rel}"'))
            if not inner:
                done.add(target)

    emit(start, (start,), False)
    return "\n".join(out) + "\n"


def _resolve(base: Path, includer: str, number: int, name: str) -> str:
    for directory in (Path(includer).parent, Path()):
        relative = directory / name
        if (base / relative).is_file():
            return (base / relative).resolve().relative_to(base.resolve()).as_posix()
    raise SourceError(f'{includer}:{number}: "{name}" is not in {base} (system headers go in <...>)')


def strip_comments_fingerprint(root: Path | None = None) -> str:
    """sha256 over all kernel sources without comments and blank space.

    A recorded benchmark cites it: it changes with the code and not with its comments or layout.
    """
    base = Path(root) if root is not None else source_dir()
    digest = hashlib.sha256()
    files = sorted(p.relative_to(base).as_posix() for p in base.rglob("*") if p.suffix in _SUFFIXES)
    for rel in files:
        text = _canonical((base / rel).read_text(encoding="utf-8"))
        digest.update(f"{rel}\0{text}\0".encode())
    return digest.hexdigest()


def _canonical(text: str) -> str:
    literals: list[str] = []

    def take(match: re.Match[str]) -> str:
        if match["comment"] is not None:
            return " " + "\n" * match[0].count("\n")
        literals.append(match[0])
        return f"\x01{len(literals) - 1}\x01"

    code = _TOKEN.sub(take, text).replace("\\\n", " ")
    parts: list[str] = []
    run: list[str] = []

    def flush() -> None:
        if run:  # blanks beside brackets and separators never mean anything outside a directive
            parts.append(re.sub(r" ?([(){}\[\];,]) ?", r"\1", " ".join(run)))
            run.clear()

    for line in code.split("\n"):
        words = line.split()
        if words and words[0].startswith("#"):
            flush()
            parts.append(" ".join(words))
        elif words:
            run.append(" ".join(words))
    flush()
    return re.sub("\x01(\\d+)\x01", lambda m: literals[int(m[1])], "\n".join(parts))
