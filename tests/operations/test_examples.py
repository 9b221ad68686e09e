"""The example of every public name runs, in a folder that holds the fixtures."""

from __future__ import annotations

import doctest
import shutil
from operator import attrgetter
from pathlib import Path

import pytest

import shardsurgeon
import shardsurgeon.serving
from tests.support.hub.models import ROOT

# These examples need a Hub to push to, those transformers.
PUSHING = {"push", "PushReport"}
WITH_TORCH = {"ArchitectureReport", "CalibrationReport", "EvaluationReport", "calibrate"}
WITH_TORCH |= {"evaluate", "read_evaluation"}
NAMES = [
    pytest.param(name, marks=pytest.mark.torch if name in WITH_TORCH else ())
    for name in shardsurgeon.__all__
]
NAMES += [
    pytest.param(f"serving.{name}", marks=pytest.mark.torch)
    for name in shardsurgeon.serving.__all__
]


@pytest.mark.parametrize("name", NAMES)
def test_the_example_of_every_public_name_runs(
    name: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if name in PUSHING:
        request.getfixturevalue("online")
    for fixture in ("kimi_k25", "kimi_k2", "qwen3_moe"):
        shutil.copytree(ROOT / "fixtures" / fixture, tmp_path / "fixtures" / fixture)
    monkeypatch.chdir(tmp_path)
    (test,) = doctest.DocTestFinder(recurse=False).find(
        attrgetter(name)(shardsurgeon), name, globs={"shardsurgeon": shardsurgeon}
    )
    assert test.examples, f"shardsurgeon.{name} has no example"
    said: list[str] = []
    failed, _ = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=said.append)
    assert failed == 0, "".join(said)
