"""Calls that only some operating systems have, each beside a portable one that works anywhere.

The choice between the two is made once, in `native`; tests run both and inject faults. Files are
unbuffered `FileIO` objects; offsets and sizes are bytes. Every call raises plain `OSError`, which
`files` translates.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import struct
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from io import FileIO
from pathlib import Path
from typing import Any

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

RENAME_TRIES = 8


@dataclass(frozen=True, slots=True)
class System:
    """The calls of one kind of system.

    read_at(file, buffer, offset): fill the buffer from the file; how many bytes came, 0 at its end.
    write_at(file, data, offset): how many bytes were taken.
    kernel_copy(source, source_offset, target, target_offset, nbytes): how many bytes the kernel
    moved without us; 0 where it declines or the source ends.
    share(source, source_offset, target, target_offset, nbytes): let the target have the blocks of
    the source, to be copied once one of the two writes to them; False where it declines. All three
    numbers are multiples of BLOCK_NBYTES.
    unnamed(folder): an empty file there that has no name and goes with its process; None where
    there is no such thing.
    reserve(file, begin, end): claim the blocks of these bytes of the file, where that is of use.
    shared(file): how many of its bytes lie in blocks that another file has too.
    in_memory(file, offset): whether that byte is in the page cache; True where it cannot be told.
    will_need(file, begin, end): these bytes will be read soon; returns before they are there.
    let_go(file, begin, end): these bytes need not stay in the page cache. Those that are not on the
    disk yet begin to be written.
    sync_file(file), sync_folder(path): return when content, or names, are on the disk.
    rename(old, new): replace file `new`, or move a folder to a name that is free.
    lock(file): lock the file until it is closed or the process dies; False where another process
    has it locked.
    free_space(folder): bytes this user may still write there.
    """

    read_at: Callable[[FileIO, memoryview, int], int]
    write_at: Callable[[FileIO, memoryview, int], int]
    kernel_copy: Callable[[FileIO, int, FileIO, int, int], int]
    share: Callable[[FileIO, int, FileIO, int, int], bool]
    unnamed: Callable[[Path], FileIO | None]
    reserve: Callable[[FileIO, int, int], None]
    shared: Callable[[FileIO], int]
    in_memory: Callable[[FileIO, int], bool]
    will_need: Callable[[FileIO, int, int], None]
    let_go: Callable[[FileIO, int, int], None]
    sync_file: Callable[[FileIO], None]
    sync_folder: Callable[[Path], None]
    rename: Callable[[Path, Path], None]
    lock: Callable[[FileIO], bool]
    free_space: Callable[[Path], int]


def portable() -> System:
    """Every call, from what Python has on all systems."""
    return System(
        read_at=_seek_and_read,
        write_at=_seek_and_write,
        kernel_copy=_decline,
        share=_share_nothing,
        unnamed=_name_all,
        reserve=_claim_nothing,
        shared=_none_shared,
        in_memory=_unknown_in_memory,
        will_need=_let_come,
        let_go=_let_stay,
        sync_file=_sync_file,
        sync_folder=_sync_nothing,
        rename=_rename_with_retries,
        lock=_lock,
        free_space=_free_space,
    )


def native() -> System:
    """The best call this machine has for each; the portable one for what it lacks."""
    system = portable()
    if sys.platform == "linux":
        system = replace(system, reserve=_reserve, in_memory=_in_memory, let_go=_let_go)
        system = replace(system, share=_share, unnamed=_unnamed, shared=_shared)
        system = replace(system, will_need=_will_need)
        if hasattr(os, "copy_file_range"):
            system = replace(system, kernel_copy=_copy_file_range)
    if os.name == "posix":
        system = replace(system, sync_folder=_sync_folder, rename=_rename)
    if sys.platform != "win32" and hasattr(os, "preadv"):
        system = replace(system, read_at=_read_at, write_at=_write_at)
    return system


def default_system() -> System:
    """The default: native, unless SHARDSURGEON_PORTABLE=1 is set."""
    return portable() if os.environ.get("SHARDSURGEON_PORTABLE") == "1" else native()


def is_strangers(status: os.stat_result) -> bool:
    """Whether what has this status belongs to another user.

    Never for root, whom network file systems store as somebody else, and not where the system has
    no owners.
    """
    user = os.geteuid() if os.name == "posix" else 0
    return user != 0 and status.st_uid != user


def mount_of(path: Path) -> tuple[int, str]:
    """What a path is mounted as: no rename leads from one mount into another.

    One device may be mounted twice, which Linux alone tells.
    """
    number = ""
    if hasattr(os, "O_PATH"):
        with suppress(OSError):
            place = os.open(path, os.O_PATH)
            try:
                lines = Path(f"/proc/self/fdinfo/{place}").read_text().splitlines()
            finally:
                os.close(place)
            number = next((line for line in lines if line.startswith("mnt_id:")), "")
    return path.stat().st_dev, number


def _seek_and_read(file: FileIO, buffer: memoryview, offset: int) -> int:
    file.seek(offset)
    return file.readinto(buffer) or 0


def _seek_and_write(file: FileIO, data: memoryview, offset: int) -> int:
    file.seek(offset)
    return file.write(data) or 0


def _read_at(file: FileIO, buffer: memoryview, offset: int) -> int:
    return os.preadv(file.fileno(), [buffer], offset)


def _write_at(file: FileIO, data: memoryview, offset: int) -> int:
    return os.pwrite(file.fileno(), data, offset)


def _decline(source: FileIO, begin: int, target: FileIO, at: int, nbytes: int) -> int:
    return 0


# The numbers by which `statfs` knows the file systems whose server can copy by itself, so that no
# byte travels: NFS, SMB (two numbers), Ceph, and FUSE, behind which may be one of them.
_SERVED = frozenset({0x6969, 0xFF534D42, 0xFE534D42, 0x00C36400, 0x65735546})


def _copy_file_range(source: FileIO, begin: int, target: FileIO, at: int, nbytes: int) -> int:
    """Let a file server copy.

    On a disk of this machine the kernel would move page after page through a pipe, and a copy
    through a buffer is faster (tests/bench). What blocks the two files can share there, `share`
    has found before: the edges and the rest are asked for here.

    The call fails for many harmless reasons (two file systems, an old kernel, an unusual mount) and
    does not say which of the two files is at fault. So any failure counts as declining: the copy
    through a buffer goes on from there and finds a real fault by itself.
    """
    if sys.platform != "linux" or _file_system(target) not in _SERVED:
        return 0
    try:
        return os.copy_file_range(source.fileno(), target.fileno(), nbytes, begin, at)
    except OSError:
        return 0


def _share_nothing(source: FileIO, begin: int, target: FileIO, at: int, nbytes: int) -> bool:
    return False


# What linux/fs.h calls FICLONERANGE, and its structure: the source's descriptor, offset and length
# there, offset in the target.
_CLONE_RANGE, _CLONED = 0x4020940D, struct.Struct("qQQQ")


def _share(source: FileIO, begin: int, target: FileIO, at: int, nbytes: int) -> bool:
    """Ask for shared blocks, as XFS and btrfs have them.

    As with `_copy_file_range`, any failure is declining: the copy that follows finds a real fault.
    """
    if sys.platform != "linux":
        return False
    asked = _CLONED.pack(source.fileno(), begin, nbytes, at)
    try:
        fcntl.ioctl(target.fileno(), _CLONE_RANGE, asked)
    except OSError:
        return False
    return True


def _name_all(folder: Path) -> FileIO | None:
    return None


def _unnamed(folder: Path) -> FileIO | None:
    if sys.platform != "linux":
        return None
    return FileIO(os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o600), "r+")


def _none_shared(file: FileIO) -> int:
    return 0


# What linux/fiemap.h calls FS_IOC_FIEMAP; the head of its structure: first byte and length that are
# asked about, flags, how many extents came, for how many there was room; and one extent: its first
# byte, the same on the disk, its length, and its flags behind two reserved numbers.
_MAP_EXTENTS, _MAP_HEAD, _EXTENT = 0xC020660B, struct.Struct("=QQIIII"), struct.Struct("=5Q4I")
_IS_LAST, _IS_SHARED = 0x1, 0x2000
_EXTENTS_AT_ONCE = 500


def _shared(file: FileIO) -> int:
    """By the map of the file's extents; nothing where the file system has none."""
    if sys.platform != "linux":
        return 0
    total = begin = 0
    while True:
        room = bytearray(_MAP_HEAD.size + _EXTENT.size * _EXTENTS_AT_ONCE)
        _MAP_HEAD.pack_into(room, 0, begin, (1 << 64) - 1 - begin, 0, 0, _EXTENTS_AT_ONCE, 0)
        try:
            fcntl.ioctl(file.fileno(), _MAP_EXTENTS, room)
        except OSError:
            return total
        count = _MAP_HEAD.unpack_from(room)[3]
        for number in range(count):
            extent = _EXTENT.unpack_from(room, _MAP_HEAD.size + number * _EXTENT.size)
            begin, flags = extent[0] + extent[2], extent[5]
            total += extent[2] if flags & _IS_SHARED else 0
            if flags & _IS_LAST:
                return total
        if not count:
            return total


