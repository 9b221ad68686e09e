"""`push VIEW REPO_ID`: shards made on their way, less disk than the model, the same repository."""

from __future__ import annotations

import json
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path

import pytest

import shardsurgeon
from shardsurgeon.errors import UsageError
from shardsurgeon.execution.transfer import RangeTransfer
from shardsurgeon.storage.formats.view import DATA_NAME, VIEW_NAME
from shardsurgeon.storage.hub.repository import Repository
from tests.operations.workbench import Shell, digests, downloaded, scores_of
from tests.support.hub.models import fixture_folder
from tests.support.hub.server import LocalHub

FAMILY = "kimi_k25"


@pytest.fixture
def source(shell: Shell) -> LocalHub:
    shell.hub.add_model("org/Tiny", fixture_folder(FAMILY))
    return shell.hub


@pytest.fixture
def view(shell: Shell, source: LocalHub) -> Path:
    """A view of a repository, in the folder of the shell."""
    words = ("apply", scores_of(FAMILY), "-m", "org/Tiny", "-r", "0.5", "--view", "-o", "V-view")
    done(shell, *words)
    return shell.folder / "V-view"


def done(shell: Shell, *words: str) -> str:
    """The report of a command that ends well."""
    ended = shell.here(*words)
    assert ended.status == 0, ended.stderr
    return ended.stdout


def published(shell: Shell, repository: str) -> Path:
    folder = shell.folder.parent / repository.replace("/", "-")
    return downloaded(shell.hub, repository, folder)


def same_but_for_the_name(shell: Shell, one: str, other: str) -> None:
    """Two repositories hold the same, and each card its own name."""
    folders = published(shell, one), published(shell, other)
    cards = [(folder / "README.md").read_text() for folder in folders]
    names = [repository.partition("/")[2] for repository in (one, other)]
    assert cards[0].replace(names[0], names[1]) == cards[1]
    left, right = ({**digests(folder), "README.md": ""} for folder in folders)
    assert left == right


def test_the_repository_is_that_of_the_materialised_folder(shell: Shell, view: Path) -> None:
    before = digests(view)
    report = json.loads(done(shell, "push", "V-view", "me/small", "--json"))
    assert digests(view) == before
    assert shell.hub.commits("me/small")[1:] == ["initial commit"]
    assert [path.name for path in shell.folder.iterdir()] == ["V-view"]
    done(shell, "materialize", "V-view")
    other = json.loads(done(shell, "push", "V", "me/other", "--json"))
    same_but_for_the_name(shell, "me/small", "me/other")
    assert not {VIEW_NAME, DATA_NAME} & digests(published(shell, "me/small")).keys()
    told = ("files", "private", "left", "removed", "replaced", "others", "created", "dry_run")
    assert [report[key] for key in told] == [other[key] for key in told]
    assert report["nbytes"] == other["nbytes"]
    assert report["serve"] == ["vllm", "serve", "me/small", *other["serve"][3:]]


def test_a_second_push_sends_nothing(shell: Shell, view: Path) -> None:
    done(shell, "push", "V-view", "me/small")
    sent = dict(shell.hub.uploads)
    done(shell, "push", "V-view", "me/small")
    assert shell.hub.uploads == sent and set(sent.values()) == {1}
    assert len(shell.hub.commits("me/small")) == 2


def test_files_of_the_user_stay_here_and_a_card_of_the_user_is_pushed(
    shell: Shell, view: Path
) -> None:
    (view / "notes.txt").write_text("mine")
    (view / "README.md").write_text("---\nlicense: mit\n---\nmine\n")
    report = json.loads(done(shell, "push", "V-view", "me/small", "--no-card", "--json"))
    assert report["left"] == ["notes.txt"]
    there = published(shell, "me/small")
    assert (there / "README.md").read_text().endswith("mine\n")
    assert not (there / "notes.txt").exists()


def test_what_is_meant_is_pushed_as_it_is(shell: Shell, view: Path) -> None:
    config = json.loads((view / "config.json").read_text())
    (view / "config.json").write_text(json.dumps({**config, "use_cache": False}))
    (view / "notes.txt").write_text("mine")
    line = shell.refused("push", "V-view", "me/small")
    assert "is not as apply wrote it: config.json has" in line
    words = ("--include", "config.json", "--include", "notes.txt", "--exclude", "LICENSE")
    done(shell, "push", "V-view", "me/small", *words)
    there = published(shell, "me/small")
    assert json.loads((there / "config.json").read_text())["use_cache"] is False
    assert (there / "notes.txt").read_text() == "mine"
    assert (view / "LICENSE").exists() and not (there / "LICENSE").exists()


def test_a_secret_is_refused_before_anything_is_sent(shell: Shell, view: Path) -> None:
    (view / "README.md").write_text("AKIA" + "Z" * 16)
    line = shell.refused("push", "V-view", "me/small")
    assert line.endswith("leave the file behind (apply --exclude)\n") and "an AWS key" in line
    assert not shell.hub.uploads


