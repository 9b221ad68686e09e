"""Keep-list files of every accepted shape, told apart by their own words.

Kept and dropped ids look the same, and at half the experts they are equally many. What a file
means follows from a key that says so, or from a shape that only one tool writes; a bare list
of ids under layer numbers is refused rather than guessed.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from os import PathLike
from pathlib import Path
from typing import Literal, TypeAlias

from shardsurgeon.checkpoint.layer_names import Layer, layer_order, parse_layer
from shardsurgeon.errors import KeepListError
from shardsurgeon.storage.formats.strict_json import (
    CheckedJson,
    Repeated,
    as_number,
    brief,
    is_whole_number,
    read_object,
)

PLAN_KIND = "shardsurgeon-plan"
PLAN_FORMAT = 1

Meaning: TypeAlias = Literal["kept", "dropped"]
Ids: TypeAlias = tuple[int, ...]

_SAY_IT = 'say which in the file: {"kept": {layer: [ids]}} or {"dropped": {layer: [ids]}}'
_SHAPES = 'a keep-list is {"kept": {layer: [ids]}}, {layer: {"kept": [ids]}} or a plan.json'
_COUNT_KEYS = ("num_experts", "n_expert")

_MAX_NBYTES = 64 * 2**20


@dataclass(frozen=True, slots=True)
class KeepListFile:
    """What a keep-list file says, before it is compared with a model.

    origin: the file, as messages name it; meaning: whether its ids stay or go; layers: layer
    number, or `mtp.<j>`, → ids, ascending; num_experts: experts per layer before, where the
    file says it; original_ids: whether ids are those of the first, unpruned model (a pruned
    checkpoint's metadata) and not those of the checkpoint at hand; mtp_like_first: whether MTP
    layers without a list of their own use the first layer's (as omnimergekit's drop maps do);
    preserved, saliency, per_layer: of the layers for which the file says them; per_layer: the
    layer's own number of experts before, at most num_experts.
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


def recognise(value: Mapping[str, object], where: str, meaning: Meaning | None) -> KeepListFile:
    """What the JSON object of a keep-list file says.

    meaning: what bare lists of ids are, where the caller knows it; it may not contradict the
    file. Raises KeepListError naming the layer, or how to say what the lists mean.
    """
    return _Shapes(where, meaning).read(value)


