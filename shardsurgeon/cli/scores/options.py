"""The words that several commands of `scores` share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])


def out_option(command: Command) -> Command:
    """Add the required `-o FILE`, received as `out`."""
    return click.option(
        "-o",
        "out",
        metavar="FILE",
        required=True,
        help="Score file to write: .safetensors, .npz, .json, or with torch .pt.",
    )(command)


def model_argument(command: Command) -> Command:
    """Add the optional positional MODEL."""
    return click.argument("model", required=False)(command)
