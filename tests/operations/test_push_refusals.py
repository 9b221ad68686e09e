"""What `push` refuses: one line, the status that belongs to it, and no word of the token."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from shardsurgeon import errors
from shardsurgeon.execution.journal import FORMAT
from shardsurgeon.operations import api
from tests.operations.workbench import Shell, scores_of
from tests.support.hub.models import fixture_folder

SHARD = "model-00002-of-00005.safetensors"


def test_a_token_that_the_hub_does_not_know(shell: Shell, pruned: Path) -> None:
    line = shell.refused("push", str(pruned), "me/tiny", HF_TOKEN="hf_wrong")
    assert "refused the token" in line and "hf auth login" in line
    assert "hf_wrong" not in line
    assert not shell.hub.store.repositories


def test_no_token_at_all(shell: Shell, pruned: Path) -> None:
    line = shell.refused("push", str(pruned), "me/tiny", HF_TOKEN="")
    assert "there is no Hugging Face token" in line
    assert shell.hub.requests == []


def test_a_token_that_may_only_read(shell: Shell, pruned: Path) -> None:
    token = shell.hub.read_token
    line = shell.refused("push", str(pruned), "me/tiny", HF_TOKEN=token)
    assert "may only read" in line and token not in line


@pytest.mark.slow
@pytest.mark.parametrize("token", ["hf_bad token", "hf_b\u00e4d", "hf_bad\x01"])
def test_a_token_that_no_header_can_carry(shell: Shell, pruned: Path, token: str) -> None:
    line = shell.refused("push", str(pruned), "me/tiny", HF_TOKEN=token)
    assert "HF_TOKEN" in line and "bad" not in line.replace("bad\n", "")


def test_the_name_of_another_user(shell: Shell, pruned: Path) -> None:
    line = shell.refused("push", str(pruned), "stranger/tiny")
    assert "may not write there (HTTP 403" in line


def test_a_repository_of_another_user(shell: Shell, pruned: Path) -> None:
    shell.hub.add_model("org/theirs", {"config.json": b"{}"})
    line = shell.refused("push", str(pruned), "org/theirs")
    assert "may not write there" in line and "--create-pr" in line
    assert shell.hub.uploads == {}


def test_a_private_repository_of_another_user_looks_as_if_missing(
    shell: Shell, pruned: Path
) -> None:
    shell.hub.add_model("org/hidden", {"config.json": b"{}"}, private=True)
    assert "HTTP 4" in shell.refused("push", str(pruned), "org/hidden")


def test_a_public_repository_does_not_turn_private(shell: Shell, pruned: Path) -> None:
    shell.hub.add_model("me/open", {"config.json": b"{}"})
    line = shell.refused("push", str(pruned), "me/open", "--private")
    assert "is there already, and public" in line
    assert shell.hub.uploads == {}


def test_a_pull_request_against_a_branch_that_is_not_there(shell: Shell, pruned: Path) -> None:
    shell.hub.add_model("me/tiny", {"config.json": b"{}"})
    words = ("push", str(pruned), "me/tiny", "--create-pr", "--revision", "dev")
    assert "has no such revision" in shell.refused(*words)


@pytest.mark.parametrize("repo_id", ["a/b/c", "me/ti ny", "me/tiny.git", "-x/y"])
def test_no_repository_id(shell: Shell, pruned: Path, repo_id: str) -> None:
    line = shell.refused("push", "--", str(pruned), repo_id)
    assert "is not a repository id" in line
    assert shell.hub.requests == []


def test_no_network_wanted(shell: Shell, pruned: Path) -> None:
    line = shell.refused("push", str(pruned), "me/tiny", HF_HUB_OFFLINE="1")
    assert line == (
        "shardsurgeon: error: HF_HUB_OFFLINE: is set, and pushing needs the network; unset it\n"
    )


@pytest.mark.slow
def test_no_network_there(shell: Shell, pruned: Path) -> None:
    shell.hub.stop()
    line = shell.refused("push", str(pruned), "me/tiny", status=1)
    assert "me/tiny: gave up after" in line and "run the same command again" in line


def test_a_broken_endpoint(shell: Shell, pruned: Path) -> None:
    line = shell.refused("push", str(pruned), "me/tiny", HF_ENDPOINT="nowhere")
    assert "HF_ENDPOINT" in line


def test_a_server_that_stays_broken(shell: Shell, pruned: Path) -> None:
    shell.hub.fault(r"POST .*/commit/", status=500, times=None)
    line = shell.refused("push", str(pruned), "me/tiny", status=1)
    assert "HTTP 500" in line and "not uploaded twice" in line


def test_a_card_that_is_not_there_or_is_no_text(shell: Shell, pruned: Path, tmp_path: Path) -> None:
    words = ("push", str(pruned), "me/tiny", "--card")
    assert "no.md" in shell.refused(*words, "no.md")
    broken = tmp_path / "broken.md"
    broken.write_bytes(b"\xff\xfe\xff")
    assert "cannot be read as a card" in shell.refused(*words, str(broken))
    os.mkfifo(tmp_path / "pipe.md")
    line = shell.refused(*words, str(tmp_path / "pipe.md"))
    assert "it is a pipe that nobody writes into" in line
    assert shell.hub.requests == []


def test_a_card_whose_metadata_the_hub_does_not_take(
    shell: Shell, pruned: Path, tmp_path: Path
) -> None:
    card = tmp_path / "card.md"
    card.write_text("---\nlicense: [mit\n---\n# Mine\n")
    line = shell.refused("push", str(pruned), "me/tiny", "--card", str(card))
    assert "card.md: its metadata cannot be read" in line
    assert shell.hub.requests == []


def test_a_card_that_the_hub_alone_finds_wrong(shell: Shell, pruned: Path) -> None:
    shell.hub.fault(r"POST /api/validate-yaml", status=400, times=None)
    line = shell.refused("push", str(pruned), "me/tiny")
    assert "README.md: the Hub does not take its metadata" in line
    assert len(shell.hub.commits("me/tiny")) == 1


def test_words_that_contradict_each_other(shell: Shell, pruned: Path) -> None:
    line = shell.refused("push", str(pruned), "me/tiny", "--card", "x.md", "--no-card")
    assert "--no-card contradict each other" in line


Spoil = Callable[[Path], object]


def _cut_short(folder: Path) -> None:
    shard = folder / SHARD
    shard.write_bytes(shard.read_bytes()[:-1])


def _leave_work(folder: Path) -> None:
    (folder / "x.partial").mkdir()
    (folder / "x.partial" / "shardsurgeon.journal").write_text(FORMAT)


SPOILED: dict[str, tuple[Spoil, str]] = {
    "a shard is missing": (lambda folder: (folder / SHARD).unlink(), SHARD),
    "a shard is cut short": (_cut_short, SHARD),
    "no metadata": (lambda folder: shutil.rmtree(folder / "calibration"), "was not pruned by"),
    "unfinished work in it": (_leave_work, "unfinished work of an apply"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json"),
}


@pytest.mark.parametrize("spoiled", SPOILED)
def test_a_folder_that_is_no_complete_prune(
    shell: Shell, pruned: Path, spoiled: str, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(pruned, tmp_path / "copy"))
    spoil, told = SPOILED[spoiled]
    spoil(folder)
    assert told in shell.refused("push", str(folder), "me/tiny")
    assert shell.hub.requests == []


def test_an_original(shell: Shell) -> None:
    line = shell.refused("push", str(fixture_folder("qwen3_moe")), "me/tiny")
    assert "was not pruned by shardsurgeon" in line


def test_a_folder_that_is_not_there(shell: Shell) -> None:
    assert "is not a folder" in shell.refused("push", "nothing", "me/tiny")


def test_unfinished_work_itself(shell: Shell, pruned: Path) -> None:
    partial = shell.folder / "out.partial"
    shutil.copytree(pruned, partial / "files")
    (partial / "shardsurgeon.journal").write_text(FORMAT)
    for folder in ("out.partial", "out.partial/files"):
        assert "unfinished work of an apply" in shell.refused("push", folder, "me/tiny")


@pytest.mark.slow
def test_the_repository_that_was_pruned(shell: Shell) -> None:
    shell.hub.add_model("me/original", fixture_folder("kimi_linear"))
    words = ("apply", scores_of("kimi_linear"), "--model", "me/original", "--ratio", "0.5")
    shell.good(*words, "-o", "out")
    line = shell.refused("push", "out", "me/original")
    assert "is the repository that was pruned" in line
    assert "is the repository that was pruned" in shell.refused(
        *words, "-o", "again", "--stream-push", "me/original"
    )
    assert shell.hub.uploads == {}
    shell.good("push", "out", "me/original", "--revision", "half")


@pytest.mark.slow
@pytest.mark.parametrize("debug", ["", "1"])
def test_the_token_is_in_no_word_and_no_file(
    shell: Shell, pruned: Path, debug: str, tmp_path: Path
) -> None:
    token = shell.hub.token
    shell.hub.fault(r"POST .*/commit/", status=403, times=None)
    words = ("apply", scores_of("kimi_linear"), "--model", str(fixture_folder("kimi_linear")))
    words += ("--ratio", "0.5", "-o", "out", "--stream-push", "me/tiny")
    ended = shell.run(*words, SHARDSURGEON_DEBUG=debug)
    assert ended.status == 2
    assert token not in ended.stdout + ended.stderr
    kept = [path for path in (tmp_path / "here").rglob("*") if path.is_file()]
    assert kept
    assert not any(token.encode() in path.read_bytes() for path in kept)


def test_bad_input_is_told_before_the_hub_is_asked(shell: Shell, tmp_path: Path) -> None:
    words = ("apply", scores_of("kimi_k25"), "--model", str(fixture_folder("kimi_linear")))
    shell.refused(*words, "--ratio", "0.5", "--stream-push", "me/tiny")
    assert shell.hub.requests == []


def test_python_refuses_alike(online: object, pruned: Path) -> None:
    with pytest.raises(errors.UsageError, match="is not a repository id"):
        api.push(pruned, "a/b/c")
