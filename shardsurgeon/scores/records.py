"""Scores written as records, one for each expert or each layer, turned into tables by layer.

reap-mlx and others write `{layer, expert, reap, …}` for every expert, in a list or as JSON lines.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from shardsurgeon.checkpoint.layer_names import Layer
from shardsurgeon.errors import ScoreError
from shardsurgeon.scores.list_names import expert_of, is_place, layer_of
from shardsurgeon.storage.formats.strict_json import Repeated, is_whole_number

_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
# reap-mlx's names of what REAP's observer calls otherwise.
_RENAMED = {"frequency": "expert_frequency", "max_activation": "max_activations"}
# The place of an expert among those of its layer, the best one first.
_RANK = "rank"
_RANKING = "ranking"


def by_layer(records: Sequence[Mapping[Any, object]], where: str) -> dict[Layer, object]:
    """layer → metric → one number per expert, index = expert id.

    records: each names a layer. Those that name an expert hold numbers, of which a metric keeps
    those that every record of the layer has; `rank` becomes a ranking of the ids, where there is
    nothing else. Those that name none hold the layer's lists. where: the file, as messages name
    it. Raises ScoreError where experts are missing or there twice, or a layer has two records.
    """
    experts: dict[Layer, dict[int, Mapping[Any, object]]] = {}
    whole: dict[Layer, object] = {}
    for number, record in enumerate(records):
        if isinstance(record, Repeated):
            raise ScoreError(where, f"record {number:,} names {record.key[:80]!r} twice")
        layer, expert = layer_of(record), expert_of(record)
        if layer is None:
            raise ScoreError(where, f"record {number:,} names no layer", "add a key 'layer'")
        if expert is None:
            if layer in whole:
                raise ScoreError(where, f"has two records of layer {layer}", "keep one of them")
            whole[layer] = {key: item for key, item in record.items() if not is_place(key)}
            continue
        of_layer = experts.setdefault(layer, {})
        if not is_whole_number(expert) or expert in of_layer:
            problem = f"layer {layer} has two records of expert {expert}"
            if not is_whole_number(expert):
                problem = f"record {number:,} names {str(expert)[:20]!r} an expert"
            raise ScoreError(where, problem, "one record for each expert is needed")
        of_layer[expert] = record
    if both := whole.keys() & experts.keys():
        problem = f"layer {min(both, key=str)} has records of its experts and one of its own"
        raise ScoreError(where, problem, "keep one of them")
    return {**whole, **{n: _layer(n, found, where) for n, found in experts.items()}}


def _layer(
    layer: Layer, found: Mapping[int, Mapping[Any, object]], where: str
) -> dict[str, list[float]]:
    missing = next((expert for expert in range(len(found)) if expert not in found), None)
    if missing is not None:
        problem = f"layer {layer} has {len(found)} records up to expert {max(found)} and none of "
        raise ScoreError(where, f"{problem}expert {missing}", "every expert needs a record")
    columns: dict[str, list[float]] = {}
    for key in found[0]:
        values = [found[expert].get(key) for expert in range(len(found))]
        numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
        if isinstance(key, str) and not is_place(key) and len(numbers) == len(values):
            name = _CAMEL.sub("_", key).lower()
            columns[_RENAMED.get(name, name)] = numbers
    ranks = columns.pop(_RANK, None)
    if ranks is not None and not columns:
        columns[_RANKING] = [*np.argsort(ranks, kind="stable").tolist()]
    return columns
