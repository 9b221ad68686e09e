"""What long work is at, for whoever wants to show it: its phases, and how far each of them is.

    with phase("hashing", nbytes, BYTES) as at:
        at.advance(count)

The work names its phases and counts; who listens, the caller says with `listening`, and nobody is
called for a count: a listener looks at the phase when it wants to. Without a listener there is
nothing but the count. Phases are begun in the thread that listens, or one that was given its
context; what other threads begin is nobody's concern, but they may count for a phase.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

BYTES = "B"


class Phase:
    """One phase, while it lasts. Safe for any number of threads.

    name: what is being done, `copying`; total: how much there is, 0 where nobody knows; unit: of
    what is counted, BYTES or "" for things; done: how much is; resumed: how much of that was done
    when it began; detail: words beside the numbers, `3/12 shards`; begun: time.monotonic().
    """

    __slots__ = ("_counting", "begun", "detail", "done", "name", "resumed", "total", "unit")

    def __init__(self, name: str, total: int = 0, unit: str = "", done: int = 0) -> None:
        self.name, self.total, self.unit = name, total, unit
        self.done = self.resumed = done
        self.detail = ""
        self.begun = time.monotonic()
        self._counting = threading.Lock()

    def advance(self, count: int = 1) -> None:
        """Count what is done."""
        with self._counting:
            self.done += count


class Listener(Protocol):
    """Is told when a phase begins and when it ends. Phases within one another are told so."""

    def begin(self, phase: Phase) -> None:
        """A phase begins, which the listener may look at until it ends."""
        ...

    def end(self, phase: Phase) -> None:
        """It is over, be it by an error."""
        ...


_listener: ContextVar[Listener | None] = ContextVar("shardsurgeon_listener", default=None)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """For the time of a `with`, tell the listener of the phases that this thread begins."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


@contextmanager
def phase(name: str, total: int = 0, unit: str = "", done: int = 0) -> Iterator[Phase]:
    """A phase for the time of a `with`; the words are those of `Phase`."""
    begun, listener = Phase(name, total, unit, done), _listener.get()
    if listener is None:
        yield begun
        return
    try:
        listener.begin(begun)
        yield begun
    finally:
        listener.end(begun)
