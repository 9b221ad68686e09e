"""Rankings: the ids of a layer's experts in the order of their worth, read as saliencies.

A list of ids looks like a list of scores, and pruning by it as scores would be pruning by
chance: it is a ranking where the file or the user says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from enum import StrEnum

import numpy as np

from shardsurgeon.checkpoint.layer_names import Layer
from shardsurgeon.errors import ScoreError
from shardsurgeon.scores.table import Scores, Vector


class RankingOrder(StrEnum):
    """Which end of a ranking is to stay."""

    BEST_FIRST = "best-first"
    WORST_FIRST = "worst-first"


def is_ranking(row: Vector) -> bool:
    """Whether a row holds 0, 1, …, E - 1, each once. row: float64 [E]."""
    return len(row) > 1 and np.array_equal(np.sort(row), np.arange(len(row)))


def saliency_of(row: Vector, order: RankingOrder) -> Vector:
    """Place in a ranking as saliency: 1 for the best of E experts, 1 / E for the worst.

    row: float64 [E], ids in that order, for which `is_ranking` holds. Fractions, so that nobody
    takes the result for a ranking again.
    """
    best_first = row[::-1] if order is RankingOrder.WORST_FIRST else row
    saliency = np.empty(len(row))
    saliency[best_first.astype(np.int64)] = np.arange(len(row), 0, -1) / len(row)
    saliency.flags.writeable = False
    return saliency


def as_ranking(scores: Scores, metric: str | None, order: RankingOrder) -> Scores:
    """Scores whose rows are rankings, as saliencies.

    scores: with their layers named; metric: the one that is a ranking, None for the one that
    `select` gives; the others stay as they are. Raises ScoreError for a row that is none, and where
    the file says the opposite of `order`.
    """
    if scores.ranking:
        if scores.ranking != order:
            problem = f"says that it ranks experts {scores.ranking}, --lists says {order}"
            raise ScoreError(scores.origin, problem, "leave out --lists")
        return scores
    name, table = scores.select(metric)
    layers: dict[Layer, Mapping[str, Vector]] = {}
    for layer, row in table.items():
        if not is_ranking(row):
            problem = f"layer {layer} does not rank {len(row)} experts: that is 0 to {len(row) - 1}"
            raise ScoreError(scores.origin, f"{problem}, each once", "leave out --lists")
        layers[layer] = {**scores.layers[layer], name: saliency_of(row, order)}
    return replace(scores, layers=layers, ranking=str(order))
