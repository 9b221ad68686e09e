"""Scores of expert weights: how large they are together, and AIMER; read from the shards.

Neither needs a calibration. Both are of sums over all an expert's weights, of their squares and of
their magnitudes; biases are left out. Matrices are read once, a chunk at a time, and decoded only
as far as these sums need: a byte of codes is looked up in a table, and a scale is squared once for
all the weights it covers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from shardsurgeon.checkpoint.anatomy import Anatomy
from shardsurgeon.checkpoint.checkpoint import Checkpoint
from shardsurgeon.checkpoint.quantization_schemes import block_size
from shardsurgeon.checkpoint.roles import ExpertTensor, Sliced
from shardsurgeon.checkpoint.shards import Shard
from shardsurgeon.errors import CheckpointError, FamilyError
from shardsurgeon.storage.formats.dtypes import Array, decode
from shardsurgeon.storage.formats.tensor_table import TensorRecord
from shardsurgeon.storage.phases import BYTES, phase

Place: TypeAlias = tuple[Shard, TensorRecord]
Floats = NDArray[np.float64]
# Which sums of powers of the weights' magnitudes.
Powers: TypeAlias = tuple[int, ...]

# Bytes of a tensor that are in memory at a time; as numbers they take a few times as much.
CHUNK_NBYTES = 1 << 20
FLOATS = ("BF16", "F16", "F32", "F64")

# Types of one byte per weight.
_BYTES = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "I8")
_PACKED = "weight_packed"
_SCALES = ("weight_scale_inv", "weight_scale", "scale")
# Tensors that say how activations are stored, and vectors beside the matrix.
_BESIDE = frozenset(
    ("bias", "input_scale", "input_zero_point", "input_global_scale", "output_scale")
)
# Keys under which a config says how many rows and columns share a scale, and the size that is
# tried where it does not.
_USUAL_BLOCK = 128
_CALIBRATE = "use scores from a calibration, or of the routers (`scores from-router`)"


class WeightCriterion(StrEnum):
    """What is said of an expert's weights: their norm, or how unevenly large they are."""

    NORM = "norm"
    AIMER = "aimer"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor, or an expert's slice of one. read: its bytes [begin, end), from its own 0."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    read: Callable[[int, int], bytes]

    def numbers(self) -> Array:
        """The whole tensor, decoded: for those that are small beside a weight."""
        return decode(self.dtype, self.read(0, self.nbytes)).reshape(self.shape)


@dataclass(frozen=True, slots=True)
class _Matrix:
    """One matrix of one expert. parts: last word of the name → tensor; nbytes: of all parts."""

    layer: int
    expert: int
    parts: dict[str, StoredTensor]
    nbytes: int


def weight_norms(checkpoint: Checkpoint, anatomy: Anatomy) -> dict[int, NDArray[np.float64]]:
    """The Euclidean norm of each expert's weights: layer → float64 [num_experts], ascending.

    Score of expert j: sqrt(sum over its matrices W of ||W||_F^2), in the units of the weights;
    quantized weights count as what they stand for. MTP layers are included.

    Raises FamilyError, naming a tensor, for a storage whose norm is not worked out here,
    CheckpointError where a matrix holds NaN or infinity, SourceReadError where it cannot be read.
    """
    sums = _expert_sums(checkpoint, anatomy, (2,))
    return {layer: np.sqrt(of_layer[:, 0]) for layer, of_layer in sums.items()}


def aimer_scores(checkpoint: Checkpoint, anatomy: Anatomy) -> dict[int, NDArray[np.float64]]:
    """1 - AIMER of each expert's weights: layer → float64 [num_experts], ascending.

    AIMER is the mean magnitude over the root mean square of an expert's N weights w,

        (sum of |w| / N) / sqrt(sum of w^2 / N),

    above 0 and at most 1, of all its matrices together; the experts where it is highest are pruned
    (Liu et al. 2026, arXiv 2603.18492, and the authors' code, github.com/ZongfangLiu/AIMER). Since
    a higher score stays here, its distance to 1 is given, from 0 to 1. An expert whose weights are
    all 0 gets 0, and goes first; in that code it would stay. Quantized weights count as what they
    stand for. MTP layers are included. Raises what `weight_norms` raises.
    """
    scores = {}
    for layer, sums in _expert_sums(checkpoint, anatomy, (0, 1, 2)).items():
        count, magnitudes, squares = sums.T
        level = np.sqrt(count * squares)
        ratio = np.divide(magnitudes, level, out=np.ones(len(sums)), where=level > 0)
        # Equal magnitudes give 1, and rounding a little more.
        scores[layer] = np.maximum(1 - ratio, 0.0)
    return scores


