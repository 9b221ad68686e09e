"""Two score files side by side: the same layers, ranked by each. Pure.

Between two tables and the report of `scores compare`; the arithmetic is in `rankings`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from shardsurgeon.checkpoint.layernames import Layer
from shardsurgeon.errors import ScoreError
from shardsurgeon.operations.reports import ComparedLayerReport, ComparisonReport, OverlapReport
from shardsurgeon.pruning.counts import removed_count
from shardsurgeon.pruning.rankings import kendall, overlap, spearman
from shardsurgeon.pruning.scoreviews import View, view_alone
from shardsurgeon.scores.scores import Scores

Values = Mapping[Layer, NDArray[np.float64]]


def compare(
    a: Scores, b: Scores, ratios: Sequence[float], metrics: tuple[str | None, str | None]
) -> ComparisonReport:
    """How the two rank the experts of every layer that both have.

    ratios: fractions removed, rounded down, at which keep-lists are compared; metrics: the one of
    each file, None for its default. A table that names no layers takes the names of the other.
    Raises ScoreError where there is no common layer or one has different numbers of experts.
    """
    one, other = _named(a, b, metrics[0]), _named(b, a, metrics[1])
    common = [layer for layer in one.values if layer in other.values]
    if not common:
        problem = f"has no layer in common with {a.origin}"
        raise ScoreError(b.origin, problem, "compare scores of one model")
    for layer in common:
        counts = [len(view.values[layer]) for view in (one, other)]
        if counts[0] != counts[1]:
            problem = f"layer {layer} has {counts[1]} scores, in {a.origin} {counts[0]}"
            raise ScoreError(b.origin, problem, "compare scores of one model")
    layers = [_layer(n, one.values[n], other.values[n], ratios) for n in common]
    return ComparisonReport(
        a=a.origin,
        b=b.origin,
        metric_a=one.metric,
        metric_b=other.metric,
        ratios=tuple(ratios),
        layers=tuple(layers),
        mean=_mean(layers),
        only_a=tuple(layer for layer in one.values if layer not in other.values),
        only_b=tuple(layer for layer in other.values if layer not in one.values),
    )


def _named(scores: Scores, other: Scores, metric: str | None) -> View:
    numbered = [layer for layer in other.layers if isinstance(layer, int)]
    return view_alone(scores.assign_rows(numbered) if numbered else scores, metric)


def _layer(
    layer: Layer, a: NDArray[np.float64], b: NDArray[np.float64], ratios: Sequence[float]
) -> ComparedLayerReport:
    overlaps = {}
    for ratio in ratios:
        both = overlap(a, b, len(a) - removed_count(ratio, len(a)))
        overlaps[str(ratio)] = OverlapReport(both.kept, both.share, both.jaccard)
    return ComparedLayerReport(layer, len(a), spearman(a, b), kendall(a, b), overlaps)


def _mean(layers: Sequence[ComparedLayerReport]) -> ComparedLayerReport:
    def mean(values: Sequence[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return fmean(known) if known else None

    overlaps = {}
    for ratio in layers[0].overlaps:
        rows = [layer.overlaps[ratio] for layer in layers]
        kept = {row.kept for row in rows}
        overlaps[ratio] = OverlapReport(
            kept.pop() if len(kept) == 1 else None,
            fmean(row.share for row in rows),
            fmean(row.jaccard for row in rows),
        )
    return ComparedLayerReport(
        layer="mean",
        num_experts=max(layer.num_experts for layer in layers),
        spearman=mean([layer.spearman for layer in layers]),
        kendall=mean([layer.kendall for layer in layers]),
        overlaps=overlaps,
    )
