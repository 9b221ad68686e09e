"""Retries: what every remote source does about a bad network.

A request that fails for a passing reason raises `RetryableError`. Here that becomes a pause and
another try, which asks only for what is still missing, and in the end a NetworkError. Every byte
that arrives resets the count of tries: a slow or shaky connection gets there, a dead one does not.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TypeVar

from shardsurgeon.errors import NetworkError, SourceReadError

Result = TypeVar("Result")
# Given the first byte that is missing: the bytes from there on, as they arrive.
Request = Callable[[int], AbstractContextManager[Iterator[bytes]]]

# How often, in seconds, a stream that pauses yields an empty piece, so that its reader can stop it.
_HEARTBEAT_SECONDS = 0.25
_AGAIN = "check the connection, then run the same command again"


class RetryableError(Exception):
    """A request failed, but may succeed the next time.

    said: why, without addresses or secrets; wait: the seconds that the server asked to wait.
    """

    def __init__(self, said: str, wait: float = 0.0) -> None:
        super().__init__(said)
        self.said = said
        self.wait = wait


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How many tries there are and how many seconds are waited between them.

    tries: failures in a row, without a byte in between, after which it is given up; first_wait
    doubles with each of them up to longest_wait; longest_asked: a server that asks for a longer
    wait is not waited for.
    """

    tries: int = 10
    first_wait: float = 0.5
    longest_wait: float = 30.0
    longest_asked: float = 600.0

    def brief(self) -> RetryPolicy:
        """For the first request to a place: a mistyped address should not cost minutes."""
        return replace(self, tries=min(self.tries, 4))


class _Tries:
    """The failures of one request, counted."""

    def __init__(self, where: str, policy: RetryPolicy) -> None:
        self._where = where
        self._policy = policy
        self.failed = 0

    def pause(self, interruption: RetryableError) -> float:
        """How many seconds to wait now. Raises NetworkError where it is time to give up."""
        self.failed += 1
        policy, said = self._policy, interruption.said
        if interruption.wait > policy.longest_asked:
            problem = f"the server asks to wait {interruption.wait:,.0f} seconds ({said})"
            raise NetworkError(
                self._where, problem, "run the same command again then"
            ) from interruption
        if self.failed >= policy.tries:
            problem = f"gave up after {self.failed} tries in a row ({said})"
            raise NetworkError(self._where, problem, _AGAIN) from interruption
        backoff = min(policy.first_wait * 2.0 ** (self.failed - 1), policy.longest_wait)
        # Spread out, so that connections that were cut together do not come back together.
        return max(backoff * random.uniform(0.5, 1.0), interruption.wait * random.uniform(1, 1.05))


def retry(call: Callable[[], Result], where: str, policy: RetryPolicy) -> Result:
    """What `call` returns at the first try without a RetryableError. Raises NetworkError."""
    tries = _Tries(where, policy)
    while True:
        try:
            return call()
        except RetryableError as interruption:
            time.sleep(tries.pause(interruption))


def stream_pieces(
    request: Request, where: str, begin: int, end: int, policy: RetryPolicy
) -> Iterator[bytes]:
    """The bytes [begin, end), whatever happens to single requests; empty pieces while it waits.

    Raises NetworkError, and SourceReadError where a request gives more than it was asked for.
    """
    tries = _Tries(where, policy)
    at = begin
    while at < end:
        try:
            with request(at) as pieces:
                for piece in pieces:
                    if not piece:
                        continue
                    if len(piece) > end - at:
                        raise SourceReadError(where, f"byte {end:,} was not asked for and came")
                    tries.failed = 0
                    at += len(piece)
                    yield piece
            if at < end:
                raise RetryableError(f"the answer ended at byte {at:,} of {end:,}")
        except RetryableError as interruption:
            yield from _waiting(tries.pause(interruption))


def _waiting(seconds: float) -> Iterator[bytes]:
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        time.sleep(min(left, _HEARTBEAT_SECONDS))
        yield b""
