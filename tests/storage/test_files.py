"""Whole files, exact reads, full writes, and errors that name the file."""

import contextlib
import errno
import os
import socket
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from io import FileIO
from pathlib import Path

import pytest

from shardsurgeon.errors import OutputError, OutputWriteError, SourceReadError
from shardsurgeon.storage import files, pipes
from shardsurgeon.storage.system import System, native, portable

BOTH = pytest.mark.parametrize("system", [native(), portable()], ids=["native", "portable"])
CONTENT = bytes(range(256)) * 40


def failing(code: int) -> Callable[..., int]:
    def fail(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    return fail


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "from").write_bytes(CONTENT)
    return tmp_path / "from"


def three_bytes_at_a_time(system: System) -> System:
    return replace(
        system,
        read_at=lambda file, buffer, at: system.read_at(file, buffer[:3], at),
        write_at=lambda file, data, at: system.write_at(file, data[:3], at),
    )


def test_an_exact_read_goes_on_after_short_reads(file: Path) -> None:
    system = three_bytes_at_a_time(portable())
    with FileIO(file) as opened:
        assert files.read_exact(opened, 100, 1100, file, system) == CONTENT[100:1100]


def test_a_file_that_ends_early_is_named_with_both_offsets(file: Path) -> None:
    with FileIO(file) as opened, pytest.raises(SourceReadError) as caught:
        files.read_exact(opened, 10_000, 10_300, file)
    assert str(caught.value) == (
        f"{file}: ends at byte 10,240, byte 10,300 was expected; it was cut short; fetch it again"
    )


def copy(file: Path, target: Path, system: System) -> list[int]:
    steps: list[int] = []
    target.write_bytes(bytes(9_000))
    with FileIO(file) as origin, FileIO(target, "r+") as opened:
        files.FileCopier(system, steps.append).copy(origin, opened, [(1_000, 500, 8_000)])
    return steps


@BOTH
def test_a_range_is_copied_to_its_offset_and_every_step_is_told(
    file: Path, tmp_path: Path, system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "BUFFER_NBYTES", 999)
    for variant in (system, three_bytes_at_a_time(system)):
        steps = copy(file, tmp_path / "to", variant)
        assert sum(steps) == 8_000
        expected = bytes(500) + CONTENT[1_000:9_000] + bytes(500)
        assert (tmp_path / "to").read_bytes() == expected


def test_the_buffer_takes_over_where_the_kernel_stops_half_way(file: Path, tmp_path: Path) -> None:
    asked: list[int] = []

    def kernel_copy(source: FileIO, begin: int, target: FileIO, at: int, nbytes: int) -> int:
        asked.append(nbytes)
        if len(asked) == 3:
            return 0
        source.seek(begin)
        target.seek(at)
        return target.write(source.read(700))

    steps = copy(file, tmp_path / "to", replace(native(), kernel_copy=kernel_copy))
    assert asked == [8_000, 7_300, 6_600]
    assert steps == [700, 700, 6_600]
    assert (tmp_path / "to").read_bytes()[500:8_500] == CONTENT[1_000:9_000]


@BOTH
def test_a_copy_beyond_the_end_of_the_source_names_the_source(
    file: Path, tmp_path: Path, system: System
) -> None:
    os.truncate(file, 5_000)
    with pytest.raises(SourceReadError, match=r"from: ends at byte 5,000"):
        copy(file, tmp_path / "to", system)


def test_a_failing_read_names_the_source_and_a_failing_write_the_target(
    file: Path, tmp_path: Path
) -> None:
    with pytest.raises(SourceReadError, match=r"from: cannot be read \(Input/output error\)"):
        copy(file, tmp_path / "to", replace(portable(), read_at=failing(errno.EIO)))
    with pytest.raises(OutputWriteError, match=r"to: cannot be written \(No space left .*free"):
        copy(file, tmp_path / "to", replace(portable(), write_at=failing(errno.ENOSPC)))


def test_a_system_that_takes_no_bytes_is_an_error_not_a_hang(file: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputWriteError, match="takes no more bytes"):
        copy(file, tmp_path / "to", replace(portable(), write_at=lambda *_: 0))


@BOTH
def test_a_written_file_holds_the_data_and_leaves_nothing_beside_it(
    tmp_path: Path, system: System
) -> None:
    for data in (b"first", b"", b"second"):
        files.write_file(tmp_path / "plan.json", data, three_bytes_at_a_time(system))
        assert (tmp_path / "plan.json").read_bytes() == data
    assert os.listdir(tmp_path) == ["plan.json"]


