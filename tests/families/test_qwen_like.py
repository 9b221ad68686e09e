"""Qwen2-MoE, Qwen3-Next, Qwen3-VL-MoE, Qwen3-Omni-MoE: bytes, config and logits of a prune.

Qwen2-MoE takes a softmax over all experts and does not renormalise its choice; see
`masked_model` for the relation its pruned gate weights must have. The others renormalise.
transformers reads neither Qwen3-Next's MTP layer nor, in the thinker's class, the talker:
those are compared byte by byte only.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Qwen3OmniMoeThinkerForConditionalGeneration,
)

from tests.families.masked_model import load, logits
from tests.families.pruned_pair import (
    Layout,
    Pair,
    assert_config_follows,
    assert_tensors_follow,
    build_and_prune,
    builders,
)
from tests.oracle.byte_oracle import read_config, read_tensors
from tests.oracle.closeness import assert_equal_but_for_rounding

pytestmark = pytest.mark.oracle

BUILDERS = builders("qwen_like")

QWEN2 = Layout(
    layers=r"model\.layers\.(\d+)\.",
    experts=r"mlp\.experts\.(\d+)\.(?:gate|up|down)_proj\.weight$",
    sliced=((r"mlp\.gate\.weight", 0),),
    counts=(("num_experts",),),
)
OMNI = replace(
    QWEN2,
    layers=r"thinker\.model\.layers\.(\d+)\.",
    counts=(("thinker_config", "text_config", "num_experts"),),
)
LAYOUTS = {
    "qwen2_moe": QWEN2,
    "qwen3_next": replace(QWEN2, mtp=r"mtp\.layers\.(\d+)\."),
    "qwen3_vl_moe": Layout(
        layers=r"model\.language_model\.layers\.(\d+)\.",
        experts=None,
        sliced=((r"mlp\.gate\.weight", 0), (r"mlp\.experts\.(gate_up|down)_proj", 0)),
        counts=(("text_config", "num_experts"),),
    ),
    "qwen3_omni_moe": OMNI,
    "qwen3_omni_moe_thinker": replace(OMNI, counts=(("text_config", "num_experts"),)),
}
MAIN_LAYERS = {"qwen2_moe": 3, "qwen3_next": 4}
PRUNED_LAYERS = {"qwen2_moe": {0, 2}, "qwen3_next": {0, 1, 2, 3, 4}}
MODEL_CLASSES: dict[str, Any] = {
    "qwen3_vl_moe": AutoModelForImageTextToText,
    "qwen3_omni_moe": Qwen3OmniMoeThinkerForConditionalGeneration,
    "qwen3_omni_moe_thinker": Qwen3OmniMoeThinkerForConditionalGeneration,
}

each_family = pytest.mark.parametrize("name", list(BUILDERS))


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


@each_family
def test_the_pruned_model_is_the_original_that_cannot_choose_the_pruned_experts(
    name: str, pair_of: Callable[[str], Pair]
) -> None:
    pair, model_class = pair_of(name), MODEL_CLASSES.get(name, AutoModelForCausalLM)
    source = load(pair.source, model_class)
    result = logits(load(pair.folder, model_class))
    masked = logits(source, pair.retained, relation=name == "qwen2_moe")
    assert_equal_but_for_rounding(result, masked, pair.source)
    # Without the mask they must differ, or the equality above proves nothing.
    assert (result - logits(source)).abs().max() > 1e-2


def test_qwen3_vl_experts_keep_their_published_orientation(
    pair_of: Callable[[str], Pair],
) -> None:
    tensors = read_tensors(pair_of("qwen3_vl_moe").folder)
    stem = "model.language_model.layers.0.mlp.experts."
    # [E, H, 2I] and [E, I, H] with H 32 and I 24, four of eight experts left.
    assert tensors[stem + "gate_up_proj"].shape == (4, 32, 48)
    assert tensors[stem + "down_proj"].shape == (4, 24, 32)


def test_the_talker_keeps_its_own_experts_and_their_count(
    pair_of: Callable[[str], Pair],
) -> None:
    pair = pair_of("qwen3_omni_moe")
    before, after = read_config(pair.source), read_config(pair.folder)
    thinker = before["thinker_config"]["text_config"]
    assert before["talker_config"]["text_config"]["num_experts"] == thinker["num_experts"]
    assert after["talker_config"] == before["talker_config"]
    tensors = read_tensors(pair.folder)
    assert "talker.model.layers.1.mlp.experts.7.down_proj.weight" in tensors
    assert tensors["talker.model.layers.1.mlp.gate.weight"].shape[0] == 8


def test_a_quantization_list_renumbers_the_thinkers_experts_and_not_the_talkers(
    tmp_path: Path,
) -> None:
    def build() -> Any:
        fixture = BUILDERS["qwen3_omni_moe"]()
        entries = [
            f"{model}.model.layers.1.mlp.experts.{expert}.up_proj"
            for model in ("thinker", "talker")
            for expert in range(8)
        ]
        pattern = r"re:^talker\.model\.layers\.1\.mlp\.experts\.[0-3]\..*"
        quantization = {"quant_method": "compressed-tensors", "ignore": [*entries, pattern]}
        return replace(fixture, config={**fixture.config, "quantization_config": quantization})

    pair = build_and_prune("qwen3_omni_moe", build, tmp_path)
    ignore = read_config(pair.folder)["quantization_config"]["ignore"]
    before = json.loads((pair.source / "config.json").read_text())["quantization_config"]["ignore"]
    assert ignore[:4] == [f"thinker.model.layers.1.mlp.experts.{i}.up_proj" for i in range(4)]
    assert ignore[4:] == before[8:]


def test_qwen3_nexts_mtp_layer_can_go_with_all_that_belongs_to_it(tmp_path: Path) -> None:
    options = ("--ratio", "0.5", "--mtp", "drop")
    pair = build_and_prune("qwen3_next", BUILDERS["qwen3_next"], tmp_path, *options)
    assert pair.retained.keys() == {0, 1, 2, 3}
    names = read_tensors(pair.folder).keys()
    assert not any(name.startswith("mtp.") for name in names)
    assert any(name.startswith("mtp.fc") for name in read_tensors(pair.source))
