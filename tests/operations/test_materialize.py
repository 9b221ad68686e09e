"""`materialize`: real shards of a view, byte for byte what `apply` writes, or one clear line."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import stat
import sys
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest

import shardsurgeon
from shardsurgeon.cli.main import main
from shardsurgeon.errors import (
    CheckpointError,
    OutputError,
    ShardSurgeonError,
    SourceChangedError,
    UsageError,
    VerificationError,
)
from shardsurgeon.execution.transfer import RangeTransfer
from shardsurgeon.execution.workers import Progress
from shardsurgeon.storage.formats.view import VIEW_NAME
from tests.operations.workbench import digests
from tests.support import handmade_view
from tests.support.hub.models import fixture_folder

FIXTURES = ["deepseek_v3", "kimi_k2", "kimi_k25", "kimi_linear", "qwen3_5_moe", "qwen3_moe"]
FAMILY = "qwen3_moe"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(fixture_folder(FAMILY), folder)
    return folder


@pytest.fixture
def view(model: Path) -> Path:
    return viewed(model, model.parent / "small-view")


def viewed(model: Path, folder: Path, **how: object) -> Path:
    """A view of a prune."""
    plan = shardsurgeon.plan(model, model / "scores.pt", **{"ratio": 0.5, **how})  # type: ignore[call-overload]
    shardsurgeon.apply(plan, folder, view=True, verify=False)
    return folder


def applied(model: Path, folder: Path, checksums: bool = False, **how: object) -> dict[str, str]:
    """What `apply` writes of the same prune."""
    plan = shardsurgeon.plan(model, model / "scores.pt", **{"ratio": 0.5, **how})  # type: ignore[call-overload]
    shardsurgeon.apply(plan, folder, checksums=checksums)
    return digests(folder)


def modes(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): stat.filemode(path.stat().st_mode)
        for path in folder.rglob("*")
    }


# The same bytes


@pytest.mark.parametrize("family", FIXTURES)
@pytest.mark.parametrize("checksums", [False, True])
def test_every_fixture_becomes_what_apply_writes(
    family: str, checksums: bool, tmp_path: Path
) -> None:
    model = fixture_folder(family)
    view = viewed(model, tmp_path / "v", keep=8, ratio=None)
    report = shardsurgeon.materialize(view, tmp_path / "made", checksums=checksums)
    expected = applied(model, tmp_path / "direct", checksums, keep=8, ratio=None)
    assert digests(tmp_path / "made") == expected
    assert modes(tmp_path / "made") == modes(tmp_path / "direct")
    assert report.verification is not None and report.verification.holds
    assert report.files == len(expected)
    sizes = [path.stat().st_size for path in (tmp_path / "made").rglob("*") if path.is_file()]
    assert report.nbytes == report.bytes_copied == sum(sizes)


@pytest.mark.parametrize(
    "how",
    [
        {"max_shard_size": "20kB"},
        {"max_shard_size": "1GB"},
        {"sampling": {"min_p": 0.1}},
        {"exclude": ["LICENSE"]},
        {"keep": 5, "ratio": None},
    ],
    ids=["many shards", "one shard without an index", "sampling", "without a file", "a count"],
)
def test_every_way_to_write_a_prune_has_its_view(
    model: Path, tmp_path: Path, how: dict[str, object]
) -> None:
    view = viewed(model, tmp_path / "v", **how)
    shardsurgeon.materialize(view, tmp_path / "made")
    assert digests(tmp_path / "made") == applied(model, tmp_path / "direct", **how)


def with_header(text: bytes, data: bytes) -> bytes:
    """A safetensors file of these."""
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize("indent", [None, 1], ids=["spaces", "ends of lines"])
def test_a_shard_that_loses_nothing_has_its_header_as_the_source_spells_it(
    model: Path, tmp_path: Path, indent: int | None
) -> None:
    index = json.loads((model / "model.safetensors.index.json").read_text())
    alone = "model.embed_tokens.weight"
    before = model / index["weight_map"][alone]
    raw = before.read_bytes()
    data = raw[8 + int.from_bytes(raw[:8], "little") :]
    others = json.loads(raw[8 : -len(data)])
    entry = others.pop(alone)
    begin, end = entry["data_offsets"]
    own, entry["data_offsets"] = data[begin:end], [0, end - begin]
    for each in others.values():
        if each.get("data_offsets", [0])[0] >= end:
            each["data_offsets"] = [offset - len(own) for offset in each["data_offsets"]]
    before.write_bytes(with_header(handmade_view.spelled(others), data[:begin] + data[end:]))
    header = {"__metadata__": {"format": "pt"}, alone: entry}
    whole = with_header(json.dumps(header, indent=indent).encode() + b" " * 5001, own)
    (model / "odd.safetensors").write_bytes(whole)
    index["weight_map"][alone] = "odd.safetensors"
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    view = viewed(model, tmp_path / "v")
    made = tmp_path / "made"
    shardsurgeon.materialize(view, made)
    assert digests(made) == applied(model, tmp_path / "direct")
    assert whole in [path.read_bytes() for path in made.glob("*.safetensors")]
    line = next(each for each in manifest(view)[1:] if alone in each["header"])
    assert line["header"] == (header if indent is None else json.dumps(header, indent=indent))
    with shardsurgeon.open_view(view, "pt") as found:
        found.save_shard(line["file"], tmp_path / "one.safetensors")
    assert (tmp_path / "one.safetensors").read_bytes() == whole
    # And as the source of another view.
    further = shardsurgeon.plan(view, model / "scores.pt", keep=4)
    shardsurgeon.apply(further, tmp_path / "again", view=True)
    shardsurgeon.materialize(tmp_path / "again", tmp_path / "made again")
    assert whole in [path.read_bytes() for path in (tmp_path / "made again").glob("*.safetensors")]


def test_layers_that_keep_different_numbers(model: Path, tmp_path: Path) -> None:
    how = {"allocate": "global", "allow_nonuniform": True}
    view = viewed(model, tmp_path / "v", **how)
    shardsurgeon.materialize(view, tmp_path / "made", allow_nonuniform=True)
    assert digests(tmp_path / "made") == applied(model, tmp_path / "direct", **how)


def test_files_in_folders_and_the_rights_to_them_are_carried(model: Path, tmp_path: Path) -> None:
    (model / "vision").mkdir()
    (model / "vision/preprocess.py").write_text("pass\n")
    (model / "vision/preprocess.py").chmod(0o700)
    (model / "config.json").chmod(0o640)
    shardsurgeon.materialize(viewed(model, tmp_path / "v"), tmp_path / "made")
    expected = applied(model, tmp_path / "direct")
    assert "vision/preprocess.py" in expected
    assert digests(tmp_path / "made") == expected
    assert modes(tmp_path / "made") == modes(tmp_path / "direct")


@pytest.mark.parametrize("workers", [1, 3])
def test_any_number_of_workers_gives_the_same(view: Path, model: Path, workers: int) -> None:
    made = view.parent / "made"
    shardsurgeon.materialize(view, made, workers=workers)
    assert digests(made) == applied(model, view.parent / "direct")


def test_the_view_and_its_source_stay_as_they_are(view: Path, model: Path) -> None:
    before = digests(view), digests(model)
    shardsurgeon.materialize(view, view.parent / "made")
    assert (digests(view), digests(model)) == before


# A view of a view, of a pruned model, and of nothing


def test_a_view_that_is_pruned_further_is_as_if_it_were_a_folder(
    model: Path, view: Path, tmp_path: Path
) -> None:
    """All that a prune of the materialised folder gives, from the view, as shards and as a view."""
    folder = tmp_path / "small-folder"
    shardsurgeon.materialize(view, folder)
    scores = model / "scores.pt"
    outs = {}
    for name, place in (("folder", folder), ("view", view)):
        # Under one name, which the record has.
        here = tmp_path / name
        here.mkdir()
        place.rename(here / "small")
        plan = shardsurgeon.plan(here / "small", scores, keep=4)
        shardsurgeon.apply(plan, here / "smaller")
        shardsurgeon.apply(plan, here / "smaller-view", view=True)
        outs[name] = digests(here / "smaller")
    assert outs["view"] == outs["folder"]
    manifests = [manifest(tmp_path / name / "smaller-view") for name in ("folder", "view")]
    assert manifests[1][0]["source"] == os.path.realpath(model)
    assert manifests[0][0]["source"] == os.path.realpath(tmp_path / "folder/small")
    shardsurgeon.materialize(tmp_path / "view/smaller-view", tmp_path / "made")
    assert digests(tmp_path / "made") == outs["folder"]


def test_a_view_of_a_view_has_the_files_of_the_view(model: Path, tmp_path: Path) -> None:
    """What the model between the two left out, and what was changed there, is no difference."""
    view = viewed(model, tmp_path / "first", exclude=["LICENSE"], sampling={"min_p": 0.1})
    (view / "README.md").write_text("mine\n")
    again = shardsurgeon.plan(view, model / "scores.pt", keep=4)
    shardsurgeon.apply(again, tmp_path / "second", view=True)
    report = shardsurgeon.materialize(tmp_path / "second", tmp_path / "made")
    assert report.source == str(model)
    shardsurgeon.apply(again, tmp_path / "direct")
    found = digests(tmp_path / "made")
    assert found == digests(tmp_path / "direct") and "LICENSE" not in found
    assert (tmp_path / "made/README.md").read_text() == "mine\n"


def manifest(view: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in gzip.open(view / VIEW_NAME)]


@pytest.mark.parametrize("words", [["model"], ["gone"], ["small-view/config.json"]])
def test_what_is_no_view_is_refused(
    view: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with chdir(view.parent):
        assert main(["materialize", *words, "-o", "made"]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and line.startswith(f"shardsurgeon: error: {words[0]}: is no")
    assert not (view.parent / "made").exists()


# Where it goes


def test_the_default_is_the_name_of_the_view_without_its_ending(view: Path) -> None:
    with chdir(view.parent):
        report = shardsurgeon.materialize("small-view", verify=False)
    assert Path(report.out) == view.parent / "small" and (view.parent / "small").is_dir()


@pytest.mark.parametrize("inside", ["small-view", "small-view/calibration", "model"])
def test_inside_of_the_view_or_its_source_the_default_is_beside_it(view: Path, inside: str) -> None:
    with chdir(view.parent / inside):
        report = shardsurgeon.materialize(view, verify=False)
    assert Path(report.out) == view.parent / "small"


def test_of_another_name_the_place_is_asked_for(view: Path) -> None:
    view.rename(view.parent / "other")
    with pytest.raises(UsageError) as refused:
        shardsurgeon.materialize(view.parent / "other")
    assert str(refused.value) == (
        "out: is needed: the name of the view, other, does not end in -view; say where to write"
    )


@pytest.mark.parametrize(
    ("out", "problem"),
    [
        ("small-view", "is the view itself"),
        ("small-view/new", "is inside the view "),
        ("model/new", "is inside the view's source "),
        (".", "contains the view "),
    ],
)
def test_never_into_the_view_or_its_source(view: Path, out: str, problem: str) -> None:
    before = digests(view.parent)
    with chdir(view.parent), pytest.raises(OutputError, match=re.escape(problem)):
        shardsurgeon.materialize("small-view", out)
    assert digests(view.parent) == before


@pytest.mark.parametrize("command", ["apply", "apply --view"])
def test_a_prune_of_a_view_goes_neither_into_it_nor_into_its_source(
    view: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = digests(view.parent)
    for out in ("small-view/new", "model/new"):
        words = [*command.split(), "model/scores.pt", "-m", "small-view", "--keep", "4", "-o", out]
        with chdir(view.parent):
            assert main(words) == 2
        assert "is inside the view" in capsys.readouterr().err
    assert digests(view.parent) == before


def test_a_place_that_is_taken_is_refused_and_its_own_result_checked_again(view: Path) -> None:
    made = view.parent / "made"
    first = shardsurgeon.materialize(view, made)
    again = shardsurgeon.materialize(view, made)
    assert (first.bytes_resumed, again.bytes_copied) == (0, 0)
    assert again.bytes_resumed == first.bytes_copied
    assert again.verification is not None and again.verification.holds
    (made / "config.json").write_text("{}")
    with pytest.raises(OutputError, match="exists"):
        shardsurgeon.materialize(view, made)


# What has changed


@pytest.mark.parametrize("name", ["config.json", "calibration/scores.pt", "tokenizer.json"])
def test_a_view_that_was_edited_is_refused(view: Path, name: str) -> None:
    raw = (view / name).read_bytes()
    (view / name).write_bytes(raw + b"\n" if name.endswith("json") else raw[:-1] + b"\1")
    with pytest.raises(CheckpointError, match=f"is not as apply wrote it: {name} "):
        shardsurgeon.materialize(view, view.parent / "made")
    assert not list(view.parent.glob("made*"))


def test_a_file_that_is_gone_from_a_view_is_refused(view: Path) -> None:
    (view / "LICENSE").unlink()
    with pytest.raises(CheckpointError, match="LICENSE is missing, apply wrote it; restore it"):
        shardsurgeon.materialize(view, view.parent / "made")


@pytest.mark.parametrize("text", ["mine\n", None])
@pytest.mark.parametrize("checksums", [False, True])
def test_a_card_may_be_edited(view: Path, model: Path, text: str | None, checksums: bool) -> None:
    (view / "README.md").unlink(missing_ok=True)
    if text is not None:
        (view / "README.md").write_text(text)
    made = view.parent / "made"
    report = shardsurgeon.materialize(view, made, checksums=checksums)
    assert report.verification is not None and report.verification.holds
    found, expected = digests(made), applied(model, view.parent / "direct", checksums)
    assert (made / "README.md").exists() == (text is not None)
    # The record is still that of what `apply` writes.
    assert {**found, "README.md": ""} == {**expected, "README.md": ""}


def test_files_of_the_user_are_left_behind_and_named(
    view: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (view / "notes.txt").write_text("mine")
    made = view.parent / "made"
    assert main(["materialize", str(view), "-o", str(made)]) == 0
    assert re.search(r"\n  left behind +notes.txt \(1\)\n", capsys.readouterr().out)
    assert digests(made) == applied(model, view.parent / "direct")


def test_weights_of_the_user_in_a_view_are_refused(view: Path, model: Path) -> None:
    shutil.copy(next(model.glob("*.safetensors")), view / "extra.safetensors")
    with pytest.raises(
        CheckpointError, match=r"extra\.safetensors is a weight file that apply did"
    ):
        shardsurgeon.materialize(view, view.parent / "made")


@pytest.mark.parametrize("damage", ["touched", "gone", "longer"])
def test_a_source_that_changed_is_refused(view: Path, model: Path, damage: str) -> None:
    shard = next(model.glob("*.safetensors"))
    if damage == "touched":
        os.utime(shard, ns=(1, 1))
    elif damage == "gone":
        shard.unlink()
    else:
        with shard.open("ab") as file:
            file.write(b"\0")
    with pytest.raises(CheckpointError, match=re.escape(shard.name)) as refused:
        shardsurgeon.materialize(view, view.parent / "made")
    assert "make the view again with `apply view=True`" in str(refused.value)
    assert not list(view.parent.glob("made*"))


def test_a_range_that_names_another_expert_is_found(view: Path, model: Path) -> None:
    """By the sample that `materialize` compares or, at the latest, by `verify`."""
    lines = manifest(view)
    shard = lines[1]
    header = shard["header"]
    assert isinstance(header, dict)
    ranges = shard["ranges"]
    assert isinstance(ranges, dict)
    ends, place = {}, 0
    for number, nbytes in enumerate(ranges["nbytes"]):
        ends[place] = number
        place += nbytes
    name = next(name for name in header if ".experts.0." in name)
    other = name.replace(".experts.0.", ".experts.1.")
    one, two = (ends[header[each]["data_offsets"][0]] for each in (name, other))
    assert ranges["nbytes"][one] == ranges["nbytes"][two]
    ranges["begin"][one] = ranges["begin"][two]
    (view / VIEW_NAME).write_bytes(handmade_view.packed(lines))
    report = shardsurgeon.verify(model, view)
    assert not report.holds
    (difference,) = report.differences
    assert name in difference
    made = view.parent / "made"
    shardsurgeon.materialize(view, made, verify=False)
    assert shardsurgeon.verify(model, made).differences == report.differences


def test_a_view_and_its_source_that_moved_together_still_work(model: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    model.rename(home / "model")
    with chdir(home):
        plan = shardsurgeon.plan("model", "model/scores.pt", ratio=0.5)
        shardsurgeon.apply(plan, "small-view", view=True)
        expected = applied(Path("model"), tmp_path / "direct")
    home.rename(tmp_path / "elsewhere")
    shardsurgeon.materialize(tmp_path / "elsewhere/small-view", tmp_path / "made")
    assert digests(tmp_path / "made") == expected


@pytest.mark.parametrize("moved", ["view", "source"])
def test_one_of_them_that_moved_alone_is_refused_with_one_line(
    model: Path, view: Path, moved: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with chdir(tmp_path):
        plan = shardsurgeon.plan("model", "model/scores.pt", ratio=0.5)
        shardsurgeon.apply(plan, "other-view", view=True)
        (tmp_path / "far/away").mkdir(parents=True)
        Path("other-view" if moved == "view" else "model").rename("far/away/it")
        place = "far/away/it" if moved == "view" else "other-view"
        assert main(["materialize", place, "-o", "made"]) == 2
    line = capsys.readouterr().err
    source = tmp_path / ("far/away/model" if moved == "view" else "model")
    assert line == (
        f"shardsurgeon: error: {place}/{VIEW_NAME}: its source {source}: there is no such folder; "
        "make the view again with `apply --view`\n"
    )


# The work


def interrupted(view: Path, made: Path, after: int, **how: object) -> None:
    def listen(progress: Progress) -> None:
        if progress.shards_done >= after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shardsurgeon.materialize(view, made, on_progress=listen, workers=1, **how)  # type: ignore[arg-type]


def test_an_interrupted_run_goes_on(view: Path, model: Path) -> None:
    made = view.parent / "made"
    interrupted(view, made, 2)
    assert not made.exists() and Path(f"{made}.partial").is_dir()
    report = shardsurgeon.materialize(view, made)
    assert report.bytes_resumed > 0
    assert digests(made) == applied(model, view.parent / "direct")
    assert not Path(f"{made}.partial").exists()


def test_restart_starts_over(view: Path) -> None:
    made = view.parent / "made"
    interrupted(view, made, 2)
    assert shardsurgeon.materialize(view, made, restart=True).bytes_resumed == 0


def test_an_interrupted_apply_is_not_taken_up_by_materialize(view: Path, model: Path) -> None:
    made = view.parent / "made"
    interrupted(view, made, 2)
    plan = shardsurgeon.plan(model, model / "scores.pt", ratio=0.5)
    with pytest.raises(OutputError, match="different command"):
        shardsurgeon.apply(plan, made)


def test_wrong_bytes_are_found_before_the_folder_appears(
    view: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    move = RangeTransfer.write

    def wrong(self: RangeTransfer, batch: object, path: Path, *rest: object) -> object:
        done = move(self, batch, path, *rest)  # type: ignore[arg-type]
        if path.name.endswith("2-of-00003.safetensors"):
            data = bytearray(path.read_bytes())
            half = len(data) // 2
            path.write_bytes(data[:half] + bytes(byte ^ 1 for byte in data[half:]))
        return done

    monkeypatch.setattr(RangeTransfer, "write", wrong)
    with pytest.raises(VerificationError, match="differs from what it was made of"):
        shardsurgeon.materialize(view, view.parent / "made")
    assert not (view.parent / "made").exists()


def test_a_source_that_changes_meanwhile_is_noticed(view: Path, model: Path) -> None:
    shard = sorted(model.glob("*.safetensors"))[-1]

    def listen(progress: Progress) -> None:
        os.utime(shard, ns=(1, 1))

    with pytest.raises(SourceChangedError, match=re.escape(shard.name)):
        shardsurgeon.materialize(view, view.parent / "made", on_progress=listen)
    assert not (view.parent / "made").exists()


# The command


def test_the_report_as_text_and_as_json(view: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with chdir(view.parent):
        assert main(["materialize", "small-view", "-o", "made"]) == 0
        said = capsys.readouterr().out
        assert main(["materialize", "small-view", "-o", "second", "--json"]) == 0
    model = view.parent / "model"
    assert said.startswith(f"small-view -> made\n\n  source        {model}\n  written       made: ")
    assert f"Compare every byte:\n  shardsurgeon verify {model} made\n" in said
    document = json.loads(capsys.readouterr().out)
    assert (document["view"], document["out"]) == ("small-view", "second")
    assert document["source"] == str(model)
    assert document["verification"]["verdict"] == "identical as far as sampled"
    assert document["serve"] == ["vllm", "serve", "second"]


def test_a_dry_run_says_what_a_run_would_do_and_writes_nothing(
    view: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = digests(view.parent)
    with chdir(view.parent):
        assert main(["materialize", "small-view", "--dry-run", "--json"]) == 0
        said = json.loads(capsys.readouterr().out)
        assert digests(view.parent) == before
        done = shardsurgeon.materialize("small-view")
    assert (said["files"], said["nbytes"]) == (done.files, done.nbytes)
    assert said["space_needed"] == done.nbytes and said["refusal"] is None


def test_a_dry_run_ends_as_the_run_would(view: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = view.parent / "made"
    made.mkdir()
    words = ["materialize", str(view), "-o", str(made)]
    assert main([*words, "--dry-run"]) == 2
    rehearsed = capsys.readouterr()
    assert "Dry run: nothing was written; the run would stop at once.\n" in rehearsed.out
    assert main(words) == 2
    assert capsys.readouterr().err == rehearsed.err
    assert "exists; choose another -o or remove it" in rehearsed.err


def test_a_declaration_that_made_the_view_reads_its_source_too(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((model / "config.json").read_text())
    config["architectures"], config["model_type"] = ["StrangeForCausalLM"], "strange"
    (model / "config.json").write_text(json.dumps(config))
    how = {"family": "auto"}
    view = viewed(model, tmp_path / "v", **how)
    with pytest.raises(ShardSurgeonError, match="strange") as refused:
        shardsurgeon.materialize(view, tmp_path / "made")
    assert main(["materialize", str(view), "-o", str(tmp_path / "made"), "--dry-run"]) == 2
    assert "strange" in capsys.readouterr().err and "\n" not in str(refused.value)
    report = shardsurgeon.materialize(view, tmp_path / "made", family="auto")
    assert digests(tmp_path / "made") == applied(model, tmp_path / "direct", **how)
    assert report.serve is None


# Inspecting and comparing


def test_inspect_says_that_it_is_a_view_and_of_what(
    view: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = shardsurgeon.inspect(view)
    assert report.view is not None
    shards = sorted(model.glob("*.safetensors"))
    assert report.view.source == str(model) and report.view.files == len(shards)
    assert report.view.nbytes == sum(shard.stat().st_size for shard in shards)
    assert shardsurgeon.inspect(model).view is None
    assert main(["inspect", str(view)]) == 0
    said = capsys.readouterr().out
    assert re.search(rf"\n  view of +{model}\s+\({len(shards)} files of [\d.]+ kB\)\n", said)
    made = view.parent / "small-view-made"
    shardsurgeon.materialize(view, made)
    told, of_folder = report.to_dict(), shardsurgeon.inspect(made).to_dict()
    differing = {key for key in told if told[key] != of_folder[key]}
    assert differing == {"name", "view"}


def test_a_view_verifies_like_the_folder(view: Path, model: Path) -> None:
    made = view.parent / "made"
    shardsurgeon.materialize(view, made)
    reports = [shardsurgeon.verify(model, place) for place in (view, made)]
    for report in reports:
        assert report.verdict == "identical" and report.notes == ()
    assert reports[0].bytes_compared == reports[1].bytes_compared > 0


def test_a_view_is_not_compared_with_its_own_folder(view: Path, model: Path) -> None:
    """They are one prune: a difference in the record would tell nobody what is wrong."""
    made = view.parent / "made"
    shardsurgeon.materialize(view, made)
    for first, second in ((view, made), (made, view)):
        with pytest.raises(UsageError) as refused:
            shardsurgeon.verify(first, second)
        remedy = f"compare it with the model that both are made of, {model}"
        assert str(refused.value) == f"{second}: is the same prune as {first}; {remedy}"


@pytest.mark.skipif(sys.platform == "win32", reason="links as POSIX has them")
@pytest.mark.parametrize("name", ["LICENSE", "config.json"])
def test_links_that_the_view_was_made_with_are_followed_again(
    model: Path, tmp_path: Path, name: str
) -> None:
    (model / name).rename(tmp_path / "elsewhere")
    (model / name).symlink_to(tmp_path / "elsewhere")
    how = {"follow_links": True}
    view = viewed(model, tmp_path / "v", **how)
    shardsurgeon.materialize(view, tmp_path / "made", follow_links=True)
    assert digests(tmp_path / "made") == applied(model, tmp_path / "direct", **how)


@pytest.mark.skipif(sys.platform == "win32", reason="links as POSIX has them")
def test_a_source_of_links_is_read_where_they_lead(model: Path, tmp_path: Path) -> None:
    linked = tmp_path / "linked"
    shutil.copytree(model, linked)
    for shard in linked.glob("*.safetensors"):
        shard.unlink()
        shard.symlink_to(model / shard.name)
    view = viewed(linked, tmp_path / "v")
    shardsurgeon.materialize(view, tmp_path / "made")
    assert digests(tmp_path / "made") == applied(linked, tmp_path / "direct")


def test_what_reads_a_model_reads_a_view(
    view: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same answers as of the folder, but for the name."""
    made = view.parent / "small-folder"
    shardsurgeon.materialize(view, made)
    for words in (
        ["fit", "MODEL", "--gpus", "1x24GB", "--context", "4096"],
        ["plan", str(model / "scores.pt"), "-m", "MODEL", "--keep", "4", "--layers"],
        ["scores", "show", str(model / "scores.pt"), "-m", "MODEL"],
        ["scores", "from-router", "MODEL", "-o", "OUT.json"],
        ["scores", "from-weights", "MODEL", "-o", "OUT.json"],
        ["scores", "random", "MODEL", "-o", "OUT.json"],
    ):
        said = []
        for folder in (view, made):
            file = Path(f"{folder}-{words[1]}.json")
            given = {"MODEL": str(folder), "OUT.json": str(file)}
            assert main([given.get(word, word) for word in words]) == 0
            text = re.sub(r"[\d.]+ [GM]B free", "", " ".join(capsys.readouterr().out.split()))
            text += file.read_text() if file.exists() else ""
            said.append(text.replace(folder.name, "MODEL"))
        assert said[0] == said[1], words


