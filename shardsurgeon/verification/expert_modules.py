"""Modules that are alike but for their expert's number, and whether entries tell them apart.

Of 70,000 modules nearly all are experts', and hardly an entry of a quantization list asks which
expert: `re:.*self_attn.*` means all modules of such a group or none. One of them then speaks for
all. Where it cannot be shown that an entry does not tell a group's modules apart, each is asked.

The number stands between dots, or between a dot and the end: a group's names are head, number and
tail, the head ends with a dot and the tail begins with one or is empty.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import cache
from typing import NamedTuple

from shardsurgeon.checkpoint.quantization_lists import Reading
from shardsurgeon.storage.formats.tensor_table import split_name
from shardsurgeon.verification.module_names import Spelling, near, spelling

# Entries times heads that are looked at one by one; of more entries every group is taken apart.
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
# Readings in which text means more than the module of that name.
_LONGER = {
    *(Reading.SUBSTRING, Reading.ANYWHERE, Reading.COMPONENT, Reading.PART),
    *(Reading.MODULE, Reading.SEARCH),
}


class Group(NamedTuple):
    """Modules called head, number and tail, with any number."""

    head: str
    tail: str


def told_apart(entries: Iterable[str], how: Reading, groups: Collection[Group]) -> frozenset[Group]:
    """The groups of whose modules an entry may mean some and not the others."""
    doubtful = [entry for entry in dict.fromkeys(entries) if not _is_blind(entry, how)]
    heads: dict[str, set[str]] = {}
    for group in groups:
        heads.setdefault(group.head, set()).add(group.tail)
    alone: list[str] = []
    others: list[str] = []
    for entry in doubtful:
        (alone if _is_equal(entry, how) else others).append(entry)
    begins_ends = ((begin, end) for begin, _, end in map(split_name, alone))
    found = {Group(*each) for each in begins_ends}.intersection(groups)
    if len(others) * len(heads) > _MOST_LOOKS:
        return frozenset(groups)
    for entry in others:
        found.update(_may_tell(entry, how, heads))
    return frozenset(found)


def _is_equal(entry: str, how: Reading) -> bool:
    """Whether an entry means the module of its name and no other."""
    kind, _ = spelling(entry, how)
    return kind is Spelling.TEXT and how not in _LONGER


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


def _may_tell(entry: str, how: Reading, heads: Mapping[str, Collection[str]]) -> Iterator[Group]:
    """The groups of whose modules an entry may mean some and not the others. heads: head of a group
    → its tails."""
    kind, text = spelling(entry, how)
    if kind is not Spelling.TEXT:
        begins, holds = near(entry, how)
        for head, tails in heads.items():
            if begins and kind is Spelling.GLOB and head.startswith(begins):
                # What the names begin with is settled; the rest decides.
                may = _BLIND_GLOB.fullmatch(text[len(begins) :]) is None
            else:
                may = head.startswith(begins) or (bool(begins) and begins.startswith(head))
            for tail in tails if may else ():
                if holds in head or holds in tail or _covers(holds, head, tail):
                    yield Group(head, tail)
        return
    for head, tails in heads.items():
        if how is Reading.MODULE:
            fits = len(text) > len(head) and _like(head).match(text) is not None
            told = [tail for tail in tails if fits or _ends(text, tail)]
        elif how is Reading.SEARCH:
            told = [tail for tail in tails if _ends(f".{text}", tail)]
        else:
            told = [tail for tail in tails if _covers(text, head, tail)]
        yield from (Group(head, tail) for tail in told)


@cache
def _like(head: str) -> re.Pattern[str]:
    """Of texts in which dots are any character, those that begin like a head."""
    return re.compile("".join(f"[.{re.escape(each)}]" for each in head))


def _ends(text: str, tail: str) -> bool:
    """Whether a name that ends with a text may do so by its number."""
    return text.endswith(tail) and text[: len(text) - len(tail)][-1:].isdigit()


def _covers(text: str, head: str, tail: str) -> bool:
    """Whether a text in a name of a group may have digits of its number in it."""
    return any(
        head.endswith(text[: digits.start()]) and tail.startswith(text[digits.end() :])
        for digits in _DIGITS.finditer(text)
    )
