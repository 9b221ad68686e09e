"""An evaluation takes no more memory than it announces, the head among it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from shardsurgeon.errors import UsageError
from shardsurgeon.layerwise import evaluate
from shardsurgeon.layerwise.memory import free_memory
from tests.layerwise.evaluating import evaluated, every_other
from tests.layerwise.evaluation_memory import with_vocabulary
from tests.layerwise.streaming import token_ids

VOCABULARY = 50_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_vocabulary(tmp_path_factory.mktemp("model"), VOCABULARY)


@pytest.mark.skipif(sys.platform != "linux", reason="no /proc")
def test_the_peak_is_no_higher_than_announced(folder: Path) -> None:
    script = [sys.executable, "-m", "tests.layerwise.evaluation_memory", str(folder)]
    done = subprocess.run(
        [*script, "5", "2", "128", "float32"], capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["peak"] <= sum(found["announced"])
    # The head's logits are most of it, and a bound that is far off would be no news.
    assert found["peak"] > 0.8 * sum(found["announced"])


def test_a_head_that_does_not_fit_is_refused_before_the_work(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert free_memory("cpu") > 100 << 20
    keeps, ids = [every_other(folder, 8)], token_ids((20, 20))
    with pytest.raises(UsageError, match=r"--device cpu: the head takes 2.*MB.* are free"):
        evaluated(folder, keeps, ids, tmp_path / "s", memory=60 << 20)
    assert not list((tmp_path / "s").iterdir())
    monkeypatch.setattr(evaluate, "_WORKSPACE", 0)
    evaluated(folder, keeps, ids, tmp_path / "s", memory=150 << 20)
