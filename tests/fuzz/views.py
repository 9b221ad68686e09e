"""The manifest of a view: what is accepted says what its JSON says, for an independent reading."""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from itertools import accumulate
from pathlib import Path
from typing import Any

from shardsurgeon.errors import CheckpointError
from shardsurgeon.storage.formats.view import DATA_NAME, Manifest, read_manifest
from tests.fuzz import seeds
from tests.fuzz.edits import edited
from tests.support import handmade_view

_KEYS = (
    "file",
    "begin",
    "nbytes",
    "ranges",
    "header",
    "__metadata__",
    "x",
    "data_offsets",
    "files",
)


def packed(data: bytes, scratch: Path) -> None:
    """A whole file, packed as it may be."""
    try:
        found = read_manifest(data, "view")
    except CheckpointError:
        return
    # zlib reads one member only; what is accepted has no other.
    _same(found, zlib.decompress(data, wbits=31))


def unpacked(data: bytes, scratch: Path) -> None:
    """The text of one whose container is sound."""
    _text(data)


def changed(data: bytes, scratch: Path) -> None:
    """A sound manifest that has odd values."""
    lines = edited([handmade_view.in_memory()], data, _KEYS)
    if isinstance(lines, list):
        _text(handmade_view.text_of(lines))


def _text(text: bytes) -> None:
    try:
        found = read_manifest(gzip.compress(text, compresslevel=0), "view")
    except CheckpointError as error:
        assert len(str(error)) < 4000, "a sentence that nobody reads"
        return
    _same(found, text)


def _same(found: Manifest, text: bytes) -> None:
    head, *lines = [json.loads(line.decode("utf-8-sig")) for line in text.split(b"\n") if line]
    files = head["files"]
    listed = [[file.name, file.nbytes, file.stamp] for file in found.files]
    assert (found.source, listed) == (head["source"], [f for f in files if f[0] != DATA_NAME])
    assert len(found.shards) == len(lines) == head["shards"]
    headers = [_header_of(line) for line in lines]
    names = [name for header in headers for name in header if name != "__metadata__"]
    assert len(set(names)) == len(names) == head["tensors"]
    for shard, line, header in zip(found.shards, lines, headers, strict=True):
        assert (shard.file, shard.nbytes) == (line["file"], line["nbytes"])
        assert len(shard.head) == 8 + int.from_bytes(shard.head[:8], "little")
        assert json.loads(shard.head[8:]) == header
        assert hashlib.sha256(shard.head).hexdigest() == line["header_sha256"]
        _same_ranges(shard, line, header, files)


def _header_of(line: dict[str, Any]) -> dict[str, Any]:
    """What a header says that stands there itself, or as text."""
    said = line["header"]
    header: dict[str, Any] = json.loads(said) if isinstance(said, str) else said
    return header


def _same_ranges(
    shard: Any, line: dict[str, Any], header: dict[str, Any], files: list[list[Any]]
) -> None:
    """Every tensor is the ranges that begin within it, and they are its size."""
    columns = line["ranges"]
    rows = list(zip(columns["file"], columns["begin"], columns["nbytes"], strict=True))
    begins = [0, *accumulate(nbytes for *_, nbytes in rows)]
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        there = list(shard.ranges(begin, end))
        inside = [row for row, at in zip(rows, begins, strict=False) if begin <= at < end]
        assert there == [(files[number][0], at, nbytes) for number, at, nbytes in inside]
        assert sum(nbytes for *_, nbytes in there) == end - begin
    for number, at, nbytes in rows:
        assert 0 <= at <= at + nbytes <= files[number][1], "bytes outside of their file"


TARGETS = (
    ("view-file", packed, seeds.packed_manifests),
    ("view", unpacked, seeds.manifests),
    ("view-edited", changed, seeds.edits),
)
