"""Stored weights as numbers: plain, FP8, INT8, packed integers, FP4, FP6.

A storage form is recognised by its names and dtypes, as in `checkpoint.quantization`. Activations
are not quantized: a layer computes with dequantized weights and unquantized inputs. A packed INT4
weight can stay packed while transformers' own code multiplies with it: `shardsurgeon_kernels` does
the multiplication.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from shardsurgeon.checkpoint.config import quantization_sections
from shardsurgeon.checkpoint.quantization_schemes import QuantizationSchemes, Shape, packed_words
from shardsurgeon.errors import FamilyError
from shardsurgeon.layerwise.tensors import DTYPES, Tensors
from shardsurgeon.storage.formats.tensor_table import TensorRecord

if TYPE_CHECKING:
    from shardsurgeon_kernels import PackedInt4

# The values of FP4 (E2M1) without sign, by the OCP Microscaling Formats specification.
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# AutoAWQ interleaves the eight values of a word: value i is the nibble _AWQ_PLACES[i].
_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)

_FLOATS = ("F64", "F32", "F16", "BF16")
_EIGHT_BITS = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "I8", "U8")


@dataclass(frozen=True, slots=True)
class PackedInteger:
    """A weight in compressed-tensors' pack-quantized layout.

    packed: int32 [..., out, words], the lowest bits of a word first; scale: [..., out, groups];
    zero_point: as the format stores it, int32 packed along the outputs or int8 [..., out,
    groups], or None; order: int64 [in], the group of each input, or None where a group is
    group_size consecutive inputs (None: the whole row); shape: the weight's, [..., out, in].
    """

    packed: Tensor
    scale: Tensor
    zero_point: Tensor | None
    order: Tensor | None
    bits: int
    group_size: int | None
    shape: tuple[int, ...]

    @property
    def has_kernel(self) -> bool:
        """Whether the kernels know the layout: four bits, consecutive groups, one matrix."""
        return self.bits == 4 and self.order is None and math.prod(self.shape[:-2]) == 1

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight (q - zero_point) · scale, [..., out, in] of `dtype`."""
        if self.has_kernel:
            from shardsurgeon_kernels import dequantize

            return dequantize(self.for_kernels(), dtype).reshape(self.shape)
        *_, rows, columns = self.shape
        values = _unpacked(self.packed, self.bits, columns).float()
        order = self.order
        if order is None:
            order = torch.arange(columns, device=values.device) // (self.group_size or columns)
        if self.zero_point is not None:
            zeros = self.zero_point
            if zeros.dtype == torch.int32 and zeros.shape != self.scale.shape:
                across = zeros.transpose(-1, -2)
                zeros = _unpacked(across, self.bits, rows).transpose(-1, -2)
            values = values - zeros.float()[..., order]
        return (values * self.scale.float()[..., order]).to(dtype)

    def for_kernels(self) -> PackedInt4:
        """The same weight as the kernels take it; only where `has_kernel`."""
        from shardsurgeon_kernels import PackedInt4

        out, inputs = self.shape[-2:]
        zeros = self.zero_point
        return PackedInt4(
            packed=self.packed.flatten(0, -2),
            scale=self.scale.reshape(out, -1),
            zero_point=zeros.flatten(0, -2) if zeros is not None else None,
            shape=(out, inputs),
            group_size=self.group_size,
        )


def _unpacked(words: Tensor, bits: int, width: int) -> Tensor:
    """Signed integers [..., width] from words along the last axis, the lowest bits first."""
    shifts = torch.arange(0, 32, bits, device=words.device)
    values = (words[..., None] >> shifts) & ((1 << bits) - 1)
    return values.flatten(-2)[..., :width] - (1 << (bits - 1))


def fp4(stored: Tensor) -> Tensor:
    """FP4 (E2M1) pairs in bytes [..., n], the first value in the low half → float32 [..., 2n]."""
    table = torch.tensor([*_FP4, *(-value for value in _FP4)], device=stored.device)
    # Some checkpoints store the same bytes as int8 or float8.
    codes = stored.view(torch.uint8)
    pairs = torch.stack([codes & 15, codes >> 4], dim=-1)
    return table[pairs.flatten(-2).int()]


def fp6(packed: Tensor) -> Tensor:
    """FP6 (E2M3), four values in three bytes: uint8 [..., 3n] → float32 [..., 4n]."""
    parts = packed.unflatten(-1, (-1, 3)).int()
    word = parts[..., 0] | parts[..., 1] << 8 | parts[..., 2] << 16
    codes = torch.stack([word >> shift & 63 for shift in (0, 6, 12, 18)], dim=-1).flatten(-2)
    return _fp6_values().to(packed.device)[codes]


