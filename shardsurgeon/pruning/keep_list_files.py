"""Keep-list files read: our own plan.json and metadata here, those of others in their shapes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from os import PathLike

from shardsurgeon.checkpoint.layer_names import Layer
from shardsurgeon.checkpoint.recognition import HEAD_NBYTES, SCORES, recognised
from shardsurgeon.errors import KeepListError
from shardsurgeon.pruning.keep_list_shapes import (
    Ids,
    KeepListFile,
    ListReader,
    Meaning,
    OthersLists,
)
from shardsurgeon.pruning.plan_model import PlannedModel
from shardsurgeon.scores.list_names import layer_of
from shardsurgeon.storage.formats.strict_json import (
    Repeated,
    as_number,
    brief,
    is_whole_number,
    parse_for_a_hint,
    read_records,
)
from shardsurgeon.storage.limits import KEEP_LIST, MAX_EXPERTS, read_limited

PLAN_KIND = "shardsurgeon-plan"
PLAN_FORMAT = 1

# What scores have in them, and lists of experts, ranked or not, have not.
_FRACTION = re.compile(rb"\d\.\d")


def read_keeplist(path: str | PathLike[str], meaning: Meaning | None = None) -> KeepListFile:
    """Read a keep-list file: JSON or JSON lines of any accepted shape.

    meaning: what bare lists of ids under layer numbers are, which otherwise are refused.
    Raises KeepListError naming the file, the layer and the id at fault.
    """
    where = str(path)
    raw = _read(path)
    try:
        return _parsed(raw, where, meaning)
    except KeepListError as error:
        head = raw[:HEAD_NBYTES]
        if recognised(where, head) != SCORES or (head.isascii() and not _FRACTION.search(head)):
            raise
        problem = "holds scores, not lists of the experts to keep"
        remedy = "give it as SCORES, and say how many with --ratio"
        raise KeepListError(where, problem, remedy) from error


def _parsed(raw: bytes, where: str, meaning: Meaning | None) -> KeepListFile:
    remedy = "save it again as JSON"
    value = read_records(raw, where, "the keep-list", KeepListError, remedy, KEEP_LIST)
    if isinstance(value, dict) and layer_of(value) is not None:
        value = [value]  # JSON lines with one line
    return recognise(value if isinstance(value, dict) else {"layers": value}, where, meaning)


def is_plan(path: str | PathLike[str]) -> bool:
    """Whether a file is a plan.json that was written here."""
    try:
        raw = _read(path)
    except KeepListError:
        return False
    found = parse_for_a_hint(raw, KEEP_LIST)
    return isinstance(found, dict) and found.get("kind") == PLAN_KIND


def _read(path: str | PathLike[str]) -> bytes:
    return read_limited(path, KEEP_LIST, KeepListError, "no keep-list is so large")


def recognise(value: Mapping[str, object], where: str, meaning: Meaning | None) -> KeepListFile:
    """What the JSON object of a keep-list file says.

    meaning: what bare lists of ids are, where the caller knows it; it may not contradict the
    file. Raises KeepListError naming the layer, or how to say what the lists mean.
    """
    own = _OwnFiles(where, meaning)
    own.refuse_repeated(value)
    if value.get("kind") == PLAN_KIND:
        return own.plan(value)
    if "num_experts_before" in value and isinstance(value.get("layers"), dict):
        return own.metadata(value)
    return OthersLists(where, meaning).read(value)


class _OwnFiles(ListReader):
    """plan.json, and the metadata that a pruned checkpoint carries."""

    def refuse_repeated(self, value: Mapping[str, object]) -> None:
        """Refuse an object inside that names a key twice: a second list would be lost."""
        open_values: list[tuple[object, object]] = [*value.items()]
        while open_values:
            key, item = open_values.pop()
            if isinstance(item, Repeated):
                problem = f"the object under {brief(key)} names {brief(item.key)} twice"
                raise self.fault(problem, "keep the one that is meant")
            if isinstance(item, dict):
                open_values += item.items()
            elif isinstance(item, list):
                open_values += [(key, inner) for inner in item if not isinstance(inner, int)]

    def plan(self, value: Mapping[str, object]) -> KeepListFile:
        """A plan.json."""
        if value.get("format") != PLAN_FORMAT:
            raise self.fault(
                f"is a plan of format {brief(value.get('format'))}, {PLAN_FORMAT} is known",
                "make the plan again with this version",
            )
        count = value.get("num_experts")
        if not is_whole_number(count) or count > MAX_EXPERTS:
            raise self.fault(f"num_experts is {brief(count)}", "make the plan again")
        found = self._recorded(value, count, original_ids=False)
        return replace(found, made_for=_made_for(value), ratio=_ratio(value))

    def metadata(self, value: Mapping[str, object]) -> KeepListFile:
        """The record of a prune, in the ids of the original."""
        count = value["num_experts_before"]
        if not is_whole_number(count) or count > MAX_EXPERTS:
            raise self.fault(f"num_experts_before is {brief(count)}", "fetch the file again")
        found = self._recorded(value, count, original_ids=True)
        return replace(found, made_for=_made_for(value), ratio=_ratio(value))

    def _recorded(
        self, value: Mapping[str, object], num_experts: int, original_ids: bool
    ) -> KeepListFile:
        per_layer: dict[Layer, int] = {}
        retained: dict[Layer, Ids] = {}
        preserved: dict[Layer, Ids] = {}
        saliency: dict[Layer, tuple[float | None, ...]] = {}
        listed = self.json.as_object(value.get("layers"), "layers")
        for layer, fields in self.by_layer(listed).items():
            place = f"layer {layer}"
            record = self.json.as_object(fields, place)
            count = self._own_count(record, place, num_experts)
            kept = self.ids(record.get("retained"), f"{place}, retained", count)
            pruned = self.maybe_no_ids(record.get("pruned"), f"{place}, pruned", count)
            stay = self.maybe_no_ids(record.get("preserved") or [], f"{place}, preserved", count)
            if sorted(kept + pruned) != list(range(count)) or not set(stay) <= set(kept):
                raise self.fault(
                    f"{place}: {len(kept)} retained, {len(pruned)} pruned and {len(stay)} "
                    f"preserved ids do not make up {count} experts",
                    "make the file again",
                )
            retained[layer], preserved[layer], per_layer[layer] = kept, stay, count
            if record.get("saliency") is not None:
                saliency[layer] = self._saliency(record["saliency"], place, count)
        self.require_meaning("kept")
        return KeepListFile(
            self.where,
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
            raise self.fault(problem, "make the file again")
        return count

    def _saliency(self, value: object, place: str, count: int) -> tuple[float | None, ...]:
        if not isinstance(value, list) or len(value) != count:
            raise self.fault(f"{place}: saliency is not a list of {count} numbers")
        return tuple(self._number(item, place) for item in value)

    def _number(self, value: object, place: str) -> float | None:
        number = as_number(value)
        if number is None and value is not None:
            raise self.fault(f"{place}: {brief(value)} is not a saliency")
        return number


def _made_for(value: Mapping[str, object]) -> PlannedModel | None:
    """The model that a file of ours names, as far as it does."""
    source, facts = value.get("source"), value.get("model")
    if not isinstance(source, dict):
        return None
    name, digest = source.get("name"), source.get("config_sha256")
    if not isinstance(name, str) or not isinstance(digest, str):
        return None
    return PlannedModel(name, digest, facts if isinstance(facts, dict) else {})


def _ratio(value: Mapping[str, object]) -> float | None:
    """The ratio that a plan.json, or the record of a single prune, says was asked for."""
    said, steps = value.get("selection"), value.get("steps")
    if isinstance(steps, list) and len(steps) == 1:
        said = steps[0]
    if not isinstance(said, dict) or said.get("selection") not in ("ratio", "plan"):
        return None
    ratio = as_number(said.get("ratio"))
    return ratio if ratio is not None and 0 < ratio < 1 else None
