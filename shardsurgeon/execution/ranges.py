"""An output file as byte ranges to copy: pure arithmetic between a plan and its execution.

It says which ranges make up a shard, what of them is still to be done, and what a worker takes
at a time. Batches touch disjoint ranges of the output, so any number of workers may write at
once, in any order.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from shardsurgeon.execution.plan import Literal, OutputShard, Segment

# The first byte of a range of an output file, and one past its last.
Range = tuple[int, int]


@dataclass(frozen=True, slots=True)
class CopyRange:
    """Copy these bytes to offset `at` of the output file."""

    piece: Segment | Literal
    at: int

    @property
    def end(self) -> int:
        """One past the last byte that is written."""
        return self.at + self.piece.nbytes


def copy_ranges(shard: OutputShard) -> list[CopyRange]:
    """All of a shard: literals first, then ranges in the order in which the source has them.

    Segments that follow one another both in the source and in the shard become one.
    """
    made = shard.pieces
    end = len(shard.header) + np.cumsum(made.nbytes)
    at = end - made.nbytes
    literals = [CopyRange(Literal(shard.header), 0)]
    for place in np.flatnonzero((made.file < 0) & (made.nbytes > 0)).tolist():
        literals.append(CopyRange(Literal(made.literals[made.begin[place]]), int(at[place])))
    places = np.flatnonzero((made.file >= 0) & (made.nbytes > 0))
    file, begin, at, end = (column[places] for column in (made.file, made.begin, at, end))
    shift = begin - at
    first = np.ones(len(places), bool)
    first[1:] = (file[1:] != file[:-1]) | (at[1:] != end[:-1]) | (shift[1:] != shift[:-1])
    heads = np.flatnonzero(first)
    nbytes = end[np.append(heads[1:], len(places)) - 1] - at[heads] if len(heads) else heads
    columns = file[heads], begin[heads], nbytes, at[heads]
    rows = zip(*(column.tolist() for column in columns), strict=True)
    ranges = [CopyRange(Segment(made.files[f], b, n), a) for f, b, n, a in rows]
    return literals + sorted(ranges, key=_place_in_source)


def _place_in_source(copy: CopyRange) -> tuple[str, int]:
    assert isinstance(copy.piece, Segment)
    return copy.piece.file, copy.piece.begin


def batches(ranges: Iterable[CopyRange], limit: int) -> list[tuple[CopyRange, ...]]:
    """Group ranges, in order, into batches of at most `limit` bytes; a longer range is cut."""
    grouped: list[tuple[CopyRange, ...]] = []
    batch: list[CopyRange] = []
    room = limit
    for copy in ranges:
        for part in _cut(copy, limit):
            if batch and part.piece.nbytes > room:
                grouped.append(tuple(batch))
                batch, room = [], limit
            batch.append(part)
            room -= part.piece.nbytes
    return [*grouped, tuple(batch)] if batch else grouped


def _cut(copy: CopyRange, limit: int) -> Iterator[CopyRange]:
    piece = copy.piece
    if isinstance(piece, Literal) or piece.nbytes <= limit:
        yield copy
        return
    for done in range(0, piece.nbytes, limit):
        yield _part(copy, copy.at + done, min(copy.at + done + limit, copy.end))


def remaining(ranges: Iterable[CopyRange], written: Sequence[Range]) -> list[CopyRange]:
    """The ranges, in order, without what they would write where `written` says it is done.

    written: ascending and not touching one another, as `joined` returns them.
    """
    if not written:
        return list(ranges)
    begins = [begin for begin, _ in written]
    return [part for copy in ranges for part in _remaining(copy, written, begins)]


def _remaining(
    copy: CopyRange, written: Sequence[Range], begins: Sequence[int]
) -> Iterator[CopyRange]:
    at = copy.at
    for begin, end in written[max(bisect_right(begins, at) - 1, 0) :]:
        if begin >= copy.end:
            break
        if at < begin:
            yield _part(copy, at, begin)
        at = max(at, end)
    if at < copy.end:
        yield _part(copy, at, copy.end)


def _part(copy: CopyRange, begin: int, end: int) -> CopyRange:
    """The part of a range that writes [begin, end) of the output."""
    skipped, piece = begin - copy.at, copy.piece
    if isinstance(piece, Literal):
        return CopyRange(Literal(piece.data[skipped : end - copy.at]), begin)
    return CopyRange(Segment(piece.file, piece.begin + skipped, end - begin), begin)


def joined(ranges: Iterable[Range]) -> list[Range]:
    """The same bytes in as few ranges as possible: ascending, none empty, none touching another."""
    apart: list[Range] = []
    for begin, end in sorted(ranges):
        if apart and begin <= apart[-1][1]:
            apart[-1] = (apart[-1][0], max(end, apart[-1][1]))
        elif begin < end:
            apart.append((begin, end))
    return apart
