"""How far a run is, told to whoever asked, and the order to stop carried back to its workers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is. Sizes in bytes; `resumed` of `done` were there before it began."""

    done: int
    total: int
    resumed: int
    shards_done: int
    shards_total: int


Listener = Callable[[Progress], None]


class Stopped(Exception):
    """Another worker has failed, or the user has had enough. Never leaves `execution`."""


class Meter:
    """Counts for all workers of a run."""

    def __init__(self, start: Progress, listener: Listener | None) -> None:
        """Begin at `start`, and say so."""
        self._lock = threading.Lock()
        self._stopped = False
        self._start = start
        self._done = start.done
        self._shards_done = start.shards_done
        self._listener = listener
        self.advance(0)

    def stop(self) -> None:
        """Make every later `advance` raise Stopped."""
        self._stopped = True

    def advance(self, nbytes: int, shards: int = 0) -> None:
        """Count bytes written and shards finished. Raises Stopped, and what the listener raises."""
        if self._stopped:
            raise Stopped
        with self._lock:
            self._done += nbytes
            self._shards_done += shards
            if self._listener is not None:
                start = self._start
                self._listener(
                    Progress(
                        self._done,
                        start.total,
                        start.resumed,
                        self._shards_done,
                        start.shards_total,
                    )
                )