@cache
def _fp6_values() -> Tensor:
    subnormal = [step / 8 for step in range(8)]
    normal = [(1 + step / 8) * 2**power for power in range(3) for step in range(8)]
    positive = [*subnormal, *normal]
    return torch.tensor([*positive, *(-value for value in positive)])


def powers(exponents: Tensor) -> Tensor:
    """E8M0 scales stored as bytes: 2^(byte - 127)."""
    return torch.exp2(exponents.float() - 127)


def awq(qweight: Tensor, qzeros: Tensor | None, scales: Tensor) -> Tensor:
    """AutoAWQ: int32 words [in, out / 8], zero points [groups, out / 8], scales [groups, out] →
    (q - zero_point) · scale, float32 [out, in]. qzeros: None for 8."""
    inputs, groups = qweight.shape[0], scales.shape[0]
    values = _awq_integers(qweight)
    order = torch.arange(inputs, device=values.device) // -(-inputs // groups)
    zeros = _awq_integers(qzeros) if qzeros is not None else torch.full_like(values[:groups], 8)
    return ((values - zeros[order]) * scales.float()[order]).t().contiguous()


def _awq_integers(words: Tensor) -> Tensor:
    values = (words[..., None] >> torch.arange(0, 32, 4, device=words.device)) & 15
    return values[..., list(_AWQ_PLACES)].flatten(-2).float()


def gptq(
    qweight: Tensor,
    qzeros: Tensor | None,
    scales: Tensor,
    order: Tensor | None,
    bits: int,
    *,
    plus_one: bool,
) -> Tensor:
    """GPTQ: (q - zero_point) · scale, float32 [out, in].

    qweight: int32 words [in · bits / 32, out]; qzeros: int32 words [groups, out · bits / 32],
    None for 2^(bits - 1); scales: [groups, out]; order: int64 [in], the group of each input,
    None for consecutive groups; plus_one: whether 1 is to be added to the stored zero points.
    """
    shifts = torch.arange(0, 32, bits, device=qweight.device)
    top = (1 << bits) - 1
    values = ((qweight[:, None, :] >> shifts[:, None]) & top).flatten(0, 1).float()
    if order is None:
        inputs, groups = values.shape[0], scales.shape[0]
        order = torch.arange(inputs, device=values.device) // -(-inputs // groups)
    if qzeros is None:
        zeros = torch.full_like(scales, 1 << (bits - 1), dtype=torch.float32)
    else:
        stored = ((qzeros[:, :, None] >> shifts) & top).flatten(1)
        zeros = ((stored + int(plus_one)) & top).float()
    return ((values - zeros[order]) * scales.float()[order]).t().contiguous()


class PackedWeight:
    """Packed matrices, one below the other, used instead of a parameter [1, out, in].

    Indexed with anything, it is the weight [out, in] of `torch.nn.functional.linear`, which then
    multiplies by the packed matrices; any other function of torch gets the unpacked weight.
    """

    def __init__(self, parts: Sequence[PackedInteger], dtype: torch.dtype) -> None:
        self._parts = [part.for_kernels() for part in parts]
        self._whole = list(parts)
        self.dtype = dtype

    @property
    def shape(self) -> tuple[int, int, int]:
        """The parameter's shape, [1, out, in]."""
        return 1, sum(part.shape[0] for part in self._parts), self._parts[0].shape[1]

    def __getitem__(self, expert: object) -> PackedWeight:
        return self

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: Sequence[type],
        arguments: tuple[Any, ...] = (),
        named: dict[str, Any] | None = None,
    ) -> Any:
        named = named or {}
        weight = arguments[1] if len(arguments) > 1 else None
        if function is functional.linear and isinstance(weight, cls) and not named:
            return weight.times(*arguments[:1], *arguments[2:])
        unpacked = [item.unpacked() if isinstance(item, cls) else item for item in arguments]
        return function(*unpacked, **named)

    def times(self, inputs: Tensor, bias: Tensor | None = None) -> Tensor:
        """inputs [N, in] times the weight's transpose: [N, out]."""
        from shardsurgeon_kernels import linear

        made = torch.cat([linear(inputs, part) for part in self._parts], dim=-1)
        return made if bias is None else made + bias

    def joined(self) -> PackedInt4:
        """The matrices as one; its zero points, if any, are not packed."""
        from shardsurgeon_kernels import PackedInt4

        first, parts = self._parts[0], self._parts
        zeros = [part.zeros for part in parts if part.zeros is not None]
        return PackedInt4(
            packed=torch.cat([part.packed for part in parts]),
            scale=torch.cat([part.scale for part in parts]),
            zero_point=torch.cat(zeros) if zeros else None,
            shape=(sum(part.shape[0] for part in parts), first.shape[1]),
            group_size=first.group_size,
        )

    def unpacked(self) -> Tensor:
        """The weight, [out, in]."""
        return torch.cat([part.dequantize(self.dtype).flatten(0, -2) for part in self._whole])


