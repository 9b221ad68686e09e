"""Connections that no server can hold open for ever, and answers that it cannot make endless.

The HTTP library limits how long one read of a socket may take. A server that sends a byte in three
seconds, in its headers or in its body, stays below that limit for years. So a client's transports
are wrapped here, down to its sockets: what an answer brings is measured over a window, its head
and what is no file are read up to a limit, and no wait is without an end. That holds for our own
requests and, within `guarded_sessions`, for those that huggingface_hub makes for a push.

Works with the HTTP library that huggingface_hub brings along: httpx with its version 1, httpx2
with its version 2. A user's own client (`set_client_factory`) keeps its settings.
"""

from __future__ import annotations

import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Any
from urllib.parse import urljoin, urlsplit

from huggingface_hub import set_client_factory
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import _http as hub_client

from shardsurgeon.errors import NetworkError, redacted
from shardsurgeon.storage.limits import LISTING
from shardsurgeon.storage.retry import RetryableError, RetryPolicy
from shardsurgeon.storage.threads import WAKE_SECONDS, is_stopping

# The base of every transport error of either library, and the library.
HTTP_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]
HTTP_LIBRARY = sys.modules[HTTP_ERROR.__module__.partition(".")[0]]
REDIRECTS = frozenset({301, 302, 303, 307, 308})
MOST_REDIRECTS = 10

# An answer's head, interim answers (1xx) included.
HEAD_NBYTES = 256 << 10
# For how many seconds a listing may come: at the least rate it would take hours.
LISTING_SECONDS = 300.0
# What is read of an answer that refuses.
ERROR_NBYTES = 64 << 10
# How many seconds a server may take for its answer, where a caller of the library sets no limit:
# it may have to look at every file of a commit first.
SILENCE_SECONDS = 120.0
_TIMEOUTS = {"connect": 30.0, "read": SILENCE_SECONDS, "write": SILENCE_SECONDS, "pool": 600.0}
# So much at most is handed to a socket at once, to notice a server that takes it in drips.
_WRITE_NBYTES = 16 << 10

_REPORT = "check the address; if it is right, tell who runs that server"
_POLICY = "shardsurgeon_policy"
_LOCATION = "shardsurgeon_location"
_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504, 509, 520, 521, 522, 523, 524})
_NOT_DONE = frozenset({429, 503})
_LIMIT_RESET = re.compile(r";\s*r=0\s*;\s*t=([0-9]{1,18})(?![0-9])")
_WHOLE_NUMBER = re.compile(r"[0-9]{1,18}")
_now = threading.local()
_guarding = threading.Lock()


class _Uploaded:
    """Bytes of files that guarded clients have uploaded in this process."""

    def __init__(self) -> None:
        self._counting = threading.Lock()
        self.nbytes = 0

    def note(self, request: Any, response: Any) -> None:
        """Count the body of a request that a store has taken. What is put there is a file."""
        if request.method == "PUT" and response.status_code < 300:
            nbytes = whole_number(request.headers.get("Content-Length")) or 0
            with self._counting:
                self.nbytes += nbytes


_uploaded = _Uploaded()


def uploaded_nbytes() -> int:
    """How many bytes of files `guarded` clients have uploaded since the process began; those that
    Xet sends by itself are not among them."""
    return _uploaded.nbytes


def whole_number(text: str | None) -> int | None:
    """A number as headers spell it, in ASCII digits; None for anything else."""
    return int(text) if text is not None and _WHOLE_NUMBER.fullmatch(text) else None


def status_line(response: Any) -> str:
    """`503 Service Unavailable`."""
    try:
        return f"{response.status_code} {HTTPStatus(response.status_code).phrase}"
    except ValueError:
        return str(response.status_code)


def raise_if_passing(response: Any) -> None:
    """Raise RetryableError where a server says that it is busy or fails for the moment."""
    if response.status_code in _PASSING:
        raise RetryableError(status_line(response), asked_wait(response.headers))


def asked_wait(headers: Mapping[str, str]) -> float:
    """For how many seconds a busy server asks to be left alone; 0 where it does not say."""
    text = headers.get("Retry-After", "").strip()
    seconds = whole_number(text)
    if seconds is not None:
        return float(seconds)
    if text:
        try:
            return max(parsedate_to_datetime(text).timestamp() - time.time(), 0.0)
        except (ValueError, TypeError, LookupError, OverflowError, OSError):
            return 0.0
    match = _LIMIT_RESET.search(headers.get("RateLimit", ""))
    return float(match[1]) if match else 0.0