def _expert_sums(
    checkpoint: Checkpoint, anatomy: Anatomy, powers: Powers
) -> dict[int, NDArray[np.float64]]:
    """Layer → float64 [num_experts, powers]: sums over all weights of an expert, ascending."""
    sums = {n.index: np.zeros((n.num_experts, len(powers))) for n in anatomy.layers}
    block = block_size(checkpoint.settings)
    alone, stacked = _places(checkpoint, anatomy)
    total = sum(record.nbytes for places in alone.values() for _, record in places.values())
    total += sum(record.nbytes for _, record in stacked.values())
    with phase("reading experts", total, BYTES) as at:
        for matrix in _matrices(checkpoint, alone):
            sums[matrix.layer][matrix.expert] += power_sums(matrix.parts, block, powers)
            at.advance(matrix.nbytes)
        for (layer, _), (shard, record) in stacked.items():
            experts = len(sums[layer])
            sums[layer] += _stacked_sums(checkpoint, shard, record, experts, powers)
            at.advance(record.nbytes)
    return dict(sorted(sums.items()))


def _places(
    checkpoint: Checkpoint, anatomy: Anatomy
) -> tuple[dict[tuple[int, int, str], dict[str, Place]], dict[tuple[int, str], Place]]:
    """The tensors to read: (layer, expert, matrix) → last word of the name → tensor, and
    (layer, name) → tensor with the experts stacked. In the order of the shards, so that each
    file is read forwards."""
    alone: dict[tuple[int, int, str], dict[str, Place]] = {}
    stacked: dict[tuple[int, str], Place] = {}
    for shard in checkpoint.shards:
        for record in shard.header.tensors:
            role = anatomy.role(record)
            if isinstance(role, ExpertTensor):
                stem, _, leaf = record.name.rpartition(".")
                alone.setdefault((role.layer, role.expert, stem), {})[leaf] = shard, record
            elif isinstance(role, Sliced) and not role.is_router:
                if role.each == 1 and len(record.shape) < 3:
                    continue  # a vector for each expert
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


def _stacked_sums(
    checkpoint: Checkpoint, shard: Shard, record: TensorRecord, experts: int, powers: Powers
) -> NDArray[np.float64]:
    """The sums of each expert's slice of a tensor [experts, …], or of its rows in one
    [experts · rows, …]: float64 [experts, powers]."""
    whole = _stored(checkpoint, shard, record)
    if record.dtype not in FLOATS:
        raise not_readable(whole, [])
    each = record.nbytes // experts
    found = np.array([_plain(_slice(whole, e * each, each), powers) for e in range(experts)])
    finite = np.isfinite(found).all(1)
    if not finite.all():
        problem = f"expert {int(np.argmin(finite))} holds NaN or infinity"
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


def power_sums(
    parts: Mapping[str, StoredTensor], block: tuple[int, int] | None, powers: Powers
) -> Floats:
    """Sums of |w|^p over the weights w of one matrix, as the model computes with it.

    Result: float64 [powers], p of 0 (the number of weights), 1 or 2. With codes c, zero point z
    and scale s of a group, w = s * (c - z), and the group adds to the squares
    s^2 * (sum of c^2 - 2 * z * sum of c + n * z^2): only sums of codes are needed.

    parts: what the matrix is stored as, by the last word of each tensor's name: `weight` in
    floats; `weight` in FP8 or INT8 beside one scale, a scale per row or per block; or
    `weight_packed` with 4 or 8 bits beside `weight_scale`, `weight_shape` and perhaps
    `weight_zero_point`. block: rows and columns per scale that the config names, None where it
    does not. Raises FamilyError, naming a tensor, for anything else, CheckpointError where the
    matrix holds NaN or infinity.
    """
    held = {leaf: tensor for leaf, tensor in parts.items() if leaf not in _BESIDE}
    if _PACKED in held:
        weight, total = held[_PACKED], _packed(held, powers)
    elif not held:
        return np.zeros(len(powers))
    else:
        weight = held["weight"] if "weight" in held else next(iter(held.values()))
        scales = [held[leaf] for leaf in _SCALES if leaf in held]
        if "weight" in held and len(held) == 1 and weight.dtype in FLOATS:
            total = _plain(weight, powers)
        elif len(held) == 2 and len(scales) == 1 and weight.dtype in _BYTES:
            total = _scaled(weight, scales[0], block, powers)
        else:
            raise not_readable(weight, sorted(held))
    if not np.isfinite(total).all():
        raise CheckpointError(weight.name, "holds NaN or infinity", "fetch the shard again")
    return total


def _power(numbers: Array, power: int) -> Array:
    """|numbers|^power, for a power of 0, 1 or 2; every number's power of 0 is 1."""
    if power == 0:
        return np.ones_like(numbers)
    return np.square(numbers) if power == 2 else np.abs(numbers)


