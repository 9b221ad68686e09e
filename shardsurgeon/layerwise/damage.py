"""How far a pruned model is from the whole one: the numbers, and the sums that they are made of.

Per predicted token, with the whole model's distribution p and the candidate's q over the next
token, and t the token that follows:

    perplexity   exp of the mean of -ln q(t)
    KL           Σ p · (ln p - ln q), in nats
    agreement    the share of tokens where p and q have the same first choice
    accepted     of an answer that is forced: the tokens before the first one that is not the
                 candidate's first choice

Needs no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardsurgeon.execution.plan import OutputTensor
from shardsurgeon.pruning.keep_lists import KeepList

Floats = NDArray[np.float64]

FEWEST_TOKENS = 100
"""Predicted tokens of a part of the data: with fewer, a 99th percentile is the largest value."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A prune that is measured. name: as the user knows it; keep: its keep-lists; changed: layer →
    the tensors beside experts that it changes, by name, as it would write them."""

    name: str
    keep: KeepList
    changed: Mapping[int, Mapping[str, OutputTensor]] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Accepted:
    """Answers that were forced on a model.

    answers: how many; mean, median: tokens of an answer that were accepted; length: mean tokens
    of an answer; whole: the share of answers that were accepted to their end.
    """

    answers: int
    mean: float
    median: float
    length: float
    whole: float


@dataclass(frozen=True, slots=True)
class Damage:
    """What some tokens say of a model.

    tokens: predicted ones; kl_mean, kl_p95, kl_p99: of them, in nats, 0 for the whole model;
    accepted: None where no answers were forced.
    """

    tokens: int
    perplexity: float
    kl_mean: float
    kl_p95: float
    kl_p99: float
    agreement: float
    accepted: Accepted | None = None


@dataclass(frozen=True, slots=True)
class LayerDamage:
    """What a candidate does to one layer's output, on average over tokens.

    relative_error: ‖candidate - whole‖₂ / ‖whole‖₂; cosine: of the two; lost_weight: of the gate
    weights that the whole model gives to experts, the share whose expert is gone, None in a layer
    without experts.
    """

    layer: int
    relative_error: float
    cosine: float
    lost_weight: float | None


@dataclass
class Predictions:
    """What one model said of every predicted token, in the order of samples.

    nll: -ln q(t) [tokens]; kl: [tokens]; agrees, hits: bool [tokens], whether its first choice is
    the whole model's, and the token that follows.
    """

    nll: Floats
    kl: Floats
    agrees: NDArray[np.bool_]
    hits: NDArray[np.bool_]

    @classmethod
    def empty(cls, tokens: int) -> Predictions:
        """For so many tokens."""
        numbers = np.full((2, tokens), np.nan)
        flags = np.zeros((2, tokens), np.bool_)
        return cls(numbers[0], numbers[1], flags[0], flags[1])

    def put(self, places: NDArray[np.int64], values: Sequence[NDArray[Any]]) -> None:
        """Set the values of the tokens at some places, in the order of the attributes."""
        for own, part in zip((self.nll, self.kl, self.agrees, self.hits), values, strict=True):
            own[places] = part


@dataclass(frozen=True, slots=True)
class LayerSums:
    """Sums over a layer's tokens.

    compared: [candidates, 2, parts], relative errors and cosines; gates: [parts, experts], gate
    weights that the whole model gives, None in a layer without experts.
    """

    compared: Floats
    gates: Floats | None


def damage_of(
    found: Predictions, begins: Sequence[int], answers: Sequence[bool], chosen: Sequence[int]
) -> Damage:
    """The numbers of the chosen samples.

    begins: where each sample's tokens begin, and the end; answers: which samples force an answer.
    """
    spans = [(begins[sample], begins[sample + 1]) for sample in chosen]
    return _damage(found, spans, [answers[sample] for sample in chosen])


def _damage(
    found: Predictions, spans: Sequence[tuple[int, int]], answers: Sequence[bool]
) -> Damage:
    kept = np.concatenate([np.arange(*span) for span in spans])
    kl = found.kl[kept]
    # Rounding leaves differences of some 1e-9 below zero, where there is none.
    p95, p99 = np.percentile(kl, (95, 99)).clip(min=0).tolist()
    forced = [span for span, answer in zip(spans, answers, strict=True) if answer]
    return Damage(
        tokens=len(kept),
        perplexity=_exp(float(found.nll[kept].mean())),
        kl_mean=max(0.0, float(kl.mean())),
        kl_p95=p95,
        kl_p99=p99,
        agreement=float(found.agrees[kept].mean()),
        accepted=_accepted(found.hits, forced) if forced else None,
    )


def _exp(mean: float) -> float:
    """A perplexity, infinite where no float can hold it."""
    try:
        return math.exp(mean)
    except OverflowError:
        return math.inf


def _accepted(hits: NDArray[np.bool_], spans: Sequence[tuple[int, int]]) -> Accepted:
    lengths = np.array([end - begin for begin, end in spans])
    prefixes = np.array(list(_prefixes(hits, spans)))
    return Accepted(
        answers=len(spans),
        mean=float(prefixes.mean()),
        median=float(np.median(prefixes)),
        length=float(lengths.mean()),
        whole=float((prefixes == lengths).mean()),
    )


def _prefixes(hits: NDArray[np.bool_], spans: Sequence[tuple[int, int]]) -> Iterator[int]:
    for begin, end in spans:
        misses = np.flatnonzero(~hits[begin:end])
        yield int(misses[0]) if len(misses) else end - begin
