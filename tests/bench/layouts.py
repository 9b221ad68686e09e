"""What the checkpoints of the benchmark are made of: tensor names, dtypes, shapes, config.json.

Three layouts, each hard in its own way: `int4` is Kimi-K2.5's, nine tensors per expert; `stacked`
is Qwen3.5's, two bf16 tensors with an expert axis per layer; `tiny` is Kimi-K2.5's with so narrow
matrices that there are 70 tensors to a megabyte.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

WIDTH = {"I32": 4, "BF16": 2, "F32": 4}

Spec = tuple[str, str, tuple[int, ...]]


@dataclass(frozen=True)
class Model:
    """A model's layout and measures; the first layer of a Kimi model is dense."""

    layout: str
    layers: int
    experts: int
    hidden: int
    moe: int
    dense: int
    vocabulary: int
    heads: int
    q_lora: int = 1536
    kv_lora: int = 512
    nope: int = 128
    rope: int = 64
    v_head: int = 128
    vision_blocks: int = 0

    @property
    def moe_layers(self) -> range:
        """The layers that have experts."""
        return range(self.layers) if self.layout == "stacked" else range(1, self.layers)


KIMI = Model("int4", 61, 384, 7168, 2048, 18432, 163840, 64, vision_blocks=27)
# What is not experts is 2 % of the published model. A model of few layers keeps near that share
# only if embeddings, dense layer and vision tower shrink as well.
SMALL_KIMI = replace(KIMI, layers=2, dense=2048, vocabulary=4096, vision_blocks=1)
TINY = Model(
    "tiny", 2, 384, 256, 64, 64, 4096, 4, q_lora=64, kv_lora=64, nope=32, rope=32, v_head=32
)
STACKED = Model("stacked", 1, 256, 2048, 512, 0, 4096, 16)


