"""What the words behind options become: numbers, sizes, ratios, choices."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from enum import StrEnum
from typing import Any

import click
from click.core import ParameterSource

from shardsurgeon.errors import UsageError
from shardsurgeon.units import parse_ratios, parse_size, percent


class OfMachine(click.Option):
    """An option that an environment variable may give, which messages then name.

    For where and how a command works. What decides which experts go, and where results are
    written, is said by the command itself.
    """

    def get_error_hint(self, ctx: click.Context | None) -> str:
        """The variable where the value is from there, else the option."""
        if ctx is not None and of_variable(ctx, self.name):
            return str(self.envvar)
        return super().get_error_hint(ctx)


def of_variable(context: click.Context, parameter: str | None) -> bool:
    """Whether a parameter's value is from the environment."""
    return context.get_parameter_source(parameter or "") is ParameterSource.ENVIRONMENT


def shard_size(context: click.Context, parameter: click.Parameter, text: str) -> int | None:
    """Turn the value of --max-shard-size into bytes; None keeps the source's shards."""
    return None if text == "source" else parse_size(text, "--max-shard-size")


def at_least(smallest: int) -> Callable[[click.Context, click.Parameter, int | None], int | None]:
    """A callback that refuses numbers below `smallest`."""

    def check(context: click.Context, parameter: click.Parameter, value: int | None) -> int | None:
        if value is not None and value < smallest:
            named = of_variable(context, parameter.name)
            where = str(parameter.envvar) if named else parameter.opts[0]
            raise UsageError(where, f"{value} is less than {smallest}")
        return value

    return check


def ratios(
    context: click.Context, parameter: click.Parameter, text: str | None
) -> tuple[float, ...]:
    """A callback that turns `0.25,50%` into numbers, and no text into none."""
    return () if text is None else parse_ratios(text, parameter.opts[0])


def kept(context: click.Context, parameter: click.Parameter, text: str | None) -> int | None:
    """A callback that turns `72` into a number of experts, and knows a share where it sees one."""
    if text is None or re.fullmatch(r"\s*[+-]?\d{1,9}\s*", text, re.ASCII):
        return None if text is None else int(text)
    problem, how = f"'{text}' is not a number of experts", "write it like 72"
    with suppress(UsageError):
        share, *more = parse_ratios(text)
        meant = f"did you mean --ratio {1 - share:.6g}, which keeps {percent(share)} of them?"
        how = how if more else meant
    raise UsageError(parameter.opts[0], problem, how)


def size(context: click.Context, parameter: click.Parameter, text: str | None) -> int | None:
    """A callback that turns `20GB` into bytes."""
    return None if text is None else parse_size(text, parameter.opts[0])


def settings(texts: Iterable[str]) -> dict[str, float]:
    """The numbers of `min_p=0.05,top_k=20`, in one text or in several, by name.

    Raises UsageError, naming --sampling, for other text and for a name that stands there twice.
    """
    found: dict[str, float] = {}
    for entry in (entry for text in texts for entry in text.split(",")):
        word, _, number = entry.partition("=")
        name = word.strip().replace("-", "_")
        if name in found:
            raise UsageError("--sampling", f"{name} stands there twice", "say it once")
        try:
            found[name] = float(number)
        except ValueError:
            problem = f"'{entry}' is not NAME=NUMBER"
            raise UsageError("--sampling", problem, "write it like min_p=0.05") from None
    return found


def choice(kind: type[StrEnum]) -> Callable[[click.Context, click.Parameter, Any], StrEnum | None]:
    """A callback that turns the text of a choice into a value of `kind`."""
    return lambda context, parameter, text: None if text is None else kind(text)
