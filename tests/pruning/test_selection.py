"""Which experts stay: order, ties, marks, groups, super experts, and the check of the cut."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from shardsurgeon.checkpoint.anatomy import read_anatomy
from shardsurgeon.checkpoint.checkpoint import open_checkpoint
from shardsurgeon.errors import KeepListError, ScoreError, UsageError, VerificationError
from shardsurgeon.pruning.keep_lists import KeepList, LayerKeep
from shardsurgeon.pruning.request import MtpPolicy
from shardsurgeon.pruning.routing import RoutingFacts, routing_facts
from shardsurgeon.pruning.selection import (
    check_keep_list,
    check_order,
    check_uniform,
    dropped_share,
    mtp_counts,
    saliency_cut,
    select,
    super_experts,
    with_mtp,
)
from tests.support import tiny

Rows = Mapping[int, NDArray[np.float64]]


def row(*values: float) -> NDArray[np.float64]:
    return np.array(values, dtype=np.float64)


def flat(experts: int) -> RoutingFacts:
    return RoutingFacts(experts, 1)


def grouped(experts: int, n_group: int) -> RoutingFacts:
    return RoutingFacts(experts, 1, n_group=n_group, topk_group=1)


def keep_of(saliency: tuple[float | None, ...], retained: tuple[int, ...]) -> LayerKeep:
    pruned = tuple(i for i in range(len(saliency)) if i not in retained)
    return LayerKeep(retained=retained, pruned=pruned, preserved=(), saliency=saliency)


def test_the_most_salient_experts_stay_in_ascending_order() -> None:
    keep_list = select({7: row(0.1, 0.9, 0.3, 0.7)}, 2, flat(4))
    assert keep_list.num_experts == 4
    assert keep_list.layers == {7: keep_of((0.1, 0.9, 0.3, 0.7), (1, 3))}


def test_layers_come_in_ascending_order_and_are_pruned_independently() -> None:
    keep_list = select({3: row(1, 2, 3), 1: row(3, 2, 1)}, 1, flat(3))
    assert [(i, keep.retained) for i, keep in keep_list.layers.items()] == [(1, (0,)), (3, (2,))]


def test_among_equals_the_lower_id_stays() -> None:
    assert select({0: row(5, 1, 5, 5, 1)}, 2, flat(5)).layers[0].retained == (0, 2)
    assert select({0: row(5, 1, 5, 5, 1)}, 4, flat(5)).layers[0].retained == (0, 1, 2, 3)
    assert select({0: row(0.0, -0.0, 0.0)}, 1, flat(3)).layers[0].retained == (0,)


def test_a_never_routed_expert_counts_as_the_lowest_even_below_negative_values() -> None:
    keep = select({0: row(math.nan, -9.0, 0.0, math.nan)}, 3, flat(4)).layers[0]
    assert keep.retained == (0, 1, 2)
    assert keep.saliency == (None, -9.0, 0.0, None)


def test_infinite_marks_and_named_experts_are_preserved_and_count_towards_the_kept() -> None:
    values = {0: row(0.1, math.inf, 0.5, 0.2, math.nan)}
    keep = select(values, 3, flat(5), {0: {4}}).layers[0]
    assert keep.retained == (1, 2, 4)
    assert keep.preserved == (1, 4)
    assert keep.saliency == (0.1, None, 0.5, 0.2, None)


def test_groups_keep_the_same_number_each_chosen_within_the_group() -> None:
    keep = select({0: row(9, 8, 7, 6, 1, 3, 2, 4)}, 4, grouped(8, 2)).layers[0]
    assert keep.retained == (0, 1, 5, 7)


def test_more_preserved_experts_than_may_be_kept_are_refused_with_both_numbers() -> None:
    marks = row(math.inf, math.inf, math.inf, 0)
    with pytest.raises(UsageError, match="layer 5: 3 experts are preserved, 2 may be kept"):
        select({5: marks}, 2, flat(4))
    with pytest.raises(UsageError, match="layer 5: 2 experts of group 0 are preserved, 1 may be"):
        select({5: marks}, 2, grouped(4, 2))


SALIENCIES = st.one_of(
    st.floats(allow_nan=True, allow_infinity=False),
    st.sampled_from([0.0, 0.5, 0.5, 1.0, math.nan, math.inf]),
)


@settings(max_examples=150, deadline=None)
@given(st.data(), st.sampled_from([1, 1, 2, 4]), st.integers(1, 6))
def test_any_selection_keeps_the_count_the_groups_and_the_preserved(
    data: st.DataObject, n_group: int, size: int
) -> None:
    experts = n_group * size
    values = row(*data.draw(st.lists(SALIENCIES, min_size=experts, max_size=experts)))
    named = data.draw(st.sets(st.integers(0, experts - 1), max_size=2))
    quota = data.draw(st.integers(1, size))
    facts = grouped(experts, n_group)
    marked = {i for i in range(experts) if values[i] == math.inf} | named
    crowded = any(sum(i // size == g for i in marked) > quota for g in range(n_group))
    if crowded:
        with pytest.raises(UsageError):
            select({0: values}, quota * n_group, facts, {0: named})
        return
    keep_list = select({0: values}, quota * n_group, facts, {0: named})
    keep = keep_list.layers[0]
    assert list(keep.retained) == sorted(set(keep.retained))
    assert sorted(keep.retained + keep.pruned) == list(range(experts))
    assert [sum(i // size == g for i in keep.retained) for g in range(n_group)] == [quota] * n_group
    assert marked == set(keep.preserved) <= set(keep.retained)
    check_order(keep_list, facts)
    for old in keep.retained:
        for other in keep.pruned:
            if old // size == other // size and old not in marked:
                lower = -math.inf if math.isnan(values[old]) else values[old]
                higher = -math.inf if math.isnan(values[other]) else values[other]
                assert lower > higher or (lower == higher and old < other)


@settings(max_examples=80, deadline=None)
@given(st.lists(SALIENCIES, min_size=2, max_size=12))
def test_keeping_one_more_only_adds_an_expert(saliencies: list[float]) -> None:
    values = row(*saliencies)
    values[np.isinf(values)] = 2.0
    kept = [
        set(select({0: values}, count, flat(len(values))).layers[0].retained)
        for count in range(1, len(values) + 1)
    ]
    assert all(fewer < more for fewer, more in pairwise(kept))


@settings(max_examples=60, deadline=None)
@given(st.permutations(range(9)), st.integers(1, 8))
def test_renumbering_distinct_experts_renumbers_the_selection(order: list[int], kept: int) -> None:
    values = row(0.3, 0.1, 4, 1, 5, 9, 2, 6, math.nan)
    plain = select({0: values}, kept, flat(9)).layers[0].retained
    moved = select({0: values[order]}, kept, flat(9)).layers[0].retained
    assert {order[i] for i in moved} == set(plain)


def test_a_pruned_expert_above_a_retained_one_is_found_and_named() -> None:
    wrong = KeepList(num_experts=3, layers={4: keep_of((0.5, 0.25, 0.75), (0, 1))})
    says = "layer 4: a retained expert has saliency 0.25, a pruned one 0.75"
    with pytest.raises(VerificationError, match=says):
        check_order(wrong, flat(3))


def test_an_unknown_saliency_is_below_every_known_one_in_the_check() -> None:
    check_order(KeepList(3, {0: keep_of((0.5, None, -3.0), (0, 2))}), flat(3))
    with pytest.raises(VerificationError, match="saliency -inf, a pruned one -3"):
        check_order(KeepList(3, {0: keep_of((0.5, None, -3.0), (0, 1))}), flat(3))


def test_the_check_leaves_preserved_experts_and_lists_without_saliency_out() -> None:
    kept = LayerKeep(retained=(0, 1), pruned=(2,), preserved=(1,), saliency=(0.9, 0.1, 0.5))
    check_order(KeepList(3, {0: kept}), flat(3))
    check_order(KeepList(3, {0: LayerKeep((0, 1), (2,), (), None)}), flat(3))


def test_the_check_compares_within_groups_where_routing_is_group_limited() -> None:
    across = KeepList(4, {0: keep_of((9.0, 8.0, 1.0, 2.0), (0, 3))})
    check_order(across, grouped(4, 2))
    with pytest.raises(VerificationError):
        check_order(across, flat(4))
    within = KeepList(4, {0: keep_of((9.0, 8.0, 1.0, 2.0), (0, 2))})
    with pytest.raises(VerificationError, match=r"layer 0, group 1: .* 1\.0, a pruned one 2\.0"):
        check_order(within, grouped(4, 2))


@pytest.mark.parametrize(
    ("keep_list", "says"),
    [
        (KeepList(6, {0: keep_of((1.0,) * 6, (0, 1))}), "is for 6 experts, the model has 8"),
        (KeepList(8, {}), "holds 0 layers"),
        (KeepList(8, {0: keep_of((1.0,) * 8, tuple(range(8)))}), "prunes nothing"),
        (KeepList(8, {0: keep_of((1.0,) * 8, (0, 4, 5))}), "do not divide into the 2 groups"),
        (
            KeepList(8, {0: keep_of((1.0,) * 8, (0, 4)), 2: keep_of((1.0,) * 8, (0, 4, 5))}),
            "layer 2: 3 kept experts do not divide into the 2 groups",
        ),
        (
            KeepList(8, {0: keep_of((1.0,) * 8, (0, 1, 2, 4))}),
            "layer 0 keeps 3 experts of group 0, not 2",
        ),
        (
            KeepList(8, {0: keep_of((1.0,) * 8, (0, 4, 5, 6))}),
            "layer 0 keeps 1 experts of group 0, not 2",
        ),
    ],
)
def test_a_keep_list_the_router_cannot_use_is_refused(keep_list: KeepList, says: str) -> None:
    with pytest.raises(KeepListError) as caught:
        check_keep_list(keep_list, grouped(8, 2), "drops.json")
    assert str(caught.value).startswith("drops.json: ")
    assert says in str(caught.value)


def test_layers_that_keep_different_numbers_suit_a_router_and_are_not_uniform() -> None:
    facts = RoutingFacts(8, 2, n_group=2, topk_group=2)
    everyone = keep_of((1.0,) * 8, tuple(range(8)))
    unequal = KeepList(8, {0: keep_of((1.0,) * 8, (0, 4)), 2: everyone, 3: everyone})
    check_keep_list(unequal, facts, "keep.json")
    assert (unequal.kept, unequal.is_uniform) == (8, False)
    with pytest.raises(KeepListError, match="layer 0 keeps 2 experts, layer 2 8"):
        check_uniform(unequal, "keep.json", "no stock engine loads it")
    check_uniform(KeepList(8, {2: everyone, 3: everyone}), "keep.json", "no stock engine loads it")
    with pytest.raises(KeepListError, match="layer 2 keeps 8 experts, layer 4 2"):
        last = KeepList(8, {2: everyone, 3: everyone, 4: unequal.layers[0]})
        check_uniform(last, "keep.json", "no stock engine loads it")


def test_each_layer_keeps_its_own_count_of_its_own_experts() -> None:
    values = {1: np.array([1.0, 5.0, 3.0, 4.0]), 4: np.array([2.0, 1.0])}
    kept = select(values, {1: 3, 4: 1}, RoutingFacts(4, 1))
    assert {n: layer.retained for n, layer in kept.layers.items()} == {1: (1, 2, 3), 4: (0,)}
    assert [layer.num_experts for layer in kept.layers.values()] == [4, 2]
    check_order(kept, RoutingFacts(4, 1))


def test_a_keep_list_that_suits_the_router_passes() -> None:
    check_keep_list(KeepList(8, {0: keep_of((1.0,) * 8, (0, 1, 4, 7))}), grouped(8, 2), "x")


def test_the_cut_and_the_share_dropped_leave_preserved_and_unknown_experts_out() -> None:
    saliency = (4.0, None, 1.0, 2.0, None, 3.0)
    keep = LayerKeep((0, 4, 5), (1, 2, 3), preserved=(4,), saliency=saliency)
    assert saliency_cut(keep) == (3.0, 2.0)
    assert dropped_share(keep) == pytest.approx(3 / 10)
    assert saliency_cut(LayerKeep((0,), (1,))) == (None, None)


@pytest.mark.parametrize(
    ("saliency", "share"),
    [
        (None, None),
        ((None, None), None),
        ((0.0, 0.0), None),
        ((2.0, -1.0), None),
        ((1.5e308, 0.5e308), 0.25),
    ],
)
def test_a_share_without_meaning_is_left_out(
    saliency: tuple[float | None, ...] | None, share: float | None
) -> None:
    found = dropped_share(LayerKeep((0,), (1,), (), saliency))
    assert found == (share if share is None else pytest.approx(share))


def reference_super_experts(rows: Rows) -> set[tuple[int, int]]:
    """The rule in torch: threshold over all layers, strictly above, first three quarters."""
    import torch

    layers = sorted(rows)
    stacked = torch.stack([torch.from_numpy(rows[layer]) for layer in layers])
    threshold = torch.maximum(torch.quantile(stacked.flatten(), 0.995), stacked.max() / 10)
    mask = stacked > threshold
    mask[math.floor(0.75 * len(layers)) :] = False
    return {(layers[int(i)], int(j)) for i, j in mask.nonzero()}


@pytest.mark.torch
@pytest.mark.parametrize("seed", range(12))
def test_super_experts_are_those_the_rule_gives_in_torch(seed: int) -> None:
    rng = np.random.default_rng(seed)
    layers, experts = int(rng.integers(1, 14)), int(rng.integers(2, 70))
    # Heavy tails let the tenth of the maximum decide, light ones the percentile.
    spread = [0.2, 2.0][seed % 2]
    numbers = rng.choice(30, size=layers, replace=False)
    rows = {int(i): np.exp(spread * rng.standard_normal(experts)) for i in numbers}
    found = {(layer, old) for layer, ids in super_experts(rows).items() for old in ids}
    assert found == reference_super_experts(rows)


def test_a_tenth_of_the_maximum_must_be_exceeded_and_late_layers_do_not_count() -> None:
    # 4 layers of 4: the percentile of 16 values lies between 10 and 100, above the tenth, 10.
    few = {layer: row(1, 1, 1, 10) for layer in (1, 2, 3)} | {4: row(1, 1, 1, 100)}
    assert super_experts(few) == {}
    # 4 layers of 300: 1,194 of 1,200 values lie at or below the percentile, 1; the tenth is 10.
    rows = {layer: np.ones(300) for layer in (1, 2, 3, 4)}
    rows[1][[5, 9]] = [100.0, 10.5]
    rows[3][[0, 7]] = [10.0, 11.0]
    rows[4][2] = 99.0
    assert super_experts(rows) == {1: (5, 9), 3: (7,)}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_activation_norms_that_are_not_finite_are_refused(value: float) -> None:
    with pytest.raises(ScoreError, match=f"layer 3: max_activations of expert 1 is {value}"):
        super_experts({3: row(1, value, -value)})


def test_without_activation_norms_there_are_no_super_experts() -> None:
    assert super_experts({}) == {}


def test_layers_come_in_ascending_order_with_mtp_layers_behind_them() -> None:
    checkpoint = open_checkpoint(tiny.source())
    anatomy = read_anatomy(checkpoint)
    backwards = KeepList(8, {layer: keep_of((1.0,) * 8, (0, 1, 4)) for layer in (3, 2, 1)})
    main = KeepList(8, {layer: backwards.layers[layer] for layer in (2, 1)})
    for policy in (MtpPolicy.LAST, MtpPolicy.ROUTER_NORM):
        found, _ = with_mtp(main, checkpoint, anatomy, policy, routing_facts(anatomy))
        assert list(found.layers) == [1, 2, 3]


def test_an_mtp_layer_that_keeps_more_than_the_last_layer_keeps_all_that_it_does() -> None:
    checkpoint = open_checkpoint(tiny.source())
    anatomy = read_anatomy(checkpoint)
    values = (8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0)
    most = LayerKeep((0, 1, 2, 3), (4, 5, 6, 7), (), values)
    # The last layer keeps its two best, and the worst, which is preserved.
    last = LayerKeep((0, 1, 7), (2, 3, 4, 5, 6), (7,), values)
    keep = KeepList(8, {1: most, 2: last})
    found, policies = with_mtp(keep, checkpoint, anatomy, MtpPolicy.LAST, routing_facts(anatomy))
    assert found.layers[3] == LayerKeep((0, 1, 2, 7), (3, 4, 5, 6))
    assert policies == {3: "last"}


def test_an_mtp_layer_with_another_number_of_experts_cannot_follow_the_last_layer() -> None:
    checkpoint = open_checkpoint(tiny.source())
    anatomy = read_anatomy(checkpoint)
    *main, mtp = anatomy.layers
    other = replace(anatomy, layers=(*main, replace(mtp, expert_nbytes=mtp.expert_nbytes[:4])))
    keep = KeepList(8, {layer: keep_of((1.0,) * 8, (0, 1, 2, 3)) for layer in (1, 2)})
    says = "layer 3 keeps 2 of 4 experts, the last main layer 4 of 8"
    with pytest.raises(UsageError, match=says):
        with_mtp(keep, checkpoint, other, MtpPolicy.LAST, routing_facts(anatomy))


def test_layers_with_a_count_of_their_own_must_agree_among_themselves_alone() -> None:
    def listed(*counts: int) -> KeepList:
        layers = {n: keep_of((1.0,) * 8, tuple(range(count))) for n, count in enumerate(counts)}
        return KeepList(8, layers, apart=frozenset({2, 3}))

    for counts in ((4, 4, 2, 2), (4, 4, 4, 4)):
        check_uniform(listed(*counts), "x", "no stock engine loads it")
        assert listed(*counts).is_uniform
    with pytest.raises(KeepListError, match="layer 2 keeps 2 experts, layer 3 3"):
        check_uniform(listed(4, 4, 2, 3), "x", "no stock engine loads it")
    with pytest.raises(KeepListError, match="layer 0 keeps 4 experts, layer 1 3"):
        check_uniform(listed(4, 3, 3, 3), "x", "no stock engine loads it")
    assert not listed(4, 4, 2, 3).is_uniform


@pytest.mark.parametrize(
    ("main", "experts", "count"),
    [
        ((4, 4), 8, 4),
        ((2, 4), 8, 4),  # as the layer that keeps the most
        ((3, 3), 8, 4),  # whole groups
        ((1, 1), 8, 2),  # what the router needs
        ((8, 8), 8, 8),
        ((4, 4), 4, 2),  # the same part of its own experts
        ((7, 5), 4, 4),
    ],
)
def test_an_mtp_layer_keeps_the_same_part_in_whole_groups_and_enough_for_its_router(
    main: tuple[int, int], experts: int, count: int
) -> None:
    anatomy = read_anatomy(open_checkpoint(tiny.source()))
    *others, mtp = anatomy.layers
    sized = replace(mtp, expert_nbytes=mtp.expert_nbytes[:experts])
    facts = RoutingFacts(8, 2, n_group=2, topk_group=2)
    counts = mtp_counts(replace(anatomy, layers=(*others, sized)), facts, dict(enumerate(main)))
    assert counts == {3: count}
