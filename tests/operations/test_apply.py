"""`apply`: its options and its destination, and the memory that its plan takes."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import shardsurgeon
from shardsurgeon.checkpoint.checkpoint import open_checkpoint
from shardsurgeon.errors import FamilyError, OutputError, SourceChangedError, UsageError
from shardsurgeon.execution.plan import Plan
from shardsurgeon.operations import prune, verify
from shardsurgeon.operations.apply import apply
from shardsurgeon.operations.request import Destination, RunOptions
from shardsurgeon.pruning.request import SelectionRequest
from shardsurgeon.scores.files import score_output
from tests.cli.standins import in_python
from tests.operations.workbench import Shell, scores_of
from tests.support.hub.models import fixture_folder
from tests.support.hub.server import LocalHub

FAMILY = "qwen3_moe"


def planned(out: Path) -> prune.Pruning:
    request = SelectionRequest(ratio=0.5)
    return prune.plan(fixture_folder(FAMILY), scores_of(FAMILY), request, out=out)


def plans_alive() -> int:
    return sum(type(thing) is Plan for thing in gc.get_objects())


@pytest.mark.parametrize("which", ["scores", "keep-list"])
def test_the_file_that_decided_is_the_file_that_is_delivered(tmp_path: Path, which: str) -> None:
    scores, keep = tmp_path / "scores.pt", tmp_path / "keep.json"
    shutil.copy(scores_of(FAMILY), scores)
    planned(tmp_path / "out").write_plan(keep)
    model = fixture_folder(FAMILY)
    if which == "scores":
        given, pruning = scores, shardsurgeon.plan(model, scores, ratio=0.5)
    else:
        given, pruning = keep, shardsurgeon.plan(model, plan_file=keep)
    read = given.read_bytes()
    given.write_bytes(read[:-2] + b"  ")
    with pytest.raises(SourceChangedError, match=f"{given.name}: had SHA-256"):
        shardsurgeon.apply(pruning, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    given.write_bytes(read)
    shardsurgeon.apply(pruning, tmp_path / "out")
    assert (tmp_path / "out" / "calibration" / given.name).read_bytes() == read


@pytest.mark.skipif(sys.platform == "win32", reason="named pipes")
def test_a_keep_list_from_a_pipe_decides_and_leaves_no_empty_file(tmp_path: Path) -> None:
    planned(tmp_path / "out").write_plan(tmp_path / "keep.json")
    data = (tmp_path / "keep.json").read_bytes()
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(data,))
    writer.start()
    pruning = shardsurgeon.plan(fixture_folder(FAMILY), plan_file=tmp_path / "pipe")
    writer.join()
    shardsurgeon.apply(pruning, tmp_path / "out")
    record = "reap_pruning_metadata.json"
    assert [path.name for path in (tmp_path / "out" / "calibration").iterdir()] == [record]


@pytest.mark.parametrize("name", ["quantize_config.json", "model.safetensors.index.json"])
def test_a_file_that_was_written_anew_must_not_have_changed_meanwhile(
    tmp_path: Path, name: str
) -> None:
    model = tmp_path / "model"
    shutil.copytree(fixture_folder(FAMILY), model)
    (model / "quantize_config.json").write_bytes(b'{"bits": 4}')
    pruning = shardsurgeon.plan(model, scores_of(FAMILY), ratio=0.5)
    path = model / name
    path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(SourceChangedError, match=f"{name}: had "):
        shardsurgeon.apply(pruning, tmp_path / "out")


@pytest.fixture
def alive(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many plans were in memory each time a result was checked."""
    found: list[int] = []
    real = verify.verify_checkpoint

    def check(*args: Any, **options: Any) -> Any:
        gc.collect()
        found.append(plans_alive())
        return real(*args, **options)

    gc.collect()
    gc.freeze()  # what is there already is neither looked through nor counted
    monkeypatch.setattr(verify, "verify_checkpoint", check)
    yield found
    gc.unfreeze()


def test_the_plan_is_freed_before_the_result_is_checked(tmp_path: Path, alive: list[int]) -> None:
    apply(planned(tmp_path / "out"))
    assert alive == [0]


