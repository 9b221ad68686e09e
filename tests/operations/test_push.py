"""`push`: one commit, byte for byte, nothing twice, whatever comes between."""

from __future__ import annotations

import json
import re
import shutil
import signal
import sys
from pathlib import Path

import pytest
from huggingface_hub import HfApi

import shardsurgeon
from tests.cli.report_schema import require_valid
from tests.operations.workbench import Shell, digests, downloaded, same_model, scores_of
from tests.support.hub.models import fixture_folder

SHARD = "model-00002-of-00005.safetensors"


def test_a_prune_arrives_in_one_commit_byte_for_byte(
    shell: Shell, pruned: Path, tmp_path: Path
) -> None:
    before = digests(pruned)
    report = json.loads(shell.good("push", str(pruned), "me/tiny", "--json"))
    require_valid(report, "push")
    hub = shell.hub
    assert hub.commits("me/tiny") == ["Upload a model pruned with shardsurgeon", "initial commit"]
    assert report["commit"] == hub.store.repositories["me/tiny"].branches["main"]
    assert (report["repo_id"], report["created"], report["removed"]) == ("me/tiny", True, [])
    found = digests(downloaded(hub, "me/tiny", tmp_path / "there"))
    same_model(found, before)
    assert found["README.source.md"] == before["README.md"]
    assert report["files"] == len(found) - 1  # the repository's own .gitattributes
    assert set(hub.uploads.values()) == {1}
    assert digests(pruned) == before


def test_a_push_says_what_it_is_at(shell: Shell, pruned: Path) -> None:
    ended = shell.run("push", str(pruned), "me/tiny", SHARDSURGEON_PROGRESS="plain")
    nbytes = sum(file.stat().st_size for file in pruned.glob("*.safetensors"))
    lines = [line.removeprefix("shardsurgeon: ") for line in ended.stderr.splitlines()]
    assert lines == [
        "starting",
        "reading the model",
        f"hashing: {hashed(pruned) / 1000:.1f} kB",
        "looking for secrets",
        "asking for me/tiny",
        "writing the card",
        f"uploading: {nbytes / 1000:.1f} kB",
        "committing",
    ]


def hashed(folder: Path) -> int:
    """Bytes of the files whose SHA-256 the record has."""
    record = json.loads((folder / "calibration" / "reap_pruning_metadata.json").read_bytes())
    return sum((folder / name).stat().st_size for name in record["sha256"])


@pytest.mark.slow
def test_the_report_says_where_it_is_and_how_to_serve_it(shell: Shell, pruned: Path) -> None:
    said = shell.good("push", str(pruned), "me/tiny")
    assert f"{shell.hub.endpoint}/me/tiny (new repository)" in said
    assert said.endswith("Serve:\n  vllm serve me/tiny --trust-remote-code\n")


@pytest.mark.slow
def test_pushed_again_it_uploads_and_commits_nothing(shell: Shell, pruned: Path) -> None:
    first = json.loads(shell.good("push", str(pruned), "me/tiny", "--json"))
    shell.hub.reset_counts()
    again = json.loads(shell.good("push", str(pruned), "me/tiny", "--json"))
    assert again["commit"] == first["commit"]
    assert again["created"] is False
    assert shell.hub.uploads == {}
    assert not shell.hub.received(r"POST .*/commit/")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="kill -9")
