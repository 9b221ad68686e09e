"""Links, pipes and devices in a model's folder: what reaches OUT and the Hub, what is refused."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

import shardsurgeon
from shardsurgeon.checkpoint.provenance import PROVENANCE_NAME
from shardsurgeon.cli.main import main
from shardsurgeon.errors import CheckpointError, UsageError
from shardsurgeon.operations import api
from shardsurgeon.storage.source import NOWHERE, OUTSIDE
from tests.operations.workbench import Shell, digests, scores_of
from tests.support.hub.models import fixture_folder

FAMILY = "qwen3_moe"
SHARD = "model-00002-of-00003.safetensors"
INDEX = "model.safetensors.index.json"

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="links and pipes as POSIX has them")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(fixture_folder(FAMILY), folder)
    return folder


@pytest.fixture
def token(tmp_path: Path) -> Path:
    (tmp_path / "home").mkdir()
    path = tmp_path / "home" / "token"
    path.write_text("hf_" + "aB3dE6gH9jK2mN5pQ8sT1vW4" * 2)
    return path


def prune(model: Path, **options: Any) -> shardsurgeon.Pruning:
    out = model.parent / "out"
    return api.plan(model, scores_of(FAMILY), ratio=0.5, out=out, **options)


def applied(model: Path) -> Path:
    out = model.parent / "out"
    shutil.rmtree(out, ignore_errors=True)
    api.apply(prune(model))
    return out


def move_away(model: Path, name: str) -> Path:
    """Put a file on another disk, a link in its place."""
    disk = model.parent / "disk"
    disk.mkdir(exist_ok=True)
    end = Path(shutil.move(model / name, disk / Path(name).name))
    (model / name).symlink_to(end)
    return end


def test_the_end_of_a_link_out_of_the_model_reaches_out_only_when_asked(
    model: Path, token: Path
) -> None:
    (model / "notes.txt").symlink_to("../home/token")
    (model / "docs").mkdir()
    (model / "docs" / "a.json").symlink_to(token)
    (model / "vision").mkdir()
    (model / "vision" / "model.safetensors").symlink_to(token)
    (model / "extra.safetensors").symlink_to(token)
    links = {"notes.txt", "docs/a.json", "vision/model.safetensors", "extra.safetensors"}
    report = api.apply(prune(model))
    there = digests(model.parent / "out")
    assert not links & there.keys()
    assert {name: report.plan.left_behind[name] for name in links} == dict.fromkeys(links, OUTSIDE)
    assert api.verify(model, model.parent / "out").holds
    shutil.rmtree(model.parent / "out")
    report = api.apply(prune(model, follow_links=True))
    assert (model.parent / "out" / "notes.txt").read_text() == token.read_text()
    assert not (model.parent / "out" / "notes.txt").is_symlink()
    assert not links & report.plan.left_behind.keys()
    assert api.verify(model, model.parent / "out", follow_links=True).holds
    (model.parent / "out" / "notes.txt").write_text("x" * len(token.read_text()))
    found = api.verify(model, model.parent / "out", follow_links=True).differences
    assert found == ("notes.txt: is not the source's, byte for byte",)


def test_shards_may_lie_anywhere(model: Path) -> None:
    expected = digests(applied(model))
    for shard in model.glob("model-*.safetensors"):
        move_away(model, shard.name)
    assert digests(applied(model)) == expected
    assert api.verify(model, model.parent / "out").holds


@pytest.mark.parametrize("name", ["config.json", INDEX, "tokenizer.json", "generation_config.json"])
def test_a_needed_file_that_is_a_link_out_stops_the_run_with_advice(model: Path, name: str) -> None:
    move_away(model, name)
    with pytest.raises(CheckpointError, match=rf"{name}: is a link out of .*follow_links=True"):
        prune(model)
    assert api.apply(prune(model, follow_links=True)).verification.holds  # type: ignore[union-attr]
    assert not (model.parent / "out" / name).is_symlink()
    if name != "config.json" and name != INDEX:
        shutil.rmtree(model.parent / "out")
        assert name in prune(model, exclude=[name]).report.left_behind


def test_a_file_that_the_config_names_is_needed_as_well(model: Path, token: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "table": "./tables/ngram.bin"}))
    (model / "tables").mkdir()
    (model / "tables" / "ngram.bin").symlink_to(token)
    with pytest.raises(CheckpointError, match=r"tables/ngram\.bin: is a link out of"):
        prune(model)


def test_a_quantization_list_and_a_record_are_not_read_through_a_link_either(
    model: Path, token: Path
) -> None:
    for name in ("hf_quant_config.json", PROVENANCE_NAME):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).symlink_to(token)
        with pytest.raises(CheckpointError, match=rf"{name}: is a link out of"):
            prune(model)
        (model / name).unlink()


def test_the_commands_take_the_option_and_hand_it_on(
    model: Path, token: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (model / "notes.txt").symlink_to(token)
    move_away(model, "config.json")
    given = [str(scores_of(FAMILY)), "--ratio", "0.5", "--model", str(model)]
    out = str(model.parent / "out")
    for words in (["plan", *given], ["plan", *given, "--ratio", "0.25,0.5"]):
        assert main(words) == 2
        assert "config.json: is a link out of" in capsys.readouterr().err
        assert main([*words, "--follow-links"]) == 0
    assert main(["apply", *given, "-o", out, "--follow-links"]) == 0
    said = capsys.readouterr().out
    assert f"shardsurgeon verify {model} {out} --follow-links\n" in said
    assert (model.parent / "out" / "notes.txt").read_bytes() == token.read_bytes()
    assert main(["verify", str(model), out]) == 2
    assert main(["verify", str(model), out, "--follow-links"]) == 0


def test_commands_that_copy_no_file_follow_every_link(model: Path) -> None:
    before = shardsurgeon.inspect(str(model))
    for name in ("config.json", INDEX, "tokenizer.json"):
        move_away(model, name)
    assert shardsurgeon.inspect(str(model)) == before


def test_the_model_itself_may_be_a_link(model: Path) -> None:
    link = model.parent / "link"
    link.symlink_to(model)
    assert prune(link).report.left_behind == prune(model).report.left_behind


def test_what_is_no_file_is_named_as_left_behind_and_never_opened(model: Path) -> None:
    os.mkfifo(model / "notes.txt")
    os.mkfifo(model / "keep.json")
    (model / "null.json").symlink_to("/dev/null")
    (model / "loop.txt").symlink_to("loop.txt")
    (model / "wandb").mkdir()
    (model / "wandb" / "latest").symlink_to("run-1")
    (model / "figures").symlink_to(model.parent)
    left = api.apply(prune(model)).plan.left_behind
    odd = {"notes.txt": "FIFO", "keep.json": "FIFO", "null.json": "device", "loop.txt": NOWHERE}
    odd |= {"wandb/latest": NOWHERE, "figures": "linked folder"}
    assert {name: left.get(name) for name in odd} == odd
    assert api.verify(model, model.parent / "out").holds
    assert prune(model, exclude=["notes.txt"]).report.left_behind["notes.txt"] == "excluded"


@pytest.mark.parametrize("name", ["config.json", INDEX, SHARD, "tokenizer.json"])
@pytest.mark.parametrize("kind", ["fifo", "dangling", "loop", "folder"])
def test_a_needed_file_that_is_none_is_refused_by_its_name(
    model: Path, name: str, kind: str
) -> None:
    (model / name).unlink()
    if kind == "fifo":
        os.mkfifo(model / name)
    elif kind == "folder":
        (model / name).symlink_to(model.parent)
    else:
        (model / name).symlink_to(name if kind == "loop" else "gone")
    for options in ({}, {"follow_links": True}):
        with pytest.raises(CheckpointError, match=rf"{name}: is a (FIFO|link to nothing|linked f)"):
            prune(model, **options)


def test_one_of_a_set_without_an_index_that_leads_nowhere_is_named(model: Path) -> None:
    (model / INDEX).unlink()
    (model / SHARD).unlink()
    (model / SHARD).symlink_to("gone")
    with pytest.raises(CheckpointError, match=rf"{SHARD}: is a link to nothing; .*fetch it again"):
        prune(model)


def test_include_does_not_take_what_follow_links_takes(model: Path, token: Path) -> None:
    (model / "notes.txt").symlink_to(token)
    with pytest.raises(CheckpointError, match=r"notes\.txt: is a link out of .*follow_links=True"):
        prune(model, include=["notes.txt"])
    assert prune(model, include=["*"]).report.left_behind["notes.txt"] == OUTSIDE
    with pytest.raises(UsageError, match="still to be opened"):
        api.plan(shardsurgeon.open_checkpoint(model), keep=4, follow_links=True)


def test_hard_links_are_files_like_any_other(model: Path, token: Path) -> None:
    (token.parent / "a").write_text("text")
    os.link(token.parent / "a", model / "notes.txt")
    api.apply(prune(model))
    assert (model.parent / "out" / "notes.txt").read_text() == "text"


def test_push_takes_no_link_out_of_the_folder(shell: Shell, pruned: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(pruned, out)
    (tmp_path / "elsewhere").write_text("text")
    (out / "notes.txt").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(out / "pipe")
    said = shell.good("push", str(out), "me/tiny")
    assert "notes.txt" in said
    assert "pipe" in said
    assert "notes.txt" not in shell.hub.files("me/tiny")
    for glob in ("notes.txt", "*"):
        line = shell.refused("push", str(out), "me/tiny", "--include", glob)
        assert "notes.txt: is a link out of the folder" in line or "pipe: is a FIFO" in line
    (out / "pipe").unlink()
    shell.good("push", str(out), "me/tiny", "--include", "notes.txt", "--follow-links")
    assert shell.hub.read("me/tiny", "notes.txt") == b"text"
    # A file that `apply` wrote, moved away.
    (out / "notes.txt").unlink()
    move_away(out, "tokenizer_config.json")
    line = shell.refused("push", str(out), "me/tiny")
    assert "tokenizer_config.json: is a link out of the folder" in line
    assert "--follow-links" in line
    shell.good("push", str(out), "me/tiny", "--follow-links")


LOOP_WORDS = [
    "inspect loop",
    "plan scores.pt --keep 8 --model loop",
    "plan loop --keep 8 --model model",
    "plan --plan loop --model model",
    "plan scores.pt --keep 8 --model model -o loop",
    "plan scores.pt --keep 8 --model model -o loop/x",
    "apply scores.pt --keep 8 --model model -o loop",
    "apply scores.pt --keep 8 --model model -o loop/x",
    "inspect model --family loop",
    "verify loop model",
    "verify model loop",
    "push loop me/tiny",
    "push model me/tiny --card loop",
    "scores show loop",
    "scores convert loop -o x.npz",
    "scores convert scores.pt -o loop/x.npz",
    "scores from-router model -o loop/x.npz",
]


@pytest.mark.parametrize("words", LOOP_WORDS)
def test_a_link_to_itself_is_refused_wherever_it_is_given(
    model: Path, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(model.parent)
    shutil.copy(scores_of(FAMILY), "scores.pt")
    Path("loop").symlink_to("loop")
    status = main(words.split())
    line = capsys.readouterr().err
    assert status in (1, 2), line
    assert line.startswith("shardsurgeon: error: ") and line.count("\n") == 1
    assert "is a bug" not in line and "SHARDSURGEON_DEBUG" not in line
    assert os.readlink("loop") == "loop"
