"""What is free, and what is read ahead."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from shardsurgeon.checkpoint.checkpoint import open_checkpoint
from shardsurgeon.layerwise import memory
from shardsurgeon.layerwise.devices import Device
from shardsurgeon.layerwise.tensors import TensorReader
from tests.layerwise.chats import FIXTURES


def limited(folder: Path, files: dict[str, object]) -> Path:
    """A folder with the files of control groups."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"{content}\n")
    return folder


@pytest.mark.parametrize(
    "files",
    [
        {
            "memory.max": 9000,
            "memory.current": 7000,
            "memory.stat": "anon 6000\ninactive_file 500",
        },
        {
            "memory/memory.limit_in_bytes": 9000,
            "memory/memory.usage_in_bytes": 7000,
            "memory/memory.stat": "inactive_file 1\ntotal_inactive_file 500",
        },
    ],
)
def test_the_limit_of_a_container_counts_and_its_file_cache_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, object]
) -> None:
    folder = limited(tmp_path, files)
    monkeypatch.setattr(memory, "Path", lambda name: folder)
    assert memory.free_memory("cpu") == 2500


def test_without_a_limit_what_the_system_has_available_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = limited(tmp_path, {"memory.max": "max", "memory.current": 1})
    monkeypatch.setattr(memory, "Path", lambda name: folder)
    assert memory.free_memory("cpu") > 1_000_000


@pytest.fixture
def advised(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(offset, bytes) of each advice to the system."""
    given: list[tuple[int, int]] = []

    def advise(file: int, begin: int, nbytes: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_WILLNEED
        given.append((begin, nbytes))

    monkeypatch.setattr(os, "posix_fadvise", advise)
    return given


@pytest.mark.skipif(sys.platform != "linux", reason="tensors are read ahead on Linux only")
def test_every_byte_of_the_tensors_is_read_ahead_up_to_the_limit(
    advised: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shardsurgeon.layerwise.tensors._ADVICE_NBYTES", 100)
    checkpoint = open_checkpoint(FIXTURES / "qwen3_moe")
    shard = checkpoint.shards[0]
    records = sorted(shard.header.tensors, key=lambda record: record.begin)[:2]
    names = [record.name for record in reversed(records)]
    reader, data = TensorReader(checkpoint, Device("cpu")), shard.header.data_begin
    reader.read_ahead(names, 1 << 30)
    covered = {byte for begin, nbytes in advised for byte in range(begin, begin + nbytes)}
    assert covered == set(range(data + records[0].begin, data + records[1].end))
    assert max(nbytes for _, nbytes in advised) <= 100
    advised.clear()
    reader.read_ahead(names, 150)
    assert sum(nbytes for _, nbytes in advised) == 150
