"""The bytes of the output against those of the source, tensor by tensor, in bounded memory."""

from __future__ import annotations

import random
import struct
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from itertools import chain
from types import TracebackType

from shardsurgeon.checkpoint.checkpoint import Checkpoint
from shardsurgeon.errors import SourceReadError
from shardsurgeon.storage.files import read_into, reading
from shardsurgeon.storage.system import default_system
from shardsurgeon.storage.threads import map_in_threads
from shardsurgeon.verification.findings import Findings
from shardsurgeon.verification.pairing import Count, Pair, Table

# Neighbouring tensors of so many bytes together go to one worker: they are read in one go.
_BATCH_NBYTES = 1 << 25

Progress = Callable[[int, int], None]
Problem = tuple[Pair, str]

# What is read of each side at a time; memory is twice this per worker.
BLOCK_NBYTES = 1 << 20
# What is read at least, so that small tensors and short rows need no call each.
_AHEAD_NBYTES = 1 << 18


@dataclass(frozen=True, slots=True)
class Sampling:
    """What is compared: tensors per shard, and of each at most so many bytes (None: all)."""

    tensors: int | None = None
    nbytes: int | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Compared:
    """What a comparison looked at."""

    tensors: int
    nbytes: int


def compare_bytes(
    source: Checkpoint,
    pruned: Checkpoint,
    pairs: dict[str, list[Pair]],
    sampling: Sampling,
    workers: int,
    on_progress: Progress | None,
    findings: Findings,
) -> Compared:
    """Compare the tensors that the sampling picks; a difference is noted once per tensor.

    Raises SourceReadError where a file of either side cannot be read.
    """
    chosen = [pair for file in sorted(pairs) for pair in _picked(file, pairs[file], sampling)]
    run = _Run(source, pruned, sampling, on_progress)
    run.total = sum(min(p.nbytes, sampling.nbytes or p.nbytes) for p in chosen)
    found = map_in_threads(run.problems, _batches(chosen), max(workers, 1), "verify", run.stop)
    for pair, problem in chain.from_iterable(found):
        findings.add(f"{pair.file} {pair.name}", problem)
    return Compared(len(chosen), run.done)


def _picked(file: str, pairs: list[Pair], sampling: Sampling) -> Iterable[Pair]:
    if sampling.tensors is None or sampling.tensors >= len(pairs):
        return pairs
    return random.Random(f"{sampling.seed} {file}").sample(pairs, sampling.tensors)


def _batches(pairs: Iterable[Pair]) -> Iterator[list[Pair]]:
    batch: list[Pair] = []
    nbytes = 0
    for pair in pairs:
        batch.append(pair)
        nbytes += pair.nbytes
        if nbytes >= _BATCH_NBYTES:
            yield batch
            batch, nbytes = [], 0
    if batch:
        yield batch


