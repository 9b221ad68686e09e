"""What lies beside the weights, from a model's folder into OUT, by the real commands' functions."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

import shardsurgeon
from shardsurgeon.checkpoint.provenance import PROVENANCE_NAME
from shardsurgeon.errors import OutputError, UsageError, VerificationError
from shardsurgeon.operations import api, scores
from tests.operations.workbench import digests
from tests.support.hub.models import fixture_folder

FAMILY = "qwen3_moe"
TOKEN = "hf_" + "aB3dE6gH9jK2mN5pQ8sT1vW4" * 2

SCRAP = {
    ".env": f"HF_TOKEN={TOKEN}\n",
    ".DS_Store": "x",
    "train.log": "step 1\n",
    "nohup.out": "x",
    "wandb/run-1/files/config.yaml": "x",
    "wandb/debug.log": "x",
    "model.tmp": "x",
    "config.json.bak": "{}",
    "adapter_config.json": "{}",
    "params.json": '{"moe": {"num_experts": 128}}',
    "tf_model.h5": "x",
    "model.onnx": "x",
    "flax_model.msgpack": "x",
    "optimizer.pt": "x",
    "last.ckpt": "x",
    "training_args.bin": "x",
    "lora/adapter_model.safetensors": "x",
}
BELONGS = {
    "NOTICE": "x",
    "modeling_tiny.py": "x",
    "figures/banner.png": "\x00x",
    "eval_results.json": "{}",
    "vision/config.json": "{}",
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model's folder as people have it: scrap, secrets, a plan, scores of another run."""
    folder = tmp_path / "model"
    shutil.copytree(fixture_folder(FAMILY), folder)
    for name, text in {**SCRAP, **BELONGS}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    shutil.copy(folder / "model-00001-of-00003.safetensors", folder / "vision" / "x.safetensors")
    shutil.copy(folder / "scores.pt", folder / "older.pt")
    api.plan(folder, folder / "scores.pt", keep=4).write_plan(folder / "plan.json")
    return folder


LEFT = {*SCRAP, "older.pt", "plan.json"}


def prune(model: Path, out: Path, **options: Any) -> shardsurgeon.Pruning:
    return api.plan(model, model / "scores.pt", ratio=0.5, out=out, **options)


def names(folder: Path) -> set[str]:
    return set(digests(folder))


def test_what_belongs_to_a_model_is_carried_along_and_nothing_else(
    model: Path, tmp_path: Path
) -> None:
    before = digests(model)
    report = api.apply(prune(model, tmp_path / "out"))
    there = digests(tmp_path / "out")
    assert not LEFT & there.keys()
    carried = {*BELONGS, "vision/x.safetensors", "tokenizer.json", "README.md", "LICENSE"}
    assert carried <= there.keys()
    assert all(there[name] == before[name] for name in carried)
    assert set(report.plan.left_behind) == LEFT
    assert report.plan.left_behind["plan.json"] == "plan"
    assert report.plan.left_behind["older.pt"] == "scores"
    assert carried <= {*report.plan.carried_along}
    copied = {*report.plan.carried_along, "config.json", "model.safetensors.index.json"}
    assert there.keys() == copied | {name for name in there if name.startswith("model-")} | {
        "calibration/scores.pt",
        PROVENANCE_NAME,
    }
    assert digests(model) == before
    assert api.verify(model, tmp_path / "out").holds


def test_of_a_result_nothing_is_left_behind_when_it_is_pruned_again(
    model: Path, tmp_path: Path
) -> None:
    api.apply(prune(model, tmp_path / "out"))
    again = api.plan(tmp_path / "out", model / "scores.pt", keep=4)
    assert again.report.left_behind == {}


def test_weights_in_a_folder_are_carried_along_and_said(model: Path, tmp_path: Path) -> None:
    notes = [note for note in prune(model, tmp_path / "out").report.notes if "vision/" in note]
    assert len(notes) == 1
    assert "of weights, which are carried along as they are; --exclude vision leaves" in notes[0]
    without = prune(model, tmp_path / "out", exclude=["vision"]).report
    assert not [note for note in without.notes if "vision/" in note]
    assert without.left_behind["vision/x.safetensors"] == "excluded"


def test_the_record_names_every_file_and_its_size(model: Path, tmp_path: Path) -> None:
    api.apply(prune(model, tmp_path / "out"))
    record = json.loads((tmp_path / "out" / PROVENANCE_NAME).read_bytes())
    sizes = {name: (tmp_path / "out" / name).stat().st_size for name in names(tmp_path / "out")}
    del sizes[PROVENANCE_NAME]
    assert record["files"] == sizes
    assert "include" not in record


def test_globs_decide_otherwise_and_the_result_verifies(model: Path, tmp_path: Path) -> None:
    globs = {"include": ["wandb/*", ".env", "model.onnx"], "exclude": ["figures", "NOTICE"]}
    report = api.apply(prune(model, tmp_path / "out", **globs))
    there = names(tmp_path / "out")
    assert {".env", "wandb/debug.log", "model.onnx"} <= there
    assert not {"figures/banner.png", "NOTICE"} & there
    assert report.plan.left_behind["NOTICE"] == "excluded"
    assert api.verify(model, tmp_path / "out").holds
    (tmp_path / "out" / ".env").unlink()
    found = api.verify(model, tmp_path / "out").differences
    assert found == (".env: is missing",)


def test_a_keep_list_run_takes_the_globs_too(model: Path, tmp_path: Path) -> None:
    pruning = api.plan(
        model, plan_file=model / "plan.json", out=tmp_path / "out", exclude=["modeling_*"]
    )
    api.apply(pruning)
    assert "modeling_tiny.py" not in names(tmp_path / "out")
    assert "calibration/plan.json" in names(tmp_path / "out")
    # What decided is not said to be left behind.
    assert "plan.json" not in pruning.report.left_behind
    assert pruning.report.left_behind["scores.pt"] == "scores"


