"""Quantization lists by what they mean: for each module of the result what it was in the source.

Both lists are read with code of the verifier's own (`module_names`), name by name;
`checkpoint.quantization_lists` says where lists stand and how engines read them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from shardsurgeon.checkpoint.anatomy import Anatomy
from shardsurgeon.checkpoint.checkpoint import Checkpoint
from shardsurgeon.checkpoint.quantization_lists import (
    FIRST_COUNTS,
    ModuleList,
    Reading,
    module_lists,
)
from shardsurgeon.checkpoint.quantization_names import plain_name
from shardsurgeon.checkpoint.roles import Carried, ExpertTensor, Sliced, Surplus
from shardsurgeon.errors import ConfigError
from shardsurgeon.storage.formats.tensor_table import Column, TensorRecord
from shardsurgeon.verification.expert_modules import Group, told_apart
from shardsurgeon.verification.findings import Findings
from shardsurgeon.verification.module_names import Names
from shardsurgeon.verification.record import RetainedIds

Path = tuple[str | int, ...]

_STACKED = ("gate_proj", "up_proj", "down_proj")
_FUSED = {"q_proj": "qkv_proj", "gate_proj": "gate_up_proj"}
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
        means, among = self._modules.meant(entry, known)
        if means:
            return means <= among.gone
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
        means, among = self._modules.meant(entry, known)
        # What is a name itself has been renumbered, and stands where it stood.
        return bool(means) and means <= among.experts and entry not in means

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
        lists = [(each.entries, how) for each in (old, new) if each]
        modules = self._modules.asked_by(*lists)
        for sort in (False, True) if old.path[-1:] == ("config_groups",) else (False,):
            was = _said(old, how, modules.before, sort)
            now = _said(new, how, modules.after, sort) if new else {}
            for module, its in modules.pairs.items():
                if was.get(module) != now.get(its):
                    dotted = ".".join(map(str, old.path))
                    problem = f"{dotted} does not mean for {its} what it meant for {module}"
                    findings.add(where, problem)
                    return


class _Modules:
    """The modules of both models, those of a group of experts as one where that suffices."""

    def __init__(
        self, source: Checkpoint, anatomy: Anatomy, keeps: RetainedIds, mtp_dropped: bool
    ) -> None:
        self._census = _Census(source, anatomy, keeps, mtp_dropped)
        self._known: dict[frozenset[Group], _Known] = {}
        self._told: dict[tuple[tuple[str, ...], Reading], frozenset[Group]] = {}
        self._meant: dict[int, tuple[ModuleList, _Known, dict[str, set[str]]]] = {}

    def asked_by(self, *lists: tuple[tuple[str, ...], Reading]) -> _Known:
        """The modules that entries may tell apart. lists: entries and how they are read."""
        apart = frozenset[Group]().union(*(self._told_apart(*each) for each in lists))
        if apart not in self._known:
            self._known[apart] = self._census.known(apart)
        return self._known[apart]

    def _told_apart(self, entries: tuple[str, ...], how: Reading) -> frozenset[Group]:
        if (entries, how) not in self._told:
            self._told[entries, how] = told_apart(entries, how, self._census.groups.keys())
        return self._told[entries, how]

    @cached_property
    def of_result(self) -> set[str]:
        """All modules of the result that are experts'."""
        known = self._census.known(self._census.groups.keys())
        return {known.pairs[name] for name in known.experts & known.pairs.keys()}

    def meant(self, entry: str, known: ModuleList) -> tuple[set[str], _Known]:
        """The modules of the source that an entry means, in any way in which its list is read; and
        the modules of which it may mean some."""
        if id(known) not in self._meant:
            among = self.asked_by(*((known.entries, how) for how in known.readings))
            found: dict[str, set[str]] = {text: set() for text in known.entries}
            for how in known.readings:
                for name, numbers in among.all.meant(known.entries, how).items():
                    for number in numbers:
                        found[known.entries[number]].add(name)
            self._meant[id(known)] = known, among, found
        _, among, found = self._meant[id(known)]
        return found.get(entry, set()), among


class _Known:
    """Modules of both models.

    pairs: module of the source → the same one of the result; experts: modules of the source that
    are experts'; gone: modules of dropped MTP layers; before, after: the names of the pairs; all:
    those of the source.
    """

    def __init__(self, rows: Iterable[_Row]) -> None:
        self.pairs: dict[str, str] = {}
        self.experts: set[str] = set()
        self.gone: set[str] = set()
        for row in sorted(rows):
            if row.expert >= 0:
                self.experts.add(row.old)
            if row.is_gone:
                self.gone.add(row.old)
            elif row.new:
                self.pairs[row.old] = row.new
        self.before, self.after = Names(self.pairs), Names(self.pairs.values())
        self.all = Names({*self.pairs, *self.experts, *self.gone})