@pytest.mark.parametrize("call", ["write_at", "sync_file", "rename"])
def test_a_failed_write_leaves_the_old_content(tmp_path: Path, call: str) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(b"old")
    broken = replace(native(), **{call: failing(errno.EDQUOT)})  # type: ignore[arg-type]
    with pytest.raises(OutputWriteError, match=r"plan\.json: cannot be written .*quota"):
        files.write_file(path, b"new", broken)
    assert path.read_bytes() == b"old"


def test_content_is_synced_before_the_name_and_the_folder_after(tmp_path: Path) -> None:
    calls: list[str] = []
    real = native()

    def sync_file(file: FileIO) -> None:
        calls.append(f"sync {Path(str(file.name)).name}")

    def sync_folder(path: Path) -> None:
        calls.append(f"sync {path.name}")

    def rename(old: Path, new: Path) -> None:
        calls.append(f"rename {old.name} {new.name}")
        real.rename(old, new)

    watched = replace(real, sync_file=sync_file, sync_folder=sync_folder, rename=rename)
    files.write_file(tmp_path / "a", b"data", watched)
    assert calls == ["sync a.writing", "rename a.writing a", f"sync {tmp_path.name}"]


def test_folders_are_made_with_those_above_them(tmp_path: Path) -> None:
    files.make_folder(tmp_path / "a" / "b", native())
    files.make_folder(tmp_path / "a" / "b", native())
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputWriteError):
        files.make_folder(tmp_path / "file" / "b", native())


@BOTH
@pytest.mark.parametrize("claimed", [None, (), [(1, 3)]])
def test_a_reserved_file_starts_anew_and_has_its_size(
    tmp_path: Path, system: System, claimed: Sequence[tuple[int, int]] | None
) -> None:
    asked: list[tuple[int, int]] = []

    def reserve(file: FileIO, begin: int, end: int) -> None:
        asked.append((begin, end))
        system.reserve(file, begin, end)

    (tmp_path / "shard").write_bytes(b"leftover of a longer shard")
    files.reserve_file(tmp_path / "shard", 4, replace(system, reserve=reserve), claimed)
    assert (tmp_path / "shard").read_bytes() == bytes(4)
    assert asked == ([(0, 4)] if claimed is None else list(claimed))


def test_free_space_is_asked_of_the_nearest_folder_that_exists(tmp_path: Path) -> None:
    asked: list[Path] = []

    def free_space(path: Path) -> int:
        asked.append(path)
        return 7

    system = replace(native(), free_space=free_space)
    assert files.free_space(tmp_path / "a" / "b" / "OUT", system) == 7
    assert asked == [tmp_path]


# Outputs that the user named.


def output(path: Path, *inputs: Path, force: bool = False) -> files.Output:
    """An output whose kind is told by its first byte."""
    return files.Output(
        path, "a note", lambda path: path.read_bytes()[:1] == b"n", force
    ).apart_from(inputs)


