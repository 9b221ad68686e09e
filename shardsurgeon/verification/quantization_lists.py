"""Quantization lists by what they mean: for each module of the result what it was in the source.

Both lists are read with code of the verifier's own, name by name;
`checkpoint.quantization_lists` says where lists stand and how engines read them.
"""

from __future__ import annotations

import fnmatch
import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

from shardsurgeon.checkpoint.anatomy import Anatomy
from shardsurgeon.checkpoint.checkpoint import Checkpoint
from shardsurgeon.checkpoint.quantization_lists import (
    FIRST_COUNTS,
    MODULE_BOUNDARY,
    SEARCH_CHARACTERS,
    ModuleList,
    Reading,
    compiled,
    is_pattern,
    module_lists,
)
from shardsurgeon.checkpoint.quantization_names import plain_name
from shardsurgeon.checkpoint.roles import Carried, ExpertTensor, Sliced, Surplus
from shardsurgeon.errors import ConfigError
from shardsurgeon.verification.findings import Findings
from shardsurgeon.verification.record import RetainedIds

Path = tuple[str | int, ...]

# Names that patterns are tried on: half a minute. A pattern is compiled in the time of so many.
_MOST_TRIED = 50_000_000
_COMPILE = 400
_FEW = 50
_STACKED = ("gate_proj", "up_proj", "down_proj")
_FUSED = {"q_proj": "qkv_proj", "gate_proj": "gate_up_proj"}
_WILD = re.compile(r"[*?[]")
_UNIT = re.compile(r"\w|[ -]|\\\.|\[\.\]")
_BEGINNING = re.compile(rf"(?:{_UNIT.pattern})*")
_OF_LAYER = re.compile(r"(?:[\w.]*\.)?(?:layers|blocks)\.([0-9]{1,6})(?:[.*]|\Z)")


class ListCheck:
    """Holds the lists of a result against those of its source."""

    def __init__(
        self, source: Checkpoint, anatomy: Anatomy, keeps: RetainedIds, *, mtp_dropped: bool
    ) -> None:
        self._source = source
        self._anatomy = anatomy
        self._keeps = keeps
        self._mtp_dropped = mtp_dropped

    @cached_property
    def _modules(self) -> _Modules:
        return _Modules(self._source, self._anatomy, self._keeps, self._mtp_dropped)

    def only_dropped(self, entry: str, known: ModuleList) -> bool:
        """Whether an entry means modules of dropped MTP layers only, so that it must be gone."""
        if not self._mtp_dropped:
            return False
        means = self._modules.meant(entry, known)
        if means:
            return means <= self._modules.gone
        numbered = _OF_LAYER.match(plain_name(entry))
        last = max(layer.index for layer in self._anatomy.layers)
        first = self._anatomy.num_layers
        return numbered is not None and int(numbered[1]) in range(
            first, max(last + 1, first + self._anatomy.num_mtp_layers)
        )

    def admit(self, expected: Any, found: Any, method: str = "") -> Any:
        """`expected` with the lists of `found` where these have the names of experts' modules in
        place of entries that mean experts' modules and no others."""
        if not isinstance(expected, dict):
            return expected
        lists = {each.path: each for each in module_lists(expected, (), method)}
        return self._admit(expected, found, (), lists)

    def _admit(
        self, expected: Any, found: Any, path: Path, lists: Mapping[Path, ModuleList]
    ) -> Any:
        if isinstance(expected, dict) and isinstance(found, dict):
            return {
                key: self._admit(value, found.get(key), (*path, key), lists)
                for key, value in expected.items()
            }
        if isinstance(expected, list) and isinstance(found, list) and path in lists:
            known = lists[path]
            if expected != found and known.is_flat and self._spelled_out(known, found):
                return found
        return expected

    def _spelled_out(self, known: ModuleList, found: Sequence[Any]) -> bool:
        """Whether names of experts' modules stand in place of entries that mean such modules."""
        todo = list(reversed(known.entries))
        instead = False
        for text in found:
            while todo and todo[-1] != text and self._means_experts(todo[-1], known):
                todo.pop()
                instead = True
            if todo and todo[-1] == text:
                todo.pop()
                instead = False
            elif not instead or type(text) is not str or text not in self._modules.of_result:
                return False
        return all(self._means_experts(text, known) for text in todo)

    def _means_experts(self, entry: str, known: ModuleList) -> bool:
        means = self._modules.meant(entry, known)
        # What is a name itself has been renumbered, and stands where it stood.
        return bool(means) and means <= self._modules.experts and entry not in means

    def check(
        self, where: str, before: Any, after: Any, findings: Findings, method: str = ""
    ) -> None:
        """Note where a list of the result does not mean what the source's list meant.

        where: the file; before, after: a section of the source's and of the result's.
        """
        if not isinstance(before, dict) or not isinstance(after, dict):
            return
        news = {(each.path, each.values is None): each for each in module_lists(after, (), method)}
        for old in module_lists(before, (), method):
            new = news.get((old.path, old.values is None))
            try:
                for how in old.readings:
                    self._check(where, old, new, how, findings)
            except ConfigError as error:
                findings.add(where, error.problem)

    def _check(
        self, where: str, old: ModuleList, new: ModuleList | None, how: Reading, findings: Findings
    ) -> None:
        for sort in (False, True) if old.path[-1:] == ("config_groups",) else (False,):
            was = _said(old, how, self._modules.before, sort)
            now = _said(new, how, self._modules.after, sort) if new else {}
            for module, its in self._modules.pairs.items():
                if was.get(module) != now.get(its):
                    dotted = ".".join(map(str, old.path))
                    problem = f"{dotted} does not mean for {its} what it meant for {module}"
                    findings.add(where, problem)
                    return


