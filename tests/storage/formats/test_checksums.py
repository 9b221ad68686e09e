"""The list of SHA-256 at the end of a record: added once, added to, and told from other endings."""

from __future__ import annotations

import json

import pytest

from shardsurgeon.storage.formats.checksums import (
    begin_with_checksums,
    ends_with_checksums,
    nbytes_with_checksums,
    with_checksums,
)

RECORD = b'{\n  "format": 1,\n  "files": {"a": 1}\n}\n'
DIGESTS = {"b.json": "b" * 64, "a.json": "a" * 64}


def test_the_list_is_the_last_member_in_order_of_names() -> None:
    made = json.loads(with_checksums(RECORD, DIGESTS))
    assert made == {**json.loads(RECORD), "sha256": DIGESTS}
    assert list(made)[-1] == "sha256" and list(made["sha256"]) == ["a.json", "b.json"]


def test_a_list_that_is_there_is_added_to_as_if_it_were_made_at_once() -> None:
    first = with_checksums(RECORD, {"b.json": "b" * 64})
    both = with_checksums(first, {"a.json": "a" * 64})
    assert both == with_checksums(RECORD, DIGESTS)
    assert begin_with_checksums(first) == begin_with_checksums(RECORD)
    assert nbytes_with_checksums(first, ["a.json"]) == len(both)


def test_what_a_list_says_stays() -> None:
    first = with_checksums(RECORD, DIGESTS)
    assert with_checksums(first, {"a.json": "0" * 64}) == first


@pytest.mark.parametrize(
    "document",
    [
        RECORD,
        b'{\n  "sha256": {}\n}\n',
        json.dumps(json.loads(with_checksums(RECORD, DIGESTS))).encode(),
        with_checksums(RECORD, DIGESTS) + b"\n",
        with_checksums(RECORD, DIGESTS).replace(b'"a.json"', b'"c.json"'),
        with_checksums(RECORD, DIGESTS).replace(b'"a.json": ', b'"a.json":'),
        b',\n  "sha256": {\n    1\n  }\n}\n',
        b'{\n  "x": 1,\n  "sha256": {\n    "a": 5\n  },\n  "y": 2\n}\n',
    ],
)
def test_other_endings_are_none(document: bytes) -> None:
    assert not ends_with_checksums(document)
    assert ends_with_checksums(with_checksums(RECORD, DIGESTS))
