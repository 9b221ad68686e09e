"""Object stores by fsspec: its memory filesystem, one with a bad temper, and a real S3 server."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from shardsurgeon.checkpoint.checkpoint import open_checkpoint
from shardsurgeon.errors import CheckpointError, NetworkError, SourceReadError
from shardsurgeon.storage.object_store import StoreSource
from shardsurgeon.storage.retry import RetryPolicy
from tests.support.hub.models import fixture_folder

SHARD = "model-00002-of-00004.safetensors"
FOLDER = fixture_folder("kimi_linear")
WEIGHTS = (FOLDER / SHARD).read_bytes()
FILES = {p.relative_to(FOLDER).as_posix(): p for p in FOLDER.rglob("*") if p.is_file()}
QUICK = RetryPolicy(first_wait=0.001, longest_wait=0.002)


@pytest.fixture
def memory() -> Iterator[MemoryFileSystem]:
    store = fsspec.filesystem("memory")
    for name, path in FILES.items():
        store.pipe_file(f"/models/tiny/{name}", path.read_bytes())
    yield store
    store.rm("/models", recursive=True)


@pytest.mark.parametrize("url", ["memory://models/tiny", f"memory://models/tiny/{SHARD}"])
def test_a_folder_is_listed_and_read_by_ranges(memory: MemoryFileSystem, url: str) -> None:
    source = StoreSource(url)
    listed = {file.name: file.nbytes for file in source.list()}
    assert listed == {name: FILES[name].stat().st_size for name in sorted(FILES)}
    assert (source.name, source.location) == ("tiny", "memory://models/tiny")
    assert (source.revision, source.is_remote, source.local_path(SHARD)) == (None, True, None)
    assert source.read(SHARD, 1000, 2000) == WEIGHTS[1000:2000]
    assert b"".join(source.stream(SHARD, 0, len(WEIGHTS))) == WEIGHTS
    assert source.read(SHARD, 5, 5) == b""
    assert open_checkpoint(url).num_tensors == 223


def test_the_stamp_follows_the_content(memory: MemoryFileSystem) -> None:
    source = StoreSource("memory://models/tiny")
    before = source.list()
    assert source.list() == before
    memory.pipe_file("/models/tiny/config.json", FILES["config.json"].read_bytes())
    changed = {new.name for old, new in zip(before, source.list(), strict=True) if old != new}
    assert changed == {"config.json"}


def test_leftovers_of_tools_are_not_listed(memory: MemoryFileSystem) -> None:
    memory.pipe_file("/models/tiny/.git/HEAD", b"x")
    assert len(StoreSource("memory://models/tiny").list()) == len(FILES)


def test_what_is_missing_or_too_short_is_said_by_name(memory: MemoryFileSystem) -> None:
    source = StoreSource("memory://models/tiny", QUICK)
    with pytest.raises(SourceReadError, match=r"missing\.json: there is no such file"):
        source.read("missing.json", 0, 1)
    with pytest.raises(SourceReadError, match=f"ends at byte {len(WEIGHTS):,}, byte"):
        source.read(SHARD, 10, len(WEIGHTS) + 1)
    with pytest.raises(CheckpointError, match="leads out of the folder"):
        source.read("../secret", 0, 1)
    with pytest.raises(CheckpointError, match="there is no such folder, or it is empty"):
        StoreSource("memory://models/nothing").list()


class Moody(MemoryFileSystem):  # type: ignore[misc]
    """Answers as it is told, and then as it should."""

    protocol = "moody"
    cachable = False
    moods: list[Exception | int] = []  # noqa: RUF012

    def cat_file(self, path: str, start: int = 0, end: int = 0, **words: Any) -> bytes:
        mood = self.moods.pop(0) if self.moods else end - start
        if isinstance(mood, Exception):
            raise mood
        return bytes(super().cat_file(_in_memory(path), start=start, end=start + mood))

    def info(self, path: str, **words: Any) -> dict[str, Any]:
        return dict(super().info(_in_memory(path)))


def _in_memory(path: str) -> str:
    return path.replace("moody:/", "")


class ForeignError(Exception):
    """What a store's own library raises."""


class NoCredentialsError(Exception):
    """So do several of them call it."""


@pytest.fixture
def moody(memory: MemoryFileSystem) -> type[Moody]:
    fsspec.register_implementation("moody", Moody, clobber=True)
    Moody.moods = []
    return Moody


def test_a_bad_moment_of_a_store_is_survived(moody: type[Moody]) -> None:
    moody.moods = [OSError(errno.ECONNRESET, "reset"), 10_000, ForeignError("x"), TimeoutError(), 7]
    source = StoreSource("moody://models/tiny", QUICK)
    assert b"".join(source.stream(SHARD, 0, len(WEIGHTS))) == WEIGHTS
    assert moody.moods == []


def test_a_store_that_never_answers_is_given_up_without_its_secrets(moody: type[Moody]) -> None:
    said = "GET https://user:pass@store/x?X-Amz-Signature=secret timed out"
    moody.moods = [ForeignError(said)] * 20
    with pytest.raises(NetworkError, match=r"gave up after 10 tries in a row \(GET https") as error:
        StoreSource("moody://models/tiny", QUICK).read(SHARD, 0, 10)
    assert "secret" not in str(error.value)
    assert "pass" not in str(error.value)


@pytest.mark.parametrize("mood", [PermissionError("Access Denied"), NoCredentialsError("no key")])
def test_a_store_that_refuses_is_not_asked_again(moody: type[Moody], mood: Exception) -> None:
    moody.moods = [mood, ForeignError("never reached")]
    with pytest.raises(CheckpointError, match=r"the store refuses access \(.*check the login"):
        StoreSource("moody://models/tiny", QUICK).read(SHARD, 0, 10)
    assert len(moody.moods) == 1


def test_a_bug_is_no_network_error(moody: type[Moody], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of ours: a filesystem that is called as it cannot be called."""
    monkeypatch.setattr(moody, "cat_file", lambda self: b"")
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        StoreSource("moody://models/tiny", QUICK).read(SHARD, 0, 10)
