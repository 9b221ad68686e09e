"""The names of a model's modules, and which of them an entry of a quantization list means.

An entry is held against every name, as the engines do it (`checkpoint.quantization_lists` says
how); an index keeps that quick for lists of thousands of entries. Pure.
"""

from __future__ import annotations

import fnmatch
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

from shardsurgeon.checkpoint.anatomy import Anatomy
from shardsurgeon.checkpoint.checkpoint import Checkpoint
from shardsurgeon.checkpoint.quantization_lists import (
    DYNAMIC_TAGS,
    MODULE_BOUNDARY,
    REGEX_TAG,
    SEARCH_CHARACTERS,
    Reading,
    compiled,
    is_pattern,
)
from shardsurgeon.checkpoint.quantization_names import plain_name
from shardsurgeon.checkpoint.roles import Carried, ExpertTensor, Sliced, Surplus
from shardsurgeon.errors import ConfigError
from shardsurgeon.pruning.keep_lists import KeepList
from shardsurgeon.storage.formats.tensor_table import TensorRecord

# Names that entries are tried on, all in all: some ten seconds. In the time of one, that many can
# be looked through for a text; in that of so many, a pattern is compiled.
_MOST_TRIED = 40_000_000
_SCAN = 20
_COMPILE = 400
# Of the modules that stacked experts stand for.
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
# One module for several of a checkpoint, in vLLM.
_FUSED = {"q_proj": "qkv_proj", "gate_proj": "gate_up_proj"}
# What engines put before `layers`, where the checkpoint says something else.
_HEADS = ("", "model.", "language_model.", "language_model.model.", "model.language_model.")
_LAYERS = re.compile(r"(.*?)(?:layers|blocks)\.[0-9]")
_PLAIN = re.compile(r"[\w-]+(?:\.[\w-]+)*")
_SPECIAL = re.compile(r"[^\w.-]")
_BETWEEN_WILDCARDS = re.compile(r"\[.*|[*?]", re.DOTALL)
_NUMBERS_SIDE_BY_SIDE = re.compile(r"(?<!\w)[0-9]+\.[0-9]+(?!\w)")


@dataclass(frozen=True, slots=True)
class ExpertModules:
    """The modules of one name in all experts of a layer: names[begin:end], by expert.

    retained: the experts that are left; empty where the layer goes.
    """

    layer: int
    begin: int
    end: int
    retained: tuple[int, ...]


