"""What verification reads: of a source behind a network, and of a sample."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import pytest
from safetensors.numpy import load_file

from shardsurgeon.checkpoint.checkpoint import open_checkpoint
from shardsurgeon.storage.source import MemorySource, SourceFile
from shardsurgeon.verification import byte_comparison, byte_ranges
from shardsurgeon.verification.verify import verify_checkpoint
from tests.support.handmade import ALL, DEEPSEEK, record, write

KEEPS = {1: (0, 1, 4, 5), 2: (1, 3, 6, 7), 3: (0, 2, 5, 6)}


class Counting(MemorySource):
    """Counts how often, and how much, is streamed of every file."""

    def __init__(
        self,
        folder: Path,
        more: Mapping[str, bytes] = MappingProxyType({}),
        stamps: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """more: files beside those of the folder; stamps: name → what a Hub would say."""
        files = {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in folder.rglob("*")
            if path.is_file()
        }
        super().__init__({**files, **more}, "far", remote=True)
        self._stamps = stamps
        self.streams: Counter[str] = Counter()
        self.nbytes: Counter[str] = Counter()

    def list(self) -> tuple[SourceFile, ...]:
        return tuple(
            replace(file, stamp=self._stamps.get(file.name, file.stamp)) for file in super().list()
        )

    def stream(self, name: str, begin: int, end: int) -> Iterator[bytes]:
        self.streams[name] += 1
        for piece in super().stream(name, begin, end):
            self.nbytes[name] += len(piece)
            yield piece


@pytest.fixture
def far(tmp_path: Path) -> tuple[Counting, Path]:
    """(source, its prune), made by hand."""
    everyone = dict.fromkeys((1, 2, 3), ALL)
    source = write(tmp_path / "source", DEEPSEEK, everyone)
    out = record(write(tmp_path / "out", DEEPSEEK, KEEPS), KEEPS, [(source, 8, 4)])
    return Counting(source), out


def test_what_lies_close_together_is_one_request(far: tuple[Counting, Path]) -> None:
    source, out = far
    opened = open_checkpoint(source)
    source.streams.clear()
    assert verify_checkpoint(opened, out, workers=1).holds
    shards = {name: n for name, n in source.streams.items() if name.endswith(".safetensors")}
    assert list(shards.values()) == [1, 1]


def test_what_lies_far_apart_is_asked_for_by_itself(
    far: tuple[Counting, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = far
    for module in ("byte_ranges", "byte_comparison"):
        monkeypatch.setattr(f"shardsurgeon.verification.{module}.GAP_NBYTES", 0)
    opened = open_checkpoint(source)
    source.streams.clear()
    source.nbytes.clear()
    report = verify_checkpoint(opened, out, workers=1)
    assert report.holds
    shards = {name for name in source.streams if name.endswith(".safetensors")}
    assert sum(source.streams[name] for name in shards) > 2
    assert sum(source.nbytes[name] for name in shards) == report.bytes_compared


@pytest.mark.parametrize("block", [3, 7, 64])
def test_tensors_longer_than_a_block_are_compared_to_their_end(
    far: tuple[Counting, Path], monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    source, out = far
    monkeypatch.setattr(byte_ranges, "BLOCK_NBYTES", block)
    monkeypatch.setattr(byte_ranges, "_AHEAD_NBYTES", block)
    opened = open_checkpoint(source)
    assert verify_checkpoint(opened, out, workers=1).holds
    shard = out / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + bytes([shard.read_bytes()[-1] ^ 1]))
    (line,) = verify_checkpoint(opened, out, workers=1).differences
    assert "differs from" in line


def test_a_sample_of_bytes_tells_how_much_it_will_compare(far: tuple[Counting, Path]) -> None:
    source, out = far
    told: list[tuple[int, int]] = []
    options = {"workers": 1, "sample_nbytes": 16}
    report = verify_checkpoint(
        open_checkpoint(source), out, on_progress=lambda *each: told.append(each), **options
    )
    shards = [load_file(path) for path in out.glob("*.safetensors")]
    sizes = [tensor.nbytes for shard in shards for tensor in shard.values()]
    assert {total for _, total in told} == {sum(min(size, 16) for size in sizes)}
    assert report.holds and report.bytes_compared < sum(sizes)
    done = [each for each, _ in told]
    assert done == sorted(done) and done[0] < done[-1] == report.bytes_compared


def test_a_sample_is_as_many_blocks_as_its_bytes_allow(
    far: tuple[Counting, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(byte_comparison, "BLOCK_NBYTES", 16)
    source, out = far
    report = verify_checkpoint(open_checkpoint(source), out, workers=1, sample_nbytes=64)
    shards = [load_file(path) for path in out.glob("*.safetensors")]
    sizes = [tensor.nbytes for shard in shards for tensor in shard.values()]
    assert report.holds and report.bytes_compared == sum(min(size, 64) for size in sizes)


@pytest.mark.parametrize("at", [0, 191])
def test_any_byte_of_a_tensor_may_be_in_a_sample(far: tuple[Counting, Path], at: int) -> None:
    source, out = far
    name, shard = "model.embed_tokens.weight", out / "model-00001-of-00002.safetensors"
    data = bytearray(shard.read_bytes())
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])[name]["data_offsets"]
    assert header[1] - header[0] == 192
    data[8 + length + header[0] + at] ^= 1
    shard.write_bytes(data)
    opened = open_checkpoint(source)
    found = [
        verify_checkpoint(opened, out, workers=1, sample_nbytes=96, seed=seed).differences
        for seed in range(12)
    ]
    # Half of it is compared.
    assert () in found
    assert any(f"{name}: differs" in line for lines in found for line in lines)


def test_a_file_is_compared_with_one_name_after_the_other(
    far: tuple[Counting, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("BLOCK_NBYTES", "_AHEAD_NBYTES"):
        monkeypatch.setattr(byte_ranges, name, 16)
    source, out = far
    scores = bytes(range(40))
    stamps = {"scores.pt": "no digest"}
    source = Counting(out.with_name("source"), {"scores.pt": scores}, stamps)
    # The first of them differs in its first block: the second is begun with that one at hand.
    first, second = (out / "calibration" / name for name in ("scores-2.pt", "scores.pt"))
    first.write_bytes(b"x" + scores[1:])
    second.write_bytes(scores)
    assert verify_checkpoint(open_checkpoint(source), out).differences == ()
    second.write_bytes(scores[:-1] + b"x")
    found = verify_checkpoint(open_checkpoint(source), out).differences
    assert found == ("scores.pt: is missing",)


def test_side_files_with_a_digest_are_not_read_a_second_time(far: tuple[Counting, Path]) -> None:
    source, out = far
    digests = {
        "tokenizer.json": hashlib.sha1(b"blob 2\0{}").hexdigest(),
        "remote/code.py": hashlib.sha256(b"# remote code\n").hexdigest(),
    }
    source = Counting(out.with_name("source"), stamps=digests)
    opened = open_checkpoint(source)
    source.streams.clear()
    assert verify_checkpoint(opened, out).holds
    assert not source.streams.keys() & digests.keys()
    (out / "tokenizer.json").write_text("[]")
    (out / "remote" / "code.py").write_text("# other codes\n")
    found = verify_checkpoint(opened, out).differences
    assert sorted(found) == [
        f"{name}: is not the source's, byte for byte" for name in sorted(digests)
    ]
