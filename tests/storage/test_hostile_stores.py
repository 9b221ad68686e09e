"""Stores that wait for ever, never end or make no sense, behind fsspec; and S3's XML by s3fs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from shardsurgeon.errors import CheckpointError, NetworkError, ShardSurgeonError, SourceReadError
from shardsurgeon.storage import object_store
from shardsurgeon.storage.object_store import StoreSource
from shardsurgeon.storage.retry import RetryPolicy
from tests.support.hub.raw import head, raw_server

QUICK = RetryPolicy(
    tries=3, first_wait=0.01, longest_wait=0.02, least_rate=1000.0, window=0.3, slow_windows=2
)
DATA = bytes(range(256)) * 40
LONG_SECONDS = 30.0


class Hostile(MemoryFileSystem):  # type: ignore[misc]
    """One file; answers as it is told."""

    protocol = "hostile"
    cachable = False
    bytes_per_second: float = 1e9
    listed: Callable[[], Any] = dict
    asked: list[tuple[int, int]] = []  # noqa: RUF012

    def find(self, path: str, **words: Any) -> Any:
        return type(self).listed()

    def cat_file(self, path: str, start: int = 0, end: int = 0, **words: Any) -> bytes:
        self.asked.append((start, end))
        time.sleep((end - start) / self.bytes_per_second)
        return DATA[start:end]


@pytest.fixture
def hostile() -> Iterator[type[Hostile]]:
    fsspec.register_implementation("hostile", Hostile, clobber=True)
    Hostile.asked, Hostile.bytes_per_second = [], 1e9
    yield Hostile
    Hostile.listed = dict


def test_a_slow_store_is_asked_for_smaller_parts(hostile: type[Hostile]) -> None:
    hostile.bytes_per_second = 8000
    assert StoreSource("hostile://m/x", QUICK).read("a", 0, len(DATA)) == DATA
    assert hostile.asked[0] == (0, len(DATA))
    assert all(end - begin <= len(DATA) // 8 for begin, end in hostile.asked[1:])


def test_a_store_that_never_answers_is_given_up(hostile: type[Hostile]) -> None:
    hostile.bytes_per_second = 1
    begun = time.monotonic()
    with pytest.raises(NetworkError, match="no answer within 0 s"):
        StoreSource("hostile://m/x", QUICK).read("a", 0, len(DATA))
    assert time.monotonic() - begun < LONG_SECONDS


def test_a_listing_without_an_end_is_given_up(
    hostile: type[Hostile], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_store, "_LISTING_SECONDS", 0.2)
    hostile.listed = lambda: threading.Event().wait(100)
    says = r"could not be listed: no answer within 0 s; give the folder that holds the model"
    with pytest.raises(NetworkError, match=says):
        StoreSource("hostile://m/x", QUICK).list()


def raising(error: Exception) -> Callable[[], Any]:
    def call() -> Any:
        raise error

    return call


SENSELESS: dict[str, Callable[[], Any]] = {
    "a size that is no digit": raising(ValueError("invalid literal for int(): '²'")),
    "a field that is missing": raising(KeyError("Size")),
    "a field twice": raising(TypeError("int() argument must be a string, not 'list'")),
    "a date that is none": raising(RuntimeError("Unable to calculate timezone offset")),
    "a field that is text": raising(AttributeError("'str' object has no attribute 'get'")),
    "a number beyond all": raising(OverflowError("too large")),
    "deep": raising(RecursionError("maximum recursion depth exceeded")),
    "a size as text": lambda: {"/m/x/a": {"size": "5", "type": "file"}},
    "no size": lambda: {"/m/x/a": {"type": "file"}},
    "a negative size": lambda: {"/m/x/a": {"size": -5, "type": "file"}},
    "half a byte": lambda: {"/m/x/a": {"size": 0.5, "type": "file"}},
    "a lone surrogate": lambda: {"/m/x/\ud800": {"size": 5, "type": "file"}},
    "a token as a name": lambda: {f"/m/x/hf_{'a1' * 17}": {"size": 5, "type": "file"}},
    "a name that leads out": lambda: {"/m/x/../../a": {"size": 5, "type": "file"}},
}


@pytest.mark.parametrize("kind", SENSELESS)
def test_a_listing_that_makes_no_sense_is_a_sentence(hostile: type[Hostile], kind: str) -> None:
    hostile.listed = SENSELESS[kind]
    with pytest.raises((CheckpointError, SourceReadError)) as caught:
        StoreSource("hostile://m/x", QUICK).list()
    assert "a1a1a1" not in str(caught.value)


def test_a_stamp_is_kept_without_secrets_and_short(hostile: type[Hostile]) -> None:
    facts = {"size": 5, "type": "file"}
    token = "hf_" + "a1" * 17
    hostile.listed = lambda: {
        "/m/x/a": {**facts, "ETag": f'"{token}"'},
        "/m/x/b": {**facts, "ETag": "x" * 9999},
    }
    first, second = StoreSource("hostile://m/x", QUICK).list()
    assert first.stamp == "hf_***" and len(second.stamp) == 64


# --- what S3 says, as XML ---

LAUGHS = (
    b'<?xml version="1.0"?><!DOCTYPE l [<!ENTITY a "' + b"ha" * 50 + b'">'
    + b"".join(
        b'<!ENTITY %c "%b">' % (c, b"&%c;" % (c - 1) * 10) for c in range(ord("b"), ord("k"))
    )
    + b"]><ListBucketResult><Name>&j;</Name></ListBucketResult>"
)  # fmt: skip
OUTSIDE = (
    b'<?xml version="1.0"?><!DOCTYPE l [<!ENTITY a SYSTEM "file:///etc/passwd">]>'
    b"<ListBucketResult><Contents><Key>m/x/&a;</Key><Size>5</Size></Contents></ListBucketResult>"
)
ENTRY = (
    b"<Contents><Key>m/config.json</Key><LastModified>%b</LastModified><ETag>e</ETag>"
    b"<Size>%b</Size></Contents>"
)
DATE = b"2026-01-01T00:00:00.000Z"


def bucket(*entries: bytes) -> bytes:
    inside = b"<Name>b</Name><IsTruncated>false</IsTruncated>" + b"".join(entries)
    return b"<ListBucketResult>" + inside + b"</ListBucketResult>"


XML = {
    "a billion laughs": LAUGHS,
    "an entity from outside": OUTSIDE,
    "deep": b"<a>" * 200_000,
    "not XML": b"{}",
    "nothing": b"",
    "not UTF-8": b"\xff\xfe\x00",
    "a size as text": bucket(ENTRY % (DATE, b"x")),
    "a size that is no digit": bucket(ENTRY % (DATE, "²".encode())),
    "a size of 5,000 digits": bucket(ENTRY % (DATE, b"9" * 5000)),
    "a negative size": bucket(ENTRY % (DATE, b"-5")),
    "a size twice": bucket((ENTRY % (DATE, b"5")).replace(b"<Size>", b"<Size>5</Size><Size>")),
    "no date": bucket(ENTRY % (b"x", b"5")),
    "a long date": bucket(ENTRY % (b"2026-01-01T0" + b"8" * 70 + b"0:00:00.0Z", b"5")),
    "no key": bucket(b"<Contents><Size>5</Size></Contents>"),
    "a key that leads out": bucket((ENTRY % (DATE, b"5")).replace(b"config.json", b"../../a")),
}


@pytest.mark.s3
@pytest.mark.parametrize("kind", XML)
def test_xml_that_is_no_listing_is_a_sentence(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(asked: str) -> Iterable[bytes]:
        return [head(Content_Type="application/xml", Content_Length=len(XML[kind])), XML[kind]]

    import s3fs  # type: ignore[import-untyped]

    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    monkeypatch.setattr(object_store, "_LISTING_SECONDS", 8.0)
    with raw_server(answer) as address:
        options: dict[str, Any] = {
            "endpoint_url": address,
            "key": "k",
            "secret": "s",
            "skip_instance_cache": True,
        }
        options["config_kwargs"] = {"retries": {"max_attempts": 1}}
        monkeypatch.setattr(
            object_store,
            "_filesystem",
            lambda url, location: (fsspec.filesystem("s3", **options), "b/m"),
        )
        with pytest.raises(ShardSurgeonError) as caught:
            StoreSource("s3://b/m", QUICK).list()
    assert "root:" not in str(caught.value)
