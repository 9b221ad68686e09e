"""Patience: how long is waited, and when it ends."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from shardsurgeon.errors import NetworkError, SourceReadError
from shardsurgeon.storage import retry as module
from shardsurgeon.storage.retry import RetryableError, RetryPolicy, retry, stream_pieces

DATA = bytes(range(200))


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds of every pause, which then takes none."""
    pauses: list[float] = []

    def waiting(seconds: float) -> Iterator[bytes]:
        pauses.append(seconds)
        yield b""

    monkeypatch.setattr(module, "_waiting", waiting)
    return pauses


def failing(times: int, wait: float = 0.0) -> Callable[[], str]:
    tries = iter(range(times))

    def call() -> str:
        if next(tries, None) is not None:
            raise RetryableError("busy", wait)
        return "done"

    return call


def test_pauses_double_up_to_the_longest_and_are_spread_out(waits: list[float]) -> None:
    policy = RetryPolicy(tries=10, first_wait=1, longest_wait=8)
    assert retry(failing(7), "x", policy) == "done"
    for wait, longest in zip(waits, [1, 2, 4, 8, 8, 8, 8], strict=True):
        assert longest / 2 <= wait <= longest
    assert len(set(waits)) == 7


def test_what_the_server_asks_for_is_the_least(waits: list[float]) -> None:
    assert retry(failing(3, wait=5), "x", RetryPolicy(first_wait=1)) == "done"
    assert all(5 <= wait <= 5.25 for wait in waits)
    waits.clear()
    assert retry(failing(3, wait=0.01), "x", RetryPolicy(first_wait=1)) == "done"
    assert all(wait >= 0.5 for wait in waits)


def test_a_try_that_is_not_worth_a_line_is_told_in_detail(
    waits: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, "shardsurgeon"):
        retry(failing(2), "x", RetryPolicy(first_wait=1))
    assert [record.levelname for record in caplog.records] == ["DEBUG", "DEBUG"]
    assert all(re.fullmatch(r"x: trying again in \d\.\d s \(busy\)", m) for m in caplog.messages)


def test_it_is_given_up_after_so_many_tries(waits: list[float]) -> None:
    with pytest.raises(NetworkError, match=r"x: gave up after 4 tries in a row \(busy\)"):
        retry(failing(99), "x", RetryPolicy().brief())
    assert len(waits) == 3


def test_a_call_may_take_long_where_it_is_no_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    """An upload takes an hour, and is no wait."""
    clock = iter(range(0, 10**6, 3600))
    monkeypatch.setattr(module.time, "monotonic", lambda: float(next(clock)))
    assert retry(lambda: "done", "x", RetryPolicy()) == "done"
    with pytest.raises(NetworkError, match="of waiting in all"):
        retry(lambda: "done", "x", RetryPolicy(), module.Waits(RetryPolicy()))


def in_steps(*steps: int) -> Callable[[int], object]:
    """Requests that bring so many bytes each, and are cut then."""
    left = list(steps)

    @contextmanager
    def request(at: int) -> Iterator[Iterator[bytes]]:
        nbytes = left.pop(0)
        yield iter([DATA[at : at + nbytes]])

    return request


QUICK = RetryPolicy(tries=4, first_wait=0.001)


def test_every_byte_renews_patience() -> None:
    request = in_steps(0, 1, 0, 1, 0, 0, 198)
    pieces = stream_pieces(request, "x", 0, 200, QUICK)  # type: ignore[arg-type]
    assert b"".join(pieces) == DATA


def test_a_surplus_byte_is_refused() -> None:
    pieces = stream_pieces(in_steps(11), "x", 0, 10, QUICK)  # type: ignore[arg-type]
    with pytest.raises(SourceReadError, match="byte 10 was not asked for and came"):
        list(pieces)
