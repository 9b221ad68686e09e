"""Whether a table of scores says anything: what could only prune by chance is told apart.

Values that mean nothing are refused wherever they are read. A table that measured nothing can
still be looked at; only a prune refuses it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np

from shardsurgeon.checkpoint.layer_names import Layer
from shardsurgeon.errors import ScoreError
from shardsurgeon.scores.rankings import is_ranking
from shardsurgeon.scores.table import Scores, Vector

# Words in the names of metrics that are sums or means over tokens: without a token they are none.
_MEASURED = frozenset(
    ("reap", "ean", "man", "msan", "frequency", "activation", "activations", "cnt")
)
_RANK = "rank"
# One order of the experts in every layer is believed where chance makes it at least so often.
_RARELY = 1e-9
# So few experts may by chance have the scores 0, 1, 2, … .
_FEW = 8

_CALIBRATE = "calibrate again with more tokens, or give scores of another kind"


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


def require_measured(
    scores: Scores, metric: str, main: Collection[Layer], mtp: Collection[Layer]
) -> None:
    """Raise ScoreError where `doubts` has one.

    scores: with their layers named; main, mtp: those that are to be pruned, as the scores name
    them.
    """
    for problem, remedy in doubts(scores, metric, main, mtp):
        raise ScoreError(scores.origin, problem, remedy)


def doubts(
    scores: Scores, metric: str, main: Collection[Layer], mtp: Collection[Layer] = ()
) -> Iterator[tuple[str, str]]:
    """Why a metric is no measurement: (problem, remedy), each of which makes a prune arbitrary.

    scores, main, mtp: as in `require_measured`. NaN and infinities are `check_values`' to judge.
    """
    table = {layer: scores.layers[layer][metric] for layer in (*main, *mtp)}
    yield from _without_tokens(scores, metric, table)
    yield from _alike(table)
    # A metric of that name may count from 1.
    first = 1 if _RANK in metric.split("_") else 0
    ranked = [n for n, row in table.items() if is_ranking(row) or is_ranking(row - first)]
    few = max(map(len, table.values()), default=0) < _FEW
    if ranked and (not few or len(ranked) == len(table)):
        lowest, highest = (f"{end(table[ranked[0]]):g}" for end in (np.min, np.max))
        yield (
            f"{_layers(ranked)}: its scores are the numbers {lowest} to {highest}, each once, "
            "which is a ranking of the experts and no saliency",
            "say --lists best-first or --lists worst-first; where they are the ranks of experts "
            "0, 1, 2, …, divide them by the number of experts",
        )
    yield from _one_order({layer: table[layer] for layer in main})


def unmeasured(row: Vector) -> str:
    """Why the scores of a layer do not tell its experts apart, or "". row: float64 [experts]."""
    rest = row[~np.isposinf(row)]
    known = rest[~np.isnan(rest)]
    if not known.size:
        return ""
    if not known.any():
        beside = "" if known.size == row.size else " that is a number"
        return f"every score{beside} is 0"
    if 1 < row.size == known.size and (known == known[0]).all():
        return f"all {row.size} experts have the score {known[0]:g}"
    return ""


def _without_tokens(
    scores: Scores, metric: str, table: Mapping[Layer, Vector]
) -> Iterator[tuple[str, str]]:
    if not _MEASURED.intersection(metric.split("_")):
        return
    everywhere = next((scores.facts[k] for k in _TOTALS if k in scores.facts), None)
    counted = scores.frequencies()
    empty = []
    for layer in table:
        reached = counted.get(layer)
        if scores.tokens.get(layer, everywhere) == 0 or (reached is not None and not reached.any()):
            empty.append(layer)
    if empty:
        problem = (
            f"{_layers(empty)}: no token went through it, and {metric} is measured over tokens"
        )
        yield problem, _CALIBRATE


def _alike(table: Mapping[Layer, Vector]) -> Iterator[tuple[str, str]]:
    found = {layer: problem for layer, row in table.items() if (problem := unmeasured(row))}
    if found:
        yield (
            f"{_layers([*found])}: {next(iter(found.values()))}, which is no measurement",
            _CALIBRATE,
        )


def _one_order(table: Mapping[Layer, Vector]) -> Iterator[tuple[str, str]]:
    """One order of the experts in all layers, where chance would not make it.

    Each further layer has the first one's order with a chance of one in the number of orders
    that its ties leave: E! / (t_1! t_2! …) for ties of t_1, t_2, … experts.
    """
    if len(table) < 2:
        return
    first, *others = (_ranks(row) for row in table.values())
    if any(not np.array_equal(first, other) for other in others):
        return
    ties = np.bincount(first).tolist()
    orders = math.lgamma(len(first) + 1) - math.fsum(math.lgamma(tied + 1) for tied in ties)
    if -orders * len(others) < math.log(_RARELY):
        yield (
            f"all {len(table)} layers have their {len(first)} experts in one and the same order, "
            "which layers that were measured have less often than once in a billion",
            "use scores that were made layer by layer",
        )


def _ranks(row: Vector) -> np.ndarray:
    """The scores numbered 0, 1, … in ascending order, equal ones alike, NaN as the lowest."""
    lowest = np.where(np.isnan(row), -np.inf, row)
    return np.asarray(np.unique(lowest, return_inverse=True)[1])


def _layers(layers: Sequence[Layer]) -> str:
    more = f" and {len(layers) - 1} more" if len(layers) > 1 else ""
    return f"layer {layers[0]}{more}"


# What a file may call the tokens of all its layers.
_TOTALS = ("total_tokens", "totalTokens")
