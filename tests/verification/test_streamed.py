"""Shards verified one by one, and a model of which only headers and small files are left."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from shardsurgeon.checkpoint.checkpoint import open_checkpoint
from shardsurgeon.checkpoint.provenance import PROVENANCE_NAME
from shardsurgeon.errors import SourceReadError, VerificationError
from shardsurgeon.operations import api
from shardsurgeon.operations.prune import Pruning
from shardsurgeon.operations.verify import FAR_SHARE, SelfCheck, headers_only
from shardsurgeon.storage.local import LocalSource
from shardsurgeon.storage.source import MemorySource, SourceFile
from shardsurgeon.verification.byte_comparison import Sampling
from shardsurgeon.verification.streamed import ShardVerifier
from shardsurgeon.verification.verify import verify_checkpoint
from tests.support import tiny

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


class FarSource(MemorySource):
    """Memory that counts what is asked of it, and stamps files as a Hub does."""

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(files, "tiny", remote=True)
        self.read_nbytes = 0

    def list(self) -> tuple[SourceFile, ...]:
        return tuple(
            replace(file, stamp=self._git(file)) if file.name.endswith(".json") else file
            for file in super().list()
        )

    def _git(self, file: SourceFile) -> str:
        data = self._files[file.name]
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    def read(self, name: str, begin: int, end: int) -> bytes:
        self.read_nbytes += end - begin
        return super().read(name, begin, end)


@pytest.fixture(scope="module")
def prune(tmp_path_factory: pytest.TempPathFactory) -> tuple[Pruning, Path]:
    """A pruned model of a source in memory, and its folder. Tests do not change it."""
    folder = tmp_path_factory.mktemp("prune")
    scores = {
        layer: [(expert + layer) % tiny.EXPERTS + 0.5 for expert in range(tiny.EXPERTS)]
        for layer in (1, 2, 3)
    }
    (folder / "scores.json").write_text(json.dumps({"scores": scores}))
    checkpoint = open_checkpoint(MemorySource(tiny.files(), "tiny"))
    plan = api.plan(checkpoint, folder / "scores.json", keep=4, out=folder / "out")
    api.apply(plan)
    return plan, folder / "out"


@pytest.fixture
def spoilt(prune: tuple[Pruning, Path], tmp_path: Path) -> tuple[Pruning, Path]:
    """The same, a shard copied to be spoilt."""
    pruning, out = prune
    path = tmp_path / SHARDS[0]
    path.write_bytes((out / SHARDS[0]).read_bytes())
    return pruning, path


def proof(pruning: Pruning) -> ShardVerifier:
    documents = MemorySource(dict(pruning.plan.generated_files))
    planned = headers_only(pruning.plan, documents, pruning.out)
    return ShardVerifier(pruning.checkpoint, planned, Sampling())


def test_right_shards_hold_and_all_their_bytes_are_compared(prune: tuple[Pruning, Path]) -> None:
    pruning, out = prune
    one_by_one = proof(pruning)
    for name in SHARDS:
        assert one_by_one.differences(name, out / name) == ()
    size = sum(tensor.nbytes for shard in pruning.plan.shards for tensor in shard.tensors)
    assert one_by_one.compared.nbytes == size


def _header_changed(data: bytearray) -> None:
    data[20] ^= 1


def _bytes_changed(data: bytearray) -> None:
    for place in range(8 + int.from_bytes(data[:8], "little"), len(data)):
        data[place] ^= 1


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (_bytes_changed, "differs from"),
        (_header_changed, "does not begin with the header"),
        (lambda data: data.pop(), "bytes, expected"),
        (lambda data: data.append(0), "bytes, expected"),
        (lambda data: data.clear(), "has 0 bytes"),
    ],
)
def test_a_wrong_shard_is_named(
    spoilt: tuple[Pruning, Path], spoil: Callable[[bytearray], object], told: str
) -> None:
    pruning, path = spoilt
    data = bytearray(path.read_bytes())
    spoil(data)
    path.write_bytes(data)
    found = proof(pruning).differences(SHARDS[0], path)
    assert found[0].startswith(SHARDS[0]) and told in found[0]
    with pytest.raises(VerificationError, match=told):
        SelfCheck(pruning.checkpoint, pruning.plan, pruning.out, by_shard=True).shard(
            SHARDS[0], path
        )


def test_the_other_shard_in_its_place_is_found(prune: tuple[Pruning, Path]) -> None:
    pruning, out = prune
    assert proof(pruning).differences(SHARDS[0], out / SHARDS[1])


def test_the_whole_holds_without_its_shards(prune: tuple[Pruning, Path], tmp_path: Path) -> None:
    pruning, out = prune
    for path in out.rglob("*"):
        if path.is_file() and path.name not in SHARDS:
            copy = tmp_path / path.relative_to(out)
            copy.parent.mkdir(exist_ok=True)
            copy.write_bytes(path.read_bytes())
    check = SelfCheck(pruning.checkpoint, pruning.plan, pruning.out, by_shard=True)
    for name in SHARDS:
        check.shard(name, out / name)
    check.rest(tmp_path)
    assert check.report is not None and check.report.holds
    assert check.report.pruned == str(pruning.out)
    assert check.report.tensors_compared > 0
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(VerificationError, match=r"tokenizer\.json: is missing"):
        check.rest(tmp_path)


def test_data_that_is_not_here_is_refused_and_not_invented(prune: tuple[Pruning, Path]) -> None:
    pruning, out = prune
    headers = headers_only(pruning.plan, LocalSource(out), pruning.out)
    header = pruning.plan.shards[0].header
    assert headers.read(SHARDS[0], 0, len(header)) == header
    with pytest.raises(SourceReadError, match="its data is not here"):
        headers.read(SHARDS[0], 0, len(header) + 1)
    assert headers.local_path(SHARDS[0]) is None
    assert headers.with_shard(SHARDS[0], out / SHARDS[0]).local_path(SHARDS[0]) is not None
    assert [file.name for file in headers.list()] == [file.name for file in LocalSource(out).list()]


def test_of_a_far_source_no_more_is_read_again_than_a_share(
    prune: tuple[Pruning, Path],
) -> None:
    pruning, out = prune
    source = FarSource(tiny.files())
    far = replace(pruning.checkpoint, source=source, files=source.list())
    check = SelfCheck(far, pruning.plan, pruning.out, by_shard=True)
    check.whole(out)
    kept = sum(shard.nbytes for shard in pruning.plan.shards)
    # Of this little, the least that a request is worth.
    assert source.read_nbytes <= max(FAR_SHARE * kept, 512 * 8 * len(SHARDS))
    # Side files were believed by their digests.
    assert check.report is not None and check.report.holds


@pytest.mark.parametrize("name", ["tokenizer.json", "notes.txt"])
def test_a_side_file_that_differs_from_a_far_one_is_found(
    prune: tuple[Pruning, Path], tmp_path: Path, name: str
) -> None:
    pruning, out = prune
    source = FarSource({**tiny.files(), name: b"AB"})
    far = replace(pruning.checkpoint, source=source, files=source.list())
    documents = {file.name: (out / file.name).read_bytes() for file in LocalSource(out).list()}
    # Made of other files than these, by its own account.
    record = json.loads(documents[PROVENANCE_NAME])
    del record["sha256"]
    documents[PROVENANCE_NAME] = json.dumps(record).encode()
    for content, holds in ((b"AB", True), (b"AC", False)):
        found = verify_checkpoint(far, MemorySource({**documents, name: content}), sample=0)
        assert found.holds is holds, found.differences
