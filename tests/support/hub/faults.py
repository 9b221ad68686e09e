"""What can go wrong on the way, on demand."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


@dataclass
class Fault:
    """Strikes requests whose `METHOD /path` the pattern `on` is found in.

    The first `skip` of them pass, then every `every`-th is struck, `times` in all (None: without
    end). Several kinds may be combined; what happens first, happens first.
    """

    on: str
    times: int | None = 1
    skip: int = 0
    every: int = 1
    # Something happens elsewhere, and is finished before the request goes on.
    do: Callable[[], object] | None = None
    # The answer begins later.
    delay: float = 0.0
    # This answer instead of the true one, with `body` or a JSON error.
    status: int | None = None
    body: bytes | None = None
    # These headers instead of the answer's own. In them and in `body`, {token} is the token that
    # the request carried.
    headers: Mapping[str, str] = field(default_factory=dict)
    # The true answer's body, changed.
    rewrite: Callable[[bytes], bytes] | None = None
    retry_after: int | str | None = None
    # With a 429: the Hub's own RateLimit header instead of Retry-After, in seconds.
    ratelimit_reset: int | None = None
    # The connection ends after so many bytes of the answer's body; with `reset` by RST, and then
    # the client may lose bytes that were sent.
    cut_after: int | Callable[[], int] | None = None
    reset: bool = False
    # The connection ends after so many bytes of the request's body.
    cut_upload_after: int | Callable[[], int] | None = None
    # The request is carried out, the connection ends without an answer.
    lose_answer: bool = False
    # A server that takes no heed of Range, or sends another range (and says so in Content-Range).
    ignore_range: bool = False
    shift_range: int = 0
    # This answer trickles.
    bytes_per_second: float | None = None
    # Its body comes byte by byte, with so many seconds between two.
    drip: float | None = None

    matched: int = field(default=0, init=False)
    struck: int = field(default=0, init=False)

    def strikes(self, request: str) -> bool:
        """Whether this request is struck; counts it."""
        if re.search(self.on, request) is None:
            return False
        self.matched += 1
        due = self.matched > self.skip and (self.matched - self.skip - 1) % self.every == 0
        if not due or (self.times is not None and self.struck >= self.times):
            return False
        self.struck += 1
        return True


class Faults:
    """The faults in force; the first that strikes a request is the only one that it meets."""

    def __init__(self) -> None:
        self._faults: list[Fault] = []
        self._lock = threading.Lock()

    def add(self, fault: Fault) -> Fault:
        """Put it in force."""
        with self._lock:
            self._faults.append(fault)
        return fault

    def clear(self) -> None:
        """All is well again."""
        with self._lock:
            self._faults.clear()

    def strike(self, request: str) -> Fault | None:
        """The fault that this request meets."""
        with self._lock:
            return next((fault for fault in self._faults if fault.strikes(request)), None)


def number(value: int | Callable[[], int]) -> int:
    """A place to cut at, given or thrown."""
    return value() if callable(value) else value
