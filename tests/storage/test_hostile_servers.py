"""Servers that drip, never end, send elsewhere or lie: given up soon, with a line that says why."""

from __future__ import annotations

import gzip
import logging
import ssl
import threading
import time
from _thread import interrupt_main
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from types import SimpleNamespace

import pytest
from huggingface_hub import constants

from shardsurgeon.errors import (
    CheckpointError,
    NetworkError,
    ShardSurgeonError,
    SourceChangedError,
    SourceReadError,
)
from shardsurgeon.storage import http, retry
from shardsurgeon.storage.connections import (
    HTTP_LIBRARY,
    asked_wait,
    guarded,
    redirect_target,
    whole_number,
)
from shardsurgeon.storage.http import (
    body,
    etag_of,
    followed,
    plain_client,
    raise_if_hopeless,
    text_of,
    total_nbytes,
    without_secrets,
)
from shardsurgeon.storage.retry import RetryPolicy, Waits, stream_pieces
from shardsurgeon.storage.source import SourceFile
from shardsurgeon.storage.threads import run_threads
from shardsurgeon.storage.web import WebSource
from tests.support.hub.raw import Answer, drip, for_ever, head, raw_server

QUICK = RetryPolicy(
    tries=3, first_wait=0.01, longest_wait=0.02, least_rate=1000.0, window=0.3, slow_windows=2
)
# A hang is noticed by this, not by the patience of whoever runs the tests.
LONG_SECONDS = 30.0


@pytest.fixture(autouse=True)
def soon_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.5)


def ask(address: str, policy: RetryPolicy = QUICK) -> bytes:
    """The answer to a request, as sources make them."""

    def once() -> bytes:
        with followed(plain_client(), address, lambda url: {}, "server", policy) as response:
            return text_of(response, "server")

    return retry.retry(once, "server", policy)


def then(*parts: Iterable[bytes]) -> Iterator[bytes]:
    for part in parts:
        yield from part


ENDLESS: dict[str, tuple[Answer, str]] = {
    "a body that drips": (
        lambda asked: then([head(Content_Length=10**6)], for_ever(b"x", 0.02)),
        "less than 1,000 bytes a second came",
    ),
    "a body without a length that drips": (
        lambda asked: then([head()], for_ever(b"x", 0.02)),
        "less than 1,000 bytes a second came",
    ),
    "headers that drip": (
        lambda asked: drip(b"HTTP/1.1 200 OK\r\nX: " + b"a" * 10_000, 0.02),
        "less than 1,000 bytes a second came",
    ),
    "interim answers that drip": (
        lambda asked: for_ever(b"HTTP/1.1 100 Continue\r\n\r\n", 0.05),
        "less than 1,000 bytes a second came",
    ),
    "interim answers for ever": (
        lambda asked: for_ever(b"HTTP/1.1 103 Early Hints\r\n\r\n" * 100),
        "more than 262,144 bytes of headers came",
    ),
    "chunks that drip": (
        lambda asked: then([head(Transfer_Encoding="chunked")], for_ever(b"1\r\nx\r\n", 0.05)),
        "less than 1,000 bytes a second came",
    ),
    "a chunk whose extension drips": (
        lambda asked: then([head(Transfer_Encoding="chunked"), b"5;"], for_ever(b"x", 0.02)),
        "less than 1,000 bytes a second came",
    ),
    "silence": (lambda asked: for_ever(b"", 0.1), "timed out"),
    "silence after the head": (
        lambda asked: then([head(Content_Length=9)], for_ever(b"", 0.1)),
        "timed out",
    ),
    "an answer for ever": (
        lambda asked: then([head()], for_ever(b"x" * (1 << 20))),
        "answers with more than 12,582,912 bytes",
    ),
    "redirects without an end": (
        lambda asked: [head("302 Found", Location="/next", Content_Length=0)],
        "leads to more than 10 other addresses",
    ),
    "what is not HTTP": (
        lambda asked: [b"\x00\x01 hello\r\n\r\n"],
        "gave up after 3 tries in a row",
    ),
    "what inflates": (
        lambda asked: [head(Content_Encoding="gzip"), gzip.compress(bytes(10**6))],
        "compressed, which was not asked for",
    ),
}


@pytest.mark.parametrize("kind", ENDLESS)
def test_what_has_no_end_is_given_up(kind: str) -> None:
    answer, says = ENDLESS[kind]
    patient = replace(QUICK, tries=10)
    begun = time.monotonic()
    with raw_server(answer) as address, pytest.raises(NetworkError, match=says):
        ask(address, patient if "HTTP" in kind else QUICK)
    assert time.monotonic() - begun < LONG_SECONDS


