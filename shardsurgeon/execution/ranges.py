"""An output file as byte ranges to copy: pure arithmetic between a plan and its execution.

It says which ranges make up a shard, what of them is still to be done, and what a worker takes
at a time, and which bytes need room of their own where blocks can be shared with the source.
Batches touch disjoint ranges of the output, so any number of workers may write at once, in any
order.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from shardsurgeon.execution.plan import Literal, OutputShard, Segment
from shardsurgeon.storage.sharing import whole_blocks
from shardsurgeon.units import BLOCK_NBYTES

# Where blocks are shared, a smaller range between them is not worth a call that claims its blocks.
_CLAIMED_NBYTES = 64 << 10

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
    """Group ranges, in order, into batches of at most `limit` bytes; a longer range is cut.

    It is cut between two blocks of the output, so that both parts can be shared to their ends.
    """
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
    begin = copy.at
    while copy.end - begin > limit and not isinstance(copy.piece, Literal):
        end = begin + limit
        between = end // BLOCK_NBYTES * BLOCK_NBYTES
        end = between if between > begin else end
        yield _part(copy, begin, end)
        begin = end
    yield copy if begin == copy.at else _part(copy, begin, copy.end)


def whole_block_ranges(ranges: Iterable[CopyRange]) -> list[Range]:
    """The blocks of the output that these ranges fill wholly, in as few ranges as possible."""
    filled = (
        (-(-begin // BLOCK_NBYTES) * BLOCK_NBYTES, end // BLOCK_NBYTES * BLOCK_NBYTES)
        for begin, end in joined((copy.at, copy.end) for copy in ranges)
    )
    return [(begin, end) for begin, end in filled if begin < end]


def shared_nbytes(ranges: Iterable[CopyRange], sharable: Collection[str]) -> int:
    """How many bytes of the output lie in blocks shared with the files of `sharable`."""
    total = 0
    for copy in ranges:
        if isinstance(copy.piece, Segment) and copy.piece.file in sharable:
            first, last = whole_blocks(copy.piece.begin, copy.at, copy.piece.nbytes)
            total += last - first
    return total


def claimed_ranges(ranges: Iterable[CopyRange], sharable: Collection[str]) -> list[Range]:
    """The ranges of the output whose blocks are to be claimed before they are written: what is not
    shared with the files of `sharable`, but for small ranges between shared ones."""
    found = joined(_written(ranges, sharable))
    if len(found) == 1:
        return found
    return [(begin, end) for begin, end in found if end - begin >= _CLAIMED_NBYTES]


def _written(ranges: Iterable[CopyRange], sharable: Collection[str]) -> Iterator[Range]:
    for copy in ranges:
        first = last = copy.at
        if isinstance(copy.piece, Segment) and copy.piece.file in sharable:
            first, last = whole_blocks(copy.piece.begin, copy.at, copy.piece.nbytes)
        if copy.at < first:
            yield copy.at, first
        if last < copy.end:
            yield last, copy.end


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
