"""Every call beside its twin: both must do the same."""

import ctypes
import errno
import os
import subprocess
import sys
import time
from io import FileIO
from pathlib import Path

import pytest

from shardsurgeon.storage import system as system_module
from shardsurgeon.storage.system import System, default_system, native, portable

BOTH = pytest.mark.parametrize("system", [native(), portable()], ids=["native", "portable"])


@BOTH
def test_reads_and_writes_hit_their_offset(tmp_path: Path, system: System) -> None:
    with FileIO(tmp_path / "file", "w+") as file:
        assert system.write_at(file, memoryview(b"0123456789"), 0) == 10
        assert system.write_at(file, memoryview(b"xy"), 4) == 2
        buffer = bytearray(3)
        assert system.read_at(file, memoryview(buffer), 3) == 3
        assert buffer == b"3xy"
        assert system.read_at(file, memoryview(buffer), 10) == 0


@BOTH
def test_what_is_reserved_changes_neither_length_nor_content(
    tmp_path: Path, system: System
) -> None:
    with FileIO(tmp_path / "file", "w") as file:
        file.write(b"12345")
        file.truncate(100_000)
        for begin, end in ((0, 0), (3, 4), (0, 100_000)):
            system.reserve(file, begin, end)
    assert (tmp_path / "file").read_bytes() == b"12345" + bytes(99_995)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux reserves")
def test_a_reservation_that_the_disk_cannot_hold_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, mode: int, begin: int, nbytes: int) -> int:
        ctypes.set_errno(errno.ENOSPC)
        return -1

    monkeypatch.setattr(system_module, "_libc_fallocate", lambda: full)
    with FileIO(tmp_path / "file", "w") as file, pytest.raises(OSError, match="No space"):
        native().reserve(file, 0, 10)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux reserves")
def test_a_file_system_that_cannot_reserve_is_written_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(system_module, "_libc_fallocate", lambda: system_module._no_fallocate)
    with FileIO(tmp_path / "file", "w") as file:
        native().reserve(file, 0, 10)
        assert native().write_at(file, memoryview(b"data"), 6) == 4
    assert (tmp_path / "file").read_bytes() == bytes(6) + b"data"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux reserves")
def test_no_blocks_are_claimed_where_each_is_written_to_a_new_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused() -> None:
        raise AssertionError("btrfs was asked for blocks")

    monkeypatch.setattr(system_module, "_file_system", lambda file: 0x9123683E)
    monkeypatch.setattr(system_module, "_libc_fallocate", refused)
    with FileIO(tmp_path / "file", "w") as file:
        native().reserve(file, 0, 10)


@BOTH
def test_what_memory_lets_go_of_is_still_there(tmp_path: Path, system: System) -> None:
    with FileIO(tmp_path / "file", "w+") as file:
        file.write(bytes(range(200)) * 100)
        system.let_go(file, 0, 20_000)
        system.will_need(file, 0, 20_000)
        system.will_need(file, 7, 7)
        system.sync_file(file)
        system.let_go(file, 0, 20_000)
        system.let_go(file, 5, 5)
        assert system.in_memory(file, 30_000) in (True, False)
    assert (tmp_path / "file").read_bytes() == bytes(range(200)) * 100


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux takes the advice")
def test_the_kernel_is_advised_to_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    advised = []

    def advice(descriptor: int, begin: int, nbytes: int, what: int) -> None:
        advised.append((descriptor, begin, nbytes, what))
        raise OSError("not taken")

    monkeypatch.setattr(os, "posix_fadvise", advice)
    with FileIO(tmp_path / "file", "w+") as file:
        native().let_go(file, 5, 5)
        native().let_go(file, 4096, 20_000)
        assert advised == [(file.fileno(), 4096, 15_904, os.POSIX_FADV_DONTNEED)]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can tell")
def test_a_read_that_would_have_to_wait_is_of_what_is_not_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The kernel is played: which pages it keeps depends on what else the machine does.
    def preadv(descriptor: int, buffers: list[bytearray], offset: int, flags: int) -> int:
        assert (len(buffers[0]), flags) == (1, os.RWF_NOWAIT)
        if offset >= 10_000:
            raise BlockingIOError(errno.EAGAIN, "would wait")
        return 1

    monkeypatch.setattr(os, "preadv", preadv)
    with FileIO(tmp_path / "file", "w+") as file:
        file.write(bytes(20_000))
        assert native().in_memory(file, 9_999)
        assert not native().in_memory(file, 10_000)


