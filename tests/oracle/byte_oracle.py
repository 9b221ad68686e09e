"""What a pruned checkpoint must hold, worked out with torch and the safetensors library alone.

Knows nothing of shardsurgeon: from a source folder and keep-lists to every expected tensor.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

EXPERT = re.compile(r"(.*\.experts\.)(\d+)(\..+)")
ROUTER = re.compile(r"\.(mlp|block_sparse_moe)\.gate\.(weight|e_score_correction_bias)$")
STACKED = re.compile(r"\.mlp\.experts\.(gate_up_proj|down_proj)$")


def read_config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config


def text_config(folder: Path) -> dict[str, Any]:
    """The part of config.json that describes the text model."""
    config = read_config(folder)
    text: dict[str, Any] = config.get("text_config", config)
    return text


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, from the shard its index names or, without one, its only."""
    if (whole := folder / "model.safetensors").exists():
        with safe_open(whole, "pt") as shard:
            return {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    tensors = {}
    for file in sorted(set(index["weight_map"].values())):
        with safe_open(folder / file, "pt") as shard:
            for name in shard.keys():  # noqa: SIM118 (a shard is no mapping)
                assert index["weight_map"].get(name) == file
                tensors[name] = shard.get_tensor(name)
    assert tensors.keys() == index["weight_map"].keys()
    return tensors


def layer_of(name: str, num_hidden_layers: int) -> int | None:
    """The layer number of a tensor; MTP layer j counts as num_hidden_layers + j."""
    found = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
    if found is None:
        return None
    return int(found[1]) + (num_hidden_layers if name.startswith("mtp.") else 0)


def expected_tensors(folder: Path, retained: dict[int, list[int]]) -> dict[str, torch.Tensor]:
    """Every tensor of the pruned checkpoint: renumbered, sliced, or as it was.

    retained: layer → ascending original ids, for every layer that has routed experts.
    """
    layers = text_config(folder)["num_hidden_layers"]
    expected = {}
    for name, tensor in read_tensors(folder).items():
        layer = layer_of(name, layers)
        if layer not in retained or "vision" in name or "visual" in name:
            expected[name] = tensor
            continue
        keep = retained[layer]
        expert = EXPERT.fullmatch(name)
        if expert:
            if int(expert[2]) in keep:
                expected[f"{expert[1]}{keep.index(int(expert[2]))}{expert[3]}"] = tensor
        elif ROUTER.search(name) or STACKED.search(name):
            expected[name] = tensor[keep]
        else:
            expected[name] = tensor
    return expected


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two tensors are equal in dtype, shape and every byte."""
    return (
        left.dtype == right.dtype
        and left.shape == right.shape
        and torch.equal(
            left.contiguous().flatten().view(torch.uint8),
            right.contiguous().flatten().view(torch.uint8),
        )
    )
