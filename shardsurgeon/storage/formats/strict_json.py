"""JSON from outside, read once and strictly: what Python's json lets pass is refused.

`read_object` reads large files and `parse_json` small ones; `CheckedJson` and the functions below
it tell what a value is. Where white space and the spelling of numbers must survive an edit,
`json_edit` reads instead.
"""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from typing import Any, NoReturn, TypeGuard

from shardsurgeon.errors import InputError
from shardsurgeon.storage.limits import MAX_DEPTH, MAX_EXPERTS, Limit, json_problem, require_json


@dataclass(frozen=True, slots=True)
class Repeated:
    """Stands in the result for an inner object that names `key` twice.

    The caller, who knows what the object describes and where it is, reports it.
    """

    key: str


def read_object(
    raw: bytes, where: str, subject: str, error: type[InputError], remedy: str, limit: Limit
) -> dict[str, object]:
    """The members of a JSON object, in order.

    raw: the whole text, a byte order mark before it or not; subject: what messages call it, such
    as "the header". Raises `error` for what is beyond the limit of its kind, for bytes that are
    not UTF-8 or not JSON, for nesting too deep to follow, and for anything but an object whose
    keys differ. -0 is read as a float, as other readers do.
    """
    require_json(raw, limit, where, error)
    # A hook for integers doubles the time: only where there may be a -0.
    parse_int = _integer if _MINUS_ZERO.search(raw) else None
    try:
        text = raw.decode("utf-8-sig")
        value = json.loads(text, object_pairs_hook=_unrepeated, parse_int=parse_int)
    except UnicodeDecodeError as cause:
        raise error(where, f"{subject} is not UTF-8 at byte {cause.start:,}", remedy) from cause
    except RecursionError as cause:
        raise error(where, f"{subject} is nested too deeply", remedy) from cause
    except ValueError as cause:
        raise error(where, f"{subject} is not JSON: {cause}", remedy) from cause
    if isinstance(value, Repeated):
        raise error(where, f"{subject} names {brief(value.key)} twice", remedy)
    if not isinstance(value, dict):
        raise error(where, f"{subject} is {brief(value)}, not a JSON object", remedy)
    return value


def read_records(
    raw: bytes, where: str, subject: str, error: type[InputError], remedy: str, limit: Limit
) -> dict[str, object] | list[object]:
    """The value of a JSON text that is an object, a list of objects or of lists, or JSON lines.

    JSON lines, several objects one after the other, come as the list of them. raw, subject and
    what is raised: as in `read_object`; a byte-order mark is left out.
    """
    require_json(raw, limit, where, error)
    raw = raw.removeprefix(b"\xef\xbb\xbf").strip()
    if raw.startswith(b"["):
        # The check finds a list that ends early and goes on with members of its own.
        value = read_object(b'{"list":' + raw + b"}", where, subject, error, remedy, limit)
        listed = value["list"]
        if len(value) == 1 and isinstance(listed, list) and _are_alike(listed):
            return listed
    if _are_lines(raw):
        return [
            read_object(line, where, f"line {number:,} of {subject}", error, remedy, limit)
            for number, line in enumerate(BytesIO(raw), start=1)
            if line.strip()
        ]
    return read_object(raw, where, subject, error, remedy, limit)


def _are_lines(raw: bytes) -> bool:
    """Whether a text has an object on its first line and begins another one after it.

    Of a text of one object no copy is made: it may be large.
    """
    end = raw.find(b"\n")
    second = re.compile(rb"\s*(.)").match(raw, end + 1)
    one = raw[:end].strip()
    return end > 0 and one[:1] + one[-1:] == b"{}" and second is not None and second[1] == b"{"


def _are_alike(listed: list[object]) -> bool:
    """Whether it lists objects only, or lists only, and at least one."""
    return bool(listed) and any(
        all(isinstance(item, kind) for item in listed) for kind in (dict | Repeated, list)
    )


def no_constant(spelling: str) -> NoReturn:
    """Refuse NaN and the infinities, which Python's json reads and JSON does not have."""
    raise ValueError(f"{spelling} is not a JSON number")


def parse_json(
    raw: bytes,
    limit: Limit,
    *,
    parse_float: Callable[[str], Any] | None = None,
    parse_constant: Callable[[str], Any] = no_constant,
) -> Any:
    """The value of a JSON text in UTF-8, a byte order mark before it or not.

    parse_float, parse_constant: as the standard library takes them. Raises ValueError for what is
    beyond the limit of its kind or not JSON, and for a key that one object has twice,
    RecursionError for nesting too deep to follow.
    """
    if problem := json_problem(raw, limit):
        raise ValueError(problem)
    value = json.loads(
        raw.decode("utf-8-sig"),
        object_pairs_hook=_each_once,
        parse_float=parse_float,
        parse_constant=parse_constant,
    )
    if _depth(value) > MAX_DEPTH:
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels")
    return value


