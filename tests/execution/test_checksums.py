"""The SHA-256 that a run records of its files, whatever was interrupted, resumed or sent away."""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from io import FileIO
from pathlib import Path

import pytest

from shardsurgeon.errors import OutputError, SourceReadError
from shardsurgeon.execution import checksums
from shardsurgeon.execution.outputs import output_sizes
from shardsurgeon.execution.run import execute
from shardsurgeon.execution.workers import Progress
from shardsurgeon.storage.formats.checksums import with_checksums
from tests.support.tiny_job import Job, content, make_job

RECORD = "calibration/metadata.json"
SHARDS = ("model-1.safetensors", "model-2.safetensors", "sub/model-3.safetensors")


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """Its record gets the checksums, of shards too."""
    made = make_job(tmp_path)
    generated = ((RECORD, b'{\n  "a": 1\n}\n'), made.plan.generated_files[1])
    plan = replace(made.plan, generated_files=generated, record=RECORD, checksums=True)
    return replace(made, plan=plan)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "OUT"


def recorded(files: Mapping[str, bytes]) -> dict[str, str]:
    """What must be recorded of the files of a finished run."""
    return {n: hashlib.sha256(data).hexdigest() for n, data in files.items() if n != RECORD}


def require_right(job: Job, out: Path) -> None:
    found = content(out)
    record = json.loads(found[RECORD])
    assert record == {"a": 1, "sha256": recorded(job.expected)}
    assert {n: found[n] for n in job.expected if n != RECORD} == {
        n: data for n, data in job.expected.items() if n != RECORD
    }


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_every_file_but_the_record_is_listed_for_any_number_of_workers(
    job: Job, out: Path, workers: int
) -> None:
    execute(job.plan, job.source, out, workers=workers)
    require_right(job, out)


def test_without_the_option_shards_are_left_out(job: Job, out: Path) -> None:
    execute(replace(job.plan, checksums=False), job.source, out)
    listed = json.loads((out / RECORD).read_bytes())["sha256"]
    assert listed == {n: d for n, d in recorded(job.expected).items() if n not in SHARDS}


@pytest.mark.parametrize("checks", [True, False])
def test_the_record_has_the_size_that_was_planned(job: Job, out: Path, checks: bool) -> None:
    plan = replace(job.plan, checksums=checks)
    planned = output_sizes(plan)
    execute(plan, job.source, out)
    assert planned == {name: len(data) for name, data in content(out).items()}


def test_progress_counts_what_is_read_back(job: Job, out: Path) -> None:
    told: list[Progress] = []
    execute(job.plan, job.source, out, on_progress=told.append)
    shards = sum(len(job.expected[name]) for name in SHARDS)
    assert told[-1].done == told[-1].total == sum(output_sizes(job.plan).values()) + shards


@pytest.mark.parametrize("stop_at", range(0, 240_000, 17_000))
def test_a_run_that_is_interrupted_anywhere_records_the_same(
    job: Job, out: Path, stop_at: int
) -> None:
    def stop(progress: Progress) -> None:
        if progress.done >= stop_at:
            raise KeyboardInterrupt

    try:
        execute(job.plan, job.source, out, workers=2, on_progress=stop)
    except KeyboardInterrupt:
        assert not out.exists()
        execute(job.plan, job.source, out, workers=2)
    require_right(job, out)


def test_a_shard_of_an_earlier_run_is_digested_as_it_lies_there(job: Job, out: Path) -> None:
    """What is recorded is what is in the folder; that it is right, the check at the end says."""

    def stop(folder: Path) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execute(job.plan, job.source, out, before_delivery=stop)
    shard = out.parent / "OUT.partial" / "files" / SHARDS[1]
    raw = shard.read_bytes()
    shard.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    execute(job.plan, job.source, out)
    listed = json.loads((out / RECORD).read_bytes())["sha256"]
    assert listed == recorded(content(out)) != recorded(job.expected)


def test_a_rerun_with_or_without_them_is_another_command(job: Job, out: Path) -> None:
    def stop(folder: Path) -> None:
        raise KeyboardInterrupt

    for first in (True, False):
        with pytest.raises(KeyboardInterrupt):
            plan = replace(job.plan, checksums=first)
            execute(plan, job.source, out, before_delivery=stop, restart=True)
        with pytest.raises(OutputError, match=r"different command \(--checksums: "):
            execute(replace(job.plan, checksums=not first), job.source, out)


def test_a_shard_that_cannot_be_read_back_is_named_and_kept(
    job: Job, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(FileIO):
        def readinto(self, buffer: object, /) -> int:
            raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(checksums, "FileIO", Broken)
        with pytest.raises(SourceReadError, match=r"model-.*cannot be read"):
            execute(job.plan, job.source, out)
    report = execute(job.plan, job.source, out)
    assert report.shards_resumed == 3
    require_right(job, out)


class Away:
    """A destination that keeps what it is sent, and calls it by its digest."""

    address = "nowhere"

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}

    def send(self, name: str, path: Path) -> str:
        self.files[name] = path.read_bytes()
        return hashlib.sha256(self.files[name]).hexdigest()

    def sha256(self, receipt: str) -> str:
        return receipt

    def publish(self, folder: Path, receipts: Mapping[str, str]) -> None:
        self.files |= content(folder)


def test_shards_that_were_sent_away_are_recorded_by_their_receipts(job: Job, out: Path) -> None:
    away = Away()
    execute(job.plan, job.source, out, destination=away)
    assert json.loads(away.files[RECORD])["sha256"] == recorded(job.expected)
    assert not out.exists()


def test_the_list_is_the_last_member_of_the_record() -> None:
    raw = with_checksums(b'{\n  "x": {}\n}\n', {"b": "1", 'a"\u00e9': "2"})
    assert raw == b'{\n  "x": {},\n  "sha256": {\n    "a\\"\\u00e9": "2",\n    "b": "1"\n  }\n}\n'