class Decoder:
    """Reads weights by the names that they have in an unquantized checkpoint."""

    def __init__(self, reader: Tensors, config: Mapping[str, Any]) -> None:
        """config: config.json, whose quantization sections give group and block sizes."""
        self._reader = reader
        self._schemes = QuantizationSchemes.of(config)
        self._gptq_v2 = _says_gptq_v2(config)

    def weight(self, name: str, shape: Shape, expert: int | None = None) -> Tensor:
        """A weight, dequantized to float32, or in its stored dtype where it is not quantized.

        shape: the weight's, [..., out, in]; expert: only that row of the first axis, as
        [1, ...]. Raises FamilyError where the form is not known.
        """
        found = self.stored(name, shape, expert)
        return found.dequantize(torch.float32) if isinstance(found, PackedInteger) else found

    def stored(self, name: str, shape: Shape, expert: int | None = None) -> Tensor | PackedInteger:
        """As `weight`, but pack-quantized integers stay packed."""
        rows = _Rows(self._reader, shape[0] if expert is not None else 0, expert)
        logical = (1, *shape[1:]) if expert is not None else shape
        return _Form(rows, name, logical, self._schemes, self._gptq_v2).read()


@dataclass(frozen=True)
class _Rows:
    """A reader that returns one expert's rows of every tensor with an axis of experts."""

    reader: Tensors
    experts: int
    expert: int | None

    def record(self, name: str) -> TensorRecord | None:
        return self.reader.record(name)

    def read(self, name: str) -> Tensor:
        record = self.reader.record(name)
        assert record is not None
        by_expert = self.expert is not None and record.shape[:1] == (self.experts,)
        return self.reader.read(name, self.expert if by_expert else None)


