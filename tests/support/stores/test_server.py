from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import fsspec
import pytest

if TYPE_CHECKING:  # what the server is made of need not be installed
    from tests.support.stores.server import LocalS3

pytestmark = pytest.mark.s3

FIXTURE = Path(__file__).parents[3] / "fixtures" / "qwen3_moe"


def test_a_folder_is_found_as_it_was_put(s3: LocalS3) -> None:
    s3.put_folder("s3://models/org/tiny", FIXTURE)
    files = fsspec.filesystem("s3")
    found = {
        path.removeprefix("models/org/tiny/"): files.cat_file(path)
        for path in files.find("models/org/tiny")
    }
    paths = (path for path in FIXTURE.rglob("*") if path.is_file())
    assert found == {path.relative_to(FIXTURE).as_posix(): path.read_bytes() for path in paths}


def test_a_range_brings_those_bytes_and_no_others(s3: LocalS3) -> None:
    s3.put("s3://models/a.bin", bytes(range(256)))
    s3.reset_counts()
    assert fsspec.filesystem("s3").cat_file("models/a.bin", start=16, end=20) == b"\x10\x11\x12\x13"
    assert s3.requests == [("GET", "/models/a.bin", 206, 4, "bytes=16-19")]
    assert s3.sent("GET /models/") == 4


def test_every_test_begins_with_an_empty_server(s3: LocalS3) -> None:
    assert s3.requests == []
    assert fsspec.filesystem("s3").ls("") == []
