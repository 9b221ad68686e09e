"""`scores show`: what a score file says of each layer, and where the layers could be cut.

What a cut costs is the share of a layer's saliency that goes with the pruned experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shardsurgeon.checkpoint.layer_names import Layer
from shardsurgeon.errors import ScoreError
from shardsurgeon.pruning.request import removed_count
from shardsurgeon.pruning.routing import RoutingFacts, fewest_kept
from shardsurgeon.pruning.selection import SUPER_METRIC, super_experts
from shardsurgeon.scores.checks import check_values
from shardsurgeon.scores.table import Scores

Values = NDArray[np.float64]
Ids = tuple[int, ...]

# Shares of the saliency that a suggested cut may cost.
LIMITS = (0.01, 0.05, 0.1, 0.25)
# Sums of shares miss a limit that they are equal to by their rounding.
_ROUNDING = 1e-12
# Where a gap is looked for: outliers at either end are no place to cut.
_GAP_FROM, _GAP_TO = 0.1, 0.9
# Of a profile: no more steps than a line of a terminal has, and no taller than blocks can show.
_STEPS, _TALLEST = 64, 8
# With as many digits a float64 is spelled exactly: no shorter ratio is left to be found.
_MAX_DIGITS = 17


@dataclass(frozen=True, slots=True)
class Gap:
    """The widest step between neighbours in the order of saliency.

    removed: how many experts lie below it; factor: the first above it over the last below.
    """

    removed: int
    factor: float


@dataclass(frozen=True, slots=True)
class ShownLayerReport:
    """One layer of a score file.

    layer: its number, or as the file names it; is_mtp: None where no model says it. min, median,
    max: over finite scores, None without any. never_routed: ids that no token reached;
    super_experts, preserved: ids with extreme activations, and those that the file marks with
    +inf. removable: share of the saliency (as text) → experts that can go at no more than that
    cost; empty where shares mean nothing. profile: as `profile` gives it.
    """

    layer: int | str
    is_mtp: bool | None
    num_experts: int
    min: float | None
    median: float | None
    max: float | None
    never_routed: tuple[int, ...]
    super_experts: tuple[int, ...]
    preserved: tuple[int, ...]
    removable: dict[str, int]
    gap: Gap | None
    profile: str = ""


@dataclass(frozen=True, slots=True)
class SuggestedCut:
    """The most experts that can go, alike from every layer, at a mean cost of at most `limit`.

    limit: share of a layer's saliency. ratio: what `--ratio` takes, 0 where nothing can go;
    removed, kept: experts of the largest layers. mean_lost, worst_lost: share that goes, over the
    layers and in the layer `worst_layer`.
    """

    limit: float
    ratio: float
    removed: int
    kept: int
    mean_lost: float
    worst_lost: float
    worst_layer: int | str


@dataclass(frozen=True, slots=True)
class ScoreAnalysis:
    """One metric of a score file, ready to be shown.

    values: layer → float64 [experts]; never_routed, super_experts: layer → ids, of layers that
    have any; super_experts is None where the file does not hold their metric for every layer.
    mtp: MTP layers, None without a model; facts: what the model's router needs, None without one.
    """

    metric: str
    values: Mapping[Layer, Values]
    never_routed: Mapping[Layer, Ids]
    super_experts: Mapping[Layer, Ids] | None
    mtp: frozenset[Layer] | None = None
    facts: RoutingFacts | None = None

    def layers(self) -> tuple[ShownLayerReport, ...]:
        """A report for each layer, in order."""
        return tuple(self._layer(layer, values) for layer, values in self.values.items())

    def cuts(self) -> tuple[SuggestedCut, ...]:
        """What could go from all layers alike."""
        return suggested_cuts(self.values, self.facts)

    def _layer(self, layer: Layer, values: Values) -> ShownLayerReport:
        finite = values[np.isfinite(values)]
        with np.errstate(over="ignore"):
            quantiles = np.quantile(finite, (0, 0.5, 1)).tolist() if finite.size else [None] * 3
        extreme = self.super_experts.get(layer, ()) if self.super_experts is not None else ()
        return ShownLayerReport(
            layer=layer,
            is_mtp=None if self.mtp is None else layer in self.mtp,
            num_experts=len(values),
            min=quantiles[0],
            median=quantiles[1],
            max=quantiles[2],
            never_routed=self.never_routed.get(layer, ()),
            super_experts=extreme,
            preserved=tuple(np.flatnonzero(np.isposinf(values)).tolist()),
            removable=_removable(values, _groups_of(len(values), self.facts)),
            gap=widest_gap(values),
            profile=profile(values),
        )


def view_alone(scores: Scores, metric: str | None) -> ScoreAnalysis:
    """A file without a model: every layer that it has, the rows of a table in order.

    metric: None for the one that `plan` would take. Layers of a table that names none are called
    `row 0`, `row 1`, …. Raises ScoreError for a metric that the file lacks, for NaN or -inf that
    mean nothing, and for activation norms that are not finite.
    """
    scores = with_row_names(scores)
    name, table = scores.select(metric)
    counted = scores.frequencies()
    never_routed = {
        layer: check_values(layer, values, counted.get(layer), scores.origin)
        for layer, values in table.items()
    }
    return ScoreAnalysis(name, table, never_routed, _super_experts(scores))


def with_row_names(scores: Scores) -> Scores:
    """The scores with the rows of a table that names no layers called `row 0`, `row 1`, …."""
    if not scores.rows:
        return scores
    rows = len(next(iter(scores.rows.values())))
    return scores.assign_rows([f"row {row}" for row in range(rows)])


def suggested_cuts(
    values: Mapping[int | str, Values], facts: RoutingFacts | None = None
) -> tuple[SuggestedCut, ...]:
    """The largest cut within each of LIMITS, ascending, where every layer loses the same part.

    values: layer → float64 [experts], as `lost_shares` takes them; facts: what the model's
    router needs, None where no model is known. The cost of a cut is the mean over the layers of
    their lost shares. Layers whose shares mean nothing are left out; without any other layer
    there is no cut.
    """
    n_group = facts.n_group if facts is not None else 1
    lost = {n: lost_shares(row, _groups_of(len(row), facts)) for n, row in values.items()}
    shares = {layer: row for layer, row in lost.items() if row is not None}
    if not shares:
        return ()
    # Counted per group of the router, all of which lose the same number.
    size = max(len(values[layer]) for layer in shares) // n_group
    fewest = 1 if facts is None else max(1, fewest_kept(facts) // n_group)
    steps = np.arange(max(0, size - fewest) + 1)
    # Smaller layers lose the same part of their experts.
    table = np.stack([row[steps * (len(row) - 1) // size] for row in shares.values()])
    cuts = []
    for limit in LIMITS:
        removed = _most_within(table.mean(axis=0), limit)
        worst = int(np.argmax(table[:, removed]))
        cuts.append(
            SuggestedCut(
                limit=limit,
                ratio=ratio_of(removed * n_group, size * n_group),
                removed=removed * n_group,
                kept=(size - removed) * n_group,
                mean_lost=float(table[:, removed].mean()),
                worst_lost=float(table[worst, removed]),
                worst_layer=list(shares)[worst],
            )
        )
    return tuple(cuts)


def lost_shares(values: Values, n_group: int = 1) -> Values | None:
    """Entry m: the share of the saliency that goes with the m lowest experts of every group.

    values: float64 [experts], as score files have them: NaN, never routed, carries nothing and
    goes first; +inf marks an expert that stays and is left out. Gives float64
    [experts / n_group + 1], ascending from 0 to 1; None where shares mean nothing: a negative
    saliency, or none above 0.
    """
    known = np.where(np.isfinite(values), values, 0.0)
    top = known.max(initial=0.0)
    if top <= 0 or known.min() < 0:
        return None
    groups = np.where(np.isnan(values), -np.inf, values).reshape(n_group, -1)
    order = np.argsort(groups, axis=1, kind="stable")
    # Divided by the largest first, so that no sum can overflow.
    ascending = np.take_along_axis((known / top).reshape(n_group, -1), order, axis=1)
    lost = np.concatenate([[0.0], np.cumsum(ascending.sum(axis=0))])
    return np.asarray(lost / lost[-1])


def profile(values: Values) -> str:
    """The saliencies of a layer from the highest down, as one digit for each of at most 64 steps.

    values: float64 [experts], as in `lost_shares`; +inf counts as the highest, NaN as 0. A digit is
    the root of the mean of its step over the highest finite saliency, in eighths: most of a layer's
    saliencies are far below the highest. "" where none is above 0.
    """
    top = values[np.isfinite(values)].max(initial=0.0)
    if top <= 0:
        return ""
    known = np.clip(np.nan_to_num(values / top, nan=0.0, posinf=1.0), 0.0, 1.0)
    steps = np.array_split(np.sort(known)[::-1], min(_STEPS, len(known)))
    return "".join(str(round(_TALLEST * math.sqrt(step.mean()))) for step in steps)


def ratio_of(removed: int, experts: int) -> float:
    """The shortest decimal that `--ratio` turns back into so many experts removed."""
    for digits in range(2, _MAX_DIGITS):
        nearest = math.floor(removed / experts * 10.0**digits)
        # One more unit or two: the floor in floats may remove one less (0.29 of 100 removes 28).
        for ratio in (round((nearest + more) / 10.0**digits, digits) for more in range(3)):
            if removed_count(ratio, experts) == removed:
                return ratio
    return removed / experts


def widest_gap(values: Values) -> Gap | None:
    """The widest gap of a layer, by factor, where a tenth to nine tenths of its experts go.

    values: float64 [experts], as in `lost_shares`. None where a factor means nothing: a negative
    saliency, too few experts, all of them alike.
    """
    known = np.sort(np.where(np.isnan(values), 0.0, values)[~np.isposinf(values)])
    count = len(known)
    begin, end = max(1, math.ceil(_GAP_FROM * count)), int(_GAP_TO * count)
    if end < begin or known[0] < 0:
        return None
    below, above = known[begin - 1 : end], known[begin : end + 1]
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        factors = np.where(above == below, 1.0, above / below)
    widest = int(np.argmax(factors))
    return Gap(begin + widest, float(factors[widest])) if factors[widest] > 1 else None


def main_layers(scores: Scores) -> list[Layer]:
    """The layers of a file without a model that it does not call MTP layers."""
    return [layer for layer in scores.layers if not str(layer).startswith("mtp.")]


def _super_experts(scores: Scores) -> dict[Layer, Ids] | None:
    """Found over all main layers together; None where one of them lacks the metric."""
    layers = main_layers(scores)
    found = [scores.layers[layer].get(SUPER_METRIC) for layer in layers]
    numbered = {n: row for n, row in enumerate(found) if row is not None}
    if len(numbered) < len(layers):
        return None
    try:
        return {layers[n]: ids for n, ids in super_experts(numbered).items()}
    except ScoreError as error:
        place = layers[int(error.where.split()[-1])]
        raise ScoreError(scores.origin, f"layer {place}: {error.problem}", error.remedy) from error


def _removable(values: Values, n_group: int) -> dict[str, int]:
    lost = lost_shares(values, n_group)
    if lost is None:
        return {}
    return {str(limit): _most_within(lost, limit) * n_group for limit in LIMITS}


def _most_within(lost: Values, limit: float) -> int:
    """The largest m with lost[m] at most `limit`."""
    return int(np.flatnonzero(lost <= limit * (1 + _ROUNDING))[-1])


def _groups_of(experts: int, facts: RoutingFacts | None) -> int:
    """How many groups a layer of so many experts is cut in: the router's, where they divide it."""
    return facts.n_group if facts is not None and experts % facts.n_group == 0 else 1
