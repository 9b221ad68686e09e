"""What a push says that it did is what the Hub says that it was sent and has."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi

from tests.operations.workbench import Shell, scores_of
from tests.support.hub.models import fixture_folder

MODEL = str(fixture_folder("kimi_k25"))


def pushed(shell: Shell, *words: str) -> dict[str, Any]:
    ended = shell.here("push", *words, "--json")
    assert ended.status == 0, ended.stderr
    found: dict[str, Any] = json.loads(ended.stdout)
    return found


def small_files(shell: Shell, repo_id: str) -> int:
    """Bytes of a repository's files that are no large ones, .gitattributes left out."""
    found = HfApi().model_info(repo_id, files_metadata=True).siblings or []
    sizes = {file.rfilename: file.size or 0 for file in found if file.lfs is None}
    return sum(size for name, size in sizes.items() if name != ".gitattributes")


def test_what_is_sent_is_what_the_hub_received(shell: Shell, pruned: Path) -> None:
    first = pushed(shell, str(pruned), "me/tiny")
    uploaded = shell.hub.received(r"PUT /upload/")
    assert uploaded > 0
    assert first["sent"] == uploaded + small_files(shell, "me/tiny") == first["nbytes"]
    assert (first["private"], first["replaced"], first["others"]) == (False, [], [])
    shell.hub.reset_counts()
    again = pushed(shell, str(pruned), "me/tiny")
    assert again["sent"] == shell.hub.received(r"PUT /upload/") == 0
    assert again["replaced"] == []
    said = shell.here("push", str(pruned), "me/tiny").stdout
    assert "  sent          nothing: it was all there\n" in said
    assert "  visibility    public\n" in said


def test_what_an_interrupted_push_sent_is_not_sent_again(shell: Shell, pruned: Path) -> None:
    shell.hub.fault(r"POST .*/commit/", status=403)
    assert shell.here("push", str(pruned), "me/tiny").status == 2
    assert shell.hub.received(r"PUT /upload/") > 0
    shell.hub.clear_faults()
    shell.hub.reset_counts()
    again = pushed(shell, str(pruned), "me/tiny")
    assert shell.hub.received(r"PUT /upload/") == 0
    assert again["sent"] == small_files(shell, "me/tiny") < again["nbytes"]


def test_what_it_replaces_removes_and_leaves_is_named(
    shell: Shell, pruned: Path, tmp_path: Path
) -> None:
    there = {
        "config.json": b"{}",
        "LICENSE": (pruned / "LICENSE").read_bytes() if (pruned / "LICENSE").exists() else b"x",
        "old.safetensors": b"weights",
        "notes/x.txt": b"mine",
        "README.md": b"theirs",
    }
    shell.hub.add_model("me/tiny", there)
    changed = shutil.copytree(pruned, tmp_path / "changed")
    report = pushed(shell, str(changed), "me/tiny")
    assert report["removed"] == ["old.safetensors"]
    same = ["LICENSE"] if (pruned / "LICENSE").exists() else []
    assert report["replaced"] == ["README.md", "config.json"]
    assert report["others"] == sorted({"notes/x.txt", "LICENSE"} - set(same))
    now = shell.hub.files("me/tiny")
    assert {"notes/x.txt", "LICENSE"} <= now.keys() and "old.safetensors" not in now
    (changed / "README.md").write_text("Another card.\n")
    report = pushed(shell, str(changed), "me/tiny", "--no-card")
    assert report["replaced"] == ["README.md"]
    assert report["sent"] == len("Another card.\n")


def test_a_dry_run_says_the_same_and_does_nothing(
    shell: Shell, pruned: Path, tmp_path: Path
) -> None:
    changed = shutil.copytree(pruned, tmp_path / "changed")
    shell.hub.add_model("me/tiny", {"config.json": b"{}", "x.safetensors": b"x", "y": b"y"})
    for words in (("me/new",), ("me/tiny",), ("me/tiny",), ("me/tiny", "--revision", "v2")):
        before = {name: shell.hub.commits(name) for name in shell.hub.store.repositories}
        dry = pushed(shell, str(changed), *words, "--dry-run")
        assert {name: shell.hub.commits(name) for name in shell.hub.store.repositories} == before
        assert "v2" not in shell.hub.store.repositories["me/tiny"].branches
        done = pushed(shell, str(changed), *words)
        assert dry.pop("dry_run") and not done.pop("dry_run")
        told = {**dry, "seconds": 0, "commit": "", "created": None, "sent": None}
        assert told == {**done, "seconds": 0, "commit": "", "created": None, "sent": None}
        # Equal bytes are sent once, whichever files and branches have them.
        assert done["sent"] <= dry["sent"]
        assert dry["created"] == done["created"]
        shutil.copy(changed / "LICENSE", changed / "README.md")
    said = shell.here("push", str(changed), "me/tiny", "--dry-run").stdout
    assert "to send" in said and said.endswith("nothing was made there and nothing sent.\n")


@pytest.mark.parametrize("why", ["others", "public", "not a prune", "changed"])
def test_a_dry_run_ends_as_the_push_would(
    why: str, shell: Shell, pruned: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(pruned, tmp_path / "folder")
    words = ["push", str(folder), "me/tiny"]
    if why == "others":
        shell.hub.add_model("org/tiny", {"x": b"x"})
        words[-1] = "org/tiny"
    elif why == "public":
        shell.hub.add_model("me/tiny", {"x": b"x"})
        words.append("--private")
    elif why == "changed":
        (folder / "generation_config.json").write_text("{}")
    else:
        words[1] = MODEL
    dry, done = shell.here(*words, "--dry-run"), shell.here(*words)
    assert (dry.status, dry.stderr) == (done.status, done.stderr)
    assert dry.status == 2


def test_who_sees_it_is_as_the_hub_says(shell: Shell, pruned: Path) -> None:
    assert pushed(shell, str(pruned), "me/secret", "--private")["private"] is True
    assert pushed(shell, str(pruned), "me/secret")["private"] is True
    assert pushed(shell, str(pruned), "team/open")["private"] is False


@pytest.mark.slow
def test_a_streamed_push_counts_what_went_ahead(shell: Shell) -> None:
    words = ("apply", scores_of("kimi_k25"), "--model", MODEL, "--ratio", "0.5")
    ended = shell.here(*words, "--stream-push", "me/streamed", "--json")
    report = json.loads(ended.stdout)["push"]
    uploaded = shell.hub.received(r"PUT /upload/")
    assert report["sent"] == uploaded + small_files(shell, "me/streamed") == report["nbytes"]