@dataclass
class _Form:
    """One weight, read by the form that it is stored in."""

    rows: _Rows
    name: str
    shape: Shape
    schemes: QuantizationSchemes
    gptq_v2: bool
    stems: list[str] = field(init=False)

    def __post_init__(self) -> None:
        # The scale of `x.weight` is `x.weight_scale`; that of a stacked `x` may be `x_scale` or
        # `x_weight_scale`.
        module = self.name.endswith(".weight")
        self.stems = [self.name] if module else [self.name, f"{self.name}_weight"]

    def read(self) -> Tensor | PackedInteger:
        record = self.rows.record(self.name)
        if record is not None:
            return self._plain(record)
        if self.name.endswith(".weight"):
            words = self.name.removesuffix("weight")
            if self.rows.record(f"{words}qweight"):
                return self._words(words)
        if self.rows.record(f"{self.name}_blocks"):
            return self._blocks()
        packed = self.rows.record(f"{self.name}_packed")
        if packed is None:
            raise self._unknown("there is no tensor of this name")
        return self._packed_integers() if packed.dtype == "I32" else self._packed_floats()

    def _plain(self, record: TensorRecord) -> Tensor:
        scale = self._scale()
        if scale is None or record.dtype in _FLOATS or record.dtype not in _EIGHT_BITS:
            if record.dtype in _EIGHT_BITS and len(record.shape) > 1:
                raise self._unknown(f"is stored as {record.dtype} without a scale")
            if record.dtype not in DTYPES:
                raise self._unknown(f"is stored as {record.dtype}")
            return self.rows.read(self.name)
        stored = self.rows.read(self.name)
        if stored.shape[-1] * 2 == self.shape[-1]:
            second = self._constant("scale_2", 1.0)
            return self._scaled(fp4(stored), scale) * second
        if self.rows.record(f"{self.name}_zero_point"):
            values = stored.float() - self._spread(self.rows.read(f"{self.name}_zero_point"))
            return self._scaled(values, scale)
        return self._scaled(stored.float(), scale)

    def _packed_integers(self) -> PackedInteger:
        scale = self._require("_scale")
        packed = self.rows.read(f"{self.name}_packed")
        bits, group = self._packing(packed.shape[-1], scale.shape[-1] if scale.dim() else 1)
        zeros, order = f"{self.name}_zero_point", f"{self.name}_g_idx"
        return PackedInteger(
            packed=packed,
            scale=scale,
            zero_point=self.rows.read(zeros) if self.rows.record(zeros) else None,
            order=self.rows.read(order).long() if self.rows.record(order) else None,
            bits=bits,
            group_size=group or None,
            shape=self.shape,
        )

    def _packing(self, words: int, groups: int) -> tuple[int, int]:
        """(bits, group size) of a row with this many words and scales; size 0: one group."""
        width = self.shape[-1]
        for bits, group in self.schemes.packings:
            scales = -(-width // group) if group else 1
            if packed_words(width, bits) == words and scales == groups:
                return bits, group
        raise self._unknown(
            f"{words} words and {groups} scales do not make a row of {width} weights"
        )

    def _packed_floats(self) -> Tensor:
        packed = self.rows.read(f"{self.name}_packed")
        scale = self._require("_scale")
        if packed.shape[-1] * 4 == self.shape[-1] * 3:
            return self._scaled(fp6(packed), scale)
        values = self._scaled(fp4(packed), scale)
        return values / self._constant("global_scale", 1.0)

    def _words(self, stem: str) -> Tensor:
        """AWQ, packed along the outputs, or GPTQ, packed along the inputs."""
        qweight, scales = self.rows.read(f"{stem}qweight"), self.rows.read(f"{stem}scales")
        qzeros = self.rows.read(f"{stem}qzeros") if self.rows.record(f"{stem}qzeros") else None
        order = self.rows.read(f"{stem}g_idx").long() if self.rows.record(f"{stem}g_idx") else None
        outputs, inputs = self.shape
        if qweight.shape == (inputs, outputs // 8):
            return awq(qweight, qzeros, scales)
        bits = 32 * qweight.shape[0] // inputs
        if bits not in (2, 4, 8) or qweight.shape[1] != outputs:
            raise self._unknown(f"qweight {list(qweight.shape)} is not AWQ or GPTQ of 2, 4, 8 bits")
        return gptq(qweight, qzeros, scales, order, bits, plus_one=not self.gptq_v2)

    def _blocks(self) -> Tensor:
        """MXFP4 in blocks of 32: uint8 [E, out, blocks, 16] → float32 [E, in, out]."""
        blocks = self.rows.read(f"{self.name}_blocks")
        exponents = self.rows.read(f"{self.name}_scales")
        values = fp4(blocks) * powers(exponents)[..., None]
        return values.flatten(-2).transpose(-1, -2).contiguous()

    def _scale(self) -> Tensor | None:
        names = [f"{stem}{end}" for stem in self.stems for end in ("_scale", "_scale_inv")]
        if self.name.endswith(".weight"):
            names.append(f"{self.name.removesuffix('weight')}scale")
        for name in names:
            if self.rows.record(name):
                return self.rows.read(name)
        return None

    def _require(self, end: str) -> Tensor:
        if not self.rows.record(self.name + end):
            raise self._unknown(f"is packed and has no {end.removeprefix('_')}")
        return self.rows.read(self.name + end)

    def _constant(self, end: str, absent: float) -> Tensor | float:
        """A scale of the whole weight, or one per expert, shaped to broadcast."""
        for stem in self.stems:
            if self.rows.record(f"{stem}_{end}"):
                value = self.rows.read(f"{stem}_{end}").float()
                return value.reshape(-1, *[1] * (len(self.shape) - 1))
        return absent

    def _scaled(self, values: Tensor, scale: Tensor) -> Tensor:
        if scale.dtype == torch.uint8:
            scale = powers(scale)
        return values * self._spread(scale.float())

    def _spread(self, scale: Tensor) -> Tensor:
        """A scale with one value per element, or one that broadcasts to the elements."""
        *lead, rows, columns = self.shape
        if scale.numel() == 1:
            return scale.float().reshape(1)
        for tall, wide in self._tiles(rows, columns):
            grid = (-(-rows // tall), -(-columns // wide))
            if math.prod(scale.shape) == math.prod(lead) * math.prod(grid) and _may_be_written(
                tuple(scale.shape), tuple(lead), grid
            ):
                spread = scale.float().reshape(*lead, *grid)
                spread = spread.repeat_interleave(tall, -2).repeat_interleave(wide, -1)
                return spread[..., :rows, :columns]
        raise self._unknown(f"a scale {list(scale.shape)} fits no weight {list(self.shape)}")

    def _tiles(self, rows: int, columns: int) -> list[tuple[int, int]]:
        """(rows, columns) of the tiles that may share a scale."""
        tiles = [(tall or rows, wide or columns) for tall, wide in self.schemes.tiles]
        # Stacked weights may be stored [in, out], where a scale per output is one per column.
        return [*tiles, (rows, 1)] if len(self.shape) > 2 else tiles

    def _unknown(self, problem: str) -> FamilyError:
        return FamilyError(self.name, problem, "run the checkpoint it was quantized from")


def _may_be_written(shape: Shape, lead: Shape, grid: tuple[int, int]) -> bool:
    """Whether a shape is [*lead, *grid], with or without the grid's axes of size 1."""
    rows, columns = grid
    spellings = {(*lead, rows, columns)}
    if columns == 1:
        spellings.add((*lead, rows))
    if rows == 1:
        spellings.add((*lead, columns))
    return shape in spellings


def _says_gptq_v2(config: Mapping[str, Any]) -> bool:
    """Whether zero points are stored unchanged; GPTQ's first format stores them minus 1."""
    return any(
        str(section.get("checkpoint_format") or section.get("packing_format")).endswith("v2")
        for _, section in quantization_sections(config)
    )
