"""Verification of a pruned model whose shards are uploaded and deleted one by one.

The headers come from the plan. Each shard's header and a sample of its bytes are compared before
it is deleted; the whole model is then verified by its headers and the files that remain.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from io import FileIO
from pathlib import Path

from shardsurgeon.checkpoint.anatomy import read_anatomy
from shardsurgeon.checkpoint.checkpoint import Checkpoint, open_checkpoint
from shardsurgeon.errors import SourceReadError
from shardsurgeon.storage.files import reading
from shardsurgeon.storage.source import Source, SourceFile
from shardsurgeon.verification.byte_comparison import Compared, Sampling, compare_bytes
from shardsurgeon.verification.findings import Findings
from shardsurgeon.verification.pairing import pair_tensors
from shardsurgeon.verification.record import read_keeps


@dataclass(frozen=True, slots=True)
class ShardHeader:
    """A shard without its data. header: its first bytes, length prefix included; nbytes: in all."""

    header: bytes
    nbytes: int


class HeadersOnlySource(Source):
    """A Source that has the headers of shards, and every other file from another source."""

    is_remote = False  # what can be read of it is on this machine

    def __init__(
        self,
        headers: Mapping[str, ShardHeader],
        rest: Source,
        location: str,
        present: Mapping[str, Path] | None = None,
    ) -> None:
        """rest: the source of all other files; location: the model's name in messages; present:
        the paths of shards that are on the disk.
        """
        self._headers = headers
        self._rest = rest
        self.location = location
        self.name = Path(location).name
        self._present = present or {}

    def with_shard(self, name: str, path: Path) -> HeadersOnlySource:
        """The same source with the data of one shard, which is at `path`."""
        return HeadersOnlySource(self._headers, self._rest, self.location, {name: path})

    def header(self, name: str) -> ShardHeader:
        """The header and the size of a shard."""
        return self._headers[name]

    def list(self) -> tuple[SourceFile, ...]:
        """The shards and every other file, sorted by name."""
        shards = [SourceFile(name, one.nbytes, "") for name, one in self._headers.items()]
        others = [file for file in self._rest.list() if file.name not in self._headers]
        return tuple(sorted([*shards, *others], key=lambda file: file.name))

    def read(self, name: str, begin: int, end: int) -> bytes:
        """Bytes of a header, or of another file; SourceReadError for a shard's data."""
        header = self._headers.get(name)
        if header is None:
            return self._rest.read(name, begin, end)
        if end > len(header.header):
            where = f"{self.location}/{name}"
            raise SourceReadError(where, f"its data is not here, byte {end:,} was asked for")
        return header.header[begin:end]

    def stream(self, name: str, begin: int, end: int) -> Iterator[bytes]:
        """The same bytes, in one piece."""
        yield self.read(name, begin, end)

    def local_path(self, name: str) -> Path | None:
        """The path of a shard that is on the disk, or of another file."""
        if name in self._headers:
            return self._present.get(name)
        return self._rest.local_path(name)

    def open(self, name: str) -> FileIO | None:
        """The same file, open; of the others the one that was listed."""
        return super().open(name) if name in self._headers else self._rest.open(name)


class ShardVerifier:
    """Verifies the shards of one pruned model. For one thread at a time."""

    def __init__(self, source: Checkpoint, pruned: HeadersOnlySource, sampling: Sampling) -> None:
        """pruned: the planned headers, and the metadata that says what was kept.

        Raises CheckpointError where that is not a model. Differences from the source are found
        when the shard is checked, or when the whole model is verified.
        """
        self._source = source
        self._headers_only = pruned
        self._pruned = open_checkpoint(pruned, source.family)
        self._sampling = sampling
        anatomy, ignored = read_anatomy(source), Findings()
        keeps = read_keeps(source, anatomy, self._pruned, ignored)
        pairing = keeps and pair_tensors(source, anatomy, self._pruned, keeps, ignored)
        self._pairs = pairing.pairs if pairing else {}
        self.compared = Compared(0, 0)

    def differences(self, name: str, path: Path) -> tuple[str, ...]:
        """What is wrong with a shard. name: in the model; path: on the disk.

        Raises SourceReadError where it or the source cannot be read.
        """
        findings = Findings()
        header = self._headers_only.header(name)
        with reading(path), path.open("rb") as file:
            begins = file.read(len(header.header))
            nbytes = file.seek(0, 2)
        if nbytes != header.nbytes:
            findings.add(name, f"has {nbytes:,} bytes, expected {header.nbytes:,}")
        elif begins != header.header:
            findings.add(name, "does not begin with the header that was planned")
        elif not self._pairs.get(name):
            findings.add(name, "holds no tensor that the source accounts for")
        else:
            self._compare(name, path, findings)
        return findings.lines()

    def _compare(self, name: str, path: Path, findings: Findings) -> None:
        present = replace(self._pruned, source=self._headers_only.with_shard(name, path))
        pairs = {name: self._pairs[name]}
        found = compare_bytes(self._source, present, pairs, self._sampling, 1, None, findings)
        so_far = self.compared
        self.compared = Compared(so_far.tensors + found.tensors, so_far.nbytes + found.nbytes)
