"""A calibration as a score file, and several calibrations merged.

A file holds the accumulated sums, the samples that they are over, and the scores computed from
them. A merge gives what one calibration over all samples would have given, up to the rounding of
float64 sums; the order of its parts makes no difference.
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
from shardsurgeon.layerwise.datasets import identity
from shardsurgeon.layerwise.parts import (
    PartReport,
    can_be_kept,
    identities,
    part_reports,
    stacked,
    unstack,
)
from shardsurgeon.layerwise.samples import SampleEntry
from shardsurgeon.scores.files import FORMAT, VERSION, ScoreContent, read_value
from shardsurgeon.scores.table import ACCUMULATORS, CALIBRATION, PARTS
from shardsurgeon.storage.formats.dtypes import StoredArray
from shardsurgeon.storage.formats.strict_json import parse_json
from shardsurgeon.storage.limits import CALIBRATION_JSON, MAX_EXPERTS, MAX_LAYERS

_DAMAGED = "the file is damaged: fetch it again or calibrate anew"

_MODEL = ("model", "config_sha256", "revision")
_ONE_MODEL = "merge calibrations of one model"
_TWO_NAMES = "`scores merge --same-model`, if they are one under two names"
_SAMPLES, _PARTS, _DTYPE = "samples", "parts", "dtype"

WINDOWS = "windows"
"""The setting that says how many windows the listed records were packed into."""

COUNTED = "counted"
"""The setting that says which tokens are added up."""
# Settings of sums that are of different things where they differ; how the command line calls them;
# and what a file means that does not say: older than the setting, or nothing that is known.
_ALIKE = {COUNTED: ("--tokens", "all"), _DTYPE: ("--dtype", None)}
_MIXED = "calibrate alike, or add them up as they are with `scores merge --mixed`"


@dataclass(frozen=True, slots=True)
class Calibration:
    """The result of one calibration of a model, or of several merged.

    origin: the file that it was read from or will be written to, as messages name it.
    layers: layer number (MTP layer j is num_hidden_layers + j) → its accumulators.
    Of a mix of datasets each has its sums by part too.
    settings: values of JSON types. Used here are `model` (its name), `revision` (text or None),
    `config_sha256`, `samples`, a list of [source, index, tokens], and `parts`, the settings of
    merged calibrations; all others (dataset, seed, dtype, versions, …) are kept unchanged.
    """

    origin: str
    layers: dict[int, Accumulators]
    settings: dict[str, object]

    @property
    def samples(self) -> list[SampleEntry]:
        """The samples, in the order of the file. Raises ScoreError where the list is malformed."""
        listed = self.settings.get(_SAMPLES)
        if not isinstance(listed, list) or not listed:
            problem = "does not say which samples its accumulators were added up from"
            raise ScoreError(self.origin, problem, "calibrate again")
        return [self._sample(entry) for entry in listed]

    @property
    def mix(self) -> dict[str, dict[int, Accumulators]]:
        """The identity of each dataset → layer → its own sums, ascending; empty where they are
        not known apart. Raises ScoreError where the list of samples is malformed."""
        found = identities(source for source, _, _ in self.samples)
        if len(found) == 1:
            return {found[0]: self.layers}
        by_layer = {layer: sums.parts or {} for layer, sums in self.layers.items()}
        apart = all(parts.keys() == {*found} for parts in by_layer.values())
        if not apart or not can_be_kept(self.layers, len(found)):
            return {}
        return {part: {layer: by_layer[layer][part] for layer in by_layer} for part in found}

    @property
    def parts(self) -> tuple[PartReport, ...]:
        """The datasets of a mix whose sums are known apart, as `mix` orders them; () for one."""
        return part_reports(self.samples) if len(self.mix) > 1 else ()

    @property
    def lacks_parts(self) -> str:
        """What to say of a mix of datasets without sums by part; empty for others."""
        count = len(identities(source for source, _, _ in self.samples))
        if count == 1 or self.mix:
            return ""
        problem = f"does not keep the sums of its {count:,} datasets apart"
        if all(sums.parts for sums in self.layers.values()):
            return f"{problem}: they are more than a file holds"
        return f"{problem}: an earlier version measured some of them"

    @property
    def num_samples(self) -> int:
        """How many samples passed through the model: records, or windows packed with them."""
        sizes = [part.get(WINDOWS, part.get(_SAMPLES)) for part in _own(self.settings)]
        known = sum(size for size in sizes if isinstance(size, int))
        # There is a record in every window.
        return known if 0 < known <= len(self.samples) else len(self.samples)

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The dtypes that its parts were computed in, as far as they say so; ascending."""
        named = [part.get(_DTYPE) for part in (self.settings, *_own(self.settings))]
        return tuple(sorted({dtype for dtype in named if isinstance(dtype, str)}))

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
        apart = any(len(of.parts or ()) > 1 for of in self.layers.values())
        parts = stacked(self.layers, tuple(self.mix)) if apart and self.mix else {}
        return ScoreContent(scores, accumulators=sums, parts=parts, calibration=self.settings)


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
    """As `read_calibration`, but None for a score file without accumulators."""
    where = str(path)
    value, texts = read_value(path)
    if not isinstance(value, dict):
        return None
    metadata = _metadata(value, texts, where)
    layers = _layers(value, where)
    if not layers:
        return None
    settings = metadata.get(CALIBRATION)
    if metadata.get("format") != FORMAT or not isinstance(settings, dict):
        problem = f"has accumulators and does not say that it is of the format {FORMAT!r}"
        raise ScoreError(where, problem, _DAMAGED)
    if metadata.get("version") != VERSION:
        problem = f"is of version {str(metadata.get('version'))[:20]}, this program reads {VERSION}"
        raise ScoreError(where, problem, "use the shardsurgeon that wrote it")
    calibration = Calibration(where, dict(sorted(layers.items())), settings)
    if held := _arrays(value, PARTS, where):
        listed = identities(source for source, _, _ in calibration.samples)
        unstack(held, calibration.layers, listed, where)
    return calibration


