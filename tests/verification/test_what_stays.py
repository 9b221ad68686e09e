"""What a prune leaves as it was: side files, by the globs it was made with, and others' experts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load, save

from shardsurgeon.checkpoint.provenance import PROVENANCE_NAME
from shardsurgeon.cli.main import main
from shardsurgeon.verification.verify import verify_checkpoint
from tests.support import tiny

SCORES = {str(layer): [expert + 0.5 for expert in range(8)] for layer in (1, 2, 3)}


def model(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def pruned(source: Path, scores: dict[str, list[float]], *words: str) -> Path:
    out, table = source.with_name("out"), source.with_name("scores.json")
    table.write_text(json.dumps(scores))
    given = [str(table), "--model", str(source), *words, "-o", str(out), "--no-verify"]
    assert main(["apply", *given]) == 0
    return out


def differences(source: Path, out: Path) -> str:
    return "\n".join(verify_checkpoint(source, out).differences)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    extra = {"wandb/run.json": b"[1]", "notes.txt": b"words", "vocab.json": b"{}"}
    return model(tmp_path / "model", {**tiny.files(), **extra})


def test_side_files_are_those_of_the_globs_that_the_prune_was_made_with(source: Path) -> None:
    out = pruned(source, SCORES, "--keep", "4", "--include", "wandb/*", "--exclude", "notes.txt")
    assert (out / "wandb" / "run.json").exists() and not (out / "notes.txt").exists()
    assert differences(source, out) == ""
    (out / "wandb" / "run.json").write_bytes(b"[2]")
    assert differences(source, out) == "wandb/run.json: is not the source's, byte for byte"
    (out / "wandb" / "run.json").unlink()
    assert differences(source, out) == "wandb/run.json: is missing"


def test_the_config_of_experts_that_are_not_the_models_own_stays(tmp_path: Path) -> None:
    talker = {
        "num_experts": 4,
        "quantization_config": {"ignore": ["model.layers.0.mlp.experts.3.up_proj"]},
    }
    text = {"num_experts": 4, "num_experts_per_tok": 1, "num_hidden_layers": 1}
    config = {
        "model_type": "qwen3_omni_moe",
        "talker_config": talker,
        "thinker_config": {"text_config": text},
    }
    weights: tiny.Tensors = {"thinker.model.layers.0.mlp.gate.weight": np.ones((4, 2), "f4")}
    for expert in range(4):
        name = f"thinker.model.layers.0.mlp.experts.{expert}.up_proj.weight"
        weights[name] = np.full((1, 2), expert, "f4")
    source = model(tmp_path / "model", tiny.files(config, weights))
    out = pruned(source, {"0": [1.0, 2.0, 3.0, 4.0]}, "--keep", "2")
    written = json.loads((out / "config.json").read_text())
    assert written["talker_config"] == talker
    assert differences(source, out) == ""
    written["talker_config"]["num_experts"] = 2
    (out / "config.json").write_text(json.dumps(written))
    assert "talker_config.num_experts is 2, expected 4" in differences(source, out)


def test_an_index_that_never_counted_parameters_need_not_begin_to(source: Path) -> None:
    out = pruned(source, SCORES, "--keep", "4")
    record = json.loads((out / PROVENANCE_NAME).read_text())
    del record["files"], record["sha256"]  # which know the index as it was written
    (out / PROVENANCE_NAME).write_text(json.dumps(record))
    path = out / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    assert index["metadata"].pop("total_parameters") > 0
    path.write_text(json.dumps(index))
    assert differences(source, out) == ""
    index["metadata"]["total_parameters"] = 7
    path.write_text(json.dumps(index))
    assert "total_parameters is 7, expected" in differences(source, out)


def test_a_shard_has_the_metadata_of_the_shards_that_its_tensors_come_from(source: Path) -> None:
    shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]

    def write_metadata(folder: Path, name: str, words: dict[str, str]) -> None:
        (folder / name).write_bytes(save(load((folder / name).read_bytes()), words))

    for name, word in zip(shards, ("one", "two"), strict=True):
        write_metadata(source, name, {"format": "pt", "of": word})
    out = pruned(source, SCORES, "--keep", "4")
    assert differences(source, out) == ""
    write_metadata(out, shards[0], {"format": "pt", "of": "two"})
    assert differences(source, out) == f"{shards[0]}: __metadata__ 'of' is 'two', expected 'one'"
