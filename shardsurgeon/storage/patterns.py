"""Regular expressions of strangers, run so that none takes for ever.

The lists in a downloaded config hold patterns that are matched against every name of a model, and
Python's engine tries every way in which a pattern can fit. A pattern with too many ways is refused
before it is run; one that is slow all the same is stopped between two names.
"""

from __future__ import annotations

import importlib
import math
import re
import time
import warnings
from collections.abc import Iterable
from typing import Any, NoReturn

from shardsurgeon.errors import ConfigError, InputError

# Longer than the names of tensors are.
LONGEST_NAME = 200
_MOST_CHARACTERS = 10_000
# No name takes more than a few seconds: a way of repetitions takes 1.5 ns, any other 20 ns.
_MOST_WAYS = 3_000_000_000
_MOST_CHOICES = 100_000_000
# A name takes a microsecond. What takes this long counts, and so much of it is too much.
_SLOW_SECONDS = 0.005
_MOST_SLOW_SECONDS = 8.0
_REMEDY = "write it with fewer * and + in it"
_PARSER: Any = importlib.import_module("re._parser")
_WITHOUT_END = _PARSER.MAXREPEAT


class QuickPattern:
    """A compiled pattern whose matching ends in time; as `re.Pattern`, for names."""

    def __init__(self, pattern: str, where: str, error: type[InputError] = ConfigError) -> None:
        """Raises `error`, naming the file `where`, for a pattern that `require_quick_pattern`
        refuses."""
        self._compiled = require_quick_pattern(pattern, where, error)
        self._freedom = _freedom(_parsed(pattern))
        self._where = where
        self._error = error
        self._slow = 0.0

    def match(self, name: str) -> re.Match[str] | None:
        """Whether the pattern fits the beginning of a name. Raises the error of a slow pattern."""
        return self._timed(self._compiled.match, name)

    def fullmatch(self, name: str) -> re.Match[str] | None:
        """Whether it fits a whole name. Raises the error of a slow pattern."""
        return self._timed(self._compiled.fullmatch, name)

    def search(self, name: str) -> re.Match[str] | None:
        """Whether it fits anywhere in a name. Raises the error of a slow pattern."""
        return self._timed(self._compiled.search, name)

    def _timed(self, call: Any, name: str) -> re.Match[str] | None:
        if len(name) > LONGEST_NAME and _ways(*self._freedom, len(name)) > _MOST_WAYS:
            problem = f"can take for ever on a name of {len(name):,} characters"
            _refuse(self._compiled.pattern, problem, self._where, self._error)
        begun = time.thread_time()
        found: re.Match[str] | None = call(name)
        took = time.thread_time() - begun
        if took > _SLOW_SECONDS:
            self._slow += took
            if self._slow > _MOST_SLOW_SECONDS:
                _refuse(self._compiled.pattern, "takes too long", self._where, self._error)
        return found


def require_quick_pattern(
    pattern: str, where: str, error: type[InputError] = ConfigError
) -> re.Pattern[str]:
    """The pattern compiled, if it fits a name of up to LONGEST_NAME characters in few ways.

    Raises `error`, naming the file `where`, for what is no regular expression, refers back to a
    group, repeats what can itself be read in several ways (`(a+)+`), or has so many repetitions
    one after the other that a name takes longer than a few seconds.
    """
    if len(pattern) > _MOST_CHARACTERS:
        _refuse(pattern, f"has {len(pattern):,} characters", where, error)
    try:
        freedom = _freedom(_parsed(pattern))
        with warnings.catch_warnings():  # of what a later Python reads in another way
            warnings.simplefilter("ignore")
            compiled = re.compile(pattern)
    except (re.error, OverflowError) as cause:
        _refuse(pattern, f"is no regular expression ({cause})", where, error)
    except RecursionError:
        _refuse(pattern, "is nested too deeply", where, error)
    except _EndlessError:
        _refuse(pattern, "can take for ever", where, error)
    if _ways(*freedom, LONGEST_NAME) > _MOST_WAYS:
        _refuse(pattern, "can take for ever", where, error)
    return compiled


def _parsed(pattern: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _PARSER.parse(pattern)


def _ways(repeats: int, choices: int, length: int) -> int:
    """In how many ways a pattern can fit a name of so many characters, at most."""
    return math.comb(length + repeats, repeats) * choices


class _EndlessError(Exception):
    """A part of a pattern can be read in more ways than anyone can count."""


def _freedom(items: Iterable[tuple[Any, Any]]) -> tuple[int, int]:
    """What a part of a pattern leaves open: (repetitions without an end, other choices).

    Raises _EndlessError for more than polynomially many.
    """
    repeats, choices = 0, 1
    for kind, about in items:
        inner, factor = _freedom_of(str(kind), about)
        repeats, choices = repeats + inner, choices * factor
        if choices > _MOST_CHOICES or repeats > LONGEST_NAME:
            raise _EndlessError
    return repeats, choices


def _freedom_of(kind: str, about: Any) -> tuple[int, int]:
    match kind:
        case "LITERAL" | "NOT_LITERAL" | "ANY" | "IN" | "AT":
            return 0, 1
        case "SUBPATTERN":
            return _freedom(about[-1])
        case "ATOMIC_GROUP":
            return _freedom(about)
        case "ASSERT" | "ASSERT_NOT":
            return _freedom(about[1])
        case "BRANCH":
            found = [_freedom(branch) for branch in about[1]]
            return max(repeats for repeats, _ in found), sum(choices for _, choices in found)
        case "MAX_REPEAT" | "MIN_REPEAT" | "POSSESSIVE_REPEAT":
            return _freedom_repeated(*about)
    raise _EndlessError  # a reference to a group, or what a later Python knows


def _freedom_repeated(least: int, most: int, body: Any) -> tuple[int, int]:
    repeats, choices = _freedom(body)
    if (repeats or choices > 1) and most > 1:
        if most > 8:
            raise _EndlessError
        return repeats * most, choices**most * (most - least + 1)
    if most is _WITHOUT_END:
        return 1, 1
    # Even what is repeated a fixed number of times takes its time.
    return repeats, choices * max(most, most - least + 1)


def _refuse(pattern: str, problem: str, where: str, error: type[InputError]) -> NoReturn:
    shown = pattern if len(pattern) <= 80 else f"{pattern[:80]}…"
    raise error(where, f"pattern {shown!r} {problem}", _REMEDY)
