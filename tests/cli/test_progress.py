"""What a command is at, on stderr: in place on a terminal, as lines elsewhere, or not at all."""

from __future__ import annotations

import logging
import os
import re
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import shardsurgeon
from shardsurgeon.cli import progress
from shardsurgeon.cli.main import cli, main
from shardsurgeon.storage.phases import BYTES, Phase, phase
from tests.cli.standins import APPLIED, CALIBRATED, PUSHED, FakeOperations, Run, in_python
from tests.cli.test_help import command
from tests.cli.test_refusals import ROOT

MODEL = ROOT / "fixtures" / "kimi_k25"
APPLY = ("apply", str(MODEL / "scores.pt"), "--model", str(MODEL), "--ratio", "0.5", "-o", "out")
WORDS = [
    ("inspect",),
    ("fit",),
    ("plan", "s.pt", "--ratio", "0.5"),
    ("apply", "s.pt", "--ratio", "0.5"),
    ("verify", "source", "pruned"),
    ("materialize", "small-view"),
    ("push", "pruned", "me/pruned"),
    ("scores", "show", "s.pt"),
    ("scores", "compare", "s.pt", "t.pt"),
    ("scores", "convert", "a.pt", "-o", "b.json"),
    ("scores", "merge", "a.pt", "b.pt", "-o", "c.json"),
    ("scores", "blend", "a.pt", "b.pt", "--weights", "a=1,b=2", "-o", "c.json"),
    ("scores", "from-router", "-o", "r.json"),
    ("scores", "from-weights", "-o", "w.json"),
    ("scores", "random", "-o", "r.json"),
    ("calibrate", "--dataset", "chats.jsonl", "-o", "s.json"),
    ("probe", "http://gpu:8000/v1", "--prompts", "chats.jsonl", "-o", "probe.json"),
    ("evaluate", "s.pt", "--ratio", "0.5", "--dataset", "chats.jsonl", "-o", "e.json"),
    ("report", "plan.json", "-o", "report.html"),
    ("scores", "plot", "s.pt", "-o", "s.svg"),
]


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SHARDSURGEON_PROGRESS")
    monkeypatch.setenv("TERM", "xterm")


def on_terminal(*words: str, cwd: Path, columns: int = 80, **environment: str) -> tuple[int, str]:
    """Run a command whose stdout and stderr are a terminal; its status, and what came there."""
    fcntl, pty, termios = map(pytest.importorskip, ("fcntl", "pty", "termios"))
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    child = subprocess.Popen(
        [sys.executable, "-m", "shardsurgeon", *words],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stdout=follower,
        stderr=follower,
    )
    os.close(follower)
    came = bytearray()
    try:
        while data := os.read(leader, 1 << 16):
            came += data
    except OSError:  # how Linux says that nobody writes there any more
        pass
    os.close(leader)
    return child.wait(60), came.decode().replace("\r\n", "\n")


