"""Measured side by side, every family's candidates are what transformers makes of pruned folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import shardsurgeon
from shardsurgeon.checkpoint.anatomy import read_anatomy
from shardsurgeon.checkpoint.checkpoint import open_checkpoint
from shardsurgeon.layerwise.activations import ActivationStore
from shardsurgeon.layerwise.damage import Candidate, LayerSums, Predictions
from shardsurgeon.layerwise.evaluate import evaluate_layers
from shardsurgeon.layerwise.settings import Settings
from shardsurgeon.pruning.planner import changed_tensors
from tests.families.specimens import fixture, written
from tests.layerwise import in_memory, pruned_in_memory
from tests.layerwise.streaming import as_samples, token_ids
from tests.layerwise.test_engine_families import FAMILIES, TWINS, whole_model

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.filterwarnings("ignore:`rope_scaling` is deprecated:FutureWarning"),
]

LENGTHS = (40, 33, 12, 27)
# Its head sorts tokens into classes; its twin's experts are rounded, which no folder holds.
LEFT_OUT = {"openai_privacy_filter", "step3p5_quantized"}


class Sink:
    """Keeps what is found in layers."""

    def __init__(self) -> None:
        self.layers: dict[int, LayerSums] = {}

    def finished_layer(self, index: int, sums: LayerSums) -> None:
        self.layers[index] = sums


def evaluated(
    folder: Path, prunings: list[shardsurgeon.Pruning], ids: list[Any], scratch: Path
) -> tuple[list[Predictions], Sink]:
    """What the whole model and each candidate predict."""
    checkpoint = open_checkpoint(folder)
    anatomy = read_anatomy(checkpoint)
    candidates = [
        Candidate(
            pruning.title,
            pruning.decision.keep,
            changed_tensors(checkpoint, anatomy, pruning.decision.keep),
        )
        for pruning in prunings
    ]
    scratch.mkdir()
    samples, sink = as_samples(ids), Sink()
    lengths = [len(each) for each in ids] * (len(candidates) + 1)
    with ActivationStore(scratch, lengths, 1 << 30) as store:
        found = evaluate_layers(
            checkpoint,
            samples,
            [0] * len(samples),
            candidates,
            Settings(dtype="float32", batch_size=2),
            store,
            sink,
            lambda progress: None,
        )
    return found, sink


def assert_first_choices(
    ours: Predictions,
    theirs: pruned_in_memory.Predicted,
    whole: pruned_in_memory.Predicted,
    ids: list[Any],
) -> None:
    """Agreement with the whole model and with the text, wherever no two choices are as good."""
    clear = (theirs.gap > 1e-4) & (whole.gap > 1e-4)
    assert clear.mean() > 0.8
    following = np.concatenate([each[1:] for each in ids])
    np.testing.assert_array_equal(ours.agrees[clear], (theirs.first == whole.first)[clear])
    np.testing.assert_array_equal(ours.hits[clear], (theirs.first == following)[clear])


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in LEFT_OUT])
def test_candidates_are_what_transformers_makes_of_the_pruned_folder(
    name: str, tmp_path: Path
) -> None:
    folder, ids = written(fixture(name), tmp_path), token_ids(LENGTHS)
    plan = shardsurgeon.plan(folder, folder / "scores.pt", ratio=0.5, out=tmp_path / "pruned")
    found, _ = evaluated(folder, [plan], ids, tmp_path / "store")
    for scratch in ("a", "b", "twin"):
        (tmp_path / scratch).mkdir()
    if name in TWINS:
        kept = {n: [*each.retained] for n, each in plan.decision.keep.layers.items()}
        lists = {n: {"kept": ids, "keep": len(ids)} for n, ids in kept.items()}
        (tmp_path / "keep.json").write_text(json.dumps(lists))
        twin = written(fixture(TWINS[name]), tmp_path / "twin")
        plan = shardsurgeon.plan(twin, plan_file=tmp_path / "keep.json", out=tmp_path / "pruned")
    shardsurgeon.apply(plan, verify=False)
    whole = pruned_in_memory.logits(whole_model(name, folder, tmp_path / "a"), ids)
    model = in_memory.load(TWINS.get(name, name), tmp_path / "pruned", tmp_path / "b")
    own = pruned_in_memory.predicted(whole, whole, ids)
    for ours, logits in zip(found, (whole, pruned_in_memory.logits(model, ids)), strict=True):
        theirs = pruned_in_memory.predicted(whole, logits, ids)
        assert np.exp(ours.nll.mean()) == pytest.approx(theirs.perplexity, rel=1e-5)
        np.testing.assert_allclose(ours.kl, theirs.kl, rtol=1e-4, atol=1e-6)
        assert_first_choices(ours, theirs, own, ids)
