"""The Triton tests run only where `-m` names them.

Where there is no GPU, Triton must be told to interpret before any kernel is defined.
"""

from __future__ import annotations

import os

import pytest
from hypothesis import settings

# A slow machine is no counterexample.
settings.register_profile("shardsurgeon", deadline=None)
settings.load_profile("shardsurgeon")


def pytest_configure(config: pytest.Config) -> None:
    """Choose the interpreter in time."""
    if "triton" not in config.option.markexpr:
        return
    import torch

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect what needs Triton unless `-m` names the marker."""
    if "triton" in config.option.markexpr:
        return
    left_out = [item for item in items if item.get_closest_marker("triton")]
    if left_out:
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)
