"""Hypothesis profiles, and the reason why tests marked ``gpu`` are skipped."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, settings

from intfa_cupy import dispatch

_SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile("dev", max_examples=40, deadline=None, suppress_health_check=_SLOW)
# The same examples every time: a red run in CI is the change's doing.
settings.register_profile("ci", settings.get_profile("dev"), derandomize=True, print_blob=True)
settings.register_profile("thorough", settings.get_profile("dev"), max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "dev"))


def _no_gpu() -> str | None:
    """Why no kernel can run here, or None."""
    kernels = [status for name, status in dispatch.backends().items() if name != "numpy"]
    if any(status.available for status in kernels):
        return None
    return "; ".join(sorted({status.reason for status in kernels}))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    reason = _no_gpu() if marked else None
    if reason is not None:
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=f"no GPU backend: {reason}"))
