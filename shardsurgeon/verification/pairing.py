"""From every output tensor back to the source tensor it must be made of.

It uses the keep-lists and is used to compare bytes. It goes in the opposite direction to the
planner, and in the end accounts for every tensor of the source: kept, pruned, or dropped with the
MTP layers. Tensors that are one expert's own, which are nearly all, are looked up together, by
columns; the others one by one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np

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
from shardsurgeon.storage.formats.tensor_table import (
    Column,
    Stems,
    TensorRecord,
    TensorTable,
    split_name,
)
from shardsurgeon.verification.findings import Findings
from shardsurgeon.verification.pairs import Count, Cut, Rows, ShardPairs, Table
from shardsurgeon.verification.record import RetainedIds


@dataclass(slots=True)
class Pairing:
    """What was found.

    pairs: output shard → its pairs; mtp: whether the output holds any tensor of an MTP layer;
    mtp_dropped: whether the source had some and all are gone.
    """

    pairs: dict[str, ShardPairs] = field(default_factory=dict)
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
    pairing = Pairing({shard.file: matcher.pairs(shard) for shard in pruned.shards})
    pairing.mtp = matcher.mtp_seen
    pairing.mtp_dropped = matcher.account()
    return pairing


class _ByLayer:
    """A list of numbers for each of some layers, looked up for many experts' tensors at a time."""

    def __init__(self, rows: Mapping[int, Sequence[int]]) -> None:
        begins = accumulate(map(len, rows.values()), initial=0)
        self._begin: dict[int | None, int] = dict(zip(rows, begins, strict=False))
        self._size: dict[int | None, int] = {layer: len(row) for layer, row in rows.items()}
        self._numbers = np.array([each for row in rows.values() for each in row], np.int64)

    def at(self, table: TensorTable, layers: Sequence[int | None]) -> Column:
        """Of each tensor what its layer's list has at the number in its name; -1 where it has
        nothing. layers: of each series."""
        begin = table.by_series([self._begin.get(layer, 0) for layer in layers])
        size = table.by_series([self._size.get(layer, 0) for layer in layers])
        there = (table.number >= 0) & (table.number < size)
        found = np.full(len(table), -1)
        found[there] = self._numbers[(begin + table.number)[there]]
        return found


class _Source:
    """The tensors of the source by their names. A place is a tensor's number among all of them."""

    def __init__(self, source: Checkpoint) -> None:
        self.shards = source.shards
        self.starts = np.array([0, *accumulate(map(len, source.tables))])
        self._stems = Stems()
        keys = np.concatenate([self._stems.keys(table) for table in source.tables])
        self._order = np.argsort(keys)
        self._keys = keys[self._order]
        self._stored: dict[tuple[str, tuple[int, ...]], int] = {}
        self.stored = np.concatenate([self.stored_as(table) for table in source.tables])

    def __len__(self) -> int:
        return len(self._keys)

    def stored_as(self, table: TensorTable) -> Column:
        """A number for the dtype and shape of each tensor, here and in the output."""
        known = self._stored
        return table.by_series(
            [known.setdefault((each.dtype, each.shape), len(known)) for each in table.series]
        )

    def find(self, table: TensorTable, number: Column) -> Column:
        """The place of each tensor of the same name but for the number; -1 where there is none."""
        stems = table.by_series([self._stems.of(each.head, each.tail) for each in table.series])
        return self._places(self._stems.joined(stems, number))

    def place(self, name: str) -> int | None:
        """The place of a tensor, None without one."""
        head, number, tail = split_name(name)
        stem = np.array([self._stems.of(head, tail)])
        (place,) = self._places(self._stems.joined(stem, np.array([number]))).tolist()
        return place if place >= 0 else None

    def _places(self, keys: Column) -> Column:
        at = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        return np.where(self._keys[at] == keys, self._order[at], -1)

    def homes(self, places: Column) -> Column:
        """The number of the shard in which each tensor is."""
        return np.asarray(np.searchsorted(self.starts, places, "right") - 1)

    def record(self, place: int) -> TensorRecord:
        """The tensor at a place."""
        home = int(np.searchsorted(self.starts, place, "right")) - 1
        return self.shards[home].header.tensors[int(place - self.starts[home])]


