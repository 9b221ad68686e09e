"""HTTP: addresses without their secrets, and one byte range with every check of the answer.

Works with the HTTP library that huggingface_hub brings along: httpx with its version 1, httpx2
with its version 2.
"""

from __future__ import annotations

import atexit
import functools
import re
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Any
from urllib.parse import SplitResult, urlsplit

from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError

from shardsurgeon.errors import SourceChangedError, SourceReadError, UsageError
from shardsurgeon.storage.retry import RetryableError
from shardsurgeon.storage.source import SourceFile

_SECRET_PARTS = re.compile(r"\?[^\s'\"]*|(?<=//)[^/\s'\"]*@")

# The base of every transport error of either library.
HTTP_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]
REDIRECTS = frozenset({301, 302, 303, 307, 308})
MOST_REDIRECTS = 10

_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504, 509, 520, 521, 522, 523, 524})
_CONTENT_RANGE = re.compile(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)")
_LIMIT_RESET = re.compile(r";\s*r=0\s*;\s*t=(\d+)")
# A server without ranges sends files whole: up to here, what was not asked for is thrown away.
_WHOLE_NBYTES = 16 << 20
# Reading so many bytes is quicker than opening another connection.
_SHORT_NBYTES = 64 << 10
_FETCH_FIRST = "download the model and give its folder"


def parse_address(url: str) -> SplitResult:
    """The parts of a folder's address; a safetensors file stands for the folder it lies in.

    Raises UsageError where it is not an address.
    """
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as error:
        raise UsageError(printable(url), f"is not an address ({error})") from None
    folder = parts.path.rstrip("/")
    if folder.endswith(".safetensors"):
        folder = folder.rpartition("/")[0]
    return parts._replace(path=folder, fragment="")


def printable(text: str) -> str:
    """An address, or a text that quotes some, on one line and without logins and queries."""
    return _SECRET_PARTS.sub("", " ".join(text.split()))


@functools.cache
def plain_client() -> Any:
    """The client for servers other than the Hub's: without the Hub's login and rules."""
    client = sys.modules[HTTP_ERROR.__module__.partition(".")[0]].Client()
    atexit.register(client.close)
    return client


@contextmanager
def answer(
    client: Any, url: str, headers: Mapping[str, str], *, follow: bool = False
) -> Iterator[Any]:
    """The response to a GET, its body unread. follow: go where redirects lead.

    Raises RetryableError, also while the body is read, where another try may succeed: a server is
    busy, a connection is refused, cut or silent for huggingface_hub's download timeout.
    """
    try:
        with client.stream(
            "GET",
            url,
            headers={**headers, "Accept-Encoding": "identity"},
            timeout=float(constants.HF_HUB_DOWNLOAD_TIMEOUT),
            follow_redirects=follow,
        ) as response:
            raise_if_passing(response)
            yield response
    except HfHubHTTPError:
        raise
    except HTTP_ERROR as error:
        raise RetryableError(said(error)) from error
    except RuntimeError as error:
        # huggingface_hub closes the client that all share when any of its own requests fails.
        if not client.is_closed:
            raise
        raise RetryableError("the client was closed") from error


def drain(response: Any) -> None:
    """Read an unwanted body, if it is short, so that the connection can be used again."""
    length = response.headers.get("Content-Length", "")
    if length.isdigit() and int(length) <= _SHORT_NBYTES:
        response.read()


def raise_if_passing(response: Any) -> None:
    """Raise RetryableError where a server says that it is busy or fails for the moment."""
    if response.status_code in _PASSING:
        raise RetryableError(status_line(response), _asked_wait(response.headers))


def said(error: Exception) -> str:
    """A transport error in a few words. Never its request: that carries the login."""
    return str(error).strip() or type(error).__name__


def status_line(response: Any) -> str:
    """`503 Service Unavailable`."""
    try:
        return f"{response.status_code} {HTTPStatus(response.status_code).phrase}"
    except ValueError:
        return str(response.status_code)


def etag_of(headers: Mapping[str, str], name: str = "ETag") -> str | None:
    """An entity tag as it is compared: bare, be it a weak one or not."""
    value = headers.get(name)
    return None if value is None else value.removeprefix("W/").strip('"')


def total_nbytes(response: Any) -> int | None:
    """The size of the whole file, as the answer to a range says it."""
    if response.status_code == 200:
        length = response.headers.get("Content-Length", "")
        return int(length) if length.isdigit() else None
    match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", "").strip())
    return int(match[3]) if match and match[3] != "*" else None


def range_header(begin: int, end: int) -> dict[str, str]:
    """The header that asks for the bytes [begin, end)."""
    return {"Range": f"bytes={begin}-{end - 1}"}


def body(response: Any, file: SourceFile, where: str, begin: int, end: int) -> Iterator[bytes]:
    """The bytes [begin, end) of a file out of the answer to a request for them.

    Raises SourceChangedError where the file is of another size by now, SourceReadError where
    the answer is not that range.
    """
    total = total_nbytes(response)
    if total is not None and total != file.nbytes:
        raise changed(where, f"had {file.nbytes:,} bytes when it was listed, has {total:,}")
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise SourceReadError(where, "comes encoded, which was not asked for", _FETCH_FIRST)
    if response.status_code == 206:
        match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", "").strip())
        if match is None or match[1] is None or int(match[1]) != begin:
            problem = f"another range than the one from byte {begin:,} came"
            raise SourceReadError(where, problem, _FETCH_FIRST)
        pieces: Iterator[bytes] = response.iter_raw()
        return pieces
    if response.status_code == 200 and file.nbytes <= _WHOLE_NBYTES:
        return _part(response, begin, end - begin)
    if response.status_code == 200:
        raise SourceReadError(where, "the server sends whole files only", _FETCH_FIRST)
    raise SourceReadError(where, f"cannot be read ({status_line(response)})")


def changed(where: str, problem: str) -> SourceChangedError:
    """The error for a file that is no longer what the listing says."""
    return SourceChangedError(where, problem, "run the command again with --restart")


def _part(response: Any, skip: int, nbytes: int) -> Iterator[bytes]:
    """`nbytes` of a body after its first `skip`; the rest is not read."""
    for piece in response.iter_raw():
        part = piece[skip : skip + nbytes]
        skip = max(skip - len(piece), 0)
        nbytes -= len(part)
        yield part
        if nbytes == 0:
            return


def _asked_wait(headers: Mapping[str, str]) -> float:
    """For how many seconds a busy server asks to be left alone; 0 where it does not say."""
    text = headers.get("Retry-After", "").strip()
    if text.isdigit():
        return float(text)
    if text:
        try:
            return max(parsedate_to_datetime(text).timestamp() - time.time(), 0.0)
        except ValueError:
            return 0.0
    match = _LIMIT_RESET.search(headers.get("RateLimit", ""))
    return float(match[1]) if match else 0.0
