"""Threads whose end is waited for in a way that Ctrl-C ends.

On Windows Ctrl-C does not end a wait, so every wait here is short and begun again. A call that
waits for the network cannot be ended from outside: such calls run on daemon threads, which neither
an error nor the end of the program waits for. All others are told to stop and are waited for,
because they share files and buffers with those who started them.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable, Sized
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

# How long, in seconds, a single wait lasts before Ctrl-C is looked for.
WAKE_SECONDS = 0.2


def wait_for(event: threading.Event, seconds: float = math.inf) -> None:
    """Wait for an event, for so many seconds at most.

    Threads say by an event that they have ended: a `Thread.join` that Ctrl-C interrupts takes a
    thread for ended that still runs (Python 3.11).
    """
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0 and not event.wait(min(left, WAKE_SECONDS)):
        pass


def run_threads(
    work: Callable[[], object],
    count: int,
    name: str,
    stop: Callable[[], object],
    *,
    daemon: bool = False,
) -> None:
    """Run `work` on `count` threads called `name`, and return when all of them have returned.

    Raises the first error that any of them raised, or what interrupts the wait. Before that it
    calls `stop`, which should have the others return soon, and waits for them unless `daemon`.
    """
    errors: list[BaseException] = []
    interrupted = threading.Event()
    ends = [threading.Event() for _ in range(count)]

    def run(end: threading.Event) -> None:
        try:
            if not interrupted.is_set():
                work()
        except BaseException as error:  # raised again below
            errors.append(error)
            stop()
        finally:
            end.set()

    threads = [threading.Thread(None, run, name, (end,), daemon=daemon) for end in ends]
    try:
        for thread in threads:
            thread.start()
        for end in ends:
            while not (daemon and errors) and not end.wait(WAKE_SECONDS):
                pass
    except BaseException:
        interrupted.set()
        stop()
        for thread, end in zip(threads, ends, strict=True):
            if thread.ident is not None and not daemon:  # it was started
                wait_for(end)
        raise
    if errors:
        raise errors[0]


def map_in_threads(
    call: Callable[[Item], Result],
    items: Iterable[Item],
    count: int,
    name: str,
    stop: Callable[[], object] = lambda: None,
    *,
    daemon: bool = False,
) -> list[Result]:
    """What `call` returns for every item, in their order; `count` calls at once.

    Items are taken one by one, by one thread at a time, and no further ones after an error. Raises
    what `run_threads` raises; `stop` should have calls that are under way return soon.
    """
    if isinstance(items, Sized):
        count = min(count, len(items))
    waiting = enumerate(items)
    results: dict[int, Result] = {}
    taking, stopped = threading.Lock(), threading.Event()

    def work() -> None:
        while not stopped.is_set():
            with taking:
                taken = next(waiting, None)
            if taken is None:
                return
            results[taken[0]] = call(taken[1])

    def end() -> None:
        stopped.set()
        stop()

    run_threads(work, count, name, end, daemon=daemon)
    return [results[number] for number in sorted(results)]
