"""A bad network between us and the Hub: survived byte for byte, or given up with a clear line."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from huggingface_hub import constants

from shardsurgeon.checkpoint.checkpoint import open_checkpoint
from shardsurgeon.errors import NetworkError, SourceReadError
from shardsurgeon.storage.hub.source import HubSource
from shardsurgeon.storage.retry import RetryPolicy
from tests.support.hub.models import fixture_folder
from tests.support.hub.server import LocalHub

SHARD = "model-00002-of-00004.safetensors"
FOLDER = fixture_folder("kimi_linear")
WEIGHTS = (FOLDER / SHARD).read_bytes()
QUICK = RetryPolicy(first_wait=0.01, longest_wait=0.02)
ANY = r"GET /(cdn|org)/"
STORAGE = r"GET /cdn/"


@pytest.fixture
def tiny(online: LocalHub) -> LocalHub:
    online.add_model("org/tiny", FOLDER)
    return online


@pytest.fixture
def source(tiny: LocalHub) -> HubSource:
    return HubSource("org/tiny", policy=QUICK)


def whole(source: HubSource) -> bytes:
    return b"".join(source.stream(SHARD, 0, len(WEIGHTS)))


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
@pytest.mark.parametrize("on", [STORAGE, r"GET /org/tiny/resolve/", r"GET /api/models/"])
def test_a_server_that_is_busy_is_asked_again(tiny: LocalHub, status: int, on: str) -> None:
    tiny.fault(on, status=status, times=2)
    assert whole(HubSource("org/tiny", policy=QUICK)) == WEIGHTS


@pytest.mark.parametrize("reset", [False, True])
def test_a_cut_connection_goes_on_where_it_was_cut(
    tiny: LocalHub, source: HubSource, reset: bool
) -> None:
    chance = random.Random(7)
    cuts = 9
    tiny.fault(STORAGE, cut_after=lambda: chance.randrange(20_000), reset=reset, times=cuts)
    tiny.reset_counts()
    assert whole(source) == WEIGHTS
    begins = [int(r.range[6:].split("-")[0]) for r in tiny.requests if "/cdn/" in r.path]
    assert len(begins) == cuts + 1
    assert begins == sorted(begins)
    if not reset:  # by RST bytes are lost on the way
        assert tiny.sent(STORAGE) == len(WEIGHTS)


def test_a_try_that_brings_bytes_uses_up_no_patience(tiny: LocalHub) -> None:
    tiny.fault(STORAGE, cut_after=2_000, times=None)
    hasty = HubSource("org/tiny", policy=RetryPolicy(tries=2, first_wait=0.001))
    assert hasty.read(SHARD, 0, 60_000) == WEIGHTS[:60_000]


def test_a_server_that_restarts_is_waited_for(tiny: LocalHub) -> None:
    source = HubSource("org/tiny", policy=RetryPolicy(first_wait=0.05))
    tiny.fault(STORAGE, cut_after=50_000, do=lambda: None)
    pieces = source.stream(SHARD, 0, len(WEIGHTS))
    begin = next(pieces)
    tiny.stop()
    threading.Timer(0.3, tiny.start).start()
    assert begin + b"".join(pieces) == WEIGHTS


def test_a_silent_connection_is_left_for_another(
    tiny: LocalHub, source: HubSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    tiny.fault(STORAGE, delay=60)
    begun = time.monotonic()
    assert whole(source) == WEIGHTS
    assert time.monotonic() - begun < 30


def test_a_slow_connection_is_not_silent(
    tiny: LocalHub, source: HubSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 1.5)
    tiny.fault(STORAGE, bytes_per_second=45_000)
    assert source.read(SHARD, 0, 90_000) == WEIGHTS[:90_000]
    assert sum(request.status == 206 for request in tiny.requests) == 1


def in_seconds(seconds: float) -> str:
    return format_datetime(datetime.now(UTC) + timedelta(seconds=seconds), usegmt=True)


@pytest.mark.parametrize(
    "how",
    [
        lambda: {"status": 503, "retry_after": 1},
        lambda: {"status": 429, "retry_after": in_seconds(3)},
        lambda: {"status": 429, "ratelimit_reset": 1},
    ],
    ids=["seconds", "date", "rate-limit"],
)
def test_a_server_is_left_alone_for_as_long_as_it_asks(
    tiny: LocalHub, source: HubSource, how: Callable[[], dict[str, object]]
) -> None:
    tiny.fault(STORAGE, **how())
    begun = time.monotonic()
    pieces = list(source.stream(SHARD, 0, 100))
    assert b"".join(pieces) == WEIGHTS[:100]
    assert time.monotonic() - begun > 0.8
    # Who waits is heard of, and can be stopped.
    assert pieces.count(b"") >= 3


def test_a_server_that_asks_for_an_hour_is_not_waited_for(
    tiny: LocalHub, source: HubSource
) -> None:
    tiny.fault(STORAGE, status=429, retry_after=3600)
    with pytest.raises(NetworkError, match=r"asks to wait 3,600 seconds \(429 Too Many Requests"):
        source.read(SHARD, 0, 100)


def test_in_the_end_it_is_given_up_with_the_name_of_the_file(tiny: LocalHub) -> None:
    source = HubSource("org/tiny", policy=RetryPolicy(tries=3, first_wait=0.001))
    tiny.fault(STORAGE, status=503, times=None)
    says = rf"{SHARD}: gave up after 3 tries in a row \(503 Service Unavailable\); check the conn"
    with pytest.raises(NetworkError, match=says) as caught:
        source.read(SHARD, 0, 100)
    assert caught.value.exit_status == 1
    assert sum("/cdn/" in request.path for request in tiny.requests) == 3


def test_a_hub_that_is_not_there_is_given_up_soon(online: LocalHub) -> None:
    online.stop()
    with pytest.raises(NetworkError, match=r"hf://org/tiny: gave up after 2 tries in a row"):
        HubSource("org/tiny", policy=RetryPolicy(tries=2, first_wait=0.001))


def test_a_link_that_is_refused_every_time_is_given_up(tiny: LocalHub) -> None:
    source = HubSource("org/tiny", policy=RetryPolicy(tries=3, first_wait=0.001))
    tiny.fault(STORAGE, status=403, times=None)
    with pytest.raises(NetworkError, match=r"403 Forbidden from 127\.0\.0\.1"):
        source.read(SHARD, 0, 100)


def test_another_range_than_the_asked_one_is_refused(tiny: LocalHub, source: HubSource) -> None:
    tiny.fault(STORAGE, shift_range=8)
    with pytest.raises(SourceReadError, match=r"another range than the one from byte 100 came"):
        source.read(SHARD, 100, 200)


def test_a_small_file_may_come_whole(tiny: LocalHub, source: HubSource) -> None:
    tiny.fault(STORAGE, ignore_range=True)
    assert source.read(SHARD, 100, 200) == WEIGHTS[100:200]


def test_a_big_file_that_comes_whole_is_refused_unread(
    tiny: LocalHub, source: HubSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shardsurgeon.storage.http._WHOLE_NBYTES", 1000)
    tiny.fault(STORAGE, ignore_range=True)
    with pytest.raises(SourceReadError, match=r"sends whole files only; download the model"):
        source.read(SHARD, 0, 8)


def test_headers_come_through_a_bad_network(tiny: LocalHub) -> None:
    tiny.fault(ANY, status=503, every=3, times=None)
    source = HubSource("org/tiny", policy=QUICK)
    assert open_checkpoint(source).num_tensors == 223


def test_one_header_that_cannot_be_had_ends_the_waiting_for_the_others(tiny: LocalHub) -> None:
    source = HubSource("org/tiny", policy=RetryPolicy(first_wait=20, longest_asked=60))
    tiny.fault(r"GET /cdn/.*00001-of", status=503, retry_after=30, times=None)
    tiny.fault(r"GET /cdn/.*00003-of", status=429, retry_after=3600, times=None)
    begun = time.monotonic()
    with pytest.raises(NetworkError, match="00003-of"):
        open_checkpoint(source)
    assert time.monotonic() - begun < 15