@pytest.mark.parametrize(
    "answer", [lambda asked: for_ever(b"", 0.1), lambda asked: drip(b"\x16\x03\x03\x40\x00" * 999)]
)
def test_a_handshake_that_does_not_end_is_given_up(answer: Answer) -> None:
    begun = time.monotonic()
    with raw_server(answer, unasked=True) as address, pytest.raises(NetworkError):
        ask(address.replace("http:", "https:"))
    assert time.monotonic() - begun < LONG_SECONDS


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("file:///etc/passwd", "leads to file:, which is not followed"),
        ("ftp://127.0.0.1/x", "leads to ftp:, which is not followed"),
        ("gopher:x", "leads to gopher:, which is not followed"),
        ("http://[half/x", "which is no address"),
        ("//: 0", "which is no address"),
        ("http://127.0.0.1:99999/x", "which is no address"),
        ("http://127.0.0.1/" + "x" * 66_000, "which is no address"),
        ("", "which is no address"),
    ],
)
def test_a_redirect_to_no_server_is_refused_at_once(target: str, says: str) -> None:
    asked: list[str] = []

    def answer(request: str) -> Iterable[bytes]:
        asked.append(request)
        return [head("302 Found", Location=target, Content_Length=0)]

    patient = RetryPolicy()
    with raw_server(answer) as address, pytest.raises(NetworkError, match=says):
        ask(address, patient)
    assert len(asked) == 1


def test_a_redirect_that_gives_up_encryption_is_refused() -> None:
    said = SimpleNamespace(
        url="https://a.org/x", headers={"Location": "http://a.org/x"}, extensions={}
    )
    with pytest.raises(NetworkError, match=r"leads to a\.org without encryption"):
        redirect_target(said, "file")
    said = SimpleNamespace(
        url="http://me:pw@a.org/x", headers={"Location": "http://a.org/y"}, extensions={}
    )
    assert redirect_target(said, "file") == "http://me:pw@a.org/y"
    said = SimpleNamespace(
        url="http://me:pw@a.org/x", headers={"Location": "http://b.org/y"}, extensions={}
    )
    assert redirect_target(said, "file") == "http://b.org/y"


@pytest.mark.parametrize("kind", ["certificate", "no TLS", "scheme"])
def test_what_no_retry_can_mend_is_refused_at_once(kind: str) -> None:
    causes: dict[str, Exception] = {
        "certificate": ssl.SSLCertVerificationError("self-signed"),
        "no TLS": ssl.SSLError(1, "[SSL: WRONG_VERSION_NUMBER] wrong version number"),
        "scheme": HTTP_LIBRARY.UnsupportedProtocol("no such protocol"),
    }
    cause = causes[kind]
    if kind == "certificate":
        cause.verify_message = "self-signed certificate"  # type: ignore[attr-defined]
    if kind == "no TLS":
        cause.reason = "WRONG_VERSION_NUMBER"  # type: ignore[attr-defined]
    error = HTTP_LIBRARY.ConnectError("failed")
    error.__cause__ = cause
    with pytest.raises(NetworkError):
        raise_if_hopeless(error, "server")
    # A name that is not found may be found when the network is back.
    unknown = HTTP_LIBRARY.ConnectError("[Errno -2] Name or service not known")
    raise_if_hopeless(unknown, "server")


def test_a_slow_line_is_followed_to_its_end() -> None:
    text = bytes(range(256)) * 64
    slowly = [text[at : at + 256] for at in range(0, len(text), 256)]

    def answer(asked: str) -> Iterator[bytes]:
        yield head(Content_Length=len(text))
        for piece in slowly:
            yield piece
            time.sleep(0.02)

    with raw_server(answer) as address:
        assert ask(address) == text


def test_a_server_that_thinks_before_it_answers_is_not_slow() -> None:
    def answer(asked: str) -> Iterator[bytes]:
        time.sleep(0.4)
        yield head(Content_Length=2) + b"{}"

    with raw_server(answer) as address:
        assert ask(address) == b"{}"


def a_byte_each(*waits: float) -> retry.Request:
    """Requests that bring one byte each and are cut then, in turn after such waits."""
    left = list(waits)

    class One:
        def __enter__(self) -> Iterator[bytes]:
            time.sleep(left.pop(0) if left else 0)
            return iter([b"x"])

        def __exit__(self, *error: object) -> None:
            pass

    return lambda at: One()


def test_bytes_that_come_one_by_one_renew_patience_for_a_while_only() -> None:
    pieces = stream_pieces(a_byte_each(), "server", 0, 10**6, QUICK)
    with pytest.raises(NetworkError, match="gave up: less than 1,000 bytes a second came for"):
        list(pieces)


