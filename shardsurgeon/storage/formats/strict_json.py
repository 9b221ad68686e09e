"""JSON objects from outside, read once and strictly: repeated keys, for one, are refused.

Headers and indexes are read here. Where white space and the spelling of numbers must survive,
json_edit reads instead.
"""

from __future__ import annotations

import json
import reprlib
from dataclasses import dataclass

from shardsurgeon.errors import InputError


@dataclass(frozen=True, slots=True)
class Repeated:
    """Stands in the result for an inner object that names `key` twice.

    The caller, who knows what the object describes, reports it and can say where it is.
    """

    key: str


def read_object(
    raw: bytes, where: str, subject: str, error: type[InputError], remedy: str
) -> dict[str, object]:
    """The members of a JSON object, in order.

    raw: the whole text; subject: what messages call it, such as "the header". Raises `error`
    for bytes that are not UTF-8 or not JSON, for nesting too deep to follow, and for anything
    but an object whose keys differ. -0 is read as a float, as other readers do.
    """
    # A hook for integers doubles the time: only where there may be a -0.
    parse_int = _integer if b"-0" in raw else None
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_unrepeated, parse_int=parse_int)
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


_BRIEF = reprlib.Repr()
_BRIEF.maxstring = 160
_BRIEF.maxlist = 8
