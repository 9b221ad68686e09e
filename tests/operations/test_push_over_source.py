"""A push never puts a pruned model in the place of a model that it was made of."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from shardsurgeon.checkpoint.provenance import PROVENANCE_NAME
from shardsurgeon.errors import UsageError
from shardsurgeon.storage.hub.repository import branch_name
from tests.operations.workbench import Shell, scores_of
from tests.support.hub.models import fixture_folder

KIMI = fixture_folder("kimi_k25")
PRUNE = ("apply", scores_of("kimi_k25"), "--ratio", "0.65")


@pytest.fixture
def out(shell: Shell, pruned: Path, tmp_path: Path) -> Path:
    """A prune whose record says that it was made of me/Original, which the Hub has."""
    shell.hub.add_model("me/Original", KIMI)
    return _made_of("me/Original", pruned, tmp_path / "out")


def _made_of(name: str, pruned: Path, folder: Path) -> Path:
    shutil.copytree(pruned, folder)
    record = json.loads((folder / PROVENANCE_NAME).read_bytes())
    record["source"]["name"] = record["steps"][0]["source"]["name"] = name
    (folder / PROVENANCE_NAME).write_text(json.dumps(record))
    return folder


def _untouched(shell: Shell, line: str, why: str = "is the repository that was pruned") -> None:
    assert why in line and "name another one, or a --revision of it" in line
    assert shell.hub.uploads == {}
    assert len(shell.hub.commits("me/Original")) == 1


@pytest.mark.parametrize(
    "spelled",
    [
        ("me/Original",),
        ("me/original",),
        ("ME/ORIGINAL",),
        ("Original",),
        ("original",),
        ("me/Original", "--revision", "main"),
        ("me/original", "--revision", "refs/heads/main"),
        ("me/Original", "--revision", "refs/heads/refs/heads/main"),
    ],
)
def test_every_spelling_of_the_source_is_refused(
    shell: Shell, out: Path, spelled: tuple[str, ...]
) -> None:
    _untouched(shell, shell.refused("push", str(out), *spelled))


@pytest.mark.parametrize("way", ["--push-to-hub", "--stream-push"])
@pytest.mark.parametrize("spelled", ["me/original", "me/Original"])
def test_apply_refuses_before_the_long_work(
    shell: Shell, out: Path, way: str, spelled: str
) -> None:
    words = (*PRUNE, "--model", "me/Original", "-o", "again", way, spelled)
    _untouched(shell, shell.refused(*words))
    _untouched(shell, shell.refused(*words, "--revision", "refs/heads/main"))
    assert list(shell.folder.iterdir()) == []


@pytest.mark.parametrize("way", ["push", "--push-to-hub", "--stream-push"])
def test_a_repository_that_holds_the_model_is_its_place_whatever_its_name(
    shell: Shell, out: Path, pruned: Path, way: str
) -> None:
    """The source was a folder, or the repository has been renamed, or is a copy."""
    words = ("push", str(pruned), "me/Original")
    if way != "push":
        words = (*PRUNE, "--model", str(KIMI), "-o", "again", way, "me/Original")
    _untouched(shell, shell.refused(*words), "me/Original: holds the model that was pruned")


@pytest.mark.parametrize("named", ["by name", "by content"])
@pytest.mark.parametrize("way", ["push", "--push-to-hub", "--stream-push"])
def test_every_model_of_a_chain_is_a_source(
    shell: Shell, out: Path, tmp_path: Path, way: str, named: str
) -> None:
    """A prune of a prune must not replace the first model."""
    if named == "by content":
        record = (out / PROVENANCE_NAME).read_text().replace("me/Original", "somewhere")
        (out / PROVENANCE_NAME).write_text(record)
    words: tuple[str, ...] = ("apply", scores_of("kimi_k25"), "--model", str(out), "--keep", "8")
    if way == "push":
        shell.good(*words, "-o", str(tmp_path / "twice"))
        words = ("push", str(tmp_path / "twice"), "me/original")
    else:
        words = (*words, "-o", "twice", way, "me/original")
    why = "is the repository that was" if named == "by name" else "holds the model that was pruned"
    _untouched(shell, shell.refused(*words), why)


def test_the_middle_of_a_chain_is_a_source(shell: Shell, out: Path, tmp_path: Path) -> None:
    shell.good("push", str(out), "me/Half", "--no-card")
    words = ("apply", scores_of("kimi_k25"), "--model", "me/Half", "--keep", "8")
    shell.good(*words, "-o", str(tmp_path / "twice"))
    line = shell.refused("push", str(tmp_path / "twice"), "me/half")
    assert "me/half: is the repository that was pruned" in line


@pytest.mark.slow
def test_another_branch_a_pull_request_and_another_repository_are_not_its_place(
    shell: Shell, out: Path
) -> None:
    shell.good("push", str(out), "me/original", "--revision", "Main")
    assert "me/Original" in shell.good("push", str(out), "me/original", "--create-pr")
    shell.good("push", str(out), "me/other")
    shell.good("push", str(out), "me/other")
    shell.good("push", str(out), "me/Other", "--revision", "refs/heads/main")
    assert len(shell.hub.commits("me/Original")) == 1
    assert shell.hub.store.repositories.keys() == {"me/Original", "me/other"}


@pytest.mark.parametrize(
    "revision",
    [
        *("", " ", "main ", " main", "ma in", "main\n", "main\N{NO-BREAK SPACE}", "main\0", "HEAD"),
        *("refs/heads/", "refs/heads/main ", "refs/tags/v1", "refs/convert/parquet", "refs/pr/x"),
        *("main~1", "main^", "main:x", "-main", "/main", "main/", "main.lock", "a..b", "@{1}"),
        *("@", "a//b"),
    ],
)
def test_what_no_branch_is_called_is_refused_before_the_hub_is_asked(
    shell: Shell, out: Path, revision: str
) -> None:
    line = shell.refused("push", str(out), "me/tiny", "--revision", revision)
    assert re.search(r"--revision: .*(empty word|no name of a revision|not the name of a b)", line)
    assert shell.hub.requests == []
    with pytest.raises(UsageError):
        branch_name(revision)


@pytest.mark.parametrize("name", ["main", "65pct", "half/of-it", "v1.0", "refs/pr/3", "é", "heads"])
def test_the_name_of_a_branch_stays_as_it_is(name: str) -> None:
    assert branch_name(name) == name
    assert branch_name("refs/heads/65pct") == "65pct"
    assert branch_name(None) == "main"