def test_what_the_reader_does_meanwhile_is_not_the_servers_slowness() -> None:
    pieces = stream_pieces(a_byte_each(), "server", 0, 4, QUICK)
    got = b""
    for piece in pieces:
        time.sleep(QUICK.window)
        got += piece
    assert got == b"x" * 4


def test_a_wait_is_said_once_with_server_and_reason(caplog: pytest.LogCaptureFixture) -> None:
    waits = Waits(RetryPolicy())
    with caplog.at_level(logging.WARNING, "shardsurgeon"):
        for _ in range(8):  # workers that are sent away together
            waits.begin("hf://org/name", 120, "429 Too Many Requests, hf_" + "a1" * 17)
        waits.begin("hf://org/name", 1, "cut")
    assert caplog.messages == ["hf://org/name: waiting 120 s (429 Too Many Requests, hf_***)"]


def test_waits_have_a_limit_in_all_that_bytes_make_up_for() -> None:
    waits = Waits(RetryPolicy(longest_in_all=900))
    for number in range(3):
        waits._until = 0.0  # the one before is over
        waits.begin("server", 290, f"{number}")
    waits._until = 0.0
    with pytest.raises(NetworkError, match=r"gave up after 1,160 s of waiting in all \(busy\)"):
        waits.begin("server", 290, "busy")
    waits.receive(10**6)
    waits.begin("server", 10, "busy")


def test_answers_that_each_take_their_time_are_not_waited_for_without_an_end() -> None:
    """Each below every limit of its own: a minute for a few bytes, file after file."""
    waits = Waits(RetryPolicy(longest_in_all=900))
    for _ in range(10_000):  # prompt ones
        waits.spend("server", 4.0)
    waits.receive(1024 * 100)
    for _ in range(18):
        waits.spend("server", 59.0)
    with pytest.raises(NetworkError, match=r"gave up after 1,026 s of waiting in all \(slow answ"):
        waits.spend("server", 59.0)


def test_a_listing_that_comes_at_the_least_rate_is_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(http, "LISTING_SECONDS", 0.3)

    def answer(asked: str) -> Iterable[bytes]:
        return then([head()], for_ever(b"x" * 100, 0.02))

    with (
        raw_server(answer) as address,
        pytest.raises(NetworkError, match="answers for more than 0 s"),
    ):
        ask(address)


def test_ten_minutes_are_not_waited_for() -> None:
    answer = head("503 Service Unavailable", Retry_After=599, Content_Length=0)
    says = r"asks to wait 599 seconds \(503 Service Unavailable\), more than the 300 that are"
    with raw_server(lambda asked: [answer]) as address, pytest.raises(NetworkError, match=says):
        ask(address, RetryPolicy())


