"""From scores or a list to the keep-lists of a model: what counts, and what is said of it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shardsurgeon.checkpoint.anatomy import read_anatomy
from shardsurgeon.checkpoint.checkpoint import open_checkpoint
from shardsurgeon.errors import ScoreError
from shardsurgeon.pruning.decide import Decision, decide
from shardsurgeon.pruning.planner import SizeEstimate
from shardsurgeon.pruning.request import Allocation, Lists, MtpPolicy, SelectionRequest
from shardsurgeon.scores.table import Scores
from tests.support import tiny

CHECKPOINT = open_checkpoint(tiny.source())
ANATOMY = read_anatomy(CHECKPOINT)
NAN = math.nan

Rows = dict[Any, list[float]]


def rows(**layers: list[float]) -> Rows:
    """Saliencies of layers 1 and 2 that say nothing odd, but for those given: layer1=…."""
    usual = {layer: [8.5, 7.0, 6.1, 5.2, 4.3, 3.4, 2.5, 1.6] for layer in (1, 2)}
    return usual | {int(name.removeprefix("layer")): row for name, row in layers.items()}


def decided(saliency: Rows, more: dict[str, Rows] | None = None, **request: Any) -> Decision:
    """keep=4 of tiny's eight experts, unless the request says otherwise."""
    tables = {"reap": saliency, **(more or {})}
    layers: dict[Any, dict[str, Any]] = {}
    for metric, table in tables.items():
        for layer, row in table.items():
            layers.setdefault(layer, {})[metric] = np.array(row)
    asked = SelectionRequest(**({"keep": 4} | request))
    size = SizeEstimate(CHECKPOINT, ANATOMY, asked.mtp).nbytes
    return decide(CHECKPOINT, ANATOMY, Scores("scores.npz", layers), asked, size)


def kept(decision: Decision) -> dict[int, tuple[int, ...]]:
    return {layer: keep.retained for layer, keep in decision.keep.layers.items()}


def test_scores_decide_the_main_layers_and_the_policy_the_mtp_layer() -> None:
    decision = decided(rows(layer2=[1.0, 2.1, 3.2, 4.3, 5.4, 6.5, 7.6, 8.7]), mtp=MtpPolicy.LAST)
    assert kept(decision) == {1: (0, 1, 2, 3), 2: (4, 5, 6, 7), 3: (4, 5, 6, 7)}
    assert (decision.policies, decision.metric) == ({3: "last"}, "reap")
    assert (decision.notes, decision.drop_mtp, decision.uniform) == ((), False, None)


def test_scores_of_an_mtp_layer_count_unless_the_policy_overrules_them() -> None:
    own = rows(layer3=[1.0, 2.1, 3.2, 4.3, 5.4, 6.5, 7.6, 8.7])
    assert kept(decided(own))[3] == (4, 5, 6, 7)
    dropped = decided(own, mtp=MtpPolicy.DROP)
    assert kept(dropped) == {1: (0, 1, 2, 3), 2: (0, 1, 2, 3)} and dropped.drop_mtp


def test_experts_without_tokens_are_named_where_the_file_counts_them() -> None:
    odd = rows(layer1=[8.5, NAN, 6.1, 5.2, 4.3, 3.4, 2.5, 1.6])
    assert decided(odd).never_routed == {1: (1,)}
    counts = {layer: [9.0, 0.0, 5.0, 4.0, 3.0, 2.0, 2.0, 0.0] for layer in (1, 2)}
    counted = decided(odd, {"expert_frequency": counts})
    assert counted.never_routed == {1: (1, 7), 2: (1, 7)}
    counts[1] = [9.0, 2.0, 5.0, 4.0, 3.0, 2.0, 2.0, 0.0]
    with pytest.raises(ScoreError, match="layer 1, expert 1 has the score NaN though 2 tokens"):
        decided(odd, {"expert_frequency": counts})


def test_experts_that_are_kept_though_no_token_reached_them_are_told_of() -> None:
    few = [0.0, 5.0, NAN, 3.0, NAN, 0.0, NAN, 0.0]
    (note,) = decided(rows(layer2=few)).notes
    assert note.startswith("kept although no calibration token reached them: 2 of 4 in layer 2;")
    # Where a value is negative, 0 is a value as any other.
    few = [0.0, 5.0, -0.1, 3.0, 0.5, 0.2, -0.2, -0.3]
    assert decided(rows(layer2=few), keep=6).notes == ()


def test_super_experts_stay_whatever_their_saliency() -> None:
    norms = {layer: [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 2.0] for layer in (1, 2)}
    norms[1][7] = 90.0
    decision = decided(rows(), {"max_activations": norms}, preserve_super_experts=True)
    assert kept(decision)[1] == (0, 1, 2, 7)
    assert decision.keep.layers[1].preserved == (7,)


