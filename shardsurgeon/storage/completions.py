"""A server of OpenAI's chat completions (vLLM, SGLang, llama.cpp), asked one question at a time.

A key goes to the address that it was given for and nowhere else: redirects are not followed, an
answer that holds it is refused, and no text that is printed has it in it.
"""

from __future__ import annotations

import json
import textwrap
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlunsplit

from shardsurgeon.errors import NetworkError, UsageError, keep_secret, redacted
from shardsurgeon.storage.connections import HTTP_LIBRARY, REDIRECTS, location_of, status_line
from shardsurgeon.storage.formats.strict_json import parse_for_a_hint
from shardsurgeon.storage.http import (
    answer,
    parse_address,
    printable,
    secrets_of,
    text_of,
    without_secrets,
)
from shardsurgeon.storage.limits import LISTING
from shardsurgeon.storage.retry import RetryableError, RetryPolicy, retry
from shardsurgeon.storage.threads import is_stopping

POLICY = RetryPolicy(tries=6)
# For how many seconds an answer may take; a server under load queues what it is asked.
ANSWER_SECONDS = 600.0
_ENDPOINT = "/chat/completions"
_ADDRESS = "give the address of an OpenAI-compatible server, up to /v1"
# Statuses of one question that cannot be answered, such as one that is too long.
_REFUSING = frozenset({400, 413, 422, 501})
# Some servers say this of a question that they cannot answer; all say it of a fault.
_FAILING = "500"
_FAILING_TRIES = 3
# So many questions in a row that a server fails at, and it is the server.
_FAILURES_IN_A_ROW = 5
_SAID_LENGTH = 200


