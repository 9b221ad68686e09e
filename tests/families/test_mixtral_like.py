"""Mixtral, PhiMoE, OLMoE, Jamba, MiniMax-M2/M3, Hunyuan-A13B, Granite: bytes, config, logits.

OLMoE and Jamba take a softmax over all experts and do not renormalise their choice; see
`masked_model` for the relation their pruned gate weights must have. MiniMax scores by sigmoid
and Granite takes its softmax over the chosen logits only: these must agree to the last bit.

transformers cannot build a Hunyuan config whose `num_experts` is a list (its experts need one
number), and it reads no MTP layer: those are compared byte by byte only.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, MiniMaxM3VLForCausalLM

from tests.families.masked_model import load, logits
from tests.families.pruned_pair import (
    Layout,
    Pair,
    assert_config_follows,
    assert_tensors_follow,
    build_and_prune,
    builders,
)
from tests.oracle.byte_oracle import read_config, read_tensors, same_bits
from tests.oracle.closeness import assert_equal_but_for_rounding

pytestmark = pytest.mark.oracle

BUILDERS = builders("mixtral_like")

MIXTRAL = Layout(
    layers=r"model\.layers\.(\d+)\.",
    experts=r"block_sparse_moe\.experts\.(\d+)\.w[123]\.weight$",
    sliced=((r"block_sparse_moe\.gate\.weight", 0),),
    counts=(("num_local_experts",),),
)
MINIMAX = replace(
    MIXTRAL, sliced=((r"block_sparse_moe\.(gate\.weight|e_score_correction_bias)", 0),)
)
OLMOE = Layout(
    layers=r"model\.layers\.(\d+)\.",
    experts=r"mlp\.experts\.(\d+)\.(?:gate|up|down)_proj\.weight$",
    sliced=((r"mlp\.gate\.weight", 0),),
    counts=(("num_experts",),),
)
HUNYUAN = replace(OLMOE, sliced=((r"mlp\.gate\.wg\.weight", 0),))
GRANITE = replace(
    MIXTRAL,
    experts=None,
    sliced=(
        (r"block_sparse_moe\.(input|output)_linear\.weight", 0),
        (r"block_sparse_moe\.router\.layer\.weight", 0),
    ),
)
LAYOUTS = {
    "mixtral": MIXTRAL,
    "phimoe": MIXTRAL,
    "olmoe": OLMOE,
    "jamba": replace(
        OLMOE,
        experts=r"feed_forward\.experts\.(\d+)\.(?:gate|up|down)_proj\.weight$",
        sliced=((r"feed_forward\.router\.weight", 0),),
    ),
    "minimax_m2": MINIMAX,
    "minimax_m3": replace(
        MINIMAX,
        layers=r"language_model\.model\.layers\.(\d+)\.",
        mtp=r"language_model\.model\.mtp\.layers\.(\d+)\.transformer_layer\.",
        counts=(("text_config", "num_local_experts"),),
    ),
    "minimax_m3_text": replace(
        MINIMAX,
        experts=None,
        sliced=(
            (r"mlp\.experts\.(gate_up|down)_proj", 0),
            (r"mlp\.gate\.(weight|e_score_correction_bias)", 0),
        ),
    ),
    "hunyuan_v1_moe": HUNYUAN,
    "hunyuan_v1_moe_lists": replace(HUNYUAN, counts=(("num_experts", 0), ("num_experts", 1))),
    "granitemoe": GRANITE,
    "granitemoe_renamed": replace(
        GRANITE,
        sliced=(
            (r"block_sparse_moe\.experts\.(gate_up|down)_proj", 0),
            (r"block_sparse_moe\.router\.weight", 0),
        ),
    ),
    "granitemoeshared": GRANITE,
    "granitemoehybrid": GRANITE,
}
MAIN_LAYERS = {"jamba": 4, "minimax_m3": 3, "minimax_m3_text": 3}
PRUNED_LAYERS = {
    "jamba": {1, 3},
    "minimax_m2": {0, 1, 2},
    "minimax_m3": {1, 2, 3},
    "minimax_m3_text": {1, 2},
}

SOFTMAX_NOT_RENORMALISED = {"olmoe", "jamba"}
TO_THE_LAST_BIT = {name for name in LAYOUTS if name.startswith(("minimax", "granite"))}
NOT_IN_TRANSFORMERS = {"hunyuan_v1_moe_lists"}
MODEL_CLASSES: dict[str, Any] = {
    "minimax_m3": AutoModelForImageTextToText,
    "minimax_m3_text": MiniMaxM3VLForCausalLM,
}
# Published tensors that the class does not read and does not say so: MiniMax-M2's MTP layer.
UNREAD = {"minimax_m2": r"model\.layers\.2\."}

each_family = pytest.mark.parametrize("name", list(BUILDERS))
each_runnable_family = pytest.mark.parametrize(
    "name", sorted(BUILDERS.keys() - NOT_IN_TRANSFORMERS)
)


@pytest.fixture(scope="session")
def pair_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    """Family → its fixture, built and pruned once in a session."""

    @cache
    def pair(name: str) -> Pair:
        return build_and_prune(name, BUILDERS[name], tmp_path_factory.mktemp(name))

    return pair


@each_family
def test_every_tensor_is_the_sources_renumbered_or_sliced(
    name: str, pair_of: Callable[[str], Pair]
) -> None:
    assert_tensors_follow(pair_of(name), LAYOUTS[name], MAIN_LAYERS.get(name, 2))


@each_family
def test_every_layer_with_experts_is_pruned_mtp_layers_too(
    name: str, pair_of: Callable[[str], Pair]
) -> None:
    assert pair_of(name).retained.keys() == PRUNED_LAYERS.get(name, {0, 1})


@each_family
def test_the_count_is_rewritten_and_nothing_else_in_the_config(
    name: str, pair_of: Callable[[str], Pair]
) -> None:
    assert_config_follows(pair_of(name), LAYOUTS[name])


@each_runnable_family
def test_the_pruned_model_is_the_original_that_cannot_choose_the_pruned_experts(
    name: str, pair_of: Callable[[str], Pair]
) -> None:
    pair = pair_of(name)
    model_class = MODEL_CLASSES.get(name, AutoModelForCausalLM)
    unread = UNREAD.get(name, r"(?!)")
    source = load(pair.source, model_class, unread)
    result = logits(load(pair.folder, model_class, unread))
    masked = logits(source, pair.retained, relation=name in SOFTMAX_NOT_RENORMALISED)
    if name in TO_THE_LAST_BIT:
        assert torch.equal(result, masked)
    else:
        assert_equal_but_for_rounding(result, masked, pair.source)
    # Without the mask they must differ, or the equality above proves nothing.
    assert (result - logits(source)).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["minimax_m2", "minimax_m3"])
def test_mtp_layers_can_go_and_their_count_with_them(name: str, tmp_path: Path) -> None:
    options = ("--ratio", "0.5", "--mtp", "drop")
    pair = build_and_prune(name, BUILDERS[name], tmp_path, *options)
    main = replace(LAYOUTS[name], mtp=None)
    owned = re.compile(r"model\.layers\.2\." if name == "minimax_m2" else r".*\.mtp\.")
    source, result = read_tensors(pair.source), read_tensors(pair.folder)
    assert any(owned.match(tensor) for tensor in source)
    assert not any(owned.match(tensor) for tensor in result)
    # What is not of a pruned layer and not of the MTP layers is all still there.
    others = {
        tensor: source[tensor]
        for tensor in source
        if not owned.match(tensor) and not re.match(main.layers, tensor)
    }
    assert others.keys() <= result.keys()
    assert all(same_bits(result[tensor], others[tensor]) for tensor in others)
    config = read_config(pair.folder)
    assert config.get("text_config", config)["num_mtp_modules"] == 0