@pytest.mark.parametrize("arrived", [1, 3])
def test_killed_between_two_uploads_it_goes_on(
    shell: Shell, pruned: Path, arrived: int, tmp_path: Path
) -> None:
    hub = shell.hub
    hub.fault(r"PUT /upload/", skip=arrived, do=lambda: process.kill(), times=1)
    process = shell.start("push", str(pruned), "me/tiny")
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    kept = set(hub.uploads)
    assert hub.commits("me/tiny") == ["initial commit"]
    hub.clear_faults()
    shell.good("push", str(pruned), "me/tiny")
    assert {oid: n for oid, n in hub.uploads.items() if oid in kept} == dict.fromkeys(kept, 1)
    same_model(digests(downloaded(hub, "me/tiny", tmp_path / "there")), digests(pruned))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("on", "fault"),
    [
        (r"GET /api/whoami", {"status": 429, "retry_after": 0}),
        (r"POST /api/repos/create", {"status": 503, "retry_after": 0}),
        (r"POST .*/preupload/", {"status": 500}),
        (r"PUT /upload/", {"cut_upload_after": 1000}),
        (r"PUT /upload/", {"status": 503, "retry_after": 0}),
        (r"GET .*/revision/", {"cut_after": 10}),
        (r"POST .*/commit/", {"status": 503, "retry_after": 0}),
        (r"POST .*/objects/batch", {"lose_answer": True}),
    ],
)
def test_a_network_that_stumbles_is_not_noticed(
    shell: Shell, pruned: Path, on: str, fault: dict[str, object], tmp_path: Path
) -> None:
    shell.hub.fault(on, **fault)
    shell.good("push", str(pruned), "me/tiny")
    same_model(digests(downloaded(shell.hub, "me/tiny", tmp_path / "there")), digests(pruned))


def test_a_commit_whose_answer_is_lost_is_found_by_the_next_run(shell: Shell, pruned: Path) -> None:
    shell.hub.fault(r"POST .*/commit/", lose_answer=True)
    line = shell.refused("push", str(pruned), "me/tiny", status=1)
    assert "run the same command again" in line
    assert len(shell.hub.commits("me/tiny")) == 2
    shell.good("push", str(pruned), "me/tiny")
    assert len(shell.hub.commits("me/tiny")) == 2
    assert set(shell.hub.uploads.values()) == {1}


@pytest.mark.slow
def test_a_branch_is_made_where_it_is_missing(shell: Shell, pruned: Path, tmp_path: Path) -> None:
    said = shell.good("push", str(pruned), "me/tiny", "--revision", "65pct")
    assert said.endswith("vllm serve me/tiny --revision 65pct --trust-remote-code\n")
    assert list(shell.hub.files("me/tiny")) == [".gitattributes"]
    there = downloaded(shell.hub, "me/tiny", tmp_path / "there", "65pct")
    same_model(digests(there), digests(pruned))
    assert '--revision 65pct"' not in (there / "README.md").read_text()
    assert "vllm serve me/tiny --revision 65pct" in (there / "README.md").read_text()
    assert 'revision="65pct"' in (there / "README.md").read_text()


@pytest.mark.slow
def test_a_pull_request_leaves_the_branch_alone(shell: Shell, pruned: Path) -> None:
    shell.hub.add_model("org/theirs", {"config.json": b"{}"})
    report = json.loads(shell.good("push", str(pruned), "org/theirs", "--create-pr", "--json"))
    assert list(shell.hub.files("org/theirs")) == ["config.json"]
    assert SHARD in shell.hub.files("org/theirs", "refs/pr/1")
    assert report["url"] == report["pull_request"]
    assert report["pull_request"].endswith("org/theirs/discussions/1")
    assert report["revision"] is None


@pytest.mark.slow
def test_a_new_repository_can_be_private(shell: Shell, pruned: Path) -> None:
    shell.good("push", str(pruned), "me/secret", "--private")
    assert HfApi().model_info("me/secret").private
    # Asked for again, it is what it is.
    shell.good("push", str(pruned), "me/secret", "--private")


@pytest.mark.slow
def test_a_bare_name_is_ones_own(shell: Shell, pruned: Path) -> None:
    report = json.loads(shell.good("push", str(pruned), "tiny", "--json"))
    assert report["repo_id"] == "me/tiny"
    assert "vllm serve me/tiny" in shell.hub.read("me/tiny", "README.md").decode()