class _Modules:
    """The modules of both models.

    pairs: module of the source → the same one of the result; experts: modules of the source that
    are experts'; of_result: those of the result; gone: all modules of dropped MTP layers; before,
    after: the names of the pairs.
    """

    def __init__(
        self, source: Checkpoint, anatomy: Anatomy, keeps: RetainedIds, mtp_dropped: bool
    ) -> None:
        self.pairs: dict[str, str] = {}
        self.experts: set[str] = set()
        self.of_result: set[str] = set()
        self.gone: set[str] = set()
        new_ids = {
            layer: {old: new for new, old in enumerate(ids)}
            for layer, ids in keeps.retained.items()
        }
        for record in source.records:
            role = anatomy.role(record)
            if isinstance(role, Surplus):
                continue
            mtp = role.mtp if isinstance(role, Carried) else anatomy.reader.is_mtp(role.layer)
            kept = {} if isinstance(role, Carried) else new_ids.get(role.layer, {})
            for old, expert, span in _modules_of(record.name, role, anatomy):
                if expert >= 0:
                    self.experts.add(old)
                if mtp and mtp_dropped:
                    self.gone.add(old)
                elif expert < 0:
                    self.pairs[old] = old
                elif expert in kept:
                    new = f"{old[: span[0]]}{kept[expert]}{old[span[1] :]}"
                    self.pairs[old] = new
                    self.of_result.add(new)
        self.before, self.after = _Names(self.pairs), _Names(self.pairs.values())
        self._all = _Names({*self.pairs, *self.experts, *self.gone})
        self._meant: dict[int, tuple[ModuleList, dict[str, set[str]]]] = {}

    def meant(self, entry: str, known: ModuleList) -> set[str]:
        """The modules of the source that an entry means, in any way in which its list is read."""
        if id(known) not in self._meant:
            found: dict[str, set[str]] = {text: set() for text in known.entries}
            for how in known.readings:
                for name, numbers in self._all.meant(known.entries, how).items():
                    for number in numbers:
                        found[known.entries[number]].add(name)
            self._meant[id(known)] = known, found
        return self._meant[id(known)][1].get(entry, set())


