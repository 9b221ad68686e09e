"""Ranges of a source that has no local files, fetched by as few requests as its bytes allow.

`copying` hands over the moves of one source file. Where the gap between two of them is narrow, one
request fetches both and reads over it; `widest_gap` says how wide that may be, so that a whole
run reads over at most a hundredth of what it wants.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from io import FileIO
from itertools import pairwise

from shardsurgeon.errors import SourceReadError
from shardsurgeon.execution.moves import Move
from shardsurgeon.execution.progress import Meter
from shardsurgeon.execution.surgeryplan import Segment
from shardsurgeon.storage.base import Source
from shardsurgeon.storage.durable import write_all
from shardsurgeon.storage.system import System

# Reading over more than this takes longer than another request does.
MOST_READ_OVER = 1 << 20
# One byte in so many may be read without being wanted.
_WANTED_PER_SURPLUS = 100


class Downloader:
    """Streams ranges of a source into open files. As many threads as like may use one."""

    def __init__(self, source: Source, system: System, meter: Meter, gap: int) -> None:
        """gap: how many bytes between two moves are read over rather than left out."""
        self._source = source
        self._system = system
        self._meter = meter
        self._gap = gap

    def fetch(self, name: str, moves: Sequence[Move], target: FileIO) -> None:
        """Carry out moves, ascending, from the source file `name`.

        Raises what the source raises, and OutputWriteError.
        """
        for request in requests(moves, self._gap):
            self._stream(name, request, target)

    def _stream(self, name: str, moves: Sequence[Move], target: FileIO) -> None:
        at, end = _begin(moves[0]), _end(moves[-1])
        first = 0  # moves before this one have all their bytes
        with closing(self._pieces(name, at, end)) as pieces:
            for piece in pieces:
                while first < len(moves) and _end(moves[first]) <= at:
                    first += 1
                self._scatter(memoryview(piece), at, moves, first, target)
                at += len(piece)
        if at < end:
            raise SourceReadError(
                f"{self._source.location}/{name}",
                f"ended at byte {at:,}, byte {end:,} was expected",
                "run the same command again",
            )

    def _pieces(self, name: str, begin: int, end: int) -> Generator[bytes]:
        """The bytes as they arrive, counted; whatever happens, the connection is let go."""
        if begin == end:
            return
        pieces = self._source.stream(name, begin, end)
        try:
            for piece in pieces:
                self._meter.receive(len(piece) if self._source.is_remote else 0)
                yield piece
        finally:
            if isinstance(pieces, Generator):
                pieces.close()

    def _scatter(
        self, data: memoryview, begin: int, moves: Sequence[Move], first: int, target: FileIO
    ) -> None:
        """Write what the moves from `first` on want of the bytes that lie at `begin`."""
        end = begin + len(data)
        for number in range(first, len(moves)):
            move = moves[number]
            wanted = max(_begin(move), begin)
            if wanted >= end:
                break
            part = data[wanted - begin : _end(move) - begin]
            at = move.at + wanted - _begin(move)
            write_all(target, part, at, str(target.name), self._system)
            self._meter.advance(len(part))


def requests(moves: Sequence[Move], gap: int) -> Iterator[Sequence[Move]]:
    """Cut the moves of one file, ascending, where more than `gap` bytes lie between two."""
    begun = 0
    for number in range(1, len(moves)):
        if not 0 <= _begin(moves[number]) - _end(moves[number - 1]) <= gap:
            yield moves[begun:number]
            begun = number
    if moves:
        yield moves[begun:]


def gaps(moves: Iterable[Move]) -> Iterator[int]:
    """How many unwanted bytes lie between moves that follow one another in one source file."""
    segments = (move.piece for move in moves if isinstance(move.piece, Segment))
    for one, other in pairwise(segments):
        if one.file == other.file and other.begin > one.begin + one.nbytes:
            yield other.begin - one.begin - one.nbytes


def widest_gap(found: Counter[int], wanted: int) -> int:
    """The widest gap that may be read over together with all that are as narrow or narrower.

    found: width → how many such gaps the run meets; wanted: bytes that the run wants.
    """
    widest = surplus = 0
    for width, count in sorted(found.items()):
        surplus += width * count
        if width > MOST_READ_OVER or surplus * _WANTED_PER_SURPLUS > wanted:
            break
        widest = width
    return widest


def _begin(move: Move) -> int:
    assert isinstance(move.piece, Segment)
    return move.piece.begin


def _end(move: Move) -> int:
    assert isinstance(move.piece, Segment)
    return move.piece.begin + move.piece.nbytes
