"""A view's folder and the place that it reads: what is put together, and what is refused."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import snapshot_download
from safetensors import safe_open

import shardsurgeon
from shardsurgeon.cli.main import main
from shardsurgeon.errors import CheckpointError, ShardSurgeonError, SourceReadError
from shardsurgeon.operations import api
from shardsurgeon.storage.formats.view import DATA_NAME, VIEW_NAME
from shardsurgeon.storage.local import LocalSource
from shardsurgeon.storage.open import open_source
from shardsurgeon.storage.view import ViewSource
from tests.support import handmade_view as handmade
from tests.support.handmade_view import HandmadeView, stamp_of
from tests.support.hub.models import fixture_folder
from tests.support.hub.server import LocalHub

SHARD = "model-00002-of-00003.safetensors"
COMMIT = "0123456789abcdef0123456789abcdef01234567"

posix = pytest.mark.skipif(sys.platform == "win32", reason="links and pipes as POSIX has them")


@pytest.fixture
def made(tmp_path: Path) -> HandmadeView:
    return handmade.make(tmp_path)


def opened(view: HandmadeView) -> ViewSource:
    source = open_source(view.folder)
    assert isinstance(source, ViewSource)
    return source


def refused(view: HandmadeView) -> str:
    """What every way in says: one line, status 2."""
    said = set()
    for way in (open_source, lambda folder: shardsurgeon.open_view(folder, framework="np")):
        with pytest.raises(ShardSurgeonError) as caught:
            way(view.folder)
        assert caught.value.exit_status == 2 and caught.value.remedy
        said.add(str(caught.value))
    (line,) = said
    assert "\n" not in line and "\0" not in line and "\x1b" not in line
    return line


def test_a_view_made_from_the_description_alone_has_the_sources_bytes(made: HandmadeView) -> None:
    with shardsurgeon.open_view(made.folder, framework="np") as tensors:
        assert set(tensors.keys()) == handmade.EXPECTED.keys()
        for name, expected in handmade.EXPECTED.items():
            np.testing.assert_array_equal(tensors.get_tensor(name), expected)


def test_its_shards_are_files_that_the_library_reads(made: HandmadeView, tmp_path: Path) -> None:
    source, found = opened(made), {}
    for file in source.list():
        (tmp_path / file.name).write_bytes(source.read(file.name, 0, file.nbytes))
        with safe_open(tmp_path / file.name, "np") as shard:
            found |= {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118
    assert found.keys() == handmade.EXPECTED.keys()
    for name, expected in handmade.EXPECTED.items():
        np.testing.assert_array_equal(found[name], expected)
    with safe_open(tmp_path / "two.safetensors", "np") as shard:
        assert shard.metadata() == {"format": "pt"}


def test_every_range_of_a_shard_can_be_read_alone(made: HandmadeView) -> None:
    source = opened(made)
    for file in source.list():
        whole = source.read(file.name, 0, file.nbytes)
        for begin in range(0, file.nbytes, 7):
            for end in range(begin, file.nbytes + 1, 5):
                assert source.read(file.name, begin, end) == whole[begin:end]
        with pytest.raises(SourceReadError, match="ends at byte"):
            source.read(file.name, 0, file.nbytes + 1)


# Places that a stranger's view may name


def named(view: HandmadeView, place: str) -> None:
    lines = view.lines()
    lines[0]["source"] = place
    view.write(lines)


PLACES = {
    "https://example.org/model": "neither a folder nor",
    "http://169.254.169.254/": "neither a folder nor",
    "s3://bucket/model": "neither a folder nor",
    "file:///etc": "neither a folder nor",
    "hf://org/name": "neither a folder nor",
    "hf://org/name@main": "neither a folder nor",
    f"hf://org/name@{COMMIT[:-1]}": "neither a folder nor",
    f"hf://org/name@{COMMIT.upper()}": "neither a folder nor",
    f"hf://datasets/name@{COMMIT}": "neither a folder nor",
    f"hf://org/../name@{COMMIT}": "neither a folder nor",
    f"hf://org/name@{COMMIT}/../x": "is no folder of a repository",
    f"hf://org/name@{COMMIT}//x": "is no folder of a repository",
    f"hf://org/name@{COMMIT}/a\\b": "neither a folder nor",
    f"hf://org/name@{COMMIT}/a\nb": "neither a folder nor",
    "~/model": "there is no such folder",
    "../nowhere": "there is no such folder",
    "../source/a.safetensors/x": "there is no such folder",
    "a\x1b]0;owned\x07": "there is no such folder",
    "x" * 5000: "there is no such folder",
    "../" * 2000: "was there when the view was made and is gone",
    ".": "is a view itself",
    "../view": "is a view itself",
    "/": "was there when the view was made and is gone",
    "..": "was there when the view was made and is gone",
    "\ud800": "its source is",
    "a\0b": "its source is",
}


@posix
@pytest.mark.parametrize(("place", "said"), PLACES.items(), ids=[f"{x!a:.30}" for x in PLACES])
def test_another_place_is_refused_at_once(made: HandmadeView, place: str, said: str) -> None:
    named(made, place)
    begun = time.monotonic()
    line = refused(made)
    # `/` has more files than could be listed in that time.
    assert time.monotonic() - begun < 5
    assert said in line, line


@posix
def test_a_place_is_found_from_where_the_view_lies(made: HandmadeView, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "link").symlink_to(made.folder)
    shardsurgeon.open_view(tmp_path / "elsewhere" / "link", framework="np")
    named(made, str(made.source))
    moved = Path(shutil.move(made.folder, tmp_path / "elsewhere"))
    shardsurgeon.open_view(moved, framework="np")


@posix
@pytest.mark.parametrize("kind", ["FIFO", "device", "folder"])
def test_what_is_no_file_is_no_place_and_no_file_of_one(made: HandmadeView, kind: str) -> None:
    for path in (made.source / "a.safetensors", made.source):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        if kind == "FIFO":
            os.mkfifo(path)
        elif kind == "device":
            path.symlink_to("/dev/zero")
        else:
            path.mkdir()
        refused(made)
        path.rmdir() if kind == "folder" else path.unlink()


@posix
def test_a_shard_of_the_source_may_be_a_link_to_anywhere_but_in_no_linked_folder(
    made: HandmadeView, tmp_path: Path
) -> None:
    (tmp_path / "disk").mkdir()
    end = Path(shutil.move(made.source / "a.safetensors", tmp_path / "disk"))
    (made.source / "a.safetensors").symlink_to(end)
    opened(made)
    lines = made.lines()
    lines[0]["files"][0][0] = "sub/a.safetensors"
    made.write(lines)
    (made.source / "sub").symlink_to(tmp_path / "disk")
    assert "sub/a.safetensors: was there when" in refused(made)


@posix
def test_a_stranger_who_knows_no_stamp_reads_nothing(made: HandmadeView) -> None:
    """The name and the size of a file are easy to know; its time to the nanosecond is not."""
    for stamp in ("", "0:0", "*", stamp_of(made.source / "b.safetensors"), " "):
        lines = made.lines()
        lines[0]["files"][0][2] = stamp
        made.write(lines)
        refused(made)


# A source that changes


def rewritten(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def replaced(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    other.rename(path)


def linked(path: Path) -> None:
    end = path.with_name("end")
    end.write_bytes(path.read_bytes())
    path.unlink()
    path.symlink_to(end)


CHANGES: dict[str, Callable[[Path], object]] = {
    "touched": lambda path: os.utime(path),
    "written to": rewritten,
    "replaced": replaced,
    "cut short": lambda path: os.truncate(path, 40),
    "made longer": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "deleted": Path.unlink,
    "replaced by a link": linked,
}


@posix
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_source_that_changed_is_refused_before_and_noticed_after(
    made: HandmadeView, change: Callable[[Path], object]
) -> None:
    source = opened(made)
    tensors = shardsurgeon.open_view(made.folder, framework="np")
    change(made.source / "a.safetensors")
    assert "a.safetensors" in refused(made)
    with pytest.raises(CheckpointError, match=r"a\.safetensors: .*the view was made"):
        source.list()
    # What cannot be what it was any more is not given out, and nothing crashes.
    try:
        array = tensors.get_tensor("x")
    except ShardSurgeonError as error:
        assert "a.safetensors" in str(error)
    else:
        assert array.shape == (2, 3)


@posix
@pytest.mark.parametrize("change", ["cut short", "deleted", "replaced", "replaced by a link"])
def test_a_file_that_is_another_one_when_it_is_mapped_is_refused(
    made: HandmadeView, change: str
) -> None:
    tensors = shardsurgeon.open_view(made.folder, framework="np")
    CHANGES[change](made.source / "a.safetensors")
    with pytest.raises(ShardSurgeonError, match=r"a\.safetensors: "):
        tensors.get_tensor("x")


def test_a_time_that_is_put_back_is_noticed_within_a_run(made: HandmadeView) -> None:
    source, path = opened(made), made.source / "a.safetensors"
    before = path.stat()
    time.sleep(0.02)  # the clock of a file system ticks a few times a second
    path.write_bytes(path.read_bytes()[::-1])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(CheckpointError, match="was touched since the view was made"):
        source.list()


# The view's own folder


def own(path: Path, content: bytes) -> None:
    path.write_bytes(content)


OWN_CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "another content": (lambda path: own(path, bytes(8)), "is not the file that"),
    "shorter": (lambda path: own(path, b"1"), "is not the file that"),
    "longer": (lambda path: own(path, bytes(9)), "has 9 bytes, at most 8"),
    "gone": (Path.unlink, "is missing, or no plain file"),
    "a link": (lambda path: move_to_link(path), "link out of the folder"),
    "a link to nothing": (lambda path: (path.unlink(), path.symlink_to("x")), "link to nothing"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "is a special file|no plain file"),
    "a FIFO": (lambda path: (path.unlink(), os.mkfifo(path)), "is a FIFO"),
    "a device": (lambda path: (path.unlink(), path.symlink_to("/dev/zero")), "is a device"),
    "huge": (lambda path: os.truncate(path, 2**40), "bytes, at most"),
}


def move_to_link(path: Path) -> None:
    end = path.parent.parent / "end"
    shutil.move(path, end)
    path.symlink_to(end)


@posix
@pytest.mark.parametrize("name", [VIEW_NAME, DATA_NAME])
@pytest.mark.parametrize(("change", "said"), OWN_CHANGES.values(), ids=OWN_CHANGES.keys())
def test_own_files_are_plain_and_what_they_were(
    made: HandmadeView, name: str, change: Callable[[Path], object], said: str
) -> None:
    source = opened(made)
    time.sleep(0.02)
    change(made.folder / name)
    with pytest.raises(CheckpointError, match=rf"{name}: was written to, replaced or removed"):
        source.list()
    if name == DATA_NAME or said.startswith(("link", "is a FIFO", "is a device", "bytes")):
        line = refused(made)
        assert any(part in line for part in said.split("|")), line


@posix
@pytest.mark.parametrize("kind", ["file", "link to nothing", "FIFO", "folder"])
def test_a_shard_that_is_there_as_well_is_refused(made: HandmadeView, kind: str) -> None:
    source, path = opened(made), made.folder / "one.safetensors"
    make: dict[str, Callable[[], object]] = {
        "file": lambda: path.write_bytes(b""),
        "link to nothing": lambda: path.symlink_to("nothing"),
        "FIFO": lambda: os.mkfifo(path),
        "folder": lambda: path.mkdir(),
    }
    make[kind]()
    assert "one.safetensors: is there as a file" in refused(made)
    with pytest.raises(CheckpointError, match="is there as a file"):
        source.list()


@posix
def test_a_view_in_the_hubs_cache_has_links_to_its_blobs(made: HandmadeView) -> None:
    cache = made.folder.parent / "models--org--view"
    snapshot = cache / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    named(made, str(made.source))
    for number, name in enumerate((VIEW_NAME, DATA_NAME)):
        blob = cache / "blobs" / f"{number:064}"
        shutil.copy(made.folder / name, blob)
        (snapshot / name).symlink_to(blob)
    with shardsurgeon.open_view(snapshot, framework="np") as tensors:
        np.testing.assert_array_equal(tensors.get_tensor("x"), handmade.EXPECTED["x"])


# Through the commands, with a whole model


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(fixture_folder("qwen3_moe"), tmp_path / "model"))


@pytest.fixture
def view(model: Path) -> Path:
    scores = fixture_folder("qwen3_moe") / "scores.pt"
    out = model.parent / "view"
    api.apply(api.plan(model, scores, ratio=0.5), out, view=True)
    return out


def lines_of(view: Path) -> list[dict[str, Any]]:
    text = gzip.decompress((view / VIEW_NAME).read_bytes())
    return [json.loads(line) for line in text.splitlines()]


def write(view: Path, lines: list[dict[str, Any]]) -> None:
    (view / VIEW_NAME).write_bytes(handmade.packed(lines))


def state(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.is_symlink()
    }


def test_inspect_and_verify_take_a_sound_view(
    model: Path, view: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(view)]) == 0
    assert main(["verify", str(model), str(view)]) == 0
    capsys.readouterr()


def edit(change: Callable[[list[dict[str, Any]]], object]) -> Callable[[Path, Path], object]:
    def spoil(view: Path, model: Path) -> None:
        lines = lines_of(view)
        change(lines)
        write(view, lines)

    return spoil


SPOILED: dict[str, Callable[[Path, Path], object]] = {
    "a range beyond its file": edit(lambda ls: ls[1]["ranges"]["begin"].__setitem__(0, 10**9)),
    "a negative range": edit(lambda ls: ls[1]["ranges"]["begin"].__setitem__(0, -1)),
    "a tensor twice": edit(lambda ls: ls.append(ls[1])),
    "a name that leads out": edit(lambda ls: ls[1].update(file="../x.safetensors")),
    "a file that leads out": edit(lambda ls: ls[0]["files"][0].__setitem__(0, "../x.safetensors")),
    "another digest": edit(lambda ls: ls[1].update(header_sha256="0" * 64)),
    "a newer version": edit(lambda ls: ls[0].update(version=99)),
    "another place": edit(lambda ls: ls[0].update(source="https://example.org/")),
    "the root": edit(lambda ls: ls[0].update(source="/")),
    "a deep list": edit(lambda ls: ls[0].update(source=json.loads("[" * 900 + "]" * 900))),
    "cut": lambda view, model: os.truncate(view / VIEW_NAME, 100),
    "no gzip": lambda view, model: (view / VIEW_NAME).write_bytes(b"{}"),
    "a bomb": lambda view, model: (view / VIEW_NAME).write_bytes(gzip.compress(bytes(200 << 20))),
    "a source that was touched": lambda view, model: os.utime(model / SHARD),
    "a source that is gone": lambda view, model: (model / SHARD).unlink(),
    "a shard beside it": lambda view, model: (view / SHARD).write_bytes(b"x"),
}


@pytest.fixture
def other(model: Path) -> Iterator[Path]:
    """A copy of the model, so that what is wrong is the view's source and not SOURCE."""
    yield Path(shutil.copytree(model, model.parent / "other"))