def _metadata(
    value: Mapping[object, object], texts: Mapping[str, str], where: str
) -> Mapping[object, object]:
    """Format, version and settings of a file: entries of its tree, or `texts` of its metadata."""
    if not texts:
        return value
    found: dict[object, object] = {"format": texts.get("format")}
    for key in ("version", CALIBRATION):
        if key in texts:
            found[key] = _parsed(texts[key], where)
    return found


def _parsed(text: str, where: str) -> object:
    try:
        return parse_json(text.encode(), CALIBRATION_JSON, parse_constant=float)
    except (ValueError, RecursionError) as error:
        raise ScoreError(where, f"its {CALIBRATION} is not JSON: {error}", _DAMAGED) from error


def _layers(value: Mapping[object, object], where: str) -> dict[int, Accumulators]:
    """Layer → accumulators."""
    loaders = {
        layer: {name: _loader(item, where) for name, item in sums.items()}
        for layer, sums in _arrays(value, ACCUMULATORS, where).items()
    }
    return {
        layer: Accumulators.from_arrays({n: load() for n, load in sums.items()}, where, layer)
        for layer, sums in loaders.items()
    }


def _arrays(value: Mapping[object, object], kind: str, where: str) -> dict[int, dict[str, object]]:
    """Layer → name → what lies there, from a tree or from arrays named `<kind>.layers.3.counts`."""
    found: dict[int, dict[str, object]] = {}
    tree = value.get(kind)
    if isinstance(tree, dict):
        for key, sums in tree.items():
            if not isinstance(sums, dict):
                raise ScoreError(where, f"its {kind} of layer {key} are none", _DAMAGED)
            for name, item in sums.items():
                found.setdefault(_layer(key, kind, where), {})[str(name)] = item
    for key, item in value.items():
        if isinstance(key, str) and key.startswith(f"{kind}."):
            inner = key.removeprefix(f"{kind}.")
            parsed = parse_layer(inner)
            name = parsed.rest if parsed is not None else ""
            found.setdefault(_layer(inner, kind, where), {})[name] = item
    if len(found) > MAX_LAYERS:
        raise ScoreError(where, f"holds {len(found):,} layers of {kind}", _DAMAGED)
    return found


def _layer(key: object, kind: str, where: str) -> int:
    name = parse_layer(key)
    if name is None or not isinstance(name.layer, int):
        raise ScoreError(where, f"its {kind} name {str(key)[:60]!r} a layer", _DAMAGED)
    return name.layer


def _loader(item: object, where: str) -> Callable[[], NDArray[np.generic]]:
    """How to read one accumulator; anything but a list of numbers is refused without reading."""
    if isinstance(item, StoredArray) and item.dtype[0] in "FBIU" and item.dtype != "BOOL":
        if math.prod(item.shape) <= MAX_EXPERTS:
            return item.load
        problem = f"an accumulator has shape {list(item.shape)}"
        raise ScoreError(where, problem, _DAMAGED)
    listed = item if isinstance(item, list) else [item]
    if len(listed) <= MAX_EXPERTS and all(type(number) in (int, float) for number in listed):
        return lambda: _array(item, where)
    raise ScoreError(where, f"an accumulator holds {type(item).__name__}, not numbers", _DAMAGED)


def _array(item: object, where: str) -> NDArray[np.generic]:
    try:
        return np.array(item, np.float64)
    except OverflowError as error:
        problem = "an accumulator holds an integer beyond all floats"
        raise ScoreError(where, problem, _DAMAGED) from error