def _plain(weight: StoredTensor, powers: Powers) -> Floats:
    """The sums of a tensor of floats; not finite where the tensor is not."""
    total = np.zeros(len(powers))
    for begin in range(0, weight.nbytes, CHUNK_NBYTES):
        raw = weight.read(begin, min(begin + CHUNK_NBYTES, weight.nbytes))
        numbers = decode(weight.dtype, raw)
        for at, power in enumerate(powers):
            if power == 2:
                # Not np.dot: starting its threads takes longer than they save on a chunk.
                total[at] += float(np.einsum("i,i", numbers, numbers))
            else:
                total[at] += float(_power(numbers, power).sum())
    return total


def not_readable(weight: StoredTensor, leaves: list[str]) -> FamilyError:
    """The error for a storage whose norm is not worked out here."""
    beside = f" ({', '.join(leaves)[:80]})" if len(leaves) > 1 else ""
    problem = f"is stored as {weight.dtype} {list(weight.shape)}{beside}, of which no norm is taken"
    return FamilyError(weight.name, problem, _CALIBRATE)


def _scaled(
    weight: StoredTensor, scale: StoredTensor, block: tuple[int, int] | None, powers: Powers
) -> Floats:
    """One byte per weight; every scale covers some rows and columns."""
    # MX formats spell a power of two as a bare byte.
    scale = replace(scale, dtype="F8_E8M0") if scale.dtype == "U8" else scale
    known = FLOATS if weight.dtype == "I8" else (*FLOATS, "F8_E8M0")
    if len(weight.shape) != 2 or len(scale.shape) > 2 or scale.dtype not in known:
        raise not_readable(weight, ["weight", f"scale {scale.dtype}"])
    rows, columns = weight.shape
    factors = np.atleast_1d(scale.numbers())
    grid = factors.reshape(len(factors), -1)
    given = block if block is not None else (None, None)
    high, wide = (
        _covered(weight, *known) for known in zip(weight.shape, grid.shape, given, strict=True)
    )
    numbers = decode(weight.dtype, bytes(range(256)))
    pairs = [(_power(numbers, power), _power(grid, power)) for power in powers]
    starts = np.arange(0, columns, wide)
    total = np.zeros(len(powers))
    for first, raw in _row_chunks(weight, rows, columns):
        covering = np.arange(first, first + len(raw)) // high
        for at, (table, scales) in enumerate(pairs):
            sums = np.add.reduceat(table[raw], starts, axis=1)
            total[at] += float((sums * scales[covering]).sum())
    return total


