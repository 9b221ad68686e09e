"""Threads that share the tasks of a run, and the meter that counts its progress and stops it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from shardsurgeon.storage.phases import Phase
from shardsurgeon.storage.threads import run_threads

WorkerState = TypeVar("WorkerState")


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is. Sizes in bytes; `resumed`, a part of `done`, was there before it began.

    shards_sent: finished shards that were sent to a destination, 0 where there is none.
    """

    done: int
    total: int
    resumed: int
    shards_done: int
    shards_total: int
    shards_sent: int = 0

    def words(self) -> str:
        """`3/12 shards, 2 sent`."""
        sent = f", {self.shards_sent} sent" if self.shards_sent else ""
        return f"{self.shards_done}/{self.shards_total} shards{sent}"


Listener = Callable[[Progress], None]


class Stopped(Exception):
    """Another worker has failed or the user has interrupted. Never leaves this package."""


class ProgressMeter:
    """Counts for all workers of a run, and keeps the first error that any of them met."""

    def __init__(self, start: Progress, listener: Listener | None) -> None:
        """Begin at `start`, and report it to the listener."""
        # Counts the bytes too, until another phase takes its place.
        self.phase = Phase("")
        self._lock = threading.Lock()
        self._stopped = False
        self._now = start
        self._downloaded = 0
        self._listener = listener
        self.error: BaseException | None = None
        self.advance(0)

    @property
    def now(self) -> Progress:
        """How far the run is."""
        return self._now

    @property
    def downloaded(self) -> int:
        """Bytes that came over the network."""
        return self._downloaded

    def stop(self, error: BaseException | None = None) -> None:
        """Make every later `advance` raise Stopped; the first error given is kept."""
        with self._lock:
            self.error = error if self.error is None else self.error
            self._stopped = True

    def check(self) -> None:
        """Raise Stopped if the run is to end."""
        if self._stopped:
            raise Stopped

    def advance(self, nbytes: int, *, shards: int = 0, sent: int = 0) -> None:
        """Count bytes written, and shards finished or sent.

        Raises Stopped, and what the listener raises.
        """
        self.check()
        with self._lock:
            now = self._now
            # Not `replace`, which takes longer than many a step.
            self._now = Progress(
                now.done + nbytes,
                now.total,
                now.resumed,
                now.shards_done + shards,
                now.shards_total,
                now.shards_sent + sent,
            )
            self.phase.advance(nbytes)
            if shards or sent:
                self.phase.detail = self._now.words()
            if self._listener is not None:
                self._listener(self._now)

    def receive(self, nbytes: int) -> None:
        """Count bytes that came over the network, needed or not. Raises Stopped."""
        self.check()
        with self._lock:
            self._downloaded += nbytes


def run_tasks(
    tasks: Iterator[Callable[[WorkerState], None]],
    make_state: Callable[[], WorkerState],
    workers: int,
    meter: ProgressMeter,
) -> None:
    """Run the tasks, roughly in order, and return when all are done.

    make_state: called once by each worker for what it keeps between tasks (a copy buffer). Only one
    worker at a time waits for the next task. Raises the first error that any worker met, or that
    stopped the meter.
    """
    taking = threading.Lock()

    def work() -> None:
        try:
            state = make_state()
            while True:
                with taking:
                    task = next(tasks, None)
                if task is None:
                    return
                task(state)
        except Stopped:
            pass
        except BaseException as error:
            meter.stop(error)
            raise

    run_threads(work, workers, "shardsurgeon", meter.stop)
    if meter.error is not None:
        raise meter.error
