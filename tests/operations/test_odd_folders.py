"""Folders as people have them, pruned and verified: what safetensors reads from the result."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save, save_file

import shardsurgeon
from shardsurgeon.operations.prune import Pruning
from tests.support import tiny

INDEX = "model.safetensors.index.json"
FIRST, SECOND = (f"model-0000{n}-of-00002.safetensors" for n in (1, 2))
# Experts 1, 3, 4 and 6 of layer 1 and 0, 2, 5 and 7 of layer 2 are the better half.
SCORES = {
    "1": [0.11, 0.92, 0.08, 0.71, 0.64, 0.23, 0.83, 0.35],
    "2": [0.77, 0.31, 0.95, 0.12, 0.05, 0.68, 0.22, 0.86],
}
KEPT = {1: (1, 3, 4, 6), 2: (0, 2, 5, 7)}


def write(folder: Path, files: Mapping[str, bytes]) -> Path:
    folder.mkdir(parents=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def planned(model: Path, **options: object) -> Pruning:
    scores = model.parent / "scores.json"
    scores.write_text(json.dumps(SCORES))
    return shardsurgeon.plan(model, scores, ratio=0.5, **options)


def pruned(model: Path, **options: object) -> Path:
    """The result, which `verify` holds for."""
    plan = planned(model, **options)
    out = model.parent / "out"
    shardsurgeon.apply(plan, out)
    report = shardsurgeon.verify(model, out)
    assert report.holds, report.differences
    return out


def stored(folder: Path) -> tiny.Tensors:
    """Every tensor of the weight files, each of which may be in one of them only."""
    found: tiny.Tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        held = load_file(file)
        assert not held.keys() & found.keys()
        found |= held
    return found


def expected(tensors: tiny.Tensors, kept: Mapping[int, tuple[int, ...]] = KEPT) -> tiny.Tensors:
    """What is left of the main layers' experts and routers; MTP tensors are not among them."""
    left: tiny.Tensors = {}
    for layer, ids in kept.items():
        block = f"model.layers.{layer}.mlp"
        for new, old in enumerate(ids):
            for part in ("up_proj", "down_proj"):
                left[f"{block}.experts.{new}.{part}.weight"] = tensors[
                    f"{block}.experts.{old}.{part}.weight"
                ]
        for name in ("gate.weight", "gate.e_score_correction_bias"):
            left[f"{block}.{name}"] = tensors[f"{block}.{name}"][list(ids)]
    return left


def same(found: tiny.Tensors, wanted: tiny.Tensors) -> bool:
    return all(np.array_equal(found[name], tensor) for name, tensor in wanted.items())


def with_metadata(files: dict[str, bytes], metadata: object, mark: bytes = b"") -> dict[str, bytes]:
    index = json.loads(files[INDEX])
    return {**files, INDEX: mark + json.dumps({**index, "metadata": metadata}).encode()}


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("metadata", [None, {}, {"total_size": None}])
def test_an_index_that_notes_nothing_is_as_good_as_any(
    tmp_path: Path, metadata: object, mark: bytes
) -> None:
    out = pruned(write(tmp_path / "model", with_metadata(tiny.files(), metadata, mark)))
    found = stored(out)
    assert same(found, expected(tiny.tensors()))
    total = sum(tensor.nbytes for tensor in found.values())
    assert json.loads((out / INDEX).read_text())["metadata"]["total_size"] == total


def test_counts_in_an_index_are_counted_anew(tmp_path: Path) -> None:
    """Three shards become two, since nothing is left in the one that held MTP tensors only."""
    said = {"total_shards": 7, "num_shards": 3, "num_tensors": 1, "by": "me"}
    files = {
        "config.json": json.dumps(tiny.config()).encode(),
        **tiny.files(shard_of=lambda name: 3 if "layers.3" in name else 2 if "2" in name else 1),
    }
    out = pruned(write(tmp_path / "model", with_metadata(files, said)), mtp="drop")
    metadata = json.loads((out / INDEX).read_text())["metadata"]
    assert metadata.pop("total_size") > 0
    assert metadata.pop("total_parameters") > 0
    found = stored(out)
    assert metadata == {"total_shards": 2, "num_shards": 2, "num_tensors": len(found), "by": "me"}
    index = out / INDEX
    index.write_text(index.read_text().replace('"total_shards": 2', '"total_shards": 7'))
    (difference,) = shardsurgeon.verify(tmp_path / "model", out).differences
    assert "total_shards is 7, expected 2" in difference


def packed_tensors() -> tiny.Tensors:
    """Weights packed in integers of which nothing says into how many bits."""
    return {
        name.replace(".weight", ".weight_packed") if "experts." in name else name: (
            (tensor * 1000).astype(np.int32) if "mlp.experts." in name else tensor
        )
        for name, tensor in tiny.tensors().items()
        if "shared_experts" not in name
    }


