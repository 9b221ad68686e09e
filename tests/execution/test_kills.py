"""Runs killed by SIGKILL: a child counts its system calls and dies at the one it is told.

With the power cut as well: what was written and not synced is zeros by then. The full loop kills
at every third to fifth call, the long loop at every one.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from io import FileIO
from pathlib import Path

import pytest

from shardsurgeon.execution import shards
from shardsurgeon.execution.run import execute
from shardsurgeon.storage.system import System, native, portable
from tests.support.far_source import FarSource, FolderDestination, far_job, noted, receipts
from tests.support.shared_blocks import Clones, make_aligned_job
from tests.support.tiny_job import SIDE, Job, content, make_job


class Unsynced:
    """Remembers, for every file, the ranges that were written and are not synced."""

    def __init__(self) -> None:
        self.ranges: dict[str, list[tuple[int, int]]] = {}

    def watched(self, real: System) -> System:
        def write_at(file: FileIO, data: memoryview, at: int) -> int:
            count = real.write_at(file, data, at)
            self.ranges.setdefault(str(file.name), []).append((at, at + count))
            return count

        def kernel_copy(source: FileIO, begin: int, target: FileIO, at: int, nbytes: int) -> int:
            count = real.kernel_copy(source, begin, target, at, nbytes)
            self.ranges.setdefault(str(target.name), []).append((at, at + count))
            return count

        def share(source: FileIO, begin: int, target: FileIO, at: int, nbytes: int) -> bool:
            shared = real.share(source, begin, target, at, nbytes)
            if shared:
                self.ranges.setdefault(str(target.name), []).append((at, at + nbytes))
            return shared

        def sync_file(file: FileIO) -> None:
            real.sync_file(file)
            self.ranges.pop(str(file.name), None)

        def rename(old: Path, new: Path) -> None:
            real.rename(old, new)
            self.ranges[str(new)] = self.ranges.pop(str(old), [])

        calls = {"write_at": write_at, "kernel_copy": kernel_copy, "sync_file": sync_file}
        return replace(real, rename=rename, share=share, **calls)  # type: ignore[arg-type]

    def lose(self) -> None:
        for path, ranges in list(self.ranges.items()):
            if Path(path).is_file():
                with FileIO(path, "r+") as file:
                    for begin, end in ranges:
                        file.seek(begin)
                        file.write(bytes(end - begin))


def dying_at(step: int, system: System, unsynced: Unsynced | None) -> System:
    """The system, but the process is killed just before its `step`-th call."""
    calls = iter(range(step))

    def counted(real: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object) -> object:
            if next(calls, None) is None:
                if unsynced:
                    unsynced.lose()
                os.kill(os.getpid(), 9)
            return real(*arguments)

        return call

    system = unsynced.watched(system) if unsynced else system
    wrapped = {field.name: counted(getattr(system, field.name)) for field in fields(system)}
    return System(**wrapped)  # type: ignore[arg-type]


def killed_runs(
    run: Callable[[Path, System], object], folder: Path, system: System, lossy: bool, stride: int
) -> Iterator[Path]:
    """Yield the output place of a run killed at its first call, `stride` calls later, and so on."""
    for step in range(0, 10_000, stride):
        out = folder / str(step) / "OUT"
        out.parent.mkdir()
        child = os.fork()
        if child == 0:
            run(out, dying_at(step, system, Unsynced() if lossy else None))
            os._exit(0)
        if os.waitpid(child, 0)[1] == 0:
            return
        yield out


# What the plan's literals and headers hold: they never travel.
OWN_BYTES = 64 + 72 + 8 + 4 + 3


def make_far_or_near_job(folder: Path, far: bool) -> Job:
    shards.BATCH_NBYTES, shards.REMOTE_BATCH_NBYTES = 20_000, 12_000
    return far_job(make_job(folder), FarSource(piece=5_000)) if far else make_job(folder)


def kill_while_sharing(
    folder: Path, system: System, workers: int, lossy: bool, stride: int
) -> None:
    """The same where blocks are shared; those that it finds done are not shared again."""
    shards.BATCH_NBYTES = 20_000
    job = make_aligned_job(folder)

    def run(out: Path, system: System) -> None:
        execute(job.plan, job.source, out, workers=workers, system=system)

    kills = 0
    for out in killed_runs(run, folder, Clones().system(system), lossy, stride):
        kills += 1
        if not out.exists():
            clones = Clones()
            report = execute(job.plan, job.source, out, system=clones.system(native()))
            assert report.bytes_shared == clones.nbytes
            nbytes = report.bytes_copied + report.bytes_shared + report.bytes_resumed
            assert nbytes == sum(map(len, job.expected.values()))
        assert content(out) == job.expected, out
    assert kills * stride > 100, kills


def kill_everywhere(
    folder: Path, system: System, workers: int, far: bool, lossy: bool, stride: int
) -> None:
    """Kill at every `stride`-th call; the next run must finish and fetch nothing noted again."""
    job = make_far_or_near_job(folder, far)
    total = sum(len(job.expected[shard.file]) for shard in job.plan.shards)
    total += sum(map(len, SIDE.values())) - OWN_BYTES

    def run(out: Path, system: System) -> None:
        execute(job.plan, job.source, out, workers=workers, system=system)

    kills = 0
    for out in killed_runs(run, folder, system, lossy, stride):
        kills += 1
        if not out.exists():
            done = noted(out)
            source = FarSource(piece=5_000) if far else job.source
            execute(job.plan, source, out, workers=workers)
            assert not isinstance(source, FarSource) or source.nbytes <= total + OWN_BYTES - done
        assert content(out) == job.expected, out
    assert kills * stride > 100, kills
    assert job.source.list() == job.plan.source_files


def kill_while_sending(
    folder: Path, system: System, workers: int, far: bool, lossy: bool, stride: int
) -> None:
    """The same with a destination: a shard with a receipt is never sent again."""
    job = make_far_or_near_job(folder, far)
    budget = len(job.expected["model-2.safetensors"])

    def run(out: Path, system: System) -> FolderDestination:
        destination = FolderDestination(out.parent)
        settings = {"destination": destination, "disk_budget": budget, "system": system}
        execute(job.plan, job.source, out, workers=workers, **settings)  # type: ignore[arg-type]
        return destination

    kills = resumed = 0
    for out in killed_runs(run, folder, system, lossy, stride):
        kills += 1
        assert not out.exists()
        done = receipts(out)
        destination = FolderDestination(out.parent)
        if not destination.delivered.exists() or out.with_name("OUT.partial").exists():
            destination = run(out, native())
            assert not set(destination.sends) & done.keys()
            assert set(destination.sends) | done.keys() == {shard.file for shard in job.plan.shards}
            resumed += bool(done)
        assert destination.content() == job.expected, out
        assert {path.name for path in out.parent.iterdir()} == {"arrived", "delivered"}
    assert kills * stride > 75 and resumed * stride > 45, (kills, resumed)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(
    ("what", "sampled"),
    [
        ("kill_everywhere(folder, native(), 1, far=False, lossy=False", 3),
        ("kill_everywhere(folder, portable(), 3, far=False, lossy=True", 3),
        ("kill_everywhere(folder, native(), 1, far=True, lossy=True", 3),
        ("kill_everywhere(folder, portable(), 3, far=True, lossy=False", 5),
        ("kill_while_sharing(folder, native(), 1, lossy=False", 3),
        ("kill_while_sharing(folder, portable(), 3, lossy=True", 3),
        ("kill_while_sending(folder, native(), 2, far=False, lossy=False", 3),
        ("kill_while_sending(folder, portable(), 2, far=True, lossy=True", 3),
    ],
)
def test_a_run_killed_at_any_step_is_finished_by_the_next(
    tmp_path: Path, what: str, sampled: int, loop: str
) -> None:
    what += f", stride={1 if loop == 'long' else sampled})"
    # In a process of its own: forking one that has run threads of other tests is not safe.
    script = "import sys, pathlib; from tests.execution.test_kills import *;"
    script += "folder = pathlib.Path(sys.argv[1]); "
    done = subprocess.run(
        [sys.executable, "-c", script + what, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


# For the scripts above.
__all__ = ["kill_everywhere", "kill_while_sending", "kill_while_sharing", "native", "portable"]
