"""Shards written by workers, and what an earlier run left of them.

Shards that are copied on this machine start over after an interruption. Those that are
downloaded are journalled batch by batch, each once its bytes are on the disk, and continue from
there. The journal says what was done; what is on the disk must agree with it.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from shardsurgeon.execution.journal import JournalState
from shardsurgeon.execution.plan import OutputShard, Segment
from shardsurgeon.execution.ranges import (
    CopyRange,
    Range,
    batches,
    claimed_ranges,
    copy_ranges,
    joined,
    remaining,
)
from shardsurgeon.execution.transfer import RangeTransfer, gaps, max_gap
from shardsurgeon.execution.workdir import RunContext, WorkDir
from shardsurgeon.storage.files import carry_mode, reserve_file, sync_path
from shardsurgeon.storage.source import require_unchanged
from shardsurgeon.units import format_size

# What a worker writes at a time: large enough that opening files costs nothing, small enough
# that several workers can share one large tensor.
BATCH_NBYTES = 64 << 20
# The same for downloads: what each worker may have to download again after a kill.
REMOTE_BATCH_NBYTES = 32 << 20

Task = Callable[[RangeTransfer], None]
_LOG = logging.getLogger(__name__)


class _ShardInProgress:
    """A shard that workers are writing."""

    def __init__(self, shard: OutputShard, todo: list[tuple[CopyRange, ...]]) -> None:
        self.shard = shard
        # A shard that has all its bytes still needs one task, to be finished.
        self.batches = todo or [()]
        self.unwritten = len(self.batches)
        # Ranges that were written and may still be in memory.
        self.in_memory: list[Range] = []


class ShardWriter:
    """Writes the shards of a run into its work folder."""

    def __init__(
        self,
        context: RunContext,
        parts: Mapping[str, Sequence[Range]],
        on_finished: Callable[[OutputShard], None],
    ) -> None:
        """parts: shard file -> ranges already written. on_finished: called once per shard."""
        self._context = context
        self._parts = parts
        self._on_finished = on_finished
        self._planned = {file.name: file for file in context.plan.source_files}
        self._counting = threading.Lock()

    def begin(self, shard: OutputShard) -> None:
        """Create the shard's file, unless a part of it is written. Raises OutputWriteError."""
        if shard.file in self._parts:
            return
        if self._context.source.is_remote:
            # Before the file: the new one is empty, whatever the journal says of an older one.
            self._context.journal.begin(shard.file)
        path = self._context.workdir.begin_file(shard.file)
        sharable = self._context.sharable
        claimed = claimed_ranges(copy_ranges(shard), sharable) if sharable else None
        reserve_file(path, shard.nbytes, self._context.workdir.system, claimed)

    def tasks(self, shards: Iterable[OutputShard], at_once: int) -> Iterator[Task]:
        """The tasks that write `shards`, which have been begun.

        at_once: how many shards are written at the same time; only their ranges are in memory.
        Their batches take turns, because file systems let one thread at a time write to a file.
        """
        waiting = iter(shards)
        in_progress: deque[Iterator[Task]] = deque()
        while True:
            while len(in_progress) < at_once and (shard := next(waiting, None)) is not None:
                in_progress.append(self._tasks_of(shard))
            if not in_progress:
                return
            task = next(in_progress[0], None)
            if task is None:
                in_progress.popleft()
            else:
                in_progress.rotate(-1)
                yield task

    def _tasks_of(self, shard: OutputShard) -> Iterator[Task]:
        current = _ShardInProgress(shard, batches(self._ranges(shard), self._batch_nbytes))
        return (partial(self._fill, current, batch) for batch in current.batches)

    def max_gap(self, shards: Iterable[OutputShard]) -> int:
        """The `gap` of these shards' downloads, in bytes."""
        if not self._context.source.is_remote:
            return 0
        found: Counter[int] = Counter()
        wanted = 0
        for shard in shards:
            ranges = [copy for copy in self._ranges(shard) if self._travels(copy)]
            wanted += sum(copy.piece.nbytes for copy in ranges)
            found.update(gaps(ranges))
        return max_gap(found, wanted)

    def _travels(self, copy: CopyRange) -> bool:
        piece = copy.piece
        return isinstance(piece, Segment) and self._context.source.local_path(piece.file) is None

    @property
    def _batch_nbytes(self) -> int:
        return REMOTE_BATCH_NBYTES if self._context.source.is_remote else BATCH_NBYTES

    def _ranges(self, shard: OutputShard) -> list[CopyRange]:
        return remaining(copy_ranges(shard), self._parts.get(shard.file, ()))

    def _fill(
        self, current: _ShardInProgress, batch: Sequence[CopyRange], transfer: RangeTransfer
    ) -> None:
        """Write a batch; the worker that writes the last one finishes the shard."""
        if batch:
            self._write(current, batch, transfer)
        with self._counting:
            current.unwritten -= 1
            last = current.unwritten == 0
        if last:
            self._finish(current.shard)

    def _write(
        self, current: _ShardInProgress, batch: Sequence[CopyRange], transfer: RangeTransfer
    ) -> None:
        shard = current.shard
        path = self._context.workdir.begin_file(shard.file)
        with self._counting:
            earlier, current.in_memory = current.in_memory, []
        written = transfer.write(batch, path, earlier)
        with self._counting:
            current.in_memory += written
        if self._context.source.is_remote:
            sync_path(path, self._context.workdir.system)
            self._context.journal.fill(shard.file, joined((copy.at, copy.end) for copy in batch))

    def _finish(self, shard: OutputShard) -> None:
        context = self._context
        # A download notices by itself that its file was replaced.
        if not context.source.is_remote:
            used = [self._planned[name] for name in sorted(_used(shard))]
            require_unchanged(context.source, used)
        path = context.workdir.begin_file(shard.file)
        carry_mode(map(context.source.local_path, sorted(_used(shard))), path)
        sync_path(path, context.workdir.system)
        context.workdir.finish_file(shard.file)
        context.journal.finish(shard.file, shard.nbytes)
        _LOG.debug("%s is written, %s", shard.file, format_size(shard.nbytes))
        context.meter.advance(0, shards=1)
        self._on_finished(shard)