def _claim_nothing(file: FileIO, begin: int, end: int) -> None:
    """What is written later finds its blocks then."""


# The numbers of the file systems that write every block to a new place: btrfs, ZFS, bcachefs, F2FS.
# Blocks claimed there are of no use, and btrfs does not compress what is written to them.
_COPY_ON_WRITE = frozenset({0x9123683E, 0x2FC12FC1, 0xCA451A4E, 0xF2F52010})


def _reserve(file: FileIO, begin: int, end: int) -> None:
    """Claim the blocks now, so that a full disk is found before hours of copying.

    The system call itself, not `os.posix_fallocate`: where a file system cannot reserve, the C
    library imitates that one by writing into every block, which takes hours over a network.
    """
    while begin < end and _file_system(file) not in _COPY_ON_WRITE:
        if _libc_fallocate()(file.fileno(), 0, begin, end - begin) == 0:
            return
        code = ctypes.get_errno()
        if code in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            return
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))


@cache
def _libc_fallocate() -> Callable[[int, int, int, int], int]:
    libc: Any = ctypes.CDLL(None, use_errno=True)
    # glibc's plain name takes 32-bit sizes on 32-bit machines; musl has the plain name only.
    call = getattr(libc, "fallocate64", None) or getattr(libc, "fallocate", None)
    if call is None:
        return _no_fallocate
    call.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    call.restype = ctypes.c_int
    found: Callable[[int, int, int, int], int] = call
    return found