class QuestionRefused(Exception):
    """The server works, and does not answer this question. said: why, in its own words."""

    def __init__(self, said: str) -> None:
        super().__init__(said)
        self.said = said


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer. text: what is said; reasoning: what the server took for thinking, "" without;
    tool_calls: (name, arguments as they came) of each; finish_reason: `stop`, `length`, ….
    """

    text: str
    reasoning: str = ""
    tool_calls: tuple[tuple[str, str], ...] = ()
    finish_reason: str = ""


class CompletionServer:
    """A server at an address. Safe to use from several threads; a context that ends its use.

    location: the address up to `/v1`, without login and query.
    """

    def __init__(
        self,
        url: str,
        key: str | None = None,
        at_once: int = 1,
        silence: float = ANSWER_SECONDS,
        policy: RetryPolicy = POLICY,
    ) -> None:
        """url: up to `/v1`, which is added to a bare host, or the whole of `…/chat/completions`;
        at_once: how many questions are asked at the same time; silence: how many seconds one may
        take. Raises UsageError where `url` is not an address.
        """
        parts = parse_address(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError(printable(url), "is not the address of a server", _ADDRESS)
        path = parts.path.removesuffix(_ENDPOINT) or "/v1"
        self._parts = parts._replace(path=path)
        self.location = printable(urlunsplit(self._parts._replace(query="")))
        self._secrets = [key, *secrets_of(url)]
        for secret in self._secrets:
            keep_secret(secret)
        self._headers = {"Content-Type": "application/json"}
        self._headers |= {"Authorization": f"Bearer {key}"} if key else {}
        self._silence, self._policy = silence, policy
        limits = HTTP_LIBRARY.Limits(max_connections=at_once, max_keepalive_connections=at_once)
        self._client: Any = HTTP_LIBRARY.Client(limits=limits)
        self._counting, self._failed = threading.Lock(), 0

    def __enter__(self) -> CompletionServer:
        return self

    def __exit__(self, *error: object) -> None:
        self._client.close()

    def models(self) -> tuple[str, ...]:
        """The names of the models that it serves, none where it does not say.

        Raises UsageError where it wants another key, NetworkError where it does not answer.
        """
        policy = replace(self._policy.brief(), longest_wait=2.0)
        found = retry(lambda: self._ask("/models", None), self.location, policy)
        listed = found.get("data") if isinstance(found, dict) else None
        names = [each.get("id") for each in listed or () if isinstance(each, dict)]
        return tuple(name for name in names if isinstance(name, str))

    def complete(self, question: Mapping[str, Any], where: str) -> Reply:
        """The answer to a question: the body of a request, with a model, messages and sampling.

        where: the record that it is made of, for messages. Raises QuestionRefused where the server
        refuses this one, UsageError where it knows no such model or address, or wants another key,
        NetworkError where it does not answer, or no such thing.
        """
        content = json.dumps(question).encode()
        failing: list[str] = []

        def ask() -> Any:
            try:
                return self._ask(_ENDPOINT, content)
            except RetryableError as error:
                if not error.said.startswith(_FAILING):
                    raise
                failing.append(error.said)
                raise RetryableError(error.said, error.wait, _FAILING_TRIES) from error

        try:
            found = retry(ask, self.location, self._policy)
        except NetworkError:
            if is_stopping() or len(failing) < _FAILING_TRIES:
                raise
            self._count_failure(failing[-1])
            raise QuestionRefused(f"{failing[-1]}, {_FAILING_TRIES} times") from None
        with self._counting:
            self._failed = 0
        return _reply(found, f"{self.location}, asked {where}")

    def _count_failure(self, said: str) -> None:
        with self._counting:
            self._failed += 1
            if self._failed >= _FAILURES_IN_A_ROW:
                problem = f"answers {said} to {self._failed} questions in a row"
                raise NetworkError(self.location, problem, "look into its log")

    def _ask(self, path: str, content: bytes | None) -> Any:
        """One try: the JSON of an answer; None where `/models` is not there."""
        where, silence = self.location, self._silence if content else None
        with self._timed(content):
            url = urlunsplit(self._parts._replace(path=self._parts.path + path))
            with answer(self._client, url, self._headers, self._policy, content, silence) as got:
                if got.status_code in (404, 405, 501) and content is None:
                    return None
                if got.status_code in REDIRECTS:
                    target = printable(redacted(location_of(got)))[:_SAID_LENGTH]
                    problem = f"leads to {target or 'nowhere'}, which is not followed"
                    raise UsageError(where, problem, "give that address, if it is right")
                raw = text_of(got, where)
                if got.status_code != 200:
                    raise self._refusal(got, path, raw)
                raw = b"".join(without_secrets(iter([raw]), self._secrets, where))
        found = parse_for_a_hint(raw, LISTING)
        if not isinstance(found, dict):
            kind = got.headers.get("Content-Type", "").partition(";")[0][:60]
            problem = f"answers {path} with {printable(kind) or 'something'} that is no JSON object"
            raise NetworkError(where, problem, _ADDRESS)
        return found

    @contextmanager
    def _timed(self, content: bytes | None) -> Iterator[None]:
        """Say of a silence how long it was, and that waiting once more will hardly help."""
        try:
            yield
        except RetryableError as error:
            if content is None or type(error.__cause__).__name__ != "ReadTimeout":
                raise
            said = f"no answer within {self._silence:,g} s"
            raise RetryableError(said, most=2) from error

    def _refusal(self, response: Any, path: str, raw: bytes) -> Exception:
        """What a status other than 200 means."""
        status, said = status_line(response), _said(raw)
        detail = f"{status}: {said}" if said else status
        if response.status_code in (401, 403):
            known = any(name == "Authorization" for name in self._headers)
            problem = f"does not accept the key that it was sent ({detail})"
            problem = problem if known else f"wants a key ({detail})"
            remedy = "name the environment variable that holds its key"
            return UsageError(self.location, problem, f"{remedy}, as in --api-key-env NAME")
        if response.status_code in _REFUSING and path == _ENDPOINT:
            return QuestionRefused(detail)
        if response.status_code in (404, 405):
            return UsageError(self.location, f"answers {path} with {detail}", _ADDRESS)
        return NetworkError(self.location, f"answers {path} with {detail}", _ADDRESS)


def _said(raw: bytes) -> str:
    """The message in a refusal, as servers lay it out; "" where there is none."""
    found = parse_for_a_hint(raw, LISTING)
    for key in ("error", "message", "detail"):
        if isinstance(found, dict) and key in found:
            inner = found[key]
            found = inner.get("message", inner) if isinstance(inner, dict) else inner
    text = found if isinstance(found, str) else ""
    return textwrap.shorten(printable(redacted(text)), _SAID_LENGTH, placeholder=" …")


def _reply(found: Any, where: str) -> Reply:
    """The first choice of an answer. Raises NetworkError where it has none."""
    choices = found.get("choices") if isinstance(found, dict) else None
    first = choices[0] if isinstance(choices, list) and choices else None
    message = first.get("message") if isinstance(first, dict) else None
    if not isinstance(message, dict):
        problem = "gives a message" if isinstance(first, dict) else "gives a choice"
        raise NetworkError(where, f"answers with JSON that {problem} nowhere", _ADDRESS)
    assert isinstance(first, dict)
    reasoning = message.get("reasoning_content") or message.get("reasoning")
    calls = message.get("tool_calls")
    return Reply(
        _text(message.get("content")),
        _text(reasoning),
        tuple(_call(each) for each in calls) if isinstance(calls, list) else (),
        _text(first.get("finish_reason")),
    )


def _call(call: Any) -> tuple[str, str]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        return "", ""
    arguments = function.get("arguments")
    # Older servers send an object where OpenAI sends its text.
    text = arguments if isinstance(arguments, str) else json.dumps(arguments)
    return _text(function.get("name")), _text(text)


def _text(value: Any) -> str:
    """A text, or the texts of a list of parts; what is no text of Unicode in it is replaced."""
    if isinstance(value, list):
        value = "".join(part.get("text") or "" for part in value if isinstance(part, dict))
    if not isinstance(value, str):
        return ""
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
