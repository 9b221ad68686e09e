"""SHA-256 of the files of a run, for the record that it writes of them.

Small files are digested as they are written. Shards are read back once all of them are there: those
that an earlier run finished are digested like this one's, and no journal is believed. Where shards
have been sent away, their receipts name their digests.
"""

from __future__ import annotations

import hashlib
from functools import partial
from io import FileIO

from shardsurgeon.execution.upload import ShardDestination
from shardsurgeon.execution.workdir import RunContext
from shardsurgeon.execution.workers import run_tasks
from shardsurgeon.storage.files import BUFFER_NBYTES, reading
from shardsurgeon.storage.phases import BYTES, phase


def shard_checksums(
    context: RunContext, destination: ShardDestination | None, workers: int
) -> dict[str, str]:
    """File name → SHA-256 (hex) of every shard, where the plan wants them; else nothing.

    The shards are finished, here or at the destination. Raises SourceReadError, and the first
    error that any worker met.
    """
    if not context.plan.checksums:
        return {}
    if destination is not None:
        return {name: destination.sha256(text) for name, text in context.journal.done.sent.items()}
    found: dict[str, str] = {}
    tasks = (partial(_digest, context, shard.file, found) for shard in context.plan.shards)
    total = sum(shard.nbytes for shard in context.plan.shards)
    with phase("hashing", total, BYTES) as context.meter.phase:
        run_tasks(tasks, lambda: None, workers, context.meter)
    return found


def _digest(context: RunContext, name: str, found: dict[str, str], _: None) -> None:
    path, system = context.workdir.files / name, context.workdir.system
    digest, buffer = hashlib.sha256(), memoryview(bytearray(BUFFER_NBYTES))
    with reading(path), FileIO(path) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            context.meter.advance(count)
        system.let_go(file, 0, file.tell())
    found[name] = digest.hexdigest()
