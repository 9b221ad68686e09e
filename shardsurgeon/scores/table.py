"""The table that every score file becomes: layer -> metric -> float64 [experts].

The value read from a file (dicts, lists, numbers, unread arrays) may have any of the shapes that
tools write. The formats know nothing of layers, and the table nothing of formats.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from shardsurgeon.checkpoint.layer_names import Layer, layer_order, parse_layer
from shardsurgeon.errors import ScoreError
from shardsurgeon.storage.formats.dtypes import StoredArray
from shardsurgeon.storage.formats.strict_json import Repeated, is_text

_FREQUENCIES = ("expert_frequency", "cnt")

UNNAMED = "saliency"

_PREFERRED = ("reap", UNNAMED, "sal")


@dataclass(frozen=True)
class Scores:
    """What a score file says.

    origin: the file, as messages name it.
    layers: layer number, or `mtp.<j>` for an MTP layer named so, → metric → float64 [experts],
    read-only. A table that names no metric has the one metric `saliency`.
    rows: metric → float64 [MoE layers, experts], of a file that names no layers; then layers
    is empty until `assign_rows`.
    facts: small values found beside the scores (total_tokens, dataset, seed, …).

    >>> scores = shardsurgeon.read_scores("fixtures/kimi_k25/scores.pt")
    >>> metric, layers = scores.select()
    >>> metric, sorted(layers), layers[1].shape
    ('reap', [1, 2, 3], (32,))
    """

    origin: str
    layers: Mapping[Layer, Mapping[str, Vector]]
    rows: Mapping[str, Vector] = field(default_factory=dict)
    facts: Mapping[str, Fact] = field(default_factory=dict)

    @property
    def metrics(self) -> tuple[str, ...]:
        """Every metric that some layer has, sorted."""
        return tuple(sorted({name for layer in self.layers.values() for name in layer}))

    def assign_rows(self, moe_layers: Sequence[int]) -> Scores:
        """Give the rows of a 2-D table to the model's MoE layers, in order.

        Scores that name their layers come back as they are. Raises ScoreError where there are
        not as many rows as layers.
        """
        if not self.rows:
            return self
        count = len(next(iter(self.rows.values())))
        if count != len(moe_layers):
            raise ScoreError(
                self.origin,
                f"its table has {count} rows, the model has {len(moe_layers)} MoE layers",
                "name the layers ({layer: scores}) or use scores made for this model",
            )
        layers: dict[Layer, Mapping[str, Vector]] = {
            layer: {metric: table[row] for metric, table in self.rows.items()}
            for row, layer in enumerate(moe_layers)
        }
        return replace(self, layers=layers, rows={})

    def select(self, metric: str | None = None) -> tuple[str, dict[Layer, Vector]]:
        """One metric of every layer, and its name.

        metric: its name, which the file must have; None means the default: `reap`, else the
        saliency of a table without names, else the only metric the file has. Raises
        ScoreError, listing the metrics there are.
        """
        if self.rows:
            raise ScoreError(
                self.origin, "its 2-D table does not say which layer a row is", "give the model"
            )
        name = self._default_metric() if metric is None else metric
        lacking = [layer for layer, metrics in self.layers.items() if name not in metrics]
        if lacking:
            shown = "" if len(lacking) == len(self.layers) else f" for layer {lacking[0]}"
            raise ScoreError(
                self.origin,
                f"has no metric {name!r}{shown}",
                f"choose with --metric: {', '.join(self.metrics)}",
            )
        return name, {layer: metrics[name] for layer, metrics in self.layers.items()}

    def frequencies(self) -> dict[Layer, Vector]:
        """How often each expert was routed to, of the layers for which the file says it."""
        return {
            layer: metrics[name]
            for layer, metrics in self.layers.items()
            for name in _FREQUENCIES
            if name in metrics
        }

    def _default_metric(self) -> str:
        there = self.metrics
        for name in _PREFERRED:
            if name in there:
                return name
        return there[0] if len(there) == 1 else _PREFERRED[0]


def check_values(
    layer: Layer, values: Vector, frequency: Vector | None, where: str
) -> tuple[int, ...]:
    """The never-routed experts of a layer, ascending; refuse values that mean nothing.

    NaN is what 0/0 leaves of an expert without tokens: where the file counts tokens, it may
    only stand at experts with none. +inf marks an expert that must stay. Experts counted
    zero times are never-routed whatever their value. values, frequency: float64 [experts].
    Raises ScoreError naming layer and expert.
    """
    unknown = np.isnan(values)
    if np.isneginf(values).any():
        expert = int(np.argmax(np.isneginf(values)))
        raise ScoreError(
            where, f"layer {layer}, expert {expert} has the score -inf", "scores are above -inf"
        )
    if unknown.all():
        raise ScoreError(
            where,
            f"layer {layer} has no score: all {len(values)} are NaN",
            "calibrate again with more tokens",
        )
    if frequency is None:
        return tuple(np.flatnonzero(unknown).tolist())
    unexplained = unknown & ~(frequency == 0)
    if unexplained.any():
        expert = int(np.argmax(unexplained))
        raise ScoreError(
            where,
            f"layer {layer}, expert {expert} has the score NaN "
            f"though {frequency[expert]:,.0f} tokens were routed to it",
            "calibrate again: the activations overflowed",
        )
    return tuple(np.flatnonzero(frequency == 0).tolist())


"""The metric of a table that does not name any."""

ACCUMULATORS = "accumulators"
CALIBRATION = "calibration"
"""Where a file keeps what its scores were added up from, and how. Neither is a score."""
NPZ_METADATA = "metadata"
"""The array of an `.npz` with the UTF-8 of a JSON object, text by name, as safetensors has it."""

Vector: TypeAlias = npt.NDArray[np.float64]
Fact: TypeAlias = str | int | float | bool

# Keys under which a table may lie beside other things.
_WRAPPERS = ("scores", "saliency", "saliency_scores", "layers")
# What a module path may say between the layer and the metric.
_MODULES = frozenset(
    ("mlp", "moe", "ffn", "feed_forward", "block_sparse_moe", "mixer", "experts", "gate", "router")
)
_MAX_LAYERS = 4096
_MAX_METRICS = 256
_MAX_EXPERTS = 65_536
_MAX_NUMBERS = 2**24
_MAX_NAME = 200
_MAX_FACTS = 64
_MAX_FACT_LENGTH = 500

_SHAPES = "scores are {layer: tensor[experts]} or {layer: {metric: tensor[experts]}}"


@dataclass(frozen=True, slots=True)
class Tables:
    """What a score file holds.

    layers: layer → metric → float64 [experts], layers in order; rows: metric → float64
    [MoE layers, experts] where the file names no layers (then layers is empty); facts: small
    values found beside them, such as total_tokens.
    """

    layers: dict[Layer, dict[str, Vector]] = field(default_factory=dict)
    rows: dict[str, Vector] = field(default_factory=dict)
    facts: dict[str, Fact] = field(default_factory=dict)


def read_tables(value: object, where: str) -> Tables:
    """Recognise the shape of a score file's content.

    value: what a format reader gave; where: the file, as messages name it. Raises ScoreError,
    naming the layer, for whatever is not one number per expert and for two keys that mean the
    same layer.
    """
    return _Shapes(where).tables(value)


def small_facts(notes: Mapping[str, str]) -> dict[str, Fact]:
    """Those of a file's metadata that are facts: few, short, and text."""
    short = {key: note for key, note in notes.items() if _fact(note) is not None}
    return dict(list(short.items())[:_MAX_FACTS])