def test_shards_of_layers_that_differ_have_to_be_allowed(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A view needs no leave: our own loaders read a count per layer, stock engines do not."""
    asked = ["apply", str(model / "scores.pt"), "-m", str(model), "-r", "0.5"]
    asked += ["--allocate", "global"]
    view, out = tmp_path / "uneven-view", tmp_path / "uneven"
    assert main([*asked, "-o", str(out)]) == 2
    assert "or make a view with `apply --view`" in capsys.readouterr().err
    assert main([*asked, "--view", "-o", str(view)]) == 0
    assert main(["materialize", str(view), "-o", str(out)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "nonuniform" in line]
    assert "layers keep" in line and "leave it a view" in line and not out.exists()
    assert main(["materialize", str(view), "-o", str(out), "--allow-nonuniform"]) == 0
    assert main([*asked, "--allow-nonuniform", "-o", str(tmp_path / "applied")]) == 0
    assert digests(out) == digests(tmp_path / "applied")


def test_a_keep_list_of_layers_that_differ_may_be_a_view(model: Path, tmp_path: Path) -> None:
    plan = tmp_path / "keep.json"
    layers = {str(layer): list(range(4 + layer % 2)) for layer in range(3)}
    plan.write_text(json.dumps({"keep": layers}))
    asked = ["apply", "--plan", str(plan), "-m", str(model), "-o", str(tmp_path / "out")]
    assert main(asked) == 2
    assert main([*asked, "--view"]) == 0


@pytest.mark.torch
@pytest.mark.slow
def test_samples_run_through_a_view_as_through_the_folder(view: Path, tmp_path: Path) -> None:
    import numpy as np

    made = tmp_path / "made"
    shardsurgeon.materialize(view, made)
    records = tmp_path / "records.txt"
    records.write_text("".join(f"Line {n}: the quick brown fox jumps.\n" for n in range(8)))
    found = []
    for folder in (view, made):
        scores = tmp_path / f"{folder.name}.npz"
        shardsurgeon.calibrate(folder, dataset=str(records), out=scores, samples=8)
        with np.load(scores) as table:
            found.append({key: table[key] for key in table.files if key != "metadata"})
    assert found[0].keys() == found[1].keys()
    assert all(np.array_equal(found[0][key], found[1][key]) for key in found[0])