@pytest.mark.skipif(not hasattr(os, "copy_file_range"), reason="no copy_file_range here")
def test_a_file_server_is_asked_to_copy_and_declines_what_it_cannot_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "from").write_bytes(b"0123456789")
    with FileIO(tmp_path / "from") as source, FileIO(tmp_path / "to", "w+") as target:
        assert native().kernel_copy(source, 2, target, 1, 3) == 0  # a disk of this machine
        monkeypatch.setattr(system_module, "_file_system", lambda file: 0x6969)
        assert native().kernel_copy(source, 2, target, 1, 3) == 3
        assert native().kernel_copy(source, 10, target, 1, 3) == 0
        assert native().kernel_copy(target, 0, source, 0, 3) == 0  # source is open for reading
        assert portable().kernel_copy(source, 2, target, 1, 3) == 0
    assert (tmp_path / "to").read_bytes() == b"\x00234"


def test_blocks_that_cannot_be_shared_are_declined(tmp_path: Path) -> None:
    (tmp_path / "from").write_bytes(bytes(8_192))
    with FileIO(tmp_path / "from") as source, FileIO(tmp_path / "to", "w+") as target:
        assert not portable().share(source, 0, target, 0, 4_096)
        # On any disk: the source is open for reading only, no block lies at 1, and none at the end.
        assert not native().share(target, 0, source, 0, 4_096)
        assert not native().share(source, 1, target, 1, 4_096)
        assert not native().share(source, 16_384, target, 0, 4_096)
        assert portable().shared(source) == native().shared(source) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has files without a name")
def test_a_file_without_a_name_can_be_written_and_is_not_seen(tmp_path: Path) -> None:
    file = native().unnamed(tmp_path)
    assert file is not None
    with file:
        assert native().write_at(file, memoryview(b"data"), 4) == 4
        assert not list(tmp_path.iterdir())
    assert portable().unnamed(tmp_path) is None


@BOTH
def test_renaming_replaces_files_and_moves_folders(tmp_path: Path, system: System) -> None:
    (tmp_path / "old").write_bytes(b"new content")
    (tmp_path / "new").write_bytes(b"")
    system.rename(tmp_path / "old", tmp_path / "new")
    assert (tmp_path / "new").read_bytes() == b"new content"
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_bytes(b"")
    system.rename(tmp_path / "folder", tmp_path / "moved")
    assert (tmp_path / "moved" / "file").exists()
    with pytest.raises(FileNotFoundError):
        system.rename(tmp_path / "missing", tmp_path / "other")


def test_a_rename_that_windows_refuses_for_a_moment_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusals = [PermissionError(), PermissionError()]
    waits: list[float] = []

    def replace(old: Path, new: Path) -> None:
        if refusals:
            raise refusals.pop()

    monkeypatch.setattr(os, "name", "nt")
    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(time, "sleep", waits.append)
    portable().rename(tmp_path / "old", tmp_path / "new")
    assert waits == [0.05, 0.1]
    refusals[:] = [PermissionError()] * 100
    with pytest.raises(PermissionError):
        portable().rename(tmp_path / "old", tmp_path / "new")


@BOTH
def test_syncing_accepts_files_and_folders(tmp_path: Path, system: System) -> None:
    with FileIO(tmp_path / "file", "w") as file:
        system.sync_file(file)
    system.sync_folder(tmp_path)


@pytest.mark.skipif(os.name != "posix", reason="only POSIX syncs folders")
def test_a_mount_without_folder_sync_is_accepted_but_a_bad_disk_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = errno.EINVAL

    def fail(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    native().sync_folder(tmp_path)
    code = errno.EIO
    with pytest.raises(OSError, match=r"\[Errno 5\]"):
        native().sync_folder(tmp_path)


@BOTH
def test_a_lock_excludes_others_until_its_file_is_closed(tmp_path: Path, system: System) -> None:
    with FileIO(tmp_path / "lock", "a+") as first, FileIO(tmp_path / "lock", "a+") as second:
        assert system.lock(first)
        assert not system.lock(second)
        first.close()
        assert system.lock(second)


def test_a_lock_dies_with_its_process(tmp_path: Path) -> None:
    script = (
        "import os, sys; from io import FileIO; from shardsurgeon.storage.system import native\n"
        "file = FileIO(sys.argv[1], 'a+'); assert native().lock(file); os._exit(9)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "lock")], env=environment, check=False
    )
    assert ended.returncode == 9
    with FileIO(tmp_path / "lock", "a+") as file:
        assert native().lock(file)


@BOTH
def test_free_space_is_that_of_the_folder(tmp_path: Path, system: System) -> None:
    assert system.free_space(tmp_path) > 0


def test_the_environment_can_ask_for_the_portable_twins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARDSURGEON_PORTABLE", "1")
    assert default_system() == portable()
    monkeypatch.delenv("SHARDSURGEON_PORTABLE")
    assert default_system() == native()
