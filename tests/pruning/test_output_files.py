"""The files beside the shards: the index, others' records, score files, and what was asked for."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from shardsurgeon.operations import prune
from shardsurgeon.operations.prune import Pruning
from shardsurgeon.pruning.request import MtpPolicy, SelectionRequest
from tests.support import tiny

INDEX = "model.safetensors.index.json"
RECORD = "calibration/reap_pruning_metadata.json"
SCORES = {str(layer): [expert + 0.5 for expert in range(8)] for layer in (1, 2, 3)}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    for name, content in tiny.files().items():
        (tmp_path / "model").mkdir(exist_ok=True)
        (tmp_path / "model" / name).write_bytes(content)
    return tmp_path / "model"


@pytest.fixture
def scores(tmp_path: Path) -> Path:
    (tmp_path / "scores.json").write_text(json.dumps(SCORES))
    return tmp_path / "scores.json"


def planned(model: Path, scores: Path, **options: Any) -> Pruning:
    size = options.pop("max_shard_nbytes", None)
    request = SelectionRequest(**({"keep": 4} | options))
    return prune.plan(str(model), str(scores), request, max_shard_nbytes=size)


def written(pruning: Pruning) -> dict[str, bytes]:
    return dict(pruning.plan.generated_files)


def edit_index(model: Path, **metadata: object) -> None:
    index = json.loads((model / INDEX).read_text())
    index["metadata"] |= metadata
    (model / INDEX).write_text(json.dumps(index))


def test_the_index_lists_and_counts_what_is_left(model: Path, scores: Path) -> None:
    edit_index(model, total_shards=2, num_tensors=66, by="somebody", total_parameters=1)
    pruning = planned(model, scores)
    tensors = {t.name: (t, s.file) for s in pruning.plan.shards for t in s.tensors}
    index = json.loads(written(pruning)[INDEX])
    assert index["weight_map"] == {name: file for name, (_, file) in tensors.items()}
    nbytes = sum(tensor.nbytes for tensor, _ in tensors.values())
    # Every value is a float32.
    assert index["metadata"] == {
        "total_size": nbytes,
        "total_shards": 2,
        "num_tensors": len(tensors),
        "by": "somebody",
        "total_parameters": nbytes // 4,
    }


def test_an_index_that_counts_shards_follows_a_repacking(model: Path, scores: Path) -> None:
    edit_index(model, num_shards=2)
    pruning = planned(model, scores, max_shard_nbytes=1500)
    index = json.loads(written(pruning)[INDEX])
    assert index["metadata"]["num_shards"] == len(pruning.plan.shards) > 3
    assert set(index["weight_map"].values()) == {shard.file for shard in pruning.plan.shards}


def test_one_shard_has_no_index(model: Path, scores: Path) -> None:
    assert INDEX not in written(planned(model, scores, max_shard_nbytes=10**9))


def test_the_record_comes_first_and_config_and_index_last(model: Path, scores: Path) -> None:
    (model / "hf_quant_config.json").write_text('{"exclude_modules": ["lm_head"]}')
    names = list(written(planned(model, scores)))
    assert names == [RECORD, "hf_quant_config.json", "config.json", INDEX]


def test_another_tools_record_is_kept_beside_ours(model: Path, scores: Path) -> None:
    (model / "calibration").mkdir()
    (model / RECORD).write_text('{"tool": "another"}')
    files = written(planned(model, scores))
    assert files["calibration/reap_pruning_metadata.source.json"] == b'{"tool": "another"}'
    assert json.loads(files[RECORD])["method"] == "reap"


def test_our_own_record_of_an_earlier_prune_makes_way(
    model: Path, scores: Path, tmp_path: Path
) -> None:
    (model / "calibration").mkdir()
    (model / RECORD).write_bytes(written(planned(model, scores, keep=8 - 2))[RECORD])
    # The record says six experts are left, so the model is made to have them.
    kept = {name: values for name, values in tiny.tensors().items() if not _is_gone(name)}
    for name, values in kept.items():
        if ".mlp.gate." in name:
            kept[name] = values[:6]
    for name, content in tiny.files(tiny.config(n_routed_experts=6), kept).items():
        (model / name).write_bytes(content)
    files = written(planned(model, scores, keep=3))
    assert list(files) == [RECORD, "config.json", INDEX]
    assert len(json.loads(files[RECORD])["steps"]) == 2


def _is_gone(name: str) -> bool:
    return any(f"experts.{expert}." in name for expert in (6, 7))


def test_score_files_go_to_calibration_under_a_name_that_is_free(model: Path, scores: Path) -> None:
    digest = hashlib.sha256(scores.read_bytes()).hexdigest()
    ours = ("calibration/scores.json", str(scores), digest)
    assert planned(model, scores).plan.score_files == (ours,)
    (model / "calibration").mkdir()
    for name in ("scores.json", "scores-2.json"):
        (model / "calibration" / name).write_text("{}")
    plan = planned(model, scores).plan
    assert plan.score_files == (("calibration/scores-3.json", str(scores), digest),)
    assert {"calibration/scores.json", "calibration/scores-2.json"} <= set(plan.copied_files)


def test_a_score_file_that_lies_in_the_model_goes_nowhere_else(model: Path, scores: Path) -> None:
    scores = scores.rename(model / "scores.json")
    plan = planned(model, scores).plan
    assert [name for name, _, _ in plan.score_files] == ["calibration/scores.json"]
    assert plan.copied_files == ("tokenizer.json",)


def test_what_was_asked_for_is_said_so_that_two_commands_can_be_told_apart(
    model: Path, scores: Path
) -> None:
    def asked(**options: Any) -> dict[str, str]:
        return dict(planned(model, scores, **options).plan.asked)

    by_ratio = asked(keep=None, ratio=0.5)
    assert by_ratio["selection"] == "ratio 0.5, rounding floor, metric saliency"
    assert by_ratio["experts kept"] == "up to 4 per layer"
    assert by_ratio["shards"] == "as the source's"
    by_count = asked(max_shard_nbytes=10**6, exclude=("tokenizer.json",))
    assert by_count["selection"].startswith("keep, metric")
    differ = {name for name in by_ratio if by_ratio[name] != by_count[name]}
    assert differ == {"selection", "shards", "--exclude"}
    assert asked(keep=5)["keep-lists"] != by_ratio["keep-lists"]


def test_a_source_that_changed_in_any_way_has_another_fingerprint(
    model: Path, scores: Path
) -> None:
    first = planned(model, scores).plan.source_fingerprint
    assert planned(model, scores).plan.source_fingerprint == first
    (model / "tokenizer.json").write_bytes(b"{ }")
    second = planned(model, scores).plan.source_fingerprint
    (model / "notes.txt").write_bytes(b"more")
    assert len({first, second, planned(model, scores).plan.source_fingerprint}) == 3


def test_weights_in_a_folder_are_told_of_and_the_score_file_is_not_left_behind(
    model: Path, scores: Path
) -> None:
    for folder in ("vision", "calibration"):
        (model / folder).mkdir()
        (model / folder / "x.safetensors").write_bytes(bytes(2000))
    inside = scores.rename(model / "scores.json")
    (model / "trace.log").write_text("words")
    report = planned(model, inside, include=("trace.log",)).report
    told = [note for note in report.notes if "of weights, which are carried along" in note]
    assert [note.partition(" ")[0] for note in told] == ["vision/"]
    assert "vision/x.safetensors" in report.carried_along
    assert "scores.json" not in {*report.left_behind, *report.carried_along}
    assert "trace.log" in report.carried_along


def test_mtp_layers_are_dropped_only_where_there_are_some(model: Path, scores: Path) -> None:
    assert planned(model, scores, mtp=MtpPolicy.DROP).report.mtp_dropped
    assert not planned(model, scores).report.mtp_dropped
    weights = {name: each for name, each in tiny.tensors().items() if ".layers.3." not in name}
    config = tiny.config(num_nextn_predict_layers=None)
    for name, content in tiny.files(config, weights).items():
        (model / name).write_bytes(content)
    scores.write_text(json.dumps({layer: SCORES[layer] for layer in ("1", "2")}))
    assert not planned(model, scores, mtp=MtpPolicy.DROP).report.mtp_dropped
