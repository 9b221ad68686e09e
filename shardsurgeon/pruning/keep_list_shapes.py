"""The keep-lists of other tools, told apart by their own words.

Kept and dropped ids look the same, and at half the experts they are equally many. What a file
means follows from a key that says so, or from a shape that only one tool writes; a bare list
of ids under layer numbers is refused rather than guessed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal, TypeAlias

from shardsurgeon.checkpoint.layer_names import Layer, layer_order, parse_layer
from shardsurgeon.errors import KeepListError
from shardsurgeon.pruning.plan_model import PlannedModel
from shardsurgeon.scores.list_names import (
    LAYER_TABLES,
    ListMeaning,
    are_records,
    expert_of,
    layer_of,
    list_meaning,
)
from shardsurgeon.storage.formats.strict_json import CheckedJson, brief, is_whole_number
from shardsurgeon.storage.limits import MAX_EXPERTS

Meaning: TypeAlias = Literal["kept", "dropped"]
Ids: TypeAlias = tuple[int, ...]

SHAPES = 'a keep-list is {"kept": {layer: [ids]}}, {layer: {"kept": [ids]}} or a plan.json'
_SAY_IT = "say which with --lists kept or --lists dropped"
_COUNT_KEYS = (
    "num_experts",
    "n_expert",
    "original_experts",
    "source_experts",
    "num_experts_before",
)


@dataclass(frozen=True, slots=True)
class KeepListFile:
    """What a keep-list file says, before it is compared with a model.

    origin: the file, as messages name it; meaning: whether its ids stay or go; layers: layer
    number, or `mtp.<j>`, → ids, ascending; num_experts: experts per layer before, where the
    file says it; original_ids: whether ids are those of the first, unpruned model (a pruned
    checkpoint's metadata) and not those of the checkpoint at hand; mtp_like_first: whether MTP
    layers without a list of their own use the first layer's (as omnimergekit's drop maps do);
    preserved, saliency, per_layer: of the layers for which the file says them; per_layer: the
    layer's own number of experts before, at most num_experts. rows: the ids of the model's MoE
    layers in order, of a file that names no layers; then layers is empty. made_for: the model, of
    a plan.json or of the record of a prune; ratio: that these files say was asked for.
    """

    origin: str
    meaning: Meaning
    layers: Mapping[Layer, Ids]
    num_experts: int | None = None
    original_ids: bool = False
    mtp_like_first: bool = False
    preserved: Mapping[Layer, Ids] = field(default_factory=dict)
    saliency: Mapping[Layer, tuple[float | None, ...]] = field(default_factory=dict)
    per_layer: Mapping[Layer, int] = field(default_factory=dict)
    rows: tuple[Ids, ...] = ()
    made_for: PlannedModel | None = None
    ratio: float | None = None


class ListReader:
    """Ids and layers of one file, checked; every fault names the file and the place in it."""

    def __init__(self, where: str, meaning: Meaning | None) -> None:
        """where: the file; meaning: what the caller knows its lists to be."""
        self.where = where
        self.told = meaning
        self.json = CheckedJson(where, KeepListError, SHAPES, "{place} is {value}, not {expected}")

    def require_meaning(self, meaning: Meaning) -> None:
        """Raise KeepListError where the caller knows the opposite."""
        if self.told not in (None, meaning):
            raise self.fault(f"its lists are {meaning} experts, not {self.told}")

    def by_layer(self, value: Mapping[str, object]) -> dict[Layer, object]:
        """The members of an object by the layers that its keys name, in order."""
        found: dict[Layer, tuple[str, object]] = {}
        for key, item in value.items():
            name = parse_layer(key)
            if name is None:
                raise self.fault(f"key {brief(key)} names no layer", SHAPES)
            if name.layer in found:
                problem = f"{brief(found[name.layer][0])} and {brief(key)} are both "
                raise self.fault(f"{problem}layer {name.layer}", "keep the one that is meant")
            found[name.layer] = key, item
        if not found:
            raise self.fault("lists no layer", SHAPES)
        return {layer: found[layer][1] for layer in sorted(found, key=layer_order)}

    def ids(self, value: object, place: str, count: int | None) -> Ids:
        """Expert ids in ascending order."""
        if not isinstance(value, list):
            raise self.fault(f"{place}: {brief(value)} is not a list of expert ids", SHAPES)
        if not value:
            raise self.fault(f"{place}: lists no expert", "list at least one")
        for old_id in value:
            if not is_whole_number(old_id) or (count is not None and old_id >= count):
                limit = "" if count is None else f" between 0 and {count - 1}"
                raise self.fault(f"{place}: {brief(old_id)} is not an expert id{limit}")
        ids = tuple(sorted(value))
        for before, after in pairwise(ids):
            if before == after:
                raise self.fault(f"{place}: expert {after} is listed twice", "list it once")
        return ids

    def maybe_no_ids(self, value: object, place: str, count: int | None) -> Ids:
        """Expert ids in ascending order, of a list that may be empty."""
        return () if value == [] else self.ids(value, place, count)

    def fault(self, problem: str, remedy: str = "") -> KeepListError:
        """The error of this file."""
        return KeepListError(self.where, problem, remedy)


class OthersLists(ListReader):
    """Reads the object of a file that is not ours."""

    def read(self, value: Mapping[str, object]) -> KeepListFile:
        """Recognise the shape by its keys."""
        if "coreExperts" in value or _has(value.get("perLayer"), "coreExperts"):
            raise self.fault(
                "is a residency plan of reap-expert-swap: its core experts stay in memory, "
                "the others are not pruned",
                SHAPES,
            )
        count = self._num_experts(value)
        found = self._sections(value)
        if found:
            return self._said(found, count)
        for key in LAYER_TABLES:
            item = value.get(key)
            if isinstance(item, dict | list) and item:
                return self._bare(self._table(item, key), None, count)
        listed = self._one_set(value)
        return self._bare(self.by_layer(listed), _meaning_of(listed), count)

    # Lists under a word that says what they are

    def _sections(self, value: Mapping[str, object]) -> dict[ListMeaning, tuple[str, object]]:
        """Meaning → (key, lists), of the object's keys and of those below a word that holds
        nothing but such keys (`keep_maps`)."""
        found: dict[ListMeaning, tuple[str, object]] = {}

        def add(meaning: ListMeaning, key: str, item: object) -> None:
            if meaning in found:
                problem = f"says both {found[meaning][0]} and {key}"
                raise self.fault(problem, "keep the one that is meant")
            found[meaning] = key, item

        for key, item in value.items():
            meaning = list_meaning(key)
            if meaning is None or not isinstance(item, dict | list):
                continue
            inner = item if isinstance(item, dict) else {}
            if any(parse_layer(name) is not None for name in inner):
                add(meaning, key, item)
            elif table := next((inner[name] for name in LAYER_TABLES if name in inner), None):
                add(meaning, key, table)
            elif any(list_meaning(name) is not None for name in inner):
                for told, below in self._sections(inner).items():
                    add(told, *below)
            else:
                add(meaning, key, item)
        return found

    def _said(
        self, found: Mapping[ListMeaning, tuple[str, object]], count: int | None
    ) -> KeepListFile:
        """One list of those that stay or go; or both, which then must make up every layer."""
        kept, dropped = found.get("kept"), found.get("dropped")
        if kept is None and dropped is None:
            problem = f"ranks experts under {found['ranking'][0]} and says not how many stay"
            raise self.fault(problem, "give it as SCORES, with --ratio or --keep")
        if kept is not None and dropped is not None:
            tables = [self._table(item, key) for key, item in (kept, dropped)]
            if isinstance(tables[0], list) or isinstance(tables[1], list):
                problem = f"says both {kept[0]} and {dropped[0]}, and names no layers"
                raise self.fault(problem, "keep the one that is meant")
            layers = {**tables[0], **tables[1]}
            empty: list[object] = []
            both = {n: (tables[0].get(n, empty), tables[1].get(n, empty)) for n in layers}
            return self._complements(both, count)
        meaning: Meaning = "kept" if kept is not None else "dropped"
        key, item = found[meaning]
        return self._file(meaning, self._table(item, key), count)

    def _complements(
        self, both: Mapping[Layer, tuple[object, object]], count: int | None
    ) -> KeepListFile:
        """layer → (kept, dropped): as many experts as both together, each in one of them."""
        layers: dict[Layer, Ids] = {}
        per_layer: dict[Layer, int] = {}
        for layer in sorted(both, key=layer_order):
            place = f"layer {layer}"
            kept = self.ids(both[layer][0], f"{place}, kept", count)
            dropped = self.maybe_no_ids(both[layer][1], f"{place}, dropped", count)
            experts = len(kept) + len(dropped)
            if sorted(kept + dropped) != list(range(experts)):
                problem = f"{place}: {len(kept)} kept and {len(dropped)} dropped ids do not make "
                raise self.fault(f"{problem}up {experts} experts", "keep the list that is meant")
            layers[layer], per_layer[layer] = kept, experts
        self.require_meaning("kept")
        most = max(per_layer.values())
        if count is not None and count != most:
            problem = f"is for {count} experts, its layers list {most}"
            raise self.fault(problem, "make the file again")
        return KeepListFile(self.where, "kept", layers, most, per_layer=per_layer)

    # Lists and small objects by layer

    def _bare(
        self,
        table: dict[Layer, object] | list[object],
        own: Meaning | None,
        count: int | None,
    ) -> KeepListFile:
        """Layers with lists or small objects under them, without a word above.

        own: what the shape says of its lists, where it does.
        """
        if isinstance(table, dict):
            if all(isinstance(item, dict) for item in table.values()):
                return self._spelled_out(table, count)
            if all(type(item) is int for item in table.values()):
                raise self.fault("holds how many experts stay but not which", SHAPES)
        if own is None and self.told is None:
            raise self.fault("its lists could be kept or dropped experts", _SAY_IT)
        meaning = own or self.told or "kept"
        # A drop map without "mtp" prunes the MTP layer like layer 0: omnimergekit's rule.
        like_first = own is None and meaning == "dropped"
        return self._file(meaning, table, count, like_first)

    def _one_set(self, value: Mapping[str, object]) -> dict[str, object]:
        """The layers of an object without such words, or of the one set of layers in it."""
        listed = {
            key: item
            for key, item in value.items()
            if parse_layer(key) is not None or isinstance(item, dict | list)
        }
        sets = [key for key in listed if parse_layer(key) is None and _is_table(listed[key])]
        if sets and len(sets) == len(listed):
            if len(sets) > 1:
                problem = f"holds {len(sets)} keep-lists, {' and '.join(map(brief, sets[:2]))}"
                raise self.fault(problem, "save the one that is meant in a file of its own")
            return self.json.as_object(listed[sets[0]], sets[0])
        if listed and not any(parse_layer(key) is not None for key in listed):
            keys = ", ".join(map(brief, [*listed][:4]))
            problem = f"lists no experts by layer: key {keys} names no layer"
            raise self.fault(problem, "give the keep-list that it is about, or scores")
        return listed

    def _spelled_out(self, by_layer: Mapping[Layer, object], count: int | None) -> KeepListFile:
        """{layer: {"kept": [ids], "keep": how many}}, in any words, of one meaning or of both."""
        lists: dict[Layer, dict[ListMeaning, object]] = {}
        for layer, item in by_layer.items():
            record = self.json.as_object(item, f"layer {layer}")
            lists[layer] = {}
            for key, ids in _lists_of(record):
                meaning = list_meaning(key)
                assert meaning is not None
                if meaning in lists[layer]:
                    problem = f"layer {layer} lists {meaning} experts twice, also as {brief(key)}"
                    raise self.fault(problem, "keep the one that is meant")
                self._require_count(layer, record, meaning, ids)
                lists[layer][meaning] = ids
            if not {"kept", "dropped"}.intersection(lists[layer]):
                raise self._without_list(layer, record, lists[layer])
        told = {meaning for found in lists.values() for meaning in found if meaning != "ranking"}
        if len(told) > 1:
            odd = next((n for n, found in lists.items() if not told <= found.keys()), None)
            if odd is not None:
                raise self.fault("has kept experts in some layers and dropped in others", _SAY_IT)
            return self._complements(
                {n: (f["kept"], f["dropped"]) for n, f in lists.items()}, count
            )
        meaning = "kept" if "kept" in told else "dropped"
        return self._file(meaning, {n: found[meaning] for n, found in lists.items()}, count)

    def _require_count(
        self, layer: Layer, record: Mapping[str, object], meaning: ListMeaning, ids: object
    ) -> None:
        """Refuse a list beside a number that says another length."""
        for key, said in record.items():
            alike = list_meaning(key) == meaning and not isinstance(said, dict | list)
            if alike and said is not None and isinstance(ids, list) and said != len(ids):
                problem = f"layer {layer} lists {len(ids)} experts and says {brief(said)}"
                raise self.fault(problem, "make the list again")

    def _without_list(
        self, layer: Layer, record: Mapping[str, object], found: Mapping[ListMeaning, object]
    ) -> KeepListError:
        if "ranking" in found:
            remedy = "give it as SCORES, with --ratio or --keep"
            return self.fault(f"layer {layer} ranks experts and says not how many stay", remedy)
        keys = ", ".join(map(str, [*record][:4])) or "nothing"
        problem = f"layer {layer} lists neither kept nor dropped experts, it holds {keys[:80]}"
        return self.fault(problem, SHAPES)

    # Pieces

    def _table(self, value: object, key: str) -> dict[Layer, object] | list[object]:
        """The lists of each layer: from an object, from records, or rows without names."""
        if isinstance(value, dict):
            return self.by_layer(value)
        if isinstance(value, list) and value and all(isinstance(row, list) for row in value):
            return value
        if isinstance(value, list) and are_records(value):
            return self._from_records(value)
        raise self.fault(f"{key} is {brief(value)}, no table of lists by layer", SHAPES)

    def _from_records(self, records: Sequence[dict[object, object]]) -> dict[Layer, object]:
        """Records of one expert each, or of one layer each."""
        found: dict[Layer, list[object]] = {}
        whole: dict[Layer, object] = {}
        for record in records:
            layer = layer_of(record)
            assert layer is not None
            expert = expert_of(record)
            if expert is not None:
                found.setdefault(layer, []).append(expert)
            elif layer in whole:
                raise self.fault(f"has two records of layer {layer}", "keep the one that is meant")
            else:
                whole[layer] = record
        if found and whole:
            problem = f"has records with and without an expert (layer {next(iter(whole))})"
            raise self.fault(problem, SHAPES)
        lists: dict[Layer, object] = {**found, **whole}
        return {layer: lists[layer] for layer in sorted(lists, key=layer_order)}

    def _file(
        self,
        meaning: Meaning,
        table: Mapping[Layer, object] | list[object],
        count: int | None,
        mtp_like_first: bool = False,
    ) -> KeepListFile:
        self.require_meaning(meaning)
        # A layer may drop no expert, where others do; it cannot keep none.
        read = self.maybe_no_ids if meaning == "dropped" else self.ids
        if isinstance(table, list):
            rows = tuple(read(row, f"row {n}", count) for n, row in enumerate(table))
            return KeepListFile(self.where, meaning, {}, count, rows=rows)
        layers = {layer: read(item, f"layer {layer}", count) for layer, item in table.items()}
        return KeepListFile(self.where, meaning, layers, count, mtp_like_first=mtp_like_first)

    def _num_experts(self, value: Mapping[str, object]) -> int | None:
        for key in _COUNT_KEYS:
            if key in value:
                count = value[key]
                if not is_whole_number(count) or count > MAX_EXPERTS:
                    raise self.fault(f"{key} is {brief(count)}, not a number of experts")
                return count
        return None


def _lists_of(record: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    """The members of a layer's record that say what they list."""
    for key, item in record.items():
        if list_meaning(key) is not None and not isinstance(item, int | float | str | None):
            yield key, item


def _has(value: object, key: str) -> bool:
    """Whether an object, or one of its members, has a key."""
    if not isinstance(value, dict):
        return False
    return key in value or any(isinstance(item, dict) and key in item for item in value.values())


def _is_table(value: object) -> bool:
    """Whether it is an object whose keys name layers, with lists under them."""
    return (
        isinstance(value, dict)
        and bool(value)
        and all(parse_layer(key) is not None for key in value)
        and all(isinstance(item, list) for item in value.values())
    )


def _meaning_of(listed: Mapping[str, object]) -> Meaning | None:
    """What a shape says of itself, where only one tool writes it."""
    if all(_is_module_path(key) for key in listed):
        return "kept"  # llm-compressor's report
    if "mtp" in listed and not any(_is_module_path(key) for key in listed):
        return "dropped"  # omnimergekit's drop map
    return None


def _is_module_path(key: str) -> bool:
    """`model.layers.3.mlp`: a layer and a module in it."""
    name = parse_layer(key)
    return name is not None and name.rest != "" and not key[0].isdigit()
