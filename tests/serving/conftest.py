"""Keeps the tests that need vLLM out of every run that does not ask for them."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect them unless `-m` names the marker."""
    if "serving" in config.option.markexpr:
        return
    left_out = [item for item in items if item.get_closest_marker("serving")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
