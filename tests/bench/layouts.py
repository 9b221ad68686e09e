"""What the checkpoints of the benchmark are made of: tensor names, dtypes, shapes, config.json.

`int4` is Kimi-K2.5's layout, nine tensors per expert; `stacked` is Qwen3.5's, two bf16 tensors with
an expert axis per layer; `qwen` is Qwen3-235B-A22B in bf16, a matrix per projection and expert, and
`nvfp4` the same model as ModelOpt quantizes it, four tensors per matrix; `glm` is GLM-5.2 in FP8
blocks; `tiny` is Kimi-K2.5's with so narrow matrices that there are 70 tensors to a megabyte.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

# Bytes of a number; the dtypes in the order in which the safetensors library writes them.
WIDTH = {"F32": 4, "I32": 4, "BF16": 2, "F8_E4M3": 1, "U8": 1}
BLOCK = 128
INDEX_HEADS, INDEX_HEAD = 32, 128
QWEN_HEAD, QWEN_KEYS = 128, 4
NVFP4_GROUP = 16

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
    dense_layers: int = 1
    mtp_layers: int = 0

    @property
    def moe_layers(self) -> range:
        """The layers that have experts."""
        first = 0 if self.layout in ("stacked", "qwen", "nvfp4") else self.dense_layers
        return range(first, self.layers + self.mtp_layers)


KIMI = Model("int4", 61, 384, 7168, 2048, 18432, 163840, 64, vision_blocks=27)
# What is not experts is 2 % of the published model. A model of few layers keeps near that share
# only if embeddings, dense layer and vision tower shrink as well.
SMALL_KIMI = replace(KIMI, layers=2, dense=2048, vocabulary=4096, vision_blocks=1)
TINY = Model(
    "tiny", 2, 384, 256, 64, 64, 4096, 4, q_lora=64, kv_lora=64, nope=32, rope=32, v_head=32
)
STACKED = Model("stacked", 1, 256, 2048, 512, 0, 4096, 16)
GLM = Model(
    *("glm", 78, 256, 6144, 2048, 12288, 154880, 64),
    q_lora=2048,
    nope=192,
    v_head=256,
    dense_layers=3,
    mtp_layers=1,
)
QWEN = Model("qwen", 94, 128, 4096, 1536, 0, 151936, 64)
NVFP4 = replace(QWEN, layout="nvfp4")
SIZED = {
    "int4": SMALL_KIMI,
    "tiny": TINY,
    "stacked": STACKED,
    "glm": replace(GLM, layers=GLM.dense_layers + 1, dense=2048, vocabulary=4096, mtp_layers=0),
    "qwen": replace(QWEN, layers=1, vocabulary=4096),
    "nvfp4": replace(NVFP4, layers=1, vocabulary=4096),
}
PUBLISHED = {"int4": KIMI, "glm": GLM, "qwen": QWEN, "nvfp4": NVFP4}


def sized(layout: str, nbytes: int) -> Model:
    """A model of about so many bytes: as many layers, and in the last step experts, as fit."""
    start = SIZED[layout]
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
    makers = {"stacked": _stacked, "glm": _glm, "qwen": _qwen, "nvfp4": _nvfp4}
    return makers.get(model.layout, _kimi)(model)


def config(model: Model) -> dict[str, object]:
    """config.json as published, with this model's counts."""
    makers = {
        "stacked": _stacked_config,
        "glm": _glm_config,
        "qwen": _qwen_config,
        "nvfp4": _qwen_config,
    }
    return makers.get(model.layout, _kimi_config)(model)


