"""HTTP: addresses without their secrets, and one byte range with every check of the answer.

What an answer may cost in time and bytes is limited in `connections`.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import re
import ssl
import time
from base64 import b64encode
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import SplitResult, unquote, urlsplit

from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError

from shardsurgeon.errors import (
    NetworkError,
    SourceChangedError,
    SourceReadError,
    UsageError,
    redacted,
)
from shardsurgeon.storage.connections import (
    HTTP_ERROR,
    HTTP_LIBRARY,
    LISTING_SECONDS,
    MOST_REDIRECTS,
    REDIRECTS,
    guarded,
    raise_if_passing,
    redirect_target,
    status_line,
    terms,
    whole_number,
)
from shardsurgeon.storage.limits import LISTING
from shardsurgeon.storage.retry import RetryableError, RetryPolicy
from shardsurgeon.storage.source import RUN_AGAIN, SourceFile

_SECRET_PARTS = re.compile(r"\?[^\s'\"]*|(?<=//)[^/\s'\"]*@")

_CONTENT_RANGE = re.compile(r"bytes (?:([0-9]{1,18})-([0-9]{1,18})|\*)/([0-9]{1,18}|\*)")
# A server without ranges sends files whole: up to here, what was not asked for is thrown away.
_WHOLE_NBYTES = 16 << 20
# Reading so many bytes is quicker than opening another connection.
_SHORT_NBYTES = 64 << 10
# Longer entity tags are kept by their digest.
_TAG_LENGTH = 256
# What the HTTP library says of an answer that is not HTTP.
_NO_HTTP = re.compile("illegal|malformed|bad ", re.IGNORECASE)
_NO_HTTP_TRIES = 3
# Shorter secrets occur in data by chance.
_SECRET_NBYTES = 8
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
    client = HTTP_LIBRARY.Client()
    atexit.register(client.close)
    return client


@contextmanager
def answer(
    client: Any,
    url: str,
    headers: Mapping[str, str],
    policy: RetryPolicy,
    content: bytes | None = None,
    silence: float | None = None,
) -> Iterator[Any]:
    """The response to a GET, or to a POST of `content`, its body unread; one that redirects is not
    followed.

    silence: for how many seconds the server may say nothing, None for huggingface_hub's download
    timeout. Raises RetryableError, also while the body is read, where another try may succeed: a
    server is busy, a connection is refused, cut, silent for too long, or slower than the policy's
    least rate. Raises NetworkError where none will: for a certificate that is not accepted, and an
    address that cannot be asked.
    """
    longest = float(constants.HF_HUB_DOWNLOAD_TIMEOUT)
    try:
        with guarded(client).stream(
            "GET" if content is None else "POST",
            url,
            content=content,
            headers={**headers, "Accept-Encoding": "identity"},
            timeout=HTTP_LIBRARY.Timeout(longest, read=silence or longest),
            follow_redirects=False,
            extensions=terms(policy),
        ) as response:
            raise_if_passing(response)
            yield response
    except HfHubHTTPError:
        raise
    except (HTTP_ERROR, HTTP_LIBRARY.InvalidURL) as error:
        raise_if_hopeless(error, _host(url))
        # What does not speak HTTP will hardly learn it; a connection that ends early is no such.
        speaks = not _NO_HTTP.match(str(error))
        raise RetryableError(said(error), most=None if speaks else _NO_HTTP_TRIES) from error
    except RuntimeError as error:
        # huggingface_hub closes the client that all share when any of its own requests fails.
        if not client.is_closed:
            raise
        raise RetryableError("the client was closed") from error


@contextmanager
def followed(
    client: Any,
    url: str,
    headers: Callable[[str], Mapping[str, str]],
    where: str,
    policy: RetryPolicy,
) -> Iterator[Any]:
    """The response that redirects lead to.

    headers: those for an address; where: what is asked for, as messages call it.

    Raises what `answer` raises, and NetworkError for a redirect that is not followed.
    """
    for _ in range(MOST_REDIRECTS):
        with answer(client, url, headers(url), policy) as response:
            if response.status_code not in REDIRECTS:
                yield response
                return
            drain(response)
            url = redirect_target(response, where)
    raise endless(where)


def endless(where: str) -> NetworkError:
    """The error for a chain of redirects without an end."""
    return NetworkError(where, f"leads to more than {MOST_REDIRECTS} other addresses")


def raise_if_hopeless(error: BaseException, where: str) -> None:
    """Raise NetworkError for a failed connection that no retry mends. where: the server.

    A name that is not found is not among them: that passes when a network comes back.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            problem = f"its certificate is not accepted ({cause.verify_message})"
            remedy = "check the address; SSL_CERT_FILE names the certificates of a proxy"
            raise NetworkError(where, problem, remedy) from error
        if isinstance(cause, ssl.SSLError) and cause.reason == "WRONG_VERSION_NUMBER":
            raise NetworkError(where, "does not speak TLS", "try http://") from error
        if isinstance(cause, HTTP_LIBRARY.InvalidURL | HTTP_LIBRARY.UnsupportedProtocol):
            raise NetworkError(where, f"cannot be asked ({said(cause)})") from error
        cause = cause.__cause__ or cause.__context__


