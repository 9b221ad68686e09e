"""The number of layers where config.json lists their kinds and gives no number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from shardsurgeon import apply, open_checkpoint, plan, verify
from shardsurgeon.checkpoint.anatomy import Anatomy, read_anatomy
from shardsurgeon.errors import ConfigError

EXPERTS, HIDDEN, WIDTH = 4, 6, 3
KINDS = ["mamba", "moe", "attention", "moe"]
BLOCKS = [{"block_type": kind} for kind in KINDS]
LISTED = {"layers_block_type": KINDS}


def config(**changes: object) -> dict[str, object]:
    return {
        "architectures": ["NemotronHForCausalLM"],
        "model_type": "nemotron_h",
        "n_routed_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "num_nextn_predict_layers": 1,
        **changes,
    }


def model(folder: Path, content: dict[str, object]) -> Path:
    """MoE layers 1 and 3, and one in the MTP step, which counts from 0 on its own."""
    tensors = {"backbone.embeddings.weight": np.ones((8, HIDDEN), np.float32)}
    for layer in ("backbone.layers.1", "backbone.layers.3", "mtp.layers.1"):
        block = f"{layer}.mixer"
        rows = np.arange(EXPERTS * HIDDEN, dtype=np.float32).reshape(EXPERTS, HIDDEN)
        tensors[f"{block}.gate.weight"] = rows
        tensors[f"{block}.gate.e_score_correction_bias"] = rows[:, 0].copy()
        for expert in range(EXPERTS):
            up = np.full((WIDTH, HIDDEN), expert, np.float32)
            tensors[f"{block}.experts.{expert}.up_proj.weight"] = up
            tensors[f"{block}.experts.{expert}.down_proj.weight"] = up.T.copy()
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(content, indent=2), encoding="utf-8")
    return folder


def anatomy(folder: Path, content: dict[str, object]) -> Anatomy:
    return read_anatomy(open_checkpoint(model(folder, content)))


@pytest.mark.parametrize(
    "says",
    [
        LISTED,
        {"hybrid_override_pattern": "ME*E"},
        # The number that transformers ignores, once there is a list.
        {**LISTED, "num_hidden_layers": 52},
        {"model_type": "nemotron_h_puzzle", "block_configs": BLOCKS},
        {"model_type": "nemotron_h_puzzle", **LISTED, "block_configs": BLOCKS},
    ],
)
def test_a_list_of_layers_gives_their_number(says: dict[str, Any], tmp_path: Path) -> None:
    found = anatomy(tmp_path / "model", config(**says))
    assert found.num_layers == 4
    assert [layer.index for layer in found.main_layers] == [1, 3]
    assert [layer.index for layer in found.mtp_layers] == [5]


def test_a_model_with_a_list_of_layers_is_pruned_and_the_list_stays(tmp_path: Path) -> None:
    source = model(tmp_path / "model", config(**LISTED))
    scores = tmp_path / "scores.json"
    scores.write_text(json.dumps({layer: [3.5, 0.5, 1.25, 4.5] for layer in (1, 3, 5)}))
    apply(plan(source, scores, ratio=0.5), tmp_path / "out")
    assert verify(source, tmp_path / "out").holds
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written == {**config(**LISTED), "n_routed_experts": 2}
    (shard,) = (tmp_path / "out").glob("*.safetensors")
    with safe_open(shard, "numpy") as tensors:
        block = "backbone.layers.3.mixer"
        assert tensors.get_tensor(f"{block}.gate.weight")[:, 0].tolist() == [0, 18]
        assert tensors.get_tensor(f"{block}.experts.1.up_proj.weight")[0, 0] == 3


def test_without_number_and_list_every_spelling_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no layers_block_type or num_hidden_layers or hybrid"):
        anatomy(tmp_path / "model", config())


def test_a_family_of_which_no_list_is_known_does_not_count_one(tmp_path: Path) -> None:
    content = config(model_type="deepseek_v3", **LISTED)
    with pytest.raises(ConfigError, match="has no num_hidden_layers"):
        anatomy(tmp_path / "model", content)