def parse_for_a_hint(raw: bytes, limit: Limit) -> Any:
    """The value of a JSON text for which nothing here answers; None where it cannot be read."""
    if json_problem(raw, limit):
        return None
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    return value if _depth(value) <= MAX_DEPTH else None


def _depth(value: object) -> int:
    """How many containers deep a value is, as far as MAX_DEPTH and one more."""
    level, depth = [value], 0
    while depth <= MAX_DEPTH:
        containers = [item for item in level if isinstance(item, dict | list)]
        if not containers:
            break
        level = [
            inner
            for item in containers
            for inner in (item.values() if isinstance(item, dict) else item)
        ]
        depth += 1
    return depth


class CheckedJson:
    """Typed access to one JSON document; every refusal names the file and the place in it."""

    def __init__(
        self,
        where: str,
        error: type[InputError],
        remedy: str = "",
        wording: str = "{place}: found {kind}, expected {expected}",
    ) -> None:
        """where: the file; error, remedy: what a refusal raises, and says to do.

        wording: how it says that a value is not what it must be; {value} is the value, cut short.
        """
        self.where = where
        self._error = error
        self._remedy = remedy
        self._wording = wording

    def refuse(self, problem: str) -> NoReturn:
        """Raise the error of this document."""
        raise self._error(self.where, problem, self._remedy)

    def as_object(self, value: object, place: str) -> dict[str, Any]:
        """The value, an object. place: its path in the document, as for all of these."""
        if not isinstance(value, dict):
            self._mismatch(value, place, "an object")
        return value

    def member(self, fields: dict[str, Any], key: str, place: str) -> dict[str, Any]:
        """The object under a key of another; place: that of the other, "" for the top."""
        return self.as_object(fields.get(key), f"{place}.{key}".lstrip("."))

    def items(self, value: object, place: str, what: str) -> list[Any]:
        """The value, a list with something in it. what: what it lists."""
        if not isinstance(value, list) or not value:
            self.refuse(f"{place}: not a list of {what}")
        return value

    def count(self, fields: dict[str, Any], key: str, place: str) -> int:
        """How many experts there are: a positive whole number, no larger than for any model."""
        value = fields.get(key)
        if not is_whole_number(value, 1):
            self.refuse(f"{place}.{key}: not a positive whole number".lstrip("."))
        if value > MAX_EXPERTS:
            problem = f"{place}.{key}: {brief(value)}, no model has more than {MAX_EXPERTS:,}"
            self.refuse(problem.lstrip("."))
        return value

    def number(self, value: object, place: str) -> float:
        """A finite number."""
        if isinstance(value, bool) or not isinstance(value, int | float):
            self._mismatch(value, place, "a number")
        number = as_number(value)
        if number is None or not math.isfinite(number):
            self.refuse(f"{place}: too large a number")
        return number

    def text(self, fields: dict[str, Any], key: str, place: str) -> str | None:
        """The text under a key; None where there is none, or null."""
        value = fields.get(key)
        if value is not None and not isinstance(value, str):
            self._mismatch(value, f"{place}.{key}", "text")
        return value

    def _mismatch(self, value: object, place: str, expected: str) -> NoReturn:
        kind = type(value).__name__
        shown = {"place": place, "kind": kind, "value": brief(value), "expected": expected}
        self.refuse(self._wording.format(**shown))


def is_whole_number(value: object, least: int = 0) -> TypeGuard[int]:
    """Whether it is an integer of at least so much; true and false are not."""
    return type(value) is int and value >= least


def as_number(value: object) -> float | None:
    """A number as a float; None for anything else and for an integer beyond all floats."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def is_text(value: object) -> bool:
    """Whether it is a string that UTF-8 can carry: JSON escapes can spell lone surrogates."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def brief(value: object) -> str:
    """A value as a message shows it: however long or deep, cut to a readable length."""
    return _BRIEF.repr(value)


def _each_once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    members = _unrepeated(pairs)
    if isinstance(members, Repeated):
        raise ValueError(f"the key {members.key[:80]!r} stands there twice")
    return members


def _unrepeated(pairs: list[tuple[str, object]]) -> dict[str, object] | Repeated:
    members = dict(pairs)
    if len(members) == len(pairs):
        return members
    seen: set[str] = set()
    for key, _ in pairs:
        if key in seen:
            return Repeated(key)
        seen.add(key)
    raise AssertionError("unreachable")


def _integer(text: str) -> int | float:
    return int(text) if text != "-0" else -0.0


# As a value, or as something like one in a string; not as in `model-00001`.
_MINUS_ZERO = re.compile(rb"-0(?!\d)")
_BRIEF = reprlib.Repr()
_BRIEF.maxstring = 160
_BRIEF.maxlist = 8
