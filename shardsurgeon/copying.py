"""An output file as byte ranges to move, and the hands that move them.

`execution` asks `batches` what is to be done for a file and gives each batch to a `Mover`;
batches touch disjoint ranges, so any number of movers may work at once, in any order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import FileIO
from itertools import groupby
from pathlib import Path

from shardsurgeon.durable import Copier, reading, write_all, writing
from shardsurgeon.sources.base import Source
from shardsurgeon.surgeryplan import Literal, OutputShard, Segment
from shardsurgeon.system import System

# What a worker takes at a time: big enough that opening files costs nothing, small enough that
# several workers share one big tensor.
BATCH_NBYTES = 64 << 20
# What is asked of a source without local files in one go; it passes through memory.
READ_NBYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Move:
    """These bytes go to offset `at` of the output file."""

    piece: Segment | Literal
    at: int


def batches(moves: Iterable[Move], limit: int) -> list[tuple[Move, ...]]:
    """Group moves, in order, into batches of at most `limit` bytes; longer moves are cut."""
    grouped: list[tuple[Move, ...]] = []
    batch: list[Move] = []
    room = limit
    for move in moves:
        for part in _cut(move, limit):
            if batch and part.piece.nbytes > room:
                grouped.append(tuple(batch))
                batch, room = [], limit
            batch.append(part)
            room -= part.piece.nbytes
    return [*grouped, tuple(batch)] if batch else grouped


def _cut(move: Move, limit: int) -> Iterator[Move]:
    piece = move.piece
    if isinstance(piece, Literal) or piece.nbytes <= limit:
        yield move
        return
    for done in range(0, piece.nbytes, limit):
        nbytes = min(limit, piece.nbytes - done)
        yield Move(Segment(piece.file, piece.begin + done, nbytes), move.at + done)


def shard_moves(shard: OutputShard) -> list[Move]:
    """What makes up a shard: literals first, then ranges in the order they lie in the source.

    Segments that follow one another both in the source and in the shard become one.
    """
    literals = [Move(Literal(shard.header), 0)]
    ranges: list[Move] = []
    at = len(shard.header)
    last: Segment | None = None
    for piece in (piece for tensor in shard.tensors for piece in tensor.pieces if piece.nbytes):
        if isinstance(piece, Literal):
            literals.append(Move(piece, at))
            last = None
        elif last and (last.file, last.begin + last.nbytes) == (piece.file, piece.begin):
            last = Segment(last.file, last.begin, last.nbytes + piece.nbytes)
            ranges[-1] = Move(last, ranges[-1].at)
        else:
            last = piece
            ranges.append(Move(piece, at))
        at += piece.nbytes
    return literals + sorted(ranges, key=_place_in_source)


def _place_in_source(move: Move) -> tuple[str, int]:
    assert isinstance(move.piece, Segment)
    return move.piece.file, move.piece.begin


class Mover:
    """Moves batches from a source into files. One per worker: it owns a copy buffer."""

    def __init__(self, source: Source, system: System, advance: Callable[[int], None]) -> None:
        """advance: hears the size, in bytes, of every step; what it raises ends the batch."""
        self._source = source
        self._system = system
        self._advance = advance
        self._copier = Copier(system, advance)

    def move(self, batch: Sequence[Move], target: Path) -> None:
        """Write a batch into the existing file `target`, and let memory go of it.

        Raises SourceReadError or OutputWriteError, with the name of the file at fault.
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
        path = None if name is None else self._source.local_path(name)
        if path is not None:
            self._copy(path, moves, target)
            return
        for move in moves:
            if isinstance(move.piece, Literal):
                self._put(move.piece.data, target, move.at)
            else:
                self._fetch(move.piece, target, move.at)

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

    def _fetch(self, piece: Segment, target: FileIO, at: int) -> None:
        for done in range(0, piece.nbytes, READ_NBYTES):
            begin = piece.begin + done
            end = min(begin + READ_NBYTES, piece.begin + piece.nbytes)
            self._put(self._source.read(piece.file, begin, end), target, at + done)

    def _put(self, data: bytes, target: FileIO, at: int) -> None:
        write_all(target, data, at, str(target.name), self._system)
        self._advance(len(data))


def _source_file(move: Move) -> str | None:
    return move.piece.file if isinstance(move.piece, Segment) else None


def _opened(path: Path) -> FileIO:
    with reading(path):
        return FileIO(str(path))
