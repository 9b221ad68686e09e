"""What a cut costs, and where one suggests itself: by hand, and against the planner's own share."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardsurgeon.errors import ScoreError
from shardsurgeon.pruning.analysis import (
    LIMITS,
    ScoreAnalysis,
    SuggestedCut,
    lost_shares,
    profile,
    ratio_of,
    suggested_cuts,
    view_alone,
    widest_gap,
)
from shardsurgeon.pruning.request import removed_count
from shardsurgeon.pruning.routing import RoutingFacts
from shardsurgeon.pruning.selection import dropped_share, select
from shardsurgeon.scores.table import Scores

NAN, INF = math.nan, math.inf


def shares(*values: float, n_group: int = 1) -> list[float] | None:
    found = lost_shares(np.array(values), n_group)
    return None if found is None else found.tolist()


def test_the_lowest_experts_are_lost_first() -> None:
    assert shares(1.0, 4.0, 0.0, 3.0) == [0, 0, 0.125, 0.5, 1]


def test_never_routed_experts_cost_nothing_and_preserved_ones_do_not_count() -> None:
    assert shares(1.0, NAN, 3.0, INF) == [0, 0, 0.25, 1, 1]


def test_every_group_loses_the_same_number() -> None:
    assert shares(8.0, 2.0, 4.0, 2.0, n_group=2) == [0, 0.25, 1]


@pytest.mark.parametrize("values", [(0.0, 0.0), (-1.0, 2.0), (NAN, 0.0), (INF, INF)])
def test_shares_that_mean_nothing_are_none(values: tuple[float, ...]) -> None:
    assert shares(*values) is None


def test_huge_scores_do_not_overflow() -> None:
    assert shares(1e308, 1e308, 1e308, 1e308) == [0, 0.25, 0.5, 0.75, 1]


@given(st.lists(st.floats(0, 1e3) | st.just(NAN), min_size=8, max_size=8))
def test_the_share_is_the_one_that_plan_reports(values: list[float]) -> None:
    row, facts = np.array(values), RoutingFacts(8, 1, n_group=2, topk_group=2)
    lost = lost_shares(row, 2)
    for kept in (2, 4, 6):
        share = dropped_share(select({0: row}, kept, facts).layers[0])
        if lost is not None:
            assert share == pytest.approx(lost[(8 - kept) // 2], abs=1e-12)


def test_a_cut_is_the_largest_within_its_limit() -> None:
    # Shares lost with m experts: 0, .01, .05, .25, .5, 1 and 0, 0, .02, .25, .6, 1.
    table = {3: np.array([1.0, 4, 20, 25, 50]), "mtp.0": np.array([0.0, 2, 23, 35, 40])}
    cuts = {cut.limit: cut for cut in suggested_cuts(table)}
    assert cuts[0.01] == SuggestedCut(0.01, 0.2, 1, 4, 0.005, 0.01, 3)
    assert cuts[0.05] == SuggestedCut(0.05, 0.4, 2, 3, 0.035, 0.05, 3)
    assert cuts[0.1].removed == 2
    assert cuts[0.25] == SuggestedCut(0.25, 0.6, 3, 2, 0.25, 0.25, 3)


def test_a_cut_leaves_the_router_enough() -> None:
    table = {0: np.array([0.0] * 7 + [1.0])}
    assert [cut.kept for cut in suggested_cuts(table)] == [1] * len(LIMITS)
    facts = RoutingFacts(8, 4, n_group=2, topk_group=1)
    assert [cut.kept for cut in suggested_cuts(table, facts)] == [8] * len(LIMITS)
    facts = RoutingFacts(8, 4, n_group=2, topk_group=2)
    cuts = suggested_cuts(table, facts)
    assert [(cut.kept, cut.ratio) for cut in cuts] == [(4, 0.5)] * len(LIMITS)


def test_layers_of_different_sizes_lose_the_same_part() -> None:
    table = {0: np.array([0.0, 0, 0, 1]), 1: np.array([0.0, 1])}
    (cut, *_) = suggested_cuts(table)
    assert (cut.removed, cut.kept, cut.worst_lost) == (3, 1, 0.0)
    table = {0: np.array([0.0, 0, 0, 1]), 1: np.array([1.0, 1])}
    (cut, *_) = suggested_cuts(table)
    assert (cut.removed, cut.worst_layer) == (1, 0)


def test_layers_without_shares_suggest_nothing() -> None:
    assert suggested_cuts({1: np.array([-1.0, 1.0])}) == ()


@given(st.integers(2, 2048), st.data())
def test_a_suggested_ratio_removes_what_it_says(experts: int, data: st.DataObject) -> None:
    removed = data.draw(st.integers(0, experts - 1))
    assert removed_count(ratio_of(removed, experts), experts) == removed


@pytest.mark.parametrize(
    ("removed", "experts", "ratio"),
    # Of 50 the float product of 0.58 is below 29.
    [(249, 384, 0.65), (192, 384, 0.5), (29, 100, 0.291), (29, 50, 0.59)],
)
def test_a_suggested_ratio_is_short(removed: int, experts: int, ratio: float) -> None:
    assert ratio_of(removed, experts) == ratio


def test_the_widest_gap_is_by_factor_and_away_from_the_ends() -> None:
    row = np.array([0.001, 1.0, 1.1, 1.2, 4.0, 4.4, 5.0, 5.5, 6.0, 900.0])
    gap = widest_gap(row)
    assert gap is not None
    # One expert below the first factor, 1000, is a tenth of them; nine below the last, 150, too.
    assert (gap.removed, gap.factor) == (1, pytest.approx(1000))
    gap = widest_gap(np.concatenate([[0.0], np.repeat(row[1:-1], 2), [900.0]]))
    assert gap is not None
    assert (gap.removed, gap.factor) == (7, pytest.approx(4 / 1.2))


def test_a_gap_above_zero_is_infinite() -> None:
    gap = widest_gap(np.array([0.0, NAN, 2.0, 3.0]))
    assert gap is not None
    assert (gap.removed, gap.factor) == (2, INF)


@pytest.mark.parametrize("values", [(1.0,), (2.0, 2.0, 2.0), (-1.0, 1.0, 5.0), (INF, INF)])
def test_where_a_factor_means_nothing_there_is_no_gap(values: tuple[float, ...]) -> None:
    assert widest_gap(np.array(values)) is None


@given(
    st.dictionaries(
        st.integers(0, 3),
        st.lists(
            st.floats(exclude_min=True, min_value=-INF) | st.just(NAN), min_size=1, max_size=9
        ),
        max_size=3,
    )
)
def test_any_scores_can_be_looked_at(rows: dict[int, list[float]]) -> None:
    table: dict[int | str, np.ndarray] = {n: np.array(row) for n, row in rows.items()}
    for cut in suggested_cuts(table):
        assert 0 <= cut.mean_lost <= cut.limit * 1.001
        # A mean of equals can be rounded up.
        assert cut.mean_lost <= cut.worst_lost * (1 + 1e-12) <= 1.001
    for row in table.values():
        gap = widest_gap(row)
        assert gap is None or (0 < gap.removed < len(row) and gap.factor > 1)


def test_a_layer_loses_whole_groups_where_the_router_divides_it() -> None:
    values = {1: np.array([0.0, 0, 0, 1, 1, 1, 1, 1]), 2: np.array([0.0, 0, 1, 1, 1])}
    facts = RoutingFacts(8, 2, n_group=2, topk_group=1)
    grouped = ScoreAnalysis("reap", values, {}, None, facts=facts).layers()
    alone = ScoreAnalysis("reap", values, {}, None).layers()
    # The second group has nothing that costs nothing; five experts are no two groups.
    assert [layer.removable["0.25"] for layer in grouped] == [2, 2]
    assert [layer.removable["0.25"] for layer in alone] == [4, 2]
    cut = suggested_cuts({1: values[1]}, facts)[-1]
    assert (cut.limit, cut.removed, cut.kept) == (0.25, 2, 6)


def test_a_layer_is_told_by_its_known_values() -> None:
    values = {3: np.array([0.5, NAN, 2.0, INF, 1.0]), 4: np.array([NAN, INF])}
    analysis = ScoreAnalysis("reap", values, {3: (1,)}, {4: (1,)}, mtp=frozenset({4}))
    one, other = analysis.layers()
    assert (one.layer, one.is_mtp, one.num_experts) == (3, False, 5)
    assert (one.min, one.median, one.max) == (0.5, 1.0, 2.0)
    assert (one.never_routed, one.super_experts, one.preserved) == ((1,), (), (3,))
    assert (other.min, other.median, other.max, other.is_mtp) == (None, None, None, True)
    assert (other.never_routed, other.super_experts, other.preserved) == ((), (1,), (1,))
    assert other.removable == {} and other.gap is None
    alone = ScoreAnalysis("reap", values, {}, None).layers()
    assert [(layer.is_mtp, layer.super_experts) for layer in alone] == [(None, ())] * 2


def test_a_profile_is_the_roots_of_the_saliencies_from_the_highest_down() -> None:
    assert profile(np.array([1.0, NAN, 4.0, 0.0, 0.25])) == "84200"
    assert profile(np.array([1.0, INF, 4.0])) == "884"
    assert profile(np.array([0.0, NAN])) == profile(np.array([INF])) == ""
    pairs = np.repeat([16.0, 1.0], 64)
    assert profile(pairs) == "8" * 32 + "2" * 32


@given(st.lists(st.floats(min_value=0, max_value=1e300), min_size=1, max_size=200))
def test_a_profile_never_rises_and_fits_a_line(values: list[float]) -> None:
    found = profile(np.array(values))
    assert list(found) == sorted(found, reverse=True)
    assert len(found) == (min(len(values), 64) if max(values) > 0 else 0)


def test_super_experts_are_found_where_every_layer_has_their_metric() -> None:
    def scores(*norms: list[float] | None) -> Scores:
        layers = {}
        for layer, row in enumerate(norms):
            layers[layer] = {"reap": np.linspace(1.0, 2.0, 300)}
            if row is not None:
                layers[layer]["max_activations"] = np.array(row)
        return Scores("scores.npz", layers)

    quiet, loud = [1.0] * 300, [1.0] * 299 + [90.0]
    assert view_alone(scores(quiet, loud, quiet, quiet), "reap").super_experts == {1: (299,)}
    assert view_alone(scores(quiet, loud, None, quiet), "reap").super_experts is None
    with pytest.raises(ScoreError, match=r"scores\.npz: layer 1: max_activations of expert 299"):
        view_alone(scores(quiet, [*quiet[:-1], INF], quiet, quiet), "reap")
