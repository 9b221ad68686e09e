"""What opening and verifying read of a far source: what they need, and in few requests."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from shardsurgeon.checkpoint.checkpoint import open_checkpoint
from shardsurgeon.errors import CheckpointError, HeaderError, NetworkError
from shardsurgeon.storage.source import MemorySource
from shardsurgeon.verification.byte_comparison import BLOCK_NBYTES, RangeComparer
from tests.support import tiny

FIRST, SECOND = (f"model-0000{n}-of-00002.safetensors" for n in (1, 2))


class Far(MemorySource):
    """Remembers what was asked of it."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        super().__init__(files, remote=True)
        self.asked: list[tuple[str, int, int]] = []

    def read(self, name: str, begin: int, end: int) -> bytes:
        self.asked.append((name, begin, end))
        return super().read(name, begin, end)

    def stream(self, name: str, begin: int, end: int) -> Iterator[bytes]:
        self.asked.append((name, begin, end))
        # Pieces as a network brings them: of any size, and sometimes none.
        for at in range(begin, end, 300_007):
            yield b""
            yield super().read(name, at, min(at + 300_007, end))


def test_a_far_checkpoint_is_opened_by_its_headers_alone() -> None:
    files = tiny.files()
    source = Far(files)
    near = open_checkpoint(MemorySource(files, source.name))
    far = open_checkpoint(source)
    assert far.shards == near.shards
    lengths = {name: int.from_bytes(files[name][:8], "little") for name in (FIRST, SECOND)}
    of_shards = {one for one in source.asked if one[0] in lengths}
    assert of_shards == {
        part for name, n in lengths.items() for part in ((name, 0, 8), (name, 8, 8 + n))
    }


def test_a_broken_far_header_is_refused_as_a_near_one() -> None:
    files = {**tiny.files(), SECOND: b"\xff" * 8 + tiny.files()[SECOND][8:]}
    with pytest.raises(HeaderError, match=SECOND):
        open_checkpoint(Far(files))


def test_a_far_place_without_weights_says_so_before_its_config_is_missed() -> None:
    with pytest.raises(CheckpointError, match=r"no \.safetensors file, only \.gguf; name a model"):
        open_checkpoint(Far({"model.gguf": b"x", "README.md": b""}))


def test_one_failure_ends_the_waiting_of_the_other_headers() -> None:
    class Hanging(Far):
        def stream(self, name: str, begin: int, end: int) -> Iterator[bytes]:
            if name == SECOND:
                raise NetworkError(name, "gave up")
            while True:
                threading.Event().wait(0.01)
                yield b""

    with pytest.raises(NetworkError, match="gave up"):
        open_checkpoint(Hanging(tiny.files()))


def test_a_long_stretch_is_compared_by_one_request(tmp_path: Path) -> None:
    files = tiny.files()
    weights = bytes(range(256)) * (3 * BLOCK_NBYTES // 256) + b"the end"
    source = Far({**files, "extra.bin": weights})
    there = {**files, "extra.bin": weights}
    for name, data in there.items():
        (tmp_path / name).write_bytes(data)
    before, after = open_checkpoint(source), open_checkpoint(tmp_path)
    source.asked.clear()
    with RangeComparer(before, after) as sides:
        assert sides.same_file("extra.bin", "extra.bin", len(weights))
        assert source.asked == [("extra.bin", 0, len(weights))]
        steps = list(sides.steps("extra.bin", 5, "extra.bin", 5, 100))
        assert [(step.nbytes, step.differs) for step in steps] == [(100, None)]
        assert source.asked[1:] == [("extra.bin", 5, 105)]
        assert sides.expected("extra.bin", 1, 2 * BLOCK_NBYTES) == weights[1 : 2 * BLOCK_NBYTES + 1]


def test_a_difference_far_away_is_found(tmp_path: Path) -> None:
    files = tiny.files()
    weights = bytearray(3 * BLOCK_NBYTES)
    for name, data in {**files, "extra.bin": bytes(weights)}.items():
        (tmp_path / name).write_bytes(data)
    weights[2 * BLOCK_NBYTES + 17] = 1
    before = open_checkpoint(Far({**files, "extra.bin": bytes(weights)}))
    with RangeComparer(before, open_checkpoint(tmp_path)) as sides:
        steps = list(sides.steps("extra.bin", 0, "extra.bin", 0, len(weights)))
    assert [step.differs for step in steps] == [None, None, 17]