def test_an_output_goes_to_a_name_that_is_free_and_leaves_nothing_beside_it(
    tmp_path: Path,
) -> None:
    assert output(tmp_path / "a").write(b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == b"new"


def test_a_file_that_holds_the_output_already_is_done(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"new")
    before = (tmp_path / "a").stat().st_mtime_ns
    assert not output(tmp_path / "a").write(b"new")
    assert not output(tmp_path / "a", force=True).write(b"new")
    assert (tmp_path / "a").stat().st_mtime_ns == before


def test_another_file_of_its_kind_makes_way_for_an_output_only_by_force(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"n old")
    with pytest.raises(
        OutputError, match=r"exists and holds something else; .* a note with --force"
    ):
        output(tmp_path / "a").write(b"new")
    assert output(tmp_path / "a", force=True).write(b"new")
    assert (tmp_path / "a").read_bytes() == b"new"


@pytest.mark.parametrize("force", [False, True])
def test_a_file_of_another_kind_is_refused_before_any_work(tmp_path: Path, force: bool) -> None:
    (tmp_path / "a").write_bytes(b"mine")
    with pytest.raises(OutputError, match="exists and holds something else; choose another -o"):
        output(tmp_path / "a", force=force)


@pytest.mark.parametrize("name", ["a", "link", "hard", "sub/../a"])
def test_an_input_is_never_an_output(tmp_path: Path, name: str) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a").write_bytes(b"new")
    (tmp_path / "link").symlink_to("a")
    (tmp_path / "hard").hardlink_to(tmp_path / "a")
    with pytest.raises(OutputError, match="is read by this command"):
        output(tmp_path / name, tmp_path / "other", tmp_path / "a", force=True)


def test_a_folder_and_a_link_to_nowhere_are_no_outputs(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "folder").mkdir()
    for name in ("link", "folder"):
        with pytest.raises(OutputError, match="is no file that can be written"):
            output(tmp_path / name, force=True)


def test_a_file_that_appears_while_the_command_works_stays(tmp_path: Path) -> None:
    late = output(tmp_path / "a")
    (tmp_path / "a").write_bytes(b"n of somebody else")
    with pytest.raises(OutputError, match="exists and holds something else"):
        late.write(b"new")
    assert (tmp_path / "a").read_bytes() == b"n of somebody else"


def test_a_link_to_an_output_stays_one_and_its_end_is_written(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a").write_bytes(b"n old")
    (tmp_path / "a").symlink_to("elsewhere/a")
    assert output(tmp_path / "a", force=True).write(b"new")
    assert (tmp_path / "a").is_symlink()
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["a"]
    assert (tmp_path / "elsewhere" / "a").read_bytes() == b"new"


@pytest.mark.skipif(sys.platform == "win32", reason="no devices and pipes by path")
def test_devices_and_pipes_are_written_into_and_never_replaced(tmp_path: Path) -> None:
    assert output(Path("/dev/null")).write(b"new")
    assert Path("/dev/null").is_char_device()
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with ThreadPoolExecutor(1) as pool:
        came = pool.submit(pipe.read_bytes)
        assert output(pipe).write(CONTENT * 20)
        assert came.result(timeout=60) == CONTENT * 20
    assert pipe.is_fifo()


@pytest.mark.skipif(sys.platform == "win32", reason="no pipes by path")
def test_a_pipe_that_nobody_reads_and_a_socket_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipes, "PATIENCE_SECONDS", 0.0)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OutputWriteError, match="it is a pipe that nobody reads"):
        output(tmp_path / "pipe").write(b"new")
    with contextlib.chdir(tmp_path), socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket")
        with pytest.raises(OutputError, match="is no file that can be written"):
            output(Path("socket"), force=True)


def test_a_failed_output_leaves_nothing(tmp_path: Path) -> None:
    full = replace(native(), write_at=failing(errno.ENOSPC))
    with pytest.raises(OutputWriteError):
        output(tmp_path / "a").write(b"new", full)
    assert not list(tmp_path.iterdir())


# Inputs that the user named.


@pytest.mark.skipif(sys.platform == "win32", reason="no pipes by path")
def test_a_pipe_is_read_once_however_slowly_it_comes(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)

    def write() -> None:
        with pipe.open("wb", buffering=0) as file:
            for begin in range(0, len(CONTENT), 1000):
                file.write(CONTENT[begin : begin + 1000])

    with ThreadPoolExecutor(1) as pool:
        writer = pool.submit(write)
        assert pipes.read_once(pipe, 1 << 20) == CONTENT
        writer.result(timeout=60)
        writer = pool.submit(write)
        assert pipes.read_once(pipe, 9) == CONTENT[:9]
        assert isinstance(writer.exception(timeout=60), BrokenPipeError | None)


@pytest.mark.skipif(sys.platform == "win32", reason="no pipes by path")
def test_a_pipe_is_no_file_that_is_read_twice_and_none_is_waited_for_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipes, "PATIENCE_SECONDS", 0.0)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="it is a pipe that nobody writes into"):
        pipes.read_once(tmp_path / "pipe", 9)
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(OSError, match="it is a pipe or a device; save it to a file first"):
            pipes.open_file(path)
    with pytest.raises(IsADirectoryError):
        pipes.open_file(tmp_path)


@pytest.mark.parametrize("call", ["write", "reserve"])
def test_a_link_that_was_laid_for_a_work_file_is_not_followed(tmp_path: Path, call: str) -> None:
    (tmp_path / "precious").write_bytes(b"precious")
    for name in ("a", "a.writing"):
        (tmp_path / name).symlink_to("precious")
    if call == "write":
        files.write_file(tmp_path / "a", b"new")
    else:
        files.reserve_file(tmp_path / "a", 100, native())
    assert (tmp_path / "precious").read_bytes() == b"precious"
    assert not (tmp_path / "a").is_symlink()


def test_the_name_of_every_new_folder_is_synced(tmp_path: Path) -> None:
    synced: list[Path] = []
    system = replace(native(), sync_folder=synced.append)
    files.make_folder(tmp_path / "a" / "b", system)
    assert synced == [tmp_path, tmp_path / "a"]
    files.make_folder(tmp_path / "a" / "b", system)
    assert len(synced) == 2
