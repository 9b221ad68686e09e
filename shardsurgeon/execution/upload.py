"""Shards that do not stay on this disk: sent one by one while others are still being written.

The executor is given a destination where the result belongs elsewhere (a repository, a bucket)
and the disk may be smaller than the result. A budget limits the bytes of shards on the disk, and
a thread of its own sends them and journals the receipts.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Mapping
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Protocol, Self

from shardsurgeon.errors import OutputError
from shardsurgeon.execution.journal import JournalState
from shardsurgeon.execution.workdir import RunContext, WorkDir
from shardsurgeon.execution.workers import ProgressMeter, Stopped
from shardsurgeon.storage.phases import phase
from shardsurgeon.storage.threads import WAKE_SECONDS, wait_for
from shardsurgeon.units import format_size

# How many seconds an interrupted run waits for the shard that is being sent.
UPLOAD_GRACE_SECONDS = 2.0
_LOG = logging.getLogger(__name__)


class ShardDestination(Protocol):
    """Where finished shards go."""

    @property
    def address(self) -> str:
        """Where that is, as messages print it. Receipts are valid for the same address only."""
        ...

    def send(self, name: str, path: Path) -> str:
        """Send a finished shard, or raise.

        Returns a receipt, a short text that the journal keeps; the file is removed afterwards.
        Called by one thread at a time, with the shards in the order in which they are finished.
        The same shard comes again if there was no receipt, or a kill came before it was noted.
        """
        ...

    def sha256(self, receipt: str) -> str:
        """The SHA-256, in hex, of the shard that a receipt is for."""
        ...

    def publish(self, folder: Path, receipts: Mapping[str, str]) -> None:
        """Publish everything at once: `folder` holds every other file, receipts every shard.

        A rerun calls it again if it raised, or if the run was killed meanwhile.
        """
        ...


def require_receipts(
    destination: ShardDestination | None, done: JournalState, workdir: WorkDir
) -> None:
    """Raise OutputError where shards were sent to another destination than this run's."""
    if done.sent and (destination is None or destination.address != done.address):
        raise OutputError(
            workdir.folder,
            "belongs to an interrupted run that sent "
            f"{len(done.sent)} of its shards to {done.address}",
            "repeat that command, choose another -o, or --restart starts over",
        )


class DiskBudget:
    """Bytes of disk for shards that are begun and not yet sent."""

    def __init__(self, nbytes: int, taken: int, meter: ProgressMeter) -> None:
        """nbytes: the whole budget; taken: what an earlier run left on the disk."""
        self._nbytes = nbytes
        self._taken = taken
        self._meter = meter
        self._changed = threading.Condition()

    def take(self, nbytes: int) -> None:
        """Wait until so many bytes are free, and take them. Raises Stopped."""
        with self._changed:
            while self._taken + nbytes > self._nbytes:
                self._meter.check()
                self._changed.wait(WAKE_SECONDS)
            self._taken += nbytes

    def release(self, nbytes: int) -> None:
        """Give so many bytes back."""
        with self._changed:
            self._taken -= nbytes
            self._changed.notify_all()


class ShardUploader:
    """A thread that sends shards; the `with` block ends when all are sent.

    If the block is left by an error, the shard being sent is still sent and the others are not. If
    it is left by Ctrl-C or a signal, that shard has UPLOAD_GRACE_SECONDS to arrive; then it is
    given up, and the next run sends it again.
    """

    def __init__(
        self, destination: ShardDestination, context: RunContext, disk: DiskBudget
    ) -> None:
        """disk: gets back the bytes of every shard that was sent."""
        self._destination = destination
        self._context = context
        self._disk = disk
        self._waiting: SimpleQueue[tuple[str, int] | None] = SimpleQueue()
        self._noting = threading.Lock()
        self._given_up = False
        self._ended = threading.Event()
        # A daemon, because nothing can end a call that waits for the network.
        self._thread = threading.Thread(target=self._work, name="shardsurgeon-send", daemon=True)

    def put(self, name: str, nbytes: int) -> None:
        """Queue a finished shard, by its name and size in bytes."""
        self._waiting.put((name, nbytes))

    def _work(self) -> None:
        try:
            while (shard := self._waiting.get()) is not None:
                self._context.meter.check()
                self._send(*shard)
        except Stopped:
            pass
        # Raised again by __exit__, or by a worker that notices it first.
        except BaseException as error:
            self._context.meter.stop(error)
        finally:
            self._ended.set()

    def _send(self, name: str, nbytes: int) -> None:
        receipt = self._destination.send(name, self._context.workdir.files / name)
        with self._noting:
            if self._given_up:
                raise Stopped
            self._context.journal.send(name, self._destination.address, receipt)
            self._context.workdir.drop_file(name)
        _LOG.debug("%s is sent, %s", name, format_size(nbytes))
        self._disk.release(nbytes)
        self._context.meter.advance(0, sent=1)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            self._context.meter.stop()
        self._waiting.put(None)
        try:
            wants_to_leave = error is not None and not isinstance(error, Exception)
            with phase("waiting for uploads") as at:
                at.detail, self._context.meter.phase = self._context.meter.now.words(), at
                wait_for(self._ended, UPLOAD_GRACE_SECONDS if wants_to_leave else math.inf)
        except BaseException:
            self._context.meter.stop()
            raise
        finally:
            with self._noting:
                self._given_up = True
        if error is None and self._context.meter.error is not None:
            raise self._context.meter.error