def test_also_where_the_result_is_pushed_afterwards(
    shell: Shell, tmp_path: Path, alive: list[int]
) -> None:
    apply(planned(tmp_path / "out"), RunOptions(), Destination("me/tiny"))
    assert alive == [0]


def test_also_on_the_command_line(tmp_path: Path, alive: list[int]) -> None:
    from shardsurgeon.cli.main import main

    model = str(fixture_folder(FAMILY))
    words = ["apply", scores_of(FAMILY), "--model", model, "--ratio", "0.5"]
    assert main([*words, "-o", str(tmp_path / "out")]) == 0
    assert alive == [0]


def test_a_plan_can_be_carried_out_again(tmp_path: Path) -> None:
    plan = shardsurgeon.plan(fixture_folder(FAMILY), scores_of(FAMILY), ratio=0.5)
    first, second = (shardsurgeon.apply(plan, tmp_path / name) for name in ("a", "b"))
    assert first.bytes_copied == second.bytes_copied > 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ({"card": "c.md", "with_card": False}, "--card: and --no-card contradict each other"),
        ({"disk_budget": 1}, "--disk-budget: is for shards that leave the disk"),
    ],
)
def test_a_destination_that_makes_no_sense_cannot_be_built(
    words: dict[str, Any], says: str
) -> None:
    with pytest.raises(UsageError, match=says):
        Destination("me/tiny", **words)


def test_the_two_options_that_name_a_repository_become_one_destination() -> None:
    assert Destination.of(None, None) is None
    assert Destination.of("me/x", None, private=True) == Destination("me/x", private=True)
    assert Destination.of(None, "me/x", disk_budget=1) == Destination(
        "me/x", stream=True, disk_budget=1
    )
    assert Destination.of("me/x", "me/x") == Destination("me/x", stream=True)
    with pytest.raises(UsageError, match="says me/y, --push-to-hub says me/x"):
        Destination.of("me/x", "me/y")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ({"disk_budget": "1GB"}, "disk_budget: is for shards that leave the disk"),
        ({"private": True}, "private: is about a push, and nothing is pushed"),
        ({"revision": "65pct"}, "revision: is about a push"),
        ({"create_pr": True}, "create_pr: is about a push"),
        ({"card": "c.md"}, "card: is about a push"),
        ({"card": False}, "card: is about a push"),
        (
            {"push_to_hub": "me/x", "disk_budget": "1GB"},
            "disk_budget: is for shards that leave the disk",
        ),
        (
            {"push_to_hub": "me/x", "stream_push": "me/y"},
            "stream_push: says me/y, push_to_hub= says me/x",
        ),
    ],
)
def test_python_refuses_words_of_a_push_that_would_go_unheard(
    words: dict[str, Any], says: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=says):
        shardsurgeon.apply(planned(tmp_path / "out"), **words)
    assert not list(tmp_path.iterdir())


def test_what_is_asked_can_be_said_without_a_heavy_library() -> None:
    code = (
        "import sys; from shardsurgeon.operations.request import Destination, RunOptions\n"
        "assert not {'numpy', 'huggingface_hub', 'tqdm'} & sys.modules.keys()\n"
    )
    in_python(code, check=True)


# The family of a model, from Python


