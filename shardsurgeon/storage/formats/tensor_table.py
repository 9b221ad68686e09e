"""The tensors of a file as columns: what many of them share is kept once.

A trillion-parameter model has 200,000 tensors, and nearly all are alike but for one number in their
name, an expert's: `model.layers.3.mlp.experts.17.down_proj.weight`. Such tensors are a series. A
table holds its series, and of each tensor three numbers: which series, which number, and where its
bytes begin. What is asked of every tensor is asked of a series once and of the columns with numpy;
names and records are made when somebody looks at one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, overload

import numpy as np
import numpy.typing as npt

Column = npt.NDArray[np.int64]

# The last part of a name that is a number, as a number is written, and what is around it.
NUMBER = "0|[1-9][0-9]{0,8}"
_SPLIT = re.compile(rf"(.*\.)({NUMBER})(?![^.])", re.DOTALL)
# Of a name without one.
UNNUMBERED = -1


class TensorRecord(NamedTuple):
    """One tensor of a shard: what it is and where its bytes lie.

    begin and end are relative to the data section, end exclusive.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """Size of the tensor's data in bytes."""
        return self.end - self.begin


class Series(NamedTuple):
    """Tensors that are alike but for one number of their names: head, number, tail.

    Of a name without a number that can be told apart, head is "" and tail all of it. nbytes: of
    one of the tensors.
    """

    head: str
    tail: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    def name(self, number: int) -> str:
        """The name of the tensor with that number."""
        return f"{self.head}{number}{self.tail}" if number >= 0 else self.tail


def split_name(name: str) -> tuple[str, int, str]:
    """(head, number, tail) of a tensor's name; the number is the last part that is one."""
    match = _SPLIT.match(name)
    if match is None:
        return "", UNNUMBERED, name
    return match[1], int(match[2]), name[match.end() :]


@dataclass(frozen=True, eq=False)
class TensorTable(Sequence[TensorRecord]):
    """The tensors of one file, in the order of their bytes.

    series: all there are; code, number, begin: of each tensor, the place of its series in `series`,
    the number in its name, and its offset in the data section in bytes. As a sequence it gives
    records.
    """

    series: tuple[Series, ...]
    code: Column
    number: Column
    begin: Column

    @staticmethod
    def of(records: Iterable[TensorRecord]) -> TensorTable:
        """The table of some tensors, in the order in which they are given."""
        codes: dict[Series, int] = {}
        code, number, begin = [], [], []
        for record in records:
            head, which, tail = split_name(record.name)
            series = Series(head, tail, record.dtype, record.shape, record.nbytes)
            code.append(codes.setdefault(series, len(codes)))
            number.append(which)
            begin.append(record.begin)
        columns = (np.array(column, np.int64) for column in (code, number, begin))
        return TensorTable(tuple(codes), *columns)

    @cached_property
    def nbytes(self) -> Column:
        """Bytes of each tensor."""
        return self.by_series([each.nbytes for each in self.series])

    def by_series(self, values: Sequence[int]) -> Column:
        """A number of each series, for each tensor."""
        return np.asarray(np.array(values, np.int64)[self.code])

    @property
    def end(self) -> Column:
        """Where each tensor ends in the data section."""
        return self.begin + self.nbytes

    def select(self, places: npt.NDArray[Any]) -> TensorTable:
        """The tensors at some places, or under a mask."""
        return TensorTable(self.series, self.code[places], self.number[places], self.begin[places])

    def name(self, place: int) -> str:
        """The name of the tensor at a place."""
        series: Series = self.series[self.code[place]]
        return series.name(int(self.number[place]))

    def names(self) -> list[str]:
        """All names, in order; quicker than through records."""
        series = [(each.head, each.tail) for each in self.series]
        rows = zip(map(series.__getitem__, self.code.tolist()), self.number.tolist(), strict=True)
        return [f"{head}{number}{tail}" if number >= 0 else tail for (head, tail), number in rows]

    def examples(self) -> Iterator[TensorRecord]:
        """One tensor of each series that has any, in their order."""
        _, places = np.unique(self.code, return_index=True)
        yield from (self[place] for place in np.sort(places).tolist())

    def __len__(self) -> int:
        return len(self.code)

    @overload
    def __getitem__(self, place: int) -> TensorRecord: ...

    @overload
    def __getitem__(self, place: slice) -> Sequence[TensorRecord]: ...

    def __getitem__(self, place: int | slice) -> TensorRecord | Sequence[TensorRecord]:
        if isinstance(place, slice):
            return [self[each] for each in range(*place.indices(len(self)))]
        series, begin = self.series[self.code[place]], int(self.begin[place])
        name = series.name(int(self.number[place]))
        return TensorRecord(name, series.dtype, series.shape, begin, begin + series.nbytes)

    def __iter__(self) -> Iterator[TensorRecord]:
        rows = zip(self.code.tolist(), self.number.tolist(), self.begin.tolist(), strict=True)
        for code, number, begin in rows:
            series = self.series[code]
            name = series.name(number)
            yield TensorRecord(name, series.dtype, series.shape, begin, begin + series.nbytes)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(map(TensorRecord.__eq__, self, other))

    def __hash__(self) -> int:
        raise TypeError("a table is looked at, not looked up")


