"""The hands that carry out a plan's moves: a copy where the bytes are near, else a download.

`filling` and `smallfiles` give batches of moves (`moves`) to a `Mover`; batches touch disjoint
ranges, so any number of movers may work at once, in any order.
"""

from __future__ import annotations

from collections.abc import Sequence
from io import FileIO
from itertools import groupby
from pathlib import Path

from shardsurgeon.execution.downloads import Downloader
from shardsurgeon.execution.moves import Move
from shardsurgeon.execution.progress import Meter
from shardsurgeon.execution.surgeryplan import Literal, Segment
from shardsurgeon.storage.base import Source
from shardsurgeon.storage.durable import Copier, reading, write_all, writing
from shardsurgeon.storage.system import System


class Mover:
    """Moves batches from a source into files. One per worker: it owns a copy buffer."""

    def __init__(self, source: Source, system: System, meter: Meter, gap: int = 0) -> None:
        """meter: hears of every step; what it raises ends the batch. gap: see `Downloader`."""
        self._source = source
        self._system = system
        self._meter = meter
        self._copier = Copier(system, meter.advance)
        self._downloader = Downloader(source, system, meter, gap)

    def move(self, batch: Sequence[Move], target: Path) -> None:
        """Write a batch into the existing file `target`, and let memory go of it.

        Raises OutputWriteError, or what reading the source raises, with the name of the file
        at fault.
        """
        with writing(target):
            file = FileIO(target, "r+")
        with file:
            for name, moves in groupby(batch, key=_source_file):
                self._move(name, list(moves), file)
            # From the file's begin on: what earlier batches left has reached the disk by now.
            self._system.let_go(file, 0, max(move.at + move.piece.nbytes for move in batch))

    def copy_file(self, path: Path, nbytes: int, target: Path) -> None:
        """Copy the first `nbytes` of a local file that is in no source into `target`."""
        with writing(target):
            file = FileIO(target, "r+")
        with file, _opened(path) as origin:
            self._copier.copy(origin, 0, file, 0, nbytes)

    def _move(self, name: str | None, moves: list[Move], target: FileIO) -> None:
        """Moves from one source file, ascending; without a name they bring their own bytes."""
        if name is None:
            for move in moves:
                self._put(move, target)
            return
        path = self._source.local_path(name)
        if path is None:
            self._downloader.fetch(name, moves, target)
        else:
            self._copy(path, moves, target)

    def _copy(self, path: Path, moves: list[Move], target: FileIO) -> None:
        """Copy from a local file, which leaves the system's memory as it was found.

        A model larger than the memory must not push everything else out of it; what others
        have in use stays.
        """
        first, last = moves[0].piece, moves[-1].piece
        assert isinstance(first, Segment) and isinstance(last, Segment)
        end = last.begin + last.nbytes
        with _opened(path) as origin:
            # The last byte: the first ones may be there because they were read ahead.
            found = self._system.in_memory(origin, max(end - 1, 0))
            for move in moves:
                assert isinstance(move.piece, Segment)
                begin, nbytes = move.piece.begin, move.piece.nbytes
                self._copier.copy(origin, begin, target, move.at, nbytes)
            if not found:
                self._system.let_go(origin, first.begin, end)

    def _put(self, move: Move, target: FileIO) -> None:
        assert isinstance(move.piece, Literal)
        write_all(target, move.piece.data, move.at, str(target.name), self._system)
        self._meter.advance(move.piece.nbytes)


def _source_file(move: Move) -> str | None:
    return move.piece.file if isinstance(move.piece, Segment) else None


def _opened(path: Path) -> FileIO:
    with reading(path):
        return FileIO(str(path))