def redirect_target(response: Any, where: str) -> str:
    """The address that an answer leads to. where: what was asked for, as messages call it.

    Raises NetworkError, which no retry mends, where that is another kind of place than a server,
    one without encryption from one with it, or no address at all.
    """
    url: str = str(response.url)
    here = urlsplit(url)
    said = location_of(response)
    try:
        target: str = urljoin(url, said)
        there = urlsplit(target)
        sound = bool(said) and (there.port or 0) >= 0 and HTTP_LIBRARY.URL(target) is not None
    except (ValueError, HTTP_LIBRARY.InvalidURL):
        sound = False
    if not sound:
        problem = f"leads to {redacted(said)[:200]!r}, which is no address"
    elif there.scheme not in ("http", "https") or not there.hostname:
        scheme = redacted(target.partition(":")[0])[:20]
        problem = f"leads to {scheme}:, which is not followed"
    elif here.scheme == "https" and there.scheme == "http":
        problem = f"leads to {there.hostname} without encryption, which is not followed"
    else:
        if origin(target) == origin(url) and "@" in here.netloc and "@" not in there.netloc:
            login = here.netloc.rpartition("@")[0]
            target = there._replace(netloc=f"{login}@{there.netloc}").geturl()
        return target
    raise NetworkError(where, problem, _REPORT)


def location_of(response: Any) -> str:
    """The address in a redirect, as it came."""
    held: str = response.extensions.get(_LOCATION) or response.headers.get("Location", "")
    return held


def origin(url: str) -> tuple[str, str | None, int | None]:
    """What a login is for. Raises ValueError for what is not an address."""
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port


def guarded(client: Any) -> Any:
    """The client itself, from now on with limits for everything that it receives."""
    with _guarding:
        if not isinstance(client._transport, _Transport):
            client._transport = _Transport(client._transport)
            for pattern, transport in client._mounts.items():
                if transport is not None:
                    client._mounts[pattern] = _Transport(transport)
    return client


def terms(policy: RetryPolicy) -> dict[str, Any]:
    """What makes a request of `guarded` clients one of ours, which reads its answer by itself."""
    return {_POLICY: policy}


@contextmanager
def guarded_sessions() -> Iterator[None]:
    """Within a `with`, guard the client that huggingface_hub makes requests of its own with.

    Those get a time limit where they have none, no compressed answers, and a RetryableError in
    place of a wait that the server asks for: huggingface_hub sleeps as long as it is told to.
    Affects the whole process.
    """
    before = hub_client._GLOBAL_CLIENT_FACTORY
    set_client_factory(lambda: guarded(before()))
    try:
        yield
    finally:
        set_client_factory(before)


class _Pace:
    """How fast one answer comes. Reads and writes of the sockets of a request go through here."""

    def __init__(self, policy: RetryPolicy) -> None:
        self._policy = policy
        self._seconds = 0.0
        self._nbytes = 0
        self._head_nbytes: int | None = 0

    def end_head(self) -> None:
        """The head has come; what follows is the body."""
        self._head_nbytes = None

    def read(
        self, read: Callable[[int, float], bytes], max_bytes: int, timeout: float | None
    ) -> bytes:
        """What a socket has, at most so many bytes; waits as long as `timeout`, in seconds.

        Raises RetryableError where what came in a window is too little, and what `read` raises.
        """
        begun = time.monotonic()
        limit = _TIMEOUTS["read"] if timeout is None else timeout
        while True:
            if is_stopping():
                raise RetryableError("stopped")
            waited = time.monotonic() - begun
            try:
                data = read(max_bytes, min(max(limit - waited, 0.001), WAKE_SECONDS))
                break
            except Exception as error:
                if type(error).__name__ != "ReadTimeout" or time.monotonic() - begun >= limit:
                    raise
        # How long an answer takes to begin is limited by `timeout` alone.
        self._count(len(data), time.monotonic() - begun if self._nbytes else 0.0)
        if self._head_nbytes is not None:
            self._head_nbytes += len(data)
            if self._head_nbytes > HEAD_NBYTES:
                raise RetryableError(f"more than {HEAD_NBYTES:,} bytes of headers came", most=2)
        return data

    def write(
        self, write: Callable[[memoryview, float], None], data: bytes, timeout: float | None
    ) -> None:
        """Hand data to a socket. Raises RetryableError where it takes too little in a window."""
        view = memoryview(data)
        limit = _TIMEOUTS["write"] if timeout is None else timeout
        for begin in range(0, len(view), _WRITE_NBYTES):
            piece, begun = view[begin : begin + _WRITE_NBYTES], time.monotonic()
            write(piece, limit)
            self._count(len(piece), time.monotonic() - begun)
        # The answer is measured for itself.
        self._seconds, self._nbytes = 0.0, 0

    def _count(self, nbytes: int, seconds: float) -> None:
        self._nbytes += nbytes
        self._seconds += seconds
        if self._seconds < self._policy.window:
            return
        if self._nbytes < self._policy.least_rate * self._seconds:
            raise self._policy.too_slow()
        self._seconds, self._nbytes = 0.0, 1


