"""The insides of huggingface_hub that pushing leans on do what is expected of them."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, HfApi

from shardsurgeon.errors import OutputError
from shardsurgeon.storage.hub.repository import (
    Receipt,
    receipt_of,
    to_upload_ahead,
    uploaded_before,
    without_twins,
)
from tests.support.hub.server import LocalHub

DATA = b"ordinary text, which a server would rather have in the commit"
SHA256 = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def mine(online: LocalHub) -> LocalHub:
    HfApi().create_repo("me/out")
    online.reset_counts()
    return online


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "notes.txt"
    path.write_bytes(DATA)
    return path


def test_what_goes_ahead_goes_as_a_large_file_however_small(mine: LocalHub, file: Path) -> None:
    addition = to_upload_ahead("notes.txt", file)
    HfApi().preupload_lfs_files("me/out", [addition], free_memory=False)
    assert mine.uploads == {SHA256: 1}
    assert not mine.received(r"POST .*/preupload/")
    assert receipt_of(addition) == Receipt(SHA256, len(DATA))


def test_a_commit_names_what_was_uploaded_in_another_process(mine: LocalHub, file: Path) -> None:
    HfApi().preupload_lfs_files("me/out", [to_upload_ahead("notes.txt", file)])
    file.unlink()
    mine.reset_counts()
    receipt = Receipt.from_text(Receipt(SHA256, len(DATA)).to_text(), "notes.txt")
    again = [uploaded_before("notes.txt", receipt)]
    HfApi().create_commit("me/out", again, commit_message="One")
    assert mine.read("me/out", "notes.txt") == DATA
    assert mine.uploads == {}
    assert not mine.received(r"POST .*/(preupload|objects)/")


def test_an_addition_that_was_not_uploaded_has_no_receipt(file: Path) -> None:
    with pytest.raises(RuntimeError, match="was not uploaded"):
        receipt_of(to_upload_ahead("notes.txt", file))


@pytest.mark.parametrize(
    "text",
    ["", "{}", "[]", "nonsense", '{"sha256": "aa", "nbytes": 1}', '{"sha256": 5, "nbytes": 1}'],
)
def test_a_receipt_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(OutputError, match="model-1: its receipt"):
        Receipt.from_text(text, "model-1")


def test_twins_are_found_by_content_and_not_by_size() -> None:
    contents = {"a": b"one", "b": b"two", "c": b"one", "d": b"longer", "e": b""}
    additions = [CommitOperationAdd(name, data) for name, data in contents.items()]
    assert [each.path_in_repo for each in without_twins(additions)] == ["a", "b", "d", "e"]
