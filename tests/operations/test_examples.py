"""The example of every public name runs, in a folder that holds the fixtures."""

from __future__ import annotations

import doctest
import shutil
from pathlib import Path

import pytest

import shardsurgeon
from tests.support.hub.models import ROOT

# What the examples need beside the package: a Hub to push to, transformers to compare with.
PUSHING = {"push", "PushReport"}
COMPARING = {"ArchitectureReport"}


@pytest.mark.parametrize("name", shardsurgeon.__all__)
def test_the_example_of_every_public_name_runs(
    name: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if name in PUSHING:
        request.getfixturevalue("online")
    if name in COMPARING:
        pytest.importorskip("transformers")
    for fixture in ("kimi_k25", "kimi_k2", "qwen3_moe"):
        shutil.copytree(ROOT / "fixtures" / fixture, tmp_path / "fixtures" / fixture)
    monkeypatch.chdir(tmp_path)
    (test,) = doctest.DocTestFinder(recurse=False).find(
        getattr(shardsurgeon, name), name, globs={"shardsurgeon": shardsurgeon}
    )
    assert test.examples, f"shardsurgeon.{name} has no example"
    said: list[str] = []
    failed, _ = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=said.append)
    assert failed == 0, "".join(said)