@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED.keys())
def test_every_command_refuses_a_spoiled_view_in_one_line(
    model: Path,
    view: Path,
    other: Path,
    spoil: Callable[[Path, Path], object],
    capsys: pytest.CaptureFixture[str],
) -> None:
    spoil(view, model)
    out = view.parent / "out"
    before = state(view), state(model)
    scores = str(fixture_folder("qwen3_moe") / "scores.pt")
    capsys.readouterr()
    for words in (
        ["inspect", str(view)],
        ["verify", str(other), str(view)],
        ["plan", scores, "--model", str(view), "--ratio", "0.5"],
        ["apply", scores, "--model", str(view), "--keep", "4", "-o", str(out)],
        ["apply", scores, "--model", str(view), "--keep", "4", "--view", "-o", str(out)],
    ):
        assert main(words) == 2, words
        told = capsys.readouterr()
        assert told.out == ""
        assert told.err.startswith("shardsurgeon: error: ") and told.err.count("\n") == 1, told.err
        assert not out.exists() and not Path(f"{out}.partial").exists()
    assert (state(view), state(model)) == before


@posix
@pytest.mark.parametrize(
    "line", [b'{"a":[' + b"[]," * 30_000_000 + b"1]}", b"\xf0\x9f\x98\x80" * 30_000_000]
)
def test_a_bomb_stays_within_a_limit_of_memory(view: Path, line: bytes) -> None:
    (view / VIEW_NAME).write_bytes(gzip.compress(line, 1))
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30));"
        "from shardsurgeon.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    words = [sys.executable, "-c", code, "inspect", str(view)]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 2, ended.stderr
    assert "Traceback" not in ended.stderr


