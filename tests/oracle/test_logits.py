"""A pruned checkpoint answers as the original whose routers may not choose the pruned experts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.oracle.closeness import assert_equal_but_for_rounding
from tests.oracle.logits_oracle import logits, router_is_sigmoid
from tests.oracle.pruning import Pruned

pytestmark = [
    pytest.mark.oracle,
    # A published key that transformers reads but calls old.
    pytest.mark.filterwarnings("ignore:`rope_scaling` is deprecated:FutureWarning"),
]


def test_a_pruned_model_is_the_original_that_cannot_choose_the_pruned_experts(
    pruned: Pruned, tmp_path: Path
) -> None:
    result = logits(pruned.folder, tmp_path)
    masked = logits(pruned.source, tmp_path, pruned.retained)
    original = logits(pruned.source, tmp_path)

    if router_is_sigmoid(pruned.source):
        assert torch.equal(result, masked)
    else:
        assert_equal_but_for_rounding(result, masked, pruned.source)
    # Without the mask they must differ, or the equality above proves nothing.
    assert (result - original).abs().max() > 1e-2


def test_every_layer_of_the_comparison_really_lost_experts(pruned: Pruned) -> None:
    assert pruned.retained
    kept = {len(ids) for ids in pruned.retained.values()}
    assert len(kept) == 1
    assert all(ids != list(range(len(ids))) for ids in pruned.retained.values())
