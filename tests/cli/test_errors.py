"""Every end of a command: one line on stderr, and the status that belongs to it."""

from __future__ import annotations

import json
import signal
import subprocess
from contextlib import suppress
from dataclasses import replace

import click
import pytest

from shardsurgeon import errors
from shardsurgeon.cli import output as printing
from shardsurgeon.errors import HeaderError, OutputWriteError, ShardSurgeonError
from shardsurgeon.operations.reports import InspectReport
from tests.cli.standins import APPLIED, INSPECTED, FakeOperations, Run, in_python

APPLY = ("apply", "scores.pt", "--ratio", "0.65")


def one_line(stderr: str) -> str:
    assert stderr.startswith("shardsurgeon: "), stderr
    assert stderr.count("\n") == 1
    assert stderr.endswith("\n")
    return stderr.removeprefix("shardsurgeon: ").rstrip("\n")


def test_a_good_end_is_status_0_and_says_nothing_on_stderr(run: Run, fake: FakeOperations) -> None:
    ended = run(*APPLY)
    assert ended.status == 0
    assert ended.stderr == ""


def test_bad_input_is_one_line_and_status_2(run: Run, fake: FakeOperations) -> None:
    fake.apply = HeaderError("model-1.safetensors", "header is 3 bytes", "fetch it again")
    ended = run(*APPLY)
    assert ended.status == 2
    assert ended.stdout == ""
    expected = "error: model-1.safetensors: header is 3 bytes; fetch it again"
    assert one_line(ended.stderr) == expected


def test_failed_work_is_one_line_and_status_1(run: Run, fake: FakeOperations) -> None:
    fake.apply = OutputWriteError("out", "the disk is full", "free 3 GB")
    ended = run(*APPLY)
    assert ended.status == 1
    assert one_line(ended.stderr) == "error: out: the disk is full; free 3 GB"


def test_the_status_comes_from_the_error_class(run: Run, fake: FakeOperations) -> None:
    found = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    kinds = [kind for kind in found if issubclass(kind, ShardSurgeonError)]
    assert len(kinds) > 10
    for kind in kinds:
        fake.apply = kind("file", "problem", "remedy")
        assert run(*APPLY).status == kind.exit_status


OF_EVERY_KIND = {
    "input": (HeaderError("shard", "problem", "remedy"), ("shard", "problem", "remedy", 2)),
    "work": (OutputWriteError("", "the disk is full"), ("", "the disk is full", "", 1)),
    "disk": (PermissionError(13, "Permission denied", "/m/x"), ("/m/x", "Permission denied", 1)),
    "bug": (KeyError("k"), ("this is a bug, KeyError: 'k'", 1)),
    "memory": (MemoryError(), ("memory ran out", 1)),
    "SIGINT": (signal.SIGINT, ("", "stopped", "the same command resumes", 130)),
    "SIGTERM": (signal.SIGTERM, ("", "stopped", "the same command resumes", 143)),
}


@pytest.mark.parametrize("kind", OF_EVERY_KIND)
def test_with_json_a_failure_is_a_document_too(kind: str, run: Run, fake: FakeOperations) -> None:
    error, told = OF_EVERY_KIND[kind]
    if isinstance(error, signal.Signals):
        fake.apply = lambda *args, **options: signal.raise_signal(error)
    else:
        fake.apply = error
    ended = run(*APPLY, "--json")
    document = json.loads(ended.stdout)
    assert list(document) == ["schema", "version", "error"]
    failed = document["error"]
    assert list(failed) == ["where", "problem", "remedy", "status"]
    assert {*told} <= {*failed.values()} and failed["status"] == ended.status
    line = one_line(ended.stderr)
    parts = [failed[part] for part in ("where", "problem", "remedy") if failed[part]]
    assert all(part in line for part in parts)
    assert line == run(*APPLY).stderr.removeprefix("shardsurgeon: ").rstrip("\n")


@pytest.mark.parametrize(
    "words",
    [
        ("aply", "--json"),
        ("apply", "--json", "--ration", "0.5"),
        ("apply", "--keep", "many", "--json"),
        ("plan", "--json", "scores.pt", "--ratio", "1.5"),
        ("plan", "--json", "scores.pt", "--ratio", ""),
        ("verify", "only-one", "--json"),
        ("scores", "compare", "a.pt", "--json"),
        ("calibrate", "--json"),
    ],
)
def test_with_json_wrong_usage_is_a_document_too(run: Run, words: tuple[str, ...]) -> None:
    ended = run(*words)
    failed = json.loads(ended.stdout)["error"]
    assert failed["status"] == ended.status == 2
    assert failed["problem"] in one_line(ended.stderr)


