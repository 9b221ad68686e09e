"""Our result against compressed-tensors' own expert pruner, byte by byte.

`convert_checkpoint` with `MagnitudeExpertPruner` does part of our work: it streams shards, drops
experts, slices routers and biases. On every layout that it prunes correctly both must write the
same tensors for the same keep-lists. Where it does not, see test_compressed_tensors_defects.py.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams

from tests.families.specimens import fixture, written
from tests.oracle.byte_oracle import read_config, read_tensors
from tests.peers.magnitude_pruner import (
    GEMMA,
    GRANITE,
    HUNYUAN,
    MIXER,
    MLP,
    ROUTER,
    SPARSE,
    STEP,
    Retained,
    differing,
    groups_of,
    layer_numbers,
    ours,
    pruner,
    scored,
    theirs,
    told_of,
)

pytestmark = pytest.mark.oracle

EXACT = {
    **dict.fromkeys(
        [
            *("qwen3_moe", "qwen2_moe", "qwen3_next", "qwen3_vl_moe", "qwen3_omni_moe_thinker"),
            *("kimi_k2", "kimi_k25", "deepseek_v2_lite", "dots1", "glm4_moe", "glm4_moe_lite"),
            *("glm_moe_dsa", "mimo_v2_flash", "mimo_v2_omni", "bailing_moe", "olmoe"),
            "minimax_m3_text",
        ],
        MLP,
    ),
    **dict.fromkeys(["mixtral", "phimoe"], SPARSE),
    **dict.fromkeys(["hunyuan_v1_moe", "hunyuan_v1_moe_lists"], HUNYUAN),
    **dict.fromkeys(["granitemoe", "granitemoeshared", "granitemoehybrid"], GRANITE),
    **dict.fromkeys(
        ["jamba", "gpt_oss_bf16", "llama4", "llama4_quantized", "granitemoe_renamed"], ROUTER
    ),
    # What its default pattern of per-expert vectors does not find, it must be told of.
    **dict.fromkeys(
        ["kimi_linear", "kimi_k3", "minimax_m2", "minimax_m3"],
        told_of(SPARSE, r"e_score_correction_bias$"),
    ),
    **dict.fromkeys(
        ["step3p5", "step3p5_quantized", "step3p7"], told_of(STEP, r"moe\.router_bias$")
    ),
    "gemma4": told_of(GEMMA, r"per_expert_scale$"),
}
# Group-limited routing: correct for a keep-list that takes as many from every group.
GROUPED = {
    **dict.fromkeys(["deepseek_v2", "deepseek_v3", "deepseek_v32"], MLP),
    **dict.fromkeys(
        ["bailing_moe_v2", "bailing_hybrid"],
        told_of(MLP, r"gate\.(expert_bias|e_score_correction_bias)$"),
    ),
    **dict.fromkeys(
        ["nemotron_h", "nemotron_h_latent"], told_of(MIXER, r"e_score_correction_bias$")
    ),
}


@pytest.mark.parametrize("name", EXACT)
def test_the_same_keep_lists_give_the_same_bytes(name: str, tmp_path: Path) -> None:
    source = written(fixture(name), tmp_path)
    their = pruner(source, EXACT[name])
    mine, other = ours(source, their.retained_experts), theirs(source, their)
    assert differing(mine, other) == []
    assert total_size(mine) == total_size(other)


@pytest.mark.parametrize("name", GROUPED)
def test_the_same_keep_lists_give_the_same_bytes_in_groups(name: str, tmp_path: Path) -> None:
    source = written(fixture(name), tmp_path)
    their = pruner(source, GROUPED[name])
    their.retained_experts = equal_groups(source, their.retained_experts)
    assert differing(ours(source, their.retained_experts), theirs(source, their)) == []
    # And the keep-lists of each group are those of our router scores.
    numbers = layer_numbers(source)
    assert {numbers[router]: ids for router, ids in their.retained_experts.items()} == (
        scored(source)
    )


@pytest.mark.parametrize("sparsity", [0.25, 0.75])
def test_it_holds_at_other_sparsities(sparsity: float, tmp_path: Path) -> None:
    source = written(fixture("kimi_k25"), tmp_path)
    their = pruner(source, MLP, sparsity)
    assert {len(ids) for ids in their.retained_experts.values()} == {32 - int(32 * sparsity)}
    assert differing(ours(source, their.retained_experts), theirs(source, their)) == []


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_it_holds_for_packed_integers_with_and_without_zero_points(
    bits: int, symmetric: bool, tmp_path: Path
) -> None:
    """Made here: per-expert pack-quantized weights, and the quantization named at the top."""
    plain = fixture("qwen3_moe")
    weights: dict[str, Any] = {"num_bits": bits, "symmetric": symmetric, "strategy": "group"}
    group = {"weights": {**weights, "group_size": 8}, "targets": ["Linear"]}
    config = {
        "config_groups": {"group_0": group},
        "format": "pack-quantized",
        "ignore": ["lm_head", "re:.*self_attn.*", "re:.*mlp.gate$"],
        "quant_method": "compressed-tensors",
    }
    made = replace(
        plain,
        config={**plain.config, "quantization_config": config},
        tensors=packed(plain.tensors, QuantizationScheme.model_validate(group)),
    )
    source = written(made, tmp_path)
    found = {name.rpartition(".")[2] for name in read_tensors(source) if ".experts." in name}
    assert ("weight_zero_point" in found) is not symmetric
    their = pruner(source, MLP)
    mine, other = ours(source, their.retained_experts), theirs(source, their)
    assert differing(mine, other) == []
    # It writes the same quantization in more words; ours is the source's.
    said, kept = (read_config(folder)["quantization_config"] for folder in (other, mine))
    assert kept == config
    said.pop("version")
    assert QuantizationConfig.model_validate(said) == QuantizationConfig.model_validate(kept)


def packed(tensors: dict[str, torch.Tensor], scheme: QuantizationScheme) -> dict[str, torch.Tensor]:
    """The expert weights as compressed-tensors packs them."""
    out = {}
    for name, weight in tensors.items():
        if ".experts." not in name:
            out[name] = weight
            continue
        grouped = weight.float().reshape(weight.shape[0], -1, scheme.weights.group_size)
        scale, zero = calculate_qparams(grouped.amin(-1), grouped.amax(-1), scheme.weights)
        local = {"weight": weight, "weight_scale": scale.to(torch.bfloat16)}
        if not scheme.weights.symmetric:
            local["weight_zero_point"] = zero
        stem = name.removesuffix("weight")
        for key, value in PackedQuantizationCompressor.compress(local, scheme).items():
            out[stem + key] = value
    return out


@pytest.mark.parametrize("name", EXACT)
def test_our_router_scores_retain_the_experts_that_it_retains(name: str, tmp_path: Path) -> None:
    """It adds the magnitudes up in the router's own dtype: some of its sums are equal where
    ours are not, and which of those it keeps is the business of its sort."""
    source = written(fixture(name), tmp_path)
    their, mine = pruner(source, EXACT[name]), scored(source)
    numbers, tensors = layer_numbers(source), read_tensors(source)
    assert mine.keys() == {numbers[router] for router in their.retained_experts}
    for router, ids in their.retained_experts.items():
        sums = tensors[router].abs().sum(-1)
        cut = sums.topk(len(ids)).values.min()
        assert len(mine[numbers[router]]) == len(ids)
        assert all(sums[expert] == cut for expert in set(mine[numbers[router]]) ^ set(ids))


@pytest.mark.parametrize("name", ["qwen3_moe", "kimi_k25", "mixtral", "gpt_oss_bf16", "jamba"])
def test_the_config_says_the_same(name: str, tmp_path: Path) -> None:
    source = written(fixture(name), tmp_path)
    their = pruner(source, EXACT[name])
    mine, other = ours(source, their.retained_experts), theirs(source, their)
    assert read_config(mine) == read_config(other) != read_config(source)


def total_size(folder: Path) -> int:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    size: int = index["metadata"]["total_size"]
    return size


def equal_groups(source: Path, retained: Retained) -> Retained:
    """The best half of every group of each router, by the sum of magnitudes."""
    tensors, groups, out = read_tensors(source), groups_of(source), {}
    for name in retained:
        sums = tensors[name].double().abs().sum(-1).reshape(groups, -1)
        size = sums.shape[1]
        best = sums.topk(size // 2).indices + torch.arange(groups)[:, None] * size
        out[name] = sorted(best.flatten().tolist())
    return out
