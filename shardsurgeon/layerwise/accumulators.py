"""What a calibration adds up for the experts of one layer, and the metrics that follow from it.

Between the engine, which fills one of these per layer, and the score file, which keeps it so that
a calibration can be extended or merged with another. Sums over tokens only, so that two parts of
a calibration add up to the whole; every mean is taken at the end. numpy only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from shardsurgeon.errors import ScoreError

Vector: TypeAlias = NDArray[np.float64]
Counts: TypeAlias = NDArray[np.int64]

TOTAL_TOKENS = "total_tokens"
# A router may weigh an expert's output by less than nothing.
_SIGNED = ("weight_sum", "weighted_norm_sum")
_DAMAGED = "the file is damaged: fetch it again or calibrate anew"


@dataclass(slots=True)
class Accumulators:
    """Sums over the tokens of a calibration, for the E routed experts of one layer.

    With X_j the tokens whose router chose expert j, g_j(x) the weight by which the model
    multiplies the expert's output, f_j(x) that output before it is multiplied, padding left out:

    total_tokens: tokens that passed the layer, each counted once.
    counts: int64 [E], |X_j|.
    weight_sum: float64 [E], Σ g_j(x).
    norm_sum: float64 [E], Σ ‖f_j(x)‖₂.
    weighted_norm_sum: float64 [E], Σ g_j(x)·‖f_j(x)‖₂.
    max_activation: float64 [E], the largest component of any f_j(x), signed and never below 0,
    as REAP's observer has it.
    """

    total_tokens: int
    counts: Counts
    weight_sum: Vector
    norm_sum: Vector
    weighted_norm_sum: Vector
    max_activation: Vector

    @classmethod
    def zeros(cls, num_experts: int) -> Accumulators:
        """Accumulators of a layer that no token has passed."""
        sums = [np.zeros(num_experts) for _ in range(4)]
        return cls(0, np.zeros(num_experts, np.int64), *sums)

    @classmethod
    def from_arrays(
        cls, arrays: Mapping[str, NDArray[np.generic]], where: str, layer: int | str
    ) -> Accumulators:
        """What `arrays` gave, checked. Numbers of any type are taken that fit exactly.

        where, layer: as messages name them. Raises ScoreError for a name that is missing,
        vectors of different lengths, and numbers that no calibration can have added up.
        """
        place = f"layer {layer}, "
        missing = [field.name for field in fields(cls) if field.name not in arrays]
        if missing:
            raise ScoreError(where, f"{place}has no accumulator {missing[0]!r}", _DAMAGED)
        num_experts = np.asarray(arrays["counts"]).size
        if num_experts == 0:
            raise ScoreError(where, f"{place}counts has shape [0]", _DAMAGED)
        shapes = dict.fromkeys(arrays, (num_experts,)) | {TOTAL_TOKENS: ()}
        found = {}
        for field in fields(cls):
            vector = np.array(arrays[field.name], np.float64)
            if vector.shape != shapes[field.name]:
                problem = f"{place}{field.name} has shape {list(vector.shape)}, counts has "
                raise ScoreError(where, f"{problem}{num_experts:,} experts", _DAMAGED)
            _check_numbers(vector, f"{place}{field.name}", where, field.name in _SIGNED)
            found[field.name] = vector
        tokens, counts = found.pop(TOTAL_TOKENS).item(), found.pop("counts")
        if counts.max() > tokens or tokens % 1 or (counts % 1).any():
            problem = f"{place}an expert counts {counts.max():,} of {tokens:,} tokens"
            raise ScoreError(where, problem, _DAMAGED)
        return cls(int(tokens), counts.astype(np.int64), **found)

    @property
    def num_experts(self) -> int:
        """E."""
        return len(self.counts)

    def add(self, other: Accumulators) -> None:
        """Take in what another part of the calibration added up, for as many experts."""
        self.total_tokens += other.total_tokens
        self.counts += other.counts
        self.weight_sum += other.weight_sum
        self.norm_sum += other.norm_sum
        self.weighted_norm_sum += other.weighted_norm_sum
        np.maximum(self.max_activation, other.max_activation, out=self.max_activation)

    def arrays(self) -> dict[str, NDArray[np.generic]]:
        """Name → array, as a file keeps them: int64 [E], float64 [E]; total_tokens is 0-d."""
        named: dict[str, NDArray[np.generic]] = {
            field.name: np.asarray(getattr(self, field.name)) for field in fields(self)
        }
        named[TOTAL_TOKENS] = np.array(self.total_tokens, np.int64)
        return named

    def metrics(self) -> dict[str, Vector]:
        """Metric → float64 [E], by the names of REAP's observer.

        A mean over no token is 0, the lowest there is, as the observer has it.
        `expert_frequency` counts the tokens routed to each expert.
        """
        return {
            "reap": self._mean(self.weighted_norm_sum),
            "ean_mean": self._mean(self.norm_sum),
            "ean_sum": self.norm_sum.copy(),
            "weighted_ean_sum": self.weighted_norm_sum.copy(),
            "weighted_expert_frequency_sum": self.weight_sum.copy(),
            "expert_frequency": self.counts.astype(np.float64),
            "max_activations": self.max_activation.copy(),
        }

    def _mean(self, sums: Vector) -> Vector:
        return sums / np.maximum(self.counts, 1)


def _check_numbers(vector: Vector, place: str, where: str, signed: bool) -> None:
    """Raise ScoreError unless every number is finite and, where not `signed`, not negative."""
    wrong = ~np.isfinite(vector) | ((vector < 0) & (not signed))
    if wrong.any():
        expert = int(np.argmax(wrong))
        problem = f"{place} holds {vector.flat[expert]} at expert {expert}"
        raise ScoreError(where, problem, "calibrate again: the activations overflowed")
