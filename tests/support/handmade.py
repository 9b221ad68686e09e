"""Models and their prunes, both built from one table of values: no code of ours has a hand in it.

A model is written for lists of original expert ids. The full lists give the original, shorter
ones the prune that must come out, in the layout of DeepSeek-V3 (per expert, groups, an MTP
layer) or of Qwen3.5 (stacked, MTP per expert).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

EXPERTS, HIDDEN, WIDTH = 8, 6, 4
ALL = tuple(range(EXPERTS))
INDEX = "model.safetensors.index.json"
METADATA = "calibration/reap_pruning_metadata.json"

Tensors = dict[str, NDArray[np.generic]]
Keeps = Mapping[int, Sequence[int]]


def values(what: str, *shape: int, dtype: str = "f4") -> NDArray[np.generic]:
    """Numbers that are this tensor's own."""
    seed = int.from_bytes(hashlib.sha256(what.encode()).digest()[:8], "little")
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def rows(what: str, ids: Sequence[int], *shape: int, dtype: str = "f4") -> NDArray[np.generic]:
    """One row per expert."""
    return np.stack([values(f"{what} of {expert}", *shape, dtype=dtype) for expert in ids])


def per_expert(keeps: Keeps) -> Tensors:
    """DeepSeek-V3: layer 0 is dense, layers 1 and 2 have experts; 3 is the MTP layer, if kept."""
    made = {"model.embed_tokens.weight": values("embed", 16, HIDDEN, dtype="f2")}
    made["model.layers.0.mlp.up_proj.weight"] = values("dense", EXPERTS, HIDDEN, dtype="f2")
    for layer, ids in keeps.items():
        block = f"model.layers.{layer}.mlp"
        made[f"model.layers.{layer}.self_attn.o_proj.weight"] = values(f"{layer} o", EXPERTS, 6)
        made[f"{block}.gate.weight"] = rows(f"{layer} gate", ids, HIDDEN, dtype="f2")
        made[f"{block}.gate.e_score_correction_bias"] = rows(f"{layer} bias", ids)
        made[f"{block}.shared_experts.up_proj.weight"] = values(f"{layer} shared", WIDTH, HIDDEN)
        for new_id, old_id in enumerate(ids):
            for part in ("up_proj", "down_proj"):
                what = f"{layer} {part} of {old_id}"
                made[f"{block}.experts.{new_id}.{part}.weight"] = values(what, WIDTH, 6, dtype="f2")
                made[f"{block}.experts.{new_id}.{part}.scale"] = values(f"{what} scale", 1)
    if 3 in keeps:
        made["model.layers.3.eh_proj.weight"] = values("eh", HIDDEN, 2 * HIDDEN)
    return made


def stacked(keeps: Keeps) -> Tensors:
    """Qwen3.5: layers 0 and 1 stacked, layer 2 is the MTP layer, per expert."""
    made = {"model.language_model.embed_tokens.weight": values("embed", 16, HIDDEN, dtype="f2")}
    for layer in (0, 1):
        block, ids = f"model.language_model.layers.{layer}.mlp", keeps[layer]
        made[f"{block}.gate.weight"] = rows(f"{layer} gate", ids, HIDDEN)
        made[f"{block}.experts.gate_up_proj"] = rows(f"{layer} up", ids, 2 * WIDTH, 6, dtype="f2")
        made[f"{block}.experts.down_proj"] = rows(f"{layer} down", ids, HIDDEN, WIDTH, dtype="f2")
        made[f"{block}.shared_expert.up_proj.weight"] = values(f"{layer} shared", WIDTH, HIDDEN)
    if 2 in keeps:
        block = "mtp.layers.0.mlp"
        made["mtp.fc.weight"] = values("fc", HIDDEN, 2 * HIDDEN)
        made[f"{block}.gate.weight"] = rows("2 gate", keeps[2], HIDDEN)
        for new_id, old_id in enumerate(keeps[2]):
            name = f"{block}.experts.{new_id}.up_proj.weight"
            made[name] = values(f"2 up of {old_id}", WIDTH, HIDDEN, dtype="f2")
    return made


