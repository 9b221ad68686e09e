"""A candidate whose layers keep different numbers is the original that cannot choose the rest.

No stock engine runs such a model, so that there is no pruned folder to compare with: transformers
runs the original whose routers are masked, which is how a folder's logits are proven elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from tests.families import masked_router
from tests.families.specimens import fixture, written
from tests.families.test_odd_blocks import readable
from tests.layerwise import in_memory, pruned_in_memory
from tests.layerwise.evaluating import Kept, evaluated
from tests.oracle import logits_oracle

pytestmark = pytest.mark.oracle

Oracle = Callable[[Path, Path, Kept | None], torch.Tensor]


def by_router(experts: int) -> Oracle:
    """Of a model of so many experts."""

    def logits(folder: Path, scratch: Path, kept: Kept | None) -> torch.Tensor:
        retained = None if kept is None else {n: [*each] for n, each in kept.items()}
        copy = scratch / "readable"
        path = copy if copy.exists() else readable(folder, copy)
        return masked_router.logits(path, experts, retained)

    return logits


def by_bias(folder: Path, scratch: Path, kept: Kept | None) -> torch.Tensor:
    """Of a model that transformers reads only with its weights decoded."""
    retained = None if kept is None else {n: [*each] for n, each in kept.items()}
    # Beside it, so that the bits of its scales stay as they are.
    with mock.patch.object(logits_oracle, "_unpack_int4", in_memory._unpack_int4):
        return logits_oracle.logits(folder, scratch, retained)


# Family → what masks it, and what its layers keep: one of them all that it has.
CASES: dict[str, tuple[Oracle, dict[int, list[int]]]] = {
    # A softmax over all experts, and over the chosen ones.
    "qwen3_moe": (by_bias, {0: [0, 1, 5, 9, 14], 1: [*range(16)], 2: [3, 4, 8, 11, 12, 13, 15]}),
    "olmoe": (by_router(16), {0: [1, 2, 6, 9, 15], 1: [*range(16)]}),
    "mixtral": (by_router(8), {0: [*range(8)], 1: [1, 2, 6]}),
    # Biases of the router's logits, and of the experts.
    "gpt_oss": (by_router(8), {0: [0, 2, 3, 5, 7], 1: [*range(8)]}),
    # A sigmoid of each, and a bias for the choice alone.
    "dots1": (by_router(8), {1: [*range(8)], 2: [0, 2, 5]}),
    "beam": (by_router(8), {1: [*range(8)], 2: [0, 2, 5, 7]}),
    "kimi_k25": (by_bias, {1: [0, 1, 3, 4, 7, 9], 2: [*range(32)], 3: [*range(7, 29)]}),
    # Groups, which keep alike within a layer.
    "deepseek_v3": (by_bias, {1: [*range(24)], 2: [0, 1, 2, 6, 8, 11, 12, 13, 17, 18, 21, 23]}),
    # Gate weights scale inputs.
    "llama4": (by_router(8), {1: [*range(8)], 3: [0, 2, 3]}),
    # Identity experts behind the others.
    # A table chooses in the first layers.
    "deepseek_v4": (by_router(8), {0: [*range(8)], 1: [*range(8)], 2: [0, 3, 4]}),
    "longcat_flash": (by_router(8), {0: [0, 1, 4, 5, 6], 1: [*range(8)]}),
}


@pytest.mark.parametrize("name", list(CASES))
def test_layers_that_keep_different_numbers_are_the_masked_original(
    name: str, tmp_path: Path
) -> None:
    oracle, kept = CASES[name]
    folder = written(fixture(name), tmp_path)
    whole, masked = (oracle(folder, tmp_path, each) for each in (None, kept))
    width = whole.shape[1]
    ids = torch.randint(0, 256, (2, width), generator=torch.Generator().manual_seed(7)).numpy()
    found, layers = evaluated(folder, [kept], [*ids], tmp_path / "store")
    assert_predicts(found[0], whole, whole, ids)
    assert_predicts(found[1], whole, masked, ids)
    assert found[1].kl.mean() > 1e-4
    first = min(layer for layer, own in kept.items() if len(own) < max(map(len, kept.values())))
    for layer, sums in layers.items():
        # Until a layer lacks an expert, the two are one model.
        assert (sums.compared[0, 0, 0] > 0) == (layer >= first)


def assert_predicts(ours: Any, whole: torch.Tensor, logits: torch.Tensor, ids: Any) -> None:
    """Perplexity to 1e-5, KL to 1e-6 nats and 1e-4 of it."""
    cut = [[*each[:, :-1].double()] for each in (whole, logits)]
    theirs = pruned_in_memory.predicted(*cut, [*ids])
    assert np.exp(ours.nll.mean()) == pytest.approx(theirs.perplexity, rel=1e-5)
    np.testing.assert_allclose(ours.kl, theirs.kl, rtol=1e-4, atol=1e-6)
