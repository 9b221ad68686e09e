"""A stderr that goes away while a command works: the words are lost, the work is not."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.test_refusals import ROOT

pytestmark = pytest.mark.skipif(os.name != "posix", reason="descriptors as POSIX has them")

MODEL = ROOT / "fixtures" / "kimi_k25"


def reader_left() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def disk_full() -> int:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    return os.open("/dev/full", os.O_WRONLY)


def hung_up() -> int:
    pty = pytest.importorskip("pty")
    leader, follower = pty.openpty()
    os.close(leader)
    return int(follower)


LOST = [reader_left, disk_full, hung_up, None]


def run(lost: Callable[[], int] | None, *words: str, folder: Path) -> int:
    """Run a command whose stderr is lost, or closed from the beginning, and return its status."""
    command = [sys.executable, "-m", "shardsurgeon", *words]
    if lost is None:
        command = ["sh", "-c", 'exec "$@" 2>&-', "sh", *command]
    stderr = None if lost is None else lost()
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            timeout=60,
            check=False,
        )
    finally:
        if stderr is not None:
            os.close(stderr)
    return done.returncode


@pytest.mark.parametrize("lost", LOST)
def test_apply_and_verify_finish_without_a_terminal(
    lost: Callable[[], int] | None, tmp_path: Path
) -> None:
    words = ("apply", str(MODEL / "scores.pt"), "--model", str(MODEL), "--ratio", "0.5")
    assert run(lost, *words, "-o", "out", "--progress", folder=tmp_path) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert run(lost, "verify", str(MODEL), "out", "--progress", folder=tmp_path) == 0


@pytest.mark.parametrize("lost", LOST)
def test_a_refusal_keeps_its_status_without_a_terminal(
    lost: Callable[[], int] | None, tmp_path: Path
) -> None:
    assert run(lost, "inspect", "nowhere", folder=tmp_path) == 2
    assert run(lost, "plan", "--no-such-option", folder=tmp_path) == 2