def test_a_global_allocation_is_told_beside_what_uniform_counts_would_keep() -> None:
    peaked = rows(layer1=[90.0, 80.0, 0.1, 0.1, 0.2, 0.1, 0.3, 0.1])
    decision = decided(peaked, allocate=Allocation.GLOBAL)
    assert [len(ids) for ids in kept(decision).values()] == [2, 6, 6]
    assert decision.uniform is not None
    assert {n: keep.retained for n, keep in decision.uniform.layers.items()} == {
        1: (0, 1, 4, 6),
        2: (0, 1, 2, 3),
    }
    assert decision.notes == ("8 experts kept in 2 layers together",)


def test_a_waterfill_spares_the_layer_that_would_lose_the_largest_share() -> None:
    # 9 of 13.5 are in two experts of layer 1; the eight of layer 2 matter alike.
    few = [5.0, 4.0, 1.0, 1.0, 1.0, 0.5, 0.5, 0.5]
    values = rows(layer1=few, layer2=[1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7])
    decision = decided(values, allocate=Allocation.WATERFILL)
    # Keeping two, layer 1 loses a third; layer 2 loses 2.1 / 10.8 with six of its eight.
    assert [len(ids) for ids in kept(decision).values()][:2] == [3, 5]
    assert decision.uniform is not None
    assert decision.notes == ("8 experts kept in 2 layers together",)


@pytest.mark.parametrize("policy", [MtpPolicy.ROUTER_NORM, MtpPolicy.DROP])
def test_a_target_size_is_shared_out_with_the_mtp_layers_in_it(policy: MtpPolicy) -> None:
    peaked = rows(layer1=[90.0, 80.0, 0.1, 0.1, 0.2, 0.1, 0.3, 0.1])
    estimate = SizeEstimate(CHECKPOINT, ANATOMY, policy)
    limit = estimate.nbytes(5)
    options = {"keep": None, "target_size": limit, "allocate": Allocation.GLOBAL}
    decision = decided(peaked, mtp=policy, **options)
    counts = {layer: len(ids) for layer, ids in kept(decision).items()}
    assert estimate.nbytes(counts) <= limit
    # One expert more in the layer that gains the most would be too large, or too many.
    counts[2] += 1
    if policy is MtpPolicy.ROUTER_NORM:
        counts[3] = max(counts.values())
        assert estimate.nbytes(counts) > limit
    else:
        assert sum(counts.values()) - 1 == 10


@pytest.mark.parametrize("layer", [1, 2])
def test_what_is_left_of_scores_that_measured_nothing_is_refused(layer: int) -> None:
    with pytest.raises(ScoreError, match=f"layer {layer}"):
        decided(rows(**{f"layer{layer}": [0.0] * 8}))


@pytest.mark.parametrize(("digest", "said"), [("", True), (CHECKPOINT.config_sha256, False)])
def test_a_plan_made_for_another_model_is_used_and_told_of(
    tmp_path: Path, digest: str, said: bool
) -> None:
    layers = {
        str(layer): {"retained": [0, 2, 4, 6], "pruned": [1, 3, 5, 7], "preserved": []}
        for layer in (1, 2, 3)
    }
    plan = {
        "format": 1,
        "kind": "shardsurgeon-plan",
        "num_experts": 8,
        "selection": {},
        "source": {"name": "org/other", "config_sha256": digest or "0" * 64},
        "layers": layers,
    }
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    request = SelectionRequest(plan_file=tmp_path / "plan.json")
    decision = decide(CHECKPOINT, ANATOMY, None, request, lambda kept: 0)
    assert set(kept(decision).values()) == {(0, 2, 4, 6)}
    assert decision.policies == dict.fromkeys((1, 2, 3), "plan")
    notes = [note for note in decision.notes if "made for org/other" in note]
    assert len(notes) == said == bool(decision.notes)


def test_a_ranking_is_read_as_one_where_the_user_says_so() -> None:
    order = [3.0, 1.0, 0.0, 6.0, 4.0, 5.0, 2.0, 7.0]
    best = decided({1: order, 2: order}, lists=Lists.BEST_FIRST)
    assert kept(best)[1] == (0, 1, 3, 6)
    assert best.notes == ("scores.npz is read as a ranking, best-first",)
    assert kept(decided({1: order, 2: order}, lists=Lists.WORST_FIRST))[1] == (2, 4, 5, 7)


def test_without_scores_and_without_a_list_nothing_is_decided() -> None:
    with pytest.raises(ScoreError, match="no score file was given"):
        decide(CHECKPOINT, ANATOMY, None, SelectionRequest(keep=4), lambda kept: 0)


def test_numbers_that_are_places_in_a_ranking_are_no_saliencies() -> None:
    order = [3.0, 1.0, 0.0, 6.0, 4.0, 5.0, 2.0, 7.0]
    with pytest.raises(ScoreError, match="which is a ranking of the experts and no saliency"):
        decided({1: order, 2: order[::-1]})


def test_activation_norms_of_another_number_of_experts_are_refused() -> None:
    norms = {layer: [1.0] * 7 for layer in (1, 2)}
    with pytest.raises(ScoreError, match="layer 1 has 7 scores, the model has 8 experts"):
        decided(rows(), {"max_activations": norms}, preserve_super_experts=True)
