"""Launching the kernels."""

from __future__ import annotations


def unavailable() -> str | None:
    """Why no GPU can be used here, or None."""
    return "CuPy is not installed"
