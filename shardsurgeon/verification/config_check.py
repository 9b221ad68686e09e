"""config.json and the quantization files: what may differ from the source, and how."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from shardsurgeon.checkpoint.anatomy import Anatomy
from shardsurgeon.checkpoint.checkpoint import Checkpoint
from shardsurgeon.checkpoint.config import QUANTIZATION_KEYS, quantization_sections
from shardsurgeon.checkpoint.files import QUANTIZATION_FILES
from shardsurgeon.checkpoint.quantization_lists import ModuleList, module_lists, tool_of
from shardsurgeon.checkpoint.quantization_names import (
    NamedExpert,
    is_regex,
    named_expert,
    plain_name,
)
from shardsurgeon.checkpoint.second_configs import second_configs
from shardsurgeon.checkpoint.side_files import side_files
from shardsurgeon.errors import ConfigError
from shardsurgeon.storage.formats.strict_json import parse_json
from shardsurgeon.storage.limits import CONFIG
from shardsurgeon.verification.expected_counts import ExpectedCounts
from shardsurgeon.verification.findings import Findings
from shardsurgeon.verification.pairing import Pairing
from shardsurgeon.verification.quantization_lists import ListCheck
from shardsurgeon.verification.record import RetainedIds

# Keys that count experts, and keys about experts that count something else.
_COUNTING = re.compile(r"expert|routed", re.IGNORECASE)
_NOT_COUNTING = re.compile(r"size|dim|shared|per_tok|top_?k|freq|step|interval|layer|group")

Path = tuple[str | int, ...]


class _Gone(Exception):
    """Raised for an entry that names a pruned expert: it must be gone."""


class _Spelled(str):
    """A number other than a plain integer, as the file spells it: 1e-6 is not 0.000001 here."""

    __slots__ = ()


def check_settings(
    source: Checkpoint,
    anatomy: Anatomy,
    pruned: Checkpoint,
    keeps: RetainedIds,
    pairing: Pairing,
    findings: Findings,
) -> Collection[str]:
    """config.json and quantization files have the new counts and are otherwise the source's.

    So have second configs; their names are given back, for they are no copies.
    """
    name = source.names.config
    found = _load(pruned, name)
    no_mtp = _counts_no_mtp(anatomy, pairing, found)
    lists = ListCheck(source, anatomy, keeps, mtp_dropped=no_mtp)
    expected = _Expected(source.settings, anatomy, keeps, no_mtp, lists)
    _check_config(name, _load(source, name), found, expected, findings)
    record = pruned.provenance
    globs = (record.include, record.exclude) if record is not None else ()
    second = second_configs(source, anatomy, side_files(source, *globs).carried)
    there = {file.name for file in pruned.files}
    quantization = [file.name for file in source.files if file.name in QUANTIZATION_FILES]
    for name in (*second, *quantization):
        if name not in there:
            findings.add(name, "is missing")
            continue
        try:
            found = _load(pruned, name)
        except (ValueError, RecursionError) as error:
            findings.add(name, f"is not valid JSON ({error})")
            continue
        before = _load(source, name)
        if name in second:
            own = _Expected(before, anatomy, keeps, no_mtp, lists)
            _check_config(name, before, found, own, findings)
            continue
        method = tool_of(name)
        wanted = lists.admit(expected.section(before, method), found, method)
        lists.check(name, before, found, findings, method)
        compare_values(name, "", wanted, found, findings)
    return second.keys()


def _check_config(
    name: str, before: Any, found: Any, expected: _Expected, findings: Findings
) -> None:
    """Note where a config differs from what the source's must have become."""
    wanted = expected.config(before, ())
    for path, section in quantization_sections(before):
        if not expected.is_elsewhere(path):
            now = _at(found, path)
            _replace(wanted, path, expected.lists.admit(_at(wanted, path), now))
            expected.lists.check(name, section, now, findings)
    compare_values(name, "", wanted, found, findings)
    for path in expected.forgotten(found, ()):
        dotted, count = ".".join(map(str, path)), expected.count_before
        findings.add(name, f"{dotted} is {count}, the expert count of the source")


def _at(document: Any, path: Path) -> Any:
    """The value at a path, None where there is none."""
    for part in path:
        document = document.get(part) if isinstance(document, dict) else None
    return document


def _replace(document: Any, path: Path, value: Any) -> None:
    above = _at(document, path[:-1])
    if isinstance(above, dict) and path[-1] in above:
        above[path[-1]] = value


def _load(checkpoint: Checkpoint, name: str) -> Any:
    """A JSON file, its numbers as they are spelled. Raises ValueError where it is not JSON."""
    raw = checkpoint.read_file(name, CONFIG)
    return parse_json(raw, CONFIG, parse_float=_Spelled, parse_constant=_Spelled)


def _counts_no_mtp(anatomy: Anatomy, pairing: Pairing, found: Any) -> bool:
    """Whether the MTP count must be 0.

    Where the source has no MTP tensors, its own count and 0 are both right.
    """
    if pairing.mtp or pairing.mtp_dropped:
        return pairing.mtp_dropped
    keys = set(anatomy.family.config.mtp_layers)
    return any(path[-1] in keys and value == 0 for path, value in _integers(found, ()))


def _integers(value: Any, path: Path) -> Iterator[tuple[Path, int]]:
    """Every whole number below some key, with the path that leads to it."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _integers(inner, (*path, key))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _integers(inner, (*path, number))
    elif type(value) is int and path:
        yield path, value


class _Expected:
    """What a JSON value of the source must have become."""

    def __init__(
        self,
        config: Mapping[str, Any],
        anatomy: Anatomy,
        keeps: RetainedIds,
        no_mtp: bool,
        lists: ListCheck,
    ) -> None:
        keys = anatomy.family.config
        self._anatomy = anatomy
        self._keeps = keeps
        self.lists = lists
        self.count_before = anatomy.shared_count
        self._known: dict[Path, ModuleList] = {}
        self._texts: dict[Path, frozenset[str]] = {}
        # What is said of a layer → the layers: a list may name every expert of each.
        self._spelled_layers: dict[tuple[int | None, bool, bool | None], list[int]] = {}
        self._counts = ExpectedCounts(config, anatomy, keeps, no_mtp)
        self._mtp = set(keys.mtp_layers) if no_mtp else set()
        self._elsewhere = {tuple(dotted.split(".")) for dotted in keys.elsewhere}

    def config(self, value: Any, path: Path) -> Any:
        if path in self._elsewhere:
            return value
        if path and path[-1] in QUANTIZATION_KEYS:
            return self.section(value)
        if isinstance(value, dict):
            members = {key: self.config(inner, (*path, key)) for key, inner in value.items()}
            return self._counts.completed(path, value, members)
        if isinstance(value, list):
            items = self._counts.elements(path, value)
            return [self.config(inner, (*path, number)) for number, inner in enumerate(items)]
        if type(value) is int and path:
            count = self._counts.of(path, value)
            if count is not None:
                return count
            if path[-1] in self._mtp:
                return 0
        return value

    def forgotten(self, found: Any, path: Path) -> Iterator[Path]:
        """Paths of the output's config with the old count under a key that counts experts.

        Keys that the family declares are left out: their values have been compared.
        """
        old = self.count_before
        for at, value in _integers(found, path):
            name = next((part for part in reversed(at) if isinstance(part, str)), "")
            if self.is_elsewhere(at) or not QUANTIZATION_KEYS.isdisjoint(at):
                continue
            counts = _COUNTING.search(name) and not _NOT_COUNTING.search(name)
            if counts and value == old and self._counts.of(at, value) is None:
                yield at

    def is_elsewhere(self, path: Path) -> bool:
        """Whether a part of the config is about other experts, a talker's say."""
        return any(path[:length] in self._elsewhere for length in range(1, len(path) + 1))

    def section(self, value: Any, method: str = "") -> Any:
        """A quantization section with the new number in every entry that names an expert.

        method: the quant_method of a section that says none.
        """
        if isinstance(value, dict):
            self._known = {each.path: each for each in module_lists(value, (), method)}
            self._texts = {path: frozenset(each.entries) for path, each in self._known.items()}
        return self._quantization(value, ())

    def _quantization(self, value: Any, path: Path) -> Any:
        if isinstance(value, dict):
            return dict(self._members(value, path))
        if isinstance(value, list):
            return list(self._items(value, path))
        return value

    def _members(self, value: dict[str, Any], path: Path) -> Iterator[tuple[str, Any]]:
        for key, inner in value.items():
            try:
                yield self._entry(key, (*path, key)), self._quantization(inner, (*path, key))
            except _Gone:
                continue

    def _items(self, value: list[Any], path: Path) -> Iterator[Any]:
        for number, inner in enumerate(value):
            try:
                # A _Spelled number is a str too, and not an entry.
                named = type(inner) is str
                yield (
                    self._entry(inner, path)
                    if named
                    else self._quantization(inner, (*path, number))
                )
            except _Gone:
                continue

    def _entry(self, text: str, path: Path) -> str:
        if self._anatomy.reader.is_elsewhere(plain_name(text)):
            return text
        known = self._known.get(path, self._known.get(path[:-1]))
        try:
            named = named_expert(text, is_regex(text, path), self._anatomy.num_experts, "")
        except ConfigError:
            named = None  # it stays, or the names that it means stand in its place
        if named is None:
            if known is not None and self.lists.only_dropped(text, known):
                raise _Gone
            return text
        new_ids = {self._new_id(layer, named.expert) for layer in self._layers(named)}
        if len(new_ids) > 1:
            kept = max(map(len, self._keeps.retained.values()))
            if named.expert >= kept and self._names_all(text, named, known):
                raise _Gone
            return text  # the names that it means may stand in its place
        new_id = new_ids.pop() if new_ids else None
        if new_id is None:
            raise _Gone
        return named.renumbered(text, new_id)

    def _names_all(self, text: str, named: NamedExpert, known: ModuleList | None) -> bool:
        """Whether every expert has such an entry: those that are left then mean all experts."""
        texts = self._texts[known.path] if known is not None else frozenset()
        return all(
            named.renumbered(text, expert) in texts for expert in range(self._anatomy.num_experts)
        )

    def _new_id(self, layer: int, old_id: int) -> int | None:
        retained = self._keeps.retained[layer]
        return retained.index(old_id) if old_id in retained else None

    def _layers(self, named: NamedExpert) -> list[int]:
        """The layers that an entry may mean, of those that have experts."""
        spelled = named.layer, named.open_layer, named.mtp
        if spelled not in self._spelled_layers:
            self._spelled_layers[spelled] = self._find_layers(named)
        return self._spelled_layers[spelled]

    def _find_layers(self, named: NamedExpert) -> list[int]:
        retained = self._keeps.retained
        if named.layer is None:
            return list(retained)
        first_mtp = self._anatomy.num_layers
        own = bool(self._anatomy.family.tensors.mtp)
        firsts = (
            [first_mtp] if named.mtp else [0] if named.mtp is False or not own else [0, first_mtp]
        )
        wanted = str(named.layer)
        return [
            layer
            for layer in retained
            for first in firsts
            if str(layer - first) == wanted
            or (named.open_layer and str(layer - first).startswith(wanted))
        ]


def compare_values(where: str, path: str, expected: Any, found: Any, findings: Findings) -> None:
    """Note where two JSON values of the file `where` differ; the order of keys counts.

    path: of both in the file, a dot behind it.
    """
    if isinstance(expected, dict) and isinstance(found, dict):
        for key in [key for key in expected if key not in found]:
            findings.add(where, f"{path}{key} is missing")
        for key in [key for key in found if key not in expected]:
            findings.add(where, f"{path}{key} was added")
        if expected.keys() == found.keys() and list(expected) != list(found):
            findings.add(where, f"the keys of {path or 'the top'} are in another order")
        for key in [key for key in expected if key in found]:
            compare_values(where, f"{path}{key}.", expected[key], found[key], findings)
    elif isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        for position, (left, right) in enumerate(zip(expected, found, strict=True)):
            compare_values(where, f"{path}{position}.", left, right, findings)
    elif type(expected) is not type(found) or expected != found:
        shown = f"{_brief(found)}, expected {_brief(expected)}"
        findings.add(where, f"{path.rstrip('.') or 'the document'} is {shown}")


def _brief(value: Any) -> str:
    text = str(value) if isinstance(value, _Spelled) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
