"""Experts not all stored alike: allowed between layers, reported within one layer, or refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from shardsurgeon.checkpoint.anatomy import Anatomy, read_anatomy
from shardsurgeon.checkpoint.checkpoint import Checkpoint, open_checkpoint
from shardsurgeon.errors import FamilyError
from shardsurgeon.operations.prune import plan
from shardsurgeon.pruning.keep_lists import KeepList, LayerKeep
from shardsurgeon.pruning.planner import plan_shards
from shardsurgeon.pruning.report import mixed_precision_notes
from shardsurgeon.pruning.request import SelectionRequest
from tests.support import tiny

EXPERTS = range(tiny.EXPERTS)


def read(weights: tiny.Tensors, **config: object) -> tuple[Checkpoint, Anatomy]:
    files = tiny.files(tiny.config(**config), weights)
    checkpoint = open_checkpoint(tiny.MemorySource(files, name="tiny"))
    return checkpoint, read_anatomy(checkpoint)


def keep(*retained: int) -> KeepList:
    gone = tuple(expert for expert in EXPERTS if expert not in retained)
    return KeepList(tiny.EXPERTS, {n: LayerKeep(retained, gone) for n in (1, 2, 3)})


def notes(weights: tiny.Tensors, *retained: int, **config: object) -> list[str]:
    return mixed_precision_notes(*read(weights, **config), keep(*retained))


def name(layer: int, expert: int, part: str = "up_proj.weight") -> str:
    return f"model.layers.{layer}.mlp.experts.{expert}.{part}"


def fp4(weights: tiny.Tensors, layer: int) -> tiny.Tensors:
    """One layer's up projections as ModelOpt's NVFP4 stores them."""
    found = dict(weights)
    for expert in EXPERTS:
        found[name(layer, expert)] = np.zeros((4, 3), "u1")
        found[name(layer, expert, "up_proj.weight_scale")] = np.zeros((4, 1), "f4")
        found[name(layer, expert, "up_proj.weight_scale_2")] = np.array(1.0, "f4")
    return found


def test_experts_stored_alike_need_no_note() -> None:
    assert notes(tiny.tensors(), 0, 1, 2) == []


def test_an_mtp_layer_in_full_precision_beside_a_quantized_body_is_pruned_without_a_note() -> None:
    weights = fp4(fp4(tiny.tensors(), 1), 2)
    checkpoint, anatomy = read(weights)
    assert mixed_precision_notes(checkpoint, anatomy, keep(1, 6)) == []
    shards = plan_shards(checkpoint, anatomy, keep(1, 6))
    kept = {tensor.name: tensor for shard in shards for tensor in shard.tensors}
    assert name(3, 1, "up_proj.weight_scale") not in kept
    assert kept[name(3, 1)].dtype == "F32"
    assert kept[name(2, 1)].dtype == "U8"
    assert kept[name(2, 1, "up_proj.weight_scale_2")].shape == ()


def test_a_layer_left_in_full_precision_is_pruned_without_a_note() -> None:
    assert notes(fp4(tiny.tensors(), 1), 1, 6) == []


def test_survivors_of_another_dtype_are_reported_with_the_expert_that_becomes_expert_0() -> None:
    weights = tiny.tensors()
    for expert in (2, 6):
        weights[name(1, expert)] = weights[name(1, expert)].astype("f2")
    (note,) = notes(weights, 2, 3, 7)
    assert "survivors of layer 1 are not stored alike" in note
    assert "up_proj.weight is F16 [4, 6] in 1 of 3" in note
    assert "its expert 0, which was 2" in note
    # Where the odd ones went, or only they are left, nothing is mixed any more.
    assert notes(weights, 0, 3, 7) == []
    assert notes(weights, 2, 6) == []


def test_survivors_of_another_width_are_reported() -> None:
    weights = tiny.tensors()
    weights[name(2, 5)] = np.zeros((4, 12), "f4")
    (note,) = notes(weights, 0, 5)
    assert "layer 2" in note
    assert "[4, 6] in 1 of 2" in note


def test_an_expert_with_other_tensors_than_its_neighbours_is_refused_by_name() -> None:
    weights = tiny.tensors()
    weights[name(1, 4, "up_proj.weight_scale")] = np.zeros(1, "f4")
    with pytest.raises(FamilyError, match=r"experts\.0\.up_proj\.weight_scale is missing"):
        read(weights)


def test_a_list_that_names_some_survivors_of_a_layer_is_reported() -> None:
    entries = [name(1, expert, "up_proj") for expert in (2, 5)]
    section = {"ignore": entries, "quant_method": "fp8"}
    (note,) = notes(tiny.tensors(), 2, 3, quantization_config=section)
    assert note.startswith("quantization_config.ignore names some experts of layer 1 and not")
    # Both survivors, or neither, is a layer of one kind.
    assert notes(tiny.tensors(), 2, 5, quantization_config=section) == []
    assert notes(tiny.tensors(), 0, 7, quantization_config=section) == []
    assert json.dumps(section) == json.dumps({"ignore": entries, "quant_method": "fp8"})


def test_the_report_of_a_plan_has_the_note(tmp_path: Path) -> None:
    weights = tiny.tensors()
    weights[name(1, 7)] = weights[name(1, 7)].astype("f2")
    model = tmp_path / "model"
    model.mkdir()
    for file, content in tiny.files(weights=weights).items():
        (model / file).write_bytes(content)
    scores = tmp_path / "scores.json"
    scores.write_text(json.dumps({layer: [0.5 + e for e in EXPERTS] for layer in (1, 2)}))
    request = SelectionRequest(keep=4)
    report = plan(str(model), str(scores), request, out=str(tmp_path / "out")).report
    assert any("survivors of layer 1 are not stored alike" in note for note in report.notes)
