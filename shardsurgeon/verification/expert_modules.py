"""Modules that are alike but for their expert's number, and whether entries tell them apart.

Of 70,000 modules nearly all are experts', and hardly an entry of a quantization list asks which
expert: `re:.*self_attn.*` means all modules of such a group or none. One of them then speaks for
all. Where it cannot be shown that an entry does not tell a group's modules apart, each is asked.

The number stands between dots, or between a dot and the end: a group's names are head, number and
tail, the head ends with a dot and the tail begins with one or is empty.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import NamedTuple

from shardsurgeon.checkpoint.quantization_lists import Reading
from shardsurgeon.storage.formats.tensor_table import split_name
from shardsurgeon.verification.module_names import Spelling, near, spelling

# Entries times groups that are looked at one by one; of more entries every group is taken apart.
_MOST_LOOKS = 200_000
_DIGITS = re.compile(r"[0-9]+")
_DIGIT = re.compile(r"[0-9]")
# A regular expression that does not care for a number is made of these and nothing else: a letter,
# a dot, any number of characters that may be digits, at least one of them, any character; anchors,
# groups and alternatives.
_TOKEN = re.compile(
    r"(?P<letter>[A-Za-z_-])|(?P<dot>\\\.|\[\.\])|(?P<many>(?:\.|\[\^\.\]|\\[dw]|\[0-9\])\*\??)"
    r"|(?P<some>(?:\.|\[\^\.\]|\\[dw]|\[0-9\])\+\??)|(?P<any>\.)|(?P<end>\$)|\^|\||\(\?:|\((?!\?)|\)"
)
# The same of fnmatch.
_BLIND_GLOB = re.compile(r"[A-Za-z_.*-]*")


class Group(NamedTuple):
    """Modules called head, number and tail, with any number."""

    head: str
    tail: str


def told_apart(entries: Iterable[str], how: Reading, groups: Collection[Group]) -> frozenset[Group]:
    """The groups of whose modules an entry may mean some and not the others."""
    doubtful = [entry for entry in dict.fromkeys(entries) if not _is_blind(entry, how)]
    if len(doubtful) * len(groups) > _MOST_LOOKS:
        return frozenset(groups)
    return frozenset(
        group for group in groups if any(_may_tell(entry, how, group) for entry in doubtful)
    )


def _is_blind(entry: str, how: Reading) -> bool:
    """Whether an entry means all modules of a group or none, whatever the group."""
    kind, text = spelling(entry, how)
    if kind is Spelling.GLOB:
        return _BLIND_GLOB.fullmatch(text) is not None
    if kind is Spelling.REGEX:
        return _is_blind_regex(text)
    if how is Reading.MODULE:
        # Its dots are any character.
        return _is_blind_regex(text) and not _DIGIT.search(text)
    return not _DIGIT.search(text)


def _is_blind_regex(pattern: str) -> bool:
    """Whether a regular expression surely matches all of a group's names or none.

    No letter and no dot matches a digit. A number that a match covers is therefore covered by parts
    that repeat, and what one number is to them, another is as well: those that may be empty take
    any part of it, and one that may not be, between letters or dots, takes all of it. A single
    character beside a letter is no digit of a number between dots.
    """
    kinds = ["end"]
    at = 0
    while at < len(pattern):
        token = _TOKEN.match(pattern, at)
        if token is None:
            return False
        kinds.append(token.lastgroup or "")
        at = token.end()
    kinds.append("end")
    for before, kind, after in zip(kinds, kinds[1:], kinds[2:], strict=False):
        if kind == "any" and "letter" not in (before, after):
            return False
        if kind == "some" and (
            before not in ("letter", "dot") or after not in ("letter", "dot", "end")
        ):
            return False
    return True


def _may_tell(entry: str, how: Reading, group: Group) -> bool:
    """Whether an entry may mean some modules of a group and not the others."""
    kind, text = spelling(entry, how)
    if kind is Spelling.TEXT:
        return _text_may_tell(text, how, group)
    begins, holds = near(entry, how)
    if begins:
        if kind is Spelling.GLOB and group.head.startswith(begins):
            # What the names begin with is settled; the rest decides.
            return _BLIND_GLOB.fullmatch(text[len(begins) :]) is None
        return group.head.startswith(begins) or begins.startswith(group.head)
    return not holds or holds in group.head or holds in group.tail or _covers(holds, group)


def _text_may_tell(text: str, how: Reading, group: Group) -> bool:
    head, tail = group
    if how is Reading.MODULE:
        begins = text[: len(head)]
        fits = all(a in (".", b) for a, b in zip(begins, head, strict=False))
        return (len(text) > len(head) and fits) or _ends(text, tail)
    if how in (Reading.SUBSTRING, Reading.ANYWHERE, Reading.COMPONENT, Reading.PART):
        return _covers(text, group)
    if how is Reading.SEARCH and _ends(f".{text}", tail):
        return True
    begins, _, ends = split_name(text)
    return (begins, ends) == group


def _ends(text: str, tail: str) -> bool:
    """Whether a name that ends with a text may do so by its number."""
    return text.endswith(tail) and text[: len(text) - len(tail)][-1:].isdigit()


def _covers(text: str, group: Group) -> bool:
    """Whether a text in a name of the group may have digits of its number in it."""
    return any(
        group.head.endswith(text[: digits.start()]) and group.tail.startswith(text[digits.end() :])
        for digits in _DIGITS.finditer(text)
    )
