"""An output file as byte ranges to copy: pure arithmetic between a plan and its execution.

It says which ranges make up a shard, what of them is still to be done, and what a worker takes
at a time. Batches touch disjoint ranges of the output, so any number of workers may write at
once, in any order.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from shardsurgeon.execution.plan import Literal, OutputShard, Segment

# First and one past the last byte of a stretch of an output file.
Range = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Move:
    """These bytes go to offset `at` of the output file."""

    piece: Segment | Literal
    at: int

    @property
    def end(self) -> int:
        """One past the last byte that is written."""
        return self.at + self.piece.nbytes


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
        yield _part(move, move.at + done, min(move.at + done + limit, move.end))


def remaining(moves: Iterable[Move], written: Sequence[Range]) -> list[Move]:
    """The moves, in order, without what they would write into the ranges `written`.

    written: ascending, apart from one another, as `joined` gives them.
    """
    if not written:
        return list(moves)
    begins = [begin for begin, _ in written]
    return [part for move in moves for part in _remaining(move, written, begins)]


def _remaining(move: Move, written: Sequence[Range], begins: Sequence[int]) -> Iterator[Move]:
    at = move.at
    for begin, end in written[max(bisect_right(begins, at) - 1, 0) :]:
        if begin >= move.end:
            break
        if at < begin:
            yield _part(move, at, begin)
        at = max(at, end)
    if at < move.end:
        yield _part(move, at, move.end)


def _part(move: Move, begin: int, end: int) -> Move:
    """What a move writes to [begin, end) of the output."""
    skipped, piece = begin - move.at, move.piece
    if isinstance(piece, Literal):
        return Move(Literal(piece.data[skipped : end - move.at]), begin)
    return Move(Segment(piece.file, piece.begin + skipped, end - begin), begin)


def joined(ranges: Iterable[Range]) -> list[Range]:
    """The same bytes as few ranges, ascending, none empty, none touching another."""
    apart: list[Range] = []
    for begin, end in sorted(ranges):
        if apart and begin <= apart[-1][1]:
            apart[-1] = (apart[-1][0], max(end, apart[-1][1]))
        elif begin < end:
            apart.append((begin, end))
    return apart
