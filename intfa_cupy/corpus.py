"""English text that every Python installation already holds: its own language reference.

``pydoc_data.topics`` (what ``help("comparisons")`` shows) is technical prose with some markup.
`text_corpus` keeps the paragraphs of prose and takes the markup off. The text is that of the
running Python's documentation, so it may differ between Python versions; the topics are ordered so
that the first 23 thousand characters (4.9 thousand tokens of SmolLM2) were found byte-identical in
3.10.13, 3.11.7, 3.12.1 and 3.13.0. `corpus_fingerprint` says which text a result was measured on.
"""

from __future__ import annotations

import hashlib
import re

__all__ = ["corpus_fingerprint", "text_corpus"]

#: Topics whose prose was found the same in Python 3.10 to 3.13.
STABLE_TOPICS = (
    "comparisons", "import", "exceptions", "context-managers", "numeric-types", "slicings", "with",
    "del", "booleans", "return", "assert", "global", "unary",
)  # fmt: skip
#: More text for whoever wants longer sequences.
MORE_TOPICS = ("execmodel", "objects", "typesseq", "attribute-access", "types", "assignment", "calls")

#: Lines that mark a block as code, grammar, a table, a heading's rule or a footnote.
_NOT_PROSE = re.compile(r"\s*(>>>|\.\.\.|\||\+[-=]|[-=*]{4,}|\[\d+\])")

_MARKUP = (
    (re.compile(r"^[*-] +"), ""),  # a list's bullet
    (re.compile(r"\s*\[\d+\]"), ""),  # a footnote's mark
    (re.compile(r"``?([^`]*)``?"), r"\1"),  # code, roles
    (re.compile(r"\*\*?([\w .()-]+?)\*\*?"), r"\1"),  # emphasis
    (re.compile(r'"([^"\s]+)"'), r"\1"),  # code of one word, as the text builder quotes it
    (re.compile(r"\s+"), " "),  # wrapped lines
)


def _paragraphs(topic: str) -> list[str]:
    """Paragraphs of a topic that are sentences, without markup, one line each."""
    found = []
    for block in re.split(r"\n[ \t]*\n", topic):
        lines = block.strip("\n").split("\n")
        if "::=" in block or any(_NOT_PROSE.match(line) for line in lines):
            continue
        text = " ".join(line.strip() for line in lines)
        for pattern, replacement in _MARKUP:
            text = pattern.sub(replacement, text)
        text = text.strip()
        sentence = re.match(r"[A-Z]", text) and text.endswith(".") and len(text.split()) >= 12
        if sentence and sum(c.isalpha() or c == " " for c in text) >= 0.9 * len(text):
            found.append(text)
    return found


def text_corpus() -> str:
    """Prose of the running Python's language reference, paragraphs separated by a blank line.

    Returns
    -------
    str
        About 85 thousand characters; more than 4,096 tokens of SmolLM2 in its first 23 thousand.
    """
    from pydoc_data.topics import topics  # 0.5 MB of text: not at import

    chosen = [name for name in STABLE_TOPICS + MORE_TOPICS if name in topics]
    return "\n\n".join(paragraph for name in chosen for paragraph in _paragraphs(topics[name]))


def corpus_fingerprint(text: str) -> str:
    """First 12 hexadecimal digits of a text's SHA-256, to name the text in a report."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:12]
