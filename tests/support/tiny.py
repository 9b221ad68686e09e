"""A tiny checkpoint in memory, written by the safetensors library, for tests to spoil.

DeepSeek-V3 names: dense layer 0, MoE layers 1 and 2, an MTP layer 3 with experts, 8 experts of
width 4, two shards.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from shardsurgeon.storage.source import MemorySource

HIDDEN, WIDTH, EXPERTS = 6, 4, 8

Tensors = dict[str, NDArray[np.generic]]


def config(**changes: object) -> dict[str, object]:
    """config.json's content; a change to None removes the key."""
    content: dict[str, object] = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "n_group": 1,
        "n_routed_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 3,
        "num_nextn_predict_layers": 1,
        "topk_group": 1,
    }
    content.update(changes)
    return {key: value for key, value in content.items() if value is not None}


def tensors(seed: int = 0) -> Tensors:
    """Every tensor of the checkpoint, float32 with values that all differ."""
    numbers = np.random.default_rng(seed)

    def fresh(*shape: int) -> NDArray[np.generic]:
        return numbers.standard_normal(shape).astype(np.float32)

    found: Tensors = {"model.embed_tokens.weight": fresh(16, HIDDEN)}
    for layer in range(4):
        prefix = f"model.layers.{layer}"
        found[f"{prefix}.input_layernorm.weight"] = fresh(HIDDEN)
        found[f"{prefix}.self_attn.o_proj.weight"] = fresh(HIDDEN, EXPERTS)
        if layer == 0:
            found[f"{prefix}.mlp.up_proj.weight"] = fresh(EXPERTS, HIDDEN)
            continue
        for expert in range(EXPERTS):
            found[f"{prefix}.mlp.experts.{expert}.up_proj.weight"] = fresh(WIDTH, HIDDEN)
            found[f"{prefix}.mlp.experts.{expert}.down_proj.weight"] = fresh(HIDDEN, WIDTH)
        found[f"{prefix}.mlp.gate.weight"] = fresh(EXPERTS, HIDDEN)
        found[f"{prefix}.mlp.gate.e_score_correction_bias"] = fresh(EXPERTS)
        found[f"{prefix}.mlp.shared_experts.up_proj.weight"] = fresh(EXPERTS, HIDDEN)
    found["model.layers.3.eh_proj.weight"] = fresh(HIDDEN, 2 * HIDDEN)
    found["model.norm.weight"] = fresh(HIDDEN)
    return found


def files(
    content: dict[str, object] | None = None,
    weights: Tensors | None = None,
    shard_of: Callable[[str], int] = lambda name: 2 if "layers.2" in name else 1,
) -> dict[str, bytes]:
    """The checkpoint's files, name → bytes."""
    weights = tensors() if weights is None else weights
    shards: dict[str, Tensors] = {}
    for name, values in weights.items():
        shards.setdefault(f"model-0000{shard_of(name)}-of-00002.safetensors", {})[name] = values
    weight_map = {name: file for file, held in shards.items() for name in held}
    size = sum(values.nbytes for values in weights.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    return {
        "config.json": json.dumps(content or config(), indent=2).encode(),
        "model.safetensors.index.json": json.dumps(index).encode(),
        "tokenizer.json": b"{}",
        **{file: save(held, {"format": "pt"}) for file, held in shards.items()},
    }


def source(**arguments: object) -> MemorySource:
    """The checkpoint as a source; arguments as for `files`."""
    return MemorySource(files(**arguments), name="tiny")  # type: ignore[arg-type]