def _modules_of(
    name: str, role: object, anatomy: Anatomy
) -> Iterator[tuple[str, int, tuple[int, int]]]:
    """(module, expert, span of its number) of what a tensor belongs to; expert -1 of all others.

    Stacked experts stand for modules of each of them; what vLLM fuses, for one more module.
    """
    module = name.rpartition(".")[0]
    none = (-1, (0, 0))
    if isinstance(role, ExpertTensor):
        yield module if len(module) >= role.end else name, role.expert, (role.begin, role.end)
        yield name[: role.begin].rstrip("."), *none
        return
    for each in {name, module} - {""}:
        yield each, *none
    parent, _, last = module.rpartition(".")
    if last in _FUSED:
        yield f"{parent}.{_FUSED[last]}", *none
    place = name.rfind(".experts")
    if isinstance(role, Sliced) and not role.is_router and place >= 0:
        begin = place + len(".experts.")
        for expert in range(anatomy.reader.experts_of(role.layer)):
            stem = f"{name[: begin - 1]}.{expert}"
            yield from ((f"{stem}.{part}", expert, (begin, len(stem))) for part in _STACKED)


def _said(known: ModuleList, how: Reading, names: _Names, sort: bool) -> dict[str, tuple[str, ...]]:
    """Module → the values of the entries that mean it, in order, each once in a row; where the
    first alone counts, its value."""
    values = known.values or ("",) * len(known.entries)
    pairs = list(zip(known.entries, values, strict=True))
    if sort:
        pairs.sort(key=lambda pair: ("re:" in pair[0], pair[0]))
    found: dict[str, tuple[str, ...]] = {}
    for name, numbers in names.meant([text for text, _ in pairs], how).items():
        first = min(numbers) + 1 if how in FIRST_COUNTS else len(pairs)
        said = [pairs[number][1] for number in sorted(numbers) if number < first]
        found[name] = tuple(v for at, v in enumerate(said) if not at or said[at - 1] != v)
    return found


_Matches = Callable[[str], object]
# (text that the names which are meant begin with, text that they have), "" where none is known
_Near = tuple[str, str]


class _Names:
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
            matches, near = pattern
            names = self._near(near)
            self._tried += _COMPILE + len(names)
            if self._tried > _MOST_TRIED:
                problem = f"has too many quantization entries to try on {len(self._names):,} names"
                raise ConfigError("", problem)
            for name in filter(matches, names):
                found.setdefault(name, set()).add(place)
        for name, text in self._plain(plain, how):
            found.setdefault(name, set()).update(plain[text])
        return found

    def _near(self, near: _Near) -> Sequence[str]:
        """Names that may be meant."""
        begins, holds = near
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


def _pattern(entry: str, how: Reading) -> tuple[_Matches, _Near] | None:
    """How an entry that is a pattern is matched; None for one that is text."""
    tagged = entry.startswith("re:")
    if how in (Reading.TAGGED, Reading.WILDCARD, Reading.FULL) and tagged:
        regex = compiled(entry[3:], entry, "")
        return (regex.fullmatch if how is Reading.FULL else regex.match), _near(entry[3:])
    globbed = how in (Reading.GLOB, Reading.ANYWHERE) or (how is Reading.WILDCARD and not tagged)
    if globbed and _WILD.search(entry):
        regex = compiled(fnmatch.translate(entry), entry, "")
        return regex.match, (_WILD.split(entry)[0], "")
    if how is Reading.DYNAMIC:
        text = entry[2:] if entry[:2] in ("-:", "+:") else entry
        return compiled(text, entry, "").match, _near(text)
    if how is Reading.SEARCH and SEARCH_CHARACTERS & set(entry):
        return _try(entry, entry, anywhere=True)
    if how is Reading.MODULE and re.search(r"[^\w.-]", entry):
        return _try(f"(?:{entry}){MODULE_BOUNDARY}", entry)
    return None


def _try(pattern: str, entry: str, *, anywhere: bool = False) -> tuple[_Matches, _Near]:
    """A pattern of an engine that passes over what is no regular expression."""
    if not is_pattern(pattern):
        return (lambda name: False), ("", entry)
    regex = compiled(pattern, entry, "")
    begins, holds = _near(entry)
    if anywhere:
        return regex.search, ("", begins or holds)
    return regex.match, (begins, holds)


def _near(pattern: str) -> _Near:
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
