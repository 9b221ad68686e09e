"""The shipped checkpoints, pruned once per family and session."""

from __future__ import annotations

import pytest

from tests.oracle.pruning import FIXTURES, Pruned, prune

FAMILIES = ["deepseek_v3", "kimi_k2", "kimi_k25", "kimi_linear", "qwen3_5_moe", "qwen3_moe"]


@pytest.fixture(scope="session", params=FAMILIES)
def pruned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pruned:
    """Each family with half of its experts removed."""
    out = tmp_path_factory.mktemp(request.param) / "pruned"
    return prune(FIXTURES / request.param, out, "0.5")
