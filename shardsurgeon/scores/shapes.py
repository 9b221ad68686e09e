"""The shapes that tools give their scores, each told apart and read into the one table.

A value read from a file (dicts, lists, numbers, unread arrays) comes in; what could be read in
two ways is refused. Nothing here knows the format of the file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import numpy as np

from shardsurgeon.checkpoint.layer_names import Layer, layer_order, parse_layer
from shardsurgeon.errors import ScoreError
from shardsurgeon.scores.list_names import are_records, layer_of, list_meaning, ranking_in
from shardsurgeon.scores.rankings import RankingOrder, is_ranking, saliency_of
from shardsurgeon.scores.records import by_layer
from shardsurgeon.scores.table import ACCUMULATORS, PARTS, UNNAMED, Fact, Scores, Vector
from shardsurgeon.storage.formats.dtypes import StoredArray
from shardsurgeon.storage.formats.strict_json import Repeated, is_text, is_whole_number
from shardsurgeon.storage.limits import MAX_EXPERTS, MAX_LAYERS, MAX_NUMBERS

# Keys under which a table may lie beside other things.
_WRAPPERS = ("scores", "saliency", "saliency_scores", "layers")
# What a module path may say between the layer and the metric.
_MODULES = frozenset(
    ("mlp", "moe", "ffn", "feed_forward", "block_sparse_moe", "mixer", "experts", "gate", "router")
)
# How REAP's observer calls the tokens that went through a layer.
_TOTAL_TOKENS = "total_tokens"
# Far beyond any model: a file that asks for more is refused before memory is taken for it.
_MAX_METRICS = 256
_MAX_NAME = 200
_MAX_FACTS = 64
_MAX_FACT_LENGTH = 500

# What a file may call the order of its ranking.
_ORDERS = {
    **dict.fromkeys(("best-first", "hottest-first"), RankingOrder.BEST_FIRST),
    **dict.fromkeys(("worst-first", "coldest-first"), RankingOrder.WORST_FIRST),
}

_WITH_PLAN = "`plan` and `apply` take a keep-list with --plan, and scores as SCORES"
_SHAPES = "scores are {layer: tensor[experts]} or {layer: {metric: tensor[experts]}}"


def read_tables(value: object, where: str) -> Scores:
    """The scores that a file's content is, whichever of the accepted shapes it has.

    value: what a format reader gave; where: the file, as messages name it. Raises ScoreError,
    naming the layer, for anything but one number per expert and layer, and for two keys that
    mean the same layer.
    """
    return _Shapes(where).scores(value)


def scores_in_memory(value: object, origin: str = "scores") -> Scores:
    """The scores that a dict, a list or an array is, in the shapes that files have.

    value: with numpy's arrays, or any that turn into those, such as torch's tensors; they are
    copied. origin: what messages call it. Raises ScoreError as `read_tables` does.
    """
    return read_tables(_held(value), origin)


def _held(value: object) -> object:
    """The value as a format reader would have given it."""
    if isinstance(value, Mapping):
        return {_held_key(key): _held(item) for key, item in value.items()}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, list | tuple):
        return [item.tolist() if hasattr(item, "tolist") else _held(item) for item in value]
    if not hasattr(value, "__array__"):
        return value
    if hasattr(value, "detach"):  # a tensor of torch, on any device, of types that numpy lacks
        tensor = value.detach().cpu()
        value = tensor.double() if tensor.is_floating_point() else tensor
    array = np.asarray(value).copy()  # it will be made read-only
    dtype = {"f": "F64", "i": "I64", "u": "I64", "b": "BOOL", "c": "C128"}.get(array.dtype.kind)
    return StoredArray(dtype, array.shape, lambda: array) if dtype else array.tolist()


def _held_key(key: object) -> object:
    return key.item() if isinstance(key, np.generic) else key


def small_facts(notes: Mapping[str, str]) -> dict[str, Fact]:
    """Those of a file's metadata that are facts: few, short, and text."""
    short = {key: note for key, note in notes.items() if _fact(note) is not None}
    return dict(list(short.items())[:_MAX_FACTS])


def flat_metric(key: str) -> tuple[Layer, str] | None:
    """The layer and the metric that the name of a single array means; None for no layer."""
    name = parse_layer(key)
    return None if name is None else (name.layer, _metric(name.rest))


