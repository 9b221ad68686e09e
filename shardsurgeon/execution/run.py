"""Carry out a plan: its source becomes a folder on disk, or goes to a destination.

It obeys the plan, decides nothing, and knows no experts. The order of a run:

 1. An OUT that holds this very result is checked and done; any other stands in the way.
    OUT.partial is locked and must be empty or belong to this very run.
 2. Source and score files must be what they were when planned, and the disk must have room.
 3. Every unfinished shard is reserved, written by the workers, synced, renamed, journalled.
 4. Copied files, score files and generated files follow, those generated in the plan's order;
    the record gets the SHA-256 of what was written.
 5. The caller may check the finished files; then their folder is renamed to OUT.

With a destination a shard is reserved only when the disk budget has room for it, and is sent and
removed when it is finished; at the end the destination publishes everything, and there is no OUT.

After any interruption the same call continues: with the first shard that is not finished, or,
where bytes travel a network, in the middle of it. The bytes are the same whatever the
interruptions, the number of workers and the system calls.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from shardsurgeon.errors import (
    OutputError,
    OutputWriteError,
    ShardSurgeonError,
    SourceChangedError,
    UsageError,
    VerificationError,
)
from shardsurgeon.execution.checksums import shard_checksums
from shardsurgeon.execution.journal import Journal, JournalState, Run
from shardsurgeon.execution.outputs import holds_result, output_sizes, require_distinct
from shardsurgeon.execution.plan import OutputShard, Plan
from shardsurgeon.execution.shards import ResumeState, ShardWriter, find_resume_state
from shardsurgeon.execution.small_files import require_read, write_small_files
from shardsurgeon.execution.space import Space, needed_nbytes, require_space, sharable_files
from shardsurgeon.execution.transfer import RangeTransfer
from shardsurgeon.execution.upload import (
    DiskBudget,
    ShardDestination,
    ShardUploader,
    require_receipts,
)
from shardsurgeon.execution.workdir import RunContext, WorkDir, lock_workdir, look_at_workdir
from shardsurgeon.execution.workers import Listener, Progress, ProgressMeter, run_tasks
from shardsurgeon.storage.files import free_space
from shardsurgeon.storage.phases import BYTES, phase
from shardsurgeon.storage.source import Source, SourceFile, require_unchanged
from shardsurgeon.storage.system import System, default_system
from shardsurgeon.units import format_size

# A few copies at a time keep a disk busy; more would only take turns.
MOST_WORKERS_BY_DEFAULT = 4
# One connection seldom fills a link; beyond eight, servers begin to answer 429.
REMOTE_WORKERS_BY_DEFAULT = 8
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ExecutionReport:
    """What a finished run did. Sizes in bytes; `shards` counts the resumed ones too.

    bytes_copied: written by this run; bytes_shared: the others of this run, whose blocks the result
    has in common with the source; bytes_downloaded: what came over the network, copied files and
    unneeded bytes included.
    """

    bytes_copied: int
    bytes_resumed: int
    shards: int
    shards_resumed: int
    seconds: float
    bytes_downloaded: int = 0
    bytes_shared: int = 0


def execute(
    plan: Plan,
    source: Source,
    out: Path,
    *,
    workers: int = 0,
    restart: bool = False,
    on_progress: Listener | None = None,
    before_delivery: Callable[[Path], None] | None = None,
    destination: ShardDestination | None = None,
    disk_budget: int | None = None,
    command: str = "",
    system: System | None = None,
) -> ExecutionReport:
    """Write what the plan says to the folder `out`, which appears only when it is complete.

    Where `out` is what this very plan gives, nothing is written, and it is checked again.

    workers: threads that copy; 0 means as many as there are processors, at most four, and
    eight where the source is remote.
    restart: throw away what an interrupted run left instead of resuming it.
    on_progress: called often, by one thread at a time; an exception from it stops the run.
    before_delivery: called with the folder of the finished files, without the shards that
    were sent; an exception from it keeps them from becoming `out` or being published.
    destination: is sent every finished shard, and publishes the rest; `out` then only names the
    folder to work in. disk_budget: how many bytes of shards may be on the disk at a time; None
    for no limit. command: as the user gave it, for the journal.

    Raises UsageError (the budget is too small), OutputError (the place is taken, or another
    run's), SourceChangedError, SourceReadError, NetworkError, OutputWriteError, and what the
    destination raises. What is done is kept in every case but one: where a source file was touched
    and its time does not show it, a rerun could not tell what was read of it before.
    """
    begun = time.monotonic()
    if workers < 0:
        raise UsageError("--workers", f"{workers} is less than 0")
    system = system or default_system()
    sizes = output_sizes(plan)
    budget = sum(sizes.values()) if disk_budget is None else disk_budget
    if destination:
        require_budget(budget, sizes)
    planned = plan.source_files
    with phase("preparing"):
        run = _run(plan, source, command)
    if not destination and holds_result(out, plan, sizes):
        shards = len(plan.shards)
        _clear_leftovers(out, run, system)
        del plan
        require_unchanged(source, planned)
        if before_delivery is not None:
            before_delivery(out)
        return ExecutionReport(0, sum(sizes.values()), shards, shards, time.monotonic() - begun)
    with (
        lock_workdir(out, system) as workdir,
        _saying_what_is_kept(workdir),
        _blaming_the_source(source, planned, workdir),
    ):
        _require_place(plan, sizes, workdir, destination)
        with workdir.open_journal(run, restart) as journal:
            found = _earlier_work(plan, source, workdir, journal.done, destination)
            sharable = sharable_files(plan, source, workdir)
            needed = needed_nbytes(plan, sizes, found, sharable, budget if destination else None)
            require_space(Space(needed, workdir.space()), out)
            start = _start(plan, sizes, found)
            if plan.checksums and not destination:
                read_back = sum(shard.nbytes for shard in plan.shards)
                start = replace(start, total=start.total + read_back)
            if found.nbytes:
                done, total = map(format_size, (found.nbytes, start.total))
                shards_done = f"{found.shards} of {start.shards_total} shards"
                _LOG.info("resuming: %s, %s of %s done", shards_done, done, total)
            meter = ProgressMeter(start, on_progress)
            context = RunContext(plan, source, workdir, journal, meter, sharable)
            workers = workers or _workers_for(source)
            what = "downloading" if source.is_remote else "copying"
            nbytes = sum(shard.nbytes for shard in plan.shards)
            with phase(what, nbytes, BYTES, found.nbytes) as meter.phase:
                meter.phase.detail = start.words()
                if destination:
                    _send_shards(context, found, destination, budget, workers)
                else:
                    _write_shards(context, found, workers)
            digests = shard_checksums(context, destination, workers)
            write_small_files(context, sizes, workers, digests)
            receipts = dict(journal.done.sent)
        shards = len(plan.shards)
        # The check needs the memory that the plan takes, if the caller has dropped it too.
        del plan, context
        _have_checked(workdir.files, before_delivery, source, planned)
        if destination:
            destination.publish(workdir.files, receipts)
            workdir.discard()
        else:
            workdir.publish(set(sizes))
    return ExecutionReport(
        bytes_copied=sum(sizes.values()) - found.nbytes - workdir.sharing.nbytes,
        bytes_resumed=found.nbytes,
        shards=shards,
        shards_resumed=found.shards,
        seconds=time.monotonic() - begun,
        bytes_downloaded=meter.downloaded,
        bytes_shared=workdir.sharing.nbytes,
    )


def _clear_leftovers(out: Path, run: Run, system: System) -> None:
    """Remove the OUT.partial that a kill in the last moment of this run left beside OUT."""
    if Path(f"{out}.partial").is_dir():
        with (
            suppress(OutputError, OutputWriteError),
            lock_workdir(out, system, may_exist=True) as workdir,
            workdir.open_journal(run, restart=False),
        ):
            pass  # it has nothing that a run could go on with, and goes when it is let go of


def rehearse(
    plan: Plan,
    source: Source,
    out: Path,
    *,
    restart: bool = False,
    destination: ShardDestination | None = None,
    disk_budget: int | None = None,
    system: System | None = None,
) -> Space:
    """What `execute` would need of the disk. Writes nothing, and sends nothing.

    Arguments and errors are those of `execute`, as far as it raises them before its first byte;
    but for too little space, of which `require_space` tells.
    """
    system = system or default_system()
    sizes = output_sizes(plan)
    budget = sum(sizes.values()) if disk_budget is None else disk_budget
    if destination:
        require_budget(budget, sizes)
    if not destination and holds_result(out, plan, sizes):
        require_unchanged(source, plan.source_files)
        return Space(0, free_space(out, system))
    workdir = look_at_workdir(out, system)
    _require_place(plan, sizes, workdir, destination)
    record = workdir.earlier_work(_run(plan, source, ""), restart)
    done = record.done if record else JournalState()
    found = _earlier_work(plan, source, workdir, done, destination)
    sharable = sharable_files(plan, source, workdir)
    needed = needed_nbytes(plan, sizes, found, sharable, budget if destination else None)
    return Space(needed, workdir.space(restart=restart))


def _require_place(
    plan: Plan, sizes: dict[str, int], workdir: WorkDir, destination: ShardDestination | None
) -> None:
    """Raise where the folder cannot take the result, or a score file is no longer what it was."""
    if not destination:
        workdir.require_one_mount()
    if workdir.folds_case:
        require_distinct(sizes)
    for _, origin, sha256 in plan.score_files:
        require_read(Path(origin), sha256, origin)


def _earlier_work(
    plan: Plan,
    source: Source,
    workdir: WorkDir,
    done: JournalState,
    destination: ShardDestination | None,
) -> ResumeState:
    """What earlier runs have done. Raises where the source changed, or the destination differs."""
    require_unchanged(source, plan.source_files)
    require_receipts(destination, done, workdir)
    return find_resume_state(plan.shards, workdir, done)


def _run(plan: Plan, source: Source, command: str) -> Run:
    pinned = source.is_remote and source.revision is not None
    origin = f"{source.location.partition('@')[0]}@{source.revision}" if pinned else ""
    asked = dict(plan.asked) | ({"--checksums": "given"} if plan.checksums else {})
    return Run(
        plan.digest(),
        plan.source_fingerprint,
        plan.source_files,
        origin,
        asked,
        command=command,
        shards=len(plan.shards),
        nbytes=sum(shard.nbytes for shard in plan.shards),
    )


def require_budget(budget: int, sizes: dict[str, int]) -> None:
    """Raise UsageError where a disk budget is less than the largest file; sizes: by name."""
    name = max(sizes, key=sizes.__getitem__)
    if sizes[name] > budget:
        raise UsageError(
            "--disk-budget",
            f"{format_size(budget)} ({budget:,} bytes) is less than {name} alone takes, "
            f"{format_size(sizes[name])} ({sizes[name]:,} bytes)",
            "give a larger budget or a smaller --max-shard-size",
        )


def _start(plan: Plan, sizes: dict[str, int], found: ResumeState) -> Progress:
    total = sum(sizes.values())
    return Progress(
        found.nbytes, total, found.nbytes, found.shards, len(plan.shards), len(found.sent)
    )


def _workers_for(source: Source) -> int:
    if source.is_remote:
        return REMOTE_WORKERS_BY_DEFAULT
    return min(MOST_WORKERS_BY_DEFAULT, os.cpu_count() or 1)


def _write_shards(context: RunContext, found: ResumeState, workers: int) -> None:
    """Write the shards that stay on this disk. Raises the first error that any worker met."""
    writer = ShardWriter(context, found.parts, lambda shard: None)
    todo = found.unfinished(context.plan.shards)
    for shard in todo:
        writer.begin(shard)
    # Downloads go one shard after the other: a kill should leave few in part.
    at_once = 1 if context.source.is_remote else workers
    _fill(context, writer, todo, todo, workers, at_once)


def _send_shards(
    context: RunContext,
    found: ResumeState,
    destination: ShardDestination,
    budget: int,
    workers: int,
) -> None:
    """Write the shards, as many at a time as the budget allows, and send each when finished."""
    for name in found.sent:
        context.workdir.drop_file(name)  # a kill can come between receipt and removal
    todo = found.unfinished(context.plan.shards)
    # Those that already take disk come first: others may have to wait for it.
    todo.sort(key=lambda shard: shard.file not in found.parts)
    held = sum(found.whole.values()) + sum(s.nbytes for s in todo if s.file in found.parts)
    disk = DiskBudget(budget, held, context.meter)
    with ShardUploader(destination, context, disk) as uploader:
        for name, nbytes in found.whole.items():
            uploader.put(name, nbytes)
        writer = ShardWriter(
            context, found.parts, lambda shard: uploader.put(shard.file, shard.nbytes)
        )

        def begun() -> Iterator[OutputShard]:
            for shard in todo:
                if shard.file not in found.parts:
                    disk.take(shard.nbytes)
                writer.begin(shard)
                yield shard

        _fill(context, writer, begun(), todo, workers, at_once=1)


def _fill(
    context: RunContext,
    writer: ShardWriter,
    begun: Iterable[OutputShard],
    todo: Iterable[OutputShard],
    workers: int,
    at_once: int,
) -> None:
    gap = writer.max_gap(todo)
    run_tasks(
        writer.tasks(begun, at_once),
        lambda: RangeTransfer(
            context.source,
            context.workdir.system,
            context.meter,
            gap,
            context.workdir.sharing,
        ),
        workers,
        context.meter,
    )


def _have_checked(
    folder: Path,
    check: Callable[[Path], None] | None,
    source: Source,
    planned: tuple[SourceFile, ...],
) -> None:
    require_unchanged(source, planned)
    if check is None:
        return
    try:
        check(folder)
    except ShardSurgeonError:
        # A sound result does not verify against a source that changed meanwhile: say that instead.
        require_unchanged(source, planned)
        raise


@contextmanager
def _saying_what_is_kept(workdir: WorkDir) -> Iterator[None]:
    """Have what interrupts a run say what a rerun goes on from."""
    try:
        yield
    except Exception:
        raise
    except BaseException as stop:
        if workdir.opened is not None and not os.path.lexists(workdir.out):
            stop.add_note(_kept(workdir.opened, workdir.folder))
        raise


def _kept(journal: Journal, folder: Path) -> str:
    """`449 MB of 1.5 GB are kept in OUT.partial; the same command resumes`."""
    if not journal.done.nbytes:
        return "nothing is finished yet that could be kept"
    amount = f"{format_size(journal.done.nbytes)} of {format_size(journal.run.nbytes)}"
    where = f"sent or kept in {folder}" if journal.done.sent else f"kept in {folder}"
    return f"{amount} are {where}; the same command resumes"


@contextmanager
def _blaming_the_source(
    source: Source, planned: tuple[SourceFile, ...], workdir: WorkDir
) -> Iterator[None]:
    """Say that the source changed where a shard on its way out does not hold for that, and keep
    nothing that a rerun could not tell from what it reads."""
    try:
        try:
            yield
        except VerificationError:
            require_unchanged(source, planned)
            raise
    except SourceChangedError:
        if workdir.is_ours and not source.touched.isdisjoint(file.name for file in planned):
            workdir.discard()
        raise
