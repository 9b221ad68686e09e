"""Files that a user names and that may be none: pipes and devices, opened without a wait for ever.

A pipe is a good place for what is read or written once, from begin to end (`<(…)`, `>(…)`,
/dev/stdin). Opened the plain way it waits for its other end, which may never come.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from io import FileIO
from pathlib import Path

# How long the other end of a pipe may take to come.
PATIENCE_SECONDS = 5.0
_PAUSE_SECONDS = 0.05
_CHUNK_NBYTES = 1 << 16
# Windows has neither, and no pipes by path.
_AT_ONCE = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0) | getattr(os, "O_BINARY", 0)


def is_stream(mode: int) -> bool:
    """Whether a file of this mode is a pipe or a device, and is read and written as it comes."""
    return stat.S_ISCHR(mode) or stat.S_ISFIFO(mode)


def open_file(path: str | os.PathLike[str]) -> FileIO:
    """A file that the user named, to be read at any place and more than once.

    Raises OSError, whose words say it, for what is none.
    """
    file = _open(path)
    mode = os.fstat(file.fileno()).st_mode
    if not stat.S_ISREG(mode):
        file.close()
        raise OSError(errno.ESPIPE, "it is a pipe or a device; save it to a file first")
    return file


def read_once(path: str | os.PathLike[str], limit: int) -> bytes:
    """The first `limit` bytes of a file that the user named; a pipe or a device will do.

    Raises OSError, whose words say it, for what is neither, and for a pipe that nobody writes
    into.
    """
    with _open(path) as file:
        status = os.fstat(file.fileno())
        if not is_stream(status.st_mode):
            # Python reserves as many bytes as are asked for, so no more than the file has.
            return file.read(min(limit, status.st_size + 1)) or b""
        data = bytearray(_first_bytes(file) if stat.S_ISFIFO(status.st_mode) else b"")
        os.set_blocking(file.fileno(), True)
        while chunk := file.read(min(_CHUNK_NBYTES, limit - len(data))):
            data += chunk
        return bytes(data)


def _open(path: str | os.PathLike[str]) -> FileIO:
    file = FileIO(os.fspath(path), opener=lambda name, flags: os.open(name, flags | _AT_ONCE))
    if stat.S_ISDIR(os.fstat(file.fileno()).st_mode):
        file.close()
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    return file


def _first_bytes(pipe: FileIO) -> bytes:
    """What comes first, nothing where there is a writer that has written nothing yet."""
    until = time.monotonic() + PATIENCE_SECONDS
    # A read that would have to wait has a writer, one that finds the end has none.
    while (data := pipe.read(1)) == b"":
        if time.monotonic() > until:
            raise OSError(errno.EPIPE, "it is a pipe that nobody writes into")
        time.sleep(_PAUSE_SECONDS)
    return data or b""


def write_into(path: Path, data: bytes) -> None:
    """Write into a pipe or a device. Raises OSError, for a pipe that nobody reads as well."""
    until = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            stream = os.open(path, os.O_WRONLY | _AT_ONCE)
            break
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
        if time.monotonic() > until:
            raise OSError(errno.EPIPE, "it is a pipe that nobody reads")
        time.sleep(_PAUSE_SECONDS)
    with FileIO(stream, "w") as file:
        os.set_blocking(stream, True)
        left = memoryview(data)
        while left:
            left = left[file.write(left) :]
