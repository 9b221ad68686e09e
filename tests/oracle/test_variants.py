"""Layouts that differ from the shipped ones by a few keys or tensors, made here by hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.oracle.byte_oracle import expected_tensors, read_config, read_tensors, same_bits
from tests.oracle.closeness import assert_equal_but_for_rounding
from tests.oracle.logits_oracle import logits
from tests.oracle.pruning import FIXTURES, prune

pytestmark = pytest.mark.oracle


def copied(family: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(FIXTURES / family, tmp_path / family))


def rewritten(folder: Path, config: dict[str, object]) -> None:
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def test_the_users_ratio_prunes_kimi_k25_to_12_of_32_experts(tmp_path: Path) -> None:
    pruned = prune(FIXTURES / "kimi_k25", tmp_path / "out", "0.65")
    # int(0.65 x 32) = 20 are removed.
    assert {len(ids) for ids in pruned.retained.values()} == {12}
    result = logits(pruned.folder, tmp_path)
    assert torch.equal(result, logits(pruned.source, tmp_path, pruned.retained))


def test_a_config_with_both_spellings_of_the_count_gets_both_rewritten(tmp_path: Path) -> None:
    source = copied("qwen3_moe", tmp_path)
    rewritten(source, read_config(source) | {"num_local_experts": 16})
    pruned = prune(source, tmp_path / "out", "0.5")
    config = read_config(pruned.folder)
    assert (config["num_experts"], config["num_local_experts"]) == (8, 8)
    result = logits(pruned.folder, tmp_path)
    masked = logits(source, tmp_path, pruned.retained)
    assert_equal_but_for_rounding(result, masked, source)


def test_quantization_lists_that_name_experts_follow_their_experts(tmp_path: Path) -> None:
    source = copied("kimi_k25", tmp_path)
    config = read_config(source)
    ignore = config["text_config"]["quantization_config"]["ignore"]
    patterns = list(ignore)
    stem = "language_model.model.layers.2.mlp.experts."
    ignore.extend(f"{stem}{expert}.up_proj" for expert in range(32))
    rewritten(source, config)
    pruned = prune(source, tmp_path / "out", "0.5")
    result = read_config(pruned.folder)["text_config"]["quantization_config"]["ignore"]
    assert result == patterns + [f"{stem}{new}.up_proj" for new in range(16)]


def test_an_mtp_layer_may_hold_its_experts_stacked(tmp_path: Path) -> None:
    source = copied("qwen3_5_moe", tmp_path)
    tensors = read_tensors(source)
    stem = "mtp.layers.0.mlp.experts."
    gate, up, down = (
        torch.stack([tensors.pop(f"{stem}{expert}.{part}.weight") for expert in range(16)])
        for part in ("gate_proj", "up_proj", "down_proj")
    )
    tensors |= {f"{stem}gate_up_proj": torch.cat([gate, up], dim=1), f"{stem}down_proj": down}
    for shard in source.glob("*.safetensors"):
        shard.unlink()
    file = "model-00001-of-00001.safetensors"
    save_file(tensors, source / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, file)}
    (source / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")

    pruned = prune(source, tmp_path / "out", "0.5")
    result = load_file(pruned.folder / "model.safetensors")
    expected = expected_tensors(source, pruned.retained)
    assert result.keys() == expected.keys()
    assert [name for name in expected if not same_bits(result[name], expected[name])] == []