class Stems:
    """Numbers for names: the same for the same name in any table, another for any other."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], int] = {}

    def of(self, head: str, tail: str) -> int:
        """The number of a name's head and tail."""
        return self._known.setdefault((head, tail), len(self._known))

    def keys(self, table: TensorTable) -> Column:
        """The number of each tensor's name."""
        stems = np.array([self.of(each.head, each.tail) for each in table.series], np.int64)
        return self.joined(stems[table.code], table.number)

    def joined(self, stem: Column, number: Column) -> Column:
        """The numbers of names, of those of their heads and tails and the ones they contain."""
        # The number in a name has 30 bits, and is -1 where there is none.
        return np.asarray((stem << 31) + number + 1)


class Alike(NamedTuple):
    """A tensor, and how often a model has it, with just such others beside it. See `condensed`."""

    record: TensorRecord
    times: int


def condensed(tables: Iterable[TensorTable]) -> list[Alike]:
    """The tensors of a model without those that only repeat others.

    Tensors whose names agree as far as the number, it included, belong together: the weight and
    scales of one expert. Neighbouring numbers whose tensors are alike, all of them, are counted and
    shown once. The order is that of the names' beginnings.
    """
    tables = [table for table in tables if len(table)]
    if not tables:
        return []
    known: dict[Series, int] = {}
    heads: dict[str, int] = {}
    columns: list[tuple[Column, Column]] = []
    for table in tables:
        lookup = np.array([known.setdefault(each, len(known)) for each in table.series], np.int64)
        columns.append((lookup[table.code], table.number))
    code, number = (np.concatenate(column) for column in zip(*columns, strict=True))
    series = list(known)
    head = np.array([heads.setdefault(each.head, len(heads)) for each in series], np.int64)[code]
    order = np.lexsort((code, number, head))
    code, number, head = code[order], number[order], head[order]
    new = np.ones(len(code), bool)
    new[1:] = (number[1:] != number[:-1]) | (head[1:] != head[:-1])
    # What has no number stands alone.
    new |= number < 0
    begins = np.flatnonzero(new)
    sizes = np.diff(begins, append=len(code))
    group = np.cumsum(new) - 1
    before = np.maximum(np.arange(len(code)) - sizes[group], 0)
    differs = (code != code[before]) | (head != head[before])
    repeats = ~np.logical_or.reduceat(differs, begins)
    repeats[1:] &= sizes[1:] == sizes[:-1]
    repeats[0] = False
    repeats &= number[begins] >= 0
    first = np.flatnonzero(~repeats)
    counts = np.diff(first, append=len(begins))
    found = []
    for at, size, count in zip(begins[first], sizes[first], counts, strict=True):
        for place in range(at, at + size):
            each = series[code[place]]
            name = each.name(int(number[place]))
            record = TensorRecord(name, each.dtype, each.shape, 0, each.nbytes)
            found.append(Alike(record, int(count)))
    return found
