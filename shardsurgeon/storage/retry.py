"""Retries: what every remote source does about a bad network.

A request that fails for a passing reason raises `RetryableError`. Here that becomes a pause and
another try, which asks only for what is still missing, and in the end a NetworkError. Bytes that
arrive renew the count of tries: a slow or shaky connection gets there, a dead one does not, and
neither does one that brings less than the least rate, however it spreads it over tries.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TypeVar

from shardsurgeon.errors import NetworkError, SourceReadError, printable
from shardsurgeon.storage.threads import is_stopping

Result = TypeVar("Result")
# Given the first byte that is missing: the bytes from there on, as they arrive.
Request = Callable[[int], AbstractContextManager[Iterator[bytes]]]

# How often, in seconds, a stream that pauses yields an empty piece, so that its reader can stop it.
_HEARTBEAT_SECONDS = 0.25
# So long an answer may take to begin without being counted as a wait.
_PROMPT_SECONDS = 5.0
# Shorter waits are not worth a line.
_SAID_SECONDS = 5.0
_AGAIN = "check the connection, then run the same command again"
_LATER = "run the same command again later: it goes on where it stopped"
_LOG = logging.getLogger(__name__)


class RetryableError(Exception):
    """A request failed, but may succeed the next time.

    said: why, without addresses or secrets; wait: the seconds that the server asked to wait;
    most: so many failures in a row are enough, where the policy would allow more.
    """

    def __init__(self, said: str, wait: float = 0.0, most: int | None = None) -> None:
        super().__init__(said)
        self.said = said
        self.wait = wait
        self.most = most


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How many tries there are, how long is waited between them, and what counts as too slow.

    tries: failures in a row, without a byte in between, after which it is given up; first_wait
    (seconds) doubles with each of them up to longest_wait; longest_asked: a server that asks for a
    longer wait is not waited for, the Hub's own limit being one of five minutes; longest_in_all:
    all waits of a source together, beyond what its bytes made up for at the least rate.

    least_rate: bytes per second; window: seconds. A connection that brings less on the average of
    a window is broken off, and after slow_windows of them in a row it is given up. Each
    connection is measured for itself, so the rate is far below what a share of a slow line brings.
    """

    tries: int = 10
    first_wait: float = 0.5
    longest_wait: float = 30.0
    longest_asked: float = 300.0
    longest_in_all: float = 900.0
    least_rate: float = 1024.0
    window: float = 60.0
    slow_windows: int = 3

    def brief(self) -> RetryPolicy:
        """For the first request to a place: a mistyped address should not cost minutes."""
        return replace(self, tries=min(self.tries, 4))

    def too_slow(self) -> RetryableError:
        """The failure of a connection that brings less than the least rate."""
        return RetryableError(self.slow_words(), most=self.slow_windows)

    def slow_words(self) -> str:
        """Why such a connection is broken off."""
        return f"less than {self.least_rate:,.0f} bytes a second came for {self.window:,.0f} s"


class Waits:
    """What one source waits for, over all of its requests: said, and limited.

    Waits that several threads spend side by side count once.
    """

    def __init__(self, policy: RetryPolicy) -> None:
        self._policy = policy
        self._lock = threading.Lock()
        self._until = self._said_until = 0.0
        self._waited = self._received = 0.0

    def receive(self, nbytes: int) -> None:
        """Count bytes that came: they make up for waits."""
        with self._lock:
            self._received += nbytes

    def begin(self, where: str, seconds: float, said: str) -> None:
        """Say that `where` is waited for; raises NetworkError where it was waited too long."""
        with self._lock:
            end = time.monotonic() + seconds
            self._waited += max(end - max(self._until, end - seconds), 0.0)
            self._until = max(self._until, end)
            self._require_some_left(where, said)
            worth_a_line = seconds >= _SAID_SECONDS and end >= self._said_until + _SAID_SECONDS
            self._said_until = end if worth_a_line else self._said_until
        if worth_a_line:
            _LOG.warning("%s", printable(f"{where}: waiting {seconds:,.0f} s ({said})"))
        else:
            _LOG.debug("%s", printable(f"{where}: trying again in {seconds:.1f} s ({said})"))

    def spend(self, where: str, seconds: float) -> None:
        """Something was waited for without a pause: an answer, or bytes. Raises NetworkError as
        `begin` does. What is prompt is not counted.
        """
        if seconds > _PROMPT_SECONDS:
            with self._lock:
                self._waited += seconds - _PROMPT_SECONDS
                self._require_some_left(where, "slow answers")

    def _require_some_left(self, where: str, said: str) -> None:
        allowed = self._policy.longest_in_all + self._received / self._policy.least_rate
        if self._waited > allowed:
            problem = f"gave up after {self._waited:,.0f} s of waiting in all ({said})"
            raise NetworkError(where, problem, _LATER)


