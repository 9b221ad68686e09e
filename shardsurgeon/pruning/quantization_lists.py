"""Quantization lists for the experts that are left: every list means the modules that it meant.

An entry that names an expert by its number gets the new number, or goes with the expert; one that
reaches a number in another way (`re:.*\\.5\\.up_proj`, `*.5.*`) is written out as the names that it
means, where it can be. Then the old and the new list are compared by what they mean. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple

from shardsurgeon.checkpoint.anatomy import Anatomy
from shardsurgeon.checkpoint.checkpoint import Checkpoint
from shardsurgeon.checkpoint.quantization_lists import (
    FIRST_COUNTS,
    ModuleList,
    Reading,
    module_lists,
)
from shardsurgeon.checkpoint.quantization_names import (
    NamedExpert,
    highest_expert,
    is_regex,
    named_expert,
    plain_name,
)
from shardsurgeon.errors import ConfigError
from shardsurgeon.pruning.keep_lists import KeepList
from shardsurgeon.pruning.module_names import Modules
from shardsurgeon.storage.formats.json_edit import DELETE, Rename

Path = tuple[str | int, ...]

_OF_LAYER = re.compile(r"(?:^|\.)(?:layers|blocks)\.([0-9]{1,6})(?=[.*]|\Z)")
_REMEDY = "name the modules in full, one entry for each, or remove the entry"


class Way(NamedTuple):
    """One way to read a list: as one kind of engine does, on names that are spelled with a head
    (`Modules.heads`; None is the checkpoint's own)."""

    known: ModuleList
    reading: Reading
    head: str | None = None


class QuantizationLists:
    """Rewrites the quantization lists of one file. where: the file, as messages name it.

    method: the quant_method of sections that do not say it.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        anatomy: Anatomy,
        keep: KeepList,
        where: str,
        *,
        drop_mtp: bool = False,
        method: str = "",
    ) -> None:
        self._num_experts = anatomy.num_experts
        self._num_layers = anatomy.num_layers
        self._own_mtp_numbers = bool(anatomy.family.tensors.mtp)
        self._reader = anatomy.reader
        self._where = where
        self._method = method
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
        self._dropped = range(0)
        if drop_mtp:
            last = max((layer.index for layer in anatomy.layers), default=0)
            end = max(last + 1, anatomy.num_layers + anatomy.num_mtp_layers)
            self._dropped = range(anatomy.num_layers, end)
        # Listing every module takes a while, and most models have no list that needs it.
        self._list_modules = partial(Modules, checkpoint, anatomy, keep, drop_mtp=drop_mtp)
        self._known: dict[Path, ModuleList] = {}

    @cached_property
    def _modules(self) -> Modules:
        return self._list_modules()

    def changes(self, section: Mapping[str, Any], path: Path = ()) -> dict[Path, object]:
        """What rewrites every list of a section (at `path` of its document).

        Raises ConfigError where an entry names experts in a way that cannot be rewritten.
        """
        self._known = {each.path: each for each in self._lists(section, path)}
        return self._changes(section, path)

    def refuse_changed(
        self, section: Mapping[str, Any], edited: Mapping[str, Any], path: Path = ()
    ) -> None:
        """Raise ConfigError where an edited section means other modules than the section did.

        Also where it names an expert beyond those that are left.
        """
        self._refuse_leftovers(edited)
        after = {(each.path, each.values is None): each for each in self._lists(edited, path)}
        for old in self._lists(section, path):
            none_left = ModuleList(old.path, old.readings, (), None)
            new = after.get((old.path, old.values is None), none_left)
            for way in self._ways(old):
                self._refuse_other(old, new, way)

    def partly_named(self, section: Mapping[str, Any], path: Path) -> Iterator[tuple[Path, int]]:
        """(path of a list, layer) where the list means some survivors of a layer and not others.

        section: as it is before the prune. Modules of one name belong together.
        """
        for each in self._lists(section, path):
            if each.path[-1:] == ("config_groups",):
                continue
            for reading in each.readings:
                found = self._survivors(each.entries, Way(each, reading))
                for part in self._modules.experts:
                    left = range(part.begin, part.begin + len(part.retained))
                    if 0 < sum(place in found for place in left) < len(left):
                        yield each.path, part.layer

    def _lists(self, section: Mapping[str, Any], path: Path) -> list[ModuleList]:
        return list(module_lists(section, path, self._method))

    def _ways(self, known: ModuleList) -> Iterator[Way]:
        """Every way to read a list, each of which must keep its meaning."""
        for head in (None, *self._modules.heads[1:]):
            yield from (Way(known, reading, head) for reading in known.readings)

    def _meant(self, text: str, way: Way) -> Sequence[int]:
        """Places of the modules that an entry means; in another spelling than the checkpoint's
        only where it means none in its own."""
        if way.head is not None and any(
            self._modules.meant(text, reading) for reading in way.known.readings
        ):
            return ()
        return self._modules.meant(text, way.reading, way.head)

    def _means_any(self, text: str, known: ModuleList) -> set[int]:
        return {place for way in self._ways(known) for place in self._meant(text, way)}

    # What is renumbered, removed and written out.

    def _changes(self, node: object, path: Path) -> dict[Path, object]:
        changes: dict[Path, object] = {}
        if isinstance(node, Mapping):
            for key, value in node.items():
                inside = (*path, key)
                renamed = self._key(key, inside, node)
                if renamed is None:
                    changes[inside] = DELETE
                    continue
                if renamed != key:
                    changes[inside] = Rename(renamed)
                changes.update(self._value(value, inside))
        elif isinstance(node, list):
            changes.update(self._items(node, path))
            for position, value in enumerate(node):
                if not isinstance(value, str):
                    changes.update(self._changes(value, (*path, position)))
        return changes

    def _key(self, key: str, path: Path, node: Mapping[str, Any]) -> str | None:
        known = self._known.get(path[:-1])
        try:
            renamed = self._renamed(key, path, node)
        except ConfigError:
            # What means the same experts after the prune needs no new number.
            if known is None or not self._stays(key, known):
                raise
            return key
        return None if renamed == key and self._only_dropped(key, known) else renamed

    def _items(self, node: list[Any], path: Path) -> dict[Path, object]:
        """What changes among the texts of a list."""
        known = self._known.get(path)
        entries = dict.fromkeys(entry for entry in node if isinstance(entry, str))
        images: dict[str, list[str]] = {}
        problems: dict[str, ConfigError] = {}
        for text in entries:
            images[text] = [text]
            try:
                renamed = self._renamed(text, path, entries)
            except ConfigError as problem:
                if known is None or not known.is_flat:
                    raise
                problems[text] = problem
                continue
            if renamed is None or (renamed == text and self._only_dropped(text, known)):
                images[text] = []
            else:
                images[text] = [renamed]
        if known is not None and known.is_flat and self._write_out(known, images, problems):
            return {path: list(dict.fromkeys(new for text in node for new in images[text]))}
        return {
            (*path, position): images[text][0] if images[text] else DELETE
            for position, text in enumerate(node)
            if isinstance(text, str) and images[text] != [text]
        }

    def _write_out(
        self, known: ModuleList, images: dict[str, list[str]], problems: Mapping[str, ConfigError]
    ) -> bool:
        """Replace entries that would mean other modules by the names that they mean.

        images: entry → what it becomes; problems: entry → why it cannot be renumbered. Returns
        whether any was replaced.
        """
        whole = [new for text in images for new in images[text]]
        if not problems and self._same(known, images, whole):
            return False
        odd = [t for t in images if t in problems or not self._same(known, [t], images[t])]
        replaced = False
        for text in odd:
            if text in problems and self._stays(text, known):
                continue
            images[text] = self._names_meant(text, known, problems.get(text))
            replaced = True
        return replaced

    def _names_meant(self, text: str, known: ModuleList, problem: ConfigError | None) -> list[str]:
        """The new names of the modules that an entry means. Raises ConfigError for other modules
        than experts', and where the engines differ in what it means."""
        meant = [frozenset(self._meant(text, Way(known, reading))) for reading in known.readings]
        modules = self._modules
        others = {place for place in meant[0] if place >= modules.num_in_experts}
        if not meant[0] or len(set(meant)) > 1 or others - modules.gone:
            if problem is not None:
                raise problem
            for way in self._ways(known):
                for place in sorted(self._survivors([text], way) ^ self._reached([text], way)):
                    raise self._changed(text, modules.before[place])
        left = (modules.after[place] for place in sorted(meant[0]))
        return [modules.names[place] for place in left if place >= 0]

    def _changed(self, text: str, place: int) -> ConfigError:
        name = self._modules.names[place]
        shown = text if len(text) <= 200 else f"{text[:197]}..."
        problem = f"quantization entry {shown!r} would no longer mean what it does now for {name}"
        return ConfigError(self._where, problem, _REMEDY)

    def _stays(self, text: str, known: ModuleList) -> bool:
        """Whether an entry means some modules, and the same ones after the prune."""
        return bool(self._means_any(text, known)) and self._same(known, [text], [text])

    def _same(self, known: ModuleList, before: Collection[str], after: Collection[str]) -> bool:
        """Whether entries mean in the result what other entries mean in the source."""
        return all(
            self._survivors(before, way) == self._reached(after, way) for way in self._ways(known)
        )

    def _survivors(self, entries: Iterable[str], way: Way) -> set[int]:
        """Places in the result of the modules that entries mean in the source."""
        after = self._modules.after
        return {after[place] for text in entries for place in self._meant(text, way)} - {-1}

    def _reached(self, entries: Iterable[str], way: Way) -> set[int]:
        """Places of the modules that entries mean in the result."""
        before = self._modules.before
        return {p for text in entries for p in self._meant(text, way) if before[p] >= 0}

    def _only_dropped(self, text: str, known: ModuleList | None) -> bool:
        """Whether an entry means modules of dropped MTP layers and nothing else."""
        if not self._dropped or known is None:
            return False
        meant = self._means_any(text, known)
        if meant:
            return meant <= self._modules.gone
        # Of a module that has no tensors.
        layers = [int(number) for number in _OF_LAYER.findall(plain_name(text))]
        return bool(layers) and layers[0] in self._dropped

    # What the lists mean in the end.

    def _refuse_other(self, old: ModuleList, new: ModuleList, way: Way) -> None:
        modules = self._modules
        # compressed-tensors itself asks names before patterns, each in the order of the alphabet.
        for in_order in {False, old.path[-1:] == ("config_groups",)}:
            before = self._said(old, way, in_order)
            was = {modules.after[place]: said for place, said in before.items()}
            now = self._said(new, way, in_order)
            for place in sorted({*was, *now} - {-1}):
                source = modules.before[place]
                if source >= 0 and was.get(place) != now.get(place):
                    entry = self._first(old, source, place, way)
                    entry = entry or self._first(new, place, source, way)
                    raise self._changed(entry, source)

    def _said(self, known: ModuleList, way: Way, in_order: bool) -> dict[int, tuple[str, ...]]:
        """Place of a module → what a list says of it: the values of its entries, in order, or of
        the first, where that alone counts.

        in_order: sort the entries first.
        """
        values = known.values or ("",) * len(known.entries)
        pairs = list(zip(known.entries, values, strict=True))
        if in_order:
            pairs.sort(key=lambda pair: ("re:" in pair[0], pair[0]))
        found: dict[int, tuple[str, ...]] = {}
        alike: dict[tuple[str, ...], tuple[str, ...]] = {}
        for text, value in pairs:
            for place in self._meant(text, way):
                said = found.get(place, ())
                if said[-1:] != (value,) and not (said and way.reading in FIRST_COUNTS):
                    found[place] = alike.setdefault((*said, value), (*said, value))
        return found

    def _first(self, known: ModuleList, place: int, other: int, way: Way) -> str:
        """The first entry that means a module, and not the other if there is such an entry."""
        means = [text for text in known.entries if place in self._meant(text, way)]
        return next((t for t in means if other not in self._meant(t, way)), next(iter(means), ""))

    def _refuse_leftovers(self, node: object) -> None:
        """Raise ConfigError where an edited section names an expert beyond those that are left."""
        for path, text in _texts(node, ()):
            highest = highest_expert(text)
            if highest < 0 or self._is_elsewhere(text):
                continue
            try:
                named = self._named(text, path)
            except ConfigError:
                continue  # it means the same experts as before, whatever it names
            layers = self._layers(named) if named else list(self._new_ids)
            left = max((len(self._new_ids[layer]) for layer in layers), default=0)
            if highest >= left:
                raise ConfigError(
                    self._where,
                    f"quantization entry {text!r} still names expert {highest} of {left}",
                    "write the entry as the others are, or remove it",
                )

    def _value(self, value: object, path: Path) -> dict[Path, object]:
        if not isinstance(value, str):
            return self._changes(value, path)
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
            # A dense layer, or a dropped MTP layer.
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
        """Whether the entry names other experts than the model's own (a talker's)."""
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
