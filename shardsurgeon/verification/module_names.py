"""Which names of modules an entry of a quantization list means, by the verifier's own reading."""

from __future__ import annotations

import fnmatch
import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from enum import Enum
from functools import cached_property
from itertools import accumulate, pairwise

from shardsurgeon.checkpoint.quantization_lists import (
    MODULE_BOUNDARY,
    SEARCH_CHARACTERS,
    Reading,
    compiled,
    is_pattern,
)
from shardsurgeon.errors import ConfigError

# Names that patterns are tried on: half a minute. A pattern is compiled in the time of so many.
_MOST_TRIED = 50_000_000
_COMPILE = 400
_FEW = 50
_WILD = re.compile(r"[*?[]")
_UNIT = re.compile(r"\w|[ -]|\\\.|\[\.\]")
_BEGINNING = re.compile(rf"(?:{_UNIT.pattern})*")

_Matches = Callable[[str], object]
# (text that the names which are meant begin with, text that they have), "" where none is known
Near = tuple[str, str]


class Names:
    """Names of modules, and which of them entries mean."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = sorted(names)
        self._tried = 0

    def meant(self, entries: Sequence[str], how: Reading) -> dict[str, set[int]]:
        """Name → places of the entries that mean it, for the names that any entry means.

        Raises ConfigError for what is no regular expression and should be, and for so many
        patterns that trying them would take minutes.
        """
        found: dict[str, set[int]] = {}
        plain: dict[str, list[int]] = {}
        for place, entry in enumerate(entries):
            pattern = _pattern(entry, how)
            if pattern is None:
                plain.setdefault(entry, []).append(place)
                continue
            matches, known = pattern
            names = self._near(known)
            self._tried += _COMPILE + len(names)
            if self._tried > _MOST_TRIED:
                problem = f"has too many quantization entries to try on {len(self._names):,} names"
                raise ConfigError("", problem)
            for name in filter(matches, names):
                found.setdefault(name, set()).add(place)
        for name, text in self._plain(plain, how):
            found.setdefault(name, set()).update(plain[text])
        return found

    def _near(self, known: Near) -> Sequence[str]:
        """Names that may be meant."""
        begins, holds = known
        if begins:
            low = bisect_left(self._names, begins)
            return self._names[low : bisect_left(self._names, begins + "\U0010ffff")]
        if not holds:
            return self._names
        pairs = list(pairwise(holds.split(".")[1:-1]))  # what is whole in it
        few = min((self._by_pair.get(pair, []) for pair in pairs), key=len, default=self._names)
        return [name for name in few if holds in name]

    @cached_property
    def _by_pair(self) -> Mapping[tuple[str, str], list[str]]:
        """Two parts that follow each other → the names that have them."""
        found: dict[tuple[str, str], list[str]] = {}
        for name in self._names:
            for pair in pairwise(name.split(".")):
                found.setdefault(pair, []).append(name)
        return found

    def _plain(self, plain: Mapping[str, object], how: Reading) -> Iterator[tuple[str, str]]:
        """(name, entry) of entries that are text."""
        if not plain:
            return
        if how in (Reading.SUBSTRING, Reading.ANYWHERE):
            yield from self._inside(plain)
        elif how is Reading.COMPONENT:
            for name in self._names:
                yield from ((name, run) for run in _runs(name) if run in plain)
        elif how is Reading.PART:
            for name in self._names:
                runs = {*name.split("."), *accumulate(name.split("."), "{}.{}".format)}
                yield from ((name, run) for run in runs if run in plain)
        elif how is Reading.MODULE:
            yield from self._beginnings(plain)
            yield from self._ends(plain, "")
        else:
            yield from ((name, name) for name in self._names if name in plain)
            if how is Reading.SEARCH:
                yield from self._ends(plain, ".")

    def _inside(self, plain: Mapping[str, object]) -> Iterator[tuple[str, str]]:
        if len(plain) < _FEW:
            for text in plain:
                yield from ((name, text) for name in self._names if text in name)
            return
        lengths = {len(text) for text in plain}
        for name in self._names:
            for length in lengths:
                for at in range(len(name) - length + 1):
                    if name[at : at + length] in plain:
                        yield name, name[at : at + length]

    def _ends(self, plain: Mapping[str, object], before: str) -> Iterator[tuple[str, str]]:
        lengths = {len(text) for text in plain}
        for name in self._names:
            for length in lengths:
                at = len(name) - length
                if at >= 0 and name[at:] in plain and name[:at].endswith(before):
                    yield name, name[at:]

    def _beginnings(self, plain: Mapping[str, object]) -> Iterator[tuple[str, str]]:
        """Of transformers' keys, in which a dot is any character."""
        shapes: dict[tuple[int, ...], dict[str, list[str]]] = {}
        for text in plain:
            dots = tuple(at for at, char in enumerate(text) if char == ".")
            letters = shapes.setdefault((*dots, len(text)), {})
            letters.setdefault(text.replace(".", ""), []).append(text)
        for ends, texts in shapes.items():
            spans = [(begin + 1, end) for begin, end in pairwise((-1, *ends))]
            for name in self._names:
                length = ends[-1]
                if len(name) < length or not (
                    name[length : length + 1] in ("", ".") or name[:length].endswith(".")
                ):
                    continue
                spelled = "".join([name[begin:end] for begin, end in spans])
                yield from ((name, text) for text in texts.get(spelled, []))