@contextmanager
def _paced(pace: _Pace) -> Iterator[None]:
    """Within a `with`, sockets that this thread reads and writes belong to one request."""
    before = getattr(_now, "pace", None)
    _now.pace = pace
    try:
        yield
    finally:
        _now.pace = before


class _Stream:
    """A socket of the HTTP library's. One that belongs to no request of ours is left alone."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        pace: _Pace | None = getattr(_now, "pace", None)
        if pace is None:
            return bytes(self._inner.read(max_bytes, timeout))
        return pace.read(self._inner.read, max_bytes, timeout)

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        pace: _Pace | None = getattr(_now, "pace", None)
        if pace is None:
            self._inner.write(buffer, timeout)
        else:
            pace.write(self._inner.write, buffer, timeout)

    def start_tls(self, *words: Any, **options: Any) -> _Stream:
        return _Stream(self._inner.start_tls(*words, **options))

    def close(self) -> None:
        self._inner.close()

    def get_extra_info(self, info: str) -> Any:
        return self._inner.get_extra_info(info)


class _Backend:
    """What opens the HTTP library's sockets."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def connect_tcp(self, *words: Any, **options: Any) -> _Stream:
        return _Stream(self._inner.connect_tcp(*words, **options))

    def connect_unix_socket(self, *words: Any, **options: Any) -> _Stream:
        return _Stream(self._inner.connect_unix_socket(*words, **options))

    def sleep(self, seconds: float) -> None:
        self._inner.sleep(seconds)


class _Transport(HTTP_LIBRARY.BaseTransport):  # type: ignore[misc,name-defined]
    """Carries requests as the transport does that it wraps."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        pool: Any = getattr(inner, "_pool", None)
        if hasattr(pool, "_network_backend"):
            pool._network_backend = _Backend(pool._network_backend)

    def handle_request(self, request: Any) -> Any:
        """The answer, its body unread."""
        asked = request.extensions.get("timeout") or {}
        given = {name: value for name, value in asked.items() if value is not None}
        request.extensions["timeout"] = {**_TIMEOUTS, **given}
        request.headers["Accept-Encoding"] = "identity"
        own: RetryPolicy | None = request.extensions.get(_POLICY)
        pace = _Pace(own or RetryPolicy())
        with _paced(pace):
            response = self._inner.handle_request(request)
        pace.end_head()
        _uploaded.note(request, response)
        response.request = request
        limit = None if own else LISTING.nbytes
        if response.status_code >= 400:
            limit = ERROR_NBYTES
        response.stream = _Body(response.stream, pace, limit, request.url.host)
        if own is not None and "Location" in response.headers:
            # The library looks into it even where it does not go there, and fails over odd ones.
            response.extensions[_LOCATION] = response.headers.pop("Location")
        if own is None:
            try:
                _require_sound(response)
            except BaseException:
                response.close()
                raise
        return response

    def close(self) -> None:
        """Close what is wrapped."""
        self._inner.close()


def _require_sound(response: Any) -> None:
    """Raise for an answer to huggingface_hub that it would follow or obey blindly."""
    where = response.request.url.host
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise NetworkError(where, "answers compressed, which was not asked for", _REPORT)
    wait = asked_wait(response.headers)
    if response.status_code in _NOT_DONE and wait:
        raise RetryableError(status_line(response), wait)
    if response.status_code in REDIRECTS:
        redirect_target(response, where)


class _Body(HTTP_LIBRARY.SyncByteStream):  # type: ignore[misc,name-defined]
    """The body of an answer, measured and limited. The rest of a refusal's is not read."""

    def __init__(self, inner: Any, pace: _Pace, limit: int | None, where: str) -> None:
        self._inner, self._pace, self._limit, self._where = inner, pace, limit, where

    def __iter__(self) -> Iterator[bytes]:
        pieces, nbytes = iter(self._inner), 0
        while True:
            with _paced(self._pace):
                piece = next(pieces, None)
            if piece is None:
                return
            nbytes += len(piece)
            if self._limit is not None and nbytes > self._limit:
                if self._limit == ERROR_NBYTES:
                    return
                problem = f"answers with more than {self._limit:,} bytes"
                raise NetworkError(self._where, problem, _REPORT)
            yield piece

    def close(self) -> None:
        self._inner.close()
