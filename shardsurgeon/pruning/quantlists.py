"""Quantization lists after a prune: entries follow the experts they name, or go with them.

Pure, between `anatomy` and `modelconfig`: a parsed quantization section and keep-lists in,
changes for `Document.edit` out. Lists and the keys of objects alike hold entries: ignore lists,
targets, per-module overrides. What an entry names is read by `quantnames`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from shardsurgeon.checkpoint.anatomy import Anatomy
from shardsurgeon.checkpoint.quantnames import (
    NamedExpert,
    highest_expert,
    is_regex,
    named_expert,
    plain_name,
)
from shardsurgeon.errors import ConfigError
from shardsurgeon.pruning.keeplists import KeepList
from shardsurgeon.storage.formats.documents import DELETE, Rename

Path = tuple[str | int, ...]


class QuantizationLists:
    """The lists of one file and what keep-lists make of them. where: the file, for messages."""

    def __init__(self, anatomy: Anatomy, keep: KeepList, where: str) -> None:
        self._num_experts = anatomy.num_experts
        self._num_layers = anatomy.num_layers
        self._own_mtp_numbers = bool(anatomy.family.tensors.mtp)
        self._reader = anatomy.reader
        self._where = where
        # Old id → new id; a main layer without a keep-list keeps all, a dropped MTP layer none.
        self._new_ids = {
            layer.index: {expert: expert for expert in range(anatomy.num_experts)}
            for layer in anatomy.main_layers
        }
        self._new_ids |= {
            layer: {old: new for new, old in enumerate(kept.retained)}
            for layer, kept in keep.layers.items()
        }
        self._kept = max(map(len, self._new_ids.values()))

    def changes(self, node: object, path: Path = ()) -> dict[Path, object]:
        """What renumbers or removes every entry below `node` (at `path` of its document).

        Raises ConfigError where an entry names experts in a way that cannot be renumbered.
        """
        changes: dict[Path, object] = {}
        if isinstance(node, Mapping):
            for key, value in node.items():
                renamed = self._renamed(key, (*path, key), node)
                if renamed is None:
                    changes[(*path, key)] = DELETE
                    continue
                if renamed != key:
                    changes[(*path, key)] = Rename(renamed)
                changes.update(self._value(value, (*path, key)))
        elif isinstance(node, list):
            entries = dict.fromkeys(entry for entry in node if isinstance(entry, str))
            for position, value in enumerate(node):
                if isinstance(value, str):
                    renamed = self._renamed(value, path, entries)
                    if renamed != value:
                        changes[(*path, position)] = DELETE if renamed is None else renamed
                else:
                    changes.update(self.changes(value, (*path, position)))
        return changes

    def refuse_leftovers(self, node: object) -> None:
        """Raise ConfigError where an edited section names an expert beyond those that are left."""
        for path, text in _texts(node, ()):
            highest = highest_expert(text)
            if highest < 0 or self._is_elsewhere(text):
                continue
            named = self._named(text, path)
            layers = self._layers(named) if named else list(self._new_ids)
            left = max((len(self._new_ids[layer]) for layer in layers), default=0)
            if highest >= left:
                raise ConfigError(
                    self._where,
                    f"quantization entry {text!r} still names expert {highest} of {left}",
                    "write the entry as the others are, or remove it",
                )

    def partly_named(self, node: object, path: Path) -> Iterator[tuple[Path, int]]:
        """(path of a list, layer) where the list names some survivors of a layer and not others.

        node: a section as it is before the prune. Names of one projection belong together.
        """
        found: dict[tuple[Path, int, str], set[int]] = {}
        for place, text in _texts(node, path):
            named = None if self._is_elsewhere(text) else self._named(text, place)
            if named is None:
                continue
            for layer in self._layers(named):
                new_id = self._new_ids[layer].get(named.expert)
                if new_id is not None:
                    found.setdefault((place[:-1], layer, text[named.end :]), set()).add(new_id)
        for (place, layer, _), experts in found.items():
            if len(experts) < len(self._new_ids[layer]):
                yield place, layer

    def _value(self, value: object, path: Path) -> dict[Path, object]:
        if not isinstance(value, str):
            return self.changes(value, path)
        renamed = self._renamed(value, path, {value: None})
        if renamed is None:
            raise ConfigError(
                self._where,
                f"{'.'.join(map(str, path))} is {value!r}, an expert that goes",
                "make it a list, or name another module",
            )
        return {} if renamed == value else {path: renamed}

    def _renamed(self, text: str, path: Path, siblings: Mapping[str, Any]) -> str | None:
        """An entry with its expert renumbered; None where the expert is gone.

        siblings: the entries beside it and itself, with their values where they have any.
        """
        if self._is_elsewhere(text):
            return text
        named = self._named(text, path)
        if named is None:
            return text
        answers = {self._new_ids[layer].get(named.expert) for layer in self._layers(named)}
        if not answers:
            # Of a layer that has no experts, or has none any more.
            return None
        if len(answers) > 1:
            if not self._names_all(text, named, siblings):
                raise ConfigError(
                    self._where,
                    f"quantization entry {text!r} names expert {named.expert} of no single layer",
                    "the experts of each layer get numbers of their own; write one entry per layer",
                )
            return text if named.expert < self._kept else None
        (new_id,) = answers
        return None if new_id is None else named.renumbered(text, new_id)

    def _named(self, text: str, path: Path) -> NamedExpert | None:
        return named_expert(text, is_regex(text, path), self._num_experts, self._where)

    def _names_all(self, text: str, named: NamedExpert, siblings: Mapping[str, Any]) -> bool:
        """Whether every expert has an entry of its own that says the same: then numbers that
        mean other experts in every layer still mean all of them."""
        entries = [named.renumbered(text, expert) for expert in range(self._num_experts)]
        return all(e in siblings and siblings[e] == siblings[text] for e in entries)

    def _layers(self, named: NamedExpert) -> list[int]:
        """The layers that have experts and may be meant."""
        if named.layer is None:
            return list(self._new_ids)
        begin = str(named.layer)
        numbers = [named.layer]
        if named.open_layer:
            most = max(self._new_ids)
            numbers = [n for n in range(most + 1) if str(n).startswith(begin)]
        firsts = {True: [self._num_layers], False: [0], None: [0]}[named.mtp]
        if named.mtp is None and self._own_mtp_numbers:
            firsts = [0, self._num_layers]
        return [first + n for first in firsts for n in numbers if first + n in self._new_ids]

    def _is_elsewhere(self, text: str) -> bool:
        """Whether the entry is of other experts than the model's own, a talker's say."""
        return self._reader.is_elsewhere(plain_name(text))


def _texts(node: object, path: Path) -> Iterator[tuple[Path, str]]:
    """Every key and every string below a node, with the path of it."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield (*path, key), key
            yield from _texts(value, (*path, key))
    elif isinstance(node, list):
        for position, value in enumerate(node):
            yield from _texts(value, (*path, position))
    elif isinstance(node, str):
        yield path, node