class _Run:
    """What the workers share: what to compare, how far it is, whether to go on."""

    def __init__(
        self,
        source: Checkpoint,
        pruned: Checkpoint,
        sampling: Sampling,
        on_progress: Progress | None,
    ) -> None:
        self._source = source
        self._pruned = pruned
        self._sampling = sampling
        self._on_progress = on_progress
        self._lock = threading.Lock()
        self.done = 0
        self.total = 0
        self.stopped = False

    def stop(self) -> None:
        """Have `problems` return soon."""
        self.stopped = True

    def problems(self, batch: list[Pair]) -> list[Problem]:
        """What is wrong with the bytes of some tensors; safe for several threads."""
        with RangeComparer(self._source, self._pruned) as sides:
            found = ((pair, self._problem(sides, pair)) for pair in batch if not self.stopped)
            return [(pair, problem) for pair, problem in found if problem is not None]

    def _problem(self, sides: RangeComparer, pair: Pair) -> str | None:
        if isinstance(pair.cut, Table):
            return self._table_problem(sides, pair, pair.cut)
        if isinstance(pair.cut, Count):
            said = int.from_bytes(sides.found(pair.file, pair.begin, pair.cut.width), "little")
            self._advance(pair.cut.width)
            if said != pair.cut.kept:
                return f"says {said} experts, {pair.cut.kept} were kept"
        for old, new, nbytes in self._stretches(pair):
            at = new
            places = (pair.source_file, pair.source_begin + old, pair.file, pair.begin + new)
            for step in sides.steps(*places, nbytes):
                self._advance(step.nbytes)
                if step.differs is not None:
                    where = f"{pair.source_file} {pair.source_name}"
                    first = f"first at byte {at + step.differs:,} of {pair.nbytes:,}"
                    return f"differs from {where}, {first}"
                if self.stopped:
                    return None
                at += step.nbytes
        return None

    def _stretches(self, pair: Pair) -> Iterator[tuple[int, int, int]]:
        """What is compared of a tensor: all of it, or blocks chosen at random up to the limit."""
        limit = self._sampling.nbytes
        if limit is None or pair.nbytes <= limit:
            return pair.stretches()
        size = max(min(BLOCK_NBYTES, limit), 1)
        blocks = [
            (old + done, new + done, min(size, nbytes - done))
            for old, new, nbytes in pair.stretches()
            for done in range(0, nbytes, size)
        ]
        mean = sum(nbytes for *_, nbytes in blocks) / len(blocks)
        count = min(max(int(limit / mean), 1), len(blocks))
        return iter(random.Random(f"{self._sampling.seed} {pair.name}").sample(blocks, count))

    def _table_problem(self, sides: RangeComparer, pair: Pair, cut: Table) -> str | None:
        """Retained ids have their new numbers, the others any; no row names an expert twice."""
        new_ids = {old_id: new_id for new_id, old_id in enumerate(cut.retained)}
        row_nbytes = cut.width * cut.row_length
        size = max(BLOCK_NBYTES // max(row_nbytes, 1), 1) * row_nbytes
        for begin in range(0, pair.nbytes, max(size, 1)):
            nbytes = min(size, pair.nbytes - begin)
            raw = sides.expected(pair.source_file, pair.source_begin + begin, nbytes)
            before = _integers(raw, cut.width)
            after = _integers(sides.found(pair.file, pair.begin + begin, nbytes), cut.width)
            self._advance(nbytes)
            for row in range(0, len(before), cut.row_length):
                old, new = (ids[row : row + cut.row_length] for ids in (before, after))
                number = (begin // cut.width + row) // cut.row_length
                wrong = any(new_ids.get(o, n) != n for o, n in zip(old, new, strict=True))
                if wrong or not all(0 <= n < len(cut.retained) for n in new):
                    return f"row {number:,} is {new}, made of {old}"
                if len(set(old)) == len(old) != len(set(new)):
                    return f"row {number:,} repeats: {new}"
        return None

    def _advance(self, nbytes: int) -> None:
        with self._lock:
            self.done += nbytes
            if self._on_progress is not None and not self.stopped:
                self._on_progress(min(self.done, self.total), self.total)


def _integers(raw: bytes, width: int) -> list[int]:
    """Little-endian signed integers."""
    return [value for (value,) in struct.iter_unpack({4: "<i", 8: "<q"}[width], raw)]


@dataclass(frozen=True, slots=True)
class Step:
    """A stretch that was compared. differs: how many of its bytes are equal before the first
    that is not, None where all are."""

    nbytes: int
    differs: int | None


class RangeComparer:
    """Compares ranges of source files with ranges of output files. For one thread."""

    def __init__(self, source: Checkpoint, pruned: Checkpoint) -> None:
        self._source = _BufferedFile(source)
        self._pruned = _BufferedFile(pruned)

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

    def steps(
        self, source_file: str, source_begin: int, file: str, begin: int, nbytes: int
    ) -> Iterator[Step]:
        """Compare block after block, until all are compared or one differs.

        Raises SourceReadError, naming the file, where either side cannot be read.
        """
        self._source.expect(source_file, source_begin, nbytes)
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


class _Arriving:
    """A stream, taken from in parts of any size. at: the byte of the file that comes next."""

    def __init__(self, pieces: Iterator[bytes], begin: int) -> None:
        self.at = begin
        self._pieces = pieces
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
    """A stretch of one file, held in a buffer that is used again and again."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.buffer = bytearray(BLOCK_NBYTES)
        self.view = memoryview(self.buffer)
        self._source = checkpoint.source
        # Over a network what is not needed is not read.
        self._ahead = 0 if checkpoint.source.is_remote else _AHEAD_NBYTES
        self._sizes = {file.name: file.nbytes for file in checkpoint.files}
        self._system = default_system()
        self._handle: FileIO | None = None
        self._file: str | None = None
        self._begin = self._end = 0
        self._was_in_memory = True
        self._arriving: _Arriving | None = None

    def expect(self, file: str, begin: int, nbytes: int) -> None:
        """Have it on the way that is held next, block after block: over a network, in one go."""
        if file != self._file:
            self._turn_to(file)
        self._arriving = None
        if self._source.is_remote and self._handle is None and nbytes > BLOCK_NBYTES:
            self._arriving = _Arriving(self._source.stream(file, begin, begin + nbytes), begin)

    def hold(self, file: str, begin: int, nbytes: int) -> int:
        """Have the bytes [begin, begin + nbytes) of a file in the buffer; where in it they begin.

        nbytes: at most BLOCK_NBYTES.
        """
        if file != self._file:
            self._turn_to(file)
        if begin < self._begin or begin + nbytes > self._end:
            ahead = min(self._ahead, self._sizes[file] - begin)
            self._fill(file, begin, max(nbytes, ahead))
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
        path = self._source.local_path(file)
        if path is not None:
            with reading(path):
                self._handle = FileIO(path)

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
