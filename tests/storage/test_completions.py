"""A server of chat completions: addresses, and one line for each thing that is none."""

from __future__ import annotations

import socket
import threading
import time
from typing import Any

import pytest

from shardsurgeon.errors import NetworkError, ShardSurgeonError, UsageError
from shardsurgeon.storage.completions import CompletionServer, QuestionRefused, Reply
from shardsurgeon.storage.retry import RetryPolicy
from tests.support.completions import ScriptedServer

FAST = RetryPolicy(tries=3, first_wait=0.01, longest_wait=0.02)
QUESTION = {"model": "tiny", "messages": [{"role": "user", "content": "Hello?"}]}
HTML = (200, b"<html>Welcome</html>", "text/html; charset=utf-8")


def ask(url: str, **options: Any) -> Reply:
    with CompletionServer(url, policy=FAST, **options) as server:
        return server.complete(QUESTION, "a.jsonl, record 3")


@pytest.mark.parametrize("ending", ["", "/", "/v1", "/v1/", "/v1/chat/completions"])
def test_an_address_may_end_in_several_ways(ending: str) -> None:
    with ScriptedServer(lambda question: "Hi.") as server:
        host = server.url.removesuffix("/v1")
        with CompletionServer(host + ending, policy=FAST) as found:
            assert found.location == server.url
            assert found.models() == ("tiny",)
            assert found.complete(QUESTION, "") == Reply("Hi.", finish_reason="stop")


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host/v1", "https://", "http://h:x/", ""])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(UsageError):
        CompletionServer(url)


def test_a_login_in_an_address_is_sent_and_not_shown() -> None:
    with ScriptedServer(lambda question: (400, {"message": "not with a-long-password"})) as server:
        url = server.url.replace("//", "//me:a-long-password@")
        with CompletionServer(url, policy=FAST) as found, pytest.raises(QuestionRefused) as caught:
            assert found.location == server.url
            found.complete(QUESTION, "")
        assert caught.value.said == "400 Bad Request: not with ***"
        assert (server.keys[0] or "").startswith("Basic ")


@pytest.mark.parametrize(
    ("answered", "error", "says"),
    [
        (
            HTML,
            NetworkError,
            "answers /chat/completions with text/html that is no JSON object; give",
        ),
        ((200, b"[1, 2]"), NetworkError, "with application/json that is no JSON object"),
        ((200, b'{"a": '), NetworkError, "that is no JSON object"),
        (
            (200, {"choices": []}),
            NetworkError,
            "record 3: answers with JSON that gives a choice no",
        ),
        ((200, {"choices": [{"text": "a"}]}), NetworkError, "gives a message nowhere"),
        ((200, {"error": {"message": "busy"}}), NetworkError, "gives a choice nowhere"),
        ((404, {"detail": "Not Found"}), UsageError, "404 Not Found: Not Found; give the address"),
        (
            (404, {"error": {"message": "The model `x` does not exist."}}),
            UsageError,
            "404 Not Found: The model `x` does not exist.",
        ),
        ((401, {"error": "no"}), UsageError, "wants a key .401 Unauthorized: no.; name the env"),
        ((418, b"\x00\x1b[31m"), NetworkError, "418 I'm a Teapot"),
        (
            (302, b"http://elsewhere/v1"),
            UsageError,
            "leads to http://elsewhere/v1, which is not fo",
        ),
        ((429, {}), NetworkError, "gave up after 3 tries in a row .429 Too Many Requests."),
    ],
)
def test_an_answer_that_is_none_is_one_line(
    answered: Any, error: type[ShardSurgeonError], says: str
) -> None:
    raising = pytest.raises(error, match=says)
    with ScriptedServer(lambda question: answered) as server, raising as caught:
        ask(server.url)
    assert len(str(caught.value).splitlines()) == 1
    assert str(caught.value).startswith(server.url)


@pytest.mark.parametrize("status", [400, 413, 422, 500, 501])
def test_a_question_that_is_refused_is_told_from_a_server_that_is_wrong(status: int) -> None:
    refusal = (status, {"error": {"message": "too long"}})
    with (
        ScriptedServer(lambda question: refusal) as server,
        pytest.raises(QuestionRefused) as caught,
    ):
        ask(server.url)
    assert caught.value.said.startswith(str(status))
    assert ("too long" in caught.value.said) == (status != 500)


def test_nobody_at_an_address_is_one_line_soon() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    begun = time.monotonic()
    says = pytest.raises(NetworkError, match=r"gave up after 3 tries in a row .*refused")
    with CompletionServer(url, policy=FAST) as server, says:
        server.models()
    assert time.monotonic() - begun < 5


def test_a_server_that_says_nothing_is_given_up_after_two_silences() -> None:
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen(8)
        url = f"http://127.0.0.1:{mute.getsockname()[1]}"
        with pytest.raises(NetworkError, match=r"2 tries in a row .no answer within 0.3 s."):
            ask(url, silence=0.3)


def test_an_answer_in_drips_is_broken_off() -> None:
    """A byte now and then keeps a socket busy, and is less than the least rate."""
    over = threading.Event()

    def drip(listener: socket.socket) -> None:
        while not over.is_set():
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                connection.recv(65536)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
                try:
                    while not over.wait(0.02):
                        connection.sendall(b"x")
                except OSError:
                    continue

    slow = RetryPolicy(tries=2, first_wait=0.01, window=0.3, slow_windows=1)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(8)
        threading.Thread(target=drip, args=(listener,), daemon=True).start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        says = pytest.raises(NetworkError, match="less than 1,024 bytes a second came")
        with CompletionServer(url, policy=slow) as server, says:
            server.complete(QUESTION, "")
        over.set()


@pytest.mark.parametrize(
    "models", [(404, {}), (405, {}), (200, {"object": "list"}), (200, {"data": [3, {}]})]
)
def test_models_that_a_server_does_not_list_are_none(models: Any) -> None:
    with (
        ScriptedServer(lambda question: "", models) as server,
        CompletionServer(server.url) as found,
    ):
        assert found.models() == ()


def test_a_page_where_models_should_be_is_no_server() -> None:
    with (
        ScriptedServer(lambda question: "", HTML) as server,
        CompletionServer(server.url) as found,
        pytest.raises(NetworkError, match="answers /models with text/html that is no JSON"),
    ):
        found.models()
