"""The bytes of the output against those of the source, tensor by tensor, in bounded memory."""

from __future__ import annotations

import random
import struct
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain

import numpy as np

from shardsurgeon.checkpoint.checkpoint import Checkpoint
from shardsurgeon.storage.phases import BYTES, Phase, phase
from shardsurgeon.storage.threads import map_in_threads
from shardsurgeon.verification.byte_ranges import (
    BLOCK_NBYTES,
    GAP_NBYTES,
    RangeComparer,
    Stretch,
)
from shardsurgeon.verification.findings import Findings
from shardsurgeon.verification.pairs import Count, Pair, ShardPairs, Table

# Neighbouring tensors of so many bytes together go to one worker: they are read in one go.
_BATCH_NBYTES = 1 << 25

Progress = Callable[[int, int], None]
Problem = tuple[Pair, str]


@dataclass(frozen=True, slots=True)
class Sampling:
    """What is compared: tensors per shard, and of each at most so many bytes (None: all)."""

    tensors: int | None = None
    nbytes: int | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Compared:
    """What a comparison looked at; complete: whether that was every byte."""

    tensors: int
    nbytes: int
    complete: bool = False


def compare_bytes(
    source: Checkpoint,
    pruned: Checkpoint,
    pairs: Mapping[str, ShardPairs],
    sampling: Sampling,
    workers: int,
    on_progress: Progress | None,
    findings: Findings,
) -> Compared:
    """Compare the tensors that the sampling picks; a difference is noted once per tensor.

    Raises SourceReadError where a file of either side cannot be read.
    """
    picked = [_picked(file, pairs[file], sampling) for file in sorted(pairs)]
    total = sum(_nbytes(each, sampling.nbytes) for each in picked)
    with phase("comparing", total, BYTES) as at:
        run = _Run(source, pruned, sampling, on_progress, at)
        batches = _batches(chain.from_iterable(picked))
        found = map_in_threads(run.problems, batches, max(workers, 1), "verify", run.stop)
    for pair, problem in chain.from_iterable(found):
        findings.add(f"{pair.file} {pair.name}", problem)
    every = sum(_nbytes(each, None) for each in pairs.values())
    return Compared(sum(map(len, picked)), run.done, run.total == every)


def _picked(file: str, pairs: ShardPairs, sampling: Sampling) -> Sequence[Pair]:
    if sampling.tensors is None or sampling.tensors >= len(pairs):
        return pairs
    return random.Random(f"{sampling.seed} {file}").sample(pairs, sampling.tensors)


def _nbytes(pairs: Sequence[Pair], limit: int | None) -> int:
    """Bytes of some output tensors, of each at most `limit`."""
    if isinstance(pairs, ShardPairs):
        nbytes = pairs.nbytes
    else:
        nbytes = np.array([pair.nbytes for pair in pairs], np.int64)
    return int((np.minimum(nbytes, limit) if limit else nbytes).sum())


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
        at: Phase,
    ) -> None:
        self._source = source
        self._pruned = pruned
        self._sampling = sampling
        self._on_progress = on_progress
        self._lock = threading.Lock()
        self._at = at
        self.done = 0
        self.total = at.total
        self.stopped = False

    def stop(self) -> None:
        """Have `problems` return soon."""
        self.stopped = True

    def problems(self, batch: list[Pair]) -> list[Problem]:
        """What is wrong with the bytes of some tensors; safe for several threads."""
        apart = self._sampling.tensors is not None
        with RangeComparer(self._source, self._pruned, apart=apart) as sides:
            gap = GAP_NBYTES if self._sampling.nbytes is None else 0
            sides.expect(self._source_reads(batch), self._pruned_reads(batch), gap)
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

    def _source_reads(self, batch: list[Pair]) -> Iterator[Stretch]:
        """What `_problem` reads of the source for these tensors, in order."""
        for pair in batch:
            if isinstance(pair.cut, Table):
                yield pair.source_file, pair.source_begin, pair.nbytes
                continue
            for old, _, nbytes in self._stretches(pair):
                yield pair.source_file, pair.source_begin + old, nbytes

    def _pruned_reads(self, batch: list[Pair]) -> Iterator[Stretch]:
        """The same of the output."""
        for pair in batch:
            if isinstance(pair.cut, Table):
                yield pair.file, pair.begin, pair.nbytes
                continue
            if isinstance(pair.cut, Count):
                yield pair.file, pair.begin, pair.cut.width
            for _, new, nbytes in self._stretches(pair):
                yield pair.file, pair.begin + new, nbytes

    def _stretches(self, pair: Pair) -> Iterator[tuple[int, int, int]]:
        """What is compared of a tensor: all of it, or blocks chosen at random up to the limit."""
        limit = self._sampling.nbytes
        if limit is None or pair.nbytes <= limit:
            return pair.stretches()
        size = max(min(BLOCK_NBYTES, limit), 1)
        stretches = list(pair.stretches())
        ends = list(accumulate(-(-nbytes // size) for *_, nbytes in stretches))
        mean = sum(nbytes for *_, nbytes in stretches) / ends[-1]
        count = min(max(int(limit / mean), 1), ends[-1])
        numbers = random.Random(f"{self._sampling.seed} {pair.name}").sample(range(ends[-1]), count)
        return (_block(stretches, ends, number, size) for number in numbers)

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
        self._at.advance(nbytes)
        with self._lock:
            self.done += nbytes
            if self._on_progress is not None and not self.stopped:
                self._on_progress(min(self.done, self.total), self.total)


def _block(
    stretches: Sequence[tuple[int, int, int]], ends: Sequence[int], number: int, size: int
) -> tuple[int, int, int]:
    """A block of `size` bytes, or what is left of its stretch. ends: of each stretch, how many
    blocks there are up to its end."""
    at = bisect_right(ends, number)
    old, new, nbytes = stretches[at]
    done = (number - (ends[at - 1] if at else 0)) * size
    return old + done, new + done, min(size, nbytes - done)


def _integers(raw: bytes, width: int) -> list[int]:
    """Little-endian signed integers."""
    return [value for (value,) in struct.iter_unpack({4: "<i", 8: "<q"}[width], raw)]
