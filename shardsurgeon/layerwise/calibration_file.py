"""A calibration as a score file, and several of them added up.

A file holds the accumulated sums, which samples they are over, and the scores that follow from
them. Merged, several give what one calibration over all their samples would have given, up to
the rounding of float64 sums, in whatever order they come.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from os import PathLike

import numpy as np
from numpy.typing import NDArray

from shardsurgeon.checkpoint.layer_names import parse_layer
from shardsurgeon.errors import ScoreError, UsageError
from shardsurgeon.layerwise.accumulators import TOTAL_TOKENS, Accumulators
from shardsurgeon.layerwise.samples import SampleEntry
from shardsurgeon.scores.files import FORMAT, VERSION, ScoreContent, read_value
from shardsurgeon.scores.table import ACCUMULATORS, CALIBRATION
from shardsurgeon.storage.formats.dtypes import StoredArray
from shardsurgeon.storage.formats.strict_json import parse_json

_MAX_LAYERS = 4096
_MAX_EXPERTS = 65_536
_DAMAGED = "the file is damaged: fetch it again or calibrate anew"

_MODEL = ("model", "config_sha256", "revision")
_ONE_MODEL = "merge calibrations of one model"
_SAMPLES, _PARTS = "samples", "parts"


@dataclass(frozen=True, slots=True)
class Calibration:
    """What one or several calibrations of a model found.

    origin: the file it came from or goes to, as messages name it.
    layers: layer number (MTP layer j is num_hidden_layers + j) → its accumulators.
    settings: plain values, as JSON has them. Known here are `model` (its name), `revision`
    (text or None), `config_sha256` and `samples`, a list of [source, index, tokens]; all others
    (dataset, seed, max_length, dtype, versions, …) are kept as they are.
    """

    origin: str
    layers: dict[int, Accumulators]
    settings: dict[str, object]

    @property
    def samples(self) -> list[SampleEntry]:
        """The samples, in the order of the file. Raises ScoreError where they are no samples."""
        listed = self.settings.get("samples")
        if not isinstance(listed, list) or not listed:
            problem = "does not say which samples its accumulators were added up from"
            raise ScoreError(self.origin, problem, "calibrate again")
        return [self._sample(entry) for entry in listed]

    def _sample(self, entry: object) -> SampleEntry:
        if isinstance(entry, list | tuple) and len(entry) == 3:
            source, index, tokens = entry
            if isinstance(source, str) and type(index) is int and type(tokens) is int:
                return source, index, tokens
        problem = f"its list of samples holds {str(entry)[:60]!r}"
        raise ScoreError(self.origin, problem, "a sample is [source, index, tokens]")

    def content(self) -> ScoreContent:
        """The score file: metrics, accumulators and settings; layers ascending."""
        scores: dict[int | str, Mapping[str, NDArray[np.generic]]] = {}
        sums: dict[int | str, Mapping[str, NDArray[np.generic]]] = {}
        for layer, accumulators in sorted(self.layers.items()):
            arrays = accumulators.arrays()
            sums[layer] = arrays
            scores[layer] = {**accumulators.metrics(), TOTAL_TOKENS: arrays[TOTAL_TOKENS]}
        return ScoreContent(layers=scores, accumulators=sums, calibration=self.settings)


def read_calibration(path: str | PathLike[str]) -> Calibration:
    """Read a score file that a calibration or a merge wrote, of any format.

    Raises ScoreError for a file without accumulators, from a later version, or broken.
    """
    calibration = find_calibration(path)
    if calibration is None:
        problem = "holds scores without the accumulators that they came from"
        remedy = "only files of `shardsurgeon calibrate` can be merged or extended"
        raise ScoreError(path, problem, remedy)
    return calibration


def find_calibration(path: str | PathLike[str]) -> Calibration | None:
    """The same; None for a score file without accumulators."""
    where = str(path)
    value, notes = read_value(path)
    if not isinstance(value, dict):
        return None
    beside = _beside(value, notes, where)
    layers = _layers(value, where)
    if not layers:
        return None
    settings = beside.get(CALIBRATION)
    if beside.get("format") != FORMAT or not isinstance(settings, dict):
        problem = f"has accumulators and does not say that it is of the format {FORMAT!r}"
        raise ScoreError(where, problem, _DAMAGED)
    if beside.get("version") != VERSION:
        problem = f"is of version {str(beside.get('version'))[:20]}, this program reads {VERSION}"
        raise ScoreError(where, problem, "use the shardsurgeon that wrote it")
    return Calibration(where, dict(sorted(layers.items())), settings)


def _beside(
    value: Mapping[object, object], notes: Mapping[str, str], where: str
) -> Mapping[object, object]:
    """What the file says beside its arrays: in its tree, or as text in its metadata."""
    if not notes:
        return value
    texts = {key: notes[key] for key in ("version", CALIBRATION) if key in notes}
    found: dict[object, object] = {"format": notes.get("format")}
    for key, text in texts.items():
        found[key] = _parsed(text, where)
    return found


def _parsed(text: str, where: str) -> object:
    try:
        return parse_json(text, parse_constant=float)
    except (ValueError, RecursionError) as error:
        raise ScoreError(where, f"its {CALIBRATION} is not JSON: {error}", _DAMAGED) from error


def _layers(value: Mapping[object, object], where: str) -> dict[int, Accumulators]:
    """Layer → accumulators, from a tree or from arrays with long names."""
    found: dict[int, dict[str, Callable[[], NDArray[np.generic]]]] = {}
    tree = value.get(ACCUMULATORS)
    if isinstance(tree, dict):
        for key, sums in tree.items():
            if not isinstance(sums, dict):
                raise ScoreError(where, f"its {ACCUMULATORS} of layer {key} are none", _DAMAGED)
            for name, item in sums.items():
                found.setdefault(_layer(key, where), {})[str(name)] = _loader(item, where)
    for key, item in value.items():
        if isinstance(key, str) and key.startswith(f"{ACCUMULATORS}."):
            inner = key.removeprefix(f"{ACCUMULATORS}.")
            parsed = parse_layer(inner)
            name = parsed.rest if parsed is not None else ""
            found.setdefault(_layer(inner, where), {})[name] = _loader(item, where)
    if len(found) > _MAX_LAYERS:
        raise ScoreError(where, f"holds {len(found):,} layers of {ACCUMULATORS}", _DAMAGED)
    return {
        layer: Accumulators.from_arrays({n: load() for n, load in sums.items()}, where, layer)
        for layer, sums in found.items()
    }


def _layer(key: object, where: str) -> int:
    name = parse_layer(key)
    if name is None or not isinstance(name.layer, int):
        raise ScoreError(where, f"its {ACCUMULATORS} name {str(key)[:60]!r} a layer", _DAMAGED)
    return name.layer


def _loader(item: object, where: str) -> Callable[[], NDArray[np.generic]]:
    """How to read one accumulator; refuses what is no list of numbers before reading it."""
    if isinstance(item, StoredArray) and item.dtype[0] in "FBIU" and item.dtype != "BOOL":
        if math.prod(item.shape) <= _MAX_EXPERTS:
            return item.load
        problem = f"an accumulator has shape {list(item.shape)}"
        raise ScoreError(where, problem, _DAMAGED)
    listed = item if isinstance(item, list) else [item]
    if len(listed) <= _MAX_EXPERTS and all(type(number) in (int, float) for number in listed):
        return lambda: _array(item, where)
    raise ScoreError(where, f"an accumulator holds {type(item).__name__}, not numbers", _DAMAGED)


def _array(item: object, where: str) -> NDArray[np.generic]:
    try:
        return np.array(item, np.float64)
    except OverflowError as error:
        problem = "an accumulator holds an integer beyond all floats"
        raise ScoreError(where, problem, _DAMAGED) from error


def merge(parts: Sequence[Calibration], origin: str, *, any_name: bool = False) -> Calibration:
    """Add up calibrations of one model over samples of their own; origin: where the sum goes.

    Settings that all parts share stay; where they differ (dataset, seed, …) each part's own are
    listed under `parts`. The samples are sorted by source and index. any_name: whether models of
    one config under two names are taken for one. Raises UsageError for fewer
    than two parts; ScoreError, naming two files, where models differ or a sample is in both.
    """
    if len(parts) < 2:
        raise UsageError("scores merge", f"{len(parts)} file to merge", "give at least two")
    for other in parts[1:]:
        _require_same_model(parts[0], other, any_name)
    samples = _disjoint([(part, part.samples) for part in parts])
    # Added in an order of their own, so that the sums have the same rounding in any other.
    ordered = sorted(parts, key=lambda part: min(_key(sample) for sample in part.samples))
    layers: dict[int, Accumulators] = deepcopy(ordered[0].layers)
    for part in ordered[1:]:
        for layer, accumulators in part.layers.items():
            layers[layer].add(accumulators)
    settings = {**_settings(ordered), _SAMPLES: [list(sample) for sample in samples]}
    return Calibration(origin, layers, settings)


def _require_same_model(first: Calibration, other: Calibration, any_name: bool) -> None:
    for key in _MODEL[1:] if any_name else _MODEL:
        values = [part.settings.get(key) for part in (first, other)]
        # One of them may have come from a place that knows no revisions.
        if values[0] != values[1] and (key != "revision" or None not in values):
            shown = [str(value)[:40] for value in values]
            problem = f"was made with {key} {shown[1]}, {first.origin} with {shown[0]}"
            remedy = "--same-model, if they are one under two names" if key == "model" else ""
            raise ScoreError(other.origin, problem, remedy or _ONE_MODEL)
    sizes = [{n: sums.num_experts for n, sums in part.layers.items()} for part in (first, other)]
    if sizes[0] != sizes[1]:
        layer = min(n for n in {**sizes[0], **sizes[1]} if sizes[0].get(n) != sizes[1].get(n))
        found = [f"{size.get(layer, 0)} experts" for size in sizes]
        problem = f"has {found[1]} in layer {layer}, {first.origin} has {found[0]}"
        raise ScoreError(other.origin, problem, _ONE_MODEL)


def _disjoint(parts: Sequence[tuple[Calibration, list[SampleEntry]]]) -> list[SampleEntry]:
    """All samples, sorted. Raises ScoreError where one record went into two calibrations."""
    seen: dict[tuple[str, int], Calibration] = {}
    for part, samples in parts:
        twice = [sample for sample in samples if _key(sample) in seen]
        if twice:
            source, index = _key(twice[0])
            first = seen[source, index].origin
            problem = f"{len(twice):,} of its {len(samples):,} samples are in {first} as well"
            remedy = "each sample counts once; calibrate with another seed or other records"
            raise ScoreError(part.origin, f"{problem}, such as {source}[{index}]", remedy)
        seen |= {_key(sample): part for sample in samples}
    return sorted(sample for _, samples in parts for sample in samples)


def _key(sample: SampleEntry) -> tuple[str, int]:
    return sample[0], sample[1]


def _settings(parts: Sequence[Calibration]) -> dict[str, object]:
    """The settings of all parts: those they share, and each part's own."""
    own = [entry for part in parts for entry in _own(part.settings)]
    common = {
        key: value
        for key, value in own[0].items()
        if key != _SAMPLES and all(key in entry and entry[key] == value for entry in own)
    }
    revisions = [part.settings.get("revision") for part in parts]
    revision = next((known for known in revisions if known is not None), None)
    identity = {key: parts[0].settings.get(key) for key in _MODEL} | {"revision": revision}
    listed = sorted(own, key=lambda entry: json.dumps(entry, sort_keys=True))
    return {**identity, **common, _PARTS: listed}


def _own(settings: Mapping[str, object]) -> list[dict[str, object]]:
    """What is special to one calibration, or to each that was merged before."""
    parts = settings.get(_PARTS)
    if isinstance(parts, list) and parts and all(isinstance(part, dict) for part in parts):
        return list(parts)
    samples = settings.get(_SAMPLES)
    counted = len(samples) if isinstance(samples, list) else 0
    own = {key: value for key, value in settings.items() if key not in (*_MODEL, _SAMPLES, _PARTS)}
    return [{**own, _SAMPLES: counted}]
