"""Forced answers: what a model says of an answer that it, or the whole model, gave."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from shardsurgeon.layerwise.damage import damage_of
from shardsurgeon.layerwise.samples import Sample
from tests.families import masked_router
from tests.families.specimens import fixture, written
from tests.layerwise import in_memory
from tests.layerwise.evaluating import evaluated, every_other
from tests.layerwise.streaming import token_ids

pytestmark = pytest.mark.oracle

PROMPTS = (12, 5, 9)
SAID = 16


def test_a_model_accepts_its_own_greedy_answers_and_a_candidate_as_far_as_it_agrees(
    tmp_path: Path,
) -> None:
    folder = written(fixture("qwen3_moe"), tmp_path)
    kept = every_other(folder, 14)
    model, samples = in_memory.load("qwen3_moe", folder, tmp_path), []
    for number, prompt in enumerate(token_ids(PROMPTS)):
        ids = prompt.tolist()
        for _ in range(SAID):
            ids.append(_next(model, ids))
        said = np.arange(len(ids)) >= len(prompt)
        samples.append(Sample(np.array(ids), "answers", number, said, is_answer=True))
    found, _ = evaluated(folder, [kept], samples, tmp_path / "store")
    begins = [0, SAID, 2 * SAID, 3 * SAID]
    whole, pruned = (damage_of(each, begins, [True] * 3, range(3)) for each in found)
    assert whole.tokens == 3 * SAID
    assert whole.accepted is not None and pruned.accepted is not None
    assert (whole.accepted.whole, whole.accepted.mean) == (1, SAID)
    with masked_router._masks(model, 16, kept):
        prefixes = []
        for sample, prompt in zip(samples, PROMPTS, strict=True):
            ids = sample.ids.tolist()
            right = [_next(model, ids[:end]) == ids[end] for end in range(prompt, len(ids))]
            prefixes.append([*right, False].index(False))
    assert 0 <= np.mean(prefixes) < SAID
    assert pruned.accepted.mean == pytest.approx(np.mean(prefixes))
    assert pruned.accepted.median == np.median(prefixes)


def _next(model: torch.nn.Module, ids: list[int]) -> int:
    """The first choice behind some tokens."""
    with torch.inference_mode():
        return int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