class _Tries:
    """The failures of one request, counted."""

    def __init__(self, where: str, policy: RetryPolicy, waits: Waits | None) -> None:
        self._where = where
        self._policy = policy
        self._waits = waits or Waits(policy)
        self._failed = 0
        # Of the window under way: its bytes, and its seconds so far.
        self._nbytes, self._seconds, self._slow = 0, 0.0, 0

    def receive(self, nbytes: int) -> None:
        """Bytes came."""
        self._failed = 0
        self._nbytes += nbytes
        self._waits.receive(nbytes)

    def spend(self, seconds: float) -> None:
        """Seconds went by, for bytes to come in. Raises NetworkError after too many slow ones."""
        policy = self._policy
        self._waits.spend(self._where, seconds)
        self._seconds += seconds
        if self._seconds < policy.window:
            return
        self._slow = self._slow + 1 if self._nbytes < policy.least_rate * self._seconds else 0
        self._nbytes, self._seconds = 0, 0.0
        if self._slow >= policy.slow_windows:
            problem = f"gave up: {policy.slow_words()}, {self._slow} times in a row"
            raise NetworkError(self._where, problem, _AGAIN)

    def pause(self, interruption: RetryableError) -> float:
        """How many seconds to wait now. Raises NetworkError where it is time to give up."""
        self._failed += 1
        policy, said = self._policy, interruption.said
        if is_stopping():
            raise NetworkError(self._where, "stopped") from interruption
        if interruption.wait > policy.longest_asked:
            asked = f"the server asks to wait {interruption.wait:,.0f} seconds ({said})"
            problem = f"{asked}, more than the {policy.longest_asked:,.0f} that are waited"
            raise NetworkError(
                self._where, problem, "run the same command again then"
            ) from interruption
        if self._failed >= min(policy.tries, interruption.most or policy.tries):
            problem = f"gave up after {self._failed} tries in a row ({said})"
            raise NetworkError(self._where, problem, _AGAIN) from interruption
        backoff = min(policy.first_wait * 2.0 ** (self._failed - 1), policy.longest_wait)
        # Spread out, so that connections that were cut together do not come back together.
        wait = max(backoff * random.uniform(0.5, 1.0), interruption.wait * random.uniform(1, 1.05))
        asked = " as the server asks" if interruption.wait >= wait / 1.05 else ""
        self._waits.begin(self._where, wait, f"{said}{asked}")
        return wait


def retry(
    call: Callable[[], Result], where: str, policy: RetryPolicy, waits: Waits | None = None
) -> Result:
    """What `call` returns at the first try without a RetryableError. Raises NetworkError.

    waits: those of the source that is asked, None for a call of its own, which may take long.
    """
    tries = _Tries(where, policy, waits)
    while True:
        begun = time.monotonic()
        try:
            result = call()
        except RetryableError as interruption:
            for _ in _waiting(tries.pause(interruption)):
                pass
            continue
        if waits is not None:
            waits.spend(where, time.monotonic() - begun)
        return result


def stream_pieces(
    request: Request,
    where: str,
    begin: int,
    end: int,
    policy: RetryPolicy,
    waits: Waits | None = None,
) -> Iterator[bytes]:
    """The bytes [begin, end), whatever happens to single requests; empty pieces while it waits.

    Raises NetworkError, and SourceReadError where a request gives more than it was asked for.
    """
    tries = _Tries(where, policy, waits)
    at = begin
    while at < end:
        begun, first = time.monotonic(), at
        try:
            with request(at) as pieces:
                for piece in pieces:
                    if not piece:
                        continue
                    if len(piece) > end - at:
                        raise SourceReadError(where, f"byte {end:,} was not asked for and came")
                    at += len(piece)
                    tries.receive(len(piece))
                    tries.spend(time.monotonic() - begun)
                    yield piece
                    # What the reader did with the piece took none of the network's time.
                    begun = time.monotonic()
            if at < end:
                raise RetryableError(f"the answer ended at byte {at:,} of {end:,}")
        except RetryableError as interruption:
            pause = tries.pause(interruption)
            # A server that is down brings nothing; the count of tries is for that.
            if at > first:
                tries.spend(time.monotonic() - begun + (0.0 if interruption.wait else pause))
            yield from _waiting(pause)


def _waiting(seconds: float) -> Iterator[bytes]:
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0 and not is_stopping():
        time.sleep(min(left, _HEARTBEAT_SECONDS))
        yield b""
