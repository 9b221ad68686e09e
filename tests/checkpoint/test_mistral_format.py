"""Mistral's own format: params.json, consolidated*.safetensors, names and keys of their own."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import shardsurgeon
from shardsurgeon.checkpoint.anatomy import read_anatomy
from shardsurgeon.checkpoint.checkpoint import open_checkpoint
from shardsurgeon.cli.main import main
from shardsurgeon.errors import CheckpointError, FamilyError
from shardsurgeon.operations.card_data import model_facts
from shardsurgeon.operations.model_card import Placement, model_card
from shardsurgeon.operations.push_files import select_files

INDEX = "consolidated.safetensors.index.json"
PARAMS: dict[str, Any] = {
    "dim": 6,
    "n_layers": 2,
    "n_heads": 2,
    "hidden_dim": 8,
    "vocab_size": 10,
    "moe": {"num_experts": 8, "num_experts_per_tok": 2},
}


def tensors(place: str) -> dict[str, np.ndarray[Any, Any]]:
    """place: where the router and the experts lie in a layer."""
    numbers = np.random.default_rng(5)
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (10, 6), "norm.weight": (6,)}
    for layer in range(2):
        shapes[f"layers.{layer}.attention.wq.weight"] = (6, 6)
        shapes[f"layers.{layer}.ffn_norm.weight"] = (6,)
        shapes[f"layers.{layer}.{place}gate.weight"] = (8, 6)
        for expert in range(8):
            for part, shape in {"w1": (4, 6), "w2": (6, 4), "w3": (4, 6)}.items():
                shapes[f"layers.{layer}.{place}experts.{expert}.{part}.weight"] = shape
    return {n: numbers.standard_normal(s).astype(np.float32) for n, s in shapes.items()}


def model(folder: Path, shards: int = 2, place: str = "") -> Path:
    folder.mkdir()
    weights = tensors(place)
    names = sorted(weights)
    weight_map = {}
    for number in range(shards):
        file = "consolidated.safetensors"
        if shards > 1:
            file = f"consolidated-{number + 1:05d}-of-{shards:05d}.safetensors"
        held = {name: weights[name] for name in names[number::shards]}
        save_file(held, folder / file)
        weight_map |= dict.fromkeys(held, file)
    if shards > 1:
        size = sum(values.nbytes for values in weights.values())
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index))
    (folder / "params.json").write_text(json.dumps(PARAMS, indent=4))
    (folder / "tekken.json").write_text("{}")
    draw = random.Random(3)
    scores = {str(layer): [draw.random() for _ in range(8)] for layer in range(2)}
    (folder / "scores.json").write_text(json.dumps(scores))
    return folder


def held(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    return {n: t for f in folder.glob("*.safetensors") for n, t in load_file(f).items()}


@pytest.mark.parametrize("place", ["", "feed_forward."])
@pytest.mark.parametrize("shards", [1, 2])
def test_it_is_pruned_into_the_same_format(tmp_path: Path, shards: int, place: str) -> None:
    source, out = model(tmp_path / "m", shards, place), tmp_path / "out"
    words = ["apply", str(source / "scores.json"), "--model", str(source), "--ratio", "0.5"]
    assert main([*words, "-o", str(out)]) == 0
    weights = {"consolidated.safetensors"}
    if shards > 1:
        weights = {INDEX, *(f"consolidated-0000{n}-of-00002.safetensors" for n in (1, 2))}
    assert {file.name for file in out.iterdir()} == {
        *weights,
        *("params.json", "tekken.json", "calibration"),
    }
    text = (source / "params.json").read_text()
    expected = text.replace('"num_experts": 8', '"num_experts": 4')
    assert (out / "params.json").read_text() == expected
    before, after = held(source), held(out)
    record = json.loads((out / "calibration" / "reap_pruning_metadata.json").read_text())
    for layer in range(2):
        kept = record["layers"][str(layer)]["retained"]
        prefix = f"layers.{layer}.{place}"
        gate = before.pop(f"{prefix}gate.weight")[kept]
        assert np.array_equal(after.pop(f"{prefix}gate.weight"), gate)
        for new, old in enumerate(kept):
            for part in ("w1", "w2", "w3"):
                there = after.pop(f"{prefix}experts.{new}.{part}.weight")
                assert np.array_equal(there, before[f"{prefix}experts.{old}.{part}.weight"])
    rest = {name: values for name, values in before.items() if ".experts." not in name}
    assert after.keys() == rest.keys()
    assert all(np.array_equal(after[name], rest[name]) for name in rest)
    if shards > 1:
        index = json.loads((out / INDEX).read_text())
        assert index["weight_map"].keys() == held(out).keys()
    assert shardsurgeon.verify(source, out).holds
    assert shardsurgeon.inspect(str(out)).num_experts == 4


def test_a_pruned_one_is_pruned_again(tmp_path: Path) -> None:
    source = model(tmp_path / "m")
    table = source / "scores.json"
    once = shardsurgeon.plan(source, table, keep=6, out=tmp_path / "six")
    shardsurgeon.apply(once)
    twice = shardsurgeon.plan(tmp_path / "six", table, keep=3, out=tmp_path / "three")
    assert shardsurgeon.apply(twice).verification is not None
    assert shardsurgeon.verify(tmp_path / "six", tmp_path / "three").holds


def test_a_wrong_count_in_it_is_found(tmp_path: Path) -> None:
    source, out = model(tmp_path / "m"), tmp_path / "out"
    shardsurgeon.apply(shardsurgeon.plan(source, source / "scores.json", keep=4, out=out))
    (out / "params.json").write_bytes((source / "params.json").read_bytes())
    found = shardsurgeon.verify(source, out).differences
    assert any(line.startswith("params.json: moe.num_experts is 8") for line in found)


def test_weights_in_both_formats_are_those_of_config_json(tmp_path: Path) -> None:
    source = model(tmp_path / "m")
    weights = {f"model.{name}": values for name, values in tensors("").items()}
    save_file(weights, source / "model.safetensors")
    (source / "config.json").write_text('{"model_type": "qwen3", "hidden_size": 6}')
    with pytest.raises(FamilyError, match="'qwen3' names no experts"):
        shardsurgeon.inspect(str(source))


def test_a_config_json_beside_its_weights_alone_is_refused(tmp_path: Path) -> None:
    source = model(tmp_path / "m")
    (source / "config.json").write_text(json.dumps({"model_type": "mixtral"}))
    with pytest.raises(CheckpointError, match=r"has config\.json, and weights in Mistral's own"):
        shardsurgeon.inspect(str(source))


def test_a_dense_model_in_it_is_refused_as_dense(tmp_path: Path) -> None:
    source = model(tmp_path / "m")
    dense = {key: value for key, value in PARAMS.items() if key != "moe"}
    (source / "params.json").write_text(json.dumps(dense))
    with pytest.raises(FamilyError, match="dense model has none to prune"):
        shardsurgeon.inspect(str(source))


def test_its_card_speaks_of_the_engine_that_reads_it(tmp_path: Path) -> None:
    source, out = model(tmp_path / "m"), tmp_path / "out"
    shardsurgeon.apply(shardsurgeon.plan(source, source / "scores.json", keep=4, out=out))
    pruned = open_checkpoint(out)
    assert pruned.provenance is not None
    facts = model_facts(pruned, read_anatomy(pruned), pruned.provenance, out)
    card = model_card(facts, Placement("me/small", None, ("command",)))
    assert "Serve it as its original is served" in card and "library_name: vllm" in card
    assert "transformers" not in card


def test_a_push_takes_its_files_along(tmp_path: Path) -> None:
    source, out = model(tmp_path / "m"), tmp_path / "out"
    shardsurgeon.apply(shardsurgeon.plan(source, source / "scores.json", keep=4, out=out))
    chosen = {file.name for file in select_files(open_checkpoint(out)).files}
    assert {"params.json", INDEX, "consolidated-00001-of-00002.safetensors"} <= chosen
