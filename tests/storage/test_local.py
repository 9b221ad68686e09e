"""A local folder as a source: what it lists, what it reads, what it refuses."""

import os
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from shardsurgeon.errors import CheckpointError, SourceChangedError, SourceReadError
from shardsurgeon.storage.local import LocalSource
from shardsurgeon.storage.source import (
    NOWHERE,
    OUTSIDE,
    MemorySource,
    Source,
    require_plain,
    require_unchanged,
)

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "Tiny-MoE"
    (folder / "sub").mkdir(parents=True)
    (folder / "config.json").write_bytes(b"{}")
    (folder / "sub" / "a.txt").write_bytes(b"0123456789")
    return folder


def names(source: Source) -> list[str]:
    return [file.name for file in source.list()]


def test_files_are_listed_sorted_with_forward_slashes_and_sizes(model: Path) -> None:
    files = LocalSource(model).list()
    assert [(file.name, file.nbytes) for file in files] == [("config.json", 2), ("sub/a.txt", 10)]


def test_leftovers_of_tools_are_not_listed(model: Path) -> None:
    for folder in (".git", ".cache", "__pycache__", "sub/.huggingface"):
        (model / folder).mkdir()
        (model / folder / "x").write_bytes(b"x")
    assert names(LocalSource(model)) == ["config.json", "sub/a.txt"]


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX files")
def test_what_is_no_file_is_named_and_not_listed(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(model / "pipe")
    (model / "sub" / "null").symlink_to("/dev/null")
    (model / "loop").symlink_to("loop")
    monkeypatch.chdir(model)  # socket paths must be short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        source = LocalSource(model)
        assert names(source) == ["config.json", "sub/a.txt"]
    kinds = {"pipe": "FIFO", "socket": "socket", "sub/null": "device", "loop": NOWHERE}
    assert source.odd == kinds
    with pytest.raises(CheckpointError, match=r"Tiny-MoE/pipe: is a FIFO; put the file itself"):
        require_plain(source, ["config.json", "missing", "pipe"])
    with pytest.raises(SourceReadError, match=r"pipe: cannot be read \(it is a pipe or"):
        source.read("pipe", 0, 1)


def test_a_file_that_vanishes_while_it_is_listed_is_not_listed(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = LocalSource(model)
    before = source.list()
    walk = os.walk

    def with_a_ghost(*words: Any, **more: Any) -> Iterator[tuple[str, list[str], list[str]]]:
        for folder, folders, files in walk(*words, **more):
            yield folder, folders, [*files, "download.tmp"]

    monkeypatch.setattr(os, "walk", with_a_ghost)
    assert source.list() == before


def test_linked_files_are_files_and_linked_folders_are_left_alone(
    model: Path, tmp_path: Path
) -> None:
    (tmp_path / "blob").write_bytes(b"abc")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x").write_bytes(b"x")
    (model / "linked.json").symlink_to(tmp_path / "blob")
    (model / "linked_folder").symlink_to(tmp_path / "elsewhere")
    source = LocalSource(model)
    assert names(source) == ["config.json", "linked.json", "sub/a.txt"]
    assert source.list()[1].nbytes == 3
    assert source.read("linked.json", 1, 3) == b"bc"
    assert source.odd["linked_folder"] == "linked folder"


def test_a_link_to_a_missing_file_is_an_incomplete_download(model: Path) -> None:
    (model / "model.safetensors").symlink_to(model / "gone")
    source = LocalSource(model)
    assert names(source) == ["config.json", "sub/a.txt"]
    with pytest.raises(CheckpointError, match=r"model\.safetensors: .*fetch it again"):
        require_plain(source, ["model.safetensors"], links=True)


def test_links_that_lead_out_of_the_folder_are_told_apart(model: Path, tmp_path: Path) -> None:
    (tmp_path / "token").write_bytes(b"secret")
    (model / ".git").mkdir()
    (model / ".git" / "token").write_bytes(b"secret")
    inside: dict[str, str | Path] = {
        "in": "config.json",
        "sub/up": "../config.json",
        "far": model.resolve() / "in",
    }
    outside: dict[str, str | Path] = {
        "out": "../token",
        "sub/out": tmp_path / "token",
        "twice": "out",
        "round": "sub/../../Tiny-MoE/../token",
        "hidden": ".git/token",
    }
    for name, end in {**inside, **outside}.items():
        (model / name).symlink_to(end)
    source, follower = LocalSource(model), LocalSource(model, follow_links=True)
    assert names(source) == names(follower)
    assert source.odd == dict.fromkeys(outside, OUTSIDE)
    assert follower.odd == {}
    require_plain(source, outside, links=True)
    with pytest.raises(CheckpointError, match=r"out: is a link out of .*--follow-links"):
        require_plain(source, ["in", "out"])


def test_links_into_the_hubs_blobs_are_files_of_the_model(tmp_path: Path) -> None:
    store = tmp_path / "models--org--tiny"
    snapshot, blob = store / "snapshots" / COMMIT, "0a" * 32
    (snapshot / "sub").mkdir(parents=True)
    disk = tmp_path / "disk"
    disk.mkdir()
    (store / "blobs").symlink_to(disk)  # people move the cache's bytes to a larger disk
    (disk / blob).write_bytes(b"x")
    (disk / "token").write_bytes(b"x")
    (snapshot / "sub" / "a").symlink_to(f"../../../blobs/{blob}")
    (snapshot / "b").symlink_to("../../blobs/token")
    (snapshot / "c").symlink_to("../../refs")
    (store / "refs").write_text(COMMIT)
    source = LocalSource(snapshot)
    assert names(source) == ["b", "c", "sub/a"]
    assert source.odd == {"b": OUTSIDE, "c": OUTSIDE}
    # What `hf download --local-dir` once made.
    (tmp_path / "cache" / "models--org--tiny" / "blobs").mkdir(parents=True)
    real = tmp_path / "cache" / "models--org--tiny" / "blobs" / blob
    real.write_bytes(b"x")
    folder = tmp_path / "local-dir"
    folder.mkdir()
    (folder / "a").symlink_to(real)
    (folder / "b").symlink_to(disk / blob)
    source = LocalSource(folder)
    assert names(source) == ["a", "b"]
    assert source.odd == {"b": OUTSIDE}


def test_a_link_that_takes_a_listed_files_place_is_not_read(model: Path, tmp_path: Path) -> None:
    (tmp_path / "token").write_bytes(b"0123456789")
    source = LocalSource(model)
    planned = source.list()
    assert source.read("sub/a.txt", 0, 3) == b"012"
    (model / "sub" / "a.txt").rename(tmp_path / "aside")
    (model / "sub" / "a.txt").symlink_to(tmp_path / "token")
    stat = (tmp_path / "aside").stat()
    os.utime(tmp_path / "token", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    for _ in range(2):
        with pytest.raises(SourceChangedError, match=r"a\.txt: was replaced since it was listed"):
            source.read("sub/a.txt", 0, 3)
        source.list()  # which must not make the new file the listed one
    with pytest.raises(SourceChangedError, match=r"a\.txt: was written to or replaced"):
        require_unchanged(source, planned)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no time of the last change")
def test_a_write_whose_time_was_put_back_is_a_change(model: Path) -> None:
    source = LocalSource(model)
    planned = source.list()
    require_unchanged(source, planned)
    path = model / "sub" / "a.txt"
    before = path.stat()
    with path.open("r+b") as file:
        file.write(b"XX")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert source.list() == planned
    with pytest.raises(SourceChangedError, match=r"a\.txt: was touched since the run was planned"):
        require_unchanged(source, planned)
    # Another run cannot tell it from a change of mode, which is none.
    require_unchanged(LocalSource(model), planned)


def test_a_folder_is_named_by_itself_even_as_a_dot_or_through_a_link(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to(model)
    monkeypatch.chdir(model)
    assert LocalSource(".").name == LocalSource(tmp_path / "link").name == "Tiny-MoE"
    assert LocalSource(".").location == str(model.resolve())
    assert LocalSource(model).revision is None


def test_a_relative_source_stays_where_it_was_opened(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(model)
    source = LocalSource(".")
    monkeypatch.chdir(tmp_path)
    assert source.read("config.json", 0, 2) == b"{}"


def test_a_cache_snapshot_is_named_by_its_model_and_pinned_to_its_commit(tmp_path: Path) -> None:
    cache = tmp_path / "models--moonshotai--Kimi-K2.5"
    snapshot = cache / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    (cache / "blobs" / "f00d").write_bytes(b"weights")
    (snapshot / "model.safetensors").symlink_to("../../blobs/f00d")
    for given in (snapshot, snapshot / "model.safetensors"):
        source = LocalSource(given)
        assert (source.name, source.revision) == ("Kimi-K2.5", COMMIT)
        assert source.read("model.safetensors", 0, 7) == b"weights"


def test_a_single_shard_stands_for_its_folder(model: Path) -> None:
    (model / "model.safetensors").write_bytes(b"x")
    source = LocalSource(model / "model.safetensors")
    assert source.name == "Tiny-MoE"
    assert names(source) == ["config.json", "model.safetensors", "sub/a.txt"]


@pytest.mark.parametrize("given", ["missing", "Tiny-MoE/sub/a.txt"])
def test_what_is_no_checkpoint_folder_is_refused(model: Path, given: str) -> None:
    with pytest.raises(CheckpointError, match="give the folder that holds the model"):
        LocalSource(model.parent / given)


@pytest.mark.parametrize("name", ["../secret", "sub/../../secret", "/etc/hostname", "a\0b"])
def test_names_that_leave_the_folder_are_refused(model: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match="leads out of the folder"):
        LocalSource(model).read(name, 0, 1)


def stamp(folder: Path) -> str:
    return LocalSource(folder).list()[0].stamp


def test_reading_and_hard_linking_leave_the_stamp_alone(model: Path) -> None:
    before = stamp(model)
    LocalSource(model).read("config.json", 0, 2)
    os.link(model / "config.json", model / "zzz")
    assert stamp(model) == before


def _replace_with_a_copy(path: Path) -> None:
    times = path.stat()
    (path.parent / "copy").write_bytes(path.read_bytes())
    os.replace(path.parent / "copy", path)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def _touch(path: Path) -> None:
    os.utime(path, ns=(1, 1))


@pytest.mark.parametrize("change", [_touch, _replace_with_a_copy])
def test_touching_and_replacing_change_the_stamp(
    model: Path, change: Callable[[Path], None]
) -> None:
    before = stamp(model)
    change(model / "config.json")
    assert stamp(model) != before


def _local(folder: Path) -> Source:
    return LocalSource(folder)


def _memory(folder: Path) -> Source:
    return MemorySource({"sub/a.txt": b"0123456789", "config.json": b"{}"}, "Tiny-MoE")


@pytest.mark.parametrize("make", [_local, _memory])
def test_reads_are_exact_or_an_error_that_says_how_much_there_is(
    model: Path, make: Callable[[Path], Source]
) -> None:
    source = make(model)
    assert source.name == "Tiny-MoE"
    assert names(source) == ["config.json", "sub/a.txt"]
    assert source.read("sub/a.txt", 2, 5) == b"234"
    assert source.read("sub/a.txt", 10, 10) == b""
    with pytest.raises(SourceReadError, match=r"a\.txt: ends at byte 10, byte 11 was expected"):
        source.read("sub/a.txt", 8, 11)
    with pytest.raises(SourceReadError, match="missing"):
        source.read("missing", 0, 1)


def test_memory_lies_on_no_disk_and_its_stamp_follows_the_content() -> None:
    files = {"a": b"1"}
    source = MemorySource(files)
    before = source.list()
    assert source.local_path("a") is None
    assert source.revision is None
    files["a"] = b"2"
    assert source.list() != before


@pytest.mark.parametrize("make", [_local, _memory])
def test_a_stream_brings_the_bytes_of_a_read_in_small_pieces(
    model: Path, make: Callable[[Path], Source], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shardsurgeon.storage.local.CHUNK_NBYTES", 4)
    monkeypatch.setattr("shardsurgeon.storage.source.CHUNK_NBYTES", 4)
    source = make(model)
    assert list(source.stream("sub/a.txt", 1, 10)) == [b"1234", b"5678", b"9"]
    assert list(source.stream("sub/a.txt", 3, 3)) == []
    assert not source.is_remote
    with pytest.raises(SourceReadError, match="ends at byte 10, byte 11 was expected"):
        list(source.stream("sub/a.txt", 8, 11))


def test_memory_may_stand_for_a_far_place() -> None:
    assert MemorySource({}, remote=True).is_remote
