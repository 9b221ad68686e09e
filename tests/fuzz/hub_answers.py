"""What servers answer, under the fuzzer: listings, refusals, headers of ranges, S3's XML.

An answer is one text: a byte that chooses the status, header lines, an empty line, the body. It
reaches the program through the HTTP library, as an answer of a server does; no socket is opened.
"""

from __future__ import annotations

import functools
import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HfHubHTTPError

from shardsurgeon.errors import ShardSurgeonError
from shardsurgeon.storage import object_store
from shardsurgeon.storage.connections import HTTP_LIBRARY, asked_wait
from shardsurgeon.storage.http import answer, body, etag_of, followed, total_nbytes
from shardsurgeon.storage.hub.errors import hub_errors, refused_read
from shardsurgeon.storage.hub.listing import Listing, listing_of, parse_listing
from shardsurgeon.storage.hub.source import _require_listed
from shardsurgeon.storage.retry import RetryableError, RetryPolicy
from shardsurgeon.storage.source import SourceFile, leads_out

TOKEN = "hf_" + "FuzzedToken" + "0" * 23
_URL = "https://hub.example/api/models/org/tiny?blobs=true"
_STATUSES = (200, 206, 301, 302, 307, 308, 204, 304, 400, 401, 403, 404, 409, 416, 418, 429, 500,
             503, 520, 999)  # fmt: skip
_POLICY = RetryPolicy()
_FILE = SourceFile("a.bin", 100, "0" * 64)


def listing(data: bytes, scratch: Path) -> None:
    """The body of a listing."""
    try:
        found = parse_listing(data, "hf://org/tiny")
    except ShardSurgeonError as error:
        _tells_no_token(error)
        return
    _is_sound(found)


def _is_sound(found: Listing) -> None:
    for name, file in found.files.items():
        assert not leads_out(name) and name.encode() and TOKEN not in name
        assert type(file.nbytes) is int and 0 <= file.nbytes < 1 << 63
        assert len(file.digest) == (64 if file.is_large else 40) and int(file.digest, 16) >= 0
    assert list(found.files) == sorted(found.files)
    assert found.commit is None or int(found.commit, 16) >= 0


def hub_answer(data: bytes, scratch: Path) -> None:
    """An answer to the request for a listing, and to one for a range of a file."""
    _ask(data, lambda client: _listed(client))
    _ask(data, lambda client: _ranged(client))


def _ask(data: bytes, call: Callable[[Any], None]) -> None:
    response = _response(data)
    if response is None:
        return
    _served[:] = [response]
    try:
        call(_client())
    except (ShardSurgeonError, RetryableError) as error:
        _tells_no_token(error)


_served: list[Callable[[], Any]] = []


@functools.cache
def _client() -> Any:
    """One for all: it takes a while to make."""
    return HTTP_LIBRARY.Client(transport=HTTP_LIBRARY.MockTransport(lambda request: _served[0]()))


def _response(data: bytes) -> Callable[[], Any] | None:
    """The answer that a text stands for; None where its head is none."""
    head, _, content = data[1:].partition(b"\n\n")
    pairs = [line.partition(b":")[::2] for line in head.split(b"\n") if line]
    headers = [(name.strip(), value.strip()) for name, value in pairs]
    # What a parser of HTTP lets through.
    if not all(name and name.replace(b"-", b"").isalnum() for name, _ in headers):
        return None
    if any(set(value) & {*range(9), *range(10, 32), 127} for _, value in headers):
        return None
    status = _STATUSES[data[0] % len(_STATUSES)] if data else 200
    return lambda: HTTP_LIBRARY.Response(
        status, headers=headers, stream=HTTP_LIBRARY.ByteStream(content)
    )


def _listed(client: Any) -> None:
    try:
        with followed(client, _URL, lambda url: {}, "hf://org/tiny", _POLICY) as response:
            _is_sound(listing_of(response, "hf://org/tiny"))
    except HfHubHTTPError as error:
        _tells_no_token(refused_read(error, "hf://org/tiny", "org/tiny"))
        try:
            with hub_errors("org/tiny"):
                raise
        except ShardSurgeonError as translated:
            _tells_no_token(translated)


def _ranged(client: Any) -> None:
    with answer(client, _URL, {}, _POLICY) as response:
        etag = etag_of(response.headers)
        assert etag is None or (TOKEN not in etag and len(etag) <= 256)
        assert asked_wait(response.headers) >= 0.0
        assert (total_nbytes(response) or 0) >= 0
        _require_listed(_FILE, "a.bin", response.headers, etag)
        for piece in body(response, _FILE, "a.bin", 0, 10):
            assert isinstance(piece, bytes)


def _tells_no_token(error: ShardSurgeonError | RetryableError) -> None:
    if isinstance(error, ShardSurgeonError):
        assert TOKEN not in str(error) and "\n" not in str(error)
        assert len(str(error)) < 20_000


# S3


@functools.cache
def _parser() -> tuple[Any, Any]:
    """botocore's own parser, and the shape of a listing."""
    import botocore.loaders  # type: ignore[import-untyped]
    import botocore.model  # type: ignore[import-untyped]
    import botocore.parsers  # type: ignore[import-untyped]

    described = botocore.loaders.Loader().load_service_model("s3", "service-2")
    shape = botocore.model.ServiceModel(described).operation_model("ListObjectsV2").output_shape
    return botocore.parsers.create_parser("rest-xml"), shape


