"""`push` holds a folder against what `apply` recorded of it, and takes edits that are meant."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from shardsurgeon.checkpoint.provenance import PROVENANCE_NAME
from shardsurgeon.errors import CheckpointError
from shardsurgeon.operations import api
from tests.operations.workbench import Shell, digests, downloaded, scores_of
from tests.support.hub.models import fixture_folder

SHARD = "model-00002-of-00005.safetensors"
STRAY = "is a weight file that apply did not write"


@pytest.fixture
def folder(pruned: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pruned, tmp_path / "out"))


@pytest.fixture(scope="session")
def checked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prune with checksums of its shards too. Not to be changed."""
    out = tmp_path_factory.mktemp("checked") / "Tiny"
    plan = api.plan(fixture_folder("kimi_k25"), scores_of("kimi_k25"), ratio=0.65)
    api.apply(plan, out, checksums=True)
    return out


def flip(path: Path, at: int = -1) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


def _move_out(folder: Path, name: str) -> None:
    there = folder.parent / f"elsewhere-{name}"
    (folder / name).rename(there)
    (folder / name).symlink_to(there)


def _lead_out(folder: Path, name: str) -> None:
    secret = folder.parent / "secret"
    secret.write_text("s" * (folder / name).stat().st_size)
    (folder / name).unlink()
    (folder / name).symlink_to(secret)


Spoil = Callable[[Path], object]
SPOILED: dict[str, tuple[Spoil, str]] = {
    "a tokenizer is missing": (
        lambda out: (out / "tokenizer.json").unlink(),
        "tokenizer.json is missing, apply wrote it",
    ),
    "a byte of a side file is flipped": (
        lambda out: flip(out / "chat_template.jinja"),
        "chat_template.jinja is not what apply wrote: it has SHA-256",
    ),
    "a byte of a file in a subfolder is flipped": (
        lambda out: flip(out / "docs" / "deploy_guidance.md", 7),
        "docs/deploy_guidance.md is not what apply wrote",
    ),
    "a byte of the scores is flipped": (
        lambda out: flip(out / "calibration" / "scores.pt"),
        "calibration/scores.pt is not what apply wrote",
    ),
    "a config of the same size": (
        lambda out: (out / "config.json").write_text(
            (out / "config.json").read_text().replace("bfloat16", "float32 ")
        ),
        "config.json is not what apply wrote",
    ),
    "a longer file": (
        lambda out: (out / "LICENSE").write_text("all yours"),
        "LICENSE has 9 bytes, apply wrote ",
    ),
    "a stray shard": (
        lambda out: shutil.copy(out / SHARD, out / "model-00006-of-00006.safetensors"),
        f"model-00006-of-00006.safetensors {STRAY}",
    ),
    "a stray shard in upper case": (
        lambda out: (out / "EXTRA.SAFETENSORS").write_bytes(b"weights"),
        f"EXTRA.SAFETENSORS {STRAY}",
    ),
}


@pytest.mark.parametrize("spoiled", SPOILED)
def test_a_folder_that_changed_is_refused_and_the_change_named(
    shell: Shell, folder: Path, spoiled: str
) -> None:
    spoil, told = SPOILED[spoiled]
    spoil(folder)
    line = shell.refused("push", str(folder), "me/tiny")
    assert f"{folder}: is not as apply wrote it: {told}" in line
    assert "--include NAME" in line and "--exclude NAME" in line
    assert shell.hub.requests == []


@pytest.mark.parametrize("name", ["tokenizer_config.json", "README.md", "config.json"])
def test_a_file_that_became_a_link_out_of_the_folder_is_refused(
    shell: Shell, folder: Path, name: str
) -> None:
    _lead_out(folder, name)
    line = shell.refused("push", str(folder), "me/tiny")
    assert f"{name}: is a link out of the folder" in line
    assert shell.hub.requests == []


def test_all_changes_are_in_the_one_line(shell: Shell, folder: Path) -> None:
    names = ["LICENSE", "chat_template.jinja", "modeling_deepseek.py", "tiktoken.model"]
    for name in [*names, "generation_config.json", "tokenizer.json", "preprocessor_config.json"]:
        flip(folder / name)
    line = shell.refused("push", str(folder), "me/tiny")
    assert all(f"{name} is not what" in line for name in names[:3])
    assert "; and 2 more; restore" in line


def test_what_is_edited_on_purpose_is_pushed_as_it_is(shell: Shell, folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ mine }}")
    (folder / "LICENSE").unlink()
    (folder / "draft.safetensors").write_bytes(b"weights")
    words = ("push", str(folder), "me/tiny", "--include", "chat_*", "--include", "draft.*")
    line = shell.refused(*words)
    assert "wrote it: LICENSE is missing, apply wrote it; restore" in line
    shell.good(*words, "--exclude", "LICENSE", "--exclude", "calibration/scores.pt")
    there = shell.hub.files("me/tiny")
    assert shell.hub.read("me/tiny", "chat_template.jinja") == b"{{ mine }}"
    assert "draft.safetensors" in there
    assert not {"LICENSE", "calibration/scores.pt"} & there.keys()


