"""Run layer by layer, every family has the sums of the whole model in memory."""

from __future__ import annotations

import re
from copy import deepcopy
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from shardsurgeon.checkpoint.anatomy import read_anatomy
from shardsurgeon.checkpoint.checkpoint import open_checkpoint
from shardsurgeon.errors import InputError
from shardsurgeon.layerwise.schedule import Hold
from tests.families.specimens import builders, fixture, written
from tests.layerwise import in_memory
from tests.layerwise.streaming import stream, token_ids

pytestmark = [
    pytest.mark.oracle,
    # A published key that transformers reads but calls old.
    pytest.mark.filterwarnings("ignore:`rope_scaling` is deprecated:FutureWarning"),
]

# transformers has no class for these, or only remote code runs them.
NOT_IN_TRANSFORMERS = {
    "bailing_moe",
    "bailing_moe_v2",
    "deepseek_ocr",
    "deepseek_v4_vision",
    "deepseek_v41",
    "deepseek_v41_even",
    "deepseek_vl2",
    # Its fixture holds the decoder's layers alone.
    "diffusion_gemma",
    "hunyuan_v1_moe_lists",
    "interns1",
    "internvl_gpt_oss",
    "internvl_qwen3_moe",
    "kimi_k3",
    "kimi_vl",
    "nemotron_h_puzzle",
    "ovis2_6_moe",
    # It is in transformers, but the engine does not find a layer's weights outside of the layers.
    "inkling2",
    "inkling2_mxfp8",
    "inkling_nvfp4",
    "arctic",
    "dbrx",
    "grok1",
    "grok2",
    "longcat_flash_ngram",
    "minimax_m1",
    "mistral_native",
    "sarvam_mla",
    "sarvam_moe",
    "step3_text",
    "step3_vl",
    "step5",
}
# The same model in another spelling, which `from_pretrained` does not read.
TWINS = {
    "bailing_hybrid_vision": "bailing_hybrid",
    "ernie4_5_moe_remote": "ernie4_5_moe",
    "mimo_v2_omni": "mimo_v2_flash",
    "step3p5": "step3p7",
    "step3p5_quantized": "step3p7",
}
SCHEMES = import_module("builders.schemes").BUILDERS if builders() else {}
FAMILIES = sorted(builders().keys() - NOT_IN_TRANSFORMERS - SCHEMES.keys())


def whole_model(name: str, folder: Path, scratch: Path) -> Any:
    """The model in memory, from the fixture with the same weights that `from_pretrained` reads."""
    twin = TWINS.get(name)
    if twin is None:
        return in_memory.load(name, folder, scratch)
    made = fixture(twin)
    if name.endswith("quantized"):
        rounded = {
            n: t.float().to(torch.float8_e4m3fn).float() if re.search(r"moe\.\w+_proj\.", n) else t
            for n, t in made.tensors.items()
        }
        made = replace(made, tensors=rounded)
    return in_memory.load(twin, written(made, scratch), scratch)


@pytest.mark.parametrize("name", FAMILIES)
def test_streamed_sums_are_those_of_the_model_in_memory(
    name: str, tmp_path: Path, loop: str
) -> None:
    """By each policy in the long loop; else by one, which the next family does not have."""
    folder, ids = written(fixture(name), tmp_path), token_ids()
    expected = in_memory.sums(whole_model(name, folder, tmp_path), ids)
    layers = {layer.index for layer in read_anatomy(open_checkpoint(folder)).main_layers}
    assert expected.keys() == layers
    policies: list[dict[str, Any]] = [{"chunk_tokens": 64}, {"chunk_tokens": 10_000}]
    policies.append({"hold": Hold.LAYER, "grouped": True})  # as on a GPU
    ways = list(zip((1, 2, 6), policies, strict=True))
    turn = FAMILIES.index(name) % len(ways)
    for batch_size, policy in ways if loop == "long" else ways[turn : turn + 1]:
        scratch = tmp_path / f"store{batch_size}"
        streamed = stream(folder, ids, scratch, batch_size=batch_size, **policy)
        in_memory.assert_equal({layer: streamed[layer] for layer in layers}, expected)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("bailing_moe", "it has no model for Ling 1 and 2, which run by remote code"),
        ("dbrx", "experts built like this cannot be run here"),
        ("deepseek_v4_vision", "gate.bias_vl: transformers' model has no place for it"),
        ("diffusion_gemma", "self_conditioning.down_proj.weight: transformers' model needs it"),
        ("hunyuan_v1_moe_lists", "'num_experts' expected int, got list"),
        ("internvl_qwen3_moe", "it does not know model type 'internvl_chat'"),
        ("inkling2", "layers.0.mlp_input.query: transformers' model needs it"),
        ("inkling2_mxfp8", "layers.0.mlp_input.query: transformers' model needs it"),
        ("inkling_nvfp4", "has no scale that fits"),
        ("kimi_k3", "it has no model for Kimi-K3's latent experts"),
        ("nemotron_h_puzzle", "it has no model whose layers differ in their experts"),
    ],
)
def test_what_transformers_cannot_run_is_refused_by_name(
    name: str, says: str, tmp_path: Path
) -> None:
    folder = written(fixture(name), tmp_path)
    with pytest.raises(InputError, match=re.escape(says)):
        stream(folder, token_ids(), tmp_path / "store")


def test_layers_that_share_keys_run_together_and_know_their_embeddings(tmp_path: Path) -> None:
    """Gemma 4 as its small models are: the last layer uses keys of another one, and every layer
    is given an embedding of its own."""
    whole = deepcopy(fixture("gemma4").config)
    whole["text_config"] |= {
        "hidden_size_per_layer_input": 8,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "num_kv_shared_layers": 1,
        "vocab_size_per_layer_input": whole["text_config"]["vocab_size"],
    }
    config = transformers.Gemma4Config.from_dict(whole)
    torch.manual_seed(11)
    model = transformers.Gemma4ForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    model.save_pretrained(tmp_path / "saved")
    folder, ids = tmp_path / "saved", token_ids()
    expected = in_memory.sums(in_memory.load("gemma4", folder, tmp_path), ids)
    assert len(expected) == 3
    in_memory.assert_equal(stream(folder, ids, tmp_path / "store"), expected)
