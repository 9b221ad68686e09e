"""Experts that lack a tensor, as those do which calibration never reached: pruned, never kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import shardsurgeon
from shardsurgeon.cli.main import main
from shardsurgeon.errors import FamilyError
from shardsurgeon.operations.scores import scores_from_weights
from tests.support import tiny

# Layer → experts without an input scale. Layer 3 is the MTP layer.
UNREACHED = {1: (3, 6), 2: (0,), 3: (7,)}


def weights(lost: str | None = "input_scale") -> tiny.Tensors:
    """The tiny checkpoint with an input scale for each expert's matrices, less what is `lost`."""
    found = tiny.tensors()
    for name in [name for name in found if ".experts." in name]:
        found[name.replace(".weight", ".input_scale")] = np.ones((), np.float32)
    for layer, experts in UNREACHED.items() if lost else ():
        for expert in experts:
            del found[f"model.layers.{layer}.mlp.experts.{expert}.down_proj.{lost}"]
    return found


def model(folder: Path, lost: str | None = "input_scale") -> Path:
    folder.mkdir()
    for name, content in tiny.files(weights=weights(lost)).items():
        (folder / name).write_bytes(content)
    return folder


def scores(path: Path, **changed: list[float]) -> Path:
    """Scores by which the experts without a scale are the worst, unless they say otherwise."""
    table = {str(n): [float(e not in UNREACHED[n]) + e / 100 for e in range(8)] for n in UNREACHED}
    path.write_text(json.dumps(table | changed))
    return path


@pytest.mark.parametrize("lost", ["input_scale", "weight"])
def test_they_go_with_a_prune_that_leaves_the_others(tmp_path: Path, lost: str) -> None:
    source, out = model(tmp_path / "m", lost), tmp_path / "out"
    plan = shardsurgeon.plan(source, scores(tmp_path / "s.json"), ratio=0.25, out=out)
    report = shardsurgeon.apply(plan)
    assert report.verification is not None and report.verification.holds
    assert shardsurgeon.verify(source, out).holds
    written = {name for file in out.glob("*.safetensors") for name in load_file(file)}
    for layer in UNREACHED:
        for expert in range(6):
            for part in ("up_proj", "down_proj"):
                name = f"model.layers.{layer}.mlp.experts.{expert}.{part}"
                assert {f"{name}.weight", f"{name}.input_scale"} <= written
    assert shardsurgeon.inspect(str(out)).incomplete_experts is None


@pytest.mark.parametrize("lost", ["input_scale", "weight"])
def test_a_prune_that_would_keep_one_names_its_layer_and_its_tensor(
    tmp_path: Path, lost: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = model(tmp_path / "m", lost)
    best = [float(e == 3) + e / 100 for e in range(8)]
    table = scores(tmp_path / "s.json", **{"1": best})
    words = ["apply", str(table), "--model", str(source), "--ratio", "0.25"]
    assert main([*words, "-o", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    # Of layer 1 the experts 3 and 6 stay.
    assert "layer 1 is to keep expert 3, and its tensor " in said
    assert (
        f"model.layers.1.mlp.experts.3.down_proj.{lost} is missing, and 1 more experts so" in said
    )
    assert {path.name for path in tmp_path.iterdir()} == {"m", "s.json"}


def test_dropped_mtp_layers_may_lack_what_they_like(tmp_path: Path) -> None:
    source, table = model(tmp_path / "m"), scores(tmp_path / "s.json")
    kept = {"1": [0, 1], "2": [1, 2], "3": [6, 7]}
    plan: Any = tmp_path / "keep.json"
    plan.write_text(json.dumps({n: {"kept": ids, "keep": 2} for n, ids in kept.items()}))
    with pytest.raises(FamilyError, match="layer 3 is to keep expert 7"):
        shardsurgeon.plan(source, plan_file=plan)
    assert shardsurgeon.plan(source, plan_file=plan, mtp="drop").report.mtp_dropped
    assert shardsurgeon.plan(source, table, ratio=0.25).report.num_experts_after == 6


def test_inspect_lists_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = model(tmp_path / "m")
    assert main(["inspect", str(source), "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["incomplete_experts"]
    assert listed == {str(layer): list(experts) for layer, experts in UNREACHED.items()}
    assert main(["inspect", str(source)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["1", "3,", "6"] in lines and ["2", "0"] in lines and ["3", "7"] in lines


def test_verification_finds_one_that_was_kept(tmp_path: Path) -> None:
    whole, source, out = model(tmp_path / "whole", None), model(tmp_path / "m"), tmp_path / "out"
    best = [float(e == 3) + e / 100 for e in range(8)]
    table = scores(tmp_path / "s.json", **{"1": best})
    shardsurgeon.apply(shardsurgeon.plan(whole, table, ratio=0.25, out=out))
    found = shardsurgeon.verify(source, out).differences
    assert any("layers.1: keeps expert 3, whose tensor" in difference for difference in found)


def test_their_weights_are_not_scored(tmp_path: Path) -> None:
    source = model(tmp_path / "m", "weight")
    with pytest.raises(FamilyError, match="layer 1 is to keep expert 3"):
        scores_from_weights(source, tmp_path / "w.json")
