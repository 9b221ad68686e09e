"""The bytes of the output against those of the source, tensor by tensor, in bounded memory."""

from __future__ import annotations

import random
import struct
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby

from shardsurgeon.checkpoint import Checkpoint
from shardsurgeon.errors import SourceReadError
from shardsurgeon.sources.base import Source
from shardsurgeon.verification.blocks import Blocks, opened
from shardsurgeon.verification.findings import Findings
from shardsurgeon.verification.pairing import Count, Pair, Table

# What is read of each side at a time; memory is twice this per worker.
BLOCK_NBYTES = 1 << 20
# What a worker takes at a time, however small the tensors.
BATCH_NBYTES = 64 << 20

Progress = Callable[[int, int], None]


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

    Raises SourceReadError where the source cannot be read.
    """
    chosen = [pair for file in sorted(pairs) for pair in _picked(file, pairs[file], sampling)]
    comparer = _Comparer(source.source, pruned.source, sampling, on_progress)
    comparer.total = sum(min(p.nbytes, sampling.nbytes or p.nbytes) for p in chosen)
    with ThreadPoolExecutor(max(workers, 1), "verify") as pool:
        for problems in pool.map(comparer.problems, list(_batches(chosen))):
            for where, problem in problems:
                findings.add(where, problem)
    return Compared(len(chosen), comparer.done)


def _batches(pairs: Iterable[Pair]) -> Iterator[list[Pair]]:
    """Neighbours that lie in the same two files, about BATCH_NBYTES together."""
    for _, group in groupby(pairs, key=lambda pair: (pair.file, pair.source_file)):
        batch: list[Pair] = []
        room = BATCH_NBYTES
        for pair in group:
            batch.append(pair)
            room -= pair.nbytes
            if room <= 0:
                yield batch
                batch, room = [], BATCH_NBYTES
        if batch:
            yield batch


def _picked(file: str, pairs: list[Pair], sampling: Sampling) -> Iterable[Pair]:
    if sampling.tensors is None or sampling.tensors >= len(pairs):
        return pairs
    sample = random.Random(f"{sampling.seed} {file}").sample(pairs, sampling.tensors)
    return sorted(sample, key=lambda pair: pair.begin)


class _Comparer:
    """Compares one pair after the other; safe for several threads."""

    def __init__(
        self, source: Source, pruned: Source, sampling: Sampling, on_progress: Progress | None
    ) -> None:
        self._source = source
        self._pruned = pruned
        self._sampling = sampling
        self._on_progress = on_progress
        self._lock = threading.Lock()
        self.done = 0
        self.total = 0

    def problems(self, batch: list[Pair]) -> list[tuple[str, str]]:
        """(tensor, what is wrong with its bytes) of pairs that lie in the same two files."""
        last = batch[-1]
        source_end, end = last.source_begin + last.nbytes, last.begin + last.nbytes
        found = []
        with (
            opened(self._source, last.source_file, max(source_end - 1, 0)) as old,
            opened(self._pruned, last.file, max(end - 1, 0)) as new,
        ):
            for pair in batch:
                problem = self._problem(pair, old, new)
                if problem is not None:
                    found.append((f"{pair.file} {pair.name}", problem))
        return found

    def _problem(self, pair: Pair, old: Blocks, new: Blocks) -> str | None:
        if isinstance(pair.cut, Count) and (problem := _count_problem(pair, pair.cut, new)):
            return problem
        if isinstance(pair.cut, Table):
            return self._table_problem(pair, pair.cut, old, new)
        for old_begin, new_begin, nbytes in self._blocks(pair):
            expected = old.read(pair.source_begin + old_begin, nbytes)
            found = _found(pair, new, new_begin, nbytes)
            self._advance(nbytes)
            if expected != found:
                at = next(n for n, (a, b) in enumerate(zip(expected, found, strict=True)) if a != b)
                where = f"{pair.source_file} {pair.source_name}"
                return f"differs from {where}, first at byte {new_begin + at:,} of {pair.nbytes:,}"
        return None

    def _blocks(self, pair: Pair) -> Iterator[tuple[int, int, int]]:
        blocks = (
            (old + done, new + done, min(BLOCK_NBYTES, nbytes - done))
            for old, new, nbytes in pair.stretches()
            for done in range(0, nbytes, BLOCK_NBYTES)
        )
        limit = self._sampling.nbytes
        if limit is None or pair.nbytes <= limit:
            return blocks
        listed = list(blocks)
        mean = sum(nbytes for *_, nbytes in listed) / len(listed)
        count = min(max(int(limit / mean), 1), len(listed))
        return iter(random.Random(f"{self._sampling.seed} {pair.name}").sample(listed, count))

    def _table_problem(self, pair: Pair, cut: Table, old: Blocks, new: Blocks) -> str | None:
        """Retained ids have their new numbers, the others any; no row names an expert twice."""
        new_ids = {old_id: new_id for new_id, old_id in enumerate(cut.retained)}
        row_nbytes = cut.width * cut.row_length
        step = max(BLOCK_NBYTES // row_nbytes, 1) * row_nbytes
        for begin in range(0, pair.nbytes, step):
            nbytes = min(step, pair.nbytes - begin)
            before = _integers(old.read(pair.source_begin + begin, nbytes), cut.width)
            after = _integers(_found(pair, new, begin, nbytes), cut.width)
            self._advance(nbytes)
            for row in range(0, len(before), cut.row_length):
                olds, news = (ids[row : row + cut.row_length] for ids in (before, after))
                wrong = any(new_ids.get(o, n) != n for o, n in zip(olds, news, strict=True))
                if wrong or not all(0 <= n < len(cut.retained) for n in news):
                    number = (begin // cut.width + row) // cut.row_length
                    return f"row {number:,} is {news}, made of {olds}"
                if len(set(olds)) == len(olds) != len(set(news)):
                    return f"row {(begin // cut.width + row) // cut.row_length:,} repeats: {news}"
        return None

    def _advance(self, nbytes: int) -> None:
        with self._lock:
            self.done += nbytes
            if self._on_progress is not None:
                self._on_progress(min(self.done, self.total), self.total)


def _count_problem(pair: Pair, cut: Count, new: Blocks) -> str | None:
    said = int.from_bytes(_found(pair, new, 0, cut.width), "little")
    return None if said == cut.kept else f"says {said} experts, {cut.kept} were kept"


def _found(pair: Pair, new: Blocks, offset: int, nbytes: int) -> bytes | bytearray:
    """What the output holds at an offset of a tensor."""
    try:
        return new.read(pair.begin + offset, nbytes)
    except SourceReadError as error:
        # A file that was whole when it was opened and is not now: someone is writing to it.
        failed = isinstance(error.__cause__, OSError)
        remedy = error.remedy if failed else "let no one write to it"
        raise SourceReadError(pair.file, error.problem, remedy) from error


def _integers(raw: bytes | bytearray, width: int) -> list[int]:
    """Little-endian signed integers."""
    return [value for (value,) in struct.iter_unpack({4: "<i", 8: "<q"}[width], raw)]