class _Row(NamedTuple):
    """A module of the source.

    place: of its first tensor, among all; holds: whether it is the module that has the tensor's own
    in it; expert: its number, -1 of what is no expert's; rank: among several of one tensor; old,
    new: its name here and in the result, "" where it has none there; is_gone: whether it was
    dropped with its MTP layer.
    """

    place: int
    holds: bool
    expert: int
    rank: int
    old: str
    new: str
    is_gone: bool


class _Census:
    """The modules of a model, by groups. groups: (head, tail) → its layer."""

    def __init__(
        self, source: Checkpoint, anatomy: Anatomy, keeps: RetainedIds, mtp_dropped: bool
    ) -> None:
        self._anatomy = anatomy
        self._new_ids = {
            layer: {old: new for new, old in enumerate(ids)}
            for layer, ids in keeps.retained.items()
        }
        self._mtp_dropped = mtp_dropped
        self._others: list[_Row] = []
        self.groups: dict[Group, int] = {}
        # Group → (place of the first tensor of each, numbers), part after part.
        self._parts: dict[Group, list[tuple[Column, Column]]] = {}
        start = 0
        for table in source.tables:
            layer, expert = anatomy.reader.experts(table)
            places = np.flatnonzero(layer >= 0)
            places = places[np.argsort(table.code[places], kind="stable")]
            begins = np.flatnonzero(np.diff(table.code[places], prepend=-1))
            for same in np.split(places, begins[1:]) if len(places) else ():
                series, its = table.series[table.code[same[0]]], int(layer[same[0]])
                tail = series.tail.rpartition(".")[0] if "." in series.tail else series.tail
                self._add(Group(series.head, tail), its, start + same, expert[same])
                is_gone = mtp_dropped and anatomy.reader.is_mtp(its)
                self._others.append(_holder(start + int(same[0]), series.head, is_gone))
            for place in np.flatnonzero(layer < 0).tolist():
                self._see(start + place, table[place])
            start += len(table)

    def known(self, apart: Collection[Group]) -> _Known:
        """The modules, one of each group for all of it but for those of groups in `apart`."""
        rows = list(self._others)
        for rank, group in enumerate(self.groups):
            places, numbers = map(np.concatenate, zip(*self._parts[group], strict=True))
            order = np.argsort(places, kind="stable")
            places, numbers = places[order], numbers[order]
            if group in apart:
                _, firsts = np.unique(numbers, return_index=True)
            else:
                # One that is kept: it is to mean the same in the result.
                kept = np.isin(numbers, list(self._new_ids.get(self.groups[group], ())))
                firsts = np.array([kept.argmax()])
            for first in firsts.tolist():
                place, number = int(places[first]), int(numbers[first])
                rows.append(self._row(place, number, rank, group))
        return _Known(rows)

    def _row(self, place: int, expert: int, rank: int, group: Group) -> _Row:
        layer = self.groups[group]
        is_gone = self._mtp_dropped and self._anatomy.reader.is_mtp(layer)
        new = self._new_ids.get(layer, {}).get(expert)
        old, called = (f"{group.head}{each}{group.tail}" for each in (expert, new))
        return _Row(place, False, expert, rank, old, "" if new is None else called, is_gone)

    def _add(self, group: Group, layer: int, places: Column, numbers: Column) -> None:
        self.groups.setdefault(group, layer)
        self._parts.setdefault(group, []).append((places, numbers))

    def _see(self, place: int, record: TensorRecord) -> None:
        """Note the modules of a tensor that is not one expert's own, or named as few are."""
        role, reader, name = self._anatomy.role(record), self._anatomy.reader, record.name
        if isinstance(role, Surplus):
            return
        mtp = role.mtp if isinstance(role, Carried) else reader.is_mtp(role.layer)
        is_gone = mtp and self._mtp_dropped
        module = name.rpartition(".")[0]
        if isinstance(role, ExpertTensor):
            old = module if len(module) >= role.end else name
            new = self._new_ids.get(role.layer, {}).get(role.expert)
            called = "" if new is None else role.renamed(old, new)
            self._others.append(_Row(place, False, role.expert, 0, old, called, is_gone))
            self._others.append(_holder(place, name[: role.begin], is_gone))
            return
        parent, _, last = module.rpartition(".")
        fused = f"{parent}.{_FUSED[last]}" if last in _FUSED else ""
        for each in sorted({name, module, fused} - {""}):
            self._others.append(_Row(place, False, -1, 0, each, each, is_gone))
        # Stacked experts stand for modules of each of them.
        begin = name.rfind(".experts")
        if isinstance(role, Sliced) and not role.is_router and begin >= 0:
            numbers = np.arange(reader.experts_of(role.layer))
            for part in _STACKED:
                group = Group(f"{name[:begin]}.experts.", f".{part}")
                self._add(group, role.layer, np.full(len(numbers), place), numbers)


def _holder(place: int, head: str, is_gone: bool) -> _Row:
    """The module that has experts in it. head: what their names begin with."""
    name = head.rstrip(".")
    return _Row(place, True, -1, 0, name, name, is_gone)


def _said(known: ModuleList, how: Reading, names: Names, sort: bool) -> dict[str, tuple[str, ...]]:
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