def side_files(model: Model) -> dict[str, object]:
    """The other JSON files of the published model that say how it is quantized: name → document."""
    if model.layout != "nvfp4":
        return {}
    quantization = {
        "quant_algo": "NVFP4",
        "kv_cache_quant_algo": "FP8",
        "group_size": NVFP4_GROUP,
        "exclude_modules": ["lm_head", "model.layers.*.mlp.gate"],
    }
    producer = {"name": "modelopt", "version": "0.33.0"}
    return {"hf_quant_config.json": {"producer": producer, "quantization": quantization}}


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
        "max_position_embeddings": 262144,
        "vocab_size": model.vocabulary,
        "hidden_act": "silu",
        "intermediate_size": model.dense,
        "moe_layer_freq": 1,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_key_value_heads": model.heads,
        "rms_norm_eps": 1e-5,
        "rope_theta": 50000.0,
        "routed_scaling_factor": 2.827,
        "scoring_func": "sigmoid",
        "tie_word_embeddings": False,
        **_latent_attention(model),
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


def _latent_attention(model: Model) -> dict[str, object]:
    return {
        "num_attention_heads": model.heads,
        "q_lora_rank": model.q_lora,
        "kv_lora_rank": model.kv_lora,
        "qk_nope_head_dim": model.nope,
        "qk_rope_head_dim": model.rope,
        "v_head_dim": model.v_head,
    }


