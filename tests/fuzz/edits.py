"""JSON changed where it stands: bytes that say which values become which odd ones.

A fuzzer that mutates text seldom gets past the parser; here every input is a document with a few
values, keys or members replaced, so that it tries what comes behind.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from copy import deepcopy
from typing import Any

Place = tuple[str | int, ...]

ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 7, 8, 9, 2**31, 2**63, 10**400, 1.0, 24.0, 0.5, -0.0,
    float("nan"), float("inf"), "", "8", "x", "*", "re:", "re:.*", "(a+)+$", "\x1b]0;t\x07",
    "\ud800",
    "layers.1.experts.1", "model.layers.1.mlp.experts.1.up_proj", "../x", "a" * 500,
    [], [None], [1], [8, 8, 8, 8], [-1], ["x"], [[]], [[[1]]], [True], {}, {"x": 8}, {"": None},
    {"0": [0, 1]}, {"x": {"y": [1]}}, [{"layer": 1, "expert": 0}], list(range(16)),
)  # fmt: skip


def edited(documents: Sequence[Any], data: bytes, words: Sequence[str]) -> Any:
    """One of the documents with changes: the first byte says which, four more say each change.

    words: keys that a new member may have.
    """
    document = deepcopy(documents[data[0] % len(documents)] if data else documents[0])
    for at in range(1, len(data) - 3, 4):
        kind, *chosen = data[at : at + 4]
        places = list(places_in(document))
        place = places[(chosen[0] << 8 | chosen[1]) % len(places)]
        document = _changed(document, place, kind, chosen[2], words)
    return document


def places_in(value: Any, place: Place = ()) -> Iterator[Place]:
    """The place of every value, the whole first. Of a long list the first three are enough."""
    yield place
    if isinstance(value, dict):
        for key, item in value.items():
            yield from places_in(item, (*place, key))
    elif isinstance(value, list):
        for number, item in enumerate(value[:3]):
            yield from places_in(item, (*place, number))


def put(document: Any, place: Place, value: Any) -> Any:
    """The document with another value in a place."""
    if not place:
        return value
    holder = document
    for key in place[:-1]:
        holder = holder[key]
    holder[place[-1]] = value
    return document


def _changed(document: Any, place: Place, kind: int, choice: int, words: Sequence[str]) -> Any:
    holder = document
    for key in place:
        holder = holder[key]
    odd = deepcopy(ODD[choice % len(ODD)])
    if kind % 4 == 1 and isinstance(holder, dict):
        other = deepcopy(ODD[kind // 4 % len(ODD)])  # later changes may go into it
        return put(document, (*place, words[choice % len(words)]), other)
    if kind % 4 == 2 and isinstance(holder, list) and len(holder) < 64:
        holder.append(odd)
        return document
    if kind % 4 == 3 and place:
        inner = document
        for key in place[:-1]:
            inner = inner[key]
        del inner[place[-1]]
        return document
    return put(document, place, odd)


def as_json(document: Any) -> bytes:
    """The text of a document; surrogates and what JSON lacks as Python spells them."""
    return json.dumps(document).encode()