def test_a_link_that_leads_out_is_not_pushed_whoever_asks_for_it(
    shell: Shell, folder: Path
) -> None:
    secret = folder.parent / "token"
    secret.write_text("s3cret")
    (folder / "notes.txt").symlink_to(secret)
    line = shell.refused("push", str(folder), "me/tiny", "--include", "notes.txt")
    assert "notes.txt: is a link out of the folder" in line
    shell.good("push", str(folder), "me/tiny")
    assert "notes.txt" not in shell.hub.files("me/tiny")


def test_links_that_hold_what_was_written_are_pushed(shell: Shell, checked: Path) -> None:
    """People keep weights on another disk, and caches keep everything so."""
    folder = Path(shutil.copytree(checked, shell.folder / "linked"))
    _move_out(folder, SHARD)
    shell.good("push", "linked", "me/tiny")
    for name in ("tokenizer.json", "config.json"):
        _move_out(folder, name)
    shell.good("push", "linked", "me/tiny", "--follow-links")
    assert SHARD in shell.hub.files("me/tiny")
    flip(shell.folder / f"elsewhere-{SHARD}")
    assert f"{SHARD} is not what apply wrote" in shell.refused(
        "push", "linked", "me/tiny", "--follow-links"
    )


@pytest.mark.parametrize("option", ["--include", "--exclude"])
def test_globs_that_fit_nothing_or_too_much_are_refused(
    shell: Shell, folder: Path, option: str
) -> None:
    line = shell.refused("push", str(folder), "me/tiny", option, "evals*")
    assert f"{option}: evals* fits none of the" in line
    for glob in ("config.json", "*.safetensors", "calibration"):
        line = shell.refused("push", str(folder), "me/tiny", "--exclude", glob)
        assert "without which this is no model" in line


def test_an_edit_of_a_shard_is_found_where_its_checksum_was_recorded(
    shell: Shell, folder: Path, checked: Path
) -> None:
    copy = Path(shutil.copytree(checked, folder.parent / "copy"))
    for out in (folder, copy):
        flip(out / SHARD)
    line = shell.refused("push", str(copy), "me/tiny")
    assert f"{SHARD} is not what apply wrote: it has SHA-256" in line
    shell.good("push", str(folder), "me/tiny")


def test_records_of_earlier_versions_are_held_as_far_as_they_go(shell: Shell, folder: Path) -> None:
    path = folder / PROVENANCE_NAME
    record = json.loads(path.read_bytes())
    del record["sha256"]
    path.write_text(json.dumps(record))
    flip(folder / "tokenizer.json")
    shell.good("push", str(folder), "me/tiny")
    (folder / "tokenizer.json").write_text("{}")
    assert "tokenizer.json has 2 bytes" in shell.refused("push", str(folder), "me/tiny")


def test_python_takes_the_same_globs(shell: Shell, folder: Path) -> None:
    (folder / "LICENSE").write_text("mine")
    with pytest.raises(CheckpointError, match="LICENSE has 4 bytes"):
        api.push(folder, "me/tiny")
    api.push(folder, "me/tiny", include=["LICENSE"])
    api.push(folder, "me/tiny", exclude=["LICENSE"])
    assert shell.hub.read("me/tiny", "LICENSE") == b"mine"


# What is recorded


def sha256s(out: Path) -> dict[str, str]:
    """What a shell's own `sha256sum` would say of every file but the record."""
    return {name: digest for name, digest in digests(out).items() if name != PROVENANCE_NAME}


def test_small_files_are_always_recorded_and_shards_where_that_is_asked_for(
    pruned: Path, checked: Path
) -> None:
    for out, weights in ((pruned, False), (checked, True)):
        record = json.loads((out / PROVENANCE_NAME).read_bytes())
        expected = sha256s(out)
        assert record["files"] == {n: (out / n).stat().st_size for n in expected}
        if not weights:
            expected = {n: d for n, d in expected.items() if not n.endswith(".safetensors")}
        assert record["sha256"] == expected
        assert list(record["sha256"]) == sorted(expected)


@pytest.mark.parametrize("way", ["--push-to-hub", "--stream-push"])
def test_what_is_pushed_carries_the_checksums_of_its_shards(
    shell: Shell, checked: Path, way: str
) -> None:
    words = ("apply", scores_of("kimi_k25"), "--model", str(fixture_folder("kimi_k25")))
    shell.good(*words, "--ratio", "0.65", "-o", "out", "--checksums", way, "me/tiny")
    assert shell.hub.read("me/tiny", PROVENANCE_NAME) == (checked / PROVENANCE_NAME).read_bytes()
    there = shell.hub.files("me/tiny")
    record = json.loads(shell.hub.read("me/tiny", PROVENANCE_NAME))
    shards = [name for name in there if name.endswith(".safetensors")]
    assert len(shards) == 5
    for name in shards:
        found = hashlib.sha256(shell.hub.read("me/tiny", name)).hexdigest()
        assert record["sha256"][name] == found
    # A push of a folder that was downloaded, with its card and its card set aside, holds as well.
    if way == "--stream-push":
        back = downloaded(shell.hub, "me/tiny", shell.folder / "back")
        shell.good("push", str(back), "me/again")