def _runs(name: str) -> Iterator[str]:
    """Every text between two dots of a name."""
    parts = name.split(".")
    for begin in range(len(parts)):
        for end in range(begin + 1, len(parts) + 1):
            yield ".".join(parts[begin:end])


class Spelling(Enum):
    """What an entry is: text, a pattern of fnmatch, or a regular expression."""

    TEXT = "text"
    GLOB = "glob"
    REGEX = "regex"


def spelling(entry: str, how: Reading) -> tuple[Spelling, str]:
    """What an entry is, read so, and the pattern in it."""
    tagged = entry.startswith("re:")
    if how in (Reading.TAGGED, Reading.WILDCARD, Reading.FULL) and tagged:
        return Spelling.REGEX, entry[3:]
    globbed = how in (Reading.GLOB, Reading.ANYWHERE) or (how is Reading.WILDCARD and not tagged)
    if globbed and _WILD.search(entry):
        return Spelling.GLOB, entry
    if how is Reading.DYNAMIC:
        return Spelling.REGEX, entry[2:] if entry[:2] in ("-:", "+:") else entry
    special = how is Reading.SEARCH and SEARCH_CHARACTERS & set(entry)
    if special or (how is Reading.MODULE and re.search(r"[^\w.-]", entry)):
        return Spelling.REGEX, entry
    return Spelling.TEXT, entry


def _pattern(entry: str, how: Reading) -> tuple[_Matches, Near] | None:
    """How an entry that is a pattern is matched; None for one that is text."""
    kind, text = spelling(entry, how)
    if kind is Spelling.TEXT:
        return None
    if kind is Spelling.GLOB:
        return compiled(fnmatch.translate(text), entry, "").match, near(entry, how)
    if how in (Reading.SEARCH, Reading.MODULE):
        # Engines pass over what is no regular expression.
        pattern = text if how is Reading.SEARCH else f"(?:{text}){MODULE_BOUNDARY}"
        if not is_pattern(pattern):
            return (lambda name: False), ("", entry)
        regex = compiled(pattern, entry, "")
        return (regex.search if how is Reading.SEARCH else regex.match), near(entry, how)
    regex = compiled(text, entry, "")
    return (regex.fullmatch if how is Reading.FULL else regex.match), near(entry, how)


def near(entry: str, how: Reading) -> Near:
    """What is known of the names that a pattern means."""
    kind, text = spelling(entry, how)
    if kind is Spelling.GLOB:
        return _WILD.split(text)[0], ""
    begins, holds = _near(text)
    return ("", begins or holds) if how is Reading.SEARCH else (begins, holds)


def _near(pattern: str) -> Near:
    """What is known of the names that a regular expression matches from their beginning."""
    if "|" in pattern or "(?" in pattern:
        return "", ""
    inner = re.sub(r"^(?:\^|\.\*)+", "", pattern)
    fixed = _BEGINNING.match(inner)
    units = _UNIT.findall(fixed[0] if fixed else "")
    if fixed and inner[fixed.end() : fixed.end() + 1] in ("*", "?", "{", "+"):
        units = units[:-1]
    text = "".join("." if len(unit) > 1 else unit for unit in units)
    return ("", text) if inner != pattern.removeprefix("^") else (text, "")
