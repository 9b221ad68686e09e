"""A source that is written to during a run, its time put back: found, named, and never resumed."""

import json
import mmap
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from shardsurgeon.errors import OutputError, SourceChangedError, VerificationError
from shardsurgeon.execution.plan import Segment
from shardsurgeon.execution.run import execute
from shardsurgeon.execution.workers import Progress
from shardsurgeon.storage.local import LocalSource
from tests.support.far_source import FolderDestination
from tests.support.tiny_job import Job, content, make_job, make_plan

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such time")

TOUCHED = r"{}: was touched since the run was planned, though its time of writing is as it was"


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return make_job(tmp_path)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "OUT"


def with_time_put_back(path: Path, write: Callable[[Path], None]) -> None:
    before = path.stat()
    write(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def write_in_place(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"X" * path.stat().st_size)


def write_through_a_map(path: Path) -> None:
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        mapped[:] = b"X" * len(mapped)


@pytest.mark.parametrize("write", [write_in_place, write_through_a_map])
@pytest.mark.parametrize("name", ["a.safetensors", "b.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("when", [1, 2, 3])
def test_it_is_named_and_a_rerun_makes_one_model_of_the_new_bytes(
    job: Job, out: Path, write: Callable[[Path], None], name: str, when: int
) -> None:
    path = out.parent / "Tiny-MoE" / name
    done: list[int] = []

    def listen(progress: Progress) -> None:
        if progress.shards_done == when and not done:
            done.append(when)
            with_time_put_back(path, write)

    with pytest.raises(SourceChangedError, match=TOUCHED.format(name)):
        execute(job.plan, job.source, out, workers=1, on_progress=listen)
    assert sorted(os.listdir(out.parent)) == ["Tiny-MoE", "scores.pt"]
    # A run of its own has the same plan: the stamps are as they were.
    again = LocalSource(out.parent / "Tiny-MoE")
    plan = make_plan(again, out.parent / "scores.pt")
    assert plan.digest() == job.plan.digest()
    assert execute(plan, again, out).shards_resumed == 0
    found = content(out)
    whole = content(out.parent / "Tiny-MoE")
    for shard in plan.shards:
        data = b"".join(
            whole[piece.file][piece.begin : piece.begin + piece.nbytes]
            if isinstance(piece, Segment)
            else piece.data
            for piece in shard.pieces
        )
        assert found[shard.file] == shard.header + data
    assert found["tokenizer.json"] == whole["tokenizer.json"]


def test_what_does_not_hold_for_it_is_no_bug(job: Job, out: Path) -> None:
    path = out.parent / "Tiny-MoE" / "b.safetensors"

    def check(folder: Path) -> None:
        with_time_put_back(path, write_in_place)
        raise VerificationError(folder, "does not hold", "report this as a bug")

    with pytest.raises(SourceChangedError, match=TOUCHED.format("b.safetensors")):
        execute(job.plan, job.source, out, before_delivery=check)
    assert not out.exists()


def test_a_shard_that_is_not_sent_for_it_is_no_bug(job: Job, out: Path) -> None:
    path = out.parent / "Tiny-MoE" / "b.safetensors"

    class Checking(FolderDestination):
        def send(self, name: str, path_of_shard: Path) -> str:
            with_time_put_back(path, write_in_place)
            raise VerificationError(path_of_shard, "does not hold", "report this as a bug")

    with pytest.raises(SourceChangedError, match=TOUCHED.format("b.safetensors")):
        execute(job.plan, job.source, out, destination=Checking(out.parent))


def test_another_runs_folder_stays_as_it_is(job: Job, out: Path) -> None:
    def stop(progress: Progress) -> None:
        if progress.shards_done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execute(job.plan, job.source, out, workers=1, on_progress=stop)
    partial = out.with_name("OUT.partial")
    journal = partial / "shardsurgeon.journal"
    head, *lines = journal.read_text().splitlines()
    other = {**json.loads(head), "result": "another"}
    journal.write_text("\n".join([json.dumps(other), *lines, ""]))
    before = content(partial)
    with_time_put_back(out.parent / "Tiny-MoE" / "a.safetensors", write_in_place)
    with pytest.raises(OutputError, match="was begun by"):
        execute(job.plan, job.source, out)
    assert content(partial) == before


def test_a_new_mode_between_two_runs_is_no_change(job: Job, out: Path) -> None:
    def stop(progress: Progress) -> None:
        if progress.shards_done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execute(job.plan, job.source, out, workers=1, on_progress=stop)
    (out.parent / "Tiny-MoE" / "a.safetensors").chmod(0o600)
    again = LocalSource(out.parent / "Tiny-MoE")
    report = execute(make_plan(again, out.parent / "scores.pt"), again, out)
    assert report.shards_resumed == 2
    assert content(out) == job.expected


def test_a_run_itself_changes_nothing_of_its_source(job: Job, out: Path) -> None:
    files = [path for path in (out.parent / "Tiny-MoE").rglob("*") if path.is_file()]
    before = {path: (path.stat().st_ctime_ns, path.stat().st_mode) for path in files}
    execute(job.plan, job.source, out)
    assert {path: (path.stat().st_ctime_ns, path.stat().st_mode) for path in files} == before
    assert job.source.list() and not job.source.touched
