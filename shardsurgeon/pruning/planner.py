"""Anatomy and keep-lists become output shards: headers and byte ranges.

Nothing is read for it but tables that map tokens to experts, whose values change with the
numbering. The size of a result is estimated from the headers before it is planned.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import cached_property
from itertools import accumulate

import numpy as np

from shardsurgeon.checkpoint.anatomy import Anatomy
from shardsurgeon.checkpoint.checkpoint import Checkpoint
from shardsurgeon.checkpoint.layer_consistency import require_complete
from shardsurgeon.checkpoint.roles import (
    COUNT_TYPES,
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
from shardsurgeon.execution.plan import Literal, OutputShard, OutputTensor, Segment
from shardsurgeon.pruning.drafts import Draft, merged, repacked
from shardsurgeon.pruning.keep_lists import KeepList
from shardsurgeon.pruning.request import MtpPolicy
from shardsurgeon.storage.formats.safetensors import DTYPE_BITS
from shardsurgeon.storage.formats.tensor_table import UNNUMBERED, Column, Series, TensorRecord
from shardsurgeon.units import BLOCK_NBYTES

# Types of a table of expert ids, as numpy names them.
_ID_TYPES = {"I32": "<i4", "I64": "<i8"}


def checked_shards(
    checkpoint: Checkpoint,
    anatomy: Anatomy,
    keep: KeepList,
    *,
    drop_mtp: bool = False,
    max_shard_nbytes: int | None = None,
) -> tuple[OutputShard, ...]:
    """As `plan_shards`, of a checkpoint that has what it says of its experts and all that stays.

    Raises FamilyError where it has not, or where a table of expert ids cannot be renumbered, and
    SourceReadError where it cannot be read.
    """
    check_expert_counts(checkpoint, anatomy)
    stay = {layer: kept.retained for layer, kept in keep.layers.items()}
    require_complete(anatomy.incomplete, stay, checkpoint.location)
    return plan_shards(
        checkpoint,
        anatomy,
        keep,
        tables=expert_id_tables(checkpoint, anatomy, keep),
        drop_mtp=drop_mtp,
        max_shard_nbytes=max_shard_nbytes,
    )


def plan_shards(
    checkpoint: Checkpoint,
    anatomy: Anatomy,
    keep: KeepList,
    *,
    tables: Mapping[str, bytes] | None = None,
    drop_mtp: bool = False,
    max_shard_nbytes: int | None = None,
) -> tuple[OutputShard, ...]:
    """The output shards of a prune, in order: a header each, and where every byte comes from.

    Every tensor is kept, renumbered, sliced along its expert axis or left out; tensors keep the
    order of the source. keep: a keep-list of every layer with experts, of MTP layers unless they
    are dropped. tables: new content of the tensors that hold expert ids, by name
    (`expert_id_tables` makes it). drop_mtp: leave out all that belongs to MTP layers.
    max_shard_nbytes: repack into shards of at most so many bytes of tensor data (a larger tensor
    gets a shard of its own); None keeps the shards of the source, less those with nothing left.

    Raises FamilyError where an expert's row in a stacked tensor is not whole bytes.
    """
    listed = {layer.index for layer in anatomy.layers if not (drop_mtp and layer.is_mtp)}
    assert listed <= keep.layers.keys()
    planner = _Planner(anatomy, keep, tables or {}, drop_mtp)
    kept = [draft for shard in checkpoint.shards if len(draft := planner.draft(shard))]
    drafts = merged(kept) if max_shard_nbytes is None else repacked(kept, max_shard_nbytes)
    return tuple(
        draft.finished(checkpoint.source, checkpoint.names.shard(number, len(drafts)))
        for number, draft in enumerate(drafts, start=1)
    )


def changed_tensors(
    checkpoint: Checkpoint, anatomy: Anatomy, keep: KeepList
) -> dict[int, dict[str, OutputTensor]]:
    """Layer → the tensors beside its experts that a prune changes, by name, as it writes them.

    Routers and their biases, tables of expert ids, counts. Raises what `expert_id_tables` raises.
    """
    tables = expert_id_tables(checkpoint, anatomy, keep)
    planner = _Planner(anatomy, keep, tables, drop_mtp=False)
    changed: dict[int, dict[str, OutputTensor]] = {layer: {} for layer in keep.layers}
    for shard in checkpoint.shards:
        for record in shard.header.tensors:
            role = anatomy.role(record)
            if isinstance(role, Carried | ExpertTensor | Surplus) or role.layer not in keep.layers:
                continue
            if isinstance(role, Sliced) and not role.is_router:
                continue
            begin = shard.header.data_begin + record.begin
            tensor = planner.tensor(record, shard.file, begin)
            assert tensor is not None
            changed[role.layer][record.name] = tensor
    return changed


class _Planner:
    """Applies keep-lists to the tensors of one shard after the other."""

    def __init__(
        self, anatomy: Anatomy, keep: KeepList, tables: Mapping[str, bytes], drop_mtp: bool
    ) -> None:
        self._anatomy = anatomy
        self._tables = tables
        self._drop_mtp = drop_mtp
        self._retained = {layer: kept.retained for layer, kept in keep.layers.items()}
        # Old number → new number or -1, of one layer behind the other; layer → where it begins.
        self._begins: dict[int, int] = {}
        counts = anatomy.experts_per_layer
        self._new_ids = np.full(sum(counts.values()), -1, np.int64)
        for (layer, count), end in zip(counts.items(), accumulate(counts.values()), strict=True):
            self._begins[layer] = end - count
            dropped = drop_mtp and layer >= anatomy.num_layers
            retained = () if dropped else self._retained.get(layer, ())
            self._new_ids[end - count + np.array(retained, np.int64)] = np.arange(len(retained))

    def draft(self, shard: Shard) -> Draft:
        """The tensors that a source shard gives to the output, in source order."""
        table, begin = shard.header.tensors, shard.header.data_begin
        layer, expert = self._anatomy.reader.experts(table)
        owned = layer >= 0
        first = table.by_series([self._begin(each) for each in table.series])
        number = np.where(owned, self._new_ids[np.where(owned, first + expert, 0)], table.number)
        stays = number >= np.where(owned, 0, UNNUMBERED)
        odd: dict[int, OutputTensor] = {}
        for place in np.flatnonzero(~owned).tolist():
            record = table[place]
            tensor = self.tensor(record, shard.file, begin + record.begin)
            if tensor is None:
                stays[place] = False
            elif not _is_copy(tensor, record):
                odd[place] = tensor
        places = np.flatnonzero(stays)
        return Draft.of(shard, table.select(places), number[places], odd, places)

    def _begin(self, series: Series) -> int:
        layer = self._anatomy.reader.layer_of(series)
        return 0 if layer is None else self._begins[layer]

    def tensor(self, record: TensorRecord, file: str, begin: int) -> OutputTensor | None:
        """What a source tensor, which begins at an offset of a file, becomes; None if nothing."""
        role = self._anatomy.role(record)
        whole = Segment(file, begin, record.nbytes)
        if self._drop_mtp and self._goes_with_mtp(role):
            return None
        if isinstance(role, Carried):
            return OutputTensor(record.name, record.dtype, record.shape, (whole,))
        if isinstance(role, ExpertTensor):
            new_id = int(self._new_ids[self._begins[role.layer] + role.expert])
            if new_id < 0:
                return None
            name = role.renamed(record.name, new_id)
            return OutputTensor(name, record.dtype, record.shape, (whole,))
        if isinstance(role, Surplus):
            # Identity experts behind the experts' own: they move up by as many as are gone.
            before = self._anatomy.reader.experts_of(role.layer)
            removed = before - len(self._retained[role.layer])
            name = role.renamed(record.name, role.expert - removed)
            return OutputTensor(name, record.dtype, record.shape, (whole,))
        if isinstance(role, Tabled):
            table = Literal(self._tables[record.name])
            return OutputTensor(record.name, record.dtype, record.shape, (table,))
        if isinstance(role, Counted):
            return _recounted(record, whole, len(self._retained[role.layer]))
        return _slice(record, whole, role, self._retained[role.layer])

    def _goes_with_mtp(self, role: Role) -> bool:
        if isinstance(role, Carried):
            return role.mtp
        return role.layer >= self._anatomy.num_layers


def _is_copy(tensor: OutputTensor, record: TensorRecord) -> bool:
    """Whether it is the source's tensor as it is, under its own name."""
    (first, *others) = tensor.pieces
    return (
        (tensor.name, tensor.shape, first.nbytes) == (record.name, record.shape, record.nbytes)
        and isinstance(first, Segment)
        and not others
    )


