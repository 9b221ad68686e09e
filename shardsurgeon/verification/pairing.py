"""From every output tensor back to the source tensor it must be made of.

It uses the keep-lists and is used to compare bytes. It goes in the opposite direction to the
planner, and in the end accounts for every tensor of the source: kept, pruned, or dropped with the
MTP layers.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate, groupby

from shardsurgeon.checkpoint.anatomy import Anatomy
from shardsurgeon.checkpoint.checkpoint import Checkpoint
from shardsurgeon.checkpoint.roles import (
    Carried,
    Counted,
    ExpertTensor,
    Role,
    Sliced,
    Surplus,
    Tabled,
)
from shardsurgeon.checkpoint.shards import Shard
from shardsurgeon.errors import FamilyError
from shardsurgeon.storage.formats.safetensors import DTYPE_BITS
from shardsurgeon.storage.formats.tensor_table import TensorRecord
from shardsurgeon.verification.findings import Findings
from shardsurgeon.verification.record import RetainedIds


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


@dataclass(frozen=True, slots=True)
class Pair:
    """An output tensor and the source tensor it must be made of.

    shard, record: the output's; source_shard, source_record: the source's; source_place: the
    latter's number among all tensors of the source; cut: None where the bytes are the same from
    first to last. Small, because there are as many as tensors.
    """

    shard: Shard
    record: TensorRecord
    source_shard: Shard
    source_record: TensorRecord
    source_place: int
    cut: Rows | Count | Table | None

    @property
    def name(self) -> str:
        """The output tensor's name."""
        return self.record.name

    @property
    def dtype(self) -> str:
        """The dtype of both."""
        return self.record.dtype

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


@dataclass(slots=True)
class Pairing:
    """What was found.

    pairs: output shard → its pairs, in the order of the file; mtp: whether the output holds any
    tensor of an MTP layer; mtp_dropped: whether the source had some and all are gone.
    """

    pairs: dict[str, list[Pair]] = field(default_factory=dict)
    mtp: bool = False
    mtp_dropped: bool = False


def pair_tensors(
    source: Checkpoint, anatomy: Anatomy, pruned: Checkpoint, keeps: RetainedIds, findings: Findings
) -> Pairing:
    """Pair every output tensor with its source and account for every source tensor.

    Wrong dtypes and shapes, tensors too many and tensors missing are findings; what cannot be
    paired is left out.
    """
    matcher = _Matcher(source, anatomy, keeps, findings)
    pairing = Pairing()
    for shard in pruned.shards:
        found = (matcher.match(shard, record) for record in shard.header.tensors)
        pairing.pairs[shard.file] = [pair for pair in found if pair is not None]
    pairing.mtp = matcher.mtp_seen
    pairing.mtp_dropped = matcher.account()
    return pairing