def test_a_word_that_is_no_option_asks_for_no_document(run: Run, fake: FakeOperations) -> None:
    fake.inspect = HeaderError("shard", "problem")
    assert run("inspect", "--", "--json").stdout == ""


def test_a_stop_after_the_report_prints_no_second_document(
    run: Run, fake: FakeOperations, monkeypatch: pytest.MonkeyPatch
) -> None:
    printed = printing.as_text

    def stopped_by_then(document: dict[str, object]) -> str:
        click.echo(printed(document))
        signal.raise_signal(signal.SIGTERM)
        raise AssertionError("unreachable")

    monkeypatch.setattr(printing, "as_text", stopped_by_then)
    ended = run("inspect", "--json")
    assert ended.status == 143
    assert json.loads(ended.stdout) == INSPECTED.to_dict()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("aply",), "'aply'"),
        (("--verbose",), "--verbose"),
        (("apply", "--ration", "0.5"), "--ration"),
        (("apply", "a.pt", "b.pt", "--ratio", "0.5"), "b.pt"),
        (("apply", "--workers", "many"), "'many'"),
        (("apply", "--rounding", "up"), "'floor', 'nearest', 'ceil'"),
        (("verify", "only-one"), "PRUNED"),
        (("apply", "scores.pt", "--ratio"), "--ratio"),
    ],
)
def test_wrong_usage_is_one_line_with_a_hint_and_status_2(
    run: Run, words: tuple[str, ...], told: str
) -> None:
    ended = run(*words)
    assert ended.status == 2
    assert ended.stdout == ""
    line = one_line(ended.stderr)
    assert told in line
    assert "--help`" in line


def test_a_bug_says_that_it_is_one(run: Run, fake: FakeOperations) -> None:
    fake.apply = ValueError("unexpected\nlines")
    ended = run(*APPLY)
    assert ended.status == 1
    line = one_line(ended.stderr)
    assert line.startswith("error: this is a bug, ValueError: unexpected lines;")
    assert "SHARDSURGEON_DEBUG=1" in line


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (PermissionError(13, "Permission denied", "/models/x"), "/models/x: Permission denied"),
        (MemoryError(), "memory ran out"),
        (RecursionError("maximum recursion depth exceeded"), "nested too deeply"),
    ],
)
def test_trouble_of_the_machine_is_one_line_and_status_1(
    run: Run, fake: FakeOperations, error: Exception, told: str
) -> None:
    fake.apply = error
    ended = run(*APPLY)
    assert ended.status == 1
    line = one_line(ended.stderr)
    assert told in line
    assert "SHARDSURGEON_DEBUG=1" in line
    assert "bug" not in line


@pytest.mark.parametrize("error", [HeaderError("shard", "problem"), KeyError("bug")])
def test_debugging_shows_the_traceback_before_the_line(
    run: Run, fake: FakeOperations, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setenv("SHARDSURGEON_DEBUG", "1")
    fake.apply = error
    stderr = run(*APPLY).stderr
    assert stderr.startswith("Traceback (most recent call last):")
    assert stderr.splitlines()[-1].startswith("shardsurgeon: error: ")


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143)]
    + ([(signal.SIGHUP, 129)] if hasattr(signal, "SIGHUP") else []),
)
def test_a_stopped_apply_says_that_it_resumes(
    run: Run, fake: FakeOperations, number: signal.Signals, status: int
) -> None:
    fake.apply = lambda *args, **options: signal.raise_signal(number)
    ended = run(*APPLY)
    assert ended.status == status
    assert one_line(ended.stderr) == "stopped; the same command resumes"


