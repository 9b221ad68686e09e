"""stdout and stderr that go away while a command works: the words are lost, the work is not."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from shardsurgeon.cli.main import main
from shardsurgeon.errors import NetworkError, UndeclaredFamilyError
from tests.cli.standins import VERIFIED, FakeOperations
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
    """Run a command whose stdout and stderr are lost, or closed from the beginning; its status."""
    command = [sys.executable, "-m", "shardsurgeon", *words]
    if lost is None:
        command = ["sh", "-c", 'exec "$@" >&- 2>&-', "sh", *command]
    stderr = None if lost is None else lost()
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=stderr,
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


# stdout. Commands that have their result on the disk, on the Hub or in their exit status; and those
# that have nothing but what they print.

MADE = [
    ("plan", "s.pt", "--ratio", "0.5", "-o", "plan.json"),
    ("apply", "s.pt", "--ratio", "0.5"),
    ("verify", "source", "pruned"),
    ("materialize", "small-view"),
    ("push", "pruned", "me/pruned"),
    ("scores", "convert", "a.pt", "-o", "b.json"),
    ("scores", "merge", "a.pt", "b.pt", "-o", "c.json"),
    ("scores", "from-router", "-o", "r.json"),
    ("scores", "from-weights", "-o", "w.json"),
    ("scores", "random", "-o", "r.json"),
    ("calibrate", "--dataset", "chats.jsonl", "-o", "s.json"),
    ("evaluate", "s.pt", "--ratio", "0.5", "--dataset", "chats.jsonl", "-o", "e.json"),
]
PRINTED = [
    (),
    ("--help",),
    ("--version",),
    ("apply", "--help"),
    ("inspect",),
    ("plan", "s.pt", "--ratio", "0.5"),
    ("plan", "s.pt", "--ratio", "0.5,0.6"),
    ("scores",),
    ("scores", "show", "s.pt"),
    ("scores", "compare", "s.pt", "t.pt"),
]
JSON = [(), ("--json",)]


@pytest.fixture
def say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake: FakeOperations
) -> Callable[..., tuple[int, str]]:
    """Run a command, whose operations are stand-ins, with a stdout that is lost."""
    monkeypatch.chdir(tmp_path)

    def run(lost: Callable[[], int] | None, *words: str) -> tuple[int, str]:
        stderr = io.StringIO()
        stdout = None if lost is None else os.fdopen(lost(), "w", encoding="utf-8")
        with monkeypatch.context() as streams:
            streams.setattr(sys, "stdout", stdout)
            streams.setattr(sys, "stderr", stderr)
            status = main(words)
            if stdout is not None:
                stdout.close()  # what the end of the program does: it must not fail again
        return status, stderr.getvalue()

    return run


@pytest.mark.parametrize("lost", LOST)
@pytest.mark.parametrize("words", MADE, ids=" ".join)
@pytest.mark.parametrize("more", JSON, ids=" ".join)
def test_a_command_whose_result_lies_elsewhere_is_done_without_stdout(
    say: Callable[..., tuple[int, str]],
    lost: Callable[[], int] | None,
    words: tuple[str, ...],
    more: tuple[str, ...],
) -> None:
    status, told = say(lost, *words, *more)
    assert status == 0
    assert told == "" if lost is reader_left else told.count("the report is lost: stdout: ") == 1
    assert told.count("\n") <= 1


@pytest.mark.parametrize("lost", LOST)
@pytest.mark.parametrize("words", PRINTED, ids=" ".join)
def test_a_command_that_only_prints_ends_quietly_where_its_reader_left_else_with_a_line(
    say: Callable[..., tuple[int, str]], lost: Callable[[], int] | None, words: tuple[str, ...]
) -> None:
    status, told = say(lost, *words)
    if lost is reader_left:
        assert (status, told) == (141, "")
    else:
        assert status == 1
        assert told.startswith("shardsurgeon: error: stdout: cannot be written (")
        assert told.count("\n") == 1


@pytest.mark.parametrize("lost", LOST)
def test_a_check_that_does_not_hold_says_so_by_its_status_alone(
    say: Callable[..., tuple[int, str]], lost: Callable[[], int] | None, fake: FakeOperations
) -> None:
    fake.verify = replace(VERIFIED, differences=("one",))
    status, told = say(lost, "verify", "source", "pruned")
    assert status == 1 and "error: pruned: 1 difference from source" in told


@pytest.mark.parametrize("lost", LOST)
def test_a_refusal_keeps_its_line_and_status_without_stdout(
    say: Callable[..., tuple[int, str]], lost: Callable[[], int] | None, fake: FakeOperations
) -> None:
    fake.inspect = UndeclaredFamilyError("model", "has doubts", skeleton="[family]\n")
    status, told = say(lost, "inspect")
    assert (status, told) == (2, "shardsurgeon: error: model: has doubts\n")


@pytest.mark.parametrize("error", [BrokenPipeError(32, "Broken pipe"), NetworkError("u", "broke")])
def test_a_connection_that_breaks_is_not_taken_for_a_reader_that_left(
    say: Callable[..., tuple[int, str]], error: Exception, fake: FakeOperations
) -> None:
    fake.apply = error
    status, told = say(None, "apply", "s.pt", "--ratio", "0.5")
    assert status == 1 and "brok" in told.lower() and told.count("\n") == 1


def test_no_file_of_the_work_gets_the_number_of_a_stream_that_is_closed(tmp_path: Path) -> None:
    words = (
        "apply",
        str(MODEL / "scores.pt"),
        "--model",
        str(MODEL),
        "--ratio",
        "0.5",
        "-o",
        "out",
    )
    code = (
        "import os, stat, sys; from shardsurgeon.cli.main import main;"
        "from shardsurgeon.execution import run; real = run.execute;\n"
        "def execute(*a, **o):\n"
        "    modes = [os.fstat(n).st_mode for n in range(3)]\n"
        "    assert all(map(stat.S_ISCHR, modes)), modes\n"
        "    return real(*a, **o)\n"
        "from shardsurgeon.operations import apply; apply.execute = execute\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, "-c", code, *words],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=60,
        check=False,
    )
    assert done.returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_tables_are_as_wide_as_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """COLUMNS says how wide that is; a note wraps there, and wide tables have more columns."""
    monkeypatch.chdir(ROOT / "fixtures")
    model, longest = "kimi_k25", {}
    for columns in (60, 80, 120, 300):
        monkeypatch.setenv("COLUMNS", str(columns))
        assert main(["scores", "show", f"{model}/scores.pt"]) == 0
        shown = capsys.readouterr().out
        # A command to copy has a line of its own, however long.
        tables = [line for line in shown.splitlines() if "shardsurgeon evaluate" not in line]
        longest[columns] = max(map(len, tables))
        assert ("can go  can go  can go  can go" in shown) is (columns >= 100)
        assert main(["plan", f"{model}/scores.pt", "--model", model, "--ratio", "0.5"]) == 0
        text = capsys.readouterr().out.partition("chosen by")[2]
        # The path of the output is one word, however long.
        lines = [line for line in text.splitlines() if not line.startswith("  output ")]
        assert max(map(len, lines)) <= columns
    assert longest[80] <= 80 < longest[120] <= 120
    assert longest[300] == longest[120]
