"""The files of an output that are no shards: carried over from the source, or brought by the plan.

`execution` has them written when all shards are done. They are made anew by every run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from shardsurgeon.execution.copying import Mover
from shardsurgeon.execution.crew import run_tasks
from shardsurgeon.execution.filling import BATCH_NBYTES
from shardsurgeon.execution.job import Job
from shardsurgeon.execution.moves import Move, batches
from shardsurgeon.execution.surgeryplan import Literal, Segment
from shardsurgeon.storage.durable import reading, reserve_file, sync_path, writing


def write_small_files(job: Job, sizes: dict[str, int], workers: int) -> None:
    """Copy side files and extra files, then write the documents in the plan's order.

    sizes: of every output file, in bytes. Raises the first error met.
    """

    def new_mover() -> Mover:
        return Mover(job.source, job.place.system, job.meter)

    tasks = (partial(_carry_over, job, name, sizes[name]) for name in job.plan.side_files)
    run_tasks(tasks, new_mover, workers, job.meter)
    mover = new_mover()
    for name, origin in job.plan.extra_files:
        with _new_file(job, name, sizes[name]) as path:
            mover.copy_file(Path(origin), sizes[name], path)
    for name, data in job.plan.documents:
        with _new_file(job, name, 0) as path:
            mover.move([Move(Literal(data), 0)], path)


def _carry_over(job: Job, name: str, nbytes: int, mover: Mover) -> None:
    """Copy a side file, byte for byte."""
    with _new_file(job, name, nbytes) as path:
        for batch in batches([Move(Segment(name, 0, nbytes), 0)], BATCH_NBYTES):
            mover.move(batch, path)
        _carry_executable_bits(job.source.local_path(name), path)


@contextmanager
def _new_file(job: Job, name: str, nbytes: int) -> Iterator[Path]:
    """A file to be filled inside the `with` block, and finished at its end."""
    path = job.place.begin_file(name)
    reserve_file(path, nbytes, job.place.system)
    yield path
    sync_path(path, job.place.system)
    job.place.finish_file(name)


def _carry_executable_bits(origin: Path | None, copy: Path) -> None:
    """A script that could be run can still be run; all else follows the user's umask."""
    if origin is None:
        return
    with reading(origin):
        bits = origin.stat().st_mode & 0o111
    if bits:
        with writing(copy):
            copy.chmod(copy.stat().st_mode | bits)
