"""The numbers of an evaluation, from what each token gave, against numpy and by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardsurgeon.layerwise.damage import Predictions, damage_of


@st.composite
def runs(draw: st.DrawFn) -> tuple[Predictions, list[int]]:
    """What a model predicted, and where samples begin."""
    lengths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=8))
    tokens = sum(lengths)
    numbers = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    flags = numbers.random((2, tokens)) < draw(st.sampled_from([0.1, 0.5, 0.95]))
    made = Predictions(numbers.exponential(3, tokens), numbers.exponential(0.1, tokens), *flags)
    return made, np.cumsum([0, *lengths]).tolist()


@given(runs(), st.data())
def test_a_part_is_numpy_on_its_tokens_alone(
    made: tuple[Predictions, list[int]], data: st.DataObject
) -> None:
    found, begins = made
    samples = range(len(begins) - 1)
    chosen = data.draw(st.lists(st.sampled_from(samples), min_size=1, unique=True).map(sorted))
    answers = [data.draw(st.booleans()) for _ in samples]
    spans = [slice(begins[n], begins[n + 1]) for n in chosen]
    nll, kl = (np.concatenate([each[span] for span in spans]) for each in (found.nll, found.kl))
    damage = damage_of(found, begins, answers, chosen)
    assert damage.tokens == len(nll)
    assert damage.perplexity == pytest.approx(math.exp(sum(nll) / len(nll)))
    assert damage.kl_mean == pytest.approx(sum(kl) / len(kl))
    assert [damage.kl_p95, damage.kl_p99] == pytest.approx(np.percentile(kl, [95, 99]).tolist())
    agreed = [flag for span in spans for flag in found.agrees[span]]
    assert damage.agreement == pytest.approx(sum(agreed) / len(agreed))
    forced = [
        found.hits[span].tolist() for n, span in zip(chosen, spans, strict=True) if answers[n]
    ]
    if not forced:
        assert damage.accepted is None
        return
    prefixes = [[*hits, False].index(False) for hits in forced]
    accepted = damage.accepted
    assert accepted is not None and accepted.answers == len(forced)
    assert accepted.mean == pytest.approx(np.mean(prefixes))
    assert accepted.median == np.median(prefixes)
    assert accepted.length == pytest.approx(np.mean([*map(len, forced)]))
    assert accepted.whole == pytest.approx(np.mean([all(hits) for hits in forced]))


@given(runs())
def test_perplexities_of_parts_make_that_of_the_whole(made: tuple[Predictions, list[int]]) -> None:
    found, begins = made
    samples = len(begins) - 1
    none = [False] * samples
    whole = damage_of(found, begins, none, range(samples))
    parts = [damage_of(found, begins, none, [n]) for n in range(samples)]
    logs = sum(part.tokens * math.log(part.perplexity) for part in parts) / whole.tokens
    assert math.log(whole.perplexity) == pytest.approx(logs)
    mean = sum(part.tokens * part.kl_mean for part in parts) / whole.tokens
    assert whole.kl_mean == pytest.approx(mean)


def test_an_accepted_prefix_ends_at_the_first_miss() -> None:
    hits = np.array([1, 1, 0, 1, 0, 1, 1, 1, 1], bool)
    found = Predictions(np.ones(9), np.zeros(9), hits, hits)
    accepted = damage_of(found, [0, 4, 6, 9], [True, True, True], [0, 1, 2]).accepted
    assert accepted is not None
    assert (accepted.answers, accepted.length) == (3, 3)
    assert (accepted.mean, accepted.median) == (pytest.approx(5 / 3), 2)
    assert accepted.whole == pytest.approx(1 / 3)


def test_rounding_never_makes_a_divergence_negative_and_no_perplexity_overflows() -> None:
    found = Predictions(np.full(3, 1e4), np.full(3, -1e-12), *np.ones((2, 3), bool))
    damage = damage_of(found, [0, 3], [False], [0])
    assert (damage.kl_mean, damage.kl_p95, damage.kl_p99) == (0, 0, 0)
    assert damage.perplexity == math.inf
