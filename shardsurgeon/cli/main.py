"""The command group, and the one place that turns errors into a line and an exit status."""

from __future__ import annotations

import gc
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from itertools import takewhile
from types import FrameType
from typing import Any

import click

from shardsurgeon._version import __version__
from shardsurgeon.cli.apply import apply_command
from shardsurgeon.cli.calibrate import calibrate_command
from shardsurgeon.cli.completion import add_completion, complete, completion_command
from shardsurgeon.cli.env import env_command
from shardsurgeon.cli.evaluate import evaluate_command
from shardsurgeon.cli.families import families_command
from shardsurgeon.cli.fit import fit_command
from shardsurgeon.cli.inspect import inspect_command
from shardsurgeon.cli.materialize import materialize_command
from shardsurgeon.cli.options import InOrder
from shardsurgeon.cli.output import as_text
from shardsurgeon.cli.plan import plan_command
from shardsurgeon.cli.probe import probe_command
from shardsurgeon.cli.progress import PROGRAM
from shardsurgeon.cli.push import push_command
from shardsurgeon.cli.report import report_command
from shardsurgeon.cli.run import run_command
from shardsurgeon.cli.scores import scores_commands
from shardsurgeon.cli.streams import StdoutLost, watched_streams
from shardsurgeon.cli.verify import verify_command
from shardsurgeon.errors import (
    ShardSurgeonError,
    UndeclaredFamilyError,
    UsageError,
    WorkError,
    printable,
)
from shardsurgeon.layerwise.channels import follows
from shardsurgeon.reports import document, failure

DEBUG_VARIABLE = "SHARDSURGEON_DEBUG"
# What shells call the end of a program whose reader left: 128 and the number of SIGPIPE.
_READER_LEFT = 141
# What a command that was stopped leaves, where its work does not say it.
_RESUMING: dict[str | None, str] = {
    apply_command.name: "the same command resumes",
    calibrate_command.name: "the same command resumes",
    evaluate_command.name: "the same command resumes",
    materialize_command.name: "the same command resumes",
    probe_command.name: "the same command resumes",
    run_command.name: "the same command resumes",
    push_command.name: "what is uploaded is kept there; the same command resumes",
}
_ASK_FOR_TRACEBACK = f"set {DEBUG_VARIABLE}=1 for the traceback"


class Stopped(BaseException):
    """SIGINT, SIGTERM or SIGHUP as an exception that `except Exception` does not catch."""

    def __init__(self, exit_status: int) -> None:
        super().__init__(exit_status)
        self.exit_status = exit_status
        self.command: str | None = None


class _Commands(InOrder):
    """The commands. A Stopped that leaves one of them carries its name."""

    def invoke(self, ctx: click.Context) -> Any:
        _require_folder()
        try:
            return super().invoke(ctx)
        except Stopped as stopped:
            stopped.command = ctx.invoked_subcommand
            raise
        except BrokenPipeError as error:
            # None of stdout's: click would end without a word.
            raise WorkError("", f"a pipe or a connection broke ({error.strerror})") from error


@click.group(
    cls=_Commands,
    commands=[
        inspect_command,
        fit_command,
        plan_command,
        apply_command,
        materialize_command,
        verify_command,
        push_command,
        scores_commands,
        calibrate_command,
        evaluate_command,
        probe_command,
        report_command,
        run_command,
        families_command,
        env_command,
        completion_command,
    ],
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80},
    invoke_without_command=True,
    subcommand_metavar="COMMAND ...",
    epilog="Exit status: 0 done, 1 the work failed or a check found differences, 2 bad input.",
)
@click.version_option(__version__, "--version", "-V", prog_name=PROGRAM)
@click.pass_context
def cli(context: click.Context) -> None:
    """\b
    Remove whole experts from a Mixture-of-Experts checkpoint. In its folder:
      shardsurgeon plan scores.pt --ratio 0.5,0.65,0.75
      shardsurgeon apply scores.pt --ratio 0.65
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


add_completion(cli)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; arguments: default sys.argv[1:].

    Whatever goes wrong ends here as one line on stderr, and with `--json` as a document on stdout,
    unless that holds a report already. With SHARDSURGEON_DEBUG=1 the traceback comes before it.
    """
    if arguments is None and (answer := complete()):
        return answer(cli)
    words = sys.argv[1:] if arguments is None else arguments
    as_json = "--json" in takewhile(lambda word: word != "--", words)
    with watched_streams() as stdout, _told_by_the_first_rank(words):
        end = _run(words, as_json)
        if isinstance(end, int):
            return end
        _say(end.line)
        if as_json and not stdout.used:
            with suppress(StdoutLost):
                click.echo(as_text(document({"error": end.document})))
        return end.status


@contextmanager
def _told_by_the_first_rank(words: Sequence[str]) -> Iterator[None]:
    """For the time of a `with`, print nothing where torchrun calibrates and this is not rank 0."""
    if list(words[:1]) != [calibrate_command.name] or not follows():
        yield
        return
    with open(os.devnull, "w") as nothing, redirect_stdout(nothing), redirect_stderr(nothing):
        yield


@dataclass(frozen=True)
class _Failure:
    """How a command ended that is not done. line: what stderr is told; the rest is the document."""

    line: str
    where: str
    problem: str
    remedy: str
    status: int

    @property
    def document(self) -> dict[str, Any]:
        """The `error` of the document."""
        return failure(self.where, self.problem, self.remedy, self.status)


