"""Counts per layer: uniform ones, and the best way to share one budget, against trying them all."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from shardsurgeon.errors import ScoreError, UsageError
from shardsurgeon.pruning.counts import allocate, shares, uniform_counts
from shardsurgeon.pruning.request import Allocation, SelectionRequest
from shardsurgeon.pruning.routing import RoutingFacts
from shardsurgeon.pruning.selection import select

Rows = Mapping[int, NDArray[np.float64]]
KEEP = SelectionRequest(keep=1)


def rows(*layers: tuple[float, ...]) -> dict[int, NDArray[np.float64]]:
    return {number: np.array(values, dtype=np.float64) for number, values in enumerate(layers)}


def facts_of(values: Rows, top_k: int = 1, **rest: int) -> dict[int, RoutingFacts]:
    return {layer: RoutingFacts(len(row), top_k, **rest) for layer, row in values.items()}


def test_a_layer_of_equal_experts_keeps_more_than_one_with_a_few_salient_ones() -> None:
    # Layer 0 loses 2 % with three experts, layer 1 a quarter with each; its values are smaller.
    values = rows((96.0, 2.0, 1.0, 1.0), (0.1, 0.1, 0.1, 0.1))
    assert allocate(values, {}, facts_of(values), KEEP).counts(5) == {0: 1, 1: 4}


def test_among_equal_gains_the_lower_layer_comes_first() -> None:
    values = rows((1.0, 1.0, 1.0), (2.0, 2.0, 2.0))
    allocation = allocate(values, {}, facts_of(values), KEEP)
    assert allocation.counts(3) == {0: 2, 1: 1}
    assert allocation.counts(5) == {0: 3, 1: 2}


def test_water_stands_at_one_level_in_all_layers() -> None:
    # Lost with one, two, three kept: 0.5, 0.25, 0.125 of layer 0; 0.75, 0.5, 0.25 of layer 1.
    values = rows((4.0, 2.0, 1.0, 1.0), (1.0, 1.0, 1.0, 1.0))
    request = SelectionRequest(keep=1, allocate=Allocation.WATERFILL)
    budget = allocate(values, {}, facts_of(values), request)
    counts = [budget.counts(total) for total in range(2, 9)]
    assert [(kept[0], kept[1]) for kept in counts] == [
        *((1, 1), (1, 2), (2, 2), (2, 3), (3, 3), (3, 4), (4, 4)),
    ]
    # The other way prefers what adds the most, and leaves layer 1 at a loss of a half for longer.
    steep = rows((60.0, 30.0, 6.0, 4.0), (28.0, 24.0, 24.0, 24.0))
    assert allocate(steep, {}, facts_of(steep), KEEP).counts(3) == {0: 2, 1: 1}
    assert allocate(steep, {}, facts_of(steep), request).counts(3) == {0: 1, 1: 2}


def test_what_routers_need_and_what_is_preserved_is_the_least_a_layer_keeps() -> None:
    values = rows((1.0, 0.0, 0.0, math.inf, 0.0, math.inf), (3.0, 3.0, 3.0, 3.0, 3.0, 3.0))
    allocation = allocate(values, {0: [4]}, facts_of(values, top_k=2), KEEP)
    assert allocation.smallest == 5
    assert allocation.counts(5) == {0: 3, 1: 2}
    with pytest.raises(UsageError, match="4 experts in all are fewer than the 5 that 2 layers"):
        allocation.counts(4)


def test_groups_and_multiples_are_respected_in_every_layer() -> None:
    values = rows(tuple(range(12)), (5.0,) * 12)
    facts = facts_of(values, top_k=2, n_group=2, topk_group=1, group_score_top=2)
    allocation = allocate(values, {}, facts, SelectionRequest(keep=6, multiple_of=3))
    # A step is lcm(2, 3); the smallest count is 2 groups of two experts, raised to a step.
    assert (allocation.smallest, allocation.step) == (12, 6)
    assert allocation.counts(12) == {0: 6, 1: 6}
    assert allocation.counts(18) == {0: 6, 1: 12}


def test_preserved_experts_that_fill_a_group_raise_the_floor_of_all_groups() -> None:
    values = rows((1.0,) * 8)
    facts = facts_of(values, n_group=2, topk_group=1)
    assert allocate(values, {0: [5, 6, 7]}, facts, KEEP).floors == {0: 6}
    with pytest.raises(UsageError, match="layer 0: needs 12 experts with those preserved"):
        request = SelectionRequest(keep=6, multiple_of=6)
        allocate(values, {0: [4, 5, 6, 7]}, facts, request)


def test_shares_add_up_at_any_scale_and_never_routed_experts_have_none() -> None:
    assert shares(np.array([3.0, 1.0, math.nan, math.inf]), 0).tolist() == [0.75, 0.25, 0, 0]
    huge = shares(np.array([1.5e308, 1.5e308, 0.0]), 0)
    assert huge.tolist() == [0.5, 0.5, 0.0]
    assert shares(np.array([0.0, math.nan]), 0).tolist() == [0.0, 0.0]
    with pytest.raises(ScoreError, match=r"layer 7: the saliency of expert 1 is -0\.5"):
        shares(np.array([1.0, -0.5]), 7)


def test_a_ratio_is_taken_of_each_layers_own_experts() -> None:
    facts = {1: RoutingFacts(8, 2), 2: RoutingFacts(5, 2), 3: RoutingFacts(8, 2)}
    counts = uniform_counts(SelectionRequest(ratio=0.5), facts)
    assert (counts.kept, counts.note) == ({1: 4, 2: 3, 3: 4}, "")
    grouped = {1: RoutingFacts(8, 2, 2, 2), 2: RoutingFacts(6, 2, 2, 2)}
    counts = uniform_counts(SelectionRequest(ratio=0.4), grouped)
    assert counts.kept == {1: 6, 2: 4}
    assert counts.note == "kept count raised from 5 to 6: a multiple of n_group 2"
    with pytest.raises(UsageError, match="leaves nothing to prune of 6 experts"):
        uniform_counts(SelectionRequest(ratio=0.3), grouped)


def test_smaller_layers_keep_as_many_of_a_count_as_they_can() -> None:
    facts = {1: RoutingFacts(8, 2), 2: RoutingFacts(5, 2)}
    assert uniform_counts(SelectionRequest(keep=6), facts).kept == {1: 6, 2: 5}
    multiple = SelectionRequest(keep=6, multiple_of=3)
    assert uniform_counts(multiple, facts).kept == {1: 6, 2: 3}
    with pytest.raises(UsageError, match=r"layer 2: 0 kept experts"):
        uniform_counts(SelectionRequest(keep=6, multiple_of=6), facts)


def test_the_largest_budget_within_a_size_is_taken() -> None:
    values = rows((4.0, 3.0, 2.0, 1.0), (1.0, 1.0, 1.0, 1.0))
    allocation = allocate(values, {}, facts_of(values), KEEP)

    def size(kept: Mapping[int, int]) -> int:
        return 100 + 10 * kept[0] + 20 * kept[1]

    # Best first: 0.3 and 0.2 of layer 0, 0.25 of layer 1 thrice, 0.1 of layer 0.
    assert [size(allocation.counts(budget)) for budget in range(2, 9)] == [
        *(130, 140, 160, 180, 200, 210, 220),
    ]
    assert allocation.largest_fitting(size, 179, 8) == {0: 2, 1: 2}
    assert allocation.largest_fitting(size, 180, 8) == {0: 2, 1: 3}
    assert allocation.largest_fitting(size, 500, 3) == {0: 2, 1: 1}
    with pytest.raises(UsageError, match="the smallest checkpoint possible takes up to 130 B"):
        allocation.largest_fitting(size, 129, 8)


@st.composite
def models(draw: st.DrawFn) -> tuple[Rows, dict[int, set[int]], dict[int, RoutingFacts], int]:
    """Up to four small layers, some preserved experts, groups and a multiple."""
    n_group = draw(st.sampled_from([1, 1, 2]))
    values, preserved, facts = {}, {}, {}
    for layer in range(draw(st.integers(1, 4))):
        experts = n_group * draw(st.integers(2, 4))
        saliency = st.integers(0, 20).map(float) | st.just(math.nan)
        row = draw(st.lists(saliency, min_size=experts, max_size=experts))
        values[layer] = np.array(row)
        preserved[layer] = draw(st.sets(st.integers(0, experts - 1), max_size=1))
        facts[layer] = RoutingFacts(experts, draw(st.integers(1, 2)), n_group, n_group)
    return values, preserved, facts, draw(st.sampled_from([1, 1, 2]))


def kept_share(
    values: Rows, preserved: dict[int, set[int]], layer: int, kept: int, facts: RoutingFacts
) -> Fraction:
    """The share of a layer's saliency that `kept` experts carry, exactly."""
    known = [Fraction(0) if math.isnan(value) else Fraction(value) for value in values[layer]]
    size, total = facts.num_experts // facts.n_group, sum(known)
    best = Fraction(0)
    for group in range(facts.n_group):
        ids = range(group * size, (group + 1) * size)
        ranked = sorted(ids, key=lambda i: (i not in preserved[layer], -known[i]))
        best += sum(known[i] for i in ranked[: kept // facts.n_group])
    return best / total if total else Fraction(0)


@pytest.mark.parametrize("way", [Allocation.GLOBAL, Allocation.WATERFILL])
@given(model=models(), data=st.data())
def test_no_other_way_to_share_a_budget_keeps_more(
    way: Allocation,
    model: tuple[Rows, dict[int, set[int]], dict[int, RoutingFacts], int],
    data: st.DataObject,
) -> None:
    """More in all layers together, or in the one that keeps the smallest share."""
    values, preserved, facts, multiple = model
    request = SelectionRequest(keep=1, multiple_of=multiple, allocate=way)
    step = math.lcm(multiple, facts[0].n_group)

    def possible(layer: int) -> list[int]:
        """Every count that the router, the marks and the multiple allow, tried one by one."""
        fact = facts[layer]
        size = fact.num_experts // fact.n_group
        fullest = max(
            sum(i // size == group for i in preserved[layer]) for group in range(fact.n_group)
        )
        return [
            kept
            for kept in range(step, fact.num_experts + 1, step)
            if kept >= fact.top_k and kept // fact.n_group >= fullest
        ]

    choices = [possible(layer) for layer in facts]
    if not all(choices):
        with pytest.raises(UsageError):
            allocate(values, preserved, facts, request)
        return
    allocation = allocate(values, preserved, facts, request)
    lowest, highest = sum(map(min, choices)), sum(map(max, choices))
    assert allocation.smallest == lowest
    budget = data.draw(st.integers(0, (highest - lowest) // step)) * step + lowest
    counts = allocation.counts(budget)
    assert sum(counts.values()) == budget
    assert all(counts[layer] in choices[layer] for layer in facts)

    def worth(kept: tuple[int, ...]) -> Fraction:
        parts = [kept_share(values, preserved, n, kept[n], facts[n]) for n in facts]
        if way is Allocation.GLOBAL:
            return sum(parts, Fraction(0))
        # A layer without any saliency loses none.
        return min((part for n, part in enumerate(parts) if np.nansum(values[n]) > 0), default=0)

    best = max(worth(kept) for kept in product(*choices) if sum(kept) == budget)
    assert best - worth(tuple(counts[layer] for layer in facts)) < Fraction(1, 10**12)
    if len(facts) == 1:
        asked = SelectionRequest(keep=budget, multiple_of=multiple)
        if budget < facts[0].num_experts:
            assert counts == uniform_counts(asked, facts).kept
    # And selection can carry it out.
    for layer, fact in facts.items():
        select({layer: values[layer]}, counts, fact, {layer: preserved[layer]})
