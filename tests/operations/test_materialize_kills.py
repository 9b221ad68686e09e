"""`materialize` killed by SIGKILL, and with the power cut: a rerun gives the same bytes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import shardsurgeon
from shardsurgeon.execution import shards
from shardsurgeon.execution.journal import read_journal
from shardsurgeon.execution.run import execute
from shardsurgeon.execution.view import plan_shards_of
from shardsurgeon.storage.local import LocalSource
from shardsurgeon.storage.system import System, native, portable
from shardsurgeon.storage.view import ViewSource
from tests.cli.standins import in_python
from tests.execution.test_kills import killed_runs
from tests.operations.workbench import digests
from tests.support.hub.models import fixture_folder

# Whole runs, one after the other.
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")]

FAMILY = "qwen3_moe"
# The program itself, which dies as soon as the journal says that a shard is finished.
KILLED = """
import os, signal, sys
from shardsurgeon.cli.main import main
from shardsurgeon.execution.journal import Journal

finish = Journal.finish
Journal.finish = lambda *given: (finish(*given), os.kill(os.getpid(), signal.SIGKILL))
sys.exit(main(sys.argv[1:]))
"""


def prepared(folder: Path) -> tuple[Path, dict[str, str]]:
    """A view, and what `apply` writes in its place."""
    model = fixture_folder(FAMILY)
    plan = shardsurgeon.plan(model, model / "scores.pt", ratio=0.5)
    shardsurgeon.apply(plan, folder / "view", view=True, verify=False)
    shardsurgeon.apply(plan, folder / "direct", verify=False)
    return folder / "view", digests(folder / "direct")


def kill_everywhere(folder: Path, system: System, lossy: bool, stride: int) -> None:
    shards.BATCH_NBYTES = 20_000
    view, expected = prepared(folder)

    def run(out: Path, system: System) -> None:
        source = ViewSource(LocalSource(view))
        beside = [file.name for file in source.list() if file.name not in source.shards]
        plan = plan_shards_of(source, beside)
        execute(plan, source.origin, out, workers=1, system=system)

    kills = 0
    for out in killed_runs(run, folder, system, lossy, stride):
        kills += 1
        # Through the front door; without a check of the source, which is tested elsewhere.
        shardsurgeon.materialize(view, out, verify=False)
        assert digests(out) == expected, out
        assert [path.name for path in out.parent.iterdir()] == ["OUT"]
    assert kills * stride > 100, kills


@pytest.mark.parametrize(
    "how", ["native(), lossy=False, stride=11", "portable(), lossy=True, stride=13"]
)
def test_killed_at_any_step_it_is_finished_by_the_next_run(tmp_path: Path, how: str) -> None:
    script = "import sys, pathlib; from tests.operations.test_materialize_kills import *;"
    script += f"kill_everywhere(pathlib.Path(sys.argv[1]), {how})"
    # In a process of its own: forking one that has run threads of other tests is not safe.
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_the_command_that_is_killed_goes_on(tmp_path: Path) -> None:
    """Three times, behind each of its three shards; nothing is left for the last run to write."""
    view, expected = prepared(tmp_path)
    made, work = tmp_path / "made", tmp_path / "made.partial"
    written = (tmp_path / "direct").glob("*.safetensors")
    sizes = {shard.name: shard.stat().st_size for shard in written}
    words = ["materialize", str(view), "-o", str(made), "--workers", "1"]
    for finished in (1, 2, 3):
        done = in_python(KILLED, *words, stderr=subprocess.PIPE)
        assert done.returncode == -signal.SIGKILL, done.stderr
        found = read_journal(work / "shardsurgeon.journal")
        assert found is not None and len(found.done.finished) == finished
    assert found.done.finished == sizes and not made.exists()
    report = shardsurgeon.materialize(view, made)
    assert report.bytes_resumed == sum(sizes.values())
    assert digests(made) == expected


# For the scripts above.
__all__ = ["kill_everywhere", "native", "portable"]