def test_a_glob_that_would_break_the_model_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"exclude: \*\.json would exclude config\.json"):
        prune(model, tmp_path / "out", exclude=["*.json"])
    with pytest.raises(UsageError, match=r"include: evals/\* fits none"):
        prune(model, tmp_path / "out", include=["evals/*"])


def test_other_globs_are_another_request(model: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        api.apply(prune(model, tmp_path / "out"), workers=1, on_progress=_after_a_shard)
    with pytest.raises(OutputError):
        api.apply(prune(model, tmp_path / "out", include=[".env"]))
    report = api.apply(prune(model, tmp_path / "out"))
    assert report.bytes_resumed > 0


def _after_a_shard(progress: Any) -> None:
    if progress.shards_done == 1:
        raise KeyboardInterrupt


def test_what_is_left_behind_may_change_meanwhile(model: Path, tmp_path: Path) -> None:
    pruning = prune(model, tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        api.apply(pruning, workers=1, on_progress=_after_a_shard)
    with (model / "train.log").open("a") as log:
        log.write("step 2\n")
    (model / "wandb" / "new.json").write_text("{}")
    report = api.apply(prune(model, tmp_path / "out"))
    assert report.bytes_resumed > 0
    one = digests(tmp_path / "out")
    api.apply(prune(model, tmp_path / "again"))
    assert digests(tmp_path / "again") == one


def test_a_file_that_belongs_and_is_not_there_is_found(model: Path, tmp_path: Path) -> None:
    api.apply(prune(model, tmp_path / "out"))
    (tmp_path / "out" / "modeling_tiny.py").unlink()
    (tmp_path / "out" / "NOTICE").write_text("y")
    (tmp_path / "out" / "pytorch_model.bin").write_text("y")
    assert api.verify(model, tmp_path / "out").differences == (
        "NOTICE: is not the source's, byte for byte",
        "modeling_tiny.py: is missing",
        "pytorch_model.bin: is a weight file that is not part of the model",
    )


def test_a_folder_of_an_earlier_version_still_verifies(model: Path, tmp_path: Path) -> None:
    api.apply(prune(model, tmp_path / "out"))
    as_before(model, tmp_path / "out")
    assert api.verify(model, tmp_path / "out").holds
    # And where those files have been removed since.
    (tmp_path / "out" / ".env").unlink()
    assert api.verify(model, tmp_path / "out").holds


def as_before(model: Path, out: Path) -> None:
    """Turn a prune into what versions without the record of files made of the same folder."""
    path = out / PROVENANCE_NAME
    record = json.loads(path.read_bytes())
    del record["files"], record["sha256"]
    path.write_text(json.dumps(record))
    for name in LEFT - {"training_args.bin"}:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(model / name, out / name)


def test_calibration_of_an_earlier_prune_stays(model: Path, tmp_path: Path) -> None:
    shutil.copy(model / "scores.pt", model / "first.pth")
    scores.convert_scores(model / "scores.pt", model / "more.safetensors")
    api.apply(api.plan(model, model / "first.pth", keep=8, out=tmp_path / "one"))
    shutil.move(model / "more.safetensors", tmp_path / "one" / "calibration")
    two = api.plan(tmp_path / "one", model / "scores.pt", keep=4, out=tmp_path / "two")
    api.apply(two)
    assert not [note for note in two.report.notes if "calibration" in note]
    there = names(tmp_path / "two")
    assert {"first.pth", "scores.pt", "more.safetensors"} <= {n.rpartition("/")[2] for n in there}
    record = json.loads((tmp_path / "two" / PROVENANCE_NAME).read_bytes())
    assert "calibration/first.pth" in record["files"]


def test_scores_in_the_folder_that_no_rule_knows_go_to_calibration_only(
    model: Path, tmp_path: Path
) -> None:
    os.rename(model / "scores.pt", model / "reap")
    pruning = api.plan(model, model / "reap", ratio=0.5, out=tmp_path / "out")
    assert "reap" not in pruning.report.left_behind
    api.apply(pruning)
    assert "reap" not in names(tmp_path / "out")
    assert api.verify(model, tmp_path / "out").holds


def test_a_planner_that_forgets_a_file_is_found_out(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from shardsurgeon.pruning import output_files

    real = output_files._copied_files

    def forgetful(*args: Any) -> Any:
        copied, given = real(*args)
        return tuple(name for name in copied if name != "NOTICE"), given

    monkeypatch.setattr(output_files, "_copied_files", forgetful)
    with pytest.raises(VerificationError, match="NOTICE: is missing"):
        api.apply(prune(model, tmp_path / "out"))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"n_routed_experts": 16, "dim": 16}', "n_routed_experts 16"),
        ('{"model": [{"moe_num_experts": 16}]}', "model.0.moe_num_experts 16"),
        ('{"n_routed_experts": 8, "num_experts_per_tok": 16, "dim": 16}', None),
        ("no JSON", None),
    ],
)
def test_a_config_of_another_program_that_keeps_the_old_count_is_named(
    model: Path, content: str, says: str | None
) -> None:
    (model / "inference").mkdir()
    (model / "inference" / "config.json").write_text(content)
    (model / "notes.json").write_text('{"num_experts": 16}')
    notes = shardsurgeon.plan(model, model / "scores.pt", ratio=0.5).report.notes
    found = [note for note in notes if "is copied as it is" in note]
    assert [f"inference/config.json is copied as it is and says {says}, the number before"][
        : says is not None
    ] == found
