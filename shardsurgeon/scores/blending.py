"""One saliency from several parts of the data, such as code and chat, each measured by itself.

A part weighs as if each of its tokens had been seen that many times: its sums and counts are
multiplied, and means are taken of what they add up to. So equal weights give what one run over all
parts gives, whatever their sizes, and a part of weight 2 counts like two copies of it.

How well a choice serves a part is its retained share: in each layer, the part's own saliency of
the experts that stay over that of all, then the mean over the layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from shardsurgeon.checkpoint.layer_names import Layer
from shardsurgeon.errors import ScoreError
from shardsurgeon.scores.observed import COUNT, MEANS, weighted_sum
from shardsurgeon.scores.table import Scores, Vector

# The search for weights, whose logarithms are to base 2: every part is tilted by up to six octaves,
# four times in each; so many of the best begin a climb, beside equal weights.
_PER_OCTAVE, _TILTS, _STARTS = 4, 24, 2
# A climb tries steps from the nearest on, each an eighth longer than the one before; how far apart
# weights may get, and after how many trials it ends.
_NEAREST, _STEPS, _LONGER, _FARTHEST, _TRIALS = 1 / 64, 48, 9 / 8, 16.0, 1500


def in_proportion(weights: Sequence[float]) -> tuple[float, ...]:
    """The same weights, 1 on average over those above 0; equal ones are exactly 1.

    weights: finite, 0 or more, not all 0.
    """
    largest = max(weights)
    relative = [weight / largest for weight in weights]
    average = sum(relative) / sum(weight > 0 for weight in relative)
    return tuple(weight / average for weight in relative)


class Retained:
    """What the parts retain when experts are chosen by a blend of them.

    parts: of one model, each `is_observed`; metric: a mean of REAP's observer or one of its sums;
    kept: layer → how many experts stay, the best of the blend, of equal ones the first. Raises
    ScoreError where a share says nothing: a saliency below 0, or none above 0 in any layer.
    """

    def __init__(self, parts: Sequence[Scores], metric: str, kept: Mapping[Layer, int]) -> None:
        self._num_parts = len(parts)
        self._layers = [_BlendedLayer(parts, layer, metric, kept[layer]) for layer in kept]
        for number, part in enumerate(parts):
            for name, layer in zip(kept, self._layers, strict=True):
                if (lowest := layer.own[number].min()) < 0:
                    problem = f"layer {name} has a {metric} of {lowest:g}, below 0, and no share"
                    raise ScoreError(part.origin, problem, "choose another metric with --metric")
            if not any(layer.own[number].any() for layer in self._layers):
                problem = f"every {metric} is 0: it has no saliency to retain"
                raise ScoreError(part.origin, problem, "leave it out, or calibrate it again")

    def shares(self, weights: Sequence[float]) -> tuple[float, ...]:
        """Part by part, Σ_e∈kept s_e / Σ_e s_e of its own saliency s, the mean over the layers.

        A layer in which all of a part's saliencies are 0 is left out for this part.
        """
        found: list[list[float]] = [[] for _ in range(self._num_parts)]
        for layer in self._layers:
            stay = layer.survivors(weights)
            for own, each in zip(layer.own, found, strict=True):
                if (total := own.sum()) > 0:
                    each.append(float(own[stay].sum() / total))
        return tuple(sum(each) / len(each) for each in found)

    def max_min(self) -> tuple[float, ...]:
        """Weights, 1 on average, under which the part that retains least retains most.

        max_w min_p share_p(w), by climbing along one weight at a time over the logarithms of the
        weights: from equal weights, and from the best of every part tilted against the others; of
        all steps along a weight the best is taken, as long as one helps. Of weights whose worst
        part retains the same, those are better whose second worst retains more. A share is a step
        function of the weights, with many levels, so the result is a good point and no proven
        maximum; never is its worst part worse off than under equal weights, where the search
        begins.
        """
        equal = np.zeros(self._num_parts)
        tilts = (number / _PER_OCTAVE for number in range(-_TILTS, _TILTS + 1) if number)
        tilted = [_moved(equal, part, by) for by in tilts for part in range(self._num_parts)]
        tilted.sort(key=self._worst_first, reverse=True)
        found = [self._climbed(start) for start in (equal, *tilted[:_STARTS])]
        return _weights(max(found, key=self._worst_first))

    def _climbed(self, start: Vector) -> Vector:
        """The best logarithms of weights that steps from `start` lead to."""
        logs, best, trials, improved = start, self._worst_first(start), 0, True
        ahead = [_NEAREST * _LONGER**number for number in range(_STEPS)]
        while improved and trials < _TRIALS:
            improved = False
            for part in range(self._num_parts):
                tried = [_moved(logs, part, sign * step) for step in ahead for sign in (1, -1)]
                trials += len(tried)
                found = max(tried, key=self._worst_first)
                if (shares := self._worst_first(found)) > best:
                    logs, best, improved = found, shares, True
        return logs

    def _worst_first(self, logs: Vector) -> list[float]:
        return sorted(self.shares(_weights(logs)))


class _BlendedLayer:
    """A layer's sums of every part, and the part's own saliencies."""

    def __init__(self, parts: Sequence[Scores], layer: Layer, metric: str, kept: int) -> None:
        tables = [part.layers[layer] for part in parts]
        self._kept = kept
        self._totals = [table[MEANS.get(metric, metric)] for table in tables]
        self._counts = [table[COUNT] for table in tables] if metric in MEANS else None
        alone = np.eye(len(parts)).tolist()
        self.own = [self._saliency(weights) for weights in alone]

    def survivors(self, weights: Sequence[float]) -> NDArray[np.intp]:
        """The experts that stay, the best first."""
        return np.argsort(-self._saliency(weights), kind="stable")[: self._kept]

    def _saliency(self, weights: Sequence[float]) -> Vector:
        total = weighted_sum(self._totals, weights)
        if self._counts is None:
            return total
        counts = weighted_sum(self._counts, weights)
        saliency: Vector = total / np.where(counts > 0, counts, 1)
        return saliency


def _moved(logs: Vector, part: int, by: float) -> Vector:
    moved = logs.copy()
    moved[part] += by
    centred: Vector = np.clip(moved - moved.mean(), -_FARTHEST, _FARTHEST)
    return centred


def _weights(logs: Vector) -> tuple[float, ...]:
    return in_proportion(np.exp2(logs).tolist())
