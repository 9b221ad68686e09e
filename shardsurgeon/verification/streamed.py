"""A pruned model whose shards leave the disk one by one, checked all the same.

The headers come from the plan and are compared with each shard before it leaves, together with a
sample of its bytes; the whole is then judged by its headers and the files that are here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
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
    """Shards as their headers, every other file as another source has it."""

    is_remote = False  # what can be read of it is on this machine

    def __init__(
        self,
        headers: Mapping[str, ShardHeader],
        rest: Source,
        location: str,
        present: Mapping[str, Path] | None = None,
    ) -> None:
        """rest: the other files; location: what messages call the model; present: shards that are
        on the disk, and where.
        """
        self._headers = headers
        self._rest = rest
        self.location = location
        self.name = Path(location).name
        self._present = present or {}

    def with_shard(self, name: str, path: Path) -> HeadersOnlySource:
        """The same, with one shard at hand."""
        return HeadersOnlySource(self._headers, self._rest, self.location, {name: path})

    def header(self, name: str) -> ShardHeader:
        """What is known of a shard."""
        return self._headers[name]

    def list(self) -> tuple[SourceFile, ...]:
        """The shards and every other file, sorted by name."""
        shards = [SourceFile(name, one.nbytes, "") for name, one in self._headers.items()]
        others = [file for file in self._rest.list() if file.name not in self._headers]
        return tuple(sorted([*shards, *others], key=lambda file: file.name))

    def read(self, name: str, begin: int, end: int) -> bytes:
        """Bytes of a header, or of another file; SourceReadError for a shard's data."""
        heading = self._headers.get(name)
        if heading is None:
            return self._rest.read(name, begin, end)
        if end > len(heading.header):
            where = f"{self.location}/{name}"
            raise SourceReadError(where, f"its data is not here, byte {end:,} was asked for")
        return heading.header[begin:end]

    def stream(self, name: str, begin: int, end: int) -> Iterator[bytes]:
        """The same bytes, in one piece."""
        yield self.read(name, begin, end)

    def local_path(self, name: str) -> Path | None:
        """The path of a shard at hand, or of another file."""
        if name in self._headers:
            return self._present.get(name)
        return self._rest.local_path(name)


class ShardVerifier:
    """Proves the shards of one pruned model. For one thread at a time."""

    def __init__(self, source: Checkpoint, pruned: HeadersOnlySource, sampling: Sampling) -> None:
        """pruned: what every shard is to look like, and the metadata that says what was kept.

        Raises CheckpointError where that is no model. What does not fit the source is found
        when the shard concerned is checked, or by the proof of the whole.
        """
        self._source = source
        self._headers_only = pruned
        self._pruned = open_checkpoint(pruned)
        self._sampling = sampling
        anatomy, ignored = read_anatomy(source), Findings()
        keeps = read_keeps(source, anatomy, self._pruned, ignored)
        pairing = keeps and pair_tensors(source, anatomy, self._pruned, keeps, ignored)
        self._pairs = pairing.pairs if pairing else {}
        self.compared = Compared(0, 0)

    def differences(self, name: str, path: Path) -> tuple[str, ...]:
        """What is wrong with a shard, its name in the model and its place on the disk given.

        Raises SourceReadError where it or the source cannot be read.
        """
        findings = Findings()
        heading = self._headers_only.header(name)
        with reading(path), path.open("rb") as file:
            begins = file.read(len(heading.header))
            nbytes = file.seek(0, 2)
        if nbytes != heading.nbytes:
            findings.add(name, f"has {nbytes:,} bytes, expected {heading.nbytes:,}")
        elif begins != heading.header:
            findings.add(name, "does not begin with the header that was planned")
        elif not self._pairs.get(name):
            findings.add(name, "holds no tensor that the source accounts for")
        else:
            self._compare(name, path, findings)
        return findings.lines()

    def _compare(self, name: str, path: Path, findings: Findings) -> None:
        at_hand = replace(self._pruned, source=self._headers_only.with_shard(name, path))
        pairs = {name: self._pairs[name]}
        found = compare_bytes(self._source, at_hand, pairs, self._sampling, 1, None, findings)
        so_far = self.compared
        self.compared = Compared(so_far.tensors + found.tensors, so_far.nbytes + found.nbytes)
