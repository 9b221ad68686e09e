"""Published prunes: the kept count each of their commands must give.

The numbers are those on the model cards: Kimi-Linear-REAP-35B-A3B-Instruct,
Kimi-K2.5-PRISM-REAP-530B-A32B and its re-prunes, Kimi-K2.5-PRISM-REAP-72, and the 20 % prune of
Qwen3.5-35B-A3B.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from shardsurgeon.checkpoint.provenance import SourceIdentity, parse_provenance
from shardsurgeon.pruning.counts import kept_count
from shardsurgeon.pruning.keep_lists import KeepList
from shardsurgeon.pruning.lineage import compose, restrict, step_of, survivors
from shardsurgeon.pruning.request import Rounding, SelectionRequest
from shardsurgeon.pruning.routing import RoutingFacts
from shardsurgeon.pruning.selection import select

KIMI_LINEAR = RoutingFacts(256, 8)
KIMI_K25 = RoutingFacts(384, 8)
QWEN35 = RoutingFacts(256, 8)
MOE_LAYERS = range(1, 61)


@pytest.mark.parametrize(
    ("facts", "words", "kept"),
    [
        (KIMI_LINEAR, {"ratio": 0.30}, 180),
        (KIMI_LINEAR, {"ratio": 0.50}, 128),
        (KIMI_K25, {"ratio": 0.50}, 192),
        (KIMI_K25, {"ratio": 0.65, "rounding": Rounding.NEAREST}, 134),
        (KIMI_K25, {"ratio": 0.65}, 135),
        (KIMI_K25, {"ratio": 0.75}, 96),
        (RoutingFacts(192, 8), {"keep": 72, "multiple_of": 8}, 72),
        (QWEN35, {"ratio": 0.20}, 205),
    ],
)
def test_a_published_prune_keeps_its_published_count(
    facts: RoutingFacts, words: dict[str, Any], kept: int
) -> None:
    count = kept_count(SelectionRequest(**words), facts)
    assert (count.kept, count.note) == (kept, "")


def test_384_to_192_to_72_equals_the_direct_prune_for_the_same_scores() -> None:
    rng = np.random.default_rng(42)
    # Few distinct values, so that ties cross both cuts, and some never-routed experts.
    scores = {layer: rng.integers(0, 60, 384) / 8 for layer in MOE_LAYERS}
    for values in scores.values():
        values[rng.choice(384, 5, replace=False)] = np.nan

    half = select(scores, 192, KIMI_K25)
    first = compose(None, half, step(half, SelectionRequest(ratio=0.5)))
    read_back = parse_provenance(first.to_bytes(), "metadata")
    left = restrict(scores, read_back, dict.fromkeys(scores, 192), "scores.pt")
    rest = select(left, 72, RoutingFacts(192, 8))
    chained = compose(read_back, rest, step(rest, SelectionRequest(keep=72)))

    whole = select(scores, 72, KIMI_K25)
    direct = compose(None, whole, step(whole, SelectionRequest(keep=72)))
    assert chained.layers == direct.layers
    for layer, values in scores.items():
        by_hand = sorted(range(384), key=lambda old: (-np.nan_to_num(values[old], nan=-1), old))
        assert survivors(chained, layer) == tuple(sorted(by_hand[:72]))
    steps = [(made.num_experts_before, made.num_experts_after) for made in chained.steps]
    assert steps == [(384, 192), (192, 72)]


def step(keep_list: KeepList, request: SelectionRequest) -> Any:
    """The record of one prune of a model whose name does not matter here."""
    return step_of(request, keep_list, "reap", SourceIdentity("Kimi-K2.5", None, "00" * 32))