def test_another_stopped_command_promises_nothing(run: Run, fake: FakeOperations) -> None:
    fake.inspect = lambda *args, **options: signal.raise_signal(signal.SIGINT)
    ended = run("inspect")
    assert ended.status == 130
    assert one_line(ended.stderr) == "stopped"


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="this system has no SIGHUP")
def test_a_terminal_that_is_closed_under_nohup_stops_nothing(
    run: Run, fake: FakeOperations
) -> None:
    def hang_up(*args: object, **options: object) -> object:
        signal.raise_signal(signal.SIGHUP)
        return APPLIED

    fake.apply = hang_up
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert run(*APPLY).status == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_stop_is_not_caught_as_an_exception_on_its_way(run: Run, fake: FakeOperations) -> None:
    def careless(*args: object, **options: object) -> str:
        with suppress(Exception):
            signal.raise_signal(signal.SIGTERM)
        return "swallowed"

    fake.apply = careless
    assert run(*APPLY).status == 143


def test_the_handlers_of_the_caller_come_back(run: Run) -> None:
    before = signal.getsignal(signal.SIGTERM)
    run(*APPLY)
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_signal_that_the_parent_ignores_stays_ignored(run: Run, fake: FakeOperations) -> None:
    def stop(model: str | None, **_: object) -> InspectReport:
        signal.raise_signal(signal.SIGINT)
        return INSPECTED

    fake.inspect = stop
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert run("inspect").status == 0
    finally:
        signal.signal(signal.SIGINT, before)


def in_a_shell(code: str, **options: object) -> subprocess.CompletedProcess[str]:
    """Run a program with the command line, whose operations are stand-ins."""
    prelude = (
        "import sys; from shardsurgeon.operations import inspect as module;"
        "from tests.cli.standins import *;"
        "module.inspect = lambda model, **_: INSPECTED; from shardsurgeon.cli.main import main;"
    )
    return in_python(prelude + code, **options)


def test_a_name_that_the_console_cannot_spell_is_escaped() -> None:
    code = (
        "import dataclasses;"
        "report = dataclasses.replace(INSPECTED, name='K\\udcff\\u2192');"
        "module.inspect = lambda model, **_: report;"
        "sys.stdout.reconfigure(encoding='cp1252'); sys.exit(main(['inspect']))"
    )
    done = in_a_shell(code, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("K\\udcff\\u2192: kimi_k25")


# Words from outside


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("Authorization: Bearer hf_" + "aB3dE6gH9jK2mN5p", "Authorization: Bearer ***"),
        ("etag hf_" + "aB3dE6gH9jK2mN5p x", "etag hf_*** x"),
        ("basic dXNlcjpwYXNzd29yZA== x", "basic *** x"),
        ("https://s/a?X-Amz-Signature=0af1&b=1", "https://s/a?X-Amz-Signature=***&b=1"),
        ("https://s/a?b=1&token=secret more", "https://s/a?b=1&token=*** more"),
        ("a title \x1b]0;pwned\x07 here", "a title \\x1b]0;pwned\\x07 here"),
        ("8-bit \x9d and \u202e order", "8-bit \\x9d and \\u202e order"),
        ("basic arithmetic, bearer instruments", "basic arithmetic, bearer instruments"),
        ("layers.0 über 文 🙂 bearer of news", "layers.0 über 文 🙂 bearer of news"),
    ],
)
def test_words_of_files_and_servers_neither_command_a_terminal_nor_tell_a_secret(
    said: str, shown: str, run: Run, fake: FakeOperations
) -> None:
    assert errors.printable(said) == shown
    fake.apply = HeaderError("model-1.safetensors", said)
    assert one_line(run(*APPLY).stderr) == f"error: model-1.safetensors: {shown}"
    fake.inspect = replace(INSPECTED, notes=(said,))
    assert shown.split()[0] in run("inspect").stdout
    for output in (run("inspect").stdout, run("inspect", "--json").stdout):
        assert not set(output) & {"\x1b", "\x07", "\x9d", "\u202e"}
        assert "aB3dE6gH9jK2mN5p" not in output and "0af1" not in output


@pytest.mark.parametrize(
    "said", ['a?token=s3cret"quoted" b', "a?token=s3cret\\", "\x1b[0m hf_" + "aB3dE6gH9jK2mN5p"]
)
def test_a_secret_in_a_report_leaves_the_json_whole(
    said: str, run: Run, fake: FakeOperations
) -> None:
    fake.inspect = replace(INSPECTED, notes=(said,))
    (note,) = json.loads(run("inspect", "--json").stdout)["notes"]
    hidden = said.replace("s3cret", "***").replace("aB3dE6gH9jK2mN5p", "***")
    assert note == hidden
