"""What a source is called in a record."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from shardsurgeon.checkpoint.checkpoint import identity_of, open_checkpoint
from shardsurgeon.storage.local import LocalSource
from shardsurgeon.storage.open import address_of, hub_name
from shardsurgeon.storage.source import MemorySource
from tests.support import tiny

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def placed(folder: Path) -> LocalSource:
    folder.mkdir(parents=True)
    for name, data in tiny.files().items():
        (folder / name).write_bytes(data)
    return LocalSource(folder)


class Remote(MemorySource):
    """Stands for a repository of the Hub."""

    def __init__(self, files: Mapping[str, bytes], *, remote: bool = False) -> None:
        super().__init__(files, remote=remote)
        self.location = f"hf://org/Tiny-1.5@{COMMIT[:12]}"
        self.revision = COMMIT


def test_a_repository_has_its_full_name_and_commit() -> None:
    identity = identity_of(open_checkpoint(Remote(tiny.files())))
    assert (identity.name, identity.revision) == ("org/Tiny-1.5", COMMIT)


def test_what_to_type_names_the_place_and_the_whole_commit(tmp_path: Path) -> None:
    assert address_of(Remote(tiny.files(), remote=True)) == f"org/Tiny-1.5@{COMMIT}"
    source = placed(tmp_path / "models--org--Tiny-1.5" / "snapshots" / COMMIT)
    assert address_of(source) == source.location


def test_a_snapshot_in_the_cache_has_the_same_one(tmp_path: Path) -> None:
    source = placed(tmp_path / "models--org--Tiny-1.5" / "snapshots" / COMMIT)
    identity = identity_of(open_checkpoint(source))
    assert (identity.name, identity.revision) == ("org/Tiny-1.5", COMMIT)


@pytest.mark.parametrize("folder", ["Tiny", "models--Tiny/snapshots/abc", "models--a--b/Tiny"])
def test_any_other_folder_has_its_own_name_only(tmp_path: Path, folder: str) -> None:
    source = placed(tmp_path / folder)
    assert hub_name(source) is None
    assert identity_of(open_checkpoint(source)).name == "Tiny"
