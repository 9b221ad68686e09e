"""Faults just before and just after OUT gets its name: what the harness found, each by itself."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from io import FileIO
from pathlib import Path

import pytest

from shardsurgeon.cli import apply as command
from shardsurgeon.cli.main import Stopped, main
from shardsurgeon.errors import OutputWriteError, SourceChangedError, VerificationError
from shardsurgeon.execution.run import execute
from shardsurgeon.operations import carry_out
from shardsurgeon.storage import system as systems
from shardsurgeon.storage.system import portable
from tests.faults.checkpoint import FIXTURE
from tests.support.tiny_job import Job, content, make_job


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return make_job(tmp_path)


def test_a_name_that_may_not_last_is_taken_back(job: Job, tmp_path: Path) -> None:
    out = tmp_path / "OUT"

    def sync_folder(path: Path) -> None:
        if out.exists():
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    with pytest.raises(OutputWriteError, match="run the same command again"):
        execute(job.plan, job.source, out, system=replace(portable(), sync_folder=sync_folder))
    assert not out.exists()
    assert execute(job.plan, job.source, out).shards_resumed == 3
    assert content(out) == job.expected


def test_what_does_not_hold_because_the_source_changed_is_no_bug(job: Job, tmp_path: Path) -> None:
    path = job.source.local_path("b.safetensors")
    assert path is not None

    def check(folder: Path) -> None:
        os.utime(path, ns=(1, 1))
        raise VerificationError(folder, "does not hold", "report this as a bug")

    with pytest.raises(SourceChangedError, match=r"b\.safetensors: was written to or replaced"):
        execute(job.plan, job.source, tmp_path / "OUT", before_delivery=check)


def test_a_disk_that_fails_while_the_result_is_checked_is_told_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = shutil.copytree(FIXTURE, tmp_path / "model")

    def read_at(file: FileIO, buffer: memoryview, at: int) -> int:
        if "out.partial" in str(file.name) and "safetensors" in str(file.name) and at > 20_000:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return portable().read_at(file, buffer, at)

    monkeypatch.setattr(systems, "native", lambda: replace(portable(), read_at=read_at))
    words = ["apply", str(model / "scores.pt"), "--model", str(model), "--ratio", "0.5"]
    assert main([*words, "-o", str(tmp_path / "out")]) == 1
    line = capsys.readouterr().err
    assert "Input/output error" in line and "check the disk" in line and "write to it" not in line


def then_stopped(real: Callable[..., object]) -> Callable[..., object]:
    """The call as it is, and a SIGTERM right after it."""

    def call(*arguments: object, **options: object) -> None:
        real(*arguments, **options)
        raise Stopped(143)

    return call


@pytest.mark.parametrize(("place", "name"), [(carry_out, "execute"), (command, "emit")])
def test_a_signal_after_the_last_step_is_told_that_out_is_complete(
    place: object,
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, out = shutil.copytree(FIXTURE, tmp_path / "model"), tmp_path / "out"
    monkeypatch.setattr(place, name, then_stopped(getattr(place, name)))
    words = ["apply", str(model / "scores.pt"), "--model", str(model), "--ratio", "0.5"]
    assert main([*words, "-o", str(out)]) == 143
    assert capsys.readouterr().err == f"shardsurgeon: stopped; {out} is complete\n"
    assert out.is_dir()
