"""Scores as a table: layer -> metric -> float64 [experts], whatever file they came from.

The table knows neither file formats nor the model: which layers there are, and how many experts
they have, is compared where scores and model meet.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from shardsurgeon.checkpoint.layer_names import Layer
from shardsurgeon.errors import ScoreError
from shardsurgeon.reports import Titled
from shardsurgeon.units import counted

Vector: TypeAlias = npt.NDArray[np.float64]
Fact: TypeAlias = str | int | float | bool

# The metric of a table that does not name any.
UNNAMED = "saliency"
# The metric to prune by where none is asked for: REAP's own, that of a table without names,
# llama.cpp's.
_PREFERRED = ("reap", UNNAMED, "sal")
# What a paper calls a metric that files have under an older name: MAN, the mean activation norm,
# is the `ean_mean` of REAP's observer (Liu et al. 2026, arXiv 2606.15716).
_ALSO_CALLED = {"man": "ean_mean"}
# How often an expert was routed to: reap-mlx's word, llama.cpp's and REAP's, which goes before.
_FREQUENCIES = ("active_token_count", "cnt", "expert_frequency")

# Where a file keeps what its scores were added up from, of all samples and of each part of a mix,
# and how. None of it is a score.
ACCUMULATORS = "accumulators"
PARTS = "parts"
CALIBRATION = "calibration"


@dataclass(frozen=True, slots=True)
class _Range:
    """The finite scores of one layer, or of one row, for a notebook."""

    layer: Layer
    experts: int
    lowest: float | None
    median: float | None
    highest: float | None


@dataclass(frozen=True, repr=False)
class Scores(Titled):
    """What a score file says.

    origin: the file, as messages name it.
    layers: layer number, or `mtp.<j>` for an MTP layer named so, → metric → float64 [experts],
    index = expert id, read-only. A table that names no metric has the one metric `saliency`.
    rows: metric → float64 [MoE layers, experts], of a file that names no layers; then layers
    is empty until `assign_rows`.
    facts: small values found beside the scores (total_tokens, dataset, seed, …).
    tokens: layer → tokens that went through it, of the layers for which the file says it.
    ranking: `best-first` or `worst-first` where the saliencies are places in a ranking, else "".

    >>> scores = shardsurgeon.read_scores("fixtures/kimi_k25/scores.pt")
    >>> metric, layers = scores.select()
    >>> metric, sorted(layers), layers[1].shape
    ('reap', [1, 2, 3], (32,))
    """

    origin: str
    layers: Mapping[Layer, Mapping[str, Vector]]
    rows: Mapping[str, Vector] = field(default_factory=dict)
    facts: Mapping[str, Fact] = field(default_factory=dict)
    tokens: Mapping[Layer, int] = field(default_factory=dict)
    ranking: str = ""

    @property
    def title(self) -> str:
        """`scores.pt: ean_mean, reap of 384 experts in 60 layers`."""
        ranges = list(self._ranges())
        experts = max((each.experts for each in ranges), default=0)
        metrics = ", ".join(self.metrics or self.rows)
        return f"{self.origin}: {metrics} of {experts} experts in {counted(len(ranges), 'layer')}"

    def shown(self) -> Iterable[tuple[str, object]]:
        """Its metrics, and the range of one of them in each layer, for a notebook."""
        yield "metrics", self.metrics or tuple(self.rows)
        yield "ranking", self.ranking or None
        yield "facts", self.facts
        yield f"{self._ranged} by layer", tuple(self._ranges())

    @property
    def _ranged(self) -> str:
        """The metric whose ranges are shown: the one to prune by, where the file has it."""
        there = self.metrics or tuple(self.rows)
        return next((name for name in _PREFERRED if name in there), there[0])

    def _ranges(self) -> Iterator[_Range]:
        named: Iterable[tuple[Layer, Vector | None]]
        if self.rows:
            named = ((f"row {n}", row) for n, row in enumerate(self.rows[self._ranged]))
        else:
            named = ((layer, of.get(self._ranged)) for layer, of in self.layers.items())
        for layer, row in named:
            values = np.empty(0) if row is None else row[np.isfinite(row)]
            ends = np.quantile(values, (0, 0.5, 1)).tolist() if values.size else [None] * 3
            yield _Range(layer, 0 if row is None else len(row), *ends)

    @property
    def metrics(self) -> tuple[str, ...]:
        """Every metric that some layer has, sorted."""
        return tuple(sorted({name for layer in self.layers.values() for name in layer}))

    @property
    def choices(self) -> tuple[str, ...]:
        """Every name by which `select` finds a metric, sorted."""
        also = {name for name, metric in _ALSO_CALLED.items() if metric in self.metrics}
        return tuple(sorted(also.union(self.metrics)))

    def assign_rows(self, moe_layers: Sequence[Layer]) -> Scores:
        """Give the rows of a 2-D table to the model's MoE layers, in order.

        Scores that name their layers come back as they are. Raises ScoreError where there are
        not as many rows as layers.
        """
        if not self.rows:
            return self
        count = len(next(iter(self.rows.values())))
        if count != len(moe_layers):
            raise ScoreError(
                self.origin,
                f"its table has {count} rows, the model has {len(moe_layers)} MoE layers",
                "name the layers ({layer: scores}) or use scores made for this model",
            )
        layers: dict[Layer, Mapping[str, Vector]] = {
            layer: {metric: table[row] for metric, table in self.rows.items()}
            for row, layer in enumerate(moe_layers)
        }
        return replace(self, layers=layers, rows={})

    def select(self, metric: str | None = None) -> tuple[str, dict[Layer, Vector]]:
        """One metric of every layer, and its name.

        metric: its name, which the file must have; None means the default: `reap`, else the
        saliency of a table without names, else the only metric the file has. To ask for `reap`
        in a file that names no metric is to ask for the default; `man` is another name of
        `ean_mean`, by which the result is called. Raises ScoreError, listing the metrics there
        are.
        """
        if self.rows:
            raise ScoreError(
                self.origin, "its 2-D table does not say which layer a row is", "give the model"
            )
        if metric == _PREFERRED[0] and self.metrics == (UNNAMED,):
            metric = None
        if metric in _ALSO_CALLED and metric not in self.metrics:
            metric = _ALSO_CALLED[metric]
        name = self._default_metric() if metric is None else metric
        lacking = [layer for layer, metrics in self.layers.items() if name not in metrics]
        if lacking:
            shown = "" if len(lacking) == len(self.layers) else f" for layer {lacking[0]}"
            raise ScoreError(
                self.origin,
                f"has no metric {name!r}{shown}",
                f"choose with --metric: {', '.join(self.metrics)}",
            )
        return name, {layer: metrics[name] for layer, metrics in self.layers.items()}

    def frequencies(self) -> dict[Layer, Vector]:
        """How often each expert was routed to, of the layers for which the file says it."""
        return {
            layer: metrics[name]
            for layer, metrics in self.layers.items()
            for name in _FREQUENCIES
            if name in metrics
        }

    def _default_metric(self) -> str:
        there = self.metrics
        for name in _PREFERRED:
            if name in there:
                return name
        return there[0] if len(there) == 1 else _PREFERRED[0]