_Problems = list[tuple[int, str]]


class _Matcher:
    """Finds the source tensor of each output tensor, and remembers which were found."""

    def __init__(
        self, source: Checkpoint, anatomy: Anatomy, keeps: RetainedIds, findings: Findings
    ) -> None:
        self._source = _Source(source)
        self._anatomy = anatomy
        self._reader = anatomy.reader
        self._keeps = keeps
        self._findings = findings
        self._old_ids = _ByLayer(keeps.retained)
        self._used = np.zeros(len(self._source), bool)
        self.mtp_seen = False

    def pairs(self, shard: Shard) -> ShardPairs:
        """The pairs of a shard's tensors. Those that cannot be paired are findings."""
        table, source = shard.header.tensors, self._source
        problems: _Problems = []
        layers = [self._reader.layer_of(each) for each in table.series]
        layer, _ = self._reader.experts(table)
        self.mtp_seen |= bool((layer >= self._anatomy.num_layers).any())
        listed = table.by_series([each in self._keeps.retained for each in layers]) > 0
        old = np.where(layer >= 0, self._old_ids.at(table, layers), -1)
        # Experts that are not kept may be identity experts, which is found out one by one.
        alone = np.flatnonzero((layer < 0) | (listed & (old < 0)))
        found = np.full(len(table), -1)
        experts = np.flatnonzero(old >= 0)
        own = table.select(experts)
        found[experts] = source.find(own, old[experts])
        for place in experts[found[experts] < 0].tolist():
            what = "the source has none for that expert"
            problems.append((place, f"is a surplus tensor: {what}"))
        experts = experts[found[experts] >= 0]
        self._used[found[experts]] = True
        same = source.stored_as(table)[experts] == source.stored[found[experts]]
        for place in experts[~same].tolist():
            record = source.record(int(found[place]))
            problems.append((place, _unlike(table[place], record.dtype, record.shape)))
            found[place] = -1
        cuts: dict[int, Cut] = {}
        for place in alone.tolist():
            found[place], cut = self._match(table[place], place, problems)
            if cut is not None:
                cuts[place] = cut
        for place, problem in sorted(problems):
            self._findings.add(f"{shard.file} {table.name(place)}", problem)
        places = np.flatnonzero(found >= 0)
        homes = source.homes(found[places])
        begins = source.starts[homes]
        return ShardPairs(shard, source.shards, places, homes, found[places] - begins, cuts)

    def _match(
        self, record: TensorRecord, number: int, problems: _Problems
    ) -> tuple[int, Cut | None]:
        """The source place of an output tensor and its cut; -1, and a problem, where it has none.

        number: the tensor's, for the problem.
        """
        place = self._source.place(record.name)
        role = self._role(record, place)
        if role is None:
            problems.append((number, "is a surplus tensor: the source has none of that name"))
            return -1, None
        self.mtp_seen |= self._is_mtp(role)
        if not isinstance(role, Carried) and role.layer not in self._keeps.retained:
            return -1, None
        if isinstance(role, ExpertTensor | Surplus):
            place = self._old_place(record.name, role)
            if place is None:
                kept = len(self._keeps.retained[role.layer])
                what = f"expert {role.expert} of {kept} kept"
                if isinstance(role, ExpertTensor) and role.expert < kept:
                    what = "the source has none for that expert"
                problems.append((number, f"is a surplus tensor: {what}"))
                return -1, None
        if place is None:
            raise AssertionError(f"{record.name} has a role and no place")
        self._used[place] = True
        problem, cut = self._cut(record, self._source.record(place), role)
        if problem:
            problems.append((number, problem))
            return -1, None
        return place, cut

    def _role(self, record: TensorRecord, place: int | None) -> Role | None:
        """The role of the source tensor of the same name, or of an expert's that lacks it."""
        if place is not None:
            return self._anatomy.role(self._source.record(place))
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
            return self._source.place(role.renamed(name, retained[role.expert]))
        removed = self._reader.experts_of(role.layer) - len(retained)
        place = self._source.place(role.renamed(name, role.expert + removed))
        if place is None or not isinstance(self._anatomy.role(self._source.record(place)), Surplus):
            return None
        return place

    def account(self) -> bool:
        """Find what is missing; whether the MTP layers were dropped."""
        mtp_missing = False
        missing: list[tuple[int, str]] = []
        new_ids = _ByLayer(self._new_ids())
        for shard, start in zip(self._source.shards, self._source.starts.tolist(), strict=False):
            table = shard.header.tensors
            unused = ~self._used[start : start + len(table)]
            layer, _ = self._reader.experts(table)
            layers = [self._reader.layer_of(each) for each in table.series]
            new = np.where(layer >= 0, new_ids.at(table, layers), -1)
            is_mtp = layer >= self._anatomy.num_layers
            if not self.mtp_seen and (unused & is_mtp).any():
                mtp_missing = True
                unused &= ~is_mtp
            for place in np.flatnonzero(unused & (new >= 0)).tolist():
                series = table.series[table.code[place]]
                missing.append((start + place, series.name(int(new[place]))))
            for place in np.flatnonzero(unused & (layer < 0)).tolist():
                role = self._anatomy.role(table[place])
                if self._is_mtp(role) and not self.mtp_seen:
                    mtp_missing = True
                elif (name := self._output_name(table.name(place), role)) is not None:
                    missing.append((start + place, name))
        for _, name in sorted(missing):
            self._findings.add(name, "is missing from the pruned model")
        return mtp_missing

    def _new_ids(self) -> dict[int, list[int]]:
        """Layer → the new number of each of its experts, -1 of those that are gone."""
        found = {}
        for layer, retained in self._keeps.retained.items():
            most = max(self._reader.experts_of(layer), max(retained, default=-1) + 1)
            found[layer] = [-1] * most
            for new_id, old_id in enumerate(retained):
                found[layer][old_id] = new_id
        return found

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
            removed = self._reader.experts_of(role.layer) - len(retained)
            return role.renamed(name, role.expert - removed)
        return role.renamed(name, retained.index(role.expert)) if role.expert in retained else None

    def _cut(self, record: TensorRecord, old: TensorRecord, role: Role) -> tuple[str, Cut | None]:
        """(what is wrong, cut) of an output tensor and the source tensor it is made of."""
        shape = old.shape
        cut: Cut | None = None
        if isinstance(role, Sliced):
            shape, cut = _rows(old, role, self._keeps.retained[role.layer])
            if cut.row_nbytes * cut.blocks * cut.before != old.nbytes:
                return "was cut, though its rows do not fill whole bytes", None
        elif isinstance(role, Counted):
            cut = Count(DTYPE_BITS[old.dtype] // 8, len(self._keeps.retained[role.layer]))
        elif isinstance(role, Tabled):
            width = DTYPE_BITS[old.dtype] // 8
            cut = Table(width, old.shape[-1], self._keeps.retained[role.layer])
        if (record.dtype, record.shape) != (old.dtype, shape):
            return _unlike(record, old.dtype, shape), None
        return "", cut

    def _is_mtp(self, role: Role) -> bool:
        if isinstance(role, Carried):
            return role.mtp
        return role.layer >= self._anatomy.num_layers


def _unlike(record: TensorRecord, dtype: str, shape: tuple[int, ...]) -> str:
    return f"is {record.dtype} {list(record.shape)}, expected {dtype} {list(shape)}"


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