def _host(url: str) -> str:
    try:
        return urlsplit(url).hostname or "the server"
    except ValueError:
        return "the server"


def text_of(response: Any, where: str) -> bytes:
    """The body of an answer that is no file: a listing. Raises NetworkError where it is too long
    or takes too long, or is compressed, which would have no limit.
    """
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise NetworkError(where, "answers compressed, which was not asked for")
    parts, nbytes, begun = [], 0, time.monotonic()
    for part in response.iter_raw():
        nbytes += len(part)
        if nbytes > LISTING.nbytes:
            raise NetworkError(where, f"answers with more than {LISTING.nbytes:,} bytes")
        if time.monotonic() - begun > LISTING_SECONDS:
            raise NetworkError(where, f"answers for more than {LISTING_SECONDS:,.0f} s")
        parts.append(part)
    return b"".join(parts)


def drain(response: Any) -> None:
    """Read an unwanted body, if it is short, so that the connection can be used again."""
    length = whole_number(response.headers.get("Content-Length"))
    if length is not None and length <= _SHORT_NBYTES:
        for _ in response.iter_raw():
            pass


def said(error: Exception) -> str:
    """A transport error in a few words. Never its request: that carries the login."""
    return str(error).strip() or type(error).__name__


def etag_of(headers: Mapping[str, str], name: str = "ETag") -> str | None:
    """An entity tag as it is compared and kept: bare, be it a weak one or not.

    It is a server's own words, so it has no secret in it, and is no longer than needed.
    """
    value = headers.get(name)
    return None if value is None else kept_words(value.removeprefix("W/").strip('"'))


def kept_words(text: str) -> str:
    """What a server calls the state of a file, as it may stand in a journal or a plan."""
    short = redacted(text)
    return short if len(short) <= _TAG_LENGTH else hashlib.sha256(short.encode()).hexdigest()


def total_nbytes(response: Any) -> int | None:
    """The size of the whole file, as the answer to a range says it."""
    if response.status_code == 200:
        return whole_number(response.headers.get("Content-Length"))
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
    return SourceChangedError(where, problem, RUN_AGAIN)


def _part(response: Any, skip: int, nbytes: int) -> Iterator[bytes]:
    """`nbytes` of a body after its first `skip`; the rest is not read."""
    for piece in response.iter_raw():
        part = piece[skip : skip + nbytes]
        skip = max(skip - len(piece), 0)
        nbytes -= len(part)
        yield part
        if nbytes == 0:
            return


def secrets_of(url: str) -> list[str]:
    """The login in an address, and what is in its query that is not to be shown."""
    parts = urlsplit(url)
    hidden = [pair for pair in parts.query.split("&") if redacted(f"?{pair}") != f"?{pair}"]
    values = [parts.password or "", *(pair.partition("=")[2] for pair in hidden)]
    values += map(unquote, list(values))
    login = f"{unquote(parts.username or '')}:{unquote(parts.password or '')}"
    # As it is sent; shorter by what depends on its end.
    basic = b64encode(login.encode()).decode().rstrip("=")
    return [value for value in (*values, basic if parts.password else "") if value]


def without_secrets(
    pieces: Iterator[bytes], secrets: Iterable[str | None], where: str
) -> Iterator[bytes]:
    """The pieces, as long as none of the secrets that a request carried comes back in them.

    So that none gets into a result. Raises SourceReadError before the piece that would hold one.
    """
    sought = [each.encode() for each in secrets if each and len(each) >= _SECRET_NBYTES]
    overlap = max(map(len, sought), default=1) - 1
    end = b""
    for piece in pieces:
        seen = end + piece if sought else b""
        if any(secret in seen for secret in sought):
            problem = "holds the token or the login that its server was sent"
            raise SourceReadError(where, problem, "do not trust that server; change the token")
        end = seen[-overlap:] if sought else b""
        yield piece
