"""Several calibrations of one model as one: their accumulators added, their samples together.

Pure. What it gives is what a single calibration over all the samples would have found, up to
the rounding of float64 sums; the order in which the parts come does not matter.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from copy import deepcopy

from shardsurgeon.errors import ScoreError, UsageError
from shardsurgeon.layerwise.accumulators import Accumulators
from shardsurgeon.layerwise.calibrationfile import Calibration
from shardsurgeon.layerwise.samples import SampleEntry

_MODEL = ("model", "config_sha256", "revision")
_ONE_MODEL = "merge calibrations of one model"
_SAMPLES, _PARTS = "samples", "parts"


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
