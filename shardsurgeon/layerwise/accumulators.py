"""The sums of a calibration for the experts of one layer, and the metrics computed from them.

The engine fills one of these per layer; the score file keeps it, so that a calibration can be
extended or merged with another. It holds sums over tokens only, so that the parts of a calibration
add up to the whole; means are taken at the end. numpy only.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from shardsurgeon.errors import ScoreError

Vector: TypeAlias = NDArray[np.float64]
Counts: TypeAlias = NDArray[np.int64]

TOTAL_TOKENS = "total_tokens"
# Gate weights may be negative.
_SIGNED = ("weight_sum", "weighted_norm_sum")
# Not in files of earlier versions.
_LATER = ("norm_square_sum",)
# Not an array, and kept beside them.
_PARTS = "parts"
_DAMAGED = "the file is damaged: fetch it again or calibrate anew"


@dataclass(slots=True)
class Accumulators:
    """Sums over the tokens of a calibration, for the E routed experts of one layer.

    X_j are the tokens, padding left out, for which the router chose expert j; g_j(x) is the gate
    weight by which the model multiplies the expert's output, f_j(x) the output before that:

    total_tokens: tokens that went through the layer, each counted once.
    counts: int64 [E], |X_j|.
    weight_sum: float64 [E], Σ g_j(x).
    norm_sum: float64 [E], Σ ‖f_j(x)‖₂.
    weighted_norm_sum: float64 [E], Σ g_j(x)·‖f_j(x)‖₂.
    max_activation: float64 [E], the largest component of any f_j(x), or 0 where all are
    negative, as in REAP's observer.
    norm_square_sum: float64 [E], Σ ‖f_j(x)‖₂²; None in a calibration from before it was kept, and
    in a sum that such a one is part of.
    parts: where the samples are a mix of datasets, the identity of each → its own sums, which have
    no parts; None where they are not known apart.
    """

    total_tokens: int
    counts: Counts
    weight_sum: Vector
    norm_sum: Vector
    weighted_norm_sum: Vector
    max_activation: Vector
    norm_square_sum: Vector | None = None
    parts: dict[str, Accumulators] | None = field(default=None, kw_only=True)

    @classmethod
    def zeros(cls, num_experts: int) -> Accumulators:
        """Accumulators of a layer before its first token."""
        sums = [np.zeros(num_experts) for _ in range(5)]
        return cls(0, np.zeros(num_experts, np.int64), *sums, parts={})

    @classmethod
    def from_arrays(
        cls, arrays: Mapping[str, NDArray[np.generic]], where: str, layer: int | str
    ) -> Accumulators:
        """The accumulators whose `arrays` these are, as copies of any numeric dtype.

        All are needed but `norm_square_sum`, which older files lack. where, layer: as messages
        name them. Raises ScoreError for a missing name, vectors of different lengths, and numbers
        that cannot be sums of a calibration.
        """
        place = f"layer {layer}, "
        names = [name for name in _NAMES if name in arrays or name not in _LATER]
        missing = [name for name in names if name not in arrays]
        if missing:
            raise ScoreError(where, f"{place}has no accumulator {missing[0]!r}", _DAMAGED)
        num_experts = np.asarray(arrays["counts"]).size
        if num_experts == 0:
            raise ScoreError(where, f"{place}counts has shape [0]", _DAMAGED)
        shapes = dict.fromkeys(arrays, (num_experts,)) | {TOTAL_TOKENS: ()}
        found: dict[str, Any] = {}
        for name in names:
            vector = np.array(arrays[name], np.float64)
            if vector.shape != shapes[name]:
                problem = f"{place}{name} has shape {list(vector.shape)}, counts has "
                raise ScoreError(where, f"{problem}{num_experts:,} experts", _DAMAGED)
            _check_numbers(vector, f"{place}{name}", where, name in _SIGNED)
            found[name] = vector
        tokens, counts = found.pop(TOTAL_TOKENS).item(), found.pop("counts")
        if counts.max() > tokens or tokens % 1 or (counts % 1).any():
            problem = f"{place}an expert counts {counts.max():,} of {tokens:,} tokens"
            raise ScoreError(where, problem, _DAMAGED)
        return cls(int(tokens), counts.astype(np.int64), **found)

    @property
    def num_experts(self) -> int:
        """How many routed experts the layer has."""
        return len(self.counts)

    def of_one(self, part: str) -> Accumulators:
        """The same sums, all of them of this part."""
        own = replace(deepcopy(self), parts=None)
        return replace(deepcopy(own), parts={part: own})

    def add(self, other: Accumulators) -> None:
        """Add the sums of another part of the calibration, for the same number of experts.

        What one of the two lacks is lacking afterwards: a sum over some of the tokens is none.
        """
        self.total_tokens += other.total_tokens
        self.counts += other.counts
        self.weight_sum += other.weight_sum
        self.norm_sum += other.norm_sum
        self.weighted_norm_sum += other.weighted_norm_sum
        np.maximum(self.max_activation, other.max_activation, out=self.max_activation)
        if self.norm_square_sum is None or other.norm_square_sum is None:
            self.norm_square_sum = None
        else:
            self.norm_square_sum += other.norm_square_sum
        self._add_parts(other)

    def _add_parts(self, other: Accumulators) -> None:
        if self.parts is None or other.parts is None:
            self.parts = None
            return
        for part, sums in other.parts.items():
            if part in self.parts:
                self.parts[part].add(sums)
            else:
                self.parts[part] = deepcopy(sums)

    def arrays(self) -> dict[str, NDArray[np.generic]]:
        """Name → array, as files keep them: int64 or float64 [E]; total_tokens is int64 []."""
        held = {name: getattr(self, name) for name in _NAMES}
        named: dict[str, NDArray[np.generic]] = {
            name: np.asarray(sums) for name, sums in held.items() if sums is not None
        }
        named[TOTAL_TOKENS] = np.array(self.total_tokens, np.int64)
        return named

    def metrics(self) -> dict[str, Vector]:
        """Metric → float64 [E], by the names and formulas of REAP's observer (arXiv 2510.13999).

        msan is not of the observer: the mean squared activation norm, Σ ‖f_j(x)‖₂² / |X_j| (Liu et
        al. 2026, arXiv 2606.15716), left out where its sum was not kept.
        reap: Σ g_j(x)·‖f_j(x)‖₂ / |X_j|; ean_mean: Σ ‖f_j(x)‖₂ / |X_j|; ean_sum, weighted_ean_sum
        and weighted_expert_frequency_sum: Σ ‖f_j(x)‖₂, Σ g_j(x)·‖f_j(x)‖₂ and Σ g_j(x);
        expert_frequency: |X_j|. A mean over no token is 0, the lowest value.
        """
        found = {
            "reap": self._mean(self.weighted_norm_sum),
            "ean_mean": self._mean(self.norm_sum),
            "ean_sum": self.norm_sum.copy(),
            "weighted_ean_sum": self.weighted_norm_sum.copy(),
            "weighted_expert_frequency_sum": self.weight_sum.copy(),
            "expert_frequency": self.counts.astype(np.float64),
            "max_activations": self.max_activation.copy(),
        }
        if self.norm_square_sum is not None:
            found["msan"] = self._mean(self.norm_square_sum)
        return found

    def _mean(self, sums: Vector) -> Vector:
        return sums / np.maximum(self.counts, 1)


_NAMES = tuple(each.name for each in fields(Accumulators) if each.name != _PARTS)


def _check_numbers(vector: Vector, place: str, where: str, signed: bool) -> None:
    """Raise ScoreError unless every number is finite and, where not `signed`, not negative."""
    wrong = ~np.isfinite(vector) | ((vector < 0) & (not signed))
    if wrong.any():
        expert = int(np.argmax(wrong))
        problem = f"{place} holds {vector.flat[expert]} at expert {expert}"
        raise ScoreError(where, problem, "calibrate again: the activations overflowed")