def test_an_interrupt_ends_every_wait_of_every_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a pause between tries, of one for an answer, and of a head that drips."""
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 1000)
    busy = head("503 Service Unavailable", Retry_After=200, Content_Length=0)
    answers: list[Answer] = [
        lambda asked: [busy],
        lambda asked: for_ever(b"", 0.1),
        lambda asked: drip(b"HTTP/1.1 200 OK\r\n" * 9999, 0.1),
    ]
    begun = time.monotonic()
    with ExitStack() as stack:
        todo = [stack.enter_context(raw_server(answer)) for answer in answers]
        threading.Timer(0.6, interrupt_main).start()
        with pytest.raises(KeyboardInterrupt):
            run_threads(lambda: ask(todo.pop(), RetryPolicy()), 3, "wait", lambda: None)
    assert time.monotonic() - begun < LONG_SECONDS


NUMBERS = ["²", "-1", "1" * 5000, "1e3", " 5", "٣", "", "0x10", "+4"]


@pytest.mark.parametrize("text", NUMBERS)
def test_a_header_that_is_no_number_is_none(text: str) -> None:
    assert whole_number(text) is None
    assert asked_wait({"Retry-After": text}) in (0.0, 5.0)
    assert asked_wait({"RateLimit": f'"x";r=0;t={text}'}) in (0.0, 1.0)
    said = SimpleNamespace(status_code=200, headers={"Content-Length": text})
    assert total_nbytes(said) is None
    said = SimpleNamespace(status_code=206, headers={"Content-Range": f"bytes 0-0/{text}"})
    assert total_nbytes(said) is None


@pytest.mark.parametrize("text", ["Sun, 99 Nov 2026 99:99:99 GMT", "Fri, 1 Jan 0000", "x" * 9999])
def test_a_date_that_is_none_asks_for_no_wait(text: str) -> None:
    assert asked_wait({"Retry-After": text}) == 0.0


def test_an_entity_tag_is_kept_without_secrets_and_short() -> None:
    token = "hf_" + "a1" * 17
    assert etag_of({"ETag": f'W/"{token}"'}) == "hf_***"
    assert len(etag_of({"ETag": "x" * 60_000}) or "") == 64
    assert etag_of({"ETag": '"abc"'}) == "abc"


FILE = SourceFile("a.bin", 100, "tag")


def partial(status: int, **headers: str) -> SimpleNamespace:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return SimpleNamespace(status_code=status, headers=named, iter_raw=lambda: iter([b"x" * 10]))


@pytest.mark.parametrize(
    ("answer", "kind", "says"),
    [
        (partial(206, Content_Range="bytes 1-10/100"), SourceReadError, "another range than"),
        (partial(206, Content_Range="bytes 0-9/99"), SourceChangedError, "had 100 bytes when"),
        (partial(206), SourceReadError, "another range than"),
        (partial(206, Content_Range="bytes */100"), SourceReadError, "another range than"),
        (partial(206, Content_Range="bytes ²-9/100"), SourceReadError, "another range than"),
        (partial(200, Content_Length="99"), SourceChangedError, "had 100 bytes when"),
        (
            partial(206, Content_Range="bytes 0-9/100", Content_Encoding="gzip"),
            SourceReadError,
            "comes encoded, which was not asked for",
        ),
        (partial(204), SourceReadError, "cannot be read"),
    ],
)
def test_an_answer_that_is_not_the_range_is_refused(
    answer: SimpleNamespace, kind: type[ShardSurgeonError], says: str
) -> None:
    with pytest.raises(kind, match=says):
        body(answer, FILE, "a.bin", 0, 10)


def test_more_bytes_than_were_asked_for_are_not_taken() -> None:
    answer = head("206 Partial Content", Content_Range="bytes 0-0/2", Content_Length=500)

    def request(asked: str) -> Iterable[bytes]:
        return [answer, b"{" * 500]

    with raw_server(request) as address, pytest.raises(ShardSurgeonError):
        WebSource(f"{address}/m", QUICK).read("config.json", 0, 1)


@pytest.mark.parametrize("cut", [1, 10, 40])
def test_a_secret_is_found_where_pieces_meet(cut: int) -> None:
    token = "hf_" + "a1" * 17
    data = b"..." + token.encode() + b"..."
    pieces = iter([data[:cut], data[cut:]])
    with pytest.raises(SourceReadError, match="holds the token or the login that its server was"):
        list(without_secrets(pieces, [token, None, "short"], "a.bin"))
    assert list(without_secrets(iter([b"short", data]), [None, "short"], "x")) == [b"short", data]


def test_a_web_server_that_sends_the_login_back_is_not_copied_from() -> None:
    def answer(asked: str) -> Iterable[bytes]:
        login = asked.partition("Authorization: Basic ")[2].partition("\r\n")[0]
        content = b'{"was": "%b"}' % login.encode()
        begin, end = (0, 1) if "bytes=0-0" in asked else (0, len(content))
        size = f"bytes {begin}-{end - 1}/{len(content)}"
        named = "GET /m/config.json " in asked
        facts = {"Content_Length": end, "Content_Range": size, "ETag": login}
        sent = head("206 Partial Content", **facts) + content[begin:end]
        return [sent if named else head("404 Not Found", Content_Length=0)]

    with raw_server(answer) as address:
        with pytest.raises(SourceReadError, match="holds the token or the login"):
            WebSource(f"{address.replace('//', '//me:long-password@')}/m", QUICK)
        named = etag_of({"ETag": "bWU6bG9uZy1wYXNzd29yZA=="})
        assert named == "***=="


def test_the_guard_reaches_the_sockets_of_the_installed_library() -> None:
    """What it replaces is not public: this fails where a new version calls it otherwise."""
    client = guarded(HTTP_LIBRARY.Client())
    assert guarded(client) is client
    assert type(client._transport).__name__ == "_Transport"
    assert type(client._transport._inner._pool._network_backend).__name__ == "_Backend"
    proxied = guarded(HTTP_LIBRARY.Client(proxy="http://127.0.0.1:9"))
    (transport,) = [each for each in proxied._mounts.values() if each is not None]
    assert type(transport._inner._pool._network_backend).__name__ == "_Backend"


def test_a_config_is_needed_before_anything_is_believed() -> None:
    def answer(asked: str) -> Iterable[bytes]:
        return [head("200 OK", Content_Length="²"), b""]

    with raw_server(answer) as address, pytest.raises((CheckpointError, NetworkError)):
        WebSource(f"{address}/m", QUICK)
