"""An interrupted apply: what it leaves, what goes on from it, what is refused."""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest

from shardsurgeon.cli.main import Stopped, main
from shardsurgeon.cli.options import as_given
from shardsurgeon.errors import VerificationError
from shardsurgeon.execution import run as execution
from shardsurgeon.operations import verify
from tests.cli.standins import ROOT

STOPPED = VerificationError("out", "stopped by the test")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(ROOT / "fixtures" / "kimi_linear", tmp_path / "model"))


def words(model: Path, ratio: str = "0.5") -> list[str]:
    out = str(model.parent / "out")
    return ["apply", str(model / "scores.pt"), "--model", str(model), "--ratio", ratio, "-o", out]


def interrupt(
    model: Path, monkeypatch: pytest.MonkeyPatch, by: BaseException = STOPPED, status: int = 1
) -> None:
    """A run that moved every byte and stopped before its folder got its name."""

    def stop(*arguments: object, **options: object) -> None:
        raise by

    with monkeypatch.context() as patched:
        patched.setattr(verify, "verify_checkpoint", stop)
        assert main(words(model)) == status
    assert not (model.parent / "out").exists()
    assert (model.parent / "out.partial").is_dir()


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def reference(model: Path) -> dict[str, bytes]:
    assert main(words(model)) == 0
    found = contents(model.parent / "out")
    shutil.rmtree(model.parent / "out")
    return found


def test_the_same_command_finishes_what_another_began(
    model: Path, reference: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(model, monkeypatch)
    assert main(words(model)) == 0
    assert contents(model.parent / "out") == reference
    assert not (model.parent / "out.partial").exists()


def test_another_command_is_refused_until_it_says_restart(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupt(model, monkeypatch)
    capsys.readouterr()
    assert main(words(model, "0.25")) == 2
    line = capsys.readouterr().err
    assert (
        "different command (selection: ratio 0.5, rounding floor, metric saliency, this one ratio"
        in line
    )
    typed = shlex.join(["shardsurgeon", *words(model)])
    assert re.search(
        rf"was made on [-\d]+ [:\d]+ by `{re.escape(typed)}`, 4 of 4 shards done", line
    )
    assert "--restart" in line and line.count("\n") == 1
    assert main([*words(model, "0.25"), "--restart"]) == 0


def test_a_run_that_is_stopped_says_what_is_kept_and_a_rerun_what_is_there(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupt(model, monkeypatch, Stopped(143), 143)
    shards = sum(file.stat().st_size for file in model.parent.rglob("files/*.safetensors"))
    size = f"{shards / 1000:.1f} kB"
    kept = f"{size} of {size} are kept in {model.parent / 'out.partial'}; the same command resumes"
    assert capsys.readouterr().err == f"shardsurgeon: stopped; {kept}\n"
    assert main([*words(model), "--progress"]) == 0
    assert f"\nshardsurgeon: resuming: 4 of 4 shards, {size} of " in capsys.readouterr().err


def test_a_run_that_is_stopped_at_once_keeps_nothing(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*arguments: object, **options: object) -> None:
        raise Stopped(130)

    monkeypatch.setattr(execution, "find_resume_state", stop)
    assert main(words(model)) == 130
    said = "shardsurgeon: stopped; nothing is finished yet that could be kept\n"
    assert capsys.readouterr().err == said
    assert not (model.parent / "out.partial").exists()


@pytest.mark.parametrize(
    ("word", "kept"),
    [
        ("s3://me:pw@bucket/m?versionId=1", "s3://bucket/m"),
        ("--model=https://u@host/m?sig=a", "--model=https://host/m"),
        ("hf://org/name@main", "hf://org/name@main"),
        ("a b?.json", "'a b?.json'"),
    ],
)
def test_a_command_is_remembered_without_what_an_address_hides(word: str, kept: str) -> None:
    with click.Context(click.Command("apply"), obj=("apply", word)):
        assert as_given() == f"shardsurgeon apply {kept}"


def upgraded(model: Path, **changed: object) -> None:
    """Make the journal look as if an earlier version had written it."""
    journal = model.parent / "out.partial" / "shardsurgeon.journal"
    head, rest = journal.read_text().split("\n", 1)
    journal.write_text(json.dumps(json.loads(head) | {"program": "0.0.1", **changed}) + "\n" + rest)


def test_an_upgrade_meanwhile_costs_nothing(
    model: Path,
    reference: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    interrupt(model, monkeypatch)
    upgraded(model, asked={"other": "words for it"})
    capsys.readouterr()
    assert main([*words(model), "--json"]) == 0
    shards = sum(path.stat().st_size for path in (model.parent / "out").glob("*.safetensors"))
    assert json.loads(capsys.readouterr().out)["bytes_resumed"] == shards
    assert contents(model.parent / "out") == reference


def test_an_upgrade_that_writes_other_bytes_is_told_from_another_command(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupt(model, monkeypatch)
    upgraded(model, result="0" * 64)
    capsys.readouterr()
    assert main(words(model)) == 2
    line = capsys.readouterr().err
    assert "was begun by shardsurgeon 0.0.1, and this one, " in line and "--restart" in line
    assert "different command" not in line and line.count("\n") == 1


def test_a_source_that_changed_meanwhile_is_refused_by_name(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupt(model, monkeypatch)
    capsys.readouterr()
    shard = sorted(model.glob("*.safetensors"))[1]
    data = shard.read_bytes()
    shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert main(words(model)) == 2
    line = capsys.readouterr().err
    assert shard.name in line and "changed" in line


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="kills as POSIX does")
def test_kills_at_random_moments_lose_nothing(model: Path, reference: dict[str, bytes]) -> None:
    numbers = random.Random(7)
    command = [sys.executable, "-m", "shardsurgeon", *words(model), "--workers", "2"]
    killed = 0
    begun = time.monotonic()
    while not (model.parent / "out").exists():
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        try:
            # Later and later, so that the run ends however slow the machine is.
            _, said = process.communicate(timeout=numbers.uniform(0.2, 0.5) * 1.1**killed)
            assert process.returncode == 0, said
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            killed += 1
        assert time.monotonic() - begun < 300
    assert contents(model.parent / "out") == reference
    # A kill after the last step leaves the empty workplace and does no harm.
    assert process.returncode or not (model.parent / "out.partial").exists()
