"""Ids across prunes: composing records, restricting scores, and what is refused on the way."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardsurgeon.checkpoint.provenance import Provenance, SourceIdentity, Step, parse_provenance
from shardsurgeon.errors import CheckpointError, ScoreError
from shardsurgeon.pruning.keep_lists import KeepList, LayerKeep
from shardsurgeon.pruning.lineage import (
    check_lineage,
    compose,
    restrict,
    restrict_ids,
    step_of,
    survivors,
)
from shardsurgeon.pruning.request import SelectionRequest
from shardsurgeon.pruning.routing import RoutingFacts
from shardsurgeon.pruning.selection import select

ORIGINAL = SourceIdentity("original", None, "aa" * 32)
PRUNED = SourceIdentity("pruned", "v1", "bb" * 32)
BY_KEEP = SelectionRequest(keep=1)


def keep_list(
    retained: tuple[int, ...],
    saliency: tuple[float | None, ...] | None,
    preserved: tuple[int, ...] = (),
    experts: int = 6,
) -> KeepList:
    pruned = tuple(i for i in range(experts) if i not in retained)
    return KeepList(experts, {3: LayerKeep(retained, pruned, preserved, saliency)})


def pruned_once(preserved: tuple[int, ...] = ()) -> Provenance:
    """Experts 1, 2, 4, 5 of six are left."""
    kept = keep_list((1, 2, 4, 5), (0.1, 0.6, 0.5, 0.2, 0.9, 0.7), preserved)
    return compose(None, kept, step_of(SelectionRequest(ratio=0.34), kept, "reap", ORIGINAL))


def prune_again(previous: Provenance, kept: KeepList) -> Provenance:
    return compose(previous, kept, step_of(BY_KEEP, kept, "reap", PRUNED))


def test_a_first_prune_records_the_keep_list_as_it_is() -> None:
    provenance = pruned_once()
    record = provenance.layers[3]
    assert (record.retained, record.pruned) == ((1, 2, 4, 5), (0, 3))
    assert record.saliency == (0.1, 0.6, 0.5, 0.2, 0.9, 0.7)
    assert record.policy == "scores"
    assert provenance.steps == (Step(6, 4, 0.34, "floor", "reap", "ratio", ORIGINAL),)


def test_a_second_prune_is_recorded_in_ids_of_the_original() -> None:
    chained = prune_again(pruned_once(), keep_list((2, 3), (0.6, 0.5, 0.9, 0.7), experts=4))
    record = chained.layers[3]
    assert (record.retained, record.pruned) == ((4, 5), (0, 1, 2, 3))
    assert record.saliency == (0.1, 0.6, 0.5, 0.2, 0.9, 0.7)
    assert (chained.num_experts_before, chained.num_experts_after) == (6, 2)
    written = json.loads(chained.to_bytes())
    assert written["layers"]["3"]["min_retained_saliency"] == 0.7
    assert written["layers"]["3"]["max_pruned_saliency"] == 0.6
    assert written["source"]["name"] == "original"
    assert [step["source"]["name"] for step in written["steps"]] == ["original", "pruned"]
    assert written["ratio"] == 4 / 6
    assert written["steps"][1]["ratio"] == 0.5


def test_other_scores_in_the_second_prune_leave_the_first_ones_unknown() -> None:
    chained = prune_again(pruned_once(), keep_list((0, 3), (40.0, 20.0, 10.0, 30.0), experts=4))
    record = chained.layers[3]
    assert record.retained == (1, 5)
    assert record.saliency == (None, 40.0, 20.0, None, 10.0, 30.0)


def test_a_keep_list_without_scores_records_no_saliency() -> None:
    chained = prune_again(pruned_once(), keep_list((0, 3), None, experts=4))
    assert chained.layers[3].saliency == (None,) * 6


def test_infinite_and_unknown_saliencies_become_null_and_marks_stay_named() -> None:
    kept = keep_list((0, 1), (math.inf, 0.5, math.nan, None, 0.1, 0.2), preserved=(0,))
    raw = compose(None, kept, step_of(BY_KEEP, kept, "reap", ORIGINAL)).to_bytes()
    assert b"Infinity" not in raw
    assert b"NaN" not in raw
    layer = json.loads(raw)["layers"]["3"]
    assert layer["saliency"] == [None, 0.5, None, None, 0.1, 0.2]
    assert layer["preserved"] == [0]
    assert (layer["min_retained_saliency"], layer["max_pruned_saliency"]) == (0.5, 0.2)


def test_an_expert_preserved_once_stays_marked_while_it_survives() -> None:
    once = pruned_once(preserved=(2, 4))
    chained = prune_again(once, keep_list((1, 3), (0.6, 0.5, 0.9, 0.7), (3,), experts=4))
    assert chained.layers[3].retained == (2, 5)
    assert chained.layers[3].preserved == (2, 5)


def test_layers_dropped_since_are_left_out_and_policies_are_recorded() -> None:
    layer = keep_list((1, 2, 4, 5), None).layers[3]
    both = KeepList(6, {3: layer, 4: layer})
    step = step_of(BY_KEEP, both, None, ORIGINAL)
    first = compose(None, both, step, policies={4: "last"})
    assert {i: record.policy for i, record in first.layers.items()} == {3: "scores", 4: "last"}
    assert list(prune_again(first, keep_list((0, 1), None, experts=4)).layers) == [3]


def test_groups_are_recorded_where_routing_is_group_limited() -> None:
    kept = keep_list((0, 4), (0.9, 0.8, 0.7, 0.1, 0.2, 0.0))
    provenance = compose(None, kept, step_of(BY_KEEP, kept, "reap", ORIGINAL), n_group=2)
    assert json.loads(provenance.to_bytes())["layers"]["3"]["groups"] == [
        {"min_retained_saliency": 0.9, "max_pruned_saliency": 0.8},
        {"min_retained_saliency": 0.2, "max_pruned_saliency": 0.1},
    ]


def test_scores_for_the_original_or_for_the_pruned_model_both_fit() -> None:
    previous = pruned_once()
    original = {3: np.arange(6.0) * 10}
    assert restrict(original, previous, {3: 4}, "s.pt")[3].tolist() == [10, 20, 40, 50]
    assert restrict({3: np.arange(4.0)}, previous, {3: 4}, "s.pt")[3].tolist() == [0, 1, 2, 3]
    assert restrict({3: np.arange(6.0)}, None, {3: 6}, "s.pt")[3].tolist() == [0, 1, 2, 3, 4, 5]


def test_scores_for_another_number_of_experts_are_refused_with_both_numbers() -> None:
    with pytest.raises(ScoreError) as caught:
        restrict({3: np.zeros(5)}, pruned_once(), {3: 4}, "s.pt")
    says = "s.pt: layer 3 has 5 scores, the model has 4 experts (6 before it was pruned)"
    assert says in str(caught.value)
    with pytest.raises(ScoreError, match="layer 3 has 6 scores, the model has 8 experts; use"):
        restrict({3: np.zeros(6)}, None, {3: 8}, "s.pt")


def test_ids_found_among_the_original_experts_are_renumbered() -> None:
    previous = pruned_once()
    assert restrict_ids({3: (0, 2, 5)}, previous, made_for={3: 6}) == {3: (1, 3)}
    assert restrict_ids({3: (2, 0)}, previous, made_for={3: 4}) == {3: (0, 2)}
    assert restrict_ids({3: (2, 0)}, None, made_for={3: 6}) == {3: (0, 2)}


def test_a_record_of_another_checkpoint_is_refused() -> None:
    check_lineage(None, {1: 9})
    check_lineage(pruned_once(), {3: 4})
    with pytest.raises(CheckpointError, match="4 experts are left in layer 3, the model has 5"):
        check_lineage(pruned_once(), {3: 5})
    with pytest.raises(CheckpointError, match=r"records 1 layers from 3 to 3, .* layer 7 as well"):
        check_lineage(pruned_once(), {3: 4, 7: 4})
    with pytest.raises(CheckpointError, match="layer 7"):
        survivors(pruned_once(), 7)


def unequal() -> KeepList:
    """Layer 3 keeps four of six experts, layer 5 two, layer 8 all of its three."""
    return KeepList(
        6,
        {
            3: LayerKeep((1, 2, 4, 5), (0, 3)),
            5: LayerKeep((0, 5), (1, 2, 3, 4)),
            8: LayerKeep((0, 1, 2), ()),
        },
    )


def test_layers_may_keep_different_numbers_and_be_pruned_again() -> None:
    kept = unequal()
    first = compose(None, kept, step_of(BY_KEEP, kept, None, ORIGINAL))
    step = first.steps[0]
    assert (step.num_experts_before, step.num_experts_after, step.ratio) == (6, 4, 6 / 15)
    assert (first.num_experts_before, first.num_experts_after) == (6, 4)
    check_lineage(first, {3: 4, 5: 2, 8: 3})
    again = KeepList(
        4,
        {
            3: LayerKeep((0, 3), (1, 2)),
            5: LayerKeep((1,), (0,)),
            8: LayerKeep((1,), (0, 2)),
        },
    )
    chained = prune_again(parse_provenance(first.to_bytes(), "metadata"), again)
    assert [record.retained for record in chained.layers.values()] == [(1, 5), (5,), (1,)]
    assert [record.num_experts for record in chained.layers.values()] == [6, 6, 3]
    assert (chained.num_experts_after, chained.ratio) == (2, 11 / 15)


def test_scores_and_ids_fit_layers_that_kept_different_numbers() -> None:
    kept = unequal()
    previous = compose(None, kept, step_of(BY_KEEP, kept, None, ORIGINAL))
    counts = {3: 4, 5: 2, 8: 3}
    original = {3: np.arange(6.0), 5: np.arange(6.0), 8: np.arange(3.0)}
    fitting = restrict(original, previous, counts, "s.pt")
    assert {n: row.tolist() for n, row in fitting.items()} == {
        3: [1, 2, 4, 5],
        5: [0, 5],
        8: [0, 1, 2],
    }
    ids = {3: (2, 3), 5: (5,)}
    assert restrict_ids(ids, previous, made_for={3: 6, 5: 6, 8: 3}) == {3: (1,), 5: (1,)}
    assert restrict_ids({5: (1,)}, previous, made_for=counts) == {5: (1,)}


VALUES = st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0, math.nan, 3.5])


@settings(max_examples=80, deadline=None)
@given(st.lists(VALUES, min_size=12, max_size=12), st.sampled_from([1, 2]), st.data())
def test_with_the_same_scores_a_chain_of_prunes_equals_the_direct_one(
    values: list[float], n_group: int, data: st.DataObject
) -> None:
    scores = {3: np.array(values)}
    middle = 12 - 2 * data.draw(st.integers(1, 3))
    last = middle - 2 * data.draw(st.integers(1, 2))
    chosen = data.draw(st.sets(st.integers(0, 11), max_size=1))

    def pruned(previous: Provenance | None, experts: int, kept: int) -> Provenance:
        facts = RoutingFacts(experts, 1, n_group=n_group)
        here = restrict(scores, previous, {3: experts}, "s.pt")
        marks = restrict_ids({3: chosen}, previous, made_for={3: 12})
        selected = select(here, kept, facts, marks)
        return compose(previous, selected, step_of(BY_KEEP, selected, "reap", ORIGINAL), n_group)

    halfway = parse_provenance(pruned(None, 12, middle).to_bytes(), "metadata")
    chained, direct = pruned(halfway, middle, last), pruned(None, 12, last)
    assert chained.layers == direct.layers
    assert chained.ratio == direct.ratio
    assert parse_provenance(chained.to_bytes(), "metadata") == chained


def test_preserved_ids_are_ascending_whenever_they_were_preserved() -> None:
    first = keep_list(tuple(range(1, 20)), None, (16, 17), experts=20)
    record = compose(None, first, step_of(BY_KEEP, first, None, ORIGINAL))
    # Of those that are left, 8 is now 7 and 1 is now 0.
    second = keep_list((0, 7, 15, 16), None, (0, 7), experts=19)
    assert prune_again(record, second).layers[3].preserved == (1, 8, 16, 17)