def _no_fallocate(descriptor: int, mode: int, begin: int, nbytes: int) -> int:
    ctypes.set_errno(errno.ENOSYS)
    return -1


def _file_system(file: FileIO) -> int:
    """The number by which `statfs` knows the file system; 0 where it does not say."""
    return _kind_of_device(os.fstat(file.fileno()).st_dev, file.fileno())


_KINDS: dict[int, int] = {}


def _kind_of_device(device: int, descriptor: int) -> int:
    if device not in _KINDS:
        answer = (ctypes.c_long * 32)()  # larger than any machine's; the number comes first
        failed = ctypes.CDLL(None).fstatfs(descriptor, answer)
        _KINDS[device] = 0 if failed else answer[0] & 0xFFFFFFFF
    return _KINDS[device]


def _unknown_in_memory(file: FileIO, offset: int) -> bool:
    return True


def _let_come(file: FileIO, begin: int, end: int) -> None:
    """What is read is fetched then."""


def _let_stay(file: FileIO, begin: int, end: int) -> None:
    """What is written stays in the page cache until the system needs the memory."""


def _in_memory(file: FileIO, offset: int) -> bool:
    if sys.platform != "linux":
        return True
    try:
        os.preadv(file.fileno(), [bytearray(1)], offset, os.RWF_NOWAIT)
    except OSError:  # it would have to wait, or cannot say
        return False
    return True


def _will_need(file: FileIO, begin: int, end: int) -> None:
    if sys.platform == "linux" and begin < end:
        with suppress(OSError):
            os.posix_fadvise(file.fileno(), begin, end - begin, os.POSIX_FADV_WILLNEED)


def _let_go(file: FileIO, begin: int, end: int) -> None:
    if sys.platform == "linux" and begin < end:
        # Advice: where it is not taken, nothing is lost.
        with suppress(OSError):
            os.posix_fadvise(file.fileno(), begin, end - begin, os.POSIX_FADV_DONTNEED)


def _sync_file(file: FileIO) -> None:
    os.fsync(file.fileno())


def _sync_nothing(path: Path) -> None:
    """Windows has no call for it: its file systems log every change of a name."""


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network and user-space file systems have no folder to sync and say so like this.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


def _rename(old: Path, new: Path) -> None:
    os.replace(old, new)


def _rename_with_retries(old: Path, new: Path) -> None:
    """Rename, waiting a little for virus scanners and indexers, which hold new files on Windows."""
    for attempt in range(RENAME_TRIES):
        try:
            os.replace(old, new)
            return
        except PermissionError:
            if os.name == "posix" or attempt == RENAME_TRIES - 1:
                raise
            time.sleep(0.05 * 2**attempt)


# Both kinds of lock die with the process, however it ends; a lock made of files would not.
if sys.platform == "win32":

    def _lock(file: FileIO) -> bool:
        file.seek(0)
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except PermissionError:
            return False
        return True

else:

    def _lock(file: FileIO) -> bool:
        try:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def _free_space(folder: Path) -> int:
    return shutil.disk_usage(folder).free