def test_a_number_of_parameters_that_cannot_be_known_is_left_out_and_said_before(
    tmp_path: Path,
) -> None:
    files = with_metadata(tiny.files(weights=packed_tensors()), {"total_parameters": 123_456})
    model = write(tmp_path / "model", files)
    (note,) = [note for note in planned(model).report.notes if "total_parameters" in note]
    assert note.startswith(f"total_parameters is left out of {INDEX}: ")
    out = pruned(model)
    index = json.loads((out / INDEX).read_text())
    assert set(index["metadata"]) == {"total_size"}
    index["metadata"]["total_parameters"] = 123_456
    (out / INDEX).write_text(json.dumps(index))
    assert any(
        "total_parameters is 123456, expected None" in difference
        for difference in shardsurgeon.verify(model, out).differences
    )


def test_a_tensor_laid_over_another_is_the_one_that_is_pruned(tmp_path: Path) -> None:
    """An overlay shard has better weights, a stale shard some that were replaced."""
    files, weights = tiny.files(), tiny.tensors()
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    gate = "model.layers.2.mlp.gate.weight"
    over = {name: weights[name] + 1, gate: weights[gate] * 2}
    index = json.loads(files[INDEX])
    index["weight_map"] |= dict.fromkeys(over, "overlay.safetensors")
    files |= {"overlay.safetensors": save(over), INDEX: json.dumps(index).encode()}
    out = pruned(write(tmp_path / "model", files))
    found = stored(out)
    assert same(found, expected({**weights, **over}))
    assert len(found) == len(json.loads((out / INDEX).read_text())["weight_map"])


def test_a_tensor_that_the_result_has_twice_is_a_difference(tmp_path: Path) -> None:
    model = write(tmp_path / "model", tiny.files())
    out = pruned(model)
    held = load_file(out / FIRST)
    twice = {**held, "model.layers.2.mlp.gate.weight": np.zeros((4, 6), np.float32)}
    save_file(twice, out / FIRST, metadata={"format": "pt"})
    report = shardsurgeon.verify(model, out)
    assert f"{FIRST} model.layers.2.mlp.gate.weight: is in another shard too" in report.differences


def test_shards_under_several_names_and_no_index(tmp_path: Path) -> None:
    files = tiny.files()
    del files[INDEX]
    files["trunk.safetensors"], files["rest.safetensors"] = files.pop(FIRST), files.pop(SECOND)
    assert same(stored(pruned(write(tmp_path / "model", files))), expected(tiny.tensors()))


HEAD = "mtp.safetensors"
MTP = {name: tensor for name, tensor in tiny.tensors().items() if "layers.3." in name}
MAIN = {name: tensor for name, tensor in tiny.tensors().items() if name not in MTP}


def with_head_apart(**config: object) -> dict[str, bytes]:
    """An MTP layer in a file that the index does not list."""
    return {**tiny.files(tiny.config(**config), MAIN), HEAD: save(MTP, {"format": "pt"})}


def test_a_head_that_the_index_forgot_is_pruned_with_the_model_and_listed(tmp_path: Path) -> None:
    out = pruned(write(tmp_path / "model", with_head_apart()), mtp="last")
    weights, found = tiny.tensors(), stored(out)
    assert same(found, expected(weights, {**KEPT, 3: KEPT[2]}))
    assert same(found, {name: MTP[name] for name in MTP if "mlp" not in name})
    assert set(json.loads((out / INDEX).read_text())["weight_map"]) == set(found)
    assert json.loads((out / "config.json").read_text())["num_nextn_predict_layers"] == 1
    assert not (out / HEAD).exists()


def test_it_can_be_dropped_like_any_other(tmp_path: Path) -> None:
    out = pruned(write(tmp_path / "model", with_head_apart()), mtp="drop")
    assert not [name for name in stored(out) if "layers.3." in name]
    assert json.loads((out / "config.json").read_text())["num_nextn_predict_layers"] == 0


def test_a_result_that_lost_it_does_not_hold(tmp_path: Path) -> None:
    """As earlier versions wrote it: without the head, its count as it was."""
    model = write(tmp_path / "model", with_head_apart())
    headless = write(tmp_path / "headless" / "model", tiny.files(weights=MAIN))
    report = shardsurgeon.verify(model, pruned(headless))
    assert not report.holds
    assert any("num_nextn_predict_layers is 1, expected 0" in line for line in report.differences)


def test_a_result_that_does_not_list_its_head_does_not_hold(tmp_path: Path) -> None:
    model = write(tmp_path / "model", with_head_apart())
    out = pruned(model)
    index = json.loads((out / INDEX).read_text())
    index["weight_map"] = {n: f for n, f in index["weight_map"].items() if "layers.3." not in n}
    (out / INDEX).write_text(json.dumps(index))
    assert any("does not list" in line for line in shardsurgeon.verify(model, out).differences)


def test_mtp_layers_that_are_promised_and_not_there_are_said(tmp_path: Path) -> None:
    model = write(tmp_path / "model", tiny.files(weights=MAIN))
    said = "config.json counts 1 MTP layer (num_nextn_predict_layers), the shards have none"
    for report in (planned(model).report, shardsurgeon.inspect(str(model))):
        (note,) = [note for note in report.notes if said in note]
        assert "`apply --mtp drop` sets the count to 0" in note
    assert not [note for note in planned(model, mtp="drop").report.notes if said in note]
    out = pruned(model, mtp="drop")
    assert json.loads((out / "config.json").read_text())["num_nextn_predict_layers"] == 0
