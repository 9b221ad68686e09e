"""What a shell completes at Tab, and `shardsurgeon completion`, which prints the script for it.

A completion is quick and says nothing else, whatever is wrong: no error, no warning.
"""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from functools import partial
from pathlib import Path
from typing import Any

import click
from click.shell_completion import (
    CompletionItem,
    ShellComplete,
    get_completion_class,
    shell_complete,
)

from shardsurgeon.cli.help import Command

PROGRAM = "shardsurgeon"
_VARIABLE = "_SHARDSURGEON_COMPLETE"
_RATIOS = ("0.25", "0.5", "0.65", "0.75")
# Reading a larger score file for its metrics takes longer than one waits at Tab.
_LARGEST = 64 << 20
# A name from a file that a shell may be shown.
_NAME = re.compile(r"[\w.-]{1,100}")

Complete = Callable[[click.Context, str], list[CompletionItem]]


def _files(context: click.Context, begun: str) -> list[CompletionItem]:
    return [CompletionItem(begun, type="file")]


def _folders(context: click.Context, begun: str) -> list[CompletionItem]:
    return [CompletionItem(begun, type="dir")]


def _auto_or_files(context: click.Context, begun: str) -> list[CompletionItem]:
    # Not both: where a shell is asked for files, it shows nothing else.
    return (
        [CompletionItem("auto")] if begun and "auto".startswith(begun) else _files(context, begun)
    )


def _ratios(context: click.Context, begun: str) -> list[CompletionItem]:
    before, comma, last = begun.rpartition(",")
    fitting = (ratio for ratio in _RATIOS if ratio.startswith(last))
    return [CompletionItem(f"{before}{comma}{ratio}") for ratio in fitting]


def _sizes(context: click.Context, begun: str) -> list[CompletionItem]:
    return [CompletionItem(size) for size in ("source", "5GB", "10GB") if size.startswith(begun)]


def _metrics(context: click.Context, begun: str) -> list[CompletionItem]:
    """The metrics of the score file that the line names."""
    named = [context.params.get(name) for name in ("scores", "file", "a")]
    named += context.params.get("words") or ()
    # Where the option is the last word, the words before it are not sorted out yet.
    found = (name for name in [*named, *context.args] if name and Path(name).is_file())
    file = next(found, None)
    if file is None or Path(file).stat().st_size > _LARGEST:
        return []
    from shardsurgeon.scores.files import read_scores

    names = read_scores(file).choices
    return [CompletionItem(n) for n in names if n.startswith(begun) and _NAME.fullmatch(n)]


# Option or positional → how its value is completed. Choices complete themselves.
_COMPLETED: dict[str, Complete] = {
    **dict.fromkeys(("scores", "file", "a", "b", "source", "files", "words"), _files),
    **dict.fromkeys(("--out", "--plan", "--dataset", "--extend", "--card", "--evaluation"), _files),
    **dict.fromkeys(("--prompts", "--against", "--scores", "--probe"), _files),
    "place": _files,
    **dict.fromkeys(("--include", "--exclude"), _files),
    **dict.fromkeys(("model", "places", "pruned", "view", "--model", "--tokenizer"), _folders),
    "--family": _auto_or_files,
    "--metric": _metrics,
    "--ratio": _ratios,
    "--max-shard-size": _sizes,
}
_OF_COMMAND: dict[tuple[str, str], Complete] = {
    ("apply", "--out"): _folders,
    ("materialize", "--out"): _folders,
}


class _Completed(click.types.StringParamType):
    """Text, with what a shell completes."""

    def __init__(self, complete: Complete) -> None:
        self._complete = complete

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        try:
            with redirect_stderr(io.StringIO()):
                return self._complete(ctx, incomplete)
        except Exception:  # nothing that is wrong with a file is said at Tab
            return []


def complete() -> Callable[[click.Group], int] | None:
    """What answers a shell that asks for completions, in place of a command; else None."""
    instruction = os.environ.get(_VARIABLE)
    return partial(_answer, instruction) if instruction else None


def _answer(instruction: str, group: click.Group) -> int:
    """Print the completions and return the exit status. Never says what goes wrong."""
    try:
        status = shell_complete(group, {}, PROGRAM, _VARIABLE, instruction)
        sys.stdout.flush()
    except (Exception, KeyboardInterrupt):
        return 1
    return status


def add_completion(group: click.Group) -> None:
    """Make shells complete the values of all options and positionals below a group."""
    for command in _commands(group):
        for parameter in command.params:
            name = next((n for n in parameter.opts if n.startswith("--")), parameter.name or "")
            complete = _OF_COMMAND.get((command.name or "", name), _COMPLETED.get(name))
            if complete is not None and isinstance(parameter.type, click.types.StringParamType):
                parameter.type = _Completed(complete)


def _commands(group: click.Group) -> Iterator[click.Command]:
    for command in group.commands.values():
        yield command
        if isinstance(command, click.Group):
            yield from _commands(command)


@click.command("completion", cls=Command)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion_command(context: click.Context, shell: str) -> None:
    """Print the script that completes this program's words at Tab.

    \b
    Examples:
      shardsurgeon completion bash
      shardsurgeon completion zsh
      shardsurgeon completion fish

    Completes commands, options and their choices, files and folders, ratios, and
    the metrics of the score file on the line. For bash (4.4 or newer), put
    `eval "$(shardsurgeon completion bash)"` into ~/.bashrc; for zsh the same
    with zsh into ~/.zshrc; for fish, save it as
    ~/.config/fish/completions/shardsurgeon.fish.
    """
    kind: type[Any] | None = get_completion_class(shell)
    assert kind is not None, "click knows the three"
    script = kind(context.find_root().command, {}, PROGRAM, _VARIABLE)
    # The class's own `source` starts a bash, to look at its version.
    click.echo(ShellComplete.source(script))
