"""Which source a user's words mean."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import fsspec
import pytest

import shardsurgeon
from shardsurgeon.errors import CheckpointError, UsageError
from shardsurgeon.storage.hub.source import HubSource
from shardsurgeon.storage.local import LocalSource
from shardsurgeon.storage.object_store import StoreSource
from shardsurgeon.storage.open import open_source
from shardsurgeon.storage.source import MemorySource
from shardsurgeon.storage.web import WebSource
from tests.support.hub.server import LocalHub


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("org/tiny", "hf:/org", "plain"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_bytes(b"{}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("words", ["org/tiny", "./org/tiny", "plain", ".", "org/tiny/"])
def test_a_path_that_exists_is_that_folder(here: Path, words: str) -> None:
    source = open_source(words)
    assert isinstance(source, LocalSource)
    assert source.local_path("x").parent == (here / words).resolve()


def test_a_path_object_is_never_a_repository(here: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no such folder"):
        open_source(Path("org/other"))


def test_a_file_url_is_a_folder(here: Path) -> None:
    assert isinstance(open_source((here / "plain").as_uri()), LocalSource)


@pytest.mark.parametrize(
    "words",
    ["nowhere", "./org/other", "../a/b", "a/b/c", "/no/where", "void/", "C:\\models\\x", ""],
)
def test_what_cannot_be_a_repository_is_a_missing_folder(here: Path, words: str) -> None:
    if words:
        with pytest.raises(CheckpointError, match="there is no such folder"):
            open_source(words)
    else:
        assert isinstance(open_source(words), LocalSource)


@pytest.mark.parametrize(
    ("words", "revision"),
    [
        ("org/model", "main"),
        ("hf://org/model", "main"),
        ("hf://models/org/model", "main"),
        ("org/model@v1", "v1"),
        ("hf://org/model@v1", "v1"),
        ("hf://org/model@refs/pr/1", "refs/pr/1"),
        ("hf://org/model@refs%2Fpr%2F1", "refs/pr/1"),
        ("org/model@refs/pr/1", "refs/pr/1"),
    ],
)
def test_the_name_of_a_repository_is_a_model_on_the_hub(
    online: LocalHub, here: Path, words: str, revision: str
) -> None:
    commit = online.add_model("org/model", {"config.json": b"{}"})
    if revision != "main":
        online.branch("org/model", revision)
        online.commit("org/model", {"config.json": b"[]"})
    source = open_source(words)
    assert isinstance(source, HubSource)
    assert (source.name, source.revision) == ("model", commit)


def test_a_source_is_itself() -> None:
    source = MemorySource({})
    assert open_source(source) is source


def test_a_scheme_is_a_store_and_a_web_address_a_web_server(online: LocalHub) -> None:
    online.add_model("org/model", {"config.json": b"{}"})
    fsspec.filesystem("memory").pipe_file("/models/tiny/config.json", b"{}")
    assert isinstance(open_source("memory://models/tiny"), StoreSource)
    assert isinstance(open_source(f"{online.endpoint}/org/model/resolve/main"), WebSource)


def test_an_unknown_scheme_is_refused() -> None:
    with pytest.raises(UsageError, match=r"nosuch:// is not a known kind of address; give a"):
        open_source("nosuch://bucket/model")


def test_a_store_whose_package_is_missing_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)  # as if it were not installed
    with pytest.raises(UsageError, match=r"no package for gs:// is installed; .*'\.\[gs\]'"):
        open_source("gs://bucket/model")


def test_a_local_folder_is_opened_without_a_network_library(here: Path) -> None:
    code = (
        "import sys, shardsurgeon.checkpoint.checkpoint\n"
        "from shardsurgeon.storage.open import open_source\n"
        "open_source(sys.argv[1]).list()\n"
        "heavy = {'huggingface_hub', 'fsspec', 'httpx', 'httpx2'} & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
    )
    root = Path(shardsurgeon.__file__).parents[1]
    subprocess.run([sys.executable, "-c", code, str(here / "plain")], check=True, cwd=root)