class _Shapes:
    """Reads one file's object."""

    def __init__(self, where: str, meaning: Meaning | None) -> None:
        self._where = where
        self._told = meaning
        self._json = CheckedJson(
            where, KeepListError, _SHAPES, "{place} is {value}, not {expected}"
        )

    def read(self, value: Mapping[str, object]) -> KeepListFile:
        """Recognise the shape by its keys."""
        self._refuse_repeated(value)
        if value.get("kind") == PLAN_KIND:
            return self._plan(value)
        if "perLayer" in value or "coreExperts" in value:
            raise self._fault(
                "is a residency plan of reap-expert-swap: its core experts stay in memory, "
                "the others are not pruned",
                _SHAPES,
            )
        if "num_experts_before" in value and "layers" in value:
            return self._metadata(value)
        said = [word for word in ("kept", "dropped", "keep") if isinstance(value.get(word), dict)]
        if len(said) > 1:
            raise self._fault(f"says both {said[0]} and {said[1]}", "keep the one that is meant")
        if said:
            meaning: Meaning = "dropped" if said[0] == "dropped" else "kept"
            listed = self._json.as_object(value[said[0]], said[0])
            return self._file(meaning, self._by_layer(listed), self._num_experts(value))
        return self._bare(value)

    def _refuse_repeated(self, value: Mapping[str, object]) -> None:
        """Refuse an object inside that names a key twice: a second list would be lost."""
        open_objects = [value]
        while open_objects:
            for key, item in open_objects.pop().items():
                if isinstance(item, Repeated):
                    problem = f"the object under {brief(key)} names {brief(item.key)} twice"
                    raise self._fault(problem, "keep the one that is meant")
                if isinstance(item, dict):
                    open_objects.append(item)

    # Our own files

    def _plan(self, value: Mapping[str, object]) -> KeepListFile:
        if value.get("format") != PLAN_FORMAT:
            raise self._fault(
                f"is a plan of format {brief(value.get('format'))}, {PLAN_FORMAT} is known",
                "make the plan again with this version",
            )
        count = value.get("num_experts")
        if not is_whole_number(count):
            raise self._fault(f"num_experts is {brief(count)}", "make the plan again")
        return self._recorded(value, count, original_ids=False)

    def _metadata(self, value: Mapping[str, object]) -> KeepListFile:
        count = value["num_experts_before"]
        if not is_whole_number(count):
            raise self._fault(f"num_experts_before is {brief(count)}", "fetch the file again")
        return self._recorded(value, count, original_ids=True)

    def _recorded(
        self, value: Mapping[str, object], num_experts: int, original_ids: bool
    ) -> KeepListFile:
        per_layer: dict[Layer, int] = {}
        retained: dict[Layer, Ids] = {}
        preserved: dict[Layer, Ids] = {}
        saliency: dict[Layer, tuple[float | None, ...]] = {}
        listed = self._json.as_object(value.get("layers"), "layers")
        for layer, fields in self._by_layer(listed).items():
            place = f"layer {layer}"
            record = self._json.as_object(fields, place)
            count = self._own_count(record, place, num_experts)
            kept = self._ids(record.get("retained"), f"{place}, retained", count)
            pruned = self._maybe_no_ids(record.get("pruned"), f"{place}, pruned", count)
            stay = self._maybe_no_ids(record.get("preserved") or [], f"{place}, preserved", count)
            if sorted(kept + pruned) != list(range(count)) or not set(stay) <= set(kept):
                raise self._fault(
                    f"{place}: {len(kept)} retained, {len(pruned)} pruned and {len(stay)} "
                    f"preserved ids do not make up {count} experts",
                    "make the file again",
                )
            retained[layer], preserved[layer], per_layer[layer] = kept, stay, count
            if record.get("saliency") is not None:
                saliency[layer] = self._saliency(record["saliency"], place, count)
        self._require_meaning("kept")
        return KeepListFile(
            self._where,
            "kept",
            retained,
            num_experts,
            original_ids,
            preserved=preserved,
            saliency=saliency,
            per_layer=per_layer,
        )

    def _own_count(self, record: Mapping[str, object], place: str, num_experts: int) -> int:
        """The experts of one layer before: its own number where it has fewer than others."""
        count = record.get("num_experts_before", num_experts)
        if not is_whole_number(count) or count > num_experts:
            problem = f"{place}: num_experts_before is {brief(count)}, others have {num_experts}"
            raise self._fault(problem, "make the file again")
        return count

    def _saliency(self, value: object, place: str, count: int) -> tuple[float | None, ...]:
        if not isinstance(value, list) or len(value) != count:
            raise self._fault(f"{place}: saliency is not a list of {count} numbers")
        return tuple(self._number(item, place) for item in value)

    def _number(self, value: object, place: str) -> float | None:
        number = as_number(value)
        if number is None and value is not None:
            raise self._fault(f"{place}: {brief(value)} is not a saliency")
        return number

    def _maybe_no_ids(self, value: object, place: str, count: int | None) -> Ids:
        """Expert ids in ascending order, of a list that may be empty."""
        return () if value == [] else self._ids(value, place, count)

    # The files of others

    def _bare(self, value: Mapping[str, object]) -> KeepListFile:
        """Layers at the top level, with lists or small objects under them."""
        listed = {
            key: item
            for key, item in value.items()
            if parse_layer(key) is not None or isinstance(item, dict | list)
        }
        by_layer = self._by_layer(listed)
        count = self._num_experts(value)
        if all(isinstance(item, dict) for item in by_layer.values()):
            return self._spelled_out(by_layer, count)
        if all(type(item) is int for item in by_layer.values()):
            raise self._fault("holds how many experts stay but not which", _SHAPES)
        own = _meaning_of(listed)
        if own is None and self._told is None:
            raise self._fault("its lists could be kept or dropped experts", _SAY_IT)
        meaning = own or self._told or "kept"
        # A drop map without "mtp" prunes the MTP layer like layer 0: omnimergekit's rule.
        like_first = own is None and meaning == "dropped"
        return self._file(meaning, by_layer, count, like_first)

    def _spelled_out(self, by_layer: Mapping[Layer, object], count: int | None) -> KeepListFile:
        """{layer: {"kept": [ids], "keep": how many}}, or the same with dropped and drop."""
        found: set[Meaning] = set()
        lists: dict[Layer, object] = {}
        for layer, item in by_layer.items():
            record = self._json.as_object(item, f"layer {layer}")
            words: list[Meaning] = [word for word in _COUNTS if word in record]
            if len(words) != 1:
                problem = f"layer {layer} has {len(words)} of the keys 'kept' and 'dropped'"
                raise self._fault(problem, _SHAPES)
            lists[layer] = ids = record[words[0]]
            said = record.get(_COUNTS[words[0]])
            if said is not None and isinstance(ids, list) and said != len(ids):
                problem = f"layer {layer} lists {len(ids)} experts and says {brief(said)}"
                raise self._fault(problem, "make the list again")
            found.add(words[0])
        if len(found) > 1:
            raise self._fault("has kept experts in some layers and dropped in others", _SAY_IT)
        return self._file(found.pop(), lists, count)

    # Pieces

    def _file(
        self,
        meaning: Meaning,
        by_layer: Mapping[Layer, object],
        count: int | None,
        mtp_like_first: bool = False,
    ) -> KeepListFile:
        self._require_meaning(meaning)
        # A layer may drop no expert, where others do; it cannot keep none.
        read = self._maybe_no_ids if meaning == "dropped" else self._ids
        layers = {layer: read(item, f"layer {layer}", count) for layer, item in by_layer.items()}
        return KeepListFile(self._where, meaning, layers, count, mtp_like_first=mtp_like_first)

    def _require_meaning(self, meaning: Meaning) -> None:
        if self._told not in (None, meaning):
            raise self._fault(f"its lists are {meaning} experts, not {self._told}")

    def _by_layer(self, value: Mapping[str, object]) -> dict[Layer, object]:
        found: dict[Layer, tuple[str, object]] = {}
        for key, item in value.items():
            name = parse_layer(key)
            if name is None:
                raise self._fault(f"key {brief(key)} names no layer", _SHAPES)
            if name.layer in found:
                problem = f"{brief(found[name.layer][0])} and {brief(key)} are both "
                raise self._fault(f"{problem}layer {name.layer}", "keep the one that is meant")
            found[name.layer] = key, item
        if not found:
            raise self._fault("lists no layer", _SHAPES)
        return {layer: found[layer][1] for layer in sorted(found, key=layer_order)}

    def _ids(self, value: object, place: str, count: int | None) -> Ids:
        """Expert ids in ascending order."""
        if not isinstance(value, list):
            raise self._fault(f"{place}: {brief(value)} is not a list of expert ids", _SHAPES)
        if not value:
            raise self._fault(f"{place}: lists no expert", "list at least one")
        for old_id in value:
            if not is_whole_number(old_id) or (count is not None and old_id >= count):
                limit = "" if count is None else f" between 0 and {count - 1}"
                raise self._fault(f"{place}: {brief(old_id)} is not an expert id{limit}")
        ids = tuple(sorted(value))
        for before, after in pairwise(ids):
            if before == after:
                raise self._fault(f"{place}: expert {after} is listed twice", "list it once")
        return ids

    def _num_experts(self, value: Mapping[str, object]) -> int | None:
        for key in _COUNT_KEYS:
            if key in value:
                count = value[key]
                if not is_whole_number(count):
                    raise self._fault(f"{key} is {brief(count)}, not a number of experts")
                return count
        return None

    def _fault(self, problem: str, remedy: str = "") -> KeepListError:
        return KeepListError(self._where, problem, remedy)


_COUNTS: dict[Meaning, str] = {"kept": "keep", "dropped": "drop"}


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


def read_keeplist(path: str | PathLike[str], meaning: Meaning | None = None) -> KeepListFile:
    """Read a keep-list file: JSON of any accepted shape.

    meaning: what bare lists of ids under layer numbers are, which otherwise are refused.
    Raises KeepListError naming the file, the layer and the id at fault.
    """
    where = str(path)
    try:
        with Path(path).open("rb") as file:
            # Python reserves as many bytes as are asked for, so no more than the file has.
            status = os.fstat(file.fileno())
            nbytes = status.st_size if stat.S_ISREG(status.st_mode) else _MAX_NBYTES
            raw = file.read(min(nbytes, _MAX_NBYTES) + 1)
    except OSError as error:
        raise KeepListError(where, f"cannot be read ({error.strerror or error})") from error
    if len(raw) > _MAX_NBYTES:
        raise KeepListError(where, f"has more than {_MAX_NBYTES:,} bytes: no keep-list is so large")
    raw = raw.removeprefix(b"\xef\xbb\xbf")
    value = read_object(raw, where, "the keep-list", KeepListError, "save it again as JSON")
    return recognise(value, where, meaning)
