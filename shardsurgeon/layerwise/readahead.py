"""What will be needed next is read while something else computes.

Beside `engine`. The bytes go through the system's page cache and are not kept here; a source that
has no files on this machine is left alone.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from io import FileIO

from shardsurgeon.layerwise.reading import ByteRange
from shardsurgeon.storage.base import Source

_PIECE = 8 << 20


class ReadAhead:
    """A thread that reads byte ranges, one list of them at a time; a context manager."""

    def __init__(self, source: Source, most_nbytes: int) -> None:
        """most_nbytes: how much of a list is read, what the system may keep in memory."""
        self._source = source
        self._most = most_nbytes
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()

    def begin(self, ranges: Iterable[ByteRange]) -> None:
        """Read these from now on, and no longer what was asked for before."""
        self.end()
        wanted = sorted(ranges, key=lambda part: (part.file, part.begin))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._read, args=(wanted, self._stop), daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Stop reading."""
        if self._thread is not None:
            self._stop.set()
            self._thread.join()
            self._thread = None

    def __enter__(self) -> ReadAhead:
        return self

    def __exit__(self, *failure: object) -> None:
        self.end()

    def _read(self, ranges: list[ByteRange], stop: threading.Event) -> None:
        buffer = memoryview(bytearray(_PIECE))
        left = self._most
        try:
            for part in ranges:
                path = self._source.local_path(part.file)
                if path is None or stop.is_set() or left <= 0:
                    return
                with FileIO(path) as file:
                    file.seek(part.begin)
                    at = part.begin
                    while at < part.end and not stop.is_set():
                        count = file.readinto(buffer[: min(_PIECE, part.end - at)])
                        if not count:
                            return
                        at += count
                left -= part.end - part.begin
        except OSError:
            # Whoever needs the bytes reads them again, and reports what is wrong.
            return