def _glm(model: Model) -> Iterator[Spec]:
    hidden, heads = model.hidden, model.heads
    yield "model.embed_tokens.weight", "BF16", (model.vocabulary, hidden)
    for layer in range(model.layers + model.mtp_layers):
        at, is_mtp = f"model.layers.{layer}", layer >= model.layers
        attention = f"{at}.self_attn"
        matrices = {
            f"{attention}.q_a_proj": (model.q_lora, hidden),
            f"{attention}.q_b_proj": (heads * (model.nope + model.rope), model.q_lora),
            f"{attention}.kv_a_proj_with_mqa": (model.kv_lora + model.rope, hidden),
            f"{attention}.kv_b_proj": (heads * (model.nope + model.v_head), model.kv_lora),
            f"{attention}.o_proj": (hidden, heads * model.v_head),
        }
        if _indexes(layer, model):
            matrices[f"{attention}.indexer.wq_b"] = (INDEX_HEADS * INDEX_HEAD, model.q_lora)
            matrices[f"{attention}.indexer.wk"] = (INDEX_HEAD, hidden)
        blocks = {f"{at}.mlp": model.dense}
        if layer in model.moe_layers:
            experts = range(model.experts)
            blocks = {f"{at}.mlp.experts.{expert}": model.moe for expert in experts}
            blocks[f"{at}.mlp.shared_experts"] = model.moe
        for block, width in blocks.items():
            matrices |= {f"{block}.{name}_proj": (width, hidden) for name in ("gate", "up")}
            matrices[f"{block}.down_proj"] = (hidden, width)
        for name, (rows, columns) in matrices.items():
            yield f"{name}.weight", "F8_E4M3", (rows, columns)
            scales = (-(-rows // BLOCK), -(-columns // BLOCK))
            yield f"{name}.weight_scale_inv", "F32", scales
        if layer in model.moe_layers:
            yield f"{at}.mlp.gate.weight", "BF16", (model.experts, hidden)
            yield f"{at}.mlp.gate.e_score_correction_bias", "F32", (model.experts,)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{at}.{norm}.weight", "BF16", (hidden,)
        if is_mtp:
            yield f"{at}.eh_proj.weight", "BF16", (hidden, 2 * hidden)
            for norm in ("enorm", "hnorm", "shared_head.norm"):
                yield f"{at}.{norm}.weight", "BF16", (hidden,)
    yield "model.norm.weight", "BF16", (hidden,)
    yield "lm_head.weight", "BF16", (model.vocabulary, hidden)


def _indexes(layer: int, model: Model) -> bool:
    """Whether a layer chooses the tokens to look at; four share a choice but for the first."""
    return layer < model.dense_layers or (layer - model.dense_layers) % 4 == 3


def _glm_config(model: Model) -> dict[str, object]:
    count = range(model.layers)
    return {
        "architectures": ["GlmMoeDsaForCausalLM"],
        "model_type": "glm_moe_dsa",
        "dtype": "bfloat16",
        "first_k_dense_replace": model.dense_layers,
        "hidden_size": model.hidden,
        "index_head_dim": INDEX_HEAD,
        "index_n_heads": INDEX_HEADS,
        "index_topk": 2048,
        "indexer_types": ["full" if _indexes(layer, model) else "shared" for layer in count],
        "intermediate_size": model.dense,
        "max_position_embeddings": 1048576,
        "moe_intermediate_size": model.moe,
        "n_group": 1,
        "n_routed_experts": model.experts,
        "n_shared_experts": 1,
        "num_experts": model.experts,
        "num_experts_per_tok": 8,
        "num_hidden_layers": model.layers,
        "num_nextn_predict_layers": model.mtp_layers,
        "topk_group": 1,
        "vocab_size": model.vocabulary,
        "quantization_config": {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [BLOCK, BLOCK],
        },
        **_latent_attention(model),
    }


def _qwen(model: Model) -> Iterator[Spec]:
    hidden, heads = model.hidden, model.heads
    yield "model.embed_tokens.weight", "BF16", (model.vocabulary, hidden)
    for layer in range(model.layers):
        at = f"model.layers.{layer}"
        yield f"{at}.input_layernorm.weight", "BF16", (hidden,)
        yield f"{at}.self_attn.q_proj.weight", "BF16", (heads * QWEN_HEAD, hidden)
        yield f"{at}.self_attn.k_proj.weight", "BF16", (QWEN_KEYS * QWEN_HEAD, hidden)
        yield f"{at}.self_attn.v_proj.weight", "BF16", (QWEN_KEYS * QWEN_HEAD, hidden)
        yield f"{at}.self_attn.o_proj.weight", "BF16", (hidden, heads * QWEN_HEAD)
        for norm in ("q_norm", "k_norm"):
            yield f"{at}.self_attn.{norm}.weight", "BF16", (QWEN_HEAD,)
        yield f"{at}.post_attention_layernorm.weight", "BF16", (hidden,)
        yield f"{at}.mlp.gate.weight", "BF16", (model.experts, hidden)
        for expert in range(model.experts):
            yield from _mlp(f"{at}.mlp.experts.{expert}", hidden, model.moe)
    yield "model.norm.weight", "BF16", (hidden,)
    yield "lm_head.weight", "BF16", (model.vocabulary, hidden)


def _nvfp4(model: Model) -> Iterator[Spec]:
    for name, dtype, shape in _qwen(model):
        is_plain = name in ("model.embed_tokens.weight", "lm_head.weight")
        if len(shape) < 2 or is_plain or name.endswith(".mlp.gate.weight"):
            yield name, dtype, shape
            continue
        module, (rows, columns) = name.removesuffix(".weight"), shape
        yield f"{module}.input_scale", "F32", ()
        yield f"{module}.weight", "U8", (rows, columns // 2)
        yield f"{module}.weight_scale", "F8_E4M3", (rows, columns // NVFP4_GROUP)
        yield f"{module}.weight_scale_2", "F32", ()
        if module.endswith(("k_proj", "v_proj")):
            yield f"{module}.{module[-6]}_scale", "F32", ()


def _qwen_config(model: Model) -> dict[str, object]:
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "decoder_sparse_step": 1,
        "head_dim": QWEN_HEAD,
        "hidden_act": "silu",
        "hidden_size": model.hidden,
        "intermediate_size": 3 * model.hidden,
        "max_position_embeddings": 40960,
        "mlp_only_layers": [],
        "moe_intermediate_size": model.moe,
        "norm_topk_prob": True,
        "num_attention_heads": model.heads,
        "num_experts": model.experts,
        "num_experts_per_tok": 8,
        "num_hidden_layers": model.layers,
        "num_key_value_heads": QWEN_KEYS,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": model.vocabulary,
    }


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
