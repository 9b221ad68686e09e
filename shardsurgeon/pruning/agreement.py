"""`scores compare`: how far two score files rank the experts of each layer alike.

Two rank correlations per layer, and what the keep-lists of both files share at given ratios.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from shardsurgeon.checkpoint.layer_names import Layer
from shardsurgeon.errors import ScoreError
from shardsurgeon.pruning.analysis import ScoreAnalysis, view_alone
from shardsurgeon.pruning.request import removed_count
from shardsurgeon.reports import Report
from shardsurgeon.scores.table import Scores
from shardsurgeon.units import counted

Values = NDArray[np.float64]
NamedScores = tuple[str, Scores]

# Below this, comparing each with each is quicker than dividing further.
_FEW = 64


@dataclass(frozen=True, slots=True)
class OverlapReport:
    """What two keep-lists of one length share.

    kept: experts in each list, None in a mean over layers that keep different numbers; share:
    of one list, how much is in the other (by chance, kept / experts); jaccard: experts in both /
    experts in either, 1 for equal lists.
    """

    kept: int | None
    share: float
    jaccard: float


@dataclass(frozen=True, slots=True)
class ComparedLayerReport:
    """How two score files agree in one layer; a correlation is None where a file ranks nothing.

    overlaps: ratio (as text) → what the keep-lists at that ratio share.
    """

    layer: int | str
    num_experts: int
    spearman: float | None
    kendall: float | None
    overlaps: dict[str, OverlapReport]


@dataclass(frozen=True, slots=True)
class ComparedPartsReport:
    """How the scores of two parts of the data agree: the means over the layers.

    a, b: the parts' names, "all" for a file that has one; the rest is as in ComparedLayerReport.
    """

    a: str
    b: str
    spearman: float | None
    kendall: float | None
    overlaps: dict[str, OverlapReport]


@dataclass(frozen=True, slots=True, repr=False)
class ComparisonReport(Report):
    """How two score files agree in the layers that both have.

    mean: over those layers, with "mean" as its `layer`; only_a, only_b: layers that one file
    alone has; parts: every dataset of one file beside every dataset of the other, of files that
    keep the sums of several apart; of one file and itself, every two.

    >>> scores = "fixtures/kimi_k25/scores.pt"
    >>> shardsurgeon.compare_scores(scores, scores).mean.overlaps["0.5"].jaccard
    1.0
    """

    a: str
    b: str
    metric_a: str
    metric_b: str
    ratios: tuple[float, ...]
    layers: tuple[ComparedLayerReport, ...]
    mean: ComparedLayerReport
    only_a: tuple[int | str, ...] = ()
    only_b: tuple[int | str, ...] = ()
    parts: tuple[ComparedPartsReport, ...] = ()

    @property
    def title(self) -> str:
        """`60 layers of 384 experts`."""
        return f"{counted(len(self.layers), 'layer')} of {self.mean.num_experts} experts"


def compare(
    a: Scores, b: Scores, ratios: Sequence[float], metrics: tuple[str | None, str | None]
) -> ComparisonReport:
    """How two score files rank the experts of every layer that both have.

    ratios: fractions of the experts removed, rounded down to whole experts, at which keep-lists
    are compared; metrics: the one of each file, None for the one that `plan` would take. A file
    whose table names no layers takes the layer numbers of the other.

    Raises ScoreError where the files have no layer in common, a common layer has different
    numbers of experts, or a file lacks the metric.
    """
    one, other = _analysis(a, b, metrics[0]), _analysis(b, a, metrics[1])
    common = [layer for layer in one.values if layer in other.values]
    if not common:
        problem = f"has no layer in common with {a.origin}"
        raise ScoreError(b.origin, problem, "compare scores of one model")
    for layer in common:
        counts = [len(each.values[layer]) for each in (one, other)]
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


def compare_parts(
    pairs: Iterable[tuple[NamedScores, NamedScores]],
    ratios: Sequence[float],
    metrics: tuple[str, str],
) -> tuple[ComparedPartsReport, ...]:
    """How the scores of each pair of parts agree; a pair that lacks its metrics is left out."""
    found = []
    for (a, one), (b, other) in pairs:
        if metrics[0] in (*one.metrics, *one.rows) and metrics[1] in (*other.metrics, *other.rows):
            mean = compare(one, other, ratios, metrics).mean
            found.append(ComparedPartsReport(a, b, mean.spearman, mean.kendall, mean.overlaps))
    return tuple(found)


def spearman(a: Values, b: Values) -> float | None:
    """Spearman's rho of two scorings of the same experts, -1 to 1.

    rho = cov(r, s) / (std(r) * std(s)) of the ranks r of `a` and s of `b`; experts of equal value
    get the mean of their ranks (Spearman 1904). a, b: float64 [experts]; NaN, a never-routed
    expert, ranks lowest, +inf highest. None where all values of one scoring are equal, which
    leaves nothing to rank.
    """
    x, y = (_mean_ranks(values) for values in (a, b))
    x, y = x - x.mean(), y - y.mean()
    size = math.sqrt(float(x @ x)) * math.sqrt(float(y @ y))
    return min(1.0, max(-1.0, float(x @ y) / size)) if size else None


def kendall(a: Values, b: Values) -> float | None:
    """Kendall's tau-b of two scorings of the same experts, -1 to 1.

    tau_b = (C - D) / sqrt((P - T_a) * (P - T_b)): of the P pairs of experts, C are ordered alike
    by both, D the other way round, and T_a, T_b are tied in `a` and in `b` (Kendall 1945). D is
    counted by Knight's method (1966): sorted by `a`, the pairs out of order in `b`. a, b and the
    result as in `spearman`.
    """
    x, y = (_codes(values) for values in (a, b))
    pairs = _pairs(np.array([len(x)]))
    tied_x, tied_y = (_pairs(np.bincount(codes)) for codes in (x, y))
    tied_both = _pairs(np.unique(x * len(y) + y, return_counts=True)[1])
    size = math.sqrt(pairs - tied_x) * math.sqrt(pairs - tied_y)
    if not size:
        return None
    # Pairs tied in x stand in the order of y, so that none of them counts as discordant.
    discordant = _inversions(y[np.lexsort((y, x))])
    agreement = pairs - tied_x - tied_y + tied_both - 2 * discordant
    return min(1.0, max(-1.0, agreement / size))


def overlap(a: Values, b: Values, kept: int) -> OverlapReport:
    """What the keep-lists of the `kept` most salient experts share; ties keep the lower id.

    a, b: float64 [experts]; kept: 1 to experts.
    """
    common = len(keep_list(a, kept) & keep_list(b, kept))
    return OverlapReport(kept, common / kept, common / (2 * kept - common))


def _analysis(scores: Scores, other: Scores, metric: str | None) -> ScoreAnalysis:
    numbered = [layer for layer in other.layers if isinstance(layer, int)]
    return view_alone(scores.assign_rows(numbered) if numbered else scores, metric)


def _layer(layer: Layer, a: Values, b: Values, ratios: Sequence[float]) -> ComparedLayerReport:
    experts = len(a)
    overlaps = {str(r): overlap(a, b, experts - removed_count(r, experts)) for r in ratios}
    return ComparedLayerReport(layer, experts, spearman(a, b), kendall(a, b), overlaps)


def _mean(layers: Sequence[ComparedLayerReport]) -> ComparedLayerReport:
    """The mean of every number over the layers that have it."""

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


def keep_list(values: Values, kept: int) -> set[int]:
    """The `kept` most salient experts; values: float64 [experts]."""
    # As `select` chooses: a stable sort puts the lower id first among equals.
    return set(np.argsort(-_order(values), kind="stable")[:kept].tolist())


def _order(values: Values) -> Values:
    return np.where(np.isnan(values), -np.inf, values)


def _codes(values: Values) -> NDArray[np.int64]:
    """The values numbered 0, 1, … in ascending order, equal ones alike: int64 [experts]."""
    return np.asarray(np.unique(_order(values), return_inverse=True)[1], np.int64)


def _mean_ranks(values: Values) -> Values:
    """The rank of each value from 1, equal ones sharing the mean of theirs: float64 [experts]."""
    codes = _codes(values)
    counts = np.bincount(codes)
    return np.asarray((np.cumsum(counts) - (counts - 1) / 2)[codes])


def _pairs(counts: NDArray[np.int64]) -> int:
    """How many pairs there are within groups of such sizes, all groups together."""
    return int((counts * (counts - 1) // 2).sum())


def _inversions(codes: NDArray[np.int64]) -> int:
    """How many pairs stand in descending order."""
    count = len(codes)
    if count <= _FEW:
        return int(np.triu(codes[:, None] > codes[None, :]).sum())
    left, right = codes[: count // 2], codes[count // 2 :]
    across = np.searchsorted(np.sort(right), left, side="left").sum()
    return _inversions(left) + _inversions(right) + int(across)