def merge(
    parts: Sequence[Calibration], origin: str, *, any_name: bool = False, mixed: bool = False
) -> Calibration:
    """Add up calibrations of one model that have no sample in common.

    origin: the file that the sum will be written to; any_name: accept different model names
    where the configs are equal; mixed: accept sums over different kinds of tokens, or of different
    dtypes. Settings that all parts share are kept; others (dataset, seed, …) are listed under
    `parts`, part by part. Samples are sorted by source and index. Raises UsageError for fewer than
    two parts; ScoreError, naming two files, where the models, the kinds of tokens or the dtypes
    differ, or a sample is in both.
    """
    if len(parts) < 2:
        raise UsageError("scores merge", f"{len(parts)} file to merge", "give at least two")
    for other in parts[1:]:
        _require_same_model(parts[0], other, any_name)
        if not mixed:
            require_alike(other, parts[0].settings, parts[0].origin)
    samples = _disjoint([(part, part.samples) for part in parts])
    # Rounding depends on the order of additions: sorted, any order of parts gives the same bits.
    ordered = sorted(parts, key=lambda part: min(_key(sample) for sample in part.samples))
    layers = _with_parts(ordered[0])
    for part in ordered[1:]:
        for layer, accumulators in _with_parts(part).items():
            layers[layer].add(accumulators)
    settings = {**_settings(ordered), _SAMPLES: [list(sample) for sample in samples]}
    return Calibration(origin, layers, settings)


def _with_parts(calibration: Calibration) -> dict[int, Accumulators]:
    """A copy of its layers, with the sums by part wherever they are known."""
    layers = deepcopy(calibration.layers)
    parts = calibration.mix
    if len(parts) == 1:
        return {layer: sums.of_one(next(iter(parts))) for layer, sums in layers.items()}
    return layers


def _require_same_model(first: Calibration, other: Calibration, any_name: bool) -> None:
    for key in _MODEL[1:] if any_name else _MODEL:
        values = [part.settings.get(key) for part in (first, other)]
        # A model read from a folder has no revision.
        if values[0] != values[1] and (key != "revision" or None not in values):
            shown = [str(value)[:40] for value in values]
            problem = f"was made with {key} {shown[1]}, {first.origin} with {shown[0]}"
            raise ScoreError(other.origin, problem, _TWO_NAMES if key == "model" else _ONE_MODEL)
    sizes = [{n: sums.num_experts for n, sums in part.layers.items()} for part in (first, other)]
    if sizes[0] != sizes[1]:
        layer = min(n for n in {**sizes[0], **sizes[1]} if sizes[0].get(n) != sizes[1].get(n))
        found = [f"{size.get(layer, 0)} experts" for size in sizes]
        problem = f"has {found[1]} in layer {layer}, {first.origin} has {found[0]}"
        raise ScoreError(other.origin, problem, _ONE_MODEL)


def require_alike(
    other: Calibration, settings: Mapping[str, object], origin: str = "this calibration"
) -> None:
    """Raise ScoreError where a calibration added up other things than another one.

    settings: of the other one, a merged one or a single one; origin: what messages call it.
    """
    for key, (said, meant) in _ALIKE.items():
        here, there = (
            sorted({str(part[key]) if key in part else str(meant) for part in _own(each)})
            for each in (other.settings, settings)
        )
        if str(None) in (*here, *there):
            continue
        if here != there or len(here) > 1:
            problem = f"was made with {said} {', '.join(here)}, {origin} with "
            problem += ", ".join(there)
            raise ScoreError(other.origin, problem, _MIXED)


def _disjoint(parts: Sequence[tuple[Calibration, list[SampleEntry]]]) -> list[SampleEntry]:
    """All samples, sorted. Raises ScoreError where two calibrations have a sample in common."""
    seen: dict[tuple[str, int], Calibration] = {}
    for part, samples in parts:
        twice = [sample for sample in samples if _key(sample) in seen]
        if twice:
            source, index, _ = twice[0]
            first = seen[_key(twice[0])].origin
            problem = f"{len(twice):,} of its {len(samples):,} samples are in {first} as well"
            remedy = "each sample counts once; calibrate with another seed or other records"
            raise ScoreError(part.origin, f"{problem}, such as {source}[{index}]", remedy)
        seen |= {_key(sample): part for sample in samples}
    return sorted(sample for _, samples in parts for sample in samples)


def _key(sample: SampleEntry) -> tuple[str, int]:
    """What tells a sample from others: its dataset by content where that is known, its number."""
    return identity(sample[0]), sample[1]


def _settings(parts: Sequence[Calibration]) -> dict[str, object]:
    """The settings that all parts share, and under `parts` those of each part."""
    own = [entry for part in parts for entry in _own(part.settings)]
    common = {
        key: value
        for key, value in own[0].items()
        if key not in (_SAMPLES, WINDOWS)
        and all(key in entry and entry[key] == value for entry in own)
    }
    revisions = [part.settings.get("revision") for part in parts]
    revision = next((known for known in revisions if known is not None), None)
    identity = {key: parts[0].settings.get(key) for key in _MODEL} | {"revision": revision}
    listed = sorted(own, key=lambda entry: json.dumps(entry, sort_keys=True))
    return {**identity, **common, _PARTS: listed}


def _own(settings: Mapping[str, object]) -> list[dict[str, object]]:
    """The settings apart from the model and the samples, of each part of a merged calibration."""
    parts = settings.get(_PARTS)
    if isinstance(parts, list) and parts and all(isinstance(part, dict) for part in parts):
        return list(parts)
    samples = settings.get(_SAMPLES)
    counted = len(samples) if isinstance(samples, list) else 0
    own = {key: value for key, value in settings.items() if key not in (*_MODEL, _SAMPLES, _PARTS)}
    return [{**own, _SAMPLES: counted}]
