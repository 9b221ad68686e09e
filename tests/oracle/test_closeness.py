"""The tolerance for rounding is far below what one wrong expert or one wrong router row does."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.families import masked_router
from tests.families.pruned_pair import Pair, build_and_prune, builders
from tests.oracle import logits_oracle
from tests.oracle.byte_oracle import read_tensors
from tests.oracle.closeness import assert_equal_but_for_rounding, tolerance
from tests.oracle.pruning import FIXTURES, prune

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.filterwarnings("ignore:`rope_scaling` is deprecated:FutureWarning"),
]

Tensors = dict[str, torch.Tensor]
Damage = Callable[[Tensors, Tensors, int, list[int]], None]

# Experts one by one, stacked, and with the largest logits of all.
MODELS = {"qwen3_moe": "", "gemma4": "stacked_experts", "ernie4_5_moe": "odd_blocks"}
EXPERT = r"layers\.{layer}\..*experts\.{expert}\."
STACKED = r"layers\.{layer}\.experts\.(gate_up_proj|down_proj)$"
ROUTER = r"layers\.{layer}\.(mlp\.gate|router\.proj)\.weight$"


@pytest.fixture(scope="module", params=MODELS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    name, folder = request.param, tmp_path_factory.mktemp(request.param)
    if MODELS[name]:
        return build_and_prune(name, builders(MODELS[name])[name], folder)
    pruned = prune(FIXTURES / name, folder / "pruned", "0.5")
    return Pair(name, pruned.source, pruned.folder, pruned.retained)


def logits(pair: Pair, folder: Path, scratch: Path) -> torch.Tensor:
    if MODELS[pair.name]:
        return masked_router.logits(folder, len(next(iter(pair.retained.values()))))
    return logits_oracle.logits(folder, scratch)


def swap_two_experts(pruned: Tensors, source: Tensors, layer: int, kept: list[int]) -> None:
    """The first two experts in each other's place."""
    first, second = (re.compile(EXPERT.format(layer=layer, expert=expert)) for expert in (0, 1))
    firsts = [name for name in pruned if first.search(name)]
    seconds = [name for name in pruned if second.search(name)]
    assert len(firsts) == len(seconds)
    for left, right in zip(sorted(firsts), sorted(seconds), strict=True):
        pruned[left], pruned[right] = pruned[right], pruned[left]
    stacks = [name for name in pruned if re.search(STACKED.format(layer=layer), name)]
    assert firsts or stacks
    for name in stacks:
        pruned[name] = pruned[name][[1, 0, *range(2, len(kept))]].contiguous()


def take_a_wrong_router_row(pruned: Tensors, source: Tensors, layer: int, kept: list[int]) -> None:
    """The first row of the router is that of an expert which is gone."""
    (name,) = (name for name in pruned if re.search(ROUTER.format(layer=layer), name))
    gone = next(old for old in range(len(source[name])) if old not in kept)
    pruned[name] = torch.cat([source[name][gone : gone + 1], pruned[name][1:]])


@pytest.mark.parametrize("damage", [swap_two_experts, take_a_wrong_router_row])
def test_one_mistake_in_any_layer_is_a_hundred_times_the_tolerance(
    pair: Pair, damage: Damage, tmp_path: Path
) -> None:
    right = logits(pair, pair.folder, tmp_path)
    limit = tolerance(right, pair.source)
    for layer, kept in pair.retained.items():
        tensors = read_tensors(pair.folder)
        damage(tensors, read_tensors(pair.source), layer, kept)
        wrong = logits(pair, written(tensors, pair.folder, tmp_path / str(layer)), tmp_path)
        assert (wrong - right).abs().max() > 100 * limit
        with pytest.raises(AssertionError, match="Tensor-likes are not close"):
            assert_equal_but_for_rounding(wrong, right, pair.source)


def written(tensors: Tensors, like: Path, folder: Path) -> Path:
    """A checkpoint of these tensors in one shard, the other files as in `like`."""
    shutil.copytree(like, folder)
    for shard in folder.glob("*.safetensors"):
        shard.unlink()
    file = "model-00001-of-00001.safetensors"
    save_file(tensors, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, file)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder
