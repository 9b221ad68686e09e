"""Whole files, exact reads, full writes, and errors that name the file."""

import errno
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from io import FileIO
from pathlib import Path

import pytest

from shardsurgeon.errors import OutputError, OutputWriteError, SourceReadError
from shardsurgeon.storage import files
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
        files.FileCopier(system, steps.append).copy(origin, 1_000, opened, 500, 8_000)
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


def test_a_reserved_file_starts_anew(tmp_path: Path) -> None:
    (tmp_path / "shard").write_bytes(b"leftover of a longer shard")
    files.reserve_file(tmp_path / "shard", 4, native())
    assert (tmp_path / "shard").read_bytes() == bytes(4)


def test_free_space_is_asked_of_the_nearest_folder_that_exists(tmp_path: Path) -> None:
    asked: list[Path] = []

    def free_space(path: Path) -> int:
        asked.append(path)
        return 7

    system = replace(native(), free_space=free_space)
    assert files.free_space(tmp_path / "a" / "b" / "OUT", system) == 7
    assert asked == [tmp_path]


# Outputs that the user named.


def take(path: Path, data: bytes, *inputs: Path, force: bool = False) -> bool:
    return files.require_output(
        path, data, inputs, replaces=lambda old: force, remedy="choose another"
    )


def test_an_output_goes_to_a_name_that_is_free_and_leaves_nothing_beside_it(
    tmp_path: Path,
) -> None:
    assert take(tmp_path / "a", b"new")
    files.write_output(tmp_path / "a", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == b"new"


def test_a_file_that_holds_the_output_already_is_done(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"new")
    assert not take(tmp_path / "a", b"new")


def test_another_file_makes_way_only_where_it_may(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(OutputError, match="exists and holds something else; choose another"):
        take(tmp_path / "a", b"new")
    assert take(tmp_path / "a", b"new", force=True)


@pytest.mark.parametrize("name", ["a", "link", "sub/../a"])
def test_an_input_is_never_an_output(tmp_path: Path, name: str) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a").write_bytes(b"new")
    (tmp_path / "link").symlink_to("a")
    with pytest.raises(OutputError, match="is read by this command"):
        take(tmp_path / name, b"new", tmp_path / "other", tmp_path / "a", force=True)


def test_a_folder_and_a_link_to_nowhere_are_no_outputs(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "folder").mkdir()
    for name in ("link", "folder"):
        with pytest.raises(OutputError, match="is no file that can be written"):
            take(tmp_path / name, b"new", force=True)


@pytest.mark.skipif(sys.platform == "win32", reason="no devices and pipes by path")
def test_devices_and_pipes_are_written_into_and_never_replaced(tmp_path: Path) -> None:
    assert take(Path("/dev/null"), b"new")
    files.write_output(Path("/dev/null"), b"new")
    assert Path("/dev/null").is_char_device()
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert take(pipe, b"new")
    with ThreadPoolExecutor(1) as pool:
        came = pool.submit(pipe.read_bytes)
        files.write_output(pipe, b"new")
        assert came.result(timeout=60) == b"new"
    assert pipe.is_fifo()


def test_a_failed_output_leaves_nothing(tmp_path: Path) -> None:
    full = replace(native(), write_at=failing(errno.ENOSPC))
    with pytest.raises(OutputWriteError):
        files.write_output(tmp_path / "a", b"new", full)
    assert not list(tmp_path.iterdir())


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