def _run(words: Sequence[str], as_json: bool) -> int | _Failure:
    # A plan is made of half a million small values without a cycle; at the default threshold the
    # collector spends a quarter of the time looking for one.
    gc.set_threshold(100_000)
    try:
        _require_words(words)
        with _signals_as_stopped():
            status = cli.main(words, prog_name=PROGRAM, standalone_mode=False, obj=tuple(words))
        return status if isinstance(status, int) else 0
    except Stopped as stopped:
        return _stop(stopped)
    except click.Abort:
        return _stop(Stopped(130))
    except StdoutLost as lost:
        if lost.reader_left:
            return _READER_LEFT
        problem = f"cannot be written ({lost})"
        return _failure("stdout", problem, "", WorkError.exit_status)
    except Exception as error:
        if os.environ.get(DEBUG_VARIABLE) == "1":
            click.echo(printable(traceback.format_exc()), err=True, nl=False)
        failed = _failure(*describe(error))
        if isinstance(error, UndeclaredFamilyError) and not as_json:
            _say(failed.line)
            with suppress(StdoutLost):
                click.echo(error.skeleton, nl=False)
            return failed.status
        return failed


def _failure(where: str, problem: str, remedy: str, status: int) -> _Failure:
    line = f"error: {where}: {problem}" if where else f"error: {problem}"
    return _Failure(f"{line}; {remedy}" if remedy else line, where, problem, remedy, status)


def _require_words(arguments: Sequence[str]) -> None:
    """Raise UsageError for an empty word, which a variable of a script that is not set leaves."""
    for before, word in zip(["", *arguments], arguments, strict=False):
        option, given, value = word.partition("=")
        if not word or (option.startswith("--") and given and not value):
            named = option or (before if before.startswith("-") else "an argument")
            raise UsageError(named, "is given an empty word", "leave it out or give it a value")


def _require_folder() -> None:
    """Raise UsageError where the current folder is gone: libraries fail in it in odd ways."""
    try:
        os.getcwd()
    except OSError as error:
        problem = f"cannot be used ({error.strerror})"
        raise UsageError("the current folder", problem, "go to one that exists") from error


def describe(error: Exception) -> tuple[str, str, str, int]:
    """Where, problem and remedy of an error, and the exit status that it ends a command with."""
    if isinstance(error, ShardSurgeonError):
        return error.where, error.problem, error.remedy, error.exit_status
    if isinstance(error, click.UsageError):
        path = error.ctx.command_path if error.ctx else PROGRAM
        return "", error.format_message().rstrip("."), f"see `{path} --help`", error.exit_code
    if isinstance(error, click.ClickException):
        return "", error.format_message(), "", error.exit_code
    return *_unexpected(error), WorkError.exit_status


def _unexpected(error: Exception) -> tuple[str, str, str]:
    if isinstance(error, OSError):
        what = error.strerror or str(error) or type(error).__name__
        return str(error.filename or ""), what, _ASK_FOR_TRACEBACK
    if isinstance(error, MemoryError):
        return "", "memory ran out", _ASK_FOR_TRACEBACK
    if isinstance(error, ImportError):
        cause = error.__cause__ if isinstance(error.__cause__, ImportError) else error
        remedy = f"give the program more memory, or install it anew; {_ASK_FOR_TRACEBACK}"
        return "", f"a library cannot be loaded ({cause})", remedy
    if isinstance(error, RuntimeError) and "start new thread" in str(error):
        remedy = "raise the limits of memory and processes, or give `apply` fewer --workers"
        return "", "the system starts no more threads", remedy
    if isinstance(error, RecursionError):
        return "", "input is nested too deeply", _ASK_FOR_TRACEBACK
    problem = f"this is a bug, {type(error).__name__}: {error}"
    return "", problem, f"{_ASK_FOR_TRACEBACK} and report it"


def _stop(stopped: Stopped) -> _Failure:
    # A note says what is kept, or that the result is complete and there is nothing to resume.
    notes = getattr(stopped, "__notes__", [])
    if stopped.command in _RESUMING:
        notes = notes or [_RESUMING[stopped.command]]
    line = "; ".join(["stopped", *notes[:1]])
    return _Failure(line, "", "stopped", "; ".join(notes[:1]), stopped.exit_status)


def _say(text: str) -> None:
    click.echo(f"{PROGRAM}: {printable(' '.join(text.split()))}", err=True)


@contextmanager
def _signals_as_stopped() -> Iterator[None]:
    """Make SIGINT and SIGTERM raise Stopped, with the status that shells give such an end.

    SIGHUP too: a terminal that is closed stops what runs in it, and nohup has it ignored.
    """
    statuses = {signal.SIGINT: 130, signal.SIGTERM: 143}
    if hasattr(signal, "SIGHUP"):
        statuses[signal.SIGHUP] = 129

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(statuses[signal.Signals(number)])

    previous = {}
    try:
        for number in statuses:
            # Only the main thread may; and a signal that a parent shell ignores stays ignored.
            if signal.getsignal(number) is not signal.SIG_IGN:
                previous[number] = signal.signal(number, stop)
    except ValueError:
        pass
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
