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


# Of a thread of `run_threads`: the event that says that it is to end.
_group = threading.local()


def is_stopping() -> bool:
    """Whether this thread is one of several that are to end, be it by an error or by Ctrl-C.

    Whoever waits for the network looks here every now and then, and gives up.
    """
    told: threading.Event | None = getattr(_group, "told", None)
    return told is not None and told.is_set()


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
    interrupted, told = threading.Event(), threading.Event()
    ends = [threading.Event() for _ in range(count)]

    def tell() -> None:
        told.set()
        stop()

    def run(end: threading.Event) -> None:
        _group.told = told
        try:
            if not interrupted.is_set():
                work()
        except BaseException as error:  # raised again below
            errors.append(error)
            tell()
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
        tell()
        for thread, end in zip(threads, ends, strict=True):
            if thread.ident is not None and not daemon:  # it was started
                wait_for(end)
        raise
    if errors:
        raise errors[0]


def call_in_time(call: Callable[[], Result], seconds: float) -> Result:
    """What `call` returns or raises; raises TimeoutError after so many seconds, or when stopped.

    For calls that wait for the network by rules of their own: one that is given up goes on, on a
    thread that nothing waits for.
    """
    results: list[Result] = []
    errors: list[BaseException] = []
    ended = threading.Event()

    def run() -> None:
        try:
            results.append(call())
        except BaseException as error:  # raised again below
            errors.append(error)
        finally:
            ended.set()

    threading.Thread(None, run, "in-time", daemon=True).start()
    end = time.monotonic() + seconds
    while not ended.wait(min(max(end - time.monotonic(), 0.0), WAKE_SECONDS)):
        if is_stopping() or time.monotonic() >= end:
            raise TimeoutError(f"no answer within {seconds:,.0f} s")
    if errors:
        raise errors[0]
    return results[0]


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
