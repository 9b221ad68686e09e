"""TOML files of a user's own: family declarations and recipes. Both may come from strangers."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from shardsurgeon.errors import InputError
from shardsurgeon.storage.limits import Limit, read_limited

# The standard library takes time that grows with the square of a dotted key.
_MAX_LINE = 16_000


def read_toml(path: str | Path, limit: Limit, error: type[InputError], what: str) -> dict[str, Any]:
    """A file's tables. what: says why none is larger. Raises `error`, naming the file."""
    raw = read_limited(path, limit, error, what)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as reason:
        raise error(path, f"cannot be read: {reason}") from reason
    longest = max(map(len, text.splitlines()), default=0)
    if longest > _MAX_LINE:
        problem = f"has a line of {longest:,} characters, at most {_MAX_LINE:,} are read"
        raise error(path, problem, "break its lists into lines")
    return parse_toml(text, path, error)


def parse_toml(text: str, where: str | Path, error: type[InputError]) -> dict[str, Any]:
    """The tables of a text. Raises `error`, naming `where`, for what is not TOML."""
    try:
        return tomllib.loads(text)
    except ValueError as reason:  # TOML's own error is one, and so is that of too many digits
        raise error(where, f"not TOML: {reason}") from reason
    except RecursionError as reason:
        raise error(where, "is nested too deeply") from reason