def _covered(weight: StoredTensor, size: int, count: int, block: int | None) -> int:
    """How many of `size` rows or columns one of `count` scales covers.

    block: what the config says. Raises FamilyError where no regular grid fits.
    """
    for guess in (block, _USUAL_BLOCK):
        if guess is not None and count > 1 and -(-size // guess) == count:
            return guess
    if size % count == 0:
        return size // count
    problem = f"has {size} rows or columns for {count} scales"
    raise FamilyError(weight.name, problem, _CALIBRATE)


def _packed(held: Mapping[str, StoredTensor], powers: Powers) -> Floats:
    """compressed-tensors' words of 32 bits, the first weight in the lowest bits."""
    words = held[_PACKED]
    known = {_PACKED, "weight_scale", "weight_shape", "weight_zero_point"}
    if not {_PACKED, "weight_scale", "weight_shape"} <= held.keys() <= known:
        raise not_readable(words, sorted(held))
    layout = _layout(words, held["weight_shape"], held["weight_scale"])
    scale = held["weight_scale"].numbers().astype(np.float64)
    scale = scale.reshape(layout.rows, layout.groups)
    zeros = held.get("weight_zero_point")
    points = None if zeros is None else _zero_points(zeros, layout)
    total = np.zeros(len(powers))
    for first, raw in _row_chunks(words, layout.rows, words.shape[1] * 4):
        codes, here = layout.codes(raw), slice(first, first + len(raw))
        for at, power in enumerate(powers):
            if power == 0:
                total[at] += len(raw) * layout.columns
                continue
            sums = layout.summed(codes, None if points is None else points[here], power)
            total[at] += float((sums * _power(scale[here], power)).sum())
    return total


@dataclass(frozen=True, slots=True)
class _Layout:
    """rows × columns codes of `bits` bits, `groups` scales per row."""

    rows: int
    columns: int
    bits: int
    groups: int

    @property
    def group_size(self) -> int:
        return self.columns // self.groups

    def codes(self, raw: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The bytes of each row that hold codes, padding made to mean 0."""
        used = raw[:, : -(-self.columns * self.bits // 8)]
        if self.columns * self.bits % 8:
            used = used.copy()
            used[:, -1] = used[:, -1] & 0x0F | 0x80
        return used

    def summed(self, codes: NDArray[np.uint8], points: Floats | None, power: int) -> Floats:
        """The sum of |code - zero point|^power, power 1 or 2, per group: float64 [rows, groups]."""
        if points is None:
            return self.grouped(codes, self.squares if power == 2 else self.magnitudes)
        if power == 2:
            squares, sums = self.grouped(codes, self.squares), self.grouped(codes, self.sums)
            return squares - 2 * points * sums + self.group_size * points * points
        signed = codes.astype(np.int16) - 128
        if self.bits == 4:
            signed = np.stack([codes & 15, codes >> 4], axis=2).astype(np.int16) - 8
        groups = signed.reshape(len(codes), -1)[:, : self.columns]
        groups = groups.reshape(len(codes), self.groups, -1)
        return np.asarray(np.abs(groups - points[:, :, None]).sum(axis=2))

    def grouped(self, codes: NDArray[np.uint8], table: NDArray[np.int32]) -> Floats:
        """The sum per group of `table[code]`, table: byte → number: float64 [rows, groups]."""
        if codes.shape[1] // self.groups % 2 == 0:
            # Two bytes at a time: half the look-ups.
            pairs = np.ascontiguousarray(codes).view("<u2")
            found = (table[:, None] + table[None, :]).reshape(-1)[pairs]
        else:
            found = table[codes]
        grouped = found.reshape(len(codes), self.groups, -1)
        return np.asarray(grouped.sum(axis=2, dtype=np.int64), np.float64)

    @property
    def sums(self) -> NDArray[np.int32]:
        """Byte → sum of the signed values of its codes."""
        every = np.arange(256, dtype=np.int32)
        return every - 128 if self.bits == 8 else (every & 15) + (every >> 4) - 16

    @property
    def magnitudes(self) -> NDArray[np.int32]:
        """Byte → sum of the magnitudes of its codes' signed values."""
        every = np.arange(256, dtype=np.int32)
        if self.bits == 8:
            return np.asarray(np.abs(every - 128))
        return np.asarray(np.abs((every & 15) - 8) + np.abs((every >> 4) - 8))

    @property
    def squares(self) -> NDArray[np.int32]:
        """Byte → sum of the squares of its codes' signed values."""
        every = np.arange(256, dtype=np.int32)
        if self.bits == 8:
            return (every - 128) ** 2
        return ((every & 15) - 8) ** 2 + ((every >> 4) - 8) ** 2


def _layout(words: StoredTensor, shape: StoredTensor, scale: StoredTensor) -> _Layout:
    leaves = [_PACKED, "weight_scale", "weight_shape"]
    if len(words.shape) != 2 or words.dtype != "I32" or shape.shape != (2,):
        raise not_readable(words, leaves)
    rows, columns = (int(size) for size in shape.numbers())
    fitting = [bits for bits in (4, 8) if -(-columns * bits // 32) == words.shape[1]]
    groups = scale.shape[1] if len(scale.shape) == 2 else 1
    held = words.shape[0] == rows == scale.shape[0] and scale.dtype in FLOATS
    if not fitting or not held or columns < 1 or columns % groups:
        raise not_readable(words, leaves)
    layout = _Layout(rows, columns, fitting[0], groups)
    if groups > 1 and layout.group_size * layout.bits % 8:
        raise not_readable(words, leaves)
    return layout


def _zero_points(zeros: StoredTensor, layout: _Layout) -> Floats:
    """Signed zero points, float64 [rows, groups]; packed along the rows, or one per byte."""
    shape = (layout.rows, layout.groups)
    if zeros.dtype == "I8" and zeros.shape == shape:
        return np.asarray(zeros.numbers(), np.float64)
    per_word = 32 // layout.bits
    if zeros.dtype != "I32" or zeros.shape != (-(-layout.rows // per_word), layout.groups):
        raise not_readable(zeros, ["weight_zero_point"])
    words = zeros.numbers().astype(np.int64)
    shifts = np.arange(per_word, dtype=np.int64)[None, :, None] * layout.bits
    points = (words[:, None, :] >> shifts) & ((1 << layout.bits) - 1)
    points = points.reshape(-1, layout.groups)[: layout.rows] - (1 << (layout.bits - 1))
    return np.asarray(points, np.float64)


def _row_chunks(
    tensor: StoredTensor, rows: int, row_nbytes: int
) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """(first row, bytes [rows of the chunk, row_nbytes]), as many rows as make a chunk."""
    count = max(1, CHUNK_NBYTES // max(1, row_nbytes))
    for first in range(0, rows, count):
        last = min(rows, first + count)
        raw = tensor.read(first * row_nbytes, last * row_nbytes)
        yield first, np.frombuffer(raw, np.uint8).reshape(last - first, row_nbytes)