class _Shapes:
    """Reads one file's value; collects the small values that lie beside the scores."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._facts: dict[str, Fact] = {}
        self._tokens: dict[Layer, int] = {}
        self._order: RankingOrder | None = RankingOrder.BEST_FIRST
        self._order_said = ""
        self._is_ranking = False
        self._numbers_left = MAX_NUMBERS

    def scores(self, value: object) -> Scores:
        """The whole value."""
        if isinstance(value, dict) and layer_of(value) is not None:
            value = [value]  # JSON lines with one line
        if isinstance(value, dict):
            found, ranking = _wrapped(value), ranking_in(value)
            if ranking is not None and not found:
                return self._ranking(value, ranking)
            self._note_order(value)
            value = self._unwrapped(value, found)
        if are_records(value):
            value = by_layer(value, self._where)
        if isinstance(value, StoredArray | list):
            return Scores(self._where, {}, {UNNAMED: self._rows(value, "the table")}, self._facts)
        if not isinstance(value, dict):
            raise self._fault(f"holds {_kind(value)} instead of a table of scores", _SHAPES)
        rows = self._named_rows(value)
        if rows:
            return Scores(self._where, {}, rows, self._facts)
        layers = self._layers(value)
        ranking = str(self._order) if self._is_ranking else ""
        return Scores(self._where, layers, {}, self._facts, self._tokens, ranking)

    def _unwrapped(self, value: dict[object, object], found: list[str]) -> object:
        """The table itself, where it lies under one of the known names beside other things."""
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

    def _note_order(self, value: Mapping[object, object]) -> None:
        """Which end of a ranking is the best, where the file says it."""
        said = value.get("order")
        if isinstance(said, str):
            self._order = _ORDERS.get(said.lower().replace("_", "-").replace(" ", "-"))
            self._order_said = _short(said)

    def _ranking(self, value: Mapping[object, object], held: object) -> Scores:
        """held: what lies under the word for a ranking in `value`."""
        self._note_order(value)
        for key, item in value.items():
            self._note(key, item)
        if are_records(held):
            held = by_layer(held, self._where)
        if isinstance(held, StoredArray | list):
            ids = self._rows(held, "the ranking")
            rows = np.stack([self._ranked(row, f"row {n}") for n, row in enumerate(ids)])
            rows.flags.writeable = False
            return Scores(self._where, {}, {UNNAMED: rows}, self._facts, ranking=str(self._order))
        if not isinstance(held, dict):
            raise self._fault(f"holds {_kind(held)} instead of a ranking", _SHAPES)
        ranked = {
            key: item if isinstance(item, dict) else {"ranking": item} for key, item in held.items()
        }
        return Scores(self._where, self._layers(ranked), {}, self._facts, ranking=str(self._order))

    def _ranked(self, row: Vector, place: str) -> Vector:
        """The saliencies that a ranking of a layer's experts stands for."""
        if self._order is None:
            problem = f"ranks experts in the order {self._order_said}"
            raise self._fault(problem, "say best-first or worst-first under 'order'")
        if not is_ranking(row):
            problem = f"{place} ranks {len(row)} experts, and not each of 0 to {len(row) - 1} once"
            raise self._fault(problem, "a ranking lists every expert of a layer once")
        self._is_ranking = True
        return saliency_of(row, self._order)

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
        if len(grouped) > MAX_LAYERS:
            raise self._fault(f"holds {len(grouped):,} layers, at most {MAX_LAYERS:,} are read")
        ordered = sorted(grouped, key=layer_order)
        layers = {layer: self._layer(layer, grouped[layer]) for layer in ordered}
        self._note_shared(list(grouped.values()))
        for layer in ordered:
            tokens = _fact(grouped[layer].get(_TOTAL_TOKENS))
            if is_whole_number(tokens):
                self._tokens[layer] = tokens
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
        lists = {metric: list_meaning(metric) for metric in items if list_meaning(metric)}
        for metric, item in items.items():
            place = f"layer {layer}, {metric}"
            if metric not in lists and isinstance(item, StoredArray | list):
                shape = self._shape(item, place)
                if _is_vector(shape):
                    vectors[metric] = self._numbers(item, shape, place).reshape(-1)
                elif metric == UNNAMED:
                    problem = f"{place}: shape {list(shape)}, one number per expert is needed"
                    raise self._fault(problem, _SHAPES)
        ranking = next((items[metric] for metric in lists if lists[metric] == "ranking"), None)
        if not vectors and isinstance(ranking, StoredArray | list):
            place = f"layer {layer}"
            vectors[UNNAMED] = self._ranked(self._vector(ranking, place), place)
        if not vectors and lists:
            listed = next(iter(lists))
            raise self._fault(f"layer {layer} holds {_short(listed)} and no scores", _WITH_PLAN)
        if not vectors:
            raise self._fault(f"layer {layer} holds no metric with one number per expert", _SHAPES)
        lengths = {len(vector): metric for metric, vector in vectors.items()}
        if len(lengths) > 1:
            shown = ", ".join(f"{metric} {length:,}" for length, metric in lengths.items())
            raise self._fault(f"layer {layer} has metrics of different lengths: {shown}", _SHAPES)
        return vectors

    def _vector(self, item: StoredArray | list[object], place: str) -> Vector:
        shape = self._shape(item, place)
        if not _is_vector(shape):
            raise self._fault(f"{place}: shape {list(shape)} is no ranking", _SHAPES)
        return self._numbers(item, shape, place).reshape(-1)

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
        if self._numbers_left < 0 or max(shape) > MAX_EXPERTS:
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
        if list_meaning(key) in ("kept", "dropped") and isinstance(item, dict | list):
            raise self._fault(f"lists experts under {_short(key)} and holds no scores", _WITH_PLAN)
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


def _wrapped(value: Mapping[object, object]) -> list[str]:
    """The known names under which a table lies in an object."""
    found = [name for name in _WRAPPERS if isinstance(value.get(name), dict | StoredArray)]
    found += [name for name in _WRAPPERS[:3] if isinstance(value.get(name), list)]
    found += [name for name in ("layers", "experts") if are_records(value.get(name))]
    return found


def _metric(rest: str) -> str:
    """What is left of a module path behind its layer, without the modules."""
    return ".".join(word for word in re.split(r"[./]", rest) if word not in _MODULES) or UNNAMED


def _is_accumulator(key: object) -> bool:
    return isinstance(key, str) and key.startswith((f"{ACCUMULATORS}.", f"{PARTS}.layers."))


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
