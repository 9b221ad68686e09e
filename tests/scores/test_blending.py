"""Blends of parts: sums weighed as copies would be, and weights for the part that is worst off."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardsurgeon.errors import ScoreError
from shardsurgeon.scores import blending
from shardsurgeon.scores.blending import Retained, in_proportion
from shardsurgeon.scores.observed import WEIGHED, merge_observed
from shardsurgeon.scores.table import Scores

LAYERS = (1, 2)
M = "weighted_ean_sum"
Tables = Mapping[int, Mapping[str, np.ndarray]]


def part(name: str, seed: int, experts: int = 8) -> Scores:
    """What the observer saw of one part; some experts are never reached."""
    numbers = np.random.default_rng(seed)
    layers = {}
    for layer in LAYERS:
        counts = np.floor(numbers.pareto(1.0, experts) * 20)
        counts[0] += 1
        sums = {
            metric: numbers.pareto(1.5, experts) * counts
            for metric in ("ean_sum", "weighted_ean_sum", "weighted_expert_frequency_sum")
        }
        layers[layer] = {
            "expert_frequency": counts,
            **sums,
            "max_activations": numbers.random(experts),
        }
    return Scores(name, layers, tokens=dict.fromkeys(LAYERS, 1000 + seed % 7))


def shares_of(
    parts: list[Scores], weights: tuple[float, ...], metric: str, kept: int
) -> list[float]:
    """Retained shares from their definition, of the file that the weights give."""
    blended = merge_observed(parts, weights).layers
    found = []
    for one in parts:
        alone = merge_observed([one]).layers
        shares = []
        for layer in LAYERS:
            order = sorted(range(8), key=lambda e: (-blended[layer][metric][e], e))
            own = alone[layer][metric]
            if own.sum() > 0:
                shares.append(sum(own[e] for e in order[:kept]) / own.sum())
        found.append(sum(shares) / len(shares))
    return found


SEEDS = st.lists(st.integers(0, 10**6), min_size=2, max_size=4, unique=True)
QUICK = settings(max_examples=25, deadline=None, derandomize=True)


@QUICK
@given(SEEDS, st.floats(1e-3, 1e3))
def test_equal_weights_give_the_merged_file_to_the_last_bit(
    seeds: list[int], weight: float
) -> None:
    parts = [part(f"{seed}.pt", seed) for seed in seeds]
    weights = in_proportion([weight] * len(parts))
    merged, blended = merge_observed(parts).layers, merge_observed(parts, weights).layers
    for layer, metrics in merged.items():
        assert metrics.keys() == blended[layer].keys()
        for metric, row in metrics.items():
            assert blended[layer][metric].tobytes() == row.tobytes(), metric


def test_a_weight_of_two_counts_like_two_runs_that_saw_the_same() -> None:
    code, chat = part("code.pt", 1), part("chat.pt", 2)
    # The observer's files of two different halves, each half of what `code` saw.
    halves = [
        Scores(
            f"half{n}.pt",
            {
                layer: {m: row if m == "max_activations" else row * share for m, row in of.items()}
                for layer, of in code.layers.items()
            },
        )
        for n, share in ((1, 0.75), (2, 1.25))
    ]
    doubled = merge_observed([code, chat], (2, 1)).layers
    copied = merge_observed([*halves, chat]).layers
    for layer in LAYERS:
        for metric in (*WEIGHED, "max_activations"):
            np.testing.assert_allclose(doubled[layer][metric], copied[layer][metric], rtol=1e-12)


def test_a_part_of_weight_0_is_as_if_it_were_not_there() -> None:
    parts = [part("a.pt", 1), part("b.pt", 2), part("c.pt", 3)]
    without, two = merge_observed(parts, in_proportion((3, 0, 3))).layers, parts[::2]
    for layer, metrics in merge_observed(two).layers.items():
        for metric, row in metrics.items():
            np.testing.assert_array_equal(without[layer][metric], row)


def test_small_weights_leave_the_means_of_an_expert_that_one_part_alone_reached() -> None:
    one, other = part("a.pt", 1), part("b.pt", 2)
    for metrics in other.layers.values():
        for row in metrics.values():
            row[3] = 0
    for metrics in one.layers.values():
        metrics["expert_frequency"][3], metrics["weighted_ean_sum"][3] = 2, 5.0
    blended = merge_observed([one, other], in_proportion((1e-6, 1))).layers
    for layer in LAYERS:
        assert blended[layer]["reap"][3] == pytest.approx(2.5, rel=1e-12)


@QUICK
@given(SEEDS, st.integers(1, 7), st.sampled_from(WEIGHED))
def test_max_min_never_lowers_the_worst_part_against_equal_weights(
    seeds: list[int], kept: int, metric: str
) -> None:
    parts = [part(f"{seed}.pt", seed) for seed in seeds]
    retained = Retained(parts, metric, dict.fromkeys(LAYERS, kept))
    weights = retained.max_min()
    assert min(weights) > 0 and sum(weights) == pytest.approx(len(parts))
    found, equal = retained.shares(weights), retained.shares((1.0,) * len(parts))
    assert min(found) >= min(equal)
    for shares, of in ((found, weights), (equal, (1.0,) * len(parts))):
        np.testing.assert_allclose(shares, shares_of(parts, of, metric, kept), rtol=1e-12)


@pytest.mark.parametrize("metric", ["weighted_ean_sum", "reap"])
def test_max_min_of_two_parts_is_as_good_as_a_fine_grid_of_weights(metric: str) -> None:
    """Also where the best weights lie in a narrow step of the shares."""
    gained = 0
    for seed in range(12):
        parts = [part("a.pt", 2 * seed), part("b.pt", 2 * seed + 1)]
        retained = Retained(parts, metric, dict.fromkeys(LAYERS, 4))
        best = max(
            min(retained.shares(in_proportion((2**log, 2**-log)))) for log in np.arange(-8, 8, 0.02)
        )
        found = min(retained.shares(retained.max_min()))
        assert found >= best - 1e-9, seed
        gained += found > min(retained.shares((1.0, 1.0))) + 0.01
    assert gained >= 4


def test_a_part_that_equal_weights_forget_is_served_by_max_min() -> None:
    """Two domains that need different experts, one of them with a tenth of the saliency."""
    large, small = part("large.pt", 1), part("small.pt", 2)
    for layer in LAYERS:
        for each, own in ((large, (0, 1, 2, 3, 4)), (small, (5, 6, 7))):
            for metric, row in each.layers[layer].items():
                row[:] = 0
                row[list(own)] = 1 if metric == "expert_frequency" else 10 / len(each.origin)
        large.layers[layer]["weighted_ean_sum"] *= 10
    retained = Retained([large, small], "weighted_ean_sum", dict.fromkeys(LAYERS, 4))
    assert retained.shares((1, 1)) == pytest.approx((0.8, 0))
    # No choice of four serves the worse part better: each other part of the experts loses more.
    every = combinations(range(8), 4)
    best = max(min(sum(e < 5 for e in c) / 5, sum(e > 4 for e in c) / 3) for c in every)
    assert best == 0.4
    assert min(retained.shares(retained.max_min())) >= 0.2


def test_shares_that_say_nothing_are_refused() -> None:
    one, other = part("a.pt", 1), part("b.pt", 2)
    other.layers[2]["weighted_ean_sum"][1] = -3.0
    with pytest.raises(ScoreError, match=r"b\.pt: layer 2 has a weighted_ean_sum of -3, below 0"):
        Retained([one, other], "weighted_ean_sum", {1: 4, 2: 4})
    for metrics in other.layers.values():
        metrics["ean_sum"][:] = 0
    with pytest.raises(ScoreError, match=r"b\.pt: every ean_sum is 0"):
        Retained([one, other], "ean_sum", {1: 4, 2: 4})


@pytest.mark.parametrize("trials", [0, 500])
def test_equal_weights_are_kept_where_every_other_choice_serves_the_worst_part_less(
    trials: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where no climb leads there."""
    monkeypatch.setattr(blending, "_TRIALS", trials)
    sums = {"a.pt": [0.5, 1.0, 0.0], "b.pt": [0.5, 0.0, 1.0]}
    parts = [
        Scores(name, {1: dict.fromkeys(("expert_frequency", "ean_sum"), np.ones(3)) | {M: row}})
        for name, row in ((name, np.array(row)) for name, row in sums.items())
    ]
    retained = Retained(parts, M, {1: 1})
    assert retained.max_min() == (1, 1)
    assert retained.shares((1, 1)) == pytest.approx((1 / 3, 1 / 3))
    assert min(retained.shares((1.01, 0.99))) == 0
