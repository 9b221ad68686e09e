"""Output shards before their number, and so their names, are known.

A draft is what is left of a source shard, or of several, as columns. It becomes an output shard
once its tensors have their order: `layout` puts them where they can share the source's bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain

import numpy as np

from shardsurgeon.checkpoint.shards import Shard
from shardsurgeon.execution.plan import Literal, OutputShard, OutputTensor, Pieces, Segment
from shardsurgeon.pruning.layout import Layout, lay_out, shared_nbytes
from shardsurgeon.storage.formats.safetensors import DTYPE_BITS, build_header
from shardsurgeon.storage.formats.tensor_table import Column, Series, TensorTable, split_name
from shardsurgeon.storage.source import Source
from shardsurgeon.units import BLOCK_NBYTES

# Of what could be shared with the source: a draft with less is joined with its neighbour.
_WELL_SHARED = 0.95


@dataclass(frozen=True, eq=False)
class Draft:
    """Tensors for one output shard, in source order.

    table: as they will be called and shaped; begin: where in its file each one's bytes begin; file:
    the place of that file in `files`; odd: place → pieces of those that are not one piece of the
    source. metadata: `__metadata__`; whole: the source shard, where nothing of it is lost and
    nothing renamed; most: bytes of data of the largest source shard behind it.
    """

    table: TensorTable
    files: tuple[str, ...]
    file: Column
    begin: Column
    odd: Mapping[int, tuple[Segment | Literal, ...]]
    metadata: dict[str, str] | None
    whole: Shard | None
    most: int

    @staticmethod
    def of(
        shard: Shard,
        kept: TensorTable,
        number: Column,
        changed: Mapping[int, OutputTensor],
        places: Column,
    ) -> Draft:
        """What is left of a source shard: its tensors `kept`, with new numbers in their names.

        changed: tensors that are not copies, by their places in the whole shard; places: those of
        the tensors kept.
        """
        header = shard.header
        series = list(kept.series)
        code = kept.code.copy()
        begin = header.data_begin + kept.begin
        number = number.copy()
        odd = {}
        for place, tensor in changed.items():
            at = int(np.searchsorted(places, place))
            head, which, tail = split_name(tensor.name)
            series.append(Series(head, tail, tensor.dtype, tensor.shape, tensor.nbytes))
            code[at], number[at] = len(series) - 1, which
            odd[at] = tensor.pieces
        table = TensorTable(tuple(series), code, number, kept.begin)
        nbytes = shard.nbytes - header.data_begin
        is_whole = not odd and int(kept.nbytes.sum()) == nbytes
        return Draft(
            table,
            (shard.file,),
            np.zeros(len(table), np.int64),
            begin,
            odd,
            header.metadata,
            shard if is_whole and np.array_equal(number, kept.number) else None,
            nbytes,
        )

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, places: slice) -> Draft:
        """The tensors from one place to another."""
        first, last, _ = places.indices(len(self))
        if (first, last) == (0, len(self)):
            return self
        return replace(
            self,
            table=self.table.select(np.arange(first, last)),
            file=self.file[places],
            begin=self.begin[places],
            odd={at - first: pieces for at, pieces in self.odd.items() if first <= at < last},
            whole=None,
        )

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data."""
        return int(self.table.nbytes.sum())

    @cached_property
    def _places(self) -> tuple[Column, Column]:
        """(phase, gain) of each tensor, as `lay_out` takes them."""
        phase = self.begin % BLOCK_NBYTES
        gain = _whole_blocks(phase, self.table.nbytes)
        for place, pieces in self.odd.items():
            phase[place], gain[place] = _shared_of_pieces(pieces)
        aligned = np.where(phase >= 0, phase, 0) % self._width == 0
        usable = (gain > 0) & aligned
        return np.where(usable, phase, -1), np.where(usable, gain, 0)

    @cached_property
    def _width(self) -> Column:
        return self.table.by_series(
            [max(DTYPE_BITS[each.dtype] // 8, 1) for each in self.table.series]
        )

    @cached_property
    def layout(self) -> Layout:
        """The order of its tensors."""
        if self.whole is not None:
            return Layout(np.arange(len(self)), self.whole.header.data_begin % BLOCK_NBYTES)
        return lay_out(self.table.nbytes, self._width, *self._places)

    @cached_property
    def shared(self) -> int:
        """Bytes that can be shared with the source."""
        made = self.layout
        return shared_nbytes(made.order, made.start, self.table.nbytes, *self._places)

    @property
    def is_well_shared(self) -> bool:
        """Whether nearly all is shared that could be."""
        return self.shared >= _WELL_SHARED * int(self._places[1].sum())

    def may_take_in(self, other: Draft) -> bool:
        """Whether the next one may be joined with it: one of them is not well shared, and neither
        is a file of the source."""
        if self.whole is not None or other.whole is not None:
            return False
        return not (self.is_well_shared and other.is_well_shared)

    def finished(self, source: Source, file: str) -> OutputShard:
        """The output shard of that name."""
        order = self.layout.order
        table = self.table.select(order)
        table = replace(table, begin=np.cumsum(table.nbytes) - table.nbytes)
        if self.whole is not None:
            # Its own header, however it is spelled: the result is the source's file.
            header = source.read(self.whole.file, 0, self.whole.header.data_begin)
        else:
            header = build_header(table, self.metadata, self.layout.start)
        return OutputShard(file, header, table, self._pieces(order))

    def _pieces(self, order: Column) -> Pieces:
        """What the data is made of in an order: a piece of the source for each tensor, or its own
        pieces."""
        file, begin, nbytes = self.file[order], self.begin[order], self.table.nbytes[order]
        is_odd = np.isin(order, list(self.odd))
        odd = [self.odd[place] for place in order[is_odd].tolist()]
        many = np.ones(len(order), np.int64)
        many[is_odd] = [len(pieces) for pieces in odd]
        own = Pieces.of(chain.from_iterable(odd), self.files)
        slots = np.repeat(is_odd, many)
        file, begin, nbytes = (np.repeat(column, many) for column in (file, begin, nbytes))
        file[slots], begin[slots], nbytes[slots] = own.file, own.begin, own.nbytes
        return Pieces(self.files, file, begin, nbytes, own.literals)


def _whole_blocks(at: Column, nbytes: Column) -> Column:
    """Bytes of the whole blocks in stretches of a file that begin `at` there."""
    first = -(-at // BLOCK_NBYTES)
    return np.asarray(np.maximum((at + nbytes) // BLOCK_NBYTES - first, 0) * BLOCK_NBYTES)


def _shared_of_pieces(pieces: Sequence[Segment | Literal]) -> tuple[int, int]:
    """(phase, gain) of a tensor of several pieces: the phase at which most of them agree with the
    source; (-1, 0) where none is the source's."""
    made = Pieces.of(pieces)
    at = np.cumsum(made.nbytes) - made.nbytes
    at, begin, nbytes = (column[made.file >= 0] for column in (at, made.begin, made.nbytes))
    phases, which = np.unique((begin - at) % BLOCK_NBYTES, return_inverse=True)
    if not len(phases):
        return -1, 0
    gains = np.bincount(which, _whole_blocks(phases[which] + at, nbytes))
    best = int(gains.argmax())
    return int(phases[best]), int(gains[best])


def joined(drafts: Sequence[Draft]) -> Draft:
    """Several drafts as one. Of `__metadata__`, which shards of one model have alike, the first
    one's entries hold."""
    if len(drafts) == 1:
        return drafts[0]
    series = [each for draft in drafts for each in draft.table.series]
    before = np.cumsum([0, *(len(draft.table.series) for draft in drafts)])
    files = tuple(dict.fromkeys(file for draft in drafts for file in draft.files))
    code, number, file, begin = [], [], [], []
    odd: dict[int, tuple[Segment | Literal, ...]] = {}
    metadata: dict[str, str] | None = None
    done = 0
    for draft, first in zip(drafts, before, strict=False):
        code.append(draft.table.code + first)
        number.append(draft.table.number)
        file.append(np.array([files.index(name) for name in draft.files], np.int64)[draft.file])
        begin.append(draft.begin)
        odd |= {done + at: pieces for at, pieces in draft.odd.items()}
        done += len(draft)
        if draft.metadata is not None:
            metadata = {**draft.metadata, **(metadata or {})}
    columns = map(np.concatenate, (code, number, begin))
    return Draft(
        TensorTable(tuple(series), *columns),
        files,
        np.concatenate(file),
        np.concatenate(begin),
        odd,
        metadata,
        None,
        max(draft.most for draft in drafts),
    )


def repacked(drafts: Sequence[Draft], limit: int) -> list[Draft]:
    """Filled in source order up to `limit` bytes of tensor data each; a larger tensor gets a shard
    of its own."""
    cut: list[Draft] = []
    parts: list[Draft] = []
    filled = 0
    for draft in drafts:
        first = 0
        for place, nbytes in enumerate(draft.table.nbytes.tolist()):
            if (parts or place > first) and filled + nbytes > limit:
                cut.append(joined([*parts, *([draft[first:place]] if place > first else [])]))
                parts, first, filled = [], place, 0
            filled += nbytes
        parts.append(draft[first:])
    return [*cut, joined(parts)] if parts else cut


def merged(drafts: Sequence[Draft]) -> list[Draft]:
    """Those of which too little could be shared joined with their neighbours, where that helps.

    What moves tensors to where they can be shared are small tensors, and little of a shard has few
    of them. None gets larger than the largest of the source's shards, and those that nothing is
    taken from stay as they are.
    """
    most = max((draft.most for draft in drafts), default=0)
    found: list[Draft] = []
    for draft in drafts:
        last = found[-1] if found else None
        if last is not None and last.nbytes + draft.nbytes <= most and last.may_take_in(draft):
            both = joined([last, draft])
            if both.is_well_shared or both.shared > last.shared + draft.shared:
                found[-1] = both
                continue
        found.append(draft)
    return found
