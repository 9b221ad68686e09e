"""A plan and its source become a folder on disk.

It obeys the plan, decides nothing, and knows no experts. The order of a run:

 1. OUT must not exist; OUT.partial is locked and must be empty or this very run's.
 2. The source must be what it was when it was planned, and the disk must have room.
 3. Every unfinished shard is reserved, filled by the workers, synced, renamed, journalled.
 4. Side files, extra files and documents follow, the documents in the plan's order.
 5. Whoever asked may look at the finished files; then their folder is renamed to OUT.

Interrupted anywhere, the same call goes on with the first shard that is not finished. The bytes
are the same whatever the interruptions, the number of workers and the system calls.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from shardsurgeon.copying import BATCH_NBYTES, Move, Mover, batches, shard_moves
from shardsurgeon.durable import reading, reserve_file, sync_path, writing
from shardsurgeon.errors import (
    OutputError,
    OutputWriteError,
    ShardSurgeonError,
    SourceChangedError,
    UsageError,
)
from shardsurgeon.journal import Journal, Run, read_journal
from shardsurgeon.progress import Listener, Meter, Progress, Stopped
from shardsurgeon.sources.base import Source, SourceFile
from shardsurgeon.surgeryplan import Literal, OutputShard, Segment, SurgeryPlan
from shardsurgeon.system import System, default_system
from shardsurgeon.units import format_size
from shardsurgeon.workplace import Workplace, hold

# A few copies in flight keep a disk busy; beyond that they only take turns.
MOST_WORKERS_BY_DEFAULT = 4


@dataclass(frozen=True, slots=True)
class ExecutionReport:
    """What a finished run did. Sizes in bytes; `shards` counts the resumed ones too."""

    bytes_copied: int
    bytes_resumed: int
    shards: int
    shards_resumed: int
    seconds: float


class Space(NamedTuple):
    """Bytes that a run still has to write, and bytes that are free for it."""

    needed: int
    free: int


def estimate_space(
    plan: SurgeryPlan, out: Path, *, restart: bool = False, system: System | None = None
) -> Space:
    """What `execute` would need and find; nothing is written."""
    place = Workplace(out, system or default_system())
    record = None if restart else read_journal(place.journal)
    finished = _finished_shards(plan, place, record.finished if record else {})
    return Space(sum(_sizes(plan).values()) - sum(finished.values()), place.space(restart))


def execute(
    plan: SurgeryPlan,
    source: Source,
    out: Path,
    *,
    workers: int = 0,
    restart: bool = False,
    on_progress: Listener | None = None,
    before_delivery: Callable[[Path], None] | None = None,
    system: System | None = None,
) -> ExecutionReport:
    """Write what the plan says to the folder `out`, which appears only when it is complete.

    workers: threads that copy; 0 means as many as there are processors, at most four.
    restart: throw away what an interrupted run left instead of going on from there.
    on_progress: called often, by one thread at a time; what it raises stops the run.
    before_delivery: called with the folder of the finished files; what it raises keeps them
    from becoming `out`.

    Raises OutputError (the place is taken, or another run's), SourceChangedError,
    SourceReadError, OutputWriteError; whatever is raised, finished shards are kept.
    """
    begun = time.monotonic()
    if workers < 0:
        raise UsageError("--workers", f"{workers} is less than 0")
    system = system or default_system()
    sizes = _sizes(plan)
    total = sum(sizes.values())
    with hold(out, system) as place:
        _require_unchanged(source, plan.source_files)
        run = Run(plan.request_fingerprint, plan.source_fingerprint, plan.source_files)
        with place.open_journal(run, restart) as journal:
            finished = _finished_shards(plan, place, journal.finished)
            done = sum(finished.values())
            _require_space(Space(total - done, place.space()), place)
            start = Progress(done, total, done, len(finished), len(plan.shards))
            work = _Work(plan, source, place, journal, Meter(start, on_progress))
            work.write_shards(
                [shard for shard in plan.shards if shard.file not in finished],
                workers or min(MOST_WORKERS_BY_DEFAULT, os.cpu_count() or 1),
            )
            work.write_small_files(sizes)
        _require_unchanged(source, plan.source_files)
        if before_delivery is not None:
            try:
                before_delivery(place.files)
            except ShardSurgeonError:
                # Compared with a source that is another by now, a sound result does not hold.
                _require_unchanged(source, plan.source_files)
                raise
        place.deliver(set(sizes))
    seconds = time.monotonic() - begun
    return ExecutionReport(total - done, done, len(plan.shards), len(finished), seconds)


def _sizes(plan: SurgeryPlan) -> dict[str, int]:
    """Every output file and its size. Raises OutputError for a name that must not be written."""
    source_sizes = {file.name: file.nbytes for file in plan.source_files}
    files = [(shard.file, shard.nbytes) for shard in plan.shards]
    files += [(name, source_sizes[name]) for name in plan.side_files]
    files += [(name, _size_on_disk(path)) for name, path in plan.extra_files]
    files += [(name, len(data)) for name, data in plan.documents]
    sizes: dict[str, int] = {}
    for name, nbytes in files:
        path = Path(name)
        if path.is_absolute() or path.drive or ".." in path.parts or not path.parts:
            raise OutputError(name, "is a file name that leads out of the output folder")
        if name in sizes:
            raise OutputError(name, "is the name of two output files")
        sizes[name] = nbytes
    return sizes


def _size_on_disk(path: str) -> int:
    with reading(path):
        return os.stat(path).st_size


def _finished_shards(
    plan: SurgeryPlan, place: Workplace, recorded: dict[str, int]
) -> dict[str, int]:
    """The shards that need no work, with their sizes: journalled, and there as planned."""
    candidates = ((shard, shard.nbytes) for shard in plan.shards if shard.file in recorded)
    return {
        shard.file: nbytes
        for shard, nbytes in candidates
        if place.has(shard.file, nbytes, shard.header)
    }


def _require_space(space: Space, place: Workplace) -> None:
    if space.needed > space.free:
        raise OutputWriteError(
            place.out,
            f"the disk is full: {format_size(space.needed)} ({space.needed:,} bytes) are needed, "
            f"{format_size(space.free)} ({space.free:,} bytes) are free",
            "free some space or choose another -o",
        )


def _require_unchanged(source: Source, planned: Iterable[SourceFile]) -> None:
    """Raise SourceChangedError, with the name, unless the files are as they were planned."""
    present = {file.name: file for file in source.list()}
    for file in planned:
        found = present.get(file.name)
        if found == file:
            continue
        if found is None:
            problem = "was there when the run was planned and is gone now"
        elif found.nbytes != file.nbytes:
            problem = f"had {file.nbytes:,} bytes when the run was planned, has {found.nbytes:,}"
        else:
            problem = "was written to or replaced since the run was planned"
        raise SourceChangedError(
            f"{source.location}/{file.name}",
            problem,
            "once it is whole, run the command again with --restart",
        )


class _ShardInHand:
    """A shard that workers are filling. todo: batches that nobody has begun."""

    def __init__(self, shard: OutputShard) -> None:
        self.shard = shard
        self.todo = deque(batches(shard_moves(shard), BATCH_NBYTES))
        self.unwritten = len(self.todo)


class _Queue:
    """Batches for the workers: each has a shard to itself as long as there are enough.

    File systems let one thread at a time write to a file. Towards the end, those without a
    shard of their own help the others. Only the shards in hand are taken apart.
    """

    def __init__(self, shards: Iterable[OutputShard]) -> None:
        self._waiting = iter(shards)
        self._in_hand: list[_ShardInHand] = []

    def take(self, hand: _ShardInHand | None) -> tuple[_ShardInHand, tuple[Move, ...]] | None:
        """The next batch for a worker whose last shard was `hand`; None where all is begun."""
        if hand is None or not hand.todo:
            hand = self._another()
        return None if hand is None else (hand, hand.todo.popleft())

    def _another(self) -> _ShardInHand | None:
        self._in_hand = [hand for hand in self._in_hand if hand.todo]
        shard = next(self._waiting, None)
        if shard is None:
            return max(self._in_hand, key=lambda hand: len(hand.todo), default=None)
        self._in_hand.append(_ShardInHand(shard))
        return self._in_hand[-1]


class _Work:
    """One run's work in its place."""

    def __init__(
        self,
        plan: SurgeryPlan,
        source: Source,
        place: Workplace,
        journal: Journal,
        meter: Meter,
    ) -> None:
        self._plan = plan
        self._planned = {file.name: file for file in plan.source_files}
        self._source = source
        self._place = place
        self._journal = journal
        self._meter = meter
        self._system = place.system
        self._errors: list[BaseException] = []
        self._counting = threading.Lock()
        self._journalling = threading.Lock()

    def write_shards(self, shards: list[OutputShard], workers: int) -> None:
        """Write the shards. Raises the first error that any worker met."""
        for shard in shards:
            reserve_file(self._place.begin_file(shard.file), shard.nbytes, self._system)
        queue = _Queue(shards)
        with ThreadPoolExecutor(workers, "shardsurgeon") as pool:
            try:
                crew = [pool.submit(self._work, queue) for _ in range(workers)]
                # Woken now and then, because on Windows Ctrl-C does not end a wait.
                while wait(crew, timeout=0.2).not_done:
                    pass
            except BaseException:
                self._meter.stop()
                raise
        if self._errors:
            raise self._errors[0]

    def _work(self, queue: _Queue) -> None:
        """Take batches until there are none; whoever writes a shard's last one finishes it."""
        try:
            mover = Mover(self._source, self._system, self._meter.advance)
            hand = None
            while True:
                with self._counting:
                    taken = queue.take(hand)
                if taken is None:
                    return
                hand, batch = taken
                mover.move(batch, self._place.begin_file(hand.shard.file))
                with self._counting:
                    hand.unwritten -= 1
                    last = hand.unwritten == 0
                if last:
                    self._finish_shard(hand.shard)
        except Stopped:
            pass
        except BaseException as error:  # raised again by write_shards
            self._errors.append(error)
            self._meter.stop()

    def _finish_shard(self, shard: OutputShard) -> None:
        pieces = (piece for tensor in shard.tensors for piece in tensor.pieces)
        used = {piece.file for piece in pieces if isinstance(piece, Segment)}
        _require_unchanged(self._source, (self._planned[name] for name in sorted(used)))
        sync_path(self._place.begin_file(shard.file), self._system)
        self._place.finish_file(shard.file)
        with self._journalling:
            self._journal.add(shard.file, shard.nbytes)
        self._meter.advance(0, shards=1)

    def write_small_files(self, sizes: dict[str, int]) -> None:
        """Copy side files and extra files, then write the documents in the plan's order."""
        mover = Mover(self._source, self._system, self._meter.advance)
        for name in self._plan.side_files:
            with self._new_file(name, sizes[name]) as path:
                for batch in batches([Move(Segment(name, 0, sizes[name]), 0)], BATCH_NBYTES):
                    mover.move(batch, path)
                _carry_executable_bits(self._source.local_path(name), path)
        for name, origin in self._plan.extra_files:
            with self._new_file(name, sizes[name]) as path:
                mover.copy_file(Path(origin), sizes[name], path)
        for name, data in self._plan.documents:
            with self._new_file(name, 0) as path:
                mover.move([Move(Literal(data), 0)], path)

    @contextmanager
    def _new_file(self, name: str, nbytes: int) -> Iterator[Path]:
        """A file to be filled inside the `with` block, and finished at its end."""
        path = self._place.begin_file(name)
        reserve_file(path, nbytes, self._system)
        yield path
        sync_path(path, self._system)
        self._place.finish_file(name)


def _carry_executable_bits(origin: Path | None, copy: Path) -> None:
    """A script that could be run can still be run; all else follows the user's umask."""
    if origin is None:
        return
    with reading(origin):
        bits = origin.stat().st_mode & 0o111
    if bits:
        with writing(copy):
            copy.chmod(copy.stat().st_mode | bits)
