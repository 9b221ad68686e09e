"""Models in a folder of a repository, and addresses of the Hub as a browser shows them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from huggingface_hub import constants, snapshot_download

from shardsurgeon.checkpoint.checkpoint import identity_of, open_checkpoint
from shardsurgeon.cli.main import main
from shardsurgeon.errors import CheckpointError, ConfigError, UsageError
from shardsurgeon.storage.open import address_of, hub_name, open_source
from tests.support.hub.models import fixture_folder
from tests.support.hub.server import LocalHub

FOLDER = fixture_folder("qwen3_moe")
TENSORS = 174


def files(below: str = "") -> dict[str, bytes]:
    found = (path for path in FOLDER.rglob("*") if path.is_file())
    return {f"{below}{path.relative_to(FOLDER).as_posix()}": path.read_bytes() for path in found}


@pytest.fixture
def many(online: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A repository with a model in a folder, and nothing but a card beside it; gives the commit."""
    monkeypatch.chdir(tmp_path)
    return online.add_model("org/many", {"README.md": b"# Many\n", **files("bf16/base/")})


@pytest.mark.parametrize(
    "words",
    [
        "hf://org/many/bf16/base",
        "hf://org/many/bf16/base/",
        "hf://org/many@main/bf16/base",
        "hf://models/org/many@main/bf16/base",
        "hf://org/many@{commit}/bf16/base",
        "hf://org/many/bf16/base/config.json",
        "https://huggingface.co/org/many/tree/main/bf16/base",
        "https://huggingface.co/org/many/blob/{commit}/bf16/base/model-00001-of-00003.safetensors",
        "huggingface.co/org/many/tree/main/bf16/base?x=1#files",
    ],
)
def test_a_folder_of_a_repository_is_a_model(many: str, words: str) -> None:
    source = open_source(words.replace("{commit}", many))
    assert (source.name, source.revision) == ("many-bf16-base", many)
    assert source.location == f"hf://org/many@{many[:12]}/bf16/base"
    assert {file.name for file in source.list()} == set(files())
    checkpoint = open_checkpoint(source)
    assert checkpoint.num_tensors == TENSORS
    assert identity_of(checkpoint).name == hub_name(source) == "org/many/bf16/base"
    assert identity_of(checkpoint).repository == "org/many"
    assert address_of(source) == f"hf://org/many@{many}/bf16/base"
    assert open_source(address_of(source)).location == source.location


@pytest.mark.parametrize(
    ("words", "revision"),
    [
        ("https://huggingface.co/org/top", "main"),
        ("http://hf.co/org/top/", "main"),
        ("huggingface.co/org/top", "main"),
        ("https://huggingface.co/org/top/tree/main", "main"),
        ("https://huggingface.co/org/top/blob/main/README.md", "main"),
        ("https://huggingface.co/org/top/tree/refs%2Fpr%2F1", "refs/pr/1"),
        ("hf://org/top@refs/pr/1", "refs/pr/1"),
        ("hf://org/top@feature%2Fx", "feature/x"),
    ],
)
def test_a_page_of_the_hub_is_the_model_that_it_shows(
    online: LocalHub, words: str, revision: str
) -> None:
    commit = online.add_model("org/top", {"config.json": b"{}", "README.md": b"x"})
    if revision != "main":
        online.branch("org/top", revision)
        online.commit("org/top", {"README.md": b"y"})
    source = open_source(words)
    assert (source.name, source.revision) == ("top", commit)
    assert "config.json" in {file.name for file in source.list()}


def test_what_is_no_folder_of_it_is_refused(many: str) -> None:
    with pytest.raises(CheckpointError, match=r"/int4: there is no such folder in the repository"):
        open_source("hf://org/many/int4")
    for folder in ("../x", "a//b", "a/../b"):
        with pytest.raises(UsageError, match="is no folder of a repository"):
            open_source(f"hf://org/many/{folder}")
    with pytest.raises(UsageError, match="is not a model on the Hub"):
        open_source("hf://datasets/org/many/x")


def test_a_model_that_lies_in_a_folder_is_pointed_out(many: str, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"holds no config.json but in 1 folder; did you mean"
    ) as e:
        open_checkpoint("org/many")
    assert e.value.remedy == f"did you mean hf://org/many@{many}/bf16/base?"
    (tmp_path / "local" / "deep").mkdir(parents=True)
    (tmp_path / "local" / "deep" / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"did you mean local/deep\?"):
        open_checkpoint("local")


def test_prune_and_proof_of_a_model_in_a_folder(
    many: str, online: LocalHub, capsys: pytest.CaptureFixture[str]
) -> None:
    model = "hf://org/many/bf16/base"
    scores = str(FOLDER / "scores.pt")
    assert main(["apply", scores, "--model", model, "--keep", "8"]) == 0
    out = "many-bf16-base-REAP-8e"
    shown = capsys.readouterr().out
    assert f"shardsurgeon verify hf://org/many@{many}/bf16/base " in shown
    local = ["apply", scores, "--model", str(FOLDER), "--keep", "8", "-o", "local"]
    assert main(local) == 0
    ours, theirs = (
        {p.name: p.read_bytes() for p in Path(x).glob("*") if p.is_file()} for x in (out, "local")
    )
    assert ours == theirs
    record = json.loads(Path(out, "calibration", "reap_pruning_metadata.json").read_text())
    digest = identity_of(open_checkpoint(FOLDER)).config_sha256
    source = {"name": "org/many/bf16/base", "revision": many, "config_sha256": digest}
    assert record["source"] == source
    assert main(["verify", model, out]) == 0
    capsys.readouterr()
    # The card names the repository that it came from, and that one is not written over.
    assert main(["push", out, "org/many"]) == 2
    assert "is the repository that was pruned" in capsys.readouterr().err
    assert main(["push", out, "me/small"]) == 0
    card = online.files("me/small")["README.md"].decode()
    assert "base_model:\n- org/many\n" in card
    assert f"--model hf://org/many@{many}/bf16/base" in card


def test_offline_the_folder_comes_from_the_cache(
    many: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    snapshot_download("org/many")
    online = open_source("hf://org/many/bf16/base")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    source = open_source("hf://org/many/bf16/base")
    assert not source.is_remote
    assert (source.name, source.revision) == (online.name, online.revision)
    assert hub_name(source) == hub_name(online) == "org/many/bf16/base"
    assert open_checkpoint(source).num_tensors == TENSORS
    # Its blobs are those of the whole repository.
    assert not source.odd
    with pytest.raises(CheckpointError, match=r"lacks config\.json"):
        open_source("hf://org/many/other")
