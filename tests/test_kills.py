"""Runs killed by SIGKILL: a child counts its system calls and dies at the one it is told."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path

import pytest
from tiny_job import Job, content, make_job

from shardsurgeon import execution
from shardsurgeon.execution import execute
from shardsurgeon.system import System, native, portable


def dying_at(step: int, system: System) -> System:
    """The system, but the process is killed just before its `step`-th call."""
    calls = iter(range(step))

    def counted(real: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object) -> object:
            if next(calls, None) is None:
                os.kill(os.getpid(), 9)
            return real(*arguments)

        return call

    wrapped = {field.name: counted(getattr(system, field.name)) for field in fields(system)}
    return System(**wrapped)  # type: ignore[arg-type]


def killed_runs(job: Job, folder: Path, system: System, workers: int) -> Iterator[Path]:
    """Yield the output place of a run killed at its first call, at its second, and so on."""
    for step in range(10_000):
        out = folder / f"OUT-{step}"
        child = os.fork()
        if child == 0:
            execute(job.plan, job.source, out, workers=workers, system=dying_at(step, system))
            os._exit(0)
        if os.waitpid(child, 0)[1] == 0:
            return
        yield out


def kill_everywhere(folder: Path) -> None:
    """Kill at every call, with each kind of system; the next run must finish, if there is need."""
    execution.BATCH_NBYTES = 20_000  # type: ignore[attr-defined]
    job = make_job(folder)
    for system, workers in ((native(), 1), (portable(), 3)):
        place = folder / f"{workers} workers"
        place.mkdir()
        kills = 0
        for out in killed_runs(job, place, system, workers):
            kills += 1
            if not out.exists():
                execute(job.plan, job.source, out, workers=workers)
            assert content(out) == job.expected, out
        assert kills > 50, kills
    assert job.source.list() == job.plan.source_files


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_run_killed_at_any_step_is_finished_by_the_next(tmp_path: Path) -> None:
    # In a process of its own: forking one that has run threads of other tests is not safe.
    script = "import sys, pathlib, test_kills as t; t.kill_everywhere(pathlib.Path(sys.argv[1]))"
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
