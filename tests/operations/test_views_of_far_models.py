"""Views of models that are not in a folder: of the Hub, of its cache, and of what none can name."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants, snapshot_download

import shardsurgeon
from shardsurgeon.errors import CheckpointError, UsageError
from shardsurgeon.storage.formats.view import VIEW_NAME
from tests.operations.workbench import digests, scores_of
from tests.support.hub.models import fixture_folder
from tests.support.hub.server import LocalHub

FAMILY = "deepseek_v3"


@pytest.fixture
def filled(online: LocalHub) -> LocalHub:
    online.add_model("org/Tiny", fixture_folder(FAMILY))
    return online


def viewed(model: str | Path, folder: Path) -> Path:
    plan = shardsurgeon.plan(model, scores_of(FAMILY), ratio=0.5)
    shardsurgeon.apply(plan, folder, view=True)
    return folder


def manifest(view: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in gzip.open(view / VIEW_NAME)]


def test_a_view_of_a_repository_is_that_of_the_local_copy_but_for_place_and_stamps(
    filled: LocalHub, tmp_path: Path
) -> None:
    far = viewed("org/Tiny", tmp_path / "far")
    # The same model under the same name: the commit in the local cache.
    near = viewed(snapshot_download("org/Tiny"), tmp_path / "near")
    left, right = digests(far), digests(near)
    assert {**left, VIEW_NAME: ""} == {**right, VIEW_NAME: ""}
    (head, *shards), (other, *others) = manifest(far), manifest(near)
    assert shards == others
    commit = filled.store.repositories["org/Tiny"].branches["main"]
    assert head["source"] == f"hf://org/Tiny@{commit}"
    assert Path(other["source"]).name == commit and Path(other["source"]).is_absolute()
    sizes = [[name, nbytes] for name, nbytes, _ in head["files"]]
    assert sizes == [[name, nbytes] for name, nbytes, _ in other["files"]]
    assert all(re.fullmatch("[0-9a-f]{64}", stamp) for _, _, stamp in head["files"])
    named = ("files", "source")
    assert {k: v for k, v in head.items() if k not in named} == {
        k: v for k, v in other.items() if k not in named
    }


def test_it_materialises_to_what_apply_writes_and_verifies(
    filled: LocalHub, tmp_path: Path
) -> None:
    view = viewed("org/Tiny", tmp_path / "v")
    # A branch that goes on is another model; the view is of its commit.
    filled.commit("org/Tiny", {"config.json": b"{}"})
    report = shardsurgeon.materialize(view, tmp_path / "made")
    at = manifest(view)[0]["source"]
    shardsurgeon.apply(shardsurgeon.plan(at, scores_of(FAMILY), ratio=0.5), tmp_path / "direct")
    assert digests(tmp_path / "made") == digests(tmp_path / "direct")
    assert report.bytes_downloaded > 0 and f"hf://{report.source}" == at
    assert shardsurgeon.verify(report.source, view).verdict == "identical"
    assert shardsurgeon.inspect(view).view.source == report.source  # type: ignore[union-attr]


def test_without_a_network_the_cache_has_the_bytes(
    filled: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    view = viewed("org/Tiny", tmp_path / "v")
    shardsurgeon.materialize(view, tmp_path / "direct")
    snapshot_download("org/Tiny")
    filled.reset_counts()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    report = shardsurgeon.materialize(view, tmp_path / "made")
    assert digests(tmp_path / "made") == digests(tmp_path / "direct")
    assert report.bytes_downloaded == 0 and not filled.requests
    assert report.verification is not None and report.verification.holds


def test_without_a_network_and_a_cache_it_is_refused_with_one_line(
    filled: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    view = viewed("org/Tiny", tmp_path / "v")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError) as refused:
        shardsurgeon.materialize(view, tmp_path / "made")
    assert "org/Tiny" in str(refused.value) and "\n" not in str(refused.value)


def test_another_file_under_the_name_in_the_cache_is_not_taken(
    filled: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    view = viewed("org/Tiny", tmp_path / "v")
    snapshot = Path(snapshot_download("org/Tiny"))
    shard = sorted(snapshot.glob("*.safetensors"))[0]
    raw = shard.read_bytes()
    shard.unlink()
    shard.write_bytes(raw)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=re.escape(shard.name)):
        shardsurgeon.materialize(view, tmp_path / "made")


def test_a_model_in_a_folder_of_a_repository(online: LocalHub, tmp_path: Path) -> None:
    folder = fixture_folder(FAMILY)
    files = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
    online.add_model(
        "org/Several", {f"models/tiny/{name}": path.read_bytes() for name, path in files.items()}
    )
    view = viewed("hf://org/Several/models/tiny", tmp_path / "v")
    commit = online.store.repositories["org/Several"].branches["main"]
    place = f"hf://org/Several@{commit}/models/tiny"
    assert manifest(view)[0]["source"] == place
    report = shardsurgeon.materialize(view, tmp_path / "made")
    assert report.source == place
    plan = shardsurgeon.plan(place, scores_of(FAMILY), ratio=0.5)
    shardsurgeon.apply(plan, tmp_path / "direct")
    assert digests(tmp_path / "made") == digests(tmp_path / "direct")


def test_a_view_of_a_view_names_the_commit(filled: LocalHub, tmp_path: Path) -> None:
    view = viewed("org/Tiny", tmp_path / "v")
    plan = shardsurgeon.plan(view, scores_of(FAMILY), keep=8)
    shardsurgeon.apply(plan, tmp_path / "smaller", view=True)
    assert manifest(tmp_path / "smaller")[0]["source"] == manifest(view)[0]["source"]
    shardsurgeon.materialize(tmp_path / "smaller", tmp_path / "made")
    shardsurgeon.apply(plan, tmp_path / "direct")
    assert digests(tmp_path / "made") == digests(tmp_path / "direct")


@pytest.mark.parametrize("dry_run", [[], ["--dry-run"]])
def test_a_place_that_no_view_can_name_is_refused_with_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], dry_run: list[str]
) -> None:
    import fsspec

    from shardsurgeon.cli.main import main

    memory = fsspec.filesystem("memory")
    for path in fixture_folder(FAMILY).rglob("*"):
        if path.is_file():
            memory.pipe(f"/views/{path.relative_to(fixture_folder(FAMILY))}", path.read_bytes())
    words = ["apply", scores_of(FAMILY), "-m", "memory://views", "--ratio", "0.5"]
    assert main([*words, "--view", "-o", str(tmp_path / "v"), *dry_run]) == 2
    line = capsys.readouterr().err
    assert line == (
        "shardsurgeon: error: --view: cannot name memory://views: it reads from a folder on this "
        "machine and a repository of the Hub; fetch the model first, or leave --view out\n"
    )
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UsageError, match="view: cannot name"):
        plan = shardsurgeon.plan("memory://views", scores_of(FAMILY), ratio=0.5)
        shardsurgeon.apply(plan, tmp_path / "v", view=True)