def sized(layout: str, nbytes: int) -> Model:
    """A model of about so many bytes: as many layers, and in the last step experts, as fit."""
    start = {"int4": SMALL_KIMI, "tiny": TINY, "stacked": STACKED}[layout]
    base = replace(start, layers=start.layers - 1)
    fixed = total(base)
    layers = max(round((nbytes - fixed) / (total(start) - fixed)), 1)
    model = replace(base, layers=base.layers + layers)
    if layers > 3:
        return model
    # A layer is too coarse a step: let the number of experts make up for it.
    layers = math.ceil((nbytes - fixed) / (total(start) - fixed))
    model = replace(base, layers=base.layers + max(layers, 1))
    least = replace(model, experts=32)
    each = (total(model) - total(least)) / (model.experts - 32)
    experts = 32 + (nbytes - total(least)) / each
    return replace(model, experts=min(max(int(experts) // 8 * 8, 32), model.experts))


def total(model: Model) -> int:
    """Bytes of tensor data."""
    return sum(map(nbytes, tensors(model)))


def nbytes(spec: Spec) -> int:
    """Size of a tensor in bytes."""
    return WIDTH[spec[1]] * math.prod(spec[2])


def tensors(model: Model) -> Iterator[Spec]:
    """(name, dtype, shape) of every tensor, in the order in which they are stored."""
    return _stacked(model) if model.layout == "stacked" else _kimi(model)


def config(model: Model) -> dict[str, object]:
    """config.json as published, with this model's counts."""
    return _stacked_config(model) if model.layout == "stacked" else _kimi_config(model)


def _kimi(model: Model) -> Iterator[Spec]:
    prefix, hidden = "language_model.model", model.hidden
    yield f"{prefix}.embed_tokens.weight", "BF16", (model.vocabulary, hidden)
    for layer in range(model.layers):
        yield from _kimi_layer(model, f"{prefix}.layers.{layer}", dense=layer == 0)
    yield f"{prefix}.norm.weight", "BF16", (hidden,)
    yield "language_model.lm_head.weight", "BF16", (model.vocabulary, hidden)
    for block in range(model.vision_blocks):
        prefix = f"vision_tower.encoder.blocks.{block}"
        yield f"{prefix}.wqkv.weight", "BF16", (3456, 1152)
        yield f"{prefix}.wo.weight", "BF16", (1152, 1152)
        yield f"{prefix}.mlp.fc0.weight", "BF16", (4304, 1152)
        yield f"{prefix}.mlp.fc1.weight", "BF16", (1152, 4304)
    if model.vision_blocks:
        yield "mm_projector.proj.0.weight", "BF16", (4608, 4608)
        yield "mm_projector.proj.2.weight", "BF16", (hidden, 4608)


def _kimi_layer(model: Model, prefix: str, *, dense: bool) -> Iterator[Spec]:
    attention, hidden, heads = f"{prefix}.self_attn", model.hidden, model.heads
    yield f"{prefix}.input_layernorm.weight", "BF16", (hidden,)
    yield f"{attention}.q_a_proj.weight", "BF16", (model.q_lora, hidden)
    yield f"{attention}.q_a_layernorm.weight", "BF16", (model.q_lora,)
    yield f"{attention}.q_b_proj.weight", "BF16", (heads * (model.nope + model.rope), model.q_lora)
    yield f"{attention}.kv_a_proj_with_mqa.weight", "BF16", (model.kv_lora + model.rope, hidden)
    yield f"{attention}.kv_a_layernorm.weight", "BF16", (model.kv_lora,)
    width = heads * (model.nope + model.v_head)
    yield f"{attention}.kv_b_proj.weight", "BF16", (width, model.kv_lora)
    yield f"{attention}.o_proj.weight", "BF16", (hidden, heads * model.v_head)
    yield f"{prefix}.post_attention_layernorm.weight", "BF16", (hidden,)
    if dense:
        yield from _mlp(f"{prefix}.mlp", hidden, model.dense)
        return
    yield f"{prefix}.mlp.gate.weight", "BF16", (model.experts, hidden)
    yield f"{prefix}.mlp.gate.e_score_correction_bias", "F32", (model.experts,)
    yield from _mlp(f"{prefix}.mlp.shared_experts", hidden, model.moe)
    projections = {
        "down_proj": (hidden, model.moe),
        "gate_proj": (model.moe, hidden),
        "up_proj": (model.moe, hidden),
    }
    for expert in range(model.experts):
        for projection, (rows, columns) in projections.items():
            name = f"{prefix}.mlp.experts.{expert}.{projection}"
            yield f"{name}.weight_packed", "I32", (rows, columns // 8)
            yield f"{name}.weight_scale", "BF16", (rows, columns // 32)
            yield f"{name}.weight_shape", "I32", (2,)


def _mlp(prefix: str, hidden: int, width: int) -> Iterator[Spec]:
    yield f"{prefix}.gate_proj.weight", "BF16", (width, hidden)
    yield f"{prefix}.up_proj.weight", "BF16", (width, hidden)
    yield f"{prefix}.down_proj.weight", "BF16", (hidden, width)


def _kimi_config(model: Model) -> dict[str, object]:
    text = {
        "model_type": "kimi_k2",
        "num_hidden_layers": model.layers,
        "n_routed_experts": model.experts,
        "num_experts_per_tok": 8,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "first_k_dense_replace": 1,
        "hidden_size": model.hidden,
        "moe_intermediate_size": model.moe,
        "num_nextn_predict_layers": 0,
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": {"num_bits": 4, "group_size": 32, "strategy": "group"},
                }
            },
            "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*"],
        },
    }
    architectures = ["KimiK25ForConditionalGeneration"]
    return {"architectures": architectures, "model_type": "kimi_k25", "text_config": text}


def _stacked(model: Model) -> Iterator[Spec]:
    prefix, hidden, heads = "model.language_model", model.hidden, model.heads
    yield f"{prefix}.embed_tokens.weight", "BF16", (model.vocabulary, hidden)
    for layer in range(model.layers):
        at = f"{prefix}.layers.{layer}"
        yield f"{at}.input_layernorm.weight", "BF16", (hidden,)
        yield f"{at}.self_attn.q_proj.weight", "BF16", (2 * heads * 256, hidden)
        yield f"{at}.self_attn.k_proj.weight", "BF16", (512, hidden)
        yield f"{at}.self_attn.v_proj.weight", "BF16", (512, hidden)
        yield f"{at}.self_attn.o_proj.weight", "BF16", (hidden, heads * 256)
        yield f"{at}.post_attention_layernorm.weight", "BF16", (hidden,)
        yield f"{at}.mlp.gate.weight", "BF16", (model.experts, hidden)
        yield f"{at}.mlp.experts.gate_up_proj", "BF16", (model.experts, 2 * model.moe, hidden)
        yield f"{at}.mlp.experts.down_proj", "BF16", (model.experts, hidden, model.moe)
        yield from _mlp(f"{at}.mlp.shared_expert", hidden, model.moe)
        yield f"{at}.mlp.shared_expert_gate.weight", "BF16", (1, hidden)
    yield f"{prefix}.norm.weight", "BF16", (hidden,)
    yield "lm_head.weight", "BF16", (model.vocabulary, hidden)


def _stacked_config(model: Model) -> dict[str, object]:
    text = {
        "model_type": "qwen3_5_moe_text",
        "num_hidden_layers": model.layers,
        "num_experts": model.experts,
        "num_experts_per_tok": 8,
        "hidden_size": model.hidden,
        "moe_intermediate_size": model.moe,
        "shared_expert_intermediate_size": model.moe,
        "mtp_num_hidden_layers": 0,
    }
    architectures = ["Qwen3_5MoeForConditionalGeneration"]
    return {"architectures": architectures, "model_type": "qwen3_5_moe", "text_config": text}