class Modules:
    """Every module of a checkpoint.

    names: as the checkpoint spells them; a module of the result's expert 3 has the name that one of
    the source's expert 3 has. experts: the modules of experts, the first `num_in_experts` of the
    names. gone: places of all modules of dropped MTP layers. after: place → that of the same module
    in the result; before: the other way round; -1 where there is none.
    """

    def __init__(
        self, checkpoint: Checkpoint, anatomy: Anatomy, keep: KeepList, *, drop_mtp: bool
    ) -> None:
        self._where = checkpoint.config_place
        parts, others = _parts(checkpoint, anatomy)
        counts = anatomy.experts_per_layer
        self.names: list[str] = []
        self.experts: list[ExpertModules] = []
        for (head, tail), layer in parts.items():
            begin = len(self.names)
            self.names += [f"{head}{expert}{tail}" for expert in range(counts[layer])]
            # A dropped MTP layer has no keep-list.
            retained: Iterable[int] = range(0 if anatomy.reader.is_mtp(layer) else counts[layer])
            if layer in keep.layers:
                retained = keep.layers[layer].retained
            end = len(self.names)
            self.experts.append(ExpertModules(layer, begin, end, tuple(retained)))
        self.num_in_experts = len(self.names)
        self.names += others
        self.gone = {
            place
            for place in range(self.num_in_experts, len(self.names))
            if drop_mtp and others[self.names[place]]
        }
        self.after = array("i", range(len(self.names)))
        self.before = array("i", range(len(self.names)))
        for part in self.experts:
            self.gone.update(() if part.retained else range(part.begin, part.end))
            self.after[part.begin : part.end] = array("i", [-1]) * (part.end - part.begin)
            self.before[part.begin : part.end] = array("i", [-1]) * (part.end - part.begin)
            for new, old in enumerate(part.retained):
                self.after[part.begin + old] = part.begin + new
                self.before[part.begin + new] = part.begin + old
        for place in self.gone:
            self.after[place] = self.before[place] = -1
        self._tried = 0
        self._found: dict[tuple[str, Reading, str], array[int]] = {}
        own = next(filter(None, map(_LAYERS.match, self.names)), None)
        self._own_head = own[1] if own else ""
        self._tables: dict[str, _Table] = {self._own_head: _Table(self.names)}

    @property
    def heads(self) -> tuple[str, ...]:
        """What stands before `layers` in the names: the checkpoint's own, then other spellings."""
        return self._own_head, *(head for head in _HEADS if head != self._own_head)

    def meant(self, entry: str, reading: Reading, head: str | None = None) -> Sequence[int]:
        """Places of the modules that an entry means, ascending.

        head: the names are spelled with this one; None for the checkpoint's own. No other spelling
        is tried where the entry does not begin with it. Raises ConfigError for what is no regular
        expression and should be, and where so many entries have to be tried on so many names
        that it would take minutes.
        """
        own = head is None or head == self._own_head
        if not own and not plain_name(entry).startswith(head or ("layers", "blocks")):
            return ()
        key = entry, reading, self._own_head if head is None else head
        found = self._found.get(key)
        if found is None:
            found = self._found[key] = array("I", self._find(*key))
        return found

    def _find(self, entry: str, reading: Reading, head: str) -> list[int]:
        if head not in self._tables:
            self._tables[head] = _Table(_respelled(self.names, self._own_head, head))
        table = self._tables[head]
        if _is_name(entry, reading):
            return table.called(entry)
        text, means = self._matcher(entry, reading, table)
        places = table.near(text)
        candidates = [place for place in places if text in table.names[place]]
        self._tried += _COMPILE + len(candidates) + len(places) // _SCAN
        if self._tried > _MOST_TRIED:
            problem = f"has too many quantization entries to try on {len(self.names):,} modules"
            raise ConfigError(self._where, problem, "name the modules, or use fewer patterns")
        return [place for place in candidates if means(table.names[place])]

    def _matcher(
        self, entry: str, reading: Reading, table: _Table
    ) -> tuple[str, Callable[[str], object]]:
        """(text that every module which is meant has in its name, whether one is meant)."""
        match reading:
            case Reading.DYNAMIC:
                tagged = entry.startswith(DYNAMIC_TAGS)
                return self._regex(entry, entry[2:] if tagged else entry)
            case Reading.SUBSTRING:
                return entry, lambda name: entry in name
            case Reading.ANYWHERE if _is_name(entry, Reading.GLOB):
                return entry, lambda name: entry in name  # no name has a wildcard
            case Reading.COMPONENT:
                return entry, lambda name: f".{entry}." in f".{name}."
            case Reading.PART:
                return (
                    entry,
                    lambda name: entry in name.split(".") or f"{name}.".startswith(f"{entry}."),
                )
            case Reading.MODULE:
                return self._module(entry, table)
            case Reading.SEARCH:
                return self._search(entry)
        if entry.startswith(REGEX_TAG) and reading not in (Reading.GLOB, Reading.ANYWHERE):
            return self._regex(entry, entry[len(REGEX_TAG) :], full=reading is Reading.FULL)
        pattern = compiled(fnmatch.translate(entry), entry, self._where)
        return max(_BETWEEN_WILDCARDS.split(entry), key=_worth), pattern.match

    def _regex(
        self, entry: str, pattern: str, *, full: bool = False
    ) -> tuple[str, Callable[[str], object]]:
        regex = compiled(pattern, entry, self._where)
        return needed_text(pattern), regex.fullmatch if full else regex.match

    def _module(self, entry: str, table: _Table) -> tuple[str, Callable[[str], object]]:
        # A dot is any character; in a plain name it can only be the dot that it looks like.
        if table.has_plain(entry):
            return entry, lambda name: f"{name}.".startswith(f"{entry}.") or name.endswith(entry)
        pattern = f"(?:{entry}){MODULE_BOUNDARY}"
        if not is_pattern(pattern):
            return entry, lambda name: name.endswith(entry)
        regex = compiled(pattern, entry, self._where)
        text = needed_text(entry) if _SPECIAL.search(entry) else ""  # else a name may end with it
        return text, lambda name: regex.match(name) or name.endswith(entry)

    def _search(self, entry: str) -> tuple[str, Callable[[str], object]]:
        def ends(name: str) -> bool:
            return name == entry or name.endswith(f".{entry}")

        if SEARCH_CHARACTERS.isdisjoint(entry) or not is_pattern(entry):
            return entry, ends
        regex = compiled(entry, entry, self._where)
        return needed_text(entry), lambda name: ends(name) or regex.search(name)


def _is_name(entry: str, reading: Reading) -> bool:
    """Whether an entry is read as a name, and equal to it or not."""
    match reading:
        case Reading.NAME:
            return True
        case Reading.TAGGED | Reading.FULL:
            return not entry.startswith(REGEX_TAG)
        case Reading.GLOB:
            return not any(mark in entry for mark in "*?[")
        case Reading.WILDCARD:
            return _is_name(entry, Reading.TAGGED) and _is_name(entry, Reading.GLOB)
    return False


