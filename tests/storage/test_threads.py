"""Threads: results in order, the first error, and a wait that Ctrl-C ends."""

from __future__ import annotations

import _thread
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from shardsurgeon.storage.threads import (
    call_in_time,
    is_stopping,
    map_in_threads,
    run_threads,
    wait_for,
)


@pytest.fixture
def heeding_ctrl_c() -> Iterator[None]:
    """Tests that run in the background ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_results_come_in_the_order_of_the_items() -> None:
    def call(number: int) -> int:
        time.sleep(0.01 * (number % 3))
        return number * number

    assert map_in_threads(call, iter(range(9)), 4, "test") == [n * n for n in range(9)]
    assert map_in_threads(call, [], 4, "test") == []


def test_as_many_calls_as_asked_for_are_under_way_at_once() -> None:
    together = threading.Barrier(3, timeout=10)
    map_in_threads(lambda number: together.wait(), range(6), 3, "test")


def test_the_first_error_is_raised_and_no_further_item_taken() -> None:
    seen: list[int] = []

    def call(number: int) -> None:
        seen.append(number)
        if number == 2:
            raise OSError("no")

    with pytest.raises(OSError, match="no"):
        map_in_threads(call, range(9), 1, "test")
    assert seen == [0, 1, 2]


def test_an_error_of_the_items_is_raised() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise OSError("no more")

    with pytest.raises(OSError, match="no more"):
        map_in_threads(str, items(), 2, "test")


def test_others_are_told_of_an_error_and_waited_for() -> None:
    stopped = threading.Event()
    ended: list[bool] = []

    def call(number: int) -> None:
        if number == 0:
            raise OSError("no")
        ended.append(stopped.wait(10))
        time.sleep(0.05)
        ended.append(True)

    with pytest.raises(OSError, match="no"):
        map_in_threads(call, [1, 0], 2, "test", stopped.set)
    assert ended == [True, True]


@pytest.mark.usefixtures("heeding_ctrl_c")
def test_ctrl_c_ends_the_wait_and_the_threads() -> None:
    stopped, together = threading.Event(), threading.Barrier(4, timeout=10)
    ended: list[bool] = []

    def work() -> None:
        together.wait()
        ended.append(stopped.wait(10))

    def press() -> None:
        together.wait()
        _thread.interrupt_main()

    threading.Thread(target=press).start()
    with pytest.raises(KeyboardInterrupt):
        run_threads(work, 3, "test", stopped.set)
    assert ended == [True] * 3


def test_daemon_threads_are_not_waited_for() -> None:
    never = threading.Event()

    def call(number: int) -> None:
        if number == 0:
            raise OSError("no")
        never.wait(60)

    begun = time.monotonic()
    with pytest.raises(OSError, match="no"):
        map_in_threads(call, [1, 0], 2, "test", daemon=True)
    assert time.monotonic() - begun < 30
    never.set()


def test_a_wait_ends_with_the_event_or_with_the_time_given() -> None:
    event = threading.Event()
    begun = time.monotonic()
    wait_for(event, 0.3)
    assert 0.25 < time.monotonic() - begun < 10
    threading.Timer(0.3, event.set).start()
    wait_for(event)
    assert event.is_set()


def test_threads_that_wait_are_told_of_an_error_of_another() -> None:
    told: list[bool] = []
    waiting = threading.Barrier(2)

    def work() -> None:
        if waiting.wait() == 0:
            raise ValueError("failed")
        while not is_stopping():
            time.sleep(0.01)
        told.append(True)

    with pytest.raises(ValueError, match="failed"):
        run_threads(work, 2, "waiting", lambda: None)
    assert told == [True]
    assert not is_stopping()


def test_a_call_in_time_gives_what_it_returns_or_raises() -> None:
    assert call_in_time(lambda: 5, 10) == 5
    with pytest.raises(ValueError, match="x"):
        call_in_time(lambda: int("x"), 10)


def test_a_call_that_does_not_end_is_left_alone() -> None:
    never = threading.Event()
    with pytest.raises(TimeoutError, match="no answer within 0 s"):
        call_in_time(never.wait, 0.05)
    never.set()


def test_a_call_that_does_not_end_is_left_when_the_others_end() -> None:
    never = threading.Event()

    def work() -> None:
        if waiting.wait() == 0:
            raise ValueError("failed")
        with pytest.raises(TimeoutError):
            call_in_time(never.wait, 1000)

    waiting = threading.Barrier(2)
    with pytest.raises(ValueError, match="failed"):
        run_threads(work, 2, "waiting", lambda: None)
    never.set()