class _Matcher:
    """Finds the source tensor of each output tensor, and remembers which were found."""

    def __init__(
        self, source: Checkpoint, anatomy: Anatomy, keeps: RetainedIds, findings: Findings
    ) -> None:
        self._source = source
        self._anatomy = anatomy
        self._keeps = keeps
        self._findings = findings
        # A place is a tensor's number among all tensors of the source.
        self._starts = [0, *accumulate(len(shard.header.tensors) for shard in source.shards)]
        self._places = {record.name: place for place, record in enumerate(source.records)}
        self._used = bytearray(self._starts[-1])
        self.mtp_seen = False

    def match(self, shard: Shard, record: TensorRecord) -> Pair | None:
        """The pair of an output tensor; None, and a finding, where it cannot be one."""
        where = f"{shard.file} {record.name}"
        place = self._places.get(record.name)
        role = self._role(record, place)
        if role is None:
            self._findings.add(where, "is a surplus tensor: the source has none of that name")
            return None
        self.mtp_seen |= self._is_mtp(role)
        if not isinstance(role, Carried) and role.layer not in self._keeps.retained:
            return None
        if isinstance(role, ExpertTensor | Surplus):
            place = self._old_place(record.name, role)
            if place is None:
                kept = len(self._keeps.retained[role.layer])
                what = f"expert {role.expert} of {kept} kept"
                if isinstance(role, ExpertTensor) and role.expert < kept:
                    what = "the source has none for that expert"
                self._findings.add(where, f"is a surplus tensor: {what}")
                return None
        if place is None:
            raise AssertionError(f"{record.name} has a role and no place")
        self._used[place] = True
        return self._pair(shard, record, place, role)

    def _role(self, record: TensorRecord, place: int | None) -> Role | None:
        """The role of the source tensor of the same name, or of an expert's that lacks it."""
        if place is not None:
            return self._anatomy.role(self._record(place))
        try:
            role = self._anatomy.role(record)
        except FamilyError:
            return None
        return role if isinstance(role, ExpertTensor) else None

    def _old_place(self, name: str, role: ExpertTensor | Surplus) -> int | None:
        """The source tensor of an expert tensor called `name` in the output; None without one.

        After the retained experts come the identity experts, in their order, where the source has
        tensors of them.
        """
        retained = self._keeps.retained[role.layer]
        if role.expert < len(retained):
            return self._places.get(role.renamed(name, retained[role.expert]))
        removed = self._anatomy.reader.experts_of(role.layer) - len(retained)
        place = self._places.get(role.renamed(name, role.expert + removed))
        if place is None or not isinstance(self._anatomy.role(self._record(place)), Surplus):
            return None
        return place

    def account(self) -> bool:
        """Find what is missing; whether the MTP layers were dropped."""
        mtp_missing = False
        for used, record in zip(self._used, self._source.records, strict=True):
            if used:
                continue
            role = self._anatomy.role(record)
            if self._is_mtp(role) and not self.mtp_seen:
                mtp_missing = True
            elif (name := self._output_name(record.name, role)) is not None:
                self._findings.add(name, "is missing from the pruned model")
        return mtp_missing

    def _output_name(self, name: str, role: Role) -> str | None:
        """The name of a source tensor in the output; None where it need not be there."""
        if isinstance(role, Carried):
            return name
        retained = self._keeps.retained.get(role.layer)
        if retained is None:
            # A layer without a keep-list is a finding of its own.
            return None
        if not isinstance(role, ExpertTensor | Surplus):
            return name
        if isinstance(role, Surplus):
            removed = self._anatomy.reader.experts_of(role.layer) - len(retained)
            return role.renamed(name, role.expert - removed)
        return role.renamed(name, retained.index(role.expert)) if role.expert in retained else None

    def _pair(self, shard: Shard, record: TensorRecord, place: int, role: Role) -> Pair | None:
        where = f"{shard.file} {record.name}"
        old = self._record(place)
        shape = old.shape
        cut: Rows | Count | Table | None = None
        if isinstance(role, Sliced):
            shape, cut = _rows(old, role, self._keeps.retained[role.layer])
            if cut.row_nbytes * cut.blocks * cut.before != old.nbytes:
                self._findings.add(where, "was cut, though its rows do not fill whole bytes")
                return None
        elif isinstance(role, Counted):
            cut = Count(DTYPE_BITS[old.dtype] // 8, len(self._keeps.retained[role.layer]))
        elif isinstance(role, Tabled):
            width = DTYPE_BITS[old.dtype] // 8
            cut = Table(width, old.shape[-1], self._keeps.retained[role.layer])
        if (record.dtype, record.shape) != (old.dtype, shape):
            self._findings.add(
                where,
                f"is {record.dtype} {list(record.shape)}, expected {old.dtype} {list(shape)}",
            )
            return None
        return Pair(shard, record, self._home(place), old, place, cut)

    def _home(self, place: int) -> Shard:
        return self._source.shards[bisect_right(self._starts, place) - 1]

    def _record(self, place: int) -> TensorRecord:
        number = bisect_right(self._starts, place) - 1
        return self._source.shards[number].header.tensors[place - self._starts[number]]

    def _is_mtp(self, role: Role) -> bool:
        if isinstance(role, Carried):
            return role.mtp
        return role.layer >= self._anatomy.num_layers


def _rows(
    old: TensorRecord, role: Sliced, retained: tuple[int, ...]
) -> tuple[tuple[int, ...], Rows]:
    """The shape and the rows of a sliced tensor: the retained ones, then the tail as it was."""
    blocks = math.prod(old.shape[: role.axis])
    before = old.shape[role.axis] // role.each
    old_rows = retained + tuple(range(before - role.tail, before))
    shape = (*old.shape[: role.axis], len(old_rows) * role.each, *old.shape[role.axis + 1 :])
    rows = blocks * before
    return shape, Rows(blocks, before, old.nbytes // rows if rows else 0, old_rows)


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
