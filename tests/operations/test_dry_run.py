"""A dry run ends as the run would: with the same line and the same status, and nothing is touched.

Every case is set up, run dry, and run: the second answer is what the first is held against.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from shardsurgeon.execution import run as execution
from shardsurgeon.execution.workdir import lock_workdir
from shardsurgeon.operations import prune
from shardsurgeon.storage.system import native
from tests.operations.workbench import Ended, Shell, digests, scores_of
from tests.support.hub.models import fixture_folder

FAMILY = "kimi_k25"
MODEL, SCORES = str(fixture_folder(FAMILY)), scores_of(FAMILY)
APPLY = ("apply", SCORES, "--model", MODEL, "--ratio", "0.5", "-o", "out")
TO_HUB = ("--push-to-hub", "me/small")
STREAM = ("--stream-push", "me/small")


def nothing(shell: Shell) -> None:
    pass


def out_that_holds_something_else(shell: Shell) -> None:
    (shell.folder / "out").mkdir()
    (shell.folder / "out" / "notes").write_text("mine")


def out_that_is_another_prune(shell: Shell) -> None:
    assert shell.here(*APPLY[:-3], "0.25", "-o", "out").status == 0


def partial_of_another_command(shell: Shell) -> None:
    stopped = ["apply", SCORES, "--model", MODEL, "--ratio", "0.25", "-o", "out"]
    stop_after_a_shard(shell, stopped)


def partial_of_a_stranger(shell: Shell) -> None:
    (shell.folder / "out.partial").mkdir()
    (shell.folder / "out.partial" / "notes").write_text("mine")


def partial_with_a_link(shell: Shell) -> None:
    stop_after_a_shard(shell, [*APPLY])
    (shell.folder / "out.partial" / "files" / "x").symlink_to("/etc")


def parent_that_is_a_file(shell: Shell) -> None:
    (shell.folder / "out").write_text("mine")


def public_repository(shell: Shell) -> None:
    shell.hub.add_model("me/small", {"x": b"x"})


def repository_of_others(shell: Shell) -> None:
    shell.hub.add_model("org/theirs", {"x": b"x"})


def same_model_there(shell: Shell) -> None:
    shell.hub.add_model("me/small", Path(MODEL))


def stop_after_a_shard(shell: Shell, words: list[str]) -> None:
    """Leave an OUT.partial with a finished shard in it."""
    with pytest.MonkeyPatch.context() as patch:

        def stop(*given: object) -> None:
            raise KeyboardInterrupt

        patch.setattr(execution, "write_small_files", stop)
        assert shell.here(*words).status == 130
    assert (shell.folder / "out.partial").is_dir()


CASES: dict[str, tuple[Callable[[Shell], None], tuple[str, ...], str]] = {
    "OUT is taken": (out_that_holds_something_else, APPLY, "exists and holds something else"),
    "OUT is another prune": (out_that_is_another_prune, APPLY, "exists and holds something else"),
    "another command's": (partial_of_another_command, APPLY, "this is a different command"),
    "a stranger's": (partial_of_a_stranger, APPLY, "was not made by shardsurgeon"),
    "a link inside": (partial_with_a_link, APPLY, "is a link"),
    "a file above": (parent_that_is_a_file, (*APPLY[:-1], "out/deep"), "inside a file"),
    "a file far above": (parent_that_is_a_file, (*APPLY[:-1], "out/a/b/c"), "inside a file"),
    "a name too long": (nothing, (*APPLY[:-1], "x" * 300), "cannot be written"),
    "a card that is none": (nothing, (*APPLY, *TO_HUB, "--card", SCORES), "as a card"),
    "a small budget": (nothing, (*APPLY, *STREAM, "--disk-budget", "1kB"), "is less than"),
    "others' repository": (
        repository_of_others,
        (*APPLY, "--push-to-hub", "org/theirs"),
        "the token may not write there",
    ),
    "public": (public_repository, (*APPLY, *TO_HUB, "--private"), "is there already, and public"),
    "the source": (same_model_there, (*APPLY, *STREAM), "holds the model that was pruned"),
    "no name": (nothing, (*APPLY, "--push-to-hub", "a/b/c"), "is not a repository id"),
    "no branch": (
        public_repository,
        (*APPLY, *TO_HUB, "--revision", "v2", "--create-pr"),
        "has no such revision",
    ),
    "other layers": (
        nothing,
        (*APPLY, "--allocate", "global"),
        "--allow-nonuniform: is needed",
    ),
}


def everything(shell: Shell) -> tuple[object, ...]:
    repositories = shell.hub.store.repositories
    there = {name: dict(repository.branches) for name, repository in repositories.items()}
    return digests(shell.folder), sorted(map(str, shell.folder.rglob("*"))), there


def both(shell: Shell, *words: str) -> tuple[Ended, Ended]:
    """How the dry run ended, which left no trace, and then the run."""
    before = everything(shell)
    dry = shell.here(*words, "--dry-run")
    assert everything(shell) == before
    assert not shell.hub.uploads
    return dry, shell.here(*words)


@pytest.mark.skipif(sys.platform == "win32", reason="links, and names as POSIX has them")
@pytest.mark.parametrize("name", CASES)
def test_what_stops_the_run_stops_the_dry_run(name: str, shell: Shell) -> None:
    prepare, words, told = CASES[name]
    prepare(shell)
    dry, done = both(shell, *words)
    assert told in done.stderr
    assert done.status == (1 if name == "a name too long" else 2)
    assert (dry.status, dry.stderr) == (done.status, done.stderr)
    assert "nothing was written; the run would stop at once." in dry.stdout


@pytest.mark.parametrize("token", ["read", "none", "broken"])
def test_the_right_to_push_is_asked_for(
    token: str, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = {"read": shell.hub.read_token, "none": "", "broken": "hf_wrong"}
    monkeypatch.setenv("HF_TOKEN", words[token])
    for push in (TO_HUB, STREAM):
        dry, done = both(shell, *APPLY, *push)
        assert (dry.status, dry.stderr) == (done.status, done.stderr)
        assert dry.status == 2


def test_a_name_of_others_is_refused_without_making_it(shell: Shell) -> None:
    dry, done = both(shell, *APPLY, "--push-to-hub", "org/new")
    assert dry.status == done.status == 2
    assert "org/new: is not there, and me cannot make it" in dry.stderr


@contextmanager
def disk_of(nbytes: int) -> Iterator[None]:
    system = replace(native(), free_space=lambda folder: nbytes)
    with pytest.MonkeyPatch.context() as patch:
        for module in (execution, prune):
            patch.setattr(module, "default_system", lambda: system)
        yield


def test_too_little_space_is_said_in_both_numbers(shell: Shell) -> None:
    with disk_of(100_000):
        dry, done = both(shell, *APPLY)
        planned = shell.here("plan", *APPLY[1:-2])
    assert (dry.status, dry.stderr) == (done.status, done.stderr)
    assert dry.status == 1
    assert "out: the disk is too small: " in dry.stderr
    for text in (dry.stdout, planned.stdout):
        line = next(line for line in text.splitlines() if "free space" in line)
        assert line.endswith("kB needed, 100.0 kB free: not enough")
    assert planned.status == 0
    with disk_of(1_000_000):
        assert "1.0 MB free\n" in shell.here(*APPLY, "--dry-run").stdout


def test_what_is_done_already_needs_no_disk(shell: Shell) -> None:
    stop_after_a_shard(shell, [*APPLY])
    with disk_of(1_000_000):  # A real one has other users.
        whole = json.loads(shell.here(*APPLY, "--dry-run", "--restart", "--json").stdout)["plan"]
        left = json.loads(shell.here(*APPLY, "--dry-run", "--json").stdout)["plan"]
    assert left["space_needed"] < whole["space_needed"] / 5
    # What --restart throws away counts as free.
    assert whole["space_free"] > left["space_free"]
    with disk_of(left["space_needed"]):
        dry, done = both(shell, *APPLY)
    assert (dry.status, done.status) == (0, 0)
    assert "0 B needed" in shell.here(*APPLY, "--dry-run").stdout


def test_a_run_at_work_is_noticed(shell: Shell) -> None:
    with lock_workdir(shell.folder / "out", native()):
        dry = shell.here(*APPLY, "--dry-run")
    assert dry.status == 2
    assert "is in use: another run writes there now" in dry.stderr


@pytest.mark.parametrize("visible", ["public", "private"])
@pytest.mark.parametrize("push", ["--push-to-hub", "--stream-push"])
def test_the_repository_and_who_sees_it_are_said(push: str, visible: str, shell: Shell) -> None:
    private = ("--private",) if visible == "private" else ()
    dry, done = both(shell, *APPLY, push, "small", *private)
    assert (dry.status, done.status) == (0, 0)
    assert f"  push to       me/small: a new repository, {visible}\n" in dry.stdout
    again = shell.here(*APPLY, "--dry-run", "--push-to-hub", "me/small", "--json")
    target = json.loads(again.stdout)["target"]
    assert target["private"] == (visible == "private")
    assert (target["repo_id"], target["created"]) == ("me/small", False)


def test_of_an_organization_nobody_knows_who_would_see_it(shell: Shell) -> None:
    dry = shell.here(*APPLY, "--dry-run", "--push-to-hub", "team/small", "--json")
    assert json.loads(dry.stdout)["target"]["private"] is None
    assert "team/small" not in shell.hub.store.repositories


def test_a_folder_that_cannot_be_written_to(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    # By the answer of the system: root, as whom tests may run, may write everywhere.
    here = str(shell.folder.resolve())
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != here and real(path, mode))
    dry = shell.here(*APPLY, "--dry-run")
    assert dry.status == 1
    assert "cannot be written (Permission denied)" in dry.stderr


def test_a_secret_in_the_model_is_found(shell: Shell, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(MODEL, model)
    (model / "README.md").write_text("token: hf_abcdefghijklmnopqrstuvwxyz012345\n")
    words = [str(model) if word == MODEL else word for word in APPLY]
    dry, done = both(shell, *words, *TO_HUB)
    assert (dry.status, dry.stderr) == (done.status, done.stderr)
    assert "looks like a Hugging Face token" in dry.stderr
