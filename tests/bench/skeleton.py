"""Kimi-K2.5's layout at any size, as sparse files or with bytes in them.

    python tests/bench/skeleton.py OUT                 the full 554 GiB, sparse: about 50 MB of disk
    python tests/bench/skeleton.py OUT --layers 2 --fill    one MoE layer, 9.5 GB, random bytes

Names, dtypes and shapes are the published ones; the tensors are dealt to the shards in order of
their layers. A score file with random saliencies lies beside the shards.
"""

from __future__ import annotations

import argparse
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np

HIDDEN, DENSE, MOE, HEADS, VOCABULARY = 7168, 18432, 2048, 64, 163840
Q_LORA, KV_LORA, NOPE, ROPE, V_HEAD = 1536, 512, 128, 64, 128
WIDTH = {"I32": 4, "BF16": 2, "F32": 4}
PREFIX = "language_model.model"

Spec = tuple[str, str, tuple[int, ...]]


def tensors(layers: int, experts: int) -> Iterator[Spec]:
    """(name, dtype, shape) of every tensor, in the order in which they are stored."""
    yield f"{PREFIX}.embed_tokens.weight", "BF16", (VOCABULARY, HIDDEN)
    for layer in range(layers):
        yield from decoder_layer(f"{PREFIX}.layers.{layer}", layer, experts)
    yield f"{PREFIX}.norm.weight", "BF16", (HIDDEN,)
    yield "language_model.lm_head.weight", "BF16", (VOCABULARY, HIDDEN)
    for block in range(27):
        prefix = f"vision_tower.encoder.blocks.{block}"
        yield f"{prefix}.wqkv.weight", "BF16", (3456, 1152)
        yield f"{prefix}.wo.weight", "BF16", (1152, 1152)
        yield f"{prefix}.mlp.fc0.weight", "BF16", (4304, 1152)
        yield f"{prefix}.mlp.fc1.weight", "BF16", (1152, 4304)
    yield "mm_projector.proj.0.weight", "BF16", (4608, 4608)
    yield "mm_projector.proj.2.weight", "BF16", (HIDDEN, 4608)


def decoder_layer(prefix: str, layer: int, experts: int) -> Iterator[Spec]:
    """One decoder layer; layer 0 is dense."""
    attention = f"{prefix}.self_attn"
    yield f"{prefix}.input_layernorm.weight", "BF16", (HIDDEN,)
    yield f"{attention}.q_a_proj.weight", "BF16", (Q_LORA, HIDDEN)
    yield f"{attention}.q_a_layernorm.weight", "BF16", (Q_LORA,)
    yield f"{attention}.q_b_proj.weight", "BF16", (HEADS * (NOPE + ROPE), Q_LORA)
    yield f"{attention}.kv_a_proj_with_mqa.weight", "BF16", (KV_LORA + ROPE, HIDDEN)
    yield f"{attention}.kv_a_layernorm.weight", "BF16", (KV_LORA,)
    yield f"{attention}.kv_b_proj.weight", "BF16", (HEADS * (NOPE + V_HEAD), KV_LORA)
    yield f"{attention}.o_proj.weight", "BF16", (HIDDEN, HEADS * V_HEAD)
    yield f"{prefix}.post_attention_layernorm.weight", "BF16", (HIDDEN,)
    if layer == 0:
        yield from mlp(f"{prefix}.mlp", DENSE)
        return
    yield f"{prefix}.mlp.gate.weight", "BF16", (experts, HIDDEN)
    yield f"{prefix}.mlp.gate.e_score_correction_bias", "F32", (experts,)
    yield from mlp(f"{prefix}.mlp.shared_experts", MOE)
    for expert in range(experts):
        for projection, (rows, columns) in {
            "down_proj": (HIDDEN, MOE),
            "gate_proj": (MOE, HIDDEN),
            "up_proj": (MOE, HIDDEN),
        }.items():
            name = f"{prefix}.mlp.experts.{expert}.{projection}"
            yield f"{name}.weight_packed", "I32", (rows, columns // 8)
            yield f"{name}.weight_scale", "BF16", (rows, columns // 32)
            yield f"{name}.weight_shape", "I32", (2,)


def mlp(prefix: str, width: int) -> Iterator[Spec]:
    """A dense gated MLP."""
    yield f"{prefix}.gate_proj.weight", "BF16", (width, HIDDEN)
    yield f"{prefix}.up_proj.weight", "BF16", (width, HIDDEN)
    yield f"{prefix}.down_proj.weight", "BF16", (HIDDEN, width)


def nbytes(spec: Spec) -> int:
    """Size of a tensor in bytes."""
    return WIDTH[spec[1]] * int(np.prod(spec[2], dtype=np.int64))


def build(out: Path, layers: int, experts: int, shards: int, *, fill: bool, seed: int) -> int:
    """Write the checkpoint; returns its bytes of tensor data."""
    out.mkdir(parents=True)
    specs = list(tensors(layers, experts))
    total = sum(map(nbytes, specs))
    cut = deal(specs, total, shards)
    weight_map: dict[str, str] = {}
    for number, held in enumerate(cut, start=1):
        name = f"model-{number:05d}-of-{len(cut):06d}.safetensors"
        weight_map.update(dict.fromkeys((spec[0] for spec in held), name))
        write_shard(out / name, held, fill=fill, seed=seed + number)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (out / "config.json").write_text(json.dumps(config(layers, experts), indent=2))
    numbers = random.Random(seed)
    scores = {n: [numbers.random() for _ in range(experts)] for n in range(1, layers)}
    (out / "scores.json").write_text(json.dumps(scores))
    return total


def deal(specs: list[Spec], total: int, shards: int) -> list[list[Spec]]:
    """Cut the tensors into shards of about the same size."""
    cut: list[list[Spec]] = [[]]
    filled = 0
    for spec in specs:
        if filled >= total / shards * len(cut) and len(cut) < shards:
            cut.append([])
        cut[-1].append(spec)
        filled += nbytes(spec)
    return cut


def write_shard(path: Path, specs: list[Spec], *, fill: bool, seed: int) -> None:
    """A safetensors file, its data a hole or, with `fill`, random."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for spec in sorted(specs, key=lambda spec: -WIDTH[spec[1]]):
        begin, end = end, end + nbytes(spec)
        header[spec[0]] = {"dtype": spec[1], "shape": spec[2], "data_offsets": [begin, end]}
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        if fill:
            block = np.random.default_rng(seed).bytes(64 << 20)
            left = end
            while left:
                left -= file.write(block[: min(left, len(block))])
        file.truncate(8 + len(raw) + end)
        os.fsync(file.fileno())


def config(layers: int, experts: int) -> dict[str, object]:
    """config.json as published, with this many layers and experts."""
    text = {
        "model_type": "kimi_k2",
        "num_hidden_layers": layers,
        "n_routed_experts": experts,
        "num_experts_per_tok": 8,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "first_k_dense_replace": 1,
        "hidden_size": HIDDEN,
        "moe_intermediate_size": MOE,
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


def main() -> None:
    """The command line above."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=61)
    parser.add_argument("--experts", type=int, default=384)
    parser.add_argument("--shards", type=int, default=64)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--fill", action="store_true", help="write random bytes, not holes")
    given = parser.parse_args()
    total = build(
        given.out, given.layers, given.experts, given.shards, fill=given.fill, seed=given.seed
    )
    print(f"{given.out}: {total:,} bytes of tensor data")


if __name__ == "__main__":
    main()
