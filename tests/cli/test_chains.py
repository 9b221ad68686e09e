"""Pruning a pruned checkpoint again: ids compose, and the result is that of one direct prune."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from shardsurgeon.cli.main import main
from tests.cli.standins import ROOT
from tests.support import torch_file

METADATA = "calibration/reap_pruning_metadata.json"


@pytest.fixture
def original(tmp_path: Path) -> Path:
    return Path(shutil.copytree(ROOT / "fixtures" / "kimi_k25", tmp_path / "original"))


def prune(model: Path, scores: Path, out: Path, *words: str) -> Path:
    assert main(["apply", str(scores), "--model", str(model), *words, "-o", str(out)]) == 0
    return out


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and "calibration" not in path.parts
    }


def metadata(folder: Path) -> dict:
    return json.loads((folder / METADATA).read_text())


def rolled(experts: int) -> dict[int, np.ndarray]:
    """Scores of the fixture's layers, each with an order of its own."""
    return {layer: np.roll(np.arange(experts) + 0.5, layer) for layer in (1, 2, 3)}


def test_a_chained_prune_equals_the_direct_one_and_the_metadata_says_so(original: Path) -> None:
    scores = original / "scores.pt"
    half = prune(original, scores, original.parent / "half", "--ratio", "0.5")
    chained = prune(half, scores, original.parent / "chained", "--keep", "6")
    direct = prune(original, scores, original.parent / "direct", "--keep", "6")
    assert files(chained) == files(direct)
    said = metadata(chained)
    assert said["layers"] == metadata(direct)["layers"]
    assert (said["num_experts_before"], said["num_experts_after"]) == (32, 6)
    steps = [(step["num_experts_before"], step["num_experts_after"]) for step in said["steps"]]
    assert steps == [(32, 16), (16, 6)]


def test_retained_ids_are_those_of_the_first_model(original: Path) -> None:
    half = prune(original, original / "scores.pt", original.parent / "half", "--ratio", "0.5")
    kept = {layer: entry["retained"] for layer, entry in metadata(half)["layers"].items()}
    # Scores made for the pruned model: its experts 3 and 5 to 9 are the best in every layer.
    again = np.zeros((len(kept), 16), np.float32)
    for shift, row in enumerate(again):
        row[[3, 5, 6, 7, 8, 9]] = np.roll(np.arange(1.0, 7.0), shift)
    scores = original.parent / "again.pt"
    torch_file.save(dict(zip(map(int, kept), again, strict=True)), scores)
    last = prune(half, scores, original.parent / "last", "--keep", "6")
    for layer, entry in metadata(last)["layers"].items():
        assert entry["retained"] == [kept[layer][new] for new in (3, 5, 6, 7, 8, 9)]
        assert sorted(entry["retained"] + entry["pruned"]) == list(range(32))
        assert entry["min_retained_saliency"] >= entry["max_pruned_saliency"]


def test_scores_of_a_model_in_between_are_refused(
    original: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    half = prune(original, original / "scores.pt", original.parent / "half", "--ratio", "0.5")
    torch_file.save(rolled(24), original.parent / "x.pt")
    words = ["apply", str(original.parent / "x.pt"), "--model", str(half), "--keep", "6"]
    assert main([*words, "-o", str(original.parent / "out")]) == 2
    assert (
        "24 scores, the model has 16 experts (32 before it was pruned)" in capsys.readouterr().err
    )


def test_every_score_file_stays_beside_the_weights(original: Path) -> None:
    half = prune(original, original / "scores.pt", original.parent / "half", "--ratio", "0.5")
    torch_file.save(rolled(16), original.parent / "scores.pt")
    last = prune(half, original.parent / "scores.pt", original.parent / "last", "--keep", "6")
    first = (original / "scores.pt").read_bytes()
    second = (original.parent / "scores.pt").read_bytes()
    assert (last / "calibration" / "scores.pt").read_bytes() == first
    assert (last / "calibration" / "scores-2.pt").read_bytes() == second
    assert not (half / "scores.pt").exists()


def test_a_saved_plan_gives_the_same_weights_as_its_scores(original: Path) -> None:
    plan = original.parent / "plan.json"
    words = ["--model", str(original), "--ratio", "0.5"]
    assert main(["plan", str(original / "scores.pt"), *words, "-o", str(plan)]) == 0
    planned = original.parent / "planned"
    given = ["apply", "--model", str(original), "--plan", str(plan), "-o", str(planned)]
    assert main(given) == 0
    direct = prune(original, original / "scores.pt", original.parent / "direct", "--ratio", "0.5")
    weights = {n: data for n, data in files(direct).items() if n != "scores.pt"}
    assert {n: data for n, data in files(planned).items() if n != "scores.pt"} == weights
    assert (
        metadata(planned)["layers"]["1"]["retained"] == metadata(direct)["layers"]["1"]["retained"]
    )


def test_published_metadata_prunes_the_original_again(original: Path) -> None:
    half = prune(original, original / "scores.pt", original.parent / "half", "--ratio", "0.5")
    again = original.parent / "again"
    words = ["apply", "--model", str(original), "--plan", str(half / METADATA), "-o", str(again)]
    assert main(words) == 0
    ours, theirs = files(again), files(half)
    assert {n: d for n, d in ours.items() if n != "scores.pt"} == theirs
    assert (again / "calibration" / "reap_pruning_metadata-2.json").is_file()
