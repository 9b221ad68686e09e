"""Plain torch operations, arranged for speed: for any device, and for CPUs without a compiler.

Two things make it faster than the obvious code. The two nibbles of a byte become two int8 values
by three operations on int16 words, without a strided store; and rows are processed in blocks small
enough to stay in the cache.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from shardsurgeon_kernels import reference, wide
from shardsurgeon_kernels.stack import PackedInt4Stack, expert_by_expert
from shardsurgeon_kernels.weight import LOWEST, PackedInt4, expect_words

NAME = "eager"
# Elements of one block, whose int8, int16 and float forms fit into a core's second-level cache.
BLOCK_ELEMENTS = 1 << 20


def unpack(packed: Tensor, in_features: int) -> Tensor:
    """int32 [out, ceil(in / 8)] -> int8 [out, in], values in -8..7."""
    expect_words(packed, packed.shape[0], in_features)
    if sys.byteorder == "big":
        return reference.unpack(packed, in_features)
    # A tensor of one column counts as contiguous with any stride, but then has no view as bytes.
    if not packed.is_contiguous() or packed.stride(-1) != 1:
        packed = packed.clone(memory_format=torch.contiguous_format)
    octets = packed.view(torch.uint8).to(torch.int16)
    # hhhhllll -> 0000hhhh 0000llll, which read as bytes is the low nibble and then the high one.
    pairs = octets * 16
    pairs |= octets
    pairs &= 0x0F0F
    values = pairs.view(torch.int8)
    values += LOWEST
    return values[:, :in_features]


def dequantize(weight: PackedInt4, dtype: torch.dtype) -> Tensor:
    """`(q - zero_point) * scale` as [out, in] of `dtype`, equal to the reference in every bit."""
    rows, columns = weight.shape
    if dtype is torch.float64 or columns % weight.columns_per_scale or not rows * columns:
        return reference.dequantize(weight, dtype)
    out = torch.empty(rows, columns, dtype=dtype, device=weight.packed.device)
    step = max(1, BLOCK_ELEMENTS // columns)
    for begin in range(0, rows, step):
        _dequantize_rows(weight, slice(begin, begin + step), out[begin : begin + step])
    return out


def linear(x: Tensor, weight: PackedInt4, bias: Tensor | None = None) -> Tensor:
    """`x · Wᵀ + bias`: [.., in] -> [.., out], with W dequantized to x's dtype."""
    matrix = dequantize(weight, x.dtype)
    if x.device.type == "cpu" and wide.pays(x.dtype):
        return wide.linear(x, weight.shape, bias, lambda begin, block: _widen(matrix, begin, block))
    return torch.nn.functional.linear(x, matrix, bias)


def grouped_linear(x: Tensor, weights: PackedInt4Stack, ends: Tensor) -> Tensor:
    """Rows `ends[e - 1]:ends[e]` of x times expert e's weight, one expert after the other."""
    return expert_by_expert(linear, x, weights, ends)


def _widen(matrix: Tensor, begin: int, block: Tensor) -> None:
    block.copy_(matrix[begin : begin + block.shape[0]])


def _dequantize_rows(weight: PackedInt4, rows: slice, out: Tensor) -> None:
    in_groups = (out.shape[0], weight.groups, weight.columns_per_scale)
    values = unpack(weight.packed[rows], weight.shape[1]).reshape(in_groups)
    if weight.zeros is not None:
        values -= weight.zeros[rows].unsqueeze(-1)
    scale = weight.scale[rows].unsqueeze(-1)
    if scale.dtype is out.dtype:
        # Small integers are exact in every float dtype, so this product is rounded only once, too.
        out.view(in_groups).copy_(values).mul_(scale)
    else:
        out.view(in_groups).copy_(values.to(torch.float32).mul_(scale.to(torch.float32)))