def _used(shard: OutputShard) -> set[str]:
    """The source files that a shard takes bytes from."""
    made = shard.pieces
    return {made.files[file] for file in np.unique(made.file[made.file >= 0]).tolist()}


@dataclass(frozen=True, slots=True)
class ResumeState:
    """What earlier runs have done, by the shards' file names.

    whole: finished here, size in bytes. sent: sent to the destination, size in bytes. parts: the
    ranges that were downloaded, ascending and not touching one another.
    """

    whole: dict[str, int]
    sent: dict[str, int]
    parts: dict[str, list[Range]]

    def unfinished(self, shards: Iterable[OutputShard]) -> list[OutputShard]:
        """Those of some shards that are not whole."""
        return [s for s in shards if s.file not in self.whole and s.file not in self.sent]

    @property
    def shards(self) -> int:
        """How many shards are written, sent or not."""
        return len(self.whole) + len(self.sent)

    @property
    def nbytes(self) -> int:
        """How many bytes of shards are written."""
        parts = (end - begin for ranges in self.parts.values() for begin, end in ranges)
        return sum(self.whole.values()) + sum(self.sent.values()) + sum(parts)


def find_resume_state(
    shards: Sequence[OutputShard], workdir: WorkDir, done: JournalState
) -> ResumeState:
    """What the journal and the disk agree is done of these shards."""
    found = ResumeState({}, {}, {})
    for shard in shards:
        name, nbytes = shard.file, shard.nbytes
        written = _written(shard, done)
        if name in done.sent:
            found.sent[name] = nbytes
        # A kill may come between a file's name and the journal's line about it.
        elif (name in done.finished or written == [(0, nbytes)]) and workdir.has(
            name, nbytes, shard.header
        ):
            found.whole[name] = nbytes
        elif written and workdir.has_part(name, nbytes):
            found.parts[name] = written
    return found


def _written(shard: OutputShard, done: JournalState) -> list[Range]:
    return joined(done.parts.get(shard.file, []))