def test_python_takes_a_family_too(online: LocalHub, tmp_path: Path) -> None:
    model = Path(shutil.copytree(fixture_folder(FAMILY), tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "novel_moe", "architectures": ["NovelForCausalLM"]}
    (model / "config.json").write_text(json.dumps(config, indent=2))
    checkpoint = shardsurgeon.open_checkpoint(model, family="auto")
    plan = shardsurgeon.plan(checkpoint, scores_of(FAMILY), ratio=0.5)
    again = shardsurgeon.plan(model, scores_of(FAMILY), ratio=0.5, family="auto")
    assert plan.decision == again.decision
    shardsurgeon.apply(plan, tmp_path / "out")
    report = shardsurgeon.verify(model, tmp_path / "out", family="auto")
    assert report.holds and report.tensors_compared == report.tensors
    with pytest.raises(FamilyError, match="'novel_moe' is not supported"):
        shardsurgeon.push(tmp_path / "out", "me/tiny")
    assert shardsurgeon.push(tmp_path / "out", "me/tiny", family="auto").created
    with pytest.raises(UsageError, match="family: is for a model that is still to be opened"):
        shardsurgeon.plan(open_checkpoint(model), scores_of(FAMILY), ratio=0.5, family="auto")


# A plan of another model


def test_a_plan_of_a_model_with_another_config_is_used_and_says_so(tmp_path: Path) -> None:
    model = Path(shutil.copytree(fixture_folder(FAMILY), tmp_path / "original"))
    shardsurgeon.plan(model, scores_of(FAMILY), ratio=0.5).write_plan(tmp_path / "plan.json")
    same = shardsurgeon.plan(model, plan_file=tmp_path / "plan.json").report
    assert not any("was made for" in note for note in same.notes)
    other = Path(shutil.copytree(model, tmp_path / "fine-tune"))
    config = (other / "config.json").read_text()
    (other / "config.json").write_text(config.replace("{", '{"finetuned": true,', 1))
    notes = shardsurgeon.plan(other, plan_file=tmp_path / "plan.json").report.notes
    (note,) = (note for note in notes if "was made for" in note)
    assert "plan.json was made for original, whose config.json is not that of fine-tune" in note
    assert "the saliencies shown are those of original" in note


# Who may read the result


@pytest.mark.skipif(os.name != "posix", reason="permissions as POSIX has them")
def test_nobody_may_read_a_result_who_may_not_read_its_source(tmp_path: Path) -> None:
    model = Path(shutil.copytree(fixture_folder(FAMILY), tmp_path / "model"))
    secret = sorted(model.glob("*.safetensors"))[0]
    for path in (secret, model / "config.json", model / "tokenizer.json", model / "scores.pt"):
        path.chmod(0o600)
    (model / "tokenizer_config.json").chmod(0o444)
    mask = os.umask(0o022)
    try:
        plan = shardsurgeon.plan(model, model / "scores.pt", ratio=0.5, out=tmp_path / "out")
        shardsurgeon.apply(plan)
    finally:
        os.umask(mask)
    modes = {
        str(path.relative_to(tmp_path / "out")): path.stat().st_mode & 0o777
        for path in (tmp_path / "out").rglob("*")
        if path.is_file()
    }
    private = {name for name, mode in modes.items() if mode == 0o600}
    assert private == {secret.name, "config.json", "tokenizer.json", "calibration/scores.pt"}
    assert set(modes.values()) == {0o600, 0o644}


# Places and numbers that cannot be meant


@pytest.mark.parametrize("out", ["s3://bucket/out", "ftp://b/out", "hf://me/small", "file:///x"])
def test_an_address_is_no_place_for_a_result(out: str, tmp_path: Path) -> None:
    with contextlib.chdir(tmp_path):
        for call in (
            lambda: shardsurgeon.plan(fixture_folder(FAMILY), scores_of(FAMILY), keep=4, out=out),
            lambda: shardsurgeon.apply(planned(tmp_path / "out"), out),
            lambda: planned(tmp_path / "out").write_plan(f"{out}.json"),
            lambda: score_output(f"{out}.json"),
        ):
            with pytest.raises(OutputError, match="is an address, and results are written to"):
                call()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("workers", [-1, 1025, 100_000_000])
def test_more_workers_than_are_of_use_are_refused(workers: int) -> None:
    with pytest.raises(UsageError, match=rf"--workers: {workers} is not from 0 to 1024"):
        RunOptions(workers=workers)


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="no /dev/zero")
def test_a_family_file_without_end_is_refused() -> None:
    with pytest.raises(FamilyError, match=r"/dev/zero: has 65,537 bytes, at most 65,536 are read"):
        shardsurgeon.plan(fixture_folder(FAMILY), scores_of(FAMILY), keep=4, family="/dev/zero")
