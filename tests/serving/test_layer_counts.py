"""A model whose layers keep different numbers is the original that cannot choose the rest.

No class of transformers is built that way, and what stands beside this is the whole model with its
routers masked, as in tests/families.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import shardsurgeon
from shardsurgeon.checkpoint.anatomy import read_anatomy
from shardsurgeon.errors import ConfigError
from shardsurgeon.serving import load_pruned
from tests.families import masked_router
from tests.families.specimens import fixture, written
from tests.oracle.closeness import assert_equal_but_for_rounding
from tests.serving.test_load_pruned import Pruned, assert_same

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.filterwarnings("ignore:`rope_scaling` is deprecated:FutureWarning"),
]

# Experts one by one and stacked, in a block or in the layer itself; routers with biases, in groups,
# with tables of ids; layers without experts between the others; wrappers that see; quantized.
FAMILIES = [
    "qwen3_moe",
    "qwen3_5_moe",
    "deepseek_v3",
    "deepseek_v4",
    "kimi_linear",
    "gemma4",
    "gpt_oss_bf16",
    "granitemoehybrid",
    "jamba",
    "llama4",
    "longcat_flash_resaved",
    "minimax_m2",
    "mixtral",
    "nemotron_h",
    "olmoe",
    "qwen2_moe",
    "qwen3_next",
    "fp8_channel",
    "fp8_tensor",
]
Lists = dict[int, list[int]]


def keep_lists(source: Path) -> Lists:
    """Half of every layer's experts, but for the first layer and MTP layers, which keep them all,
    and the last one, which keeps one in four where it can."""
    anatomy = read_anatomy(shardsurgeon.open_checkpoint(source))
    keep = shardsurgeon.plan(source, source / "scores.pt", ratio=0.5).decision.keep
    lists = {layer: list(each.retained) for layer, each in keep.layers.items()}
    main = [layer.index for layer in anatomy.main_layers]
    for layer, each in keep.layers.items():
        if layer == main[0] or layer not in main:
            lists[layer] = list(range(each.num_experts))
    fewer = lists[main[-1]][: len(lists[main[-1]]) // 2]
    if len(main) > 2 and anatomy.n_group == 1 and len(fewer) >= anatomy.top_k:
        lists[main[-1]] = fewer
    return lists


def unequal(name: str, folder: Path) -> tuple[Pruned, Lists]:
    source = written(fixture(name), folder)
    lists = keep_lists(source)
    file = folder / "lists.json"
    file.write_text(json.dumps({layer: {"kept": ids} for layer, ids in lists.items()}))
    return Pruned(source, folder, plan_file=file, allow_nonuniform=True), lists


def logits(model: Any, experts: int, kept: Lists | None) -> torch.Tensor:
    tokens = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(7))
    with torch.inference_mode():
        # Of a quantized model the first call decodes the weights, and changes forwards for it.
        model(input_ids=tokens, use_cache=False)
        with masked_router._masks(model, experts, kept):
            found: torch.Tensor = model(input_ids=tokens, use_cache=False).logits
    assert torch.isfinite(found).all()
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_layers_of_different_counts_are_the_masked_original(name: str, tmp_path: Path) -> None:
    pruned, lists = unequal(name, tmp_path)
    experts = max(map(len, lists.values()))
    how = {
        "dtype": torch.float32,
        "attn_implementation": "eager",
        "experts_implementation": "eager",
    }
    result, report = load_pruned(pruned.view, output_loading_info=True, **how)
    assert not report["missing_keys"] and not report["mismatched_keys"]
    whole = type(result).from_pretrained(pruned.source, **how)
    masked = logits(whole, experts, lists)
    assert_equal_but_for_rounding(logits(result, experts, None), masked, pruned.source)
    whole = type(result).from_pretrained(pruned.source, **how)
    assert (masked - logits(whole, experts, None)).abs().max() > 1e-3


def test_a_model_and_its_plan_are_the_view(tmp_path: Path) -> None:
    pruned, lists = unequal("qwen3_moe", tmp_path)
    result = load_pruned((pruned.source, pruned.plan))
    assert_same(result, load_pruned(pruned.view))
    assert type(result) is transformers.Qwen3MoeForCausalLM
    found = [layer.mlp.experts.gate_up_proj.shape[0] for layer in result.model.layers]
    assert found == [layer.mlp.gate.weight.shape[0] for layer in result.model.layers]
    assert found == [len(kept) for kept in lists.values()] and len(set(found)) == 3
    tokens = torch.tensor([[5, 6, 7]])
    assert result.generate(tokens, max_new_tokens=3, do_sample=False).shape == (1, 6)


def test_transformers_alone_does_not_load_such_a_model_rightly(tmp_path: Path) -> None:
    """What this is for: the class itself is built with one count, and finds other shapes."""
    pruned, _ = unequal("qwen3_moe", tmp_path)
    with pytest.raises((RuntimeError, AttributeError)):
        transformers.AutoModelForCausalLM.from_pretrained(pruned.folder)


@pytest.mark.parametrize(("name", "path"), [("mixtral", ()), ("dbrx", ("ffn_config",))])
def test_overrides_that_stop_other_loaders_do_not_stop_this_one(
    name: str, path: tuple[str, ...], tmp_path: Path
) -> None:
    pruned, lists = unequal(name, tmp_path)
    before = load_pruned(pruned.view)
    config = json.loads((pruned.view / "config.json").read_text())
    count = {"mixtral": "num_local_experts", "dbrx": "moe_num_experts"}[name]
    overrides: dict[str, Any] = {}
    for layer, kept in lists.items():
        overrides[str(layer)] = {count: len(kept)}
        for key in path:
            overrides[str(layer)] = {key: overrides[str(layer)]}
    (pruned.view / "config.json").write_text(json.dumps({**config, "per_layer_config": overrides}))
    after = load_pruned(pruned.view)
    assert_same(after, before)
    assert "per_layer_config" not in after.config.to_dict()


def test_experts_that_a_quantization_builds_for_itself_are_refused(tmp_path: Path) -> None:
    """llama4's are taken apart by transformers, in every layer as many as the config says."""
    pruned, _ = unequal("llama4_quantized", tmp_path)
    config = json.loads((pruned.view / "config.json").read_text())
    (group,) = config["quantization_config"]["config_groups"].values()
    group["weights"]["type"] = "int"
    config["quantization_config"]["format"] = "int-quantized"
    (pruned.view / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="which layer 3 does not have"):
        load_pruned(pruned.view)
