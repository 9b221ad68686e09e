"""Side by side, every family's candidates are what transformers makes of pruned folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

import shardsurgeon
from shardsurgeon.layerwise.damage import LayerSums, Predictions
from tests.families.specimens import fixture, written
from tests.layerwise import in_memory, pruned_in_memory
from tests.layerwise.evaluating import evaluated
from tests.layerwise.streaming import token_ids
from tests.layerwise.test_engine_families import FAMILIES, TWINS, whole_model

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.filterwarnings("ignore:`rope_scaling` is deprecated:FutureWarning"),
]

# What adds the gate weights up.
HOOKS = ("on_experts", "_on_input_scaling_block")
LENGTHS = (40, 33, 12, 27)
# Its head sorts tokens into classes; its twin's experts are rounded, which no folder holds.
LEFT_OUT = {"openai_privacy_filter", "step3p5_quantized"}


def without_last(given: torch.Tensor) -> torch.Tensor:
    """[tokens, ...], or a batch of one sample [1, tokens, H], without the last token."""
    return given[:, :-1] if given.dim() == 3 else given[:-1]


def assert_gates(layers: dict[int, LayerSums], model: Any, ids: list[Any]) -> None:
    """The gate weights that the whole model gives to the tokens that predict one: all but the
    last of each sample, which runs as a whole."""

    def cut(hook: Any) -> Any:
        def made(layer: in_memory.Sums) -> Any:
            add = hook(layer)
            return lambda module, given: add(module, tuple(map(without_last, given)))

        return made

    hooks = {name: cut(getattr(in_memory, name)) for name in HOOKS}
    with mock.patch.multiple(in_memory, **hooks):
        theirs = in_memory.sums(model, ids)
    assert {layer for layer, sums in layers.items() if sums.gates is not None} == theirs.keys()
    for layer, sums in theirs.items():
        gates = layers[layer].gates
        assert gates is not None
        expected = sums.arrays(gates.shape[1])["weight_sum"]
        np.testing.assert_allclose(gates[0], expected, rtol=1e-5, atol=1e-6)


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
    found, layers = evaluated(folder, [plan.decision.keep], ids, tmp_path / "store")
    for scratch in ("a", "b", "twin"):
        (tmp_path / scratch).mkdir()
    if name in TWINS:
        kept = {n: [*each.retained] for n, each in plan.decision.keep.layers.items()}
        lists = {n: {"kept": ids, "keep": len(ids)} for n, ids in kept.items()}
        (tmp_path / "keep.json").write_text(json.dumps(lists))
        twin = written(fixture(TWINS[name]), tmp_path / "twin")
        plan = shardsurgeon.plan(twin, plan_file=tmp_path / "keep.json", out=tmp_path / "pruned")
    shardsurgeon.apply(plan, verify=False)
    original = whole_model(name, folder, tmp_path / "a")
    assert_gates(layers, original, ids)
    whole = pruned_in_memory.logits(original, ids)
    model = in_memory.load(TWINS.get(name, name), tmp_path / "pruned", tmp_path / "b")
    own = pruned_in_memory.predicted(whole, whole, ids)
    for ours, logits in zip(found, (whole, pruned_in_memory.logits(model, ids)), strict=True):
        theirs = pruned_in_memory.predicted(whole, logits, ids)
        assert np.exp(ours.nll.mean()) == pytest.approx(theirs.perplexity, rel=1e-5)
        np.testing.assert_allclose(ours.kl, theirs.kl, rtol=1e-4, atol=1e-6)
        assert_first_choices(ours, theirs, own, ids)