def flat_metric(key: str) -> tuple[Layer, str] | None:
    """The layer and the metric that the name of a single array means; None for no layer."""
    name = parse_layer(key)
    return None if name is None else (name.layer, _metric(name.rest))


def _metric(rest: str) -> str:
    """What is left of a module path behind its layer, without the modules."""
    return ".".join(word for word in re.split(r"[./]", rest) if word not in _MODULES) or UNNAMED


def _is_accumulator(key: object) -> bool:
    return isinstance(key, str) and key.startswith(f"{ACCUMULATORS}.")


class _Shapes:
    """Reads one file's value; keeps the facts it meets on the way."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._facts: dict[str, Fact] = {}
        self._numbers_left = _MAX_NUMBERS

    def tables(self, value: object) -> Tables:
        """The table of the whole value."""
        if isinstance(value, dict):
            value = self._unwrapped(value)
        if isinstance(value, StoredArray | list):
            return Tables(rows={UNNAMED: self._rows(value, "the table")}, facts=self._facts)
        if not isinstance(value, dict):
            raise self._fault(f"holds {_kind(value)} instead of a table of scores", _SHAPES)
        rows = self._named_rows(value)
        if rows:
            return Tables(rows=rows, facts=self._facts)
        return Tables(layers=self._layers(value), facts=self._facts)

    def _unwrapped(self, value: dict[object, object]) -> object:
        """The table itself, where it lies under one of the known names beside other things."""
        found = [name for name in _WRAPPERS if isinstance(value.get(name), dict | StoredArray)]
        found += [name for name in _WRAPPERS[:3] if isinstance(value.get(name), list)]
        if not found:
            return value
        others = [key for key in value if key not in found]
        layered = [key for key in others if parse_layer(key) is not None]
        if len(found) > 1 or layered:
            names = " and ".join(_short(name) for name in [*found, *layered][:2])
            raise self._fault(f"has scores under {names}", "keep the one that is meant")
        for key in others:
            self._note(key, value[key])
        return value[found[0]]

    def _named_rows(self, value: Mapping[object, object]) -> dict[str, Vector]:
        """metric → 2-D table, where that is all the value holds; else nothing."""
        tables: dict[str, StoredArray] = {}
        for key, item in value.items():
            if isinstance(item, StoredArray) and len(item.shape) == 2 and not parse_layer(key):
                tables[UNNAMED if key in _WRAPPERS else str(key)[:_MAX_NAME]] = item
            elif _fact(item) is None:
                return {}
        if not tables:
            return {}
        shapes = {item.shape for item in tables.values()}
        if len(shapes) > 1 or len(tables) > _MAX_METRICS:
            shown = ", ".join(str(list(shape)) for shape in sorted(shapes)[:3])
            raise self._fault(
                f"holds {len(tables)} 2-D tables of shapes {shown}",
                "one table [MoE layers, experts] is needed",
            )
        for key, item in value.items():
            self._note(key, item)
        return {name: self._rows(item, f"table {name}") for name, item in tables.items()}

    def _layers(self, value: Mapping[object, object]) -> dict[Layer, dict[str, Vector]]:
        grouped: dict[Layer, dict[str, object]] = {}
        keys: dict[tuple[Layer, str], object] = {}
        for key, item in value.items():
            if _is_accumulator(key):
                continue
            name = parse_layer(key)
            if name is None:
                self._beside(key, item)
                continue
            for metric, numbers in self._metrics(key, name.rest, item):
                if (name.layer, metric) in keys:
                    twin = keys[name.layer, metric]
                    problem = f"keys {_short(twin)} and {_short(key)} are both layer {name.layer}"
                    raise self._fault(problem, "keep the one that is meant")
                keys[name.layer, metric] = key
                grouped.setdefault(name.layer, {})[metric] = numbers
        if not grouped:
            raise self._fault("no key names a layer", _SHAPES)
        if len(grouped) > _MAX_LAYERS:
            raise self._fault(f"holds {len(grouped):,} layers, at most {_MAX_LAYERS:,} are read")
        ordered = sorted(grouped, key=layer_order)
        layers = {layer: self._layer(layer, grouped[layer]) for layer in ordered}
        self._note_shared(list(grouped.values()))
        return layers

    def _metrics(self, key: object, rest: str, item: object) -> list[tuple[str, object]]:
        """The metrics that one key brings: those of a dict, or the one its own name ends with."""
        if isinstance(item, Repeated):
            raise self._fault(f"layer {_short(key)} names {_short(item.key)} twice")
        if not isinstance(item, dict):
            return [(_metric(rest), item)]
        if len(item) > _MAX_METRICS:
            raise self._fault(f"layer {_short(key)} holds {len(item):,} metrics", _SHAPES)
        for metric in item:
            if not isinstance(metric, str) or len(metric) > _MAX_NAME:
                problem = f"layer {_short(key)} has a metric with the key {_short(metric)}"
                raise self._fault(problem, _SHAPES)
        return list(item.items())

    def _layer(self, layer: Layer, items: Mapping[str, object]) -> dict[str, Vector]:
        vectors: dict[str, Vector] = {}
        for metric, item in items.items():
            place = f"layer {layer}, {metric}"
            if isinstance(item, StoredArray | list):
                shape = self._shape(item, place)
                if _is_vector(shape):
                    vectors[metric] = self._numbers(item, shape, place).reshape(-1)
                elif metric == UNNAMED:
                    problem = f"{place}: shape {list(shape)}, one number per expert is needed"
                    raise self._fault(problem, _SHAPES)
        if not vectors:
            raise self._fault(f"layer {layer} holds no metric with one number per expert", _SHAPES)
        lengths = {len(vector): metric for metric, vector in vectors.items()}
        if len(lengths) > 1:
            shown = ", ".join(f"{metric} {length:,}" for length, metric in lengths.items())
            raise self._fault(f"layer {layer} has metrics of different lengths: {shown}", _SHAPES)
        return vectors

    def _rows(self, item: StoredArray | list[object], place: str) -> Vector:
        shape = self._shape(item, place)
        if len(shape) != 2 or not all(shape):
            problem = f"{place} has shape {list(shape)}, [MoE layers, experts] is needed"
            raise self._fault(problem, _SHAPES)
        return self._numbers(item, shape, place)

    def _shape(self, item: StoredArray | list[object], place: str) -> tuple[int, ...]:
        if isinstance(item, StoredArray):
            return item.shape
        if not item or not isinstance(item[0], list):
            return (len(item),)
        lengths = {len(row) if isinstance(row, list) else -1 for row in item}
        if len(lengths) > 1:
            raise self._fault(f"{place}: rows of different lengths", _SHAPES)
        return len(item), lengths.pop()

    def _numbers(
        self, item: StoredArray | list[object], shape: tuple[int, ...], place: str
    ) -> Vector:
        """The numbers as float64 in `shape`, read-only."""
        self._numbers_left -= math.prod(shape)
        if self._numbers_left < 0 or max(shape) > _MAX_EXPERTS:
            problem = f"{place}: with shape {list(shape)} there are more scores than any model has"
            raise self._fault(problem, _SHAPES)
        if isinstance(item, list):
            numbers = self._listed(item, len(shape) > 1, place)
        else:
            if item.dtype == "BOOL" or item.dtype.startswith("C"):
                kind = "true and false" if item.dtype == "BOOL" else "complex numbers"
                raise self._fault(f"{place} holds {kind}", "scores are real numbers")
            numbers = np.asarray(item.load(), np.float64)
        numbers.flags.writeable = False
        return numbers

    def _listed(self, item: list[object], nested: bool, place: str) -> Vector:
        flat = [value for row in item if isinstance(row, list) for value in row] if nested else item
        for value in flat:
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise self._fault(f"{place} holds {_kind(value)}", "scores are real numbers")
        try:
            return np.array(item, np.float64)
        except OverflowError as error:
            raise self._fault(f"{place} holds an integer beyond all floats") from error

    # What lies beside the scores

    def _beside(self, key: object, item: object) -> None:
        """Keep a small value beside the layers; refuse what could be scores of an unknown place."""
        if isinstance(item, Repeated):
            raise self._fault(f"the object under {_short(key)} names {_short(item.key)} twice")
        if isinstance(item, dict | list | StoredArray) and _fact(item) is None:
            raise self._fault(
                f"key {_short(key)} names no layer",
                "name layers by number or module path, or put them alone under 'scores'",
            )
        self._note(key, item)

    def _note(self, key: object, item: object) -> None:
        fact = _fact(item)
        named = isinstance(key, str) and len(key) <= _MAX_NAME and is_text(key)
        if fact is not None and named and len(self._facts) < _MAX_FACTS:
            self._facts.setdefault(str(key), fact)

    def _note_shared(self, layers: list[dict[str, object]]) -> None:
        """Facts that every layer repeats, as REAP's observer does with total_tokens."""
        for key in layers[0]:
            values = {_fact(layer.get(key)) for layer in layers}
            if len(values) == 1:
                self._note(key, values.pop())

    def _fault(self, problem: str, remedy: str = "") -> ScoreError:
        return ScoreError(self._where, problem, remedy)


def _is_vector(shape: tuple[int, ...]) -> bool:
    """[E], [E, 1] or [1, E], with an expert in it."""
    return len(shape) in (1, 2) and math.prod(shape) == max(shape) > 0


def _fact(item: object) -> Fact | None:
    """The value, where it is small and could stand in a JSON file."""
    if isinstance(item, StoredArray):
        if item.shape or item.dtype.startswith("C") or not item.dtype.isupper():
            return None
        item = item.load().item()
    if isinstance(item, str):
        return item if len(item) <= _MAX_FACT_LENGTH and is_text(item) else None
    if isinstance(item, bool):
        return item
    if isinstance(item, int):
        return item if abs(item) < 2**63 else None
    if isinstance(item, float):
        return item if math.isfinite(item) else None
    return None


def _kind(value: object) -> str:
    names = {"NoneType": "null", "str": "text", "bool": "true or false"}
    names |= {"int": "one number", "float": "one number", "StoredArray": "a tensor"}
    return names.get(type(value).__name__, f"a {type(value).__name__}")


def _short(key: object) -> str:
    return ascii(key)[:80] if isinstance(key, str | int) else f"of type {type(key).__name__}"
