from __future__ import annotations

from pathlib import Path

import pytest

from shardsurgeon.operations import api
from tests.operations.workbench import Shell, scores_of
from tests.support.hub.models import fixture_folder
from tests.support.hub.server import LocalHub


@pytest.fixture(scope="session")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A local prune of the Kimi-K2.5 fixture. Not to be changed."""
    out = tmp_path_factory.mktemp("prunes") / "Tiny-REAP-65pct"
    plan = api.plan(fixture_folder("kimi_k25"), scores_of("kimi_k25"), ratio=0.65)
    api.apply(plan, out)
    return out


@pytest.fixture
def shell(online: LocalHub, tmp_path: Path) -> Shell:
    """A command line; this process's own huggingface_hub talks to the same Hub."""
    folder = tmp_path / "here"
    folder.mkdir()
    return Shell(online, folder)
