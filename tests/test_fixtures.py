"""The shipped checkpoints: laid out as published, small, and what their builder writes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from shardsurgeon.storage.formats.dtypes import StoredArray
from shardsurgeon.storage.formats.torch_file import read_torch_file

FIXTURES = Path(__file__).parents[1] / "fixtures"
FAMILIES = ["deepseek_v3", "kimi_k2", "kimi_k25", "kimi_linear", "qwen3_5_moe", "qwen3_moe"]
MOE_LAYERS = {
    "deepseek_v3": [1, 2],
    "kimi_k2": [1, 2],
    "kimi_k25": [1, 2, 3],
    "kimi_linear": [1, 2, 3],
    "qwen3_5_moe": [0, 1, 2, 3],
    "qwen3_moe": [0, 1, 2],
}
EXPERTS = {
    "deepseek_v3": 24,
    "kimi_k2": 16,
    "kimi_k25": 32,
    "kimi_linear": 16,
    "qwen3_5_moe": 16,
    "qwen3_moe": 16,
}

every_family = pytest.mark.parametrize("family", FAMILIES)


def document(family: str, name: str) -> Any:
    return json.loads((FIXTURES / family / name).read_text(encoding="utf-8"))


def headers(family: str) -> dict[str, tuple[str, str, list[int]]]:
    """Tensor name → shard, dtype and shape, by the safetensors library."""
    found = {}
    for path in sorted((FIXTURES / family).glob("*.safetensors")):
        with safe_open(path, "np") as shard:
            assert shard.metadata() == {"format": "pt"}
            for name in shard.keys():  # noqa: SIM118 (a shard is no mapping)
                tensor = shard.get_slice(name)
                found[name] = (path.name, tensor.get_dtype(), tensor.get_shape())
    return found


@every_family
def test_a_fixture_is_small_and_has_several_shards_and_side_files(family: str) -> None:
    files = [path for path in (FIXTURES / family).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 1_500_000
    assert len([path for path in files if path.suffix == ".safetensors"]) >= 3
    expected = {"LICENSE", "README.md", "chat_template.jinja", "generation_config.json"}
    expected |= {"tokenizer.json", "tokenizer_config.json", "scores.pt", "config.json"}
    assert expected <= {path.name for path in files}


@every_family
def test_the_index_names_every_tensor_in_its_shard_and_its_bytes(family: str) -> None:
    index = document(family, "model.safetensors.index.json")
    assert index["weight_map"] == {name: where for name, (where, _, _) in headers(family).items()}
    nbytes = 0
    for path in (FIXTURES / family).glob("*.safetensors"):
        nbytes += path.stat().st_size - 8 - int.from_bytes(path.read_bytes()[:8], "little")
    assert index["metadata"]["total_size"] == nbytes


@every_family
def test_scores_hold_one_saliency_per_expert_of_every_moe_layer(family: str) -> None:
    path = FIXTURES / family / "scores.pt"
    scores = read_torch_file(path, path.name)
    if isinstance(scores, StoredArray):
        assert scores.shape == (len(MOE_LAYERS[family]), EXPERTS[family])
        return
    scores = scores.get("saliency_scores", scores)
    layers = [int(re.sub(r"\D", "", str(layer))) for layer in scores]
    assert layers == MOE_LAYERS[family]
    for entry in scores.values():
        saliency = entry["reap"] if isinstance(entry, dict) else entry
        assert saliency.shape == (EXPERTS[family],)


@pytest.mark.torch
@every_family
def test_the_tokenizer_gives_text_back(family: str) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(FIXTURES / family / "tokenizer.json"))
    config = document(family, "config.json")
    assert tokenizer.get_vocab_size() < config.get("text_config", config)["vocab_size"]
    text = "the router and an éxpert 猫"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


PUBLISHED = [
    ("deepseek_v3", "model.layers.1.mlp.experts.23.up_proj.weight", "BF16", [24, 64]),
    ("deepseek_v3", "model.layers.1.mlp.gate.e_score_correction_bias", "F32", [24]),
    ("deepseek_v3", "model.layers.3.mlp.experts.0.down_proj.weight", "BF16", [64, 24]),
    ("deepseek_v3", "model.layers.3.eh_proj.weight", "BF16", [64, 128]),
    ("deepseek_v3", "model.layers.3.shared_head.head.weight", "BF16", [288, 64]),
    ("kimi_k2", "model.layers.1.mlp.experts.0.gate_proj.weight", "F8_E4M3", [24, 64]),
    ("kimi_k2", "model.layers.1.mlp.experts.0.gate_proj.weight_scale_inv", "F32", [1, 1]),
    ("kimi_k2", "model.layers.0.mlp.up_proj.weight_scale_inv", "F32", [2, 1]),
    ("kimi_k2", "model.layers.0.self_attn.rotary_emb.inv_freq", "BF16", [4]),
    (
        "kimi_k25",
        "language_model.model.layers.1.mlp.experts.0.up_proj.weight_packed",
        "I32",
        [32, 8],
    ),
    (
        "kimi_k25",
        "language_model.model.layers.1.mlp.experts.0.up_proj.weight_scale",
        "BF16",
        [32, 2],
    ),
    ("kimi_k25", "language_model.model.layers.1.mlp.experts.0.up_proj.weight_shape", "I32", [2]),
    ("kimi_k25", "language_model.model.layers.1.mlp.gate.weight", "BF16", [32, 64]),
    ("kimi_k25", "mm_projector.proj.2.weight", "BF16", [64, 128]),
    ("kimi_k25", "vision_tower.encoder.blocks.0.wqkv.weight", "BF16", [96, 32]),
    ("kimi_k25", "vision_tower.patch_embed.pos_emb.weight", "BF16", [4, 4, 32]),
    ("kimi_linear", "model.layers.0.mlp.gate_proj.weight", "BF16", [96, 64]),
    ("kimi_linear", "model.layers.1.block_sparse_moe.experts.15.w2.weight", "BF16", [64, 24]),
    ("kimi_linear", "model.layers.1.block_sparse_moe.gate.e_score_correction_bias", "BF16", [16]),
    ("kimi_linear", "model.layers.0.self_attn.A_log", "F32", [1, 1, 2, 1]),
    ("kimi_linear", "model.layers.0.self_attn.q_conv1d.weight", "BF16", [32, 1, 4]),
    (
        "qwen3_5_moe",
        "model.language_model.layers.0.mlp.experts.gate_up_proj",
        "BF16",
        [16, 48, 64],
    ),
    ("qwen3_5_moe", "model.language_model.layers.0.mlp.experts.down_proj", "BF16", [16, 64, 24]),
    ("qwen3_5_moe", "model.language_model.layers.0.linear_attn.norm.weight", "F32", [16]),
    ("qwen3_5_moe", "mtp.layers.0.mlp.experts.15.down_proj.weight", "BF16", [64, 24]),
    ("qwen3_5_moe", "mtp.layers.0.mlp.gate.weight", "BF16", [16, 64]),
    ("qwen3_5_moe", "mtp.fc.weight", "BF16", [64, 128]),
    ("qwen3_moe", "model.layers.0.mlp.experts.0.gate_proj.weight", "BF16", [24, 64]),
    ("qwen3_moe", "model.layers.0.self_attn.q_norm.weight", "BF16", [16]),
]


@every_family
def test_tensors_have_the_published_names_and_dtypes(family: str) -> None:
    found = headers(family)
    for wanted, name, dtype, shape in PUBLISHED:
        if wanted == family:
            assert found[name][1:] == (dtype, shape)


@pytest.mark.torch
def test_building_again_gives_the_shipped_bytes(tmp_path: Path) -> None:
    command = [sys.executable, str(FIXTURES / "build.py"), "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    for family in FAMILIES:
        shipped, built = FIXTURES / family, tmp_path / family
        names = {path.relative_to(built) for path in built.rglob("*") if path.is_file()}
        assert names == {path.relative_to(shipped) for path in shipped.rglob("*") if path.is_file()}
        changed = [n for n in names if (built / n).read_bytes() != (shipped / n).read_bytes()]
        assert changed == []
