"""HF_HUB_OFFLINE=1: the newest complete snapshot of the local cache, or one clear line."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from huggingface_hub import constants, hf_hub_download, snapshot_download

from shardsurgeon.checkpoint.checkpoint import open_checkpoint
from shardsurgeon.cli.main import main
from shardsurgeon.errors import CheckpointError, UsageError
from shardsurgeon.storage.local import LocalSource
from shardsurgeon.storage.open import open_source
from tests.support.hub.models import fixture_folder
from tests.support.hub.server import LocalHub

FOLDER = fixture_folder("kimi_linear")
SHARD = "model-00002-of-00004.safetensors"


@pytest.fixture
def tiny(online: LocalHub) -> LocalHub:
    online.add_model("org/tiny", FOLDER)
    return online


def go_offline(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(constants, "HF_HUB_OFFLINE", True)


def downloaded(revision: str | None = None, when: int = 0) -> Path:
    """A complete snapshot, dated so many seconds after the epoch."""
    folder = Path(snapshot_download("org/tiny", revision=revision))
    os.utime(folder, (when, when))
    return folder


def test_a_snapshot_that_was_downloaded_is_opened_without_a_request(
    tiny: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = downloaded()
    go_offline(monkeypatch)
    tiny.reset_counts()
    source = open_source("org/tiny")
    assert isinstance(source, LocalSource)
    assert (source.name, source.revision) == ("tiny", snapshot.name)
    assert open_checkpoint("hf://org/tiny").num_tensors == 223
    assert not tiny.requests


def test_main_comes_before_newer_snapshots_of_other_revisions(
    tiny: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    main_s = downloaded(when=1)
    tiny.branch("org/tiny", "v2")
    tiny.commit("org/tiny", {"README.md": b"second"}, "v2")
    second = downloaded("v2", when=2)
    go_offline(monkeypatch)
    assert open_source("org/tiny").revision == main_s.name
    assert open_source("org/tiny@v2").revision == second.name
    assert open_source(f"org/tiny@{second.name[:10]}").revision == second.name


def test_an_older_complete_snapshot_stands_in_for_an_incomplete_one(
    tiny: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = downloaded(when=1)
    tiny.commit("org/tiny", {"README.md": b"second"})
    hf_hub_download("org/tiny", "config.json")  # as loading only its config does
    go_offline(monkeypatch)
    assert open_source("org/tiny").revision == first.name


def test_files_in_other_formats_may_be_missing(
    online: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    online.add_model("org/tiny", FOLDER)
    online.commit("org/tiny", {"model.bin": b"weights", "original/w.pth": b"weights"})
    snapshot_download("org/tiny", ignore_patterns=["*.bin", "original/*"])
    go_offline(monkeypatch)
    assert open_checkpoint("org/tiny").num_tensors == 223


def only_config() -> None:
    hf_hub_download("org/tiny", "config.json")


def all_but_a_shard() -> None:
    snapshot_download("org/tiny", ignore_patterns=[SHARD])


def all_but_the_tokenizer() -> None:
    snapshot_download("org/tiny", ignore_patterns=["tokenizer*"])


def nothing() -> None:
    pass


@pytest.mark.parametrize(
    ("fetch", "says"),
    [
        (nothing, "not in the Hub's local cache, and HF_HUB_OFFLINE=1 forbids to fetch it; unset"),
        (only_config, r"; its snapshot [0-9a-f]{12} lacks model\.safetensors; unset"),
        (all_but_a_shard, f"lacks {SHARD}; unset HF_HUB_OFFLINE, or run `hf download org/tiny`"),
        (all_but_the_tokenizer, "lacks files that its listing names; unset"),
    ],
)
def test_without_a_complete_snapshot_it_is_said_what_is_missing(
    tiny: LocalHub,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    fetch,
    says: str,
) -> None:
    fetch()
    go_offline(monkeypatch)
    with pytest.raises(CheckpointError, match=says):
        open_source("hf://org/tiny")
    capsys.readouterr()
    assert main(["inspect", "org/tiny"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(
        "shardsurgeon: error: org/tiny: is not a folder here, and is not in the Hub"
    )
    assert said.count("\n") == 1


def test_a_revision_that_was_never_fetched_is_not_another_one(
    tiny: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    downloaded()
    go_offline(monkeypatch)
    for revision in ("v2", "0123456789"):
        with pytest.raises(CheckpointError, match="is not in the Hub's local cache"):
            open_source(f"hf://org/tiny@{revision}")
    with pytest.raises(UsageError, match="is no name of a revision"):
        open_source("hf://org/tiny@../../x")
