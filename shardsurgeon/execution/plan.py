"""The plan: for every output shard its tensors and the byte ranges to fetch. Plain frozen values.

A plan knows nothing about experts, and its execution decides nothing: it only moves bytes.

    Plan -> OutputShard -> Pieces -> Segment (source bytes) | Literal (its own bytes)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from shardsurgeon.storage.formats.tensor_table import Column, TensorTable
from shardsurgeon.storage.source import SourceFile


@dataclass(frozen=True, slots=True)
class Segment:
    """`nbytes` bytes of source file `file`, from absolute file offset `begin`."""

    file: str
    begin: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Literal:
    """Bytes that the plan itself holds: tensors whose values are expert counts or ids."""

    data: bytes = field(repr=False)

    @property
    def nbytes(self) -> int:
        """Number of bytes."""
        return len(self.data)


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """One tensor of an output shard.

    name, dtype (as in safetensors headers) and shape are those of the output; the pieces,
    joined in order, are its data.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Segment | Literal, ...]

    @property
    def nbytes(self) -> int:
        """Size of the tensor's data in bytes."""
        return sum(piece.nbytes for piece in self.pieces)


@dataclass(frozen=True, slots=True, eq=False)
class Pieces:
    """What the data of a shard is made of, in order, as columns. As a sequence it gives the pieces.

    files: the source files that bytes come from; file: of each piece, the place of its file in
    these, or -1 for a literal; begin: its offset there, or the literal's place in `literals`;
    nbytes: its size. No piece reaches over the end of a tensor.
    """

    files: tuple[str, ...]
    file: Column
    begin: Column
    nbytes: Column
    literals: tuple[bytes, ...] = ()

    @staticmethod
    def of(pieces: Iterable[Segment | Literal], files: Iterable[str] = ()) -> Pieces:
        """The columns of some pieces; files: those that come first in `files`."""
        numbers = {name: number for number, name in enumerate(files)}
        literals: list[bytes] = []
        rows = []
        for piece in pieces:
            if isinstance(piece, Literal):
                rows.append((-1, len(literals), piece.nbytes))
                literals.append(piece.data)
            else:
                number = numbers.setdefault(piece.file, len(numbers))
                rows.append((number, piece.begin, piece.nbytes))
        file, begin, nbytes = np.array(rows, np.int64).reshape(-1, 3).T
        return Pieces(tuple(numbers), file, begin, nbytes, tuple(literals))

    def __iter__(self) -> Iterator[Segment | Literal]:
        rows = zip(self.file.tolist(), self.begin.tolist(), self.nbytes.tolist(), strict=True)
        for file, begin, nbytes in rows:
            if file < 0:
                yield Literal(self.literals[begin])
            else:
                yield Segment(self.files[file], begin, nbytes)


@dataclass(frozen=True, slots=True, eq=False)
class OutputShard:
    """One output file: its header bytes (length prefix included) and then its tensors, in order.

    tensors: what the header says; pieces: what their data is made of.
    """

    file: str
    header: bytes = field(repr=False)
    tensors: TensorTable = field(repr=False)
    pieces: Pieces = field(repr=False)

    @property
    def nbytes(self) -> int:
        """Size of the whole file in bytes."""
        return len(self.header) + int(self.pieces.nbytes.sum())

    def rewritten(self) -> list[str]:
        """The names of the tensors that have bytes which are not the source's."""
        ends = np.cumsum(self.pieces.nbytes)[self.pieces.file < 0]
        places = np.unique(np.searchsorted(self.tensors.end, ends))
        return [self.tensors.name(place) for place in places.tolist()]


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything the executor needs.

    shards: the weight files to write.
    generated_files: small files whose whole content the plan holds (config.json, the index,
    metadata): (name, bytes), in the order of writing.
    copied_files: files of the source that are copied byte for byte, by name.
    score_files: (output name, absolute path, sha256 hex) of files from outside the source: the
    scores or the keep-list that the plan was made from, and an evaluation of it, with the digest
    of what was read.
    source_files: size and stamp of every source file the plan reads, as they were when it
    was planned.
    asked: what the user asked for, (name, value), to name a difference between two runs.
    source_fingerprint: sha256 hex of names, sizes, stamps and headers of the source.
    record: the generated file, JSON, to which the SHA-256 of the others are added when they are
    written (`formats.checksums`), "" for none; checksums: those of the shards too.
    manifest: (name, bytes) of files that stand for shards and are in no record, those of a view.
    """

    shards: tuple[OutputShard, ...]
    generated_files: tuple[tuple[str, bytes], ...] = field(repr=False)
    copied_files: tuple[str, ...]
    score_files: tuple[tuple[str, str, str], ...]
    source_files: tuple[SourceFile, ...]
    asked: tuple[tuple[str, str], ...]
    source_fingerprint: str
    record: str = ""
    checksums: bool = False
    manifest: tuple[tuple[str, bytes], ...] = field(default=(), repr=False)

    def digest(self) -> str:
        """sha256 hex of the result: every byte that is written here and where the others lie."""
        found = hashlib.sha256()
        # Another order of the shards writes the same files.
        for shard in sorted(self.shards, key=lambda shard: shard.file):
            made = shard.pieces
            files = (file.encode(errors="surrogateescape") for file in made.files)
            columns = (column.astype("<i8").tobytes() for column in (made.file, made.begin))
            parts = (*files, b"", *made.literals, *columns, made.nbytes.astype("<i8").tobytes())
            found.update(_joined(shard.file.encode(), shard.header, *parts))
        for name, data in (*self.generated_files, *self.manifest):
            found.update(_joined(name.encode(), data))
        scores = [(name, sha256) for name, _, sha256 in self.score_files]
        beside = [self.copied_files, scores, self.record, self.checksums]
        found.update(json.dumps(beside).encode())
        return found.hexdigest()


def _joined(*parts: bytes) -> bytes:
    """Parts behind their lengths, so that no two sequences give the same bytes."""
    return b"".join(len(part).to_bytes(8, "little") + part for part in parts)
