"""Output tensors beside the source tensors they must be made of, in columns.

There are as many pairs as tensors. A `Pair` is made of the columns when somebody looks at one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import overload

import numpy as np

from shardsurgeon.checkpoint.shards import Shard
from shardsurgeon.storage.formats.tensor_table import Column, TensorRecord


@dataclass(frozen=True, slots=True)
class Rows:
    """Which rows of its source tensor a sliced tensor consists of.

    blocks: how often the expert axis repeats; before: rows per block in the source; row_nbytes:
    size of a row; old_rows: the source's rows that are in the output, in order.
    """

    blocks: int
    before: int
    row_nbytes: int
    old_rows: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Count:
    """A tensor whose first element, `width` bytes, is the number of experts, now `kept`."""

    width: int
    kept: int


@dataclass(frozen=True, slots=True)
class Table:
    """A table whose values, rows of `row_length` integers of `width` bytes, are expert ids.

    retained: the layer's, as in RetainedIds.
    """

    width: int
    row_length: int
    retained: tuple[int, ...]


Cut = Rows | Count | Table


@dataclass(frozen=True, slots=True)
class Pair:
    """An output tensor and the source tensor it must be made of.

    shard, record: the output's; source_shard, source_record: the source's; cut: None where the
    bytes are the same from first to last.
    """

    shard: Shard
    record: TensorRecord
    source_shard: Shard
    source_record: TensorRecord
    cut: Cut | None

    @property
    def name(self) -> str:
        """The output tensor's name."""
        return self.record.name

    @property
    def nbytes(self) -> int:
        """Bytes of the output tensor."""
        return self.record.nbytes

    @property
    def file(self) -> str:
        """The output tensor's file."""
        return self.shard.file

    @property
    def begin(self) -> int:
        """Where in its file the output tensor begins."""
        return self.shard.header.data_begin + self.record.begin

    @property
    def source_name(self) -> str:
        """The source tensor's name."""
        return self.source_record.name

    @property
    def source_file(self) -> str:
        """The source tensor's file."""
        return self.source_shard.file

    @property
    def source_begin(self) -> int:
        """Where in its file the source tensor begins."""
        return self.source_shard.header.data_begin + self.source_record.begin

    def stretches(self) -> Iterator[tuple[int, int, int]]:
        """(source offset, output offset, bytes), relative to the tensors, that must be equal."""
        if isinstance(self.cut, Count):
            yield self.cut.width, self.cut.width, self.nbytes - self.cut.width
        elif isinstance(self.cut, Rows):
            yield from _row_stretches(self.cut)
        elif isinstance(self.cut, Table):
            return  # compared by what its values mean
        else:
            yield 0, 0, self.nbytes


@dataclass(frozen=True, eq=False)
class ShardPairs(Sequence[Pair]):
    """The pairs of one output shard, in the order of the file. As a sequence it gives them.

    shard: the output's; sources: all shards of the source; place: of each pair the output tensor,
    counted in its shard; home, source_place: the source tensor's shard, counted in `sources`, and
    the tensor, counted in that shard; cuts: place → cut of the tensors that have one.
    """

    shard: Shard
    sources: tuple[Shard, ...]
    place: Column
    home: Column
    source_place: Column
    cuts: Mapping[int, Cut]

    @property
    def nbytes(self) -> Column:
        """Bytes of each output tensor."""
        return self.shard.header.tensors.nbytes[self.place]

    def cut(self) -> Iterator[Pair]:
        """The pairs that have a cut."""
        places = sorted(self.cuts)
        yield from (self[number] for number in np.searchsorted(self.place, places).tolist())

    def __len__(self) -> int:
        return len(self.place)

    @overload
    def __getitem__(self, number: int) -> Pair: ...

    @overload
    def __getitem__(self, number: slice) -> Sequence[Pair]: ...

    def __getitem__(self, number: int | slice) -> Pair | Sequence[Pair]:
        if isinstance(number, slice):
            return [self[each] for each in range(*number.indices(len(self)))]
        place, source = int(self.place[number]), self.sources[self.home[number]]
        return Pair(
            self.shard,
            self.shard.header.tensors[place],
            source,
            source.header.tensors[int(self.source_place[number])],
            self.cuts.get(place),
        )


def _row_stretches(rows: Rows) -> Iterator[tuple[int, int, int]]:
    """Rows that follow each other in the source are compared as one stretch."""
    for block in range(rows.blocks):
        numbered = enumerate(rows.old_rows)
        for shift, run in groupby(numbered, key=lambda row: row[1] - row[0]):
            members = list(run)
            new_row = block * len(rows.old_rows) + members[0][0]
            old_row = block * rows.before + members[0][0] + shift
            yield (
                old_row * rows.row_nbytes,
                new_row * rows.row_nbytes,
                len(members) * rows.row_nbytes,
            )
