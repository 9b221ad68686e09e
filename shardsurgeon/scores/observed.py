"""Files of REAP's observer added up: what it saw over all samples of several runs.

The observer keeps sums over tokens beside the means that it takes of them, so that runs over
different samples add up. It lists no samples: that the files share none is for the user to know.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from shardsurgeon.checkpoint.layer_names import Layer
from shardsurgeon.errors import ScoreError
from shardsurgeon.scores.files import ScoreContent
from shardsurgeon.scores.table import Scores, Vector

COUNT = "expert_frequency"
"""The metric that says how many tokens an expert was chosen for."""

MEANS = {"reap": "weighted_ean_sum", "ean_mean": "ean_sum"}
"""Every mean of a file, and the sum that it is of."""

_NEEDED = (COUNT, *MEANS.values())
_SUMS = (*_NEEDED, "weighted_expert_frequency_sum")
_LARGEST = "max_activations"
_ADDED = (*_SUMS, _LARGEST)

WEIGHED = (*MEANS, *_SUMS)
"""The metrics that parts of different weights have in common."""

_TOTAL_TOKENS = "total_tokens"
# Means are stored in 32 bits, and some runs add in fewer.
_TOLERANCE = 1e-2


def is_observed(scores: Scores) -> bool:
    """Whether every layer has the sums and counts of REAP's observer."""
    return bool(scores.layers) and all(
        metric in metrics for metrics in scores.layers.values() for metric in _NEEDED
    )


def merge_observed(parts: Sequence[Scores], weights: Sequence[float] = ()) -> ScoreContent:
    """What one run over the samples of all parts would have written.

    parts: of one model, each `is_observed`; weights: 0 or more for each part, as if every token of
    it had been seen that often, a part of 0 left out; none for 1 each. Counts and sums add up,
    `max_activations` is the largest; reap = weighted_ean_sum / expert_frequency and ean_mean =
    ean_sum / expert_frequency, 0 for an expert without tokens. Metrics that do not add up, or that
    a part lacks, are left out. Raises ScoreError, naming file and layer, for other layers or
    experts, sums that are not finite (a super expert's mark), means that are not of their sums, and
    a file given twice.
    """
    for number, part in enumerate(parts):
        _require_alike(parts[0], part)
        _require_sums(part)
        for earlier in parts[:number]:
            _require_different(earlier, part)
    weighed = [(part, w) for part, w in zip(parts, weights or [1.0] * len(parts), strict=True) if w]
    return ScoreContent(layers={layer: _merged(weighed, layer) for layer in parts[0].layers})


def weighted_sum(rows: Sequence[Vector], weights: Sequence[float]) -> Vector:
    """Σ weight * row, in the order given; rows: float64 [experts]. Weights of 1 change no bit."""
    total: Vector = weights[0] * rows[0]
    for row, weight in zip(rows[1:], weights[1:], strict=True):
        total = total + weight * row
    return total


def _merged(
    parts: Sequence[tuple[Scores, float]], layer: Layer
) -> Mapping[str, NDArray[np.generic]]:
    tables, weights = [part.layers[layer] for part, _ in parts], [weight for _, weight in parts]
    merged: dict[str, NDArray[np.generic]] = {}
    for metric in _ADDED:
        if all(metric in table for table in tables):
            rows = [table[metric] for table in tables]
            largest = metric == _LARGEST
            merged[metric] = np.max(rows, 0) if largest else weighted_sum(rows, weights)
    counts = np.asarray(merged[COUNT], np.float64)
    for mean, total_of in MEANS.items():
        total = np.asarray(merged[total_of], np.float64)
        merged[mean] = total / np.where(counts > 0, counts, 1)
    if all(layer in part.tokens for part, _ in parts):
        tokens = sum(weight * part.tokens[layer] for part, weight in parts)
        merged[_TOTAL_TOKENS] = np.array(round(tokens), np.int64)
    return merged


def _require_alike(first: Scores, other: Scores) -> None:
    sizes = [{n: len(table[COUNT]) for n, table in part.layers.items()} for part in (first, other)]
    if sizes[0] != sizes[1]:
        layer = next(n for n in {**sizes[0], **sizes[1]} if sizes[0].get(n) != sizes[1].get(n))
        found = [f"{size.get(layer, 0)} experts" for size in sizes]
        problem = f"has {found[1]} in layer {layer}, {first.origin} has {found[0]}"
        raise ScoreError(other.origin, problem, "merge files of one model")


def _require_sums(part: Scores) -> None:
    for layer, table in part.layers.items():
        for metric in (*_ADDED, *MEANS):
            odd = np.flatnonzero(~np.isfinite(table.get(metric, np.zeros(0))))
            if odd.size and (metric in _ADDED or np.isinf(table[metric][odd]).any()):
                value = table[metric][odd[0]]
                problem = (
                    f"layer {layer}, {metric} of expert {odd[0]} is {value}, and does not add up"
                )
                raise ScoreError(part.origin, problem, "merge the files from before it was marked")
        reached = table[COUNT] > 0
        for mean, total in MEANS.items():
            if mean not in table:
                continue
            expected = table[total][reached] / table[COUNT][reached]
            wrong = ~np.isclose(table[mean][reached], expected, rtol=_TOLERANCE, atol=1e-30)
            if wrong.any():
                expert = int(np.flatnonzero(reached)[np.argmax(wrong)])
                problem = f"layer {layer}, expert {expert}: {mean} is {table[mean][expert]:g}, not "
                problem += f"{total} / {COUNT} = {expected[np.argmax(wrong)]:g}"
                raise ScoreError(part.origin, problem, "only means of these sums can be merged")


def _require_different(earlier: Scores, part: Scores) -> None:
    same = all(
        np.array_equal(earlier.layers[layer][metric], table[metric])
        for layer, table in part.layers.items()
        for metric in _NEEDED
    )
    if same:
        problem = f"holds the same counts and sums as {earlier.origin}"
        raise ScoreError(part.origin, problem, "each sample counts once; give each run once")
