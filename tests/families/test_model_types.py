"""Every model type of the installed transformers that has experts, and what becomes of it.

A type has experts where its config, or a part of it, has a field that counts them, or where a
fresh config of it does. Each is declared, refused with the reason that stands in a declaration, or
listed below as neither: nothing falls through. What is declared is pruned at the widths of a fresh
config, in headers alone (`tests/support/hollow.py`), and verified; its bytes and logits are for
the tests of its family.
"""

from __future__ import annotations

import inspect
import json
import random
import re
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from shardsurgeon import plan
from shardsurgeon.checkpoint.anatomy import read_anatomy
from shardsurgeon.checkpoint.checkpoint import open_checkpoint
from shardsurgeon.errors import FamilyError
from shardsurgeon.families.schema import family_for
from shardsurgeon.verification.verify import verify_checkpoint
from tests.support.hollow import HollowSource, carried_out, shard, whole

COUNTS = re.compile(r"(?:n_routed|num_local|moe_num|num|n)_experts")

DECLARED = "declared"
HUNYUAN = {"head_dim": 128, "num_key_value_heads": 8}
GEMMA = {"enable_moe_block": True, "moe_intermediate_size": 704, "num_experts": 128}
GEMMA |= {"top_k_experts": 8}
OCR = {"num_experts_per_tok": 6, "mlp_layer_types": ["dense", *["sparse"] * 31]}
INDEXED = {"indexer_n_heads": 8, "indexer_kv_heads": 1, "indexer_head_dim": 256}
INDEXED |= {"indexer_budget": 512, "indexer_compress_ratio": 4}
# What no declaration speaks of; `--family auto` reads those whose names leave no doubt.
UNDECLARED: set[str] = set()
# Refused, and why: a word of the reason that a user is told.
REASONS = {
    "doge": "product keys",
    "dots3_note_vision_encoder": "vision encoder",
    "ernie4_5_vl_moe": "two sets of experts",
    "ernie4_5_vl_moe_text": "two sets of experts",
    "jetmoe": "attention heads are experts",
    "nllb-moe": "encoder and decoder",
    "qwen3_omni_moe_talker_text": "talker",
    "switch_transformers": "encoder and decoder",
    "vitpose": "one for each data set",
    "vitpose_backbone": "one for each data set",
    "zaya": "skips the layer",
}


# Types whose fresh config makes no model, or none with experts, and what it lacks; None: there is
# no class for that part of a model alone.
CHANGES: dict[str, dict[str, object] | None] = {
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 8}},
    "deepseek_ocr2": {"text_config": OCR},
    "deepseek_ocr2_text": None,
    "deepseek_v2": {"num_experts_per_tok": 6},
    "diffusion_gemma": {"text_config": GEMMA},
    "diffusion_gemma_text": None,
    "dots1": {"n_routed_experts": 128, "n_shared_experts": 2, "num_experts_per_tok": 6},
    "flex_olmo": {"num_experts_per_tok": 3},
    "gemma4": {"text_config": GEMMA},
    "gemma4_text": GEMMA,
    "hunyuan_v1_moe": {**HUNYUAN, "num_experts": 16, "moe_topk": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "qwen3_omni_moe": None,
    "qwen3_omni_moe_text": None,
    "qwen4_exp": {"text_config": INDEXED},
    "qwen4_exp_text": INDEXED,
    "step3p5": None,
    "unlimited_ocr_text": None,
}


@cache
def with_experts() -> tuple[str, ...]:
    return tuple(name for name, config in CONFIG_MAPPING.items() if has_experts(config))


def has_experts(config: Any) -> bool:
    parts = (config, *getattr(config, "sub_configs", {}).values())
    if any(COUNTS.fullmatch(name) for part in parts for name in fields(part)):
        return True
    # Some configs take their parts from a default only. A few cannot be made without arguments.
    with suppress(Exception):
        return any(COUNTS.fullmatch(key) for key in keys(config().to_dict()))
    return False


def fields(config: Any) -> Iterator[str]:
    for base in config.__mro__ if inspect.isclass(config) else ():
        yield from vars(base).get("__annotations__", {})


def keys(node: object) -> Iterator[str]:
    for key, value in node.items() if isinstance(node, dict) else ():
        yield str(key)
        yield from keys(value)


def outcome(model_type: str) -> str:
    """What a config of this type is for: a declaration, its refusal, or the message without one."""
    try:
        family = family_for({"model_type": model_type, "num_experts": 8}, model_type)
    except FamilyError as error:
        return str(error)
    return family.refusal or DECLARED


def test_every_type_with_experts_is_declared_or_refused_or_listed() -> None:
    assert len(with_experts()) > 90
    outcomes = {name: outcome(name) for name in with_experts()}
    declared = {name for name, said in outcomes.items() if said == DECLARED}
    undeclared = {name for name, said in outcomes.items() if "is not supported" in said}
    assert undeclared == UNDECLARED
    assert outcomes.keys() - declared - undeclared == REASONS.keys()


@pytest.mark.parametrize("model_type", REASONS)
def test_what_is_refused_is_refused_with_its_own_reason(model_type: str) -> None:
    assert REASONS[model_type] in outcome(model_type)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", with_experts())
def test_a_declared_type_is_pruned_at_its_own_widths(model_type: str, tmp_path: Path) -> None:
    if outcome(model_type) != DECLARED:
        pytest.skip("not declared")
    changes = CHANGES.get(model_type, {})
    if changes is None:
        pytest.skip("transformers has no class for it, or builds it inside of another one only")
    config = CONFIG_MAPPING[model_type](**changes)
    model = model_of(config)
    specs = [
        (name, "I64" if name.endswith("tid2eid") else "BF16", tuple(tensor.shape))
        for name, tensor in model.state_dict().items()
        # What is tied to another weight is not saved.
        if name not in model.all_tied_weights_keys
    ]
    text = json.dumps(config.to_dict(), default=str).encode()
    source = HollowSource("m", {"config.json": whole(text), "model.safetensors": shard(specs)})
    checkpoint = open_checkpoint(source)
    layers = read_anatomy(checkpoint).layers
    draw = random.Random(1)
    scores = {each.index: [draw.random() for _ in range(each.num_experts)] for each in layers}
    path = tmp_path / "scores.json"
    path.write_text(json.dumps(scores))
    made = plan(checkpoint, path, ratio=0.25, out=tmp_path / "out")
    result = carried_out(made.plan, source, "pruned")
    assert verify_checkpoint(checkpoint, result, sample=0).differences == ()
    assert made.decision.kept < layers[0].num_experts


def model_of(config: Any) -> Any:
    """The model of a config on the meta device: the whole one, the one for text, the bare one."""
    mappings = [
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING,
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    ]
    if "text_config" in config.sub_configs:
        mappings.reverse()
    for mapping in (*mappings, modeling_auto.MODEL_MAPPING):
        if type(config) in mapping:
            with torch.device("meta"):
                return mapping[type(config)](config)
    raise AssertionError(f"no class for {config.model_type}")


def test_what_is_undeclared_is_never_called_dense() -> None:
    for name in with_experts():
        assert "dense" not in outcome(name), name