class _Table:
    """Names, and where the numbers in them are: a part before a number, and the number."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names

    @cached_property
    def _numbers(self) -> Mapping[str, int]:
        return {name: place for place, name in enumerate(self.names)}

    @cached_property
    def _places(self) -> Mapping[tuple[str, str], list[int]]:
        found: dict[tuple[str, str], list[int]] = {}
        for place, name in enumerate(self.names):
            for pair in _numbered(name):
                found.setdefault(pair, []).append(place)
        return found

    @cached_property
    def _words(self) -> str:
        """Every part of a name that is no number, once."""
        return " ".join({w for name in self.names for w in name.split(".") if not w.isdigit()})

    def called(self, name: str) -> list[int]:
        """The place of a name, if it is one."""
        place = self._numbers.get(name)
        return [] if place is None else [place]

    def near(self, text: str) -> Sequence[int]:
        """Places, ascending, among which are those of all names that contain a text."""
        # What is before the first dot and behind the last may be half of a part.
        inner = text.partition(".")[2].rpartition(".")[0]
        pairs = [self._places.get(pair, []) for pair in _numbered(inner)]
        return min(pairs, key=len) if pairs else range(len(self.names))

    def has_plain(self, entry: str) -> bool:
        """Whether an entry's dots, read as any character, can be nothing but dots in the names."""
        if not _PLAIN.fullmatch(entry) or _NUMBERS_SIDE_BY_SIDE.search(entry):
            return False
        parts = entry.split(".")
        return not any(
            re.search(f"{left}.{right}", self._words) for left, right in _neighbours(parts)
        )


def _neighbours(parts: Sequence[str]) -> Iterator[tuple[str, str]]:
    return ((re.escape(left), re.escape(right)) for left, right in pairwise(parts))


def _numbered(name: str) -> Iterator[tuple[str, str]]:
    parts = name.split(".")
    for number, part in enumerate(parts):
        if part.isdigit() and number:
            yield parts[number - 1], part


def _worth(text: str) -> tuple[bool, int]:
    """How well a text finds the few names that contain it."""
    inner = text.partition(".")[2].rpartition(".")[0]
    return any(_numbered(inner)), len(text)


_ESCAPED = re.compile(r"\\([^\w])|\[\.\]|([\w :/-])")
# Flags and groups of other kinds, characters by number, references.
_CHANGES_MEANING = re.compile(r"\(\?(?![:!=])|\\[xuUN0-9]")
_REPEATS = re.compile(r"[*?]|\{(?:0|,)")


def needed_text(pattern: str) -> str:
    """A text that is in whatever a regular expression matches; "" where none is seen.

    Only what stands outside of groups and classes is looked at.
    """
    if _CHANGES_MEANING.search(pattern):
        return ""
    runs, run, at, depth = [], "", 0, 0
    while at < len(pattern):
        token = _ESCAPED.match(pattern, at)
        char, end = ("", at + 1) if token is None else ((token[1] or token[2] or "."), token.end())
        if token is None and pattern[at] == "\\":
            end = at + 2
        elif token is None and pattern[at] == "[":
            closing = re.compile(r"\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL).match(pattern, at)
            end = closing.end() if closing else len(pattern)
        elif token is None and pattern[at] in "()":
            depth += 1 if pattern[at] == "(" else -1
        elif token is None and pattern[at] == "|" and not depth:
            return ""
        elif token is None and pattern[at] == "{":
            end = max(pattern.find("}", at), at) + 1
        if not char or depth or _REPEATS.match(pattern, end):
            runs.append(run)
            run = ""
        else:
            run += char
        if pattern[end : end + 1] in ("+", "{"):
            runs.append(run)
            run = ""
        at = end
    return max((*runs, run), key=_worth)


def _respelled(names: Iterable[str], own: str, head: str) -> list[str]:
    """The names of layers with another beginning; the rest as they are."""
    return [
        head + name[len(own) :] if name.startswith((f"{own}layers.", f"{own}blocks.")) else name
        for name in names
    ]


def _parts(
    checkpoint: Checkpoint, anatomy: Anatomy
) -> tuple[dict[tuple[str, str], int], dict[str, bool]]:
    """((before, behind the expert's number) → layer, other module → whether it is MTP's)."""
    parts: dict[tuple[str, str], int] = {}
    others: dict[str, bool] = {}
    reader = anatomy.reader
    for table in checkpoint.tables:
        layer, _ = reader.experts(table)
        for code in np.unique(table.code[layer >= 0]).tolist():
            series = table.series[code]
            own = reader.layer_of(series)
            assert own is not None
            parts.setdefault((series.head, series.tail.rpartition(".")[0]), own)
            others.setdefault(series.head.rstrip("."), reader.is_mtp(own))
        for place in np.flatnonzero(layer < 0).tolist():
            _add_other(table[place], anatomy, parts, others)
    return parts, others


def _add_other(
    record: TensorRecord,
    anatomy: Anatomy,
    parts: dict[tuple[str, str], int],
    others: dict[str, bool],
) -> None:
    """Add what is named by a tensor that no expert has alone to the results of `_parts`."""
    role = anatomy.role(record)
    name = record.name
    module = name.rpartition(".")[0]
    if isinstance(role, ExpertTensor | Surplus):
        return
    if isinstance(role, Sliced) and not role.is_router and ".experts" in name:
        stem = name[: name.rindex(".experts")] + ".experts."
        for end in _PROJECTIONS:
            parts[stem, f".{end}"] = role.layer
    mtp = role.mtp if isinstance(role, Carried) else anatomy.reader.is_mtp(role.layer)
    for each in {module, name} - {""}:
        others.setdefault(each, mtp)
    parent, _, last = module.rpartition(".")
    if last in _FUSED:
        others.setdefault(f"{parent}.{_FUSED[last]}", mtp)