def _recounted(record: TensorRecord, whole: Segment, kept: int) -> OutputTensor:
    """The tensor with its first element, the expert count, made new."""
    width = np.dtype(COUNT_TYPES[record.dtype]).itemsize
    rest = Segment(whole.file, whole.begin + width, record.nbytes - width)
    count = Literal(kept.to_bytes(width, "little"))
    return OutputTensor(record.name, record.dtype, record.shape, (count, rest))


def _slice(
    record: TensorRecord, whole: Segment, role: Sliced, retained: tuple[int, ...]
) -> OutputTensor:
    """The retained rows along the expert axis, and the tail behind them.

    Consecutive rows are one segment: fewer and longer reads.
    """
    rows = record.shape[role.axis] // role.each
    outer = math.prod(record.shape[: role.axis])
    inner = role.each * math.prod(record.shape[role.axis + 1 :])
    inner_bits = inner * DTYPE_BITS[record.dtype]
    row_nbytes, ragged = divmod(inner_bits, 8)
    if ragged:
        problem = f"an expert's row takes {inner_bits:,} bits, which do not fill whole bytes"
        raise FamilyError(record.name, problem, "its experts cannot be taken apart")
    runs = list(_runs((*retained, *range(rows - role.tail, rows))))
    pieces = tuple(
        Segment(
            whole.file,
            whole.begin + (block * rows + first) * row_nbytes,
            (last - first + 1) * row_nbytes,
        )
        for block in range(outer)
        for first, last in runs
    )
    kept = (len(retained) + role.tail) * role.each
    shape = (*record.shape[: role.axis], kept, *record.shape[role.axis + 1 :])
    return OutputTensor(record.name, record.dtype, shape, pieces)


def _runs(ids: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """(first, last) of every stretch of consecutive ids."""
    first = previous = ids[0]
    for current in ids[1:]:
        if current != previous + 1:
            yield first, previous
            first = current
        previous = current
    yield first, previous


def check_expert_counts(checkpoint: Checkpoint, anatomy: Anatomy) -> None:
    """Refuse a tensor whose first element is taken for the number of experts and is not.

    Raises FamilyError, which names it, and SourceReadError where it cannot be read.
    """
    names = anatomy.family.tensors
    if not names.expert_counts and not names.stacked:
        return
    for shard in checkpoint.shards:
        for record in shard.header.tensors:
            role = anatomy.role(record)
            if not isinstance(role, Counted):
                continue
            number = np.dtype(COUNT_TYPES[record.dtype])
            begin = shard.header.data_begin + record.begin
            raw = checkpoint.source.read(shard.file, begin, begin + number.itemsize)
            count, experts = (
                int(np.frombuffer(raw, number)[0]),
                anatomy.experts_per_layer[role.layer],
            )
            if count != experts:
                raise FamilyError(
                    record.name,
                    f"begins with {count}, where the number of experts, {experts}, should stand",
                    "the tensor is damaged, or the family's declaration is not for this model",
                )


def expert_id_tables(checkpoint: Checkpoint, anatomy: Anatomy, keep: KeepList) -> dict[str, bytes]:
    """New content of every tensor whose values are expert ids, by name.

    Tables of layers without a keep-list (dropped MTP layers) are left out. Raises FamilyError
    where a table cannot be renumbered, SourceReadError where it cannot be read.
    """
    tables: dict[str, bytes] = {}
    if not anatomy.family.tensors.expert_ids:
        return tables
    for shard in checkpoint.shards:
        for record in shard.header.tensors:
            role = anatomy.role(record)
            if isinstance(role, Tabled) and role.layer in keep.layers:
                kept = keep.layers[role.layer]
                begin = shard.header.data_begin
                raw = checkpoint.source.read(shard.file, begin + record.begin, begin + record.end)
                tables[record.name] = remapped(
                    record.name, record.dtype, record.shape, raw, kept.retained, kept.num_experts
                )
    return tables


def remapped(
    name: str,
    dtype: str,
    shape: tuple[int, ...],
    raw: bytes,
    retained: tuple[int, ...],
    experts: int,
) -> bytes:
    """A table of expert ids in new ids.

    raw: the table in old ids, of `dtype` and `shape` [..., ids per row], the ids of a row
    distinct; retained: old ids, ascending; experts: how many there were. Survivors get their new
    id. A pruned expert gives way to the survivor at its old id modulo the kept count, or to the
    next one that its row does not hold yet, which spreads its tokens over the survivors.

    Raises FamilyError where the table is not of an integer type, names an expert beyond
    `experts`, or has rows longer than the experts that are left.
    """
    if dtype not in _ID_TYPES or len(shape) < 1 or shape[-1] > len(retained):
        problem = f"a table of expert ids of type {dtype} and shape {list(shape)}"
        raise FamilyError(name, f"{problem} cannot be renumbered for {len(retained)} experts")
    old = np.frombuffer(raw, _ID_TYPES[dtype]).reshape(-1, shape[-1])
    if old.size and not 0 <= int(old.min()) <= int(old.max()) < experts:
        raise FamilyError(name, f"holds expert ids from {old.min()} to {old.max()}")
    new_ids = np.full(experts, -1, dtype=np.int64)
    new_ids[list(retained)] = np.arange(len(retained))
    new = new_ids[old]
    for column in range(shape[-1]):
        _fill(new, old, column, len(retained))
    table: bytes = new.astype(_ID_TYPES[dtype]).tobytes()
    return table


def _fill(new: np.ndarray, old: np.ndarray, column: int, kept: int) -> None:
    """Give the rows whose expert in `column` is gone another that they do not hold yet."""
    rows = np.flatnonzero(new[:, column] < 0)
    candidate = old[rows, column] % kept
    while rows.size:
        taken = (new[rows] == candidate[:, None]).any(axis=1)
        new[rows[~taken], column] = candidate[~taken]
        rows, candidate = rows[taken], (candidate[taken] + 1) % kept


class SizeEstimate:
    """Kept count → bytes of the weight files, headers included.

    Never too few: header entries are counted with the source's expert ids, which are at least as
    large, and with the longest offsets that a result can have.
    """

    def __init__(self, checkpoint: Checkpoint, anatomy: Anatomy, mtp: MtpPolicy) -> None:
        self._checkpoint = checkpoint
        self._anatomy = anatomy
        self._mtp = mtp

    @cached_property
    def _entries(self) -> dict[int, int]:
        """Layer → bytes of its experts' header entries. Cached, since it looks at every tensor."""
        entries = dict.fromkeys(self._anatomy.experts_per_layer, 0)
        for table in self._checkpoint.tables:
            layer, expert = self._anatomy.reader.experts(table)
            nbytes = table.by_series([_entry_nbytes(each) for each in table.series])
            nbytes += _digits(expert) + 2 * self._longest
            for each in np.unique(layer[layer >= 0]).tolist():
                entries[each] += int(nbytes[layer == each].sum())
        return entries

    @property
    def _longest(self) -> int:
        """Digits of the largest offset that a tensor can have."""
        return len(str(self._checkpoint.total_size))

    @cached_property
    def _headers(self) -> int:
        """Bytes of all headers, if nothing were removed."""
        tables = self._checkpoint.tables
        headers = sum(shard.header.data_begin for shard in self._checkpoint.shards)
        # Where blocks can be shared the data may begin up to one later, for them to agree.
        blocks = sum(int(table.nbytes.max(initial=0)) >= BLOCK_NBYTES for table in tables)
        digits = sum(int((_digits(t.begin) + _digits(t.end)).sum()) for t in tables)
        longest = 2 * self._longest * self._checkpoint.num_tensors
        return headers + blocks * BLOCK_NBYTES + longest - digits

    def nbytes(self, kept: int | Mapping[int, int]) -> int:
        """Bytes of all weight files with `kept` experts in every MoE layer, or kept[layer]."""
        counts = {
            layer.index: kept if isinstance(kept, int) else kept.get(layer.index, layer.num_experts)
            for layer in self._anatomy.layers
        }
        if self._mtp is MtpPolicy.KEEP:
            counts |= {layer.index: layer.num_experts for layer in self._anatomy.mtp_layers}
        if self._mtp is MtpPolicy.DROP:
            counts |= dict.fromkeys((layer.index for layer in self._anatomy.mtp_layers), 0)
        data = self._anatomy.total_nbytes(counts, drop_mtp=self._mtp is MtpPolicy.DROP)
        others = self._headers - sum(self._entries.values())
        entries = 0
        for layer in self._anatomy.layers:
            whole = self._entries[layer.index]
            count = min(counts[layer.index], layer.num_experts)
            entries += -(-whole * count // layer.num_experts)
        return data + others + entries


def _entry_nbytes(series: Series) -> int:
    """Bytes of a tensor's entry in a compact header, without the digits of its numbers."""
    shape = ",".join(map(str, series.shape))
    frame = '"":{"dtype":"","shape":[],"data_offsets":[,]},'
    name = series.head + series.tail
    return len(frame) + len(name.encode()) + len(series.dtype) + len(shape)


def _digits(numbers: Column) -> Column:
    """How many digits each number has."""
    powers = 10 ** np.arange(1, 19)
    return np.searchsorted(powers, np.maximum(numbers, 0), side="right") + 1
