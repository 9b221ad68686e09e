"""One batch of byte ranges moved: shared or copied where the source is local, else downloaded.

Batches touch disjoint ranges of the output, so any number of workers may move them at once, in
any order. Downloads join ranges that lie close together into one request and throw away what is
between them, within a limit on the bytes wasted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from io import FileIO
from itertools import groupby, pairwise
from pathlib import Path

from shardsurgeon.errors import SourceReadError
from shardsurgeon.execution.plan import Literal, Segment
from shardsurgeon.execution.ranges import CopyRange, Range, whole_block_ranges
from shardsurgeon.execution.workers import ProgressMeter
from shardsurgeon.storage.files import FileCopier, open_regular, write_all, writing
from shardsurgeon.storage.sharing import BlockSharing
from shardsurgeon.storage.source import Source
from shardsurgeon.storage.system import System

# Downloading more unneeded bytes than this takes longer than another request.
MAX_GAP_NBYTES = 1 << 20
# Of so many bytes that are wanted, one more may be downloaded in vain.
_WANTED_PER_SURPLUS = 100


class RangeTransfer:
    """Writes batches of ranges from a source into files. One per worker: it owns a copy buffer."""

    def __init__(
        self,
        source: Source,
        system: System,
        meter: ProgressMeter,
        gap: int = 0,
        sharing: BlockSharing | None = None,
    ) -> None:
        """meter: told of every step; what it raises ends the batch. gap: see `Downloader`.
        sharing: what the targets share with the source; None for nothing."""
        self._source = source
        self._system = system
        self._meter = meter
        self._copier = FileCopier(system, meter.advance, sharing)
        self._downloader = Downloader(source, system, meter, gap)

    def write(
        self, batch: Sequence[CopyRange], target: Path, earlier: Sequence[Range] = ()
    ) -> list[Range]:
        """Write a batch into the existing file `target`, and release the memory it takes.

        Memory goes in two steps: what has just been written begins to be put on the disk, and goes
        when the ranges that were returned come back as `earlier`, with a later batch. Blocks that
        hold but an edge of a range stay until the file is finished: they are soon written again,
        and would have to be read for it.

        Raises OutputWriteError, or what reading the source raises; the error names the file.
        """
        with writing(target):
            file = FileIO(target, "r+")
        with file:
            for name, ranges in groupby(batch, key=_source_file):
                self._write_from(name, list(ranges), file)
            written = whole_block_ranges(batch)
            for begin, end in (*earlier, *written):
                self._system.let_go(file, begin, end)
        return written

    def copy_file(self, path: Path, nbytes: int, target: Path) -> None:
        """Copy the first `nbytes` of a local file outside the source into `target`."""
        with writing(target):
            file = FileIO(target, "r+")
        with file, open_regular(path) as origin:
            self._copier.copy(origin, file, [(0, 0, nbytes)])

    def _write_from(self, name: str | None, ranges: list[CopyRange], target: FileIO) -> None:
        """Write ranges of one source file, ascending. name: None for literals."""
        if name is None:
            for copy in ranges:
                self._put(copy, target)
            return
        origin = self._source.open(name)
        if origin is None:
            self._downloader.fetch(name, ranges, target)
            return
        with origin:
            self._copy(origin, ranges, target)

    def _copy(self, origin: FileIO, ranges: list[CopyRange], target: FileIO) -> None:
        """Copy from a local file, and leave the page cache as it was.

        A model larger than memory must not push everything else out of it; pages that were
        cached before, because another program uses them, stay.
        """
        first, last = ranges[0].piece, ranges[-1].piece
        assert isinstance(first, Segment) and isinstance(last, Segment)
        end = last.begin + last.nbytes
        # Asked of the last byte: the first ones may be cached because of read-ahead.
        found = self._system.in_memory(origin, max(end - 1, 0))
        parts = ((_begin(copy), copy.at, copy.piece.nbytes) for copy in ranges)
        self._copier.copy(origin, target, parts)
        if not found:
            self._system.let_go(origin, first.begin, end)

    def _put(self, copy: CopyRange, target: FileIO) -> None:
        assert isinstance(copy.piece, Literal)
        write_all(target, copy.piece.data, copy.at, str(target.name), self._system)
        self._meter.advance(copy.piece.nbytes)


def _source_file(copy: CopyRange) -> str | None:
    return copy.piece.file if isinstance(copy.piece, Segment) else None


class Downloader:
    """Streams ranges of a source into open files. Any number of threads may share one."""

    def __init__(self, source: Source, system: System, meter: ProgressMeter, gap: int) -> None:
        """gap: up to so many unneeded bytes between two ranges are downloaded with them."""
        self._source = source
        self._system = system
        self._meter = meter
        self._gap = gap

    def fetch(self, name: str, ranges: Sequence[CopyRange], target: FileIO) -> None:
        """Fetch ranges, ascending, of the source file `name`.

        Raises what the source raises, and OutputWriteError.
        """
        for request in requests(ranges, self._gap):
            self._stream(name, request, target)

    def _stream(self, name: str, ranges: Sequence[CopyRange], target: FileIO) -> None:
        at, end = _begin(ranges[0]), _end(ranges[-1])
        first = 0  # ranges before this one have all their bytes
        with closing(self._pieces(name, at, end)) as pieces:
            for piece in pieces:
                while first < len(ranges) and _end(ranges[first]) <= at:
                    first += 1
                self._scatter(memoryview(piece), at, ranges, first, target)
                at += len(piece)
        if at < end:
            raise SourceReadError(
                f"{self._source.location}/{name}",
                f"ended at byte {at:,}, byte {end:,} was expected",
                "run the same command again",
            )

    def _pieces(self, name: str, begin: int, end: int) -> Generator[bytes]:
        """The bytes as they arrive, counted; the connection is closed whatever happens."""
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
        self, data: memoryview, begin: int, ranges: Sequence[CopyRange], first: int, target: FileIO
    ) -> None:
        """Write what the ranges from `first` on need of `data`, at `begin` in the source."""
        end = begin + len(data)
        for number in range(first, len(ranges)):
            copy = ranges[number]
            wanted = max(_begin(copy), begin)
            if wanted >= end:
                break
            part = data[wanted - begin : _end(copy) - begin]
            at = copy.at + wanted - _begin(copy)
            write_all(target, part, at, str(target.name), self._system)
            self._meter.advance(len(part))


def requests(ranges: Sequence[CopyRange], gap: int) -> Iterator[Sequence[CopyRange]]:
    """Group the ranges of one file, ascending, so that at most `gap` bytes lie between two."""
    begun = 0
    for number in range(1, len(ranges)):
        if not 0 <= _begin(ranges[number]) - _end(ranges[number - 1]) <= gap:
            yield ranges[begun:number]
            begun = number
    if ranges:
        yield ranges[begun:]


def gaps(ranges: Iterable[CopyRange]) -> Iterator[int]:
    """The number of unneeded bytes between each two neighbouring ranges of one source file."""
    segments = (copy.piece for copy in ranges if isinstance(copy.piece, Segment))
    for one, other in pairwise(segments):
        if one.file == other.file and other.begin > one.begin + one.nbytes:
            yield other.begin - one.begin - one.nbytes


def max_gap(found: Counter[int], wanted: int) -> int:
    """The widest gap that may be downloaded, if all gaps up to that width are.

    found: width -> how many such gaps the run has; wanted: bytes that the run needs. At most a
    hundredth of `wanted` is downloaded in vain, and no gap wider than MAX_GAP_NBYTES.
    """
    widest = surplus = 0
    for width, count in sorted(found.items()):
        surplus += width * count
        if width > MAX_GAP_NBYTES or surplus * _WANTED_PER_SURPLUS > wanted:
            break
        widest = width
    return widest


def _begin(copy: CopyRange) -> int:
    assert isinstance(copy.piece, Segment)
    return copy.piece.begin


def _end(copy: CopyRange) -> int:
    assert isinstance(copy.piece, Segment)
    return copy.piece.begin + copy.piece.nbytes
