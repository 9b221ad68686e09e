"""Ranges of the source's files against ranges of the output's: block by block, few requests.

Files here are read ahead. Over a network, what will be compared is said before, so that neighbours
come in one answer; nothing is held but a block of each side.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from types import TracebackType

from shardsurgeon.checkpoint.checkpoint import Checkpoint
from shardsurgeon.errors import SourceReadError
from shardsurgeon.storage.files import read_into
from shardsurgeon.storage.source import Source
from shardsurgeon.storage.system import default_system

# What is read of each side at a time; memory is twice this per worker.
BLOCK_NBYTES = 1 << 20
# What is read at least of a file here, so that small tensors and short rows need no call each; of
# tensors that were picked here and there, whose neighbours are not asked for, so much.
_AHEAD_NBYTES = 1 << 18
_APART_NBYTES = 1 << 14
# Over a network a gap of so many bytes costs less than another request.
GAP_NBYTES = 1 << 16

# Bytes of a file: its name, where they begin, how many.
Stretch = tuple[str, int, int]


@dataclass(frozen=True, slots=True)
class Step:
    """A stretch that was compared. differs: how many of its bytes are equal before the first
    that is not, None where all are."""

    nbytes: int
    differs: int | None


class RangeComparer:
    """Compares ranges of source files with ranges of output files. For one thread."""

    def __init__(self, source: Checkpoint, pruned: Checkpoint, *, apart: bool = False) -> None:
        """apart: whether what is compared lies far apart."""
        ahead = _APART_NBYTES if apart else _AHEAD_NBYTES
        self._source = _BufferedFile(source, ahead)
        self._pruned = _BufferedFile(pruned, ahead)

    def __enter__(self) -> RangeComparer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._source.close()
        self._pruned.close()

    def expect(self, source: Iterator[Stretch], pruned: Iterator[Stretch], gap: int = 0) -> None:
        """Say what will be read of either side, in order; some of it may then be left out.

        Over a network, stretches with at most `gap` bytes between them are one request.
        """
        self._source.coming = _joined(source, gap)
        self._pruned.coming = _joined(pruned, gap)

    def steps(
        self, source_file: str, source_begin: int, file: str, begin: int, nbytes: int
    ) -> Iterator[Step]:
        """Compare block after block, until all are compared or one differs.

        Raises SourceReadError, naming the file, where either side cannot be read.
        """
        self._source.expect(source_file, source_begin, nbytes)
        with _as_output_error():
            self._pruned.expect(file, begin, nbytes)
        done = 0
        while done < nbytes:
            size = min(BLOCK_NBYTES, nbytes - done)
            left = self._source.hold(source_file, source_begin + done, size)
            with _as_output_error():
                right = self._pruned.hold(file, begin + done, size)
            if not self._equal(left, right, size):
                yield Step(size, self._first_difference(left, right, size))
                return
            yield Step(size, None)
            done += size

    def same_file(self, source_file: str, file: str, nbytes: int) -> bool:
        """Whether two files of `nbytes` hold the same bytes."""
        return all(step.differs is None for step in self.steps(source_file, 0, file, 0, nbytes))

    def expected(self, source_file: str, begin: int, nbytes: int) -> bytes:
        """`nbytes` of a source file, for the few tensors whose values count."""
        return b"".join(self._source.pieces(source_file, begin, nbytes))

    def found(self, file: str, begin: int, nbytes: int) -> bytes:
        """`nbytes` of an output file."""
        with _as_output_error():
            return b"".join(self._pruned.pieces(file, begin, nbytes))

    def _equal(self, left: int, right: int, nbytes: int) -> bool:
        # `startswith` compares two buffers where they are and at once; `==` on memoryviews goes
        # byte by byte, and slices of a bytearray are copies.
        return self._source.buffer.startswith(self._pruned.view[right : right + nbytes], left)

    def _first_difference(self, left: int, right: int, nbytes: int) -> int:
        low, high = 0, nbytes
        while high - low > 1:
            middle = (low + high) // 2
            if self._equal(left + low, right + low, middle - low):
                low = middle
            else:
                high = middle
        return low


@contextmanager
def _as_output_error() -> Iterator[None]:
    """The output was whole when it was opened: what cannot be read, someone is writing to."""
    try:
        yield
    except SourceReadError as error:
        if isinstance(error.__cause__, OSError):
            raise  # the disk's own fault, which says so
        raise SourceReadError(error.where, error.problem, "let no one write to it") from error


def _joined(stretches: Iterator[Stretch], gap: int) -> Iterator[Stretch]:
    """The same bytes in fewer stretches, and what is between two with at most `gap` between."""
    file, begin, end = "", 0, 0
    for name, at, nbytes in stretches:
        if name == file and 0 <= at - end <= gap:
            end = max(end, at + nbytes)
            continue
        if begin < end:
            yield file, begin, end - begin
        file, begin, end = name, at, at + nbytes
    if begin < end:
        yield file, begin, end - begin


class _Arriving:
    """A stream, taken from in parts of any size. at: the byte of the file that comes next; end:
    one past the last."""

    def __init__(self, source: Source, file: str, begin: int, end: int) -> None:
        self.at, self.end = begin, end
        self._pieces = source.stream(file, begin, end)
        self._rest = b""

    def take(self, nbytes: int) -> bytes:
        """The next `nbytes`. Raises what the stream raises."""
        data = bytearray(self._rest)
        while len(data) < nbytes:
            data += next(self._pieces)
        self._rest = bytes(data[nbytes:])
        self.at += nbytes
        return bytes(data[:nbytes])


class _BufferedFile:
    """A stretch of one file, held in a buffer that is used again and again.

    coming: what will be expected, in order, some of it together.
    """

    def __init__(self, checkpoint: Checkpoint, ahead: int) -> None:
        """ahead: bytes that are read at least of a file here."""
        self._ahead = ahead
        self.buffer = bytearray(BLOCK_NBYTES)
        self.view = memoryview(self.buffer)
        self._source = checkpoint.source
        self._sizes = {file.name: file.nbytes for file in checkpoint.files}
        self._system = default_system()
        self._handle: FileIO | None = None
        self._file: str | None = None
        self._begin = self._end = 0
        self._was_in_memory = True
        self._arriving: _Arriving | None = None
        self.coming: Iterator[Stretch] = iter(())

    def expect(self, file: str, begin: int, nbytes: int) -> None:
        """Have it on the way that is held next, block after block: over a network, in one go and
        with what follows it."""
        if file != self._file:
            self._turn_to(file)
        if self._handle is None and nbytes:
            self._arrive(file, begin, begin + nbytes)

    def _arrive(self, file: str, begin: int, end: int) -> None:
        arriving = self._arriving
        if arriving is None or not arriving.at <= begin < end <= arriving.end:
            until = end
            for name, at, nbytes in self.coming:
                if name == file and at <= begin < end <= at + nbytes:
                    until = at + nbytes
                    break
            self._arriving = _Arriving(self._source, file, begin, until)
        elif begin - arriving.at <= GAP_NBYTES:
            arriving.take(begin - arriving.at)
        else:  # what is between was left out
            self._arriving = _Arriving(self._source, file, begin, arriving.end)

    def hold(self, file: str, begin: int, nbytes: int) -> int:
        """Have the bytes [begin, begin + nbytes) of a file in the buffer; where in it they begin.

        nbytes: at most BLOCK_NBYTES.
        """
        if file != self._file:
            self._turn_to(file)
        if begin < self._begin or begin + nbytes > self._end:
            ahead = 0 if self._handle is None else self._sizes[file] - begin
            self._fill(file, begin, max(nbytes, min(ahead, self._ahead)))
        return begin - self._begin

    def pieces(self, file: str, begin: int, nbytes: int) -> Iterator[bytes]:
        """The bytes [begin, begin + nbytes) of a file, block after block."""
        self.expect(file, begin, nbytes)
        for done in range(0, nbytes, BLOCK_NBYTES):
            size = min(BLOCK_NBYTES, nbytes - done)
            at = self.hold(file, begin + done, size)
            yield bytes(self.view[at : at + size])

    def close(self) -> None:
        """Let go of the file."""
        if self._handle is not None:
            self._forget(self._handle, self._end)
            self._handle.close()

    def _turn_to(self, file: str) -> None:
        self.close()
        self._file, self._handle, self._begin, self._end = file, None, 0, 0
        self._arriving = None
        self._handle = self._source.open(file)

    def _fill(self, file: str, begin: int, nbytes: int) -> None:
        part = self.view[:nbytes]
        if self._handle is None:
            self._begin = self._end = begin
            if self._arriving is not None and self._arriving.at == begin:
                part[:] = self._arriving.take(nbytes)
            else:
                part[:] = self._source.read(file, begin, begin + nbytes)
        else:
            self._forget(self._handle, begin)
            self._begin = self._end = begin
            self._was_in_memory = self._system.in_memory(self._handle, begin + nbytes - 1)
            where = f"{self._source.location}/{file}"
            read_into(self._handle, part, begin, where, self._system)
        self._end = begin + nbytes

    def _forget(self, handle: FileIO, until: int) -> None:
        """Leave the system's memory as it was found: what is behind us need not stay there.

        until: what lies from there on is read next, and once.
        """
        if not self._was_in_memory:
            end = min(self._end, until) if until > self._begin else self._end
            self._system.let_go(handle, self._begin, end)