def test_a_dry_run_tells_what_would_be_sent_and_sends_nothing(shell: Shell, view: Path) -> None:
    first = json.loads(done(shell, "push", "V-view", "me/small", "--dry-run", "--json"))
    assert "me/small" not in shell.hub.store.repositories
    made = json.loads(done(shell, "push", "V-view", "me/small", "--json"))
    assert (first["files"], first["nbytes"]) == (made["files"], made["nbytes"])
    again = json.loads(done(shell, "push", "V-view", "me/small", "--dry-run", "--json"))
    assert (again["sent"], again["replaced"], again["removed"]) == (0, [], [])
    assert [path.name for path in shell.folder.iterdir()] == ["V-view"]


# The disk


def test_no_more_shards_are_on_the_disk_than_the_budget_allows(
    shell: Shell, view: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {shard.name: shard.stat().st_size for shard in made(shell, view)}
    upload, seen = Repository.upload, []

    def watched(self: Repository, name: str, path: Path, *rest: object) -> object:
        seen.append(sum(file.stat().st_size for file in path.parent.glob("*.safetensors")))
        return upload(self, name, path, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Repository, "upload", watched)
    budget = max(sizes.values())
    done(shell, "push", "V-view", "me/small", "--disk-budget", str(budget))
    assert len(seen) == len(sizes) and max(seen) <= budget
    there = digests(published(shell, "me/small"))
    assert {name: there[name] for name in sizes} == {
        shard.name: digests(shard.parent)[shard.name] for shard in made(shell, view)
    }


def made(shell: Shell, view: Path) -> Iterator[Path]:
    """The shards of the materialised folder."""
    folder = shell.folder.parent / "made"
    shardsurgeon.materialize(view, folder)
    return folder.glob("*.safetensors")


def test_a_budget_below_one_shard_is_refused(shell: Shell, view: Path) -> None:
    line = shell.refused("push", "V-view", "me/small", "--disk-budget", "10kB")
    assert "--disk-budget: 10.0 kB (10,000 bytes) is less than model-0" in line
    assert not shell.hub.uploads and "me/small" not in shell.hub.store.repositories


def test_a_budget_is_for_a_view(shell: Shell, view: Path) -> None:
    done(shell, "materialize", "V-view")
    line = shell.refused("push", "V", "me/small", "--disk-budget", "1GB")
    assert line.endswith(
        "--disk-budget: is for the shards of a view, and those of V are there; leave it out\n"
    )


# Interruptions


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="kill -9")
@pytest.mark.parametrize("sent", [0, 2])
def test_killed_it_goes_on_and_uploads_no_shard_twice(
    shell: Shell, source: LocalHub, view: Path, sent: int
) -> None:
    source.fault(r"PUT /upload/", skip=sent, do=lambda: process.kill())
    process = shell.start("push", "V-view", "me/small")
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert (shell.folder / "V-view-push.partial").is_dir()
    arrived = dict(source.uploads)
    shell.good("push", "V-view", "me/small")
    assert {oid: source.uploads[oid] for oid in arrived} == dict.fromkeys(arrived, 1)
    assert [path.name for path in shell.folder.iterdir()] == ["V-view"]
    shell.good("materialize", "V-view")
    shell.good("push", "V", "me/other")
    same_but_for_the_name(shell, "me/small", "me/other")


def test_work_of_another_push_is_in_the_way_and_the_line_says_what_to_do(
    shell: Shell, source: LocalHub, view: Path
) -> None:
    source.fault(r"PUT /upload/", skip=1, times=None, status=403)
    assert shell.here("push", "V-view", "me/small").status == 2
    source.clear_faults()
    line = shell.refused("push", "V-view", "me/small", "--exclude", "LICENSE")
    place = re.escape(str(shell.folder / "V-view-push.partial"))
    assert re.search(rf"; remove {place}, or run the command in another folder\n$", line), line
    done(shell, "push", "V-view", "me/small")


def test_a_shard_with_wrong_bytes_is_never_sent(
    shell: Shell, view: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    move = RangeTransfer.write

    def wrong(self: RangeTransfer, batch: object, path: Path, *rest: object) -> object:
        moved = move(self, batch, path, *rest)  # type: ignore[arg-type]
        if path.name.endswith("2-of-00005.safetensors"):
            data = bytearray(path.read_bytes())
            half = len(data) // 2
            path.write_bytes(data[:half] + bytes(byte ^ 1 for byte in data[half:]))
        return moved

    monkeypatch.setattr(RangeTransfer, "write", wrong)
    line = shell.refused("push", "V-view", "me/small", status=1)
    assert "differs from what it was made of" in line and "--restart" not in line
    assert shell.hub.commits("me/small") == ["initial commit"]


def test_layers_that_differ_are_not_pushed_as_if_they_were_allowed(
    shell: Shell, source: LocalHub
) -> None:
    words = ("apply", scores_of(FAMILY), "-m", "org/Tiny", "-r", "0.5", "--allocate", "global")
    done(shell, *words, "--view", "-o", "U-view")
    ended = shell.here("push", "U-view", "me/uneven")
    assert ended.status == 2 and "layers keep" in ended.stderr
    assert "`materialize --allow-nonuniform`" in ended.stderr


def test_python_does_the_same(shell: Shell, view: Path) -> None:
    with chdir(shell.folder):
        report = shardsurgeon.push("V-view", "me/small", disk_budget="1MB")
        assert report.files == len(digests(published(shell, "me/small"))) - 1  # .gitattributes
        with pytest.raises(UsageError, match=r"disk_budget: 5\.0 kB"):
            shardsurgeon.push("V-view", "me/small", disk_budget="5kB")
