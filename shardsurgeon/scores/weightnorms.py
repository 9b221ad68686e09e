"""Expert weight norms: how large each expert's matrices are together, read from the shards.

A score that needs no calibration: the square root of the sum of squares of all an expert's
weights. Biases are left out. The weights stream through, a piece of a tensor at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from shardsurgeon.checkpoint.anatomy import Anatomy
from shardsurgeon.checkpoint.checkpoint import Checkpoint, Shard
from shardsurgeon.checkpoint.roles import ExpertTensor, Sliced
from shardsurgeon.errors import CheckpointError
from shardsurgeon.scores.storedweights import (
    FLOATS,
    StoredTensor,
    not_readable,
    plain_squares,
    sum_of_squares,
)
from shardsurgeon.storage.formats.safetensors import TensorRecord

Place: TypeAlias = tuple[Shard, TensorRecord]

_BLOCK_KEYS = ("weight_block_size", "block_structure")


@dataclass(frozen=True, slots=True)
class _Matrix:
    """One matrix of one expert. parts: last word of the name → tensor; nbytes: of all parts."""

    layer: int
    expert: int
    parts: dict[str, StoredTensor]
    nbytes: int


def weight_norms(
    checkpoint: Checkpoint,
    anatomy: Anatomy,
    on_bytes: Callable[[int, int], None] | None = None,
) -> dict[int, NDArray[np.float64]]:
    """The Euclidean norm of each expert's weights: layer → float64 [num_experts], ascending.

    MTP layers too. Quantized weights count as what they stand for. on_bytes: hears after each
    matrix how many bytes of how many are read. Raises FamilyError, naming a tensor, for a
    storage whose norm is not worked out, CheckpointError where one holds NaN or infinity.
    """
    squares = {layer.index: np.zeros(layer.num_experts) for layer in anatomy.layers}
    block = _block_size(checkpoint.settings)
    alone, stacked = _places(checkpoint, anatomy)
    total = sum(record.nbytes for places in alone.values() for _, record in places.values())
    total += sum(record.nbytes for _, record in stacked.values())
    done = 0
    for matrix in _matrices(checkpoint, alone):
        squares[matrix.layer][matrix.expert] += sum_of_squares(matrix.parts, block)
        done += matrix.nbytes
        if on_bytes is not None:
            on_bytes(done, total)
    for (layer, _), (shard, record) in stacked.items():
        squares[layer] += _stacked_squares(checkpoint, shard, record)
        done += record.nbytes
        if on_bytes is not None:
            on_bytes(done, total)
    return {layer: np.sqrt(row) for layer, row in sorted(squares.items())}


def _places(
    checkpoint: Checkpoint, anatomy: Anatomy
) -> tuple[dict[tuple[int, int, str], dict[str, Place]], dict[tuple[int, str], Place]]:
    """(layer, expert, matrix) → last word → tensor; (layer, name) → stacked tensor. In the
    order of the shards, so that reading them goes forward."""
    alone: dict[tuple[int, int, str], dict[str, Place]] = {}
    stacked: dict[tuple[int, str], Place] = {}
    for shard in checkpoint.shards:
        for record in shard.header.tensors:
            role = anatomy.role(record)
            if isinstance(role, ExpertTensor):
                stem, _, leaf = record.name.rpartition(".")
                alone.setdefault((role.layer, role.expert, stem), {})[leaf] = shard, record
            elif isinstance(role, Sliced) and not role.is_router and len(record.shape) > 2:
                if role.axis:
                    raise not_readable(_stored(checkpoint, shard, record), [])
                stacked[role.layer, record.name] = shard, record
    return alone, stacked


def _matrices(
    checkpoint: Checkpoint, alone: Mapping[tuple[int, int, str], Mapping[str, Place]]
) -> Iterator[_Matrix]:
    for (layer, expert, _), places in alone.items():
        parts = {leaf: _stored(checkpoint, *place) for leaf, place in places.items()}
        yield _Matrix(layer, expert, parts, sum(record.nbytes for _, record in places.values()))


def _stacked_squares(
    checkpoint: Checkpoint, shard: Shard, record: TensorRecord
) -> NDArray[np.float64]:
    """Of each expert's slice of a tensor [experts, …]: float64 [experts]."""
    whole = _stored(checkpoint, shard, record)
    if record.dtype not in FLOATS:
        raise not_readable(whole, [])
    experts = record.shape[0]
    each = record.nbytes // experts
    found = np.array([plain_squares(_slice(whole, e * each, each)) for e in range(experts)])
    if not np.isfinite(found).all():
        problem = f"expert {int(np.argmin(np.isfinite(found)))} holds NaN or infinity"
        raise CheckpointError(record.name, problem, "fetch the shard again")
    return found


def _stored(checkpoint: Checkpoint, shard: Shard, record: TensorRecord) -> StoredTensor:
    start = shard.header.data_begin + record.begin

    def read(begin: int, end: int) -> bytes:
        return checkpoint.source.read(shard.file, start + begin, start + end)

    return StoredTensor(record.name, record.dtype, record.shape, record.nbytes, read)


def _slice(whole: StoredTensor, start: int, nbytes: int) -> StoredTensor:
    def read(begin: int, end: int) -> bytes:
        return whole.read(start + begin, start + end)

    return StoredTensor(whole.name, whole.dtype, whole.shape[1:], nbytes, read)


def _block_size(node: Any) -> tuple[int, int] | None:
    """Rows and columns per scale that the config names anywhere; None where it does not."""
    if not isinstance(node, Mapping):
        return None
    for key, item in node.items():
        if key in _BLOCK_KEYS and isinstance(item, list) and len(item) == 2:
            rows, columns = item
            if type(rows) is int and type(columns) is int and min(item) > 0:
                return rows, columns
        found = _block_size(item)
        if found is not None:
            return found
    return None
