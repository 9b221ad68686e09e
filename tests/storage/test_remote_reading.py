"""What opening and verifying read of a far source: what they need, and in few requests."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load

import shardsurgeon
from shardsurgeon.checkpoint.checkpoint import open_checkpoint
from shardsurgeon.errors import CheckpointError, HeaderError, NetworkError
from shardsurgeon.storage.source import MemorySource
from shardsurgeon.verification.byte_ranges import BLOCK_NBYTES, RangeComparer
from shardsurgeon.verification.verify import verify_checkpoint
from tests.support import tiny

FIRST, SECOND = (f"model-0000{n}-of-00002.safetensors" for n in (1, 2))


class Far(MemorySource):
    """Remembers what was asked of it."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        super().__init__(files, remote=True)
        self.held = files
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


def built(folder: Path, files: Mapping[str, bytes]) -> tuple[Mapping[str, bytes], dict[str, bytes]]:
    """A model, and what is left of it with half of its experts."""
    model = folder / "model"
    model.mkdir()
    for name, data in files.items():
        (model / name).write_bytes(data)
    scores = folder / "scores.json"
    numbers = np.random.default_rng(5)
    scores.write_text(json.dumps({str(n): numbers.random(8).tolist() for n in (1, 2)}))
    out = folder / "out"
    shardsurgeon.apply(shardsurgeon.plan(model, scores, ratio=0.5), out)
    made = {p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    return files, made


def data_begin(shard: bytes) -> int:
    return 8 + int.from_bytes(shard[:8], "little")


def of_weights(source: Far) -> list[tuple[str, int, int]]:
    """The requests for tensors' bytes."""
    return [
        (name, begin, end)
        for name, begin, end in source.asked
        if name.endswith(".safetensors") and begin >= data_begin(source.held[name])
    ]


def test_a_far_result_is_verified_by_one_request_for_neighbouring_tensors(tmp_path: Path) -> None:
    """Everything is far less than a batch: each shard of the result comes in one answer."""
    files, made = built(tmp_path, tiny.files())
    source, pruned = Far(files), Far(made)
    report = verify_checkpoint(open_checkpoint(source), pruned)
    assert report.holds, report.differences
    assert report.tensors_compared == report.tensors > 30
    whole = [(name, data_begin(made[name]), len(made[name])) for name in (FIRST, SECOND)]
    assert sorted(of_weights(pruned)) == whole
    # The source's pruned experts are small gaps here.
    assert len(of_weights(source)) == 2


def test_what_is_far_apart_is_not_fetched_with_its_neighbours(tmp_path: Path) -> None:
    large = {n: t for n, t in tiny.tensors().items() if ".experts." in n}
    weights = tiny.tensors() | {name: np.resize(large[name], (4, 10_000)) for name in large}
    files, made = built(tmp_path, tiny.files(weights=weights))
    source, pruned = Far(files), Far(made)
    assert verify_checkpoint(open_checkpoint(source), pruned).holds
    assert len(of_weights(pruned)) == 2
    read = sum(end - begin for _, begin, end in of_weights(source))
    kept = sum(end - begin for _, begin, end in of_weights(pruned))
    assert kept <= read < 1.1 * kept


@pytest.mark.parametrize("which", ["first", "last"])
def test_a_far_difference_is_found_and_the_tensors_behind_it_are_read(
    tmp_path: Path, which: str
) -> None:
    files, made = built(tmp_path, tiny.files())
    names = list(load(made[FIRST]))
    header = json.loads(made[FIRST][8 : data_begin(made[FIRST])])
    inside = sorted((header[name]["data_offsets"][0], name) for name in names)
    begin, name = inside[0 if which == "first" else -1]
    spoiled = bytearray(made[FIRST])
    spoiled[data_begin(made[FIRST]) + begin] ^= 1
    report = verify_checkpoint(open_checkpoint(Far(files)), Far({**made, FIRST: bytes(spoiled)}))
    (difference,) = report.differences
    assert difference.startswith(f"{FIRST} {name}: differs from")
    assert "first at byte 0 of" in difference


def test_a_far_side_file_is_compared_by_one_request(tmp_path: Path) -> None:
    files, made = built(tmp_path, {**tiny.files(), "vocab.txt": bytes(3 * BLOCK_NBYTES + 5)})
    pruned = Far(made)
    assert verify_checkpoint(open_checkpoint(Far(files)), pruned).holds
    asked = [one for one in pruned.asked if one[0] == "vocab.txt"]
    assert asked == [("vocab.txt", 0, 3 * BLOCK_NBYTES + 5)]
