"""The bytes of one file of a source, block by block, through one buffer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

from shardsurgeon.durable import read_into, reading
from shardsurgeon.sources.base import Source
from shardsurgeon.system import default_system


class Blocks:
    """One file, open. Not for several threads at once."""

    def __init__(self, source: Source, name: str, file: FileIO | None) -> None:
        """file: the open file where the source has local ones."""
        self._source = source
        self._name = name
        self._file = file
        self._where = source.local_path(name)
        self._system = default_system()
        self._buffer = bytearray()
        self.begin, self.end = 0, 0

    def read(self, begin: int, nbytes: int) -> bytes | bytearray:
        """Exactly `nbytes` from offset `begin`, good until the next read.

        Raises SourceReadError where the file is too short.
        """
        self.begin = min(self.begin or begin, begin)
        self.end = max(self.end, begin + nbytes)
        if self._file is None or self._where is None:
            return self._source.read(self._name, begin, begin + nbytes)
        if len(self._buffer) != nbytes:
            self._buffer = bytearray(nbytes)
        read_into(self._file, memoryview(self._buffer), begin, self._where, self._system)
        return self._buffer


@contextmanager
def opened(source: Source, name: str, last: int) -> Iterator[Blocks]:
    """A file for reading up to about byte `last`, which leaves the system's memory as it was.

    Raises SourceReadError where it cannot be opened.
    """
    path = source.local_path(name)
    if path is None:
        yield Blocks(source, name, None)
        return
    system = default_system()
    with _open(path) as file:
        found = system.in_memory(file, last)
        blocks = Blocks(source, name, file)
        yield blocks
        if not found:
            system.let_go(file, blocks.begin, blocks.end)


def _open(path: Path) -> FileIO:
    with reading(path):
        return FileIO(str(path))