def s3_listing(data: bytes, scratch: Path) -> None:
    """A listing as S3 sends it: parsed by botocore, made into facts as s3fs does."""
    source = object_store.StoreSource.__new__(object_store.StoreSource)
    source.location, source._root = "s3://b/m", "b/m"
    try:
        with object_store._asking(source.location):
            found = list(_facts(data))
        for path, facts in found:
            file = source._describe(path, facts)
            assert file is None or (file.nbytes >= 0 and not leads_out(file.name))
            assert file is None or TOKEN not in file.stamp + file.name
    except (ShardSurgeonError, RetryableError) as error:
        _tells_no_token(error)


def _facts(data: bytes) -> Iterator[tuple[str, dict[str, Any]]]:
    parser, shape = _parser()
    found = parser.parse({"body": data, "headers": {}, "status_code": 200, "context": {}}, shape)
    for entry in found.get("Contents", []):
        yield f"b/{entry['Key']}", {**entry, "size": entry["Size"], "type": "file"}


HAS_S3 = importlib.util.find_spec("botocore") is not None


# Seeds


def listings() -> list[bytes]:
    """Listings of a few files."""
    small = {"rfilename": "config.json", "size": 5, "blobId": "0" * 40}
    large = {**small, "rfilename": "a/model.safetensors",
             "lfs": {"sha256": "1" * 64, "size": 5, "pointerSize": 130}}  # fmt: skip
    facts: list[dict[str, Any]] = [
        {"sha": "2" * 40, "siblings": [small, large], "private": False},
        {"sha": None, "siblings": []},
        {"siblings": None},
        {"sha": "2" * 40, "siblings": [{**small, "rfilename": TOKEN}]},
    ]
    return [json.dumps(one).encode() for one in facts]


def answers() -> list[bytes]:
    """Answers of every kind, a listing among them."""
    heads = {
        200: ["Content-Type: application/json"],
        206: ['ETag: W/"0"\nContent-Range: bytes 0-9/100\nX-Linked-Size: 100'],
        302: ["Location: https://cdn.example/x?sig=1", "Location: file:///etc/passwd"],
        307: ["Location: //[x\nX-Linked-Etag: 0"],
        401: ["X-Error-Code: GatedRepo\nX-Error-Message: no", f"X-Error-Message: {TOKEN}"],
        404: ["X-Error-Code: RevisionNotFound", "X-Error-Code: EntryNotFound"],
        416: ["Content-Range: bytes */100"],
        429: ["Retry-After: 5", 'RateLimit: "api";r=0;t=55', "Retry-After: Fri, 1 Jan 2027 00:00"],
    }
    bodies = [listings()[0], b'{"error": "no"}', b'{"errors": [{"message": "no"}]}', b"0123456789"]
    return [
        bytes([_STATUSES.index(status)]) + head.encode() + b"\n\n" + content
        for status, each in heads.items()
        for head in each
        for content in (bodies if status in (200, 401) else bodies[-1:])
    ]


def s3_listings() -> list[bytes]:
    """Listings of a folder of two files, and of none."""
    entry = ("<Contents><Key>m/{}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
             "<ETag>&quot;abc&quot;</ETag><Size>5</Size></Contents>")  # fmt: skip
    inside = entry.format("config.json") + entry.format("a/b.bin")
    whole = f"<ListBucketResult><Name>b</Name>{inside}</ListBucketResult>"
    laughs = '<!DOCTYPE l [<!ENTITY a "aa"><!ENTITY b "&a;&a;">]><ListBucketResult><Name>&b;</Name>'
    return [whole.encode(), b"<ListBucketResult/>", f"{laughs}</ListBucketResult>".encode()]


LISTING_WORDS = (b'"sha":', b'"siblings":[', b'"rfilename":', b'"size":', b'"blobId":', b'"lfs":{',
                 b'"sha256":', b'"../', b'"a//b"', TOKEN.encode())  # fmt: skip
ANSWER_WORDS = (*LISTING_WORDS, b"Retry-After: ", b"Content-Range: bytes ", b"Location: ",
                b"RateLimit: ", b"ETag: ", b"Content-Length: ", b"X-Linked-Size: ", b"\xb2",
                b"X-Error-Code: ", b"X-Error-Message: ", b"Content-Encoding: gzip")  # fmt: skip
XML_WORDS = (b"<Contents>", b"<Key>", b"<Size>", b"<ETag>", b"<LastModified>", b"<!ENTITY a ",
             b"&a;", b"SYSTEM", b"\xc2\xb2", b"<![CDATA[")  # fmt: skip


def targets(json_words: tuple[bytes, ...]) -> Iterator[tuple[Any, ...]]:
    """What `Target` is made of: name, function, seeds, words. json_words: those of any JSON."""
    yield "hub-listing", listing, listings, (*json_words, *LISTING_WORDS)
    yield "hub-answer", hub_answer, answers, (*json_words, *ANSWER_WORDS)
    if HAS_S3:  # it comes with s3fs
        yield "s3-listing", s3_listing, s3_listings, XML_WORDS
