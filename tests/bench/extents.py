"""What a file system says of its own space: what is in use, and what files share.

Linux only. The answers come from the file system, not from the program that is measured.
"""

from __future__ import annotations

import fcntl
import os
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_FIEMAP = 0xC020660B
_HEAD, _EXTENT = struct.Struct("=QQLLLL"), struct.Struct("=QQQQQLLLL")
_SYNC, _LAST, _UNWRITTEN, _SHARED = 0x1, 0x1, 0x800, 0x2000
_AT_ONCE = 512
_END = (1 << 64) - 1


def extents(path: Path) -> Iterator[tuple[int, int]]:
    """(bytes, flags) of each extent of a file, in order; holes have none."""
    with path.open("rb") as file:
        start = 0
        while True:
            request = bytearray(_HEAD.size + _AT_ONCE * _EXTENT.size)
            _HEAD.pack_into(request, 0, start, _END - start, _SYNC, 0, _AT_ONCE, 0)
            fcntl.ioctl(file.fileno(), _FIEMAP, request)
            found = _HEAD.unpack_from(request)[3]
            for number in range(found):
                fields = _EXTENT.unpack_from(request, _HEAD.size + number * _EXTENT.size)
                begin, nbytes, flags = fields[0], fields[2], fields[5]
                yield nbytes, flags
                start = begin + nbytes
                if flags & _LAST:
                    return
            if not found:
                return


@dataclass(frozen=True)
class Shared:
    """nbytes: of blocks that belong to another file as well; extents: how many pieces they are."""

    nbytes: int
    extents: int


NOTHING = Shared(0, 0)


def shared(folder: Path) -> Shared:
    """What the files below a folder share with others."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    found = [nbytes for path in paths for nbytes, flags in extents(path) if flags & _SHARED]
    return Shared(sum(found), len(found))


def settled_use(mount: Path) -> int:
    """Bytes in use on a file system, when all that was asked of it is done.

    A removed file's space comes back some time after it is gone. Waits until two looks agree, for
    a minute at most.
    """
    seen = -1
    for _ in range(120):
        os.sync()
        figures = os.statvfs(mount)
        used = (figures.f_blocks - figures.f_bfree) * figures.f_frsize
        if used == seen:
            return used
        seen = used
        time.sleep(0.5)
    sys.exit(f"{mount}: its use does not settle")


def give_back(mount: Path) -> None:
    """Have the image below a file system forget what was removed there, so that it stays small."""
    _do("fstrim", str(mount))


def mark_written(mount: Path) -> None:
    """Turn all that is allocated and unwritten below an XFS mount into written extents of zeros.

    XFS shares written extents only, and makes a hole of an unwritten one. Writing half a terabyte
    for that would need a disk of that size: instead the flag of every extent is cleared while the
    file system is not mounted, and its blocks, of which the sparse image has nothing, read as
    zeros. Raises RuntimeError where a file's extents are too many to lie in its inode, or where
    something is left unwritten.
    """
    files = [path for path in mount.rglob("*") if path.is_file()]
    words: list[str] = []
    for path in files:
        flags = [flags for _, flags in extents(path)]
        if any(flag & _UNWRITTEN for flag in flags):
            words += ["-c", f"inode {path.stat().st_ino}"]
    device = _do("findmnt", "--noheadings", "--output", "SOURCE", str(mount)).strip()
    _do("umount", str(mount))
    try:
        for place in words[1::2]:
            said = _do("xfs_db", "-r", "-c", place, "-c", "print core.format core.nextents", device)
            shape, count = (line.split(" = ")[1] for line in said.splitlines())
            if not shape.startswith("2 "):
                raise RuntimeError(f"{mount}: {place} has {count} extents, too many to lie in it")
            edits = [f"write u3.bmx[{number}].extentflag 0" for number in range(int(count))]
            chosen = [word for edit in edits for word in ("-c", edit)]
            _do("xfs_db", "-x", "-c", place, *chosen, device)
    finally:
        _do("mount", device, str(mount))
    if any(flags & _UNWRITTEN for path in files for _, flags in extents(path)):
        raise RuntimeError(f"{mount}: some of it is still unwritten")


def _do(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout
