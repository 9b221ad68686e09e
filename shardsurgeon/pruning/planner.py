"""Anatomy and keep-lists become output shards: headers and byte ranges. Pure.

Also here: tables that map tokens to experts, whose values change with the numbering, and the size
of a result before it is planned.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from shardsurgeon.checkpoint.anatomy import Anatomy
from shardsurgeon.checkpoint.checkpoint import Checkpoint, Shard
from shardsurgeon.checkpoint.roles import (
    Carried,
    Counted,
    ExpertTensor,
    Role,
    Sliced,
    Surplus,
    Tabled,
)
from shardsurgeon.errors import FamilyError
from shardsurgeon.execution.plan import Literal, OutputShard, OutputTensor, Segment
from shardsurgeon.pruning.keep_lists import KeepList
from shardsurgeon.storage.formats.safetensors import (
    DTYPE_BITS,
    TensorRecord,
    build_header,
    layout_key,
)

_LITTLE_ENDIAN_COUNTS = {"I32": 4, "I64": 8, "U32": 4, "U64": 8}

_WIDTHS = {"I32": "<i4", "I64": "<i8"}


@dataclass(frozen=True, slots=True)
class _Draft:
    """An output shard before the number of shards, and so its name, is known."""

    tensors: tuple[OutputTensor, ...]
    metadata: dict[str, str] | None


def plan_shards(
    checkpoint: Checkpoint,
    anatomy: Anatomy,
    keep: KeepList,
    *,
    tables: Mapping[str, bytes] | None = None,
    drop_mtp: bool = False,
    max_shard_nbytes: int | None = None,
) -> tuple[OutputShard, ...]:
    """The output shards of a prune.

    tables: new content of the tensors that hold expert ids, by name (`idtables` makes it).
    max_shard_nbytes: repack into shards of at most so many bytes of tensor data (a larger
    tensor gets a shard of its own); None keeps the source's cutting, less the shards that
    hold nothing any more.
    """
    surgeon = _Planner(checkpoint, anatomy, keep, tables or {}, drop_mtp)
    if max_shard_nbytes is None:
        drafts = [
            _Draft(tensors, shard.header.metadata)
            for shard in checkpoint.shards
            if (tensors := tuple(surgeon.operate(shard)))
        ]
    else:
        drafts = list(_repack(surgeon, checkpoint.shards, max_shard_nbytes))
    return tuple(
        _finish(draft, shard_name(number, len(drafts)))
        for number, draft in enumerate(drafts, start=1)
    )


def shard_name(number: int, total: int) -> str:
    """The file name of shard `number` (from 1) of `total`."""
    if total == 1:
        return "model.safetensors"
    return f"model-{number:05d}-of-{total:05d}.safetensors"


def _finish(draft: _Draft, file: str) -> OutputShard:
    """Lay a shard out: wider dtypes first, then source order."""
    tensors = tuple(sorted(draft.tensors, key=lambda tensor: layout_key(tensor.dtype)))
    header = build_header([(t.name, t.dtype, t.shape, t.nbytes) for t in tensors], draft.metadata)
    return OutputShard(file, header, tensors)


def _repack(surgeon: _Planner, shards: tuple[Shard, ...], limit: int) -> Iterator[_Draft]:
    """Fill shards in source order up to `limit` bytes of tensor data each."""
    tensors: list[OutputTensor] = []
    metadata: dict[str, str] | None = None
    filled = 0
    for shard in shards:
        for tensor in surgeon.operate(shard):
            if tensors and filled + tensor.nbytes > limit:
                yield _Draft(tuple(tensors), metadata)
                tensors, metadata, filled = [], None, 0
            tensors.append(tensor)
            filled += tensor.nbytes
            # Shards of one model say the same (`format: pt`); where not, the first one holds.
            if shard.header.metadata is not None:
                metadata = {**shard.header.metadata, **(metadata or {})}
    if tensors:
        yield _Draft(tuple(tensors), metadata)


class _Planner:
    """Applies keep-lists to the tensors of one shard after the other."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        anatomy: Anatomy,
        keep: KeepList,
        tables: Mapping[str, bytes],
        drop_mtp: bool,
    ) -> None:
        self._checkpoint = checkpoint
        self._anatomy = anatomy
        self._tables = tables
        self._drop_mtp = drop_mtp
        self._retained = {layer: kept.retained for layer, kept in keep.layers.items()}
        self._new_ids = {
            layer: {old: new for new, old in enumerate(retained)}
            for layer, retained in self._retained.items()
        }

    def operate(self, shard: Shard) -> Iterator[OutputTensor]:
        """The tensors that a source shard gives to the output, in source order."""
        begin = shard.header.data_begin
        for record in shard.header.tensors:
            tensor = self._operate(record, shard.file, begin + record.begin)
            if tensor is not None:
                yield tensor

    def _operate(self, record: TensorRecord, file: str, begin: int) -> OutputTensor | None:
        role = self._anatomy.role(record)
        whole = Segment(file, begin, record.nbytes)
        if self._drop_mtp and self._goes_with_mtp(role):
            return None
        if isinstance(role, Carried):
            return OutputTensor(record.name, record.dtype, record.shape, (whole,))
        if isinstance(role, ExpertTensor):
            new_id = self._new_ids[role.layer].get(role.expert)
            if new_id is None:
                return None
            name = role.renamed(record.name, new_id)
            return OutputTensor(name, record.dtype, record.shape, (whole,))
        if isinstance(role, Surplus):
            before = self._anatomy.reader.experts_of(role.layer)
            removed = before - len(self._retained[role.layer])
            name = role.renamed(record.name, role.expert - removed)
            return OutputTensor(name, record.dtype, record.shape, (whole,))
        if isinstance(role, Tabled):
            table = Literal(self._tables[record.name])
            return OutputTensor(record.name, record.dtype, record.shape, (table,))
        if isinstance(role, Counted):
            return self._recount(record, file, begin, len(self._retained[role.layer]))
        return _slice(record, whole, role, self._retained[role.layer])

    def _goes_with_mtp(self, role: Role) -> bool:
        if isinstance(role, Carried):
            return role.mtp
        return role.layer >= self._anatomy.num_layers

    def _recount(self, record: TensorRecord, file: str, begin: int, kept: int) -> OutputTensor:
        """The tensor with its first element, the expert count, made new."""
        width = _LITTLE_ENDIAN_COUNTS[record.dtype]
        rest = Segment(file, begin + width, record.nbytes - width)
        count = Literal(kept.to_bytes(width, "little"))
        return OutputTensor(record.name, record.dtype, record.shape, (count, rest))


def _slice(
    record: TensorRecord, whole: Segment, role: Sliced, retained: tuple[int, ...]
) -> OutputTensor:
    """The retained rows along the expert axis, and the tail behind them."""
    rows = record.shape[role.axis]
    outer = math.prod(record.shape[: role.axis])
    inner_bits = math.prod(record.shape[role.axis + 1 :]) * DTYPE_BITS[record.dtype]
    row_nbytes, ragged = divmod(inner_bits, 8)
    if ragged:
        problem = f"an expert's row takes {inner_bits:,} bits, which are no whole bytes"
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
    kept = len(retained) + role.tail
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


def weight_map(shards: tuple[OutputShard, ...]) -> Mapping[str, str]:
    """Tensor name → file name, as the index lists them."""
    return {tensor.name: shard.file for shard in shards for tensor in shard.tensors}


def remapped(
    name: str,
    dtype: str,
    shape: tuple[int, ...],
    raw: bytes,
    retained: tuple[int, ...],
    experts: int,
) -> bytes:
    """The table of old ids `raw`, of `dtype` and `shape` [..., ids per row], in new ids.

    Raises FamilyError where the table is of no integer type, names an expert beyond
    `experts`, or has rows longer than the experts that are left.
    """
    if dtype not in _WIDTHS or len(shape) < 1 or shape[-1] > len(retained):
        problem = f"a table of expert ids of type {dtype} and shape {list(shape)}"
        raise FamilyError(name, f"{problem} cannot be renumbered for {len(retained)} experts")
    old = np.frombuffer(raw, _WIDTHS[dtype]).reshape(-1, shape[-1])
    if old.size and not 0 <= int(old.min()) <= int(old.max()) < experts:
        raise FamilyError(name, f"holds expert ids from {old.min()} to {old.max()}")
    new_ids = np.full(experts, -1, dtype=np.int64)
    new_ids[list(retained)] = np.arange(len(retained))
    new = new_ids[old]
    for column in range(shape[-1]):
        _fill(new, old, column, len(retained))
    table: bytes = new.astype(_WIDTHS[dtype]).tobytes()
    return table


def _fill(new: np.ndarray, old: np.ndarray, column: int, kept: int) -> None:
    """Give the rows whose expert in `column` is gone another that they do not hold yet."""
    rows = np.flatnonzero(new[:, column] < 0)
    candidate = old[rows, column] % kept
    while rows.size:
        taken = (new[rows] == candidate[:, None]).any(axis=1)
        new[rows[~taken], column] = candidate[~taken]
        rows, candidate = rows[taken], (candidate[taken] + 1) % kept


def expert_id_tables(checkpoint: Checkpoint, anatomy: Anatomy, keep: KeepList) -> dict[str, bytes]:
    """New content of every tensor whose values are expert ids, by name.

    Tables of layers without a keep-list (dropped MTP layers) are left out. Raises FamilyError
    where a table cannot be renumbered.
    """
    tables: dict[str, bytes] = {}
    if not anatomy.family.tensors.expert_ids:
        return tables
    for shard in checkpoint.shards:
        for record in shard.header.tensors:
            role = anatomy.role(record)
            if isinstance(role, Tabled) and role.layer in keep.layers:
                kept = keep.layers[role.layer]
                raw = _content(checkpoint, shard, record)
                tables[record.name] = remapped(
                    record.name, record.dtype, record.shape, raw, kept.retained, kept.num_experts
                )
    return tables


def _content(checkpoint: Checkpoint, shard: Shard, record: TensorRecord) -> bytes:
    begin = shard.header.data_begin
    return checkpoint.source.read(shard.file, begin + record.begin, begin + record.end)


class SizeEstimate:
    """Kept count → bytes of the weight files, headers included.

    Never too few: header entries are counted as long as they are in the source, where expert
    ids and offsets are at least as large.
    """

    def __init__(self, checkpoint: Checkpoint, anatomy: Anatomy, *, drop_mtp: bool) -> None:
        self._checkpoint = checkpoint
        self._anatomy = anatomy
        self._drop_mtp = drop_mtp

    @cached_property
    def _entries(self) -> dict[int, int]:
        """Layer → bytes of its experts' header entries. A look at every tensor: not for nothing."""
        entries = dict.fromkeys(self._anatomy.experts_per_layer, 0)
        for shard in self._checkpoint.shards:
            for record in shard.header.tensors:
                role = self._anatomy.role(record)
                if isinstance(role, ExpertTensor):
                    entries[role.layer] += _entry_nbytes(record)
        return entries

    def nbytes(self, kept: int | Mapping[int, int]) -> int:
        """Bytes of all weight files with `kept` experts in every MoE layer, or kept[layer]."""
        data = self._anatomy.total_nbytes(kept, drop_mtp=self._drop_mtp)
        headers = sum(shard.header.data_begin for shard in self._checkpoint.shards)
        others = headers - sum(self._entries.values())
        entries = 0
        for layer in self._anatomy.layers:
            whole = self._entries[layer.index]
            count = kept if isinstance(kept, int) else kept.get(layer.index, layer.num_experts)
            entries += -(-whole * min(count, layer.num_experts) // layer.num_experts)
        return data + others + entries


def _entry_nbytes(record: TensorRecord) -> int:
    """Bytes of a tensor's entry in a compact header."""
    shape = ",".join(map(str, record.shape))
    offsets = f"{record.begin},{record.end}"
    frame = '"":{"dtype":"","shape":[],"data_offsets":[]},'
    return len(frame) + len(record.name) + len(record.dtype) + len(shape) + len(offsets)