@posix
def test_a_folder_whose_name_is_no_text_cannot_be_named_by_a_view(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        moved = Path(os.fsdecode(os.fsencode(model) + b"\xff"))
        model.rename(moved)
    except OSError:
        pytest.skip("this file system takes no such name")
    scores, out = str(fixture_folder("qwen3_moe") / "scores.pt"), model.parent / "out"
    words = ["apply", scores, "--model", str(moved), "--ratio", "0.5", "--view", "-o", str(out)]
    assert main(words) == 2
    assert "is no text" in capsys.readouterr().err
    assert not out.exists() and not Path(f"{out}.partial").exists()


def test_a_view_is_found_by_its_working_name_from_where_it_will_be(made: HandmadeView) -> None:
    working = made.folder.parent / "deep" / "down" / "view"
    working.parent.mkdir(parents=True)
    shutil.move(made.folder, working)
    with pytest.raises(CheckpointError, match="there is no such folder"):
        ViewSource(LocalSource(working))
    ViewSource(LocalSource(working), at=made.folder)


# A commit of the Hub


def on_the_hub(view: HandmadeView, hub: LocalHub) -> str:
    """Put the view's source on the Hub and have the view name it; the commit."""
    (view.source / "config.json").write_text("{}")
    commit = hub.add_model("org/source", view.source)
    lines = view.lines()
    lines[0]["source"] = f"hf://org/source@{commit}"
    for file in lines[0]["files"][:2]:
        file[2] = hashlib.sha256((view.source / file[0]).read_bytes()).hexdigest()
    view.write(lines)
    return commit


def test_a_commit_of_the_hub_is_read_as_it_was_whatever_came_later(
    made: HandmadeView, online: LocalHub
) -> None:
    on_the_hub(made, online)
    online.commit("org/source", {"a.safetensors": b"another"})
    source = opened(made)
    whole = source.read("one.safetensors", 0, source.shards["one.safetensors"].nbytes)
    header = int.from_bytes(whole[:8], "little")
    x, counts, y = (handmade.EXPECTED[name].tobytes() for name in ("x", "counts", "y"))
    assert whole[8 + header :] == x + counts + y


def test_other_bytes_or_none_at_a_commit_are_refused(made: HandmadeView, online: LocalHub) -> None:
    commit = on_the_hub(made, online)
    lines = made.lines()
    lines[0]["files"][0][2] = "0" * 64
    made.write(lines)
    assert "a.safetensors: was written to or replaced since the view was made" in refused(made)
    lines[0]["files"][0][0] = "c.safetensors"
    made.write(lines)
    assert "c.safetensors: was there when the view was made and is gone" in refused(made)
    lines[0]["source"] = f"hf://org/source@{'0' * 40}"
    made.write(lines)
    assert commit not in refused(made)


def test_a_source_in_the_hubs_cache_is_read_without_a_network(
    made: HandmadeView, online: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = on_the_hub(made, online)
    snapshot_download("org/source", revision=commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with shardsurgeon.open_view(made.folder, framework="np") as tensors:
        for name, expected in handmade.EXPECTED.items():
            np.testing.assert_array_equal(tensors.get_tensor(name), expected)
