"""Integers and small floats packed into bytes and words, taken apart.

Formulas only, for `decoding`: tensors in, float32 tensors out. Integers of four bits go through
the kernels of this project.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from shardsurgeon_kernels import PackedInt4

_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# Where AutoAWQ puts the eight values of a word, from its lowest bits.
_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)


@dataclass(frozen=True, slots=True)
class PackedInteger:
    """A weight in compressed-tensors' pack-quantized layout.

    packed: int32 [..., out, words]; scale: [..., out, groups]; zero_point: as the format stores
    it, packed along the outputs, or None; order: int64 [in], the group of each input, or None
    where groups are runs of group_size inputs (None: the whole row); shape: the weight's,
    [..., out, in].
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
        """Whether the kernels know the layout: four bits, groups in runs, one matrix."""
        return self.bits == 4 and self.order is None and math.prod(self.shape[:-2]) == 1

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight."""
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
        """The same as the kernels take it."""
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
    """Signed integers [..., width] of words along the last axis, the lowest bits first."""
    shifts = torch.arange(0, 32, bits, device=words.device)
    values = (words[..., None] >> shifts) & ((1 << bits) - 1)
    return values.flatten(-2)[..., :width] - (1 << (bits - 1))


def fp4(stored: Tensor) -> Tensor:
    """FP4 (E2M1) pairs in bytes [..., n], the first value in the low half: [..., 2n]."""
    table = torch.tensor([*_FP4, *(-value for value in _FP4)], device=stored.device)
    # Through the bytes of it: int8 and float8 containers hold the same pairs.
    codes = stored.view(torch.uint8)
    pairs = torch.stack([codes & 15, codes >> 4], dim=-1)
    return table[pairs.flatten(-2).int()]


def fp6(packed: Tensor) -> Tensor:
    """FP6 (E2M3), four values in three bytes: [..., 3n] → [..., 4n]."""
    parts = packed.unflatten(-1, (-1, 3)).int()
    word = parts[..., 0] | parts[..., 1] << 8 | parts[..., 2] << 16
    codes = torch.stack([word >> shift & 63 for shift in (0, 6, 12, 18)], dim=-1).flatten(-2)
    return _fp6_values().to(packed.device)[codes]


@cache
def _fp6_values() -> Tensor:
    below = [step / 8 for step in range(8)]
    normal = [(1 + step / 8) * 2**power for power in range(3) for step in range(8)]
    positive = [*below, *normal]
    return torch.tensor([*positive, *(-value for value in positive)])


def powers(exponents: Tensor) -> Tensor:
    """E8M0 scales held as bytes: powers of two, 127 being the zeroth."""
    return torch.exp2(exponents.float() - 127)


def awq(qweight: Tensor, qzeros: Tensor | None, scales: Tensor) -> Tensor:
    """AutoAWQ: words [in, out / 8], zero points [groups, out / 8], scales [groups, out]."""
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
    """GPTQ: words [in · bits / 32, out], zero points [groups, out · bits / 32], scales
    [groups, out]. plus_one: zero points are stored less 1."""
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