def in_a_log(*words: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command whose output goes to no terminal."""
    return subprocess.run(
        [sys.executable, "-m", "shardsurgeon", *words],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )


def screen(text: str) -> list[str]:
    """The lines that a terminal shows in the end."""
    lines = []
    for line in text.split("\n"):
        cells: list[str] = []
        for part in line.split("\r"):
            cells[: len(part)] = part
        lines.append("".join(cells).rstrip())
    return lines


def in_turn(text: str, words: list[str]) -> None:
    """Check that the words occur in this order."""
    at = 0
    for word in words:
        assert word in text[at:], f"{word} after {text[:at]!r}"
        at = text.index(word, at) + len(word)


# A terminal.


def test_on_a_terminal_a_line_says_each_phase_and_nothing_of_it_stays(tmp_path: Path) -> None:
    status, came = on_terminal(*APPLY, cwd=tmp_path)
    assert status == 0
    in_turn(came, ["\rstarting", "\rreading headers", "\rcopying"])
    assert "\x1b" not in came
    shown = screen(came)
    assert shown[0].startswith("kimi_k25: keep 16 of 32 experts")
    assert not [line for line in shown if re.search("planning|copying|checking", line)]
    assert max(map(len, re.split("[\r\n]", came))) <= 80


def test_what_is_shown_in_place_fits_a_narrow_terminal(tmp_path: Path) -> None:
    _, came = on_terminal("inspect", str(MODEL), cwd=tmp_path, columns=30)
    parts = [part for part in came.split("\r") if "\n" not in part]
    assert parts and max(map(len, parts)) < 30


@pytest.mark.parametrize(
    ("words", "environment"),
    [
        (("-q",), {}),
        (("--no-progress",), {}),
        ((), {"SHARDSURGEON_PROGRESS": "none"}),
    ],
)
def test_a_terminal_shows_the_report_alone_where_that_was_asked_for(
    tmp_path: Path, words: tuple[str, ...], environment: dict[str, str]
) -> None:
    _, came = on_terminal("inspect", str(MODEL), *words, cwd=tmp_path, **environment)
    assert "\r" not in came and came.startswith("kimi_k25: kimi_k25\n")


@pytest.mark.parametrize("environment", [{"TERM": "dumb"}, {"SHARDSURGEON_PROGRESS": "plain"}])
def test_a_terminal_that_cannot_go_back_gets_lines(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    _, came = on_terminal("inspect", str(MODEL), cwd=tmp_path, **environment)
    assert "\r" not in came
    in_turn(came, ["shardsurgeon: reading the model\n", "kimi_k25: kimi_k25\n"])


def test_colours_that_are_not_wanted_change_nothing(tmp_path: Path) -> None:
    _, came = on_terminal("inspect", str(MODEL), cwd=tmp_path, NO_COLOR="1")
    assert "\rreading headers" in came and "\x1b" not in came


# No terminal.


def test_a_log_has_a_line_for_each_phase_and_stdout_has_the_report(tmp_path: Path) -> None:
    ended = in_a_log(*APPLY, "--json", cwd=tmp_path)
    said = ["starting", "reading the model", "planning", "preparing", "copying: 552.4 kB"]
    said += ["writing the other files", "checking"]
    assert ended.stderr.splitlines() == [f"shardsurgeon: {line}" for line in said]
    assert ended.stdout.startswith("{")


READ = ["starting", "reading the model"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("inspect", "MODEL"), [*READ, "finding experts"]),
        (("plan", "MODEL/scores.pt", "--model", "MODEL", "--ratio", "0.5"), [*READ, "planning"]),
        (("verify", "MODEL", "PRUNED", "--sample", "1"), [*READ, "checking"]),
        (("scores", "show", "MODEL/scores.pt"), ["starting", "reading scores"]),
        (("scores", "from-router", "MODEL", "-o", "r.json"), [*READ, "reading routers: 3"]),
        (("scores", "from-weights", "MODEL", "-o", "w.json"), [*READ, "reading experts: 334.1 kB"]),
    ],
    ids=lambda each: each[0] if isinstance(each, tuple) else "",
)
def test_what_only_reads_says_so_too(
    words: tuple[str, ...],
    said: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    if "PRUNED" in words:
        plan = shardsurgeon.plan(MODEL, MODEL / "scores.pt", keep=16)
        shardsurgeon.apply(plan, "PRUNED", verify=False)
    main([word.replace("MODEL", str(MODEL)) for word in words])
    lines = [line.removeprefix("shardsurgeon: ") for line in capsys.readouterr().err.splitlines()]
    assert [line for line in lines if not line.startswith("error: ")] == said


def test_verbose_names_each_file(tmp_path: Path) -> None:
    said = in_a_log(*APPLY, "-v", cwd=tmp_path).stderr
    files = [path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*.*")]
    assert len(files) > 20
    for file in files:
        assert f"shardsurgeon: {file.as_posix()} is written" in said


def test_quiet_is_silent_but_for_errors(tmp_path: Path) -> None:
    assert in_a_log(*APPLY, "-q", cwd=tmp_path).stderr == ""
    with pytest.raises(subprocess.CalledProcessError) as caught:
        in_a_log("inspect", "nowhere", "--quiet", cwd=tmp_path)
    said = caught.value.stderr
    assert said.startswith("shardsurgeon: error: nowhere: there is no") and said.count("\n") == 1


# Every command has the same words.


@pytest.mark.parametrize("words", WORDS, ids=" ".join)
def test_every_command_says_first_that_it_starts_and_is_quiet_when_asked(
    run: Run, words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(*words).stderr == "shardsurgeon: starting\n"
    for flag in ("-q", "--quiet", "--no-progress"):
        assert run(*words, flag).stderr == ""
    assert run(*words, "-v").status == run(*words, "--verbose").status == 0


def test_no_command_is_left_out() -> None:
    names = {words[: 1 + (words[0] == "scores")] for words in WORDS}
    every = {(name,) for name in cli.commands if name != "scores"}
    every |= {("scores", name) for name in command(("scores",)).commands}  # type: ignore[attr-defined]
    # The steps of a recipe show theirs, and these are done at once.
    assert names == every - {(name,) for name in ("run", "env", "families", "completion")}


@pytest.mark.parametrize("other", ["-v", "--progress"])
def test_quiet_and_its_contrary_are_refused(run: Run, other: str) -> None:
    ended = run("inspect", "-q", other)
    assert ended.status == 2 and "--quiet: and --" in ended.stderr


def test_a_default_that_is_none_is_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARDSURGEON_PROGRESS", "loud")
    ended = run("inspect")
    said = "SHARDSURGEON_PROGRESS: 'loud' is none of auto, bar, plain, none; correct it or unset it"
    assert (ended.status, ended.stderr) == (2, f"shardsurgeon: error: {said}\n")


def test_words_weigh_more_than_the_default(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARDSURGEON_PROGRESS", "none")
    assert run("inspect").stderr == ""
    assert run("inspect", "--progress").stderr == "shardsurgeon: starting\n"


# What the work tells.


def working(*steps: tuple[str, int, str, int], answer: object = APPLIED) -> Callable[..., Any]:
    """An operation of some phases: name, total, unit, and what is done of it in the end."""

    def work(*args: object, **options: object) -> object:
        for name, total, unit, done in steps:
            with phase(name, total, unit) as at:
                at.detail = "2/4 shards"
                at.advance(done)
                time.sleep(3 * progress._TICK)
                until_drawn(at.detail)
        return answer

    return work


def until_drawn(text: str) -> None:
    """Wait for a line in place to have the text, however busy the machine is."""
    end = time.monotonic() + 10
    while (display := progress._display) is not None and time.monotonic() < end:
        if not display._in_place or text in display._drawn:
            return
        time.sleep(0.002)


def until_said(lines: int) -> None:
    """Wait until so many lines more are printed, however busy the machine is."""
    begun, said = time.monotonic(), set[float]()
    while len(said) < lines and time.monotonic() < begun + 60:
        assert progress._display is not None
        if progress._display._lined_at > begun:
            said.add(progress._display._lined_at)
        time.sleep(0.002)


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds pass a hundred times as fast."""
    for name in ("_TICK", "_LINE_SECONDS", "_LEAST_SECONDS", "_SAID_SECONDS"):
        monkeypatch.setattr(progress, name, getattr(progress, name) / 100)


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (("apply", "s.pt", "--ratio", "0.5"), APPLIED),
        (("push", "pruned", "me/x"), PUSHED),
        (("calibrate", "--dataset", "a.txt", "-o", "s.json"), CALIBRATED),
    ],
)
def test_bytes_and_tokens_are_a_bar_and_all_else_a_count(
    run: Run,
    fake: FakeOperations,
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
    answer: object,
) -> None:
    monkeypatch.setenv("SHARDSURGEON_PROGRESS", "bar")
    unit = "tok" if words[0] == "calibrate" else BYTES
    steps = [("reading headers", 64, "", 12), ("moving", 10**9, unit, 5 * 10**8)]
    setattr(fake, words[0], working(*steps, answer=answer))
    shown = run(*words).stderr.split("\r")
    assert "reading headers 2/4 shards 12/64" in [part.split(" (")[0].rstrip() for part in shown]
    bar = next(part for part in shown if part.startswith("moving 2/4 shards:  50%|"))
    assert "500M/1.00G [" in bar and f"{unit}/s]" in bar
    assert shown[-1] == ""


