"""What the commands report, as plain frozen values. `--json` prints exactly these."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from shardsurgeon.checkpoint.layer_names import Layer
from shardsurgeon.errors import ScoreError
from shardsurgeon.pruning.analysis import ScoreAnalysis, view_alone
from shardsurgeon.pruning.request import removed_count
from shardsurgeon.scores.table import Scores

Values = NDArray[np.float64]

# Below this, comparing each with each is quicker than dividing further.
_FEW = 64

LayerScores = Mapping[Layer, NDArray[np.float64]]


@dataclass(frozen=True, slots=True)
class OverlapReport:
    """What the keep-lists of two score files share at one ratio.

    kept: experts in each list; share: of a list in the other; jaccard: common / in either. A mean
    over layers has kept None where layers differ.
    """

    kept: int | None
    share: float
    jaccard: float


@dataclass(frozen=True, slots=True)
class ComparedLayerReport:
    """How two score files agree in one layer; a correlation is None where a file ranks nothing.

    overlaps: ratio (as text) → the keep-lists.
    """

    layer: int | str
    num_experts: int
    spearman: float | None
    kendall: float | None
    overlaps: dict[str, OverlapReport]


@dataclass(frozen=True, slots=True)
class ComparisonReport:
    """How two score files agree in the layers that both have.

    mean: over those, its `layer` is "mean"; only_a, only_b: layers of one file alone.
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


@dataclass(frozen=True, slots=True)
class Overlap:
    """Two keep-lists of one length. kept: experts in each; common: in both.

    jaccard: common / in either; share: common / kept.
    """

    kept: int
    common: int

    @property
    def jaccard(self) -> float:
        """1 for the same experts, 0 for none in common."""
        return self.common / (2 * self.kept - self.common)

    @property
    def share(self) -> float:
        """The part of one list that is in the other; by chance, kept / experts."""
        return self.common / self.kept


def spearman(a: Values, b: Values) -> float | None:
    """Spearman's rho of two scorings of the same experts, float64 [experts].

    The correlation of their ranks, equal values sharing the mean of theirs. None where one of
    them ranks nothing: all its values are equal.
    """
    x, y = (_mean_ranks(values) for values in (a, b))
    x, y = x - x.mean(), y - y.mean()
    size = math.sqrt(float(x @ x)) * math.sqrt(float(y @ y))
    return min(1.0, max(-1.0, float(x @ y) / size)) if size else None


def kendall(a: Values, b: Values) -> float | None:
    """Kendall's tau-b: pairs ordered alike less pairs ordered otherwise, corrected for ties.

    None where one of them ranks nothing. Knight's method: sorted by one, what is out of order in
    the other are the discordant pairs.
    """
    x, y = (_codes(values) for values in (a, b))
    pairs = _pairs(np.array([len(x)]))
    tied_x, tied_y = (_pairs(np.bincount(codes)) for codes in (x, y))
    tied_both = _pairs(np.unique(x * len(y) + y, return_counts=True)[1])
    size = math.sqrt(pairs - tied_x) * math.sqrt(pairs - tied_y)
    if not size:
        return None
    discordant = _inversions(y[np.lexsort((y, x))])
    agreement = pairs - tied_x - tied_y + tied_both - 2 * discordant
    return min(1.0, max(-1.0, agreement / size))


def overlap(a: Values, b: Values, kept: int) -> Overlap:
    """What two keep-lists of the `kept` most salient experts share; ties keep the lower id."""
    return Overlap(kept, len(_keep_list(a, kept) & _keep_list(b, kept)))


def _keep_list(values: Values, kept: int) -> set[int]:
    return set(np.argsort(-_order(values), kind="stable")[:kept].tolist())


def _order(values: Values) -> Values:
    return np.where(np.isnan(values), -np.inf, values)


def _codes(values: Values) -> NDArray[np.int64]:
    """Equal values as equal numbers 0, 1, …, in order."""
    return np.asarray(np.unique(_order(values), return_inverse=True)[1], np.int64)


def _mean_ranks(values: Values) -> Values:
    codes = _codes(values)
    counts = np.bincount(codes)
    return np.asarray((np.cumsum(counts) - (counts - 1) / 2)[codes])


def _pairs(counts: NDArray[np.int64]) -> int:
    return int((counts * (counts - 1) // 2).sum())


def _inversions(codes: NDArray[np.int64]) -> int:
    """How many pairs stand in descending order."""
    count = len(codes)
    if count <= _FEW:
        return int(np.triu(codes[:, None] > codes[None, :]).sum())
    left, right = codes[: count // 2], codes[count // 2 :]
    across = np.searchsorted(np.sort(right), left, side="left").sum()
    return _inversions(left) + _inversions(right) + int(across)


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


def _named(scores: Scores, other: Scores, metric: str | None) -> ScoreAnalysis:
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
