"""The flags of a push, and how their words become one frozen destination."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from shardsurgeon.errors import UsageError

if TYPE_CHECKING:
    from shardsurgeon.operations.publishing import Destination

Command = TypeVar("Command", bound=Callable[..., Any])

_WORDS = ("private", "revision", "create_pr", "card", "with_card")


def push_options(command: Command) -> Command:
    """Add what says how to push: the command gets it as `pushed`, name → value."""

    @functools.wraps(command)
    def with_words(*args: Any, **given: Any) -> Any:
        pushed = {word: given.pop(word) for word in _WORDS}
        return command(*args, pushed=pushed, **given)

    for option in reversed(_OPTIONS):
        with_words = option(with_words)
    return with_words  # type: ignore[return-value]


def destination(repo_id: str | None, pushed: dict[str, Any]) -> Destination | None:
    """Where to push to; None where no repository was named.

    Raises UsageError for words of a push without one, and for those that contradict each other.
    """
    if repo_id is not None:
        from shardsurgeon.operations.publishing import Destination

        return Destination(repo_id, **pushed)
    for word, (flag, silent) in _SILENT.items():
        if pushed[word] != silent:
            problem = "is about a push, and nothing is pushed"
            raise UsageError(flag, problem, "name a repository with --push-to-hub")
    return None


# What each word is called, and what it holds where the user did not say it.
_SILENT: dict[str, tuple[str, object]] = {
    "private": ("--private", False),
    "revision": ("--revision", None),
    "create_pr": ("--create-pr", False),
    "card": ("--card", None),
    "with_card": ("--no-card", True),
}
_OPTIONS = [
    click.option("--private", is_flag=True, help="Make the repository private, if it is made."),
    click.option(
        "--revision",
        metavar="REV",
        help="Branch to push to; made where it is missing.  [default: main]",
    ),
    click.option("--create-pr", is_flag=True, help="Open a pull request with it."),
    click.option("--card", metavar="FILE", help="Use this README.md instead of making one."),
    click.option(
        "--no-card", "with_card", flag_value=False, default=True, help="Make no README.md."
    ),
]
