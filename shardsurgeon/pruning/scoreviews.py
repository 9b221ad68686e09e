"""A score file looked at, layer by layer, with a model beside it or without. Pure.

Between the table that `scores` reads (or `decision` fits to a model) and the report of `scores
show`: ranges, never-routed and super experts, and where the layers could be cut.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from shardsurgeon.checkpoint.layernames import Layer
from shardsurgeon.errors import ScoreError
from shardsurgeon.operations.reports import CutReport, GapReport, ShownLayerReport
from shardsurgeon.pruning.counts import RoutingFacts
from shardsurgeon.pruning.cuts import LIMITS, groups_of, lost_shares, suggested_cuts, widest_gap
from shardsurgeon.pruning.selection import super_experts
from shardsurgeon.scores.scores import Scores, check_values

SUPER_METRIC = "max_activations"

Ids = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class View:
    """One metric of a score file, ready to be shown.

    values: layer → float64 [experts]; never_routed, super_experts: layer → ids, of layers that
    have any; the latter None where the file cannot tell. mtp: MTP layers, None without a model;
    facts: what the model's router needs, None without one.
    """

    metric: str
    values: Mapping[Layer, NDArray[np.float64]]
    never_routed: Mapping[Layer, Ids]
    super_experts: Mapping[Layer, Ids] | None
    mtp: frozenset[Layer] | None = None
    facts: RoutingFacts | None = None

    def layers(self) -> tuple[ShownLayerReport, ...]:
        """A report for each layer, in order."""
        return tuple(self._layer(layer, values) for layer, values in self.values.items())

    def cuts(self) -> tuple[CutReport, ...]:
        """What could go from all layers alike."""
        return tuple(CutReport(**asdict(cut)) for cut in suggested_cuts(self.values, self.facts))

    def _layer(self, layer: Layer, values: NDArray[np.float64]) -> ShownLayerReport:
        finite = values[np.isfinite(values)]
        with np.errstate(over="ignore"):
            quantiles = np.quantile(finite, (0, 0.5, 1)).tolist() if finite.size else [None] * 3
        gap = widest_gap(values)
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
            removable=_removable(values, groups_of(len(values), self.facts)),
            gap=None if gap is None else GapReport(gap.removed, gap.factor),
        )


def view_alone(scores: Scores, metric: str | None) -> View:
    """A file without a model: every layer that it has, the rows of a table in order.

    metric: None for the one that `plan` would take. Raises ScoreError for a metric that it has
    not, and for NaN or -inf that mean nothing.
    """
    scores = named_rows(scores)
    name, table = scores.select(metric)
    counted = scores.frequencies()
    unrouted = {
        layer: check_values(layer, values, counted.get(layer), scores.origin)
        for layer, values in table.items()
    }
    return View(name, table, unrouted, _super_experts(scores))


def named_rows(scores: Scores) -> Scores:
    """Scores whose rows are called `row 0`, `row 1`, … where they name no layers."""
    if not scores.rows:
        return scores
    rows = len(next(iter(scores.rows.values())))
    layers: dict[Layer, Mapping[str, NDArray[np.float64]]] = {
        f"row {row}": {metric: table[row] for metric, table in scores.rows.items()}
        for row in range(rows)
    }
    return Scores(scores.origin, layers, {}, scores.facts)


def _super_experts(scores: Scores) -> dict[Layer, Ids] | None:
    """Told from all main layers together; None where one says nothing of its activations."""
    layers = [layer for layer in scores.layers if not str(layer).startswith("mtp.")]
    found = [scores.layers[layer].get(SUPER_METRIC) for layer in layers]
    numbered = {n: row for n, row in enumerate(found) if row is not None}
    if len(numbered) < len(layers):
        return None
    try:
        return {layers[n]: ids for n, ids in super_experts(numbered).items()}
    except ScoreError as error:
        place = layers[int(error.where.split()[-1])]
        raise ScoreError(scores.origin, f"layer {place}: {error.problem}", error.remedy) from error


def _removable(values: NDArray[np.float64], n_group: int) -> dict[str, int]:
    lost = lost_shares(values, n_group)
    if lost is None:
        return {}
    return {str(limit): _most(lost <= limit * (1 + 1e-12)) * n_group for limit in LIMITS}


def _most(allowed: Iterable[np.bool_]) -> int:
    return int(np.flatnonzero(np.asarray(allowed))[-1])