def deepseek_config(experts: int, mtp: int, ignored: Sequence[str]) -> str:
    """config.json as text: a float with an exponent, and a list that names experts."""
    content = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "n_group": 2,
        "n_routed_experts": experts,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 3,
        "num_nextn_predict_layers": mtp,
        "quantization_config": {"quant_method": "fp8", "ignored_layers": list(ignored)},
        "rms_norm_eps": 1e-05,
        "topk_group": 1,
        "vocab_size": 16,
    }
    return json.dumps(content, indent=2)


def qwen_config(experts: int, mtp: int, ignored: Sequence[str]) -> str:
    text = {
        "model_type": "qwen3_5_moe_text",
        "mtp_num_hidden_layers": mtp,
        "num_experts": experts,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 2,
    }
    return json.dumps({"model_type": "qwen3_5_moe", "text_config": text}, indent=2)


Layout = tuple[Callable[[Keeps], Tensors], Callable[[int, int, Sequence[str]], str], int]
DEEPSEEK: Layout = (per_expert, deepseek_config, 3)
QWEN: Layout = (stacked, qwen_config, 2)


def write(folder: Path, layout: Layout, keeps: Keeps, shards: int = 2) -> Path:
    """A model whose experts are the ones listed, without metadata."""
    tensors_of, config_of, mtp_layer = layout
    made = tensors_of(keeps)
    (folder / "remote").mkdir(parents=True)
    count = len(next(iter(keeps.values())))
    # Entries for experts 1 and 6 of layer 1, wherever they are now.
    entries = [(1, old_id) for old_id in (1, 6) if old_id in keeps[1]]
    names = [
        "lm_head",
        *(f"model.layers.{n}.mlp.experts.{keeps[n].index(old)}.up_proj" for n, old in entries),
    ]
    (folder / "config.json").write_text(config_of(count, int(mtp_layer in keeps), names))
    (folder / "hf_quant_config.json").write_text(json.dumps({"exclude_modules": names}))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "remote" / "code.py").write_text("# remote code\n")
    second = f".layers.{mtp_layer - 1}."
    names_in = {
        number: [n for n in made if shards == 1 or (second in n) == (number == 2)]
        for number in range(1, shards + 1)
    }
    weight_map = {}
    for number, held in names_in.items():
        file = (
            f"model-{number:05}-of-{shards:05}.safetensors" if shards > 1 else "model.safetensors"
        )
        save_file({n: made[n] for n in held}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(held, file)
    totals = {
        "total_parameters": sum(tensor.size for tensor in made.values()),
        "total_size": sum(tensor.nbytes for tensor in made.values()),
    }
    if shards > 1:
        index = {"metadata": totals, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index))
    return folder


def record(folder: Path, keeps: Keeps, steps: Sequence[tuple[Path, int, int]]) -> Path:
    """Write the metadata of a prune; steps: (the model it was applied to, before, after)."""
    listed = [
        {
            "num_experts_before": before,
            "num_experts_after": after,
            "ratio": (before - after) / before,
            "rounding": None,
            "metric": "reap",
            "selection": "keep",
            "source": {
                "name": source.name,
                "revision": None,
                "config_sha256": hashlib.sha256((source / "config.json").read_bytes()).hexdigest(),
            },
        }
        for source, before, after in steps
    ]
    layers = {
        str(layer): {
            "retained": list(ids),
            "pruned": [expert for expert in ALL if expert not in ids],
            "preserved": [],
        }
        for layer, ids in keeps.items()
    }
    content = {
        "format": 1,
        "method": "reap",
        **listed[-1],
        "num_experts_before": EXPERTS,
        "steps": listed,
        "layers": layers,
    }
    (folder / "calibration").mkdir(exist_ok=True)
    (folder / METADATA).write_text(json.dumps(content))
    return folder