@pytest.mark.usefixtures("soon")
def test_a_log_gets_a_line_where_five_percent_are_done_and_one_where_nothing_comes(
    run: Run, fake: FakeOperations
) -> None:
    begun = time.monotonic()

    def work(*args: object, **options: object) -> object:
        with phase("copying", 10**9, BYTES) as at:
            for done in (3 * 10**7, 10**7, 4 * 10**8):  # 3 %, 4 %, 44 %
                at.advance(done)
                time.sleep(0.06)
            until_said(2)
        return APPLIED

    fake.apply = work
    lines = run("apply", "s.pt", "--ratio", "0.5").stderr.splitlines()[1:]
    lasted = time.monotonic() - begun
    assert lines[0] == "shardsurgeon: copying: 1.0 GB"
    last = [line for line in lines if line.startswith("shardsurgeon: copying: 44 %, 440.0 MB of ")]
    assert all(re.search(r" of 1\.0 GB, [\d.]+ [kMG]B/s, \d+ s left$", line) for line in last)
    # One with the bytes, and afterwards one for each 0.3 s in which nothing was said.
    assert 2 <= len(last) <= 2 + lasted / progress._LINE_SECONDS


@pytest.mark.usefixtures("soon")
def test_what_is_logged_stands_on_a_line_of_its_own_beside_a_bar(
    run: Run, fake: FakeOperations, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHARDSURGEON_PROGRESS", "bar")

    def work(*args: object, **options: object) -> object:
        with phase("copying", 10**9, BYTES):
            log = logging.getLogger("shardsurgeon.storage.retry")
            log.warning("far: waiting %s s", 7)
            log.debug("not to be said")
        return APPLIED

    fake.apply = work
    shown = screen(run("apply", "s.pt", "--ratio", "0.5").stderr)
    assert [line for line in shown if line] == ["shardsurgeon: far: waiting 7 s"]
    assert "shardsurgeon: not to be said\n" in run("apply", "s.pt", "--ratio", "0.5", "-v").stderr
    assert run("apply", "s.pt", "--ratio", "0.5", "-q").stderr == ""


def test_the_log_is_as_it_was_when_a_command_has_ended(run: Run) -> None:
    log = logging.getLogger("shardsurgeon")
    before = (log.level, list(log.handlers))
    run("inspect", "-v")
    run("inspect", "-q")
    assert (log.level, log.handlers) == before


def test_a_phase_says_how_long_is_left() -> None:
    at = Phase("copying", 200 * 10**9, BYTES, done=100 * 10**9)
    at.begun -= 100
    at.advance(10 * 10**9)
    assert progress.plain(at) == "copying: 55 %, 110.0 GB of 200.0 GB, 100.0 MB/s, 15 min 0 s left"
    alone = Phase("planning")
    alone.begun -= 7300
    assert progress.plain(alone) == "planning: 2 h 1 min so far"
    assert progress.status(alone, 80) == "planning (2 h 1 min)"


def test_a_terminal_without_blocks_gets_a_bar_of_plain_signs() -> None:
    at = Phase("copying", 1000, BYTES, done=500)
    assert progress.status(at, 80, blocks=False).isascii()


def test_an_interrupted_phase_leaves_no_line(
    run: Run, fake: FakeOperations, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHARDSURGEON_PROGRESS", "bar")

    def work(*args: object, **options: object) -> object:
        with phase("copying", 10, BYTES):
            signal.raise_signal(signal.SIGTERM)
            time.sleep(10)
        return APPLIED

    fake.apply = work
    ended = run("apply", "s.pt", "--ratio", "0.5")
    assert ended.status == 143
    assert [line for line in screen(ended.stderr) if line] == [
        "shardsurgeon: stopped; the same command resumes"
    ]


def test_the_first_status_comes_before_anything_that_takes_long(tmp_path: Path) -> None:
    code = (
        "import io, sys\n"
        "from shardsurgeon.cli.main import main\n"
        "class Stream(io.StringIO):\n"
        "    def write(self, text):\n"
        "        print(repr(text), sorted({'numpy', 'tqdm', 'huggingface_hub'} & {*sys.modules}))\n"
        "        return len(text)\n"
        "sys.stderr = Stream()\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    words = ("inspect", str(MODEL), "--json")
    done = in_python(code, *words, cwd=tmp_path, capture_output=True, check=True)
    assert done.stdout.splitlines()[0] == r"'shardsurgeon: starting\n' []"