@pytest.mark.slow
def test_the_shards_of_an_earlier_model_do_not_stay_behind(shell: Shell, pruned: Path) -> None:
    old = {"model.safetensors": b"old", "model-00001-of-00002.safetensors": b"old"}
    shell.hub.add_model("me/tiny", {**old, "notes.txt": b"mine", "sub/x.safetensors": b"mine"})
    report = json.loads(shell.good("push", str(pruned), "me/tiny", "--json"))
    assert report["removed"] == sorted(old)
    left = shell.hub.files("me/tiny")
    assert not old.keys() & left.keys()
    assert {"notes.txt", "sub/x.safetensors", SHARD} <= left.keys()


@pytest.mark.slow
def test_what_a_gitignore_names_is_pushed_all_the_same(
    shell: Shell, pruned: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(pruned, tmp_path / "copy"))
    (copy / ".gitignore").write_text("*.pt\ntokenizer*\n")
    shell.good("push", str(copy), "me/tiny")
    assert {"calibration/scores.pt", "tokenizer.json"} <= shell.hub.files("me/tiny").keys()


@pytest.mark.slow
def test_what_was_pushed_holds_there_and_downloaded(
    shell: Shell, pruned: Path, tmp_path: Path
) -> None:
    source = str(fixture_folder("kimi_k25"))
    shell.good("push", str(pruned), "me/tiny")
    assert re.match(
        "hf://me/tiny@[0-9a-f]{12}: identical\n", shell.good("verify", source, "me/tiny")
    )
    there = downloaded(shell.hub, "me/tiny", tmp_path / "there")
    shell.good("verify", source, str(there))
    (there / "README.source.md").write_text("another")
    ended = shell.run("verify", source, str(there))
    assert ended.status == 1 and "README.md: has" in ended.stdout


@pytest.mark.slow
def test_a_prune_of_a_pushed_prune_keeps_every_card(
    shell: Shell, pruned: Path, tmp_path: Path
) -> None:
    shell.good("push", str(pruned), "me/first")
    again = ("apply", scores_of("kimi_k25"), "--model", "me/first", "--keep", "8")
    shell.good(*again, "-o", "second", "--push-to-hub", "me/second")
    hub = shell.hub
    first_card = hub.read("me/first", "README.md")
    assert hub.read("me/second", "README.source.md") == first_card
    original = (pruned / "README.md").read_bytes()
    assert hub.read("me/second", "README.source-2.md") == original
    card = hub.read("me/second", "README.md").decode()
    assert card.startswith("---\nbase_model:\n- me/first\n")
    assert "| 32 → 12 |" in card and "| 12 → 8 |" in card
    shell.good("verify", "me/first", "me/second")


@pytest.mark.slow
def test_the_card_can_be_ones_own_or_left_out(shell: Shell, pruned: Path, tmp_path: Path) -> None:
    card = tmp_path / "card.md"
    card.write_text("---\nlicense: mit\n---\n# Mine\n")
    shell.good("push", str(pruned), "me/mine", "--card", str(card))
    assert shell.hub.read("me/mine", "README.md") == card.read_bytes()
    original = (pruned / "README.md").read_bytes()
    assert shell.hub.read("me/mine", "README.source.md") == original
    report = json.loads(shell.good("push", str(pruned), "me/none", "--no-card", "--json"))
    assert shell.hub.read("me/none", "README.md") == original
    assert "README.source.md" not in shell.hub.files("me/none")
    assert "empty or missing yaml metadata" in report["notes"][0]


def test_python_does_the_same(online: object, shell: Shell, pruned: Path) -> None:
    report = shardsurgeon.push(pruned, "me/tiny", private=True, revision="dev", card=False)
    assert (report.revision, report.created) == ("dev", True)
    assert SHARD in shell.hub.files("me/tiny", "dev")
    assert shell.hub.read("me/tiny", "README.md", "dev") == (pruned / "README.md").read_bytes()
