"""A calibration as a score file: what was added up, over which samples, and the scores from it.

Between the accumulators that the engine fills (or `merging` adds) and the disk. `scores` reads
the same file as any other score file; here its accumulators are read too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from os import PathLike

import numpy as np
from numpy.typing import NDArray

from shardsurgeon.checkpoint.layernames import parse_layer
from shardsurgeon.errors import ScoreError
from shardsurgeon.layerwise.accumulators import TOTAL_TOKENS, Accumulators
from shardsurgeon.layerwise.samples import SampleEntry
from shardsurgeon.scores.scorefiles import FORMAT, VERSION, ScoreContent
from shardsurgeon.scores.scores import read_value
from shardsurgeon.scores.scoretables import ACCUMULATORS, CALIBRATION
from shardsurgeon.storage.formats.numbers import StoredArray

_MAX_LAYERS = 4096
_MAX_EXPERTS = 65_536
_DAMAGED = "the file is damaged: fetch it again or calibrate anew"


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
        return json.loads(text)
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
