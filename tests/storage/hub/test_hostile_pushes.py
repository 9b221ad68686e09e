"""What huggingface_hub asks of a Hub for a push, where that makes no sense or has no end."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import Any

import pytest
from huggingface_hub import HfApi, get_session

from shardsurgeon.errors import NetworkError, PublishError, ShardSurgeonError
from shardsurgeon.storage.connections import guarded_sessions
from shardsurgeon.storage.hub.errors import hub_errors, with_retries
from shardsurgeon.storage.hub.repository import Repository
from shardsurgeon.storage.retry import RetryPolicy
from tests.support.hub.server import LocalHub


@dataclass
class Case:
    """on, how: the fault; says: what the error tells."""

    on: str
    how: dict[str, Any] = field(default_factory=dict)
    says: str = "does not answer as a Hub does"


PUSHES = {
    "whoami is a list": Case("GET /api/whoami", {"status": 200, "body": b"[]"}, "names no user"),
    "whoami is not JSON": Case("GET /api/whoami", {"status": 200, "body": b"<html>"}),
    "whoami has odd types": Case(
        "GET /api/whoami", {"status": 200, "body": b'{"auth": 5, "name": 5}'}, "names no user"
    ),
    "a model without an id": Case("GET /api/models/", {"status": 200, "body": b"{}"}),
    "a model that is a list": Case("GET /api/models/", {"status": 200, "body": b"[]"}),
    "an upload mode of another shape": Case(
        "POST .*/preupload/", {"status": 200, "body": b'{"files": 5}'}
    ),
    "an error that is a list": Case("GET /api/models/", {"status": 400, "body": b"[]"}),
    "a model without an end": Case(
        "GET /api/models/",
        {"status": 200, "body": b'{"id": "' + b"x" * (20 << 20)},
        "answers with more than 12,582,912 bytes",
    ),
    "compressed": Case(
        "GET /api/models/", {"headers": {"Content-Encoding": "gzip"}}, "answers compressed"
    ),
    "elsewhere": Case(
        "GET /api/models/",
        {"status": 302, "headers": {"Location": "ftp://a/b"}},
        "leads to ftp:, which is not followed",
    ),
    "a long wait": Case(
        "GET /api/models/", {"status": 429, "retry_after": 599}, "asks to wait 599 seconds"
    ),
    "a wait that is no number": Case(
        "POST .*/preupload/", {"status": 503, "headers": {"Retry-After": "²"}}
    ),
}


@pytest.mark.parametrize("kind", PUSHES)
def test_a_push_to_a_hub_that_makes_no_sense_ends_with_a_sentence(
    online: LocalHub, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(
        "shardsurgeon.storage.hub.errors.RETRY_POLICY", RetryPolicy(tries=2, first_wait=0.01)
    )
    case = PUSHES[kind]
    online.fault(case.on, times=None, **case.how)
    with guarded_sessions(), pytest.raises(ShardSurgeonError, match=case.says) as caught:
        Repository("pruned" if "whoami" in kind else "me/pruned").prepare(private=False)
    assert online.token not in str(caught.value)


def test_a_wait_that_huggingface_hub_is_asked_for_is_ours(
    online: LocalHub, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shardsurgeon.storage.retry._waiting", lambda seconds: iter(()))
    online.fault(r"POST .*/preupload/", status=429, ratelimit_reset=6, times=1)
    with caplog.at_level(logging.WARNING, "shardsurgeon"), guarded_sessions():
        Repository("me/pruned").prepare(private=False)
    assert [m for m in caplog.messages if "me/pruned: waiting 6 s (429 Too Many Requests" in m]


def test_a_request_of_huggingface_hub_that_nobody_answers_has_an_end(
    online: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "shardsurgeon.storage.connections._TIMEOUTS",
        dict.fromkeys(("connect", "read", "write", "pool"), 0.3),
    )
    monkeypatch.setattr(
        "shardsurgeon.storage.hub.errors.RETRY_POLICY", RetryPolicy(tries=2, first_wait=0.01)
    )
    online.fault(r"GET /api/whoami", delay=60, times=None)
    begun = time.monotonic()
    with guarded_sessions(), pytest.raises((NetworkError, PublishError)), hub_errors("x"):
        with_retries(HfApi().whoami, "x")
    assert time.monotonic() - begun < 30


def test_the_client_is_the_users_own_again_afterwards(online: LocalHub) -> None:
    with guarded_sessions():
        assert type(get_session()._transport).__name__ == "_Transport"
    assert type(get_session()._transport).__name__ != "_Transport"
