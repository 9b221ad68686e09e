"""The definition of every operation, in few lines of torch; for any device, not fast.

Other implementations must equal `unpack` and `dequantize` bit for bit, and the products within
the rounding of a sum in another order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shardsurgeon_kernels.stack import PackedInt4Stack, expert_by_expert
from shardsurgeon_kernels.weight import PackedInt4, expect_words, spread_nibbles

NAME = "reference"


def unpack(packed: Tensor, in_features: int) -> Tensor:
    """int32 [out, ceil(in / 8)] -> int8 [out, in], values in -8..7."""
    expect_words(packed, packed.shape[0], in_features)
    return spread_nibbles(packed)[:, :in_features]


def dequantize(weight: PackedInt4, dtype: torch.dtype) -> Tensor:
    """`(q - zero_point) * scale` as [out, in] of `dtype`.

    The product is computed in float32 at least and rounded once. Where `dtype` is that of the
    scale, this is compressed-tensors' decompression, bit for bit.
    """
    wide = torch.promote_types(dtype, torch.float32)
    column = torch.arange(weight.shape[1], device=weight.packed.device)
    group = column // weight.columns_per_scale
    values = unpack(weight.packed, weight.shape[1]).to(wide)
    if weight.zeros is not None:
        values -= weight.zeros.to(wide)[:, group]
    return (values * weight.scale.to(wide)[:, group]).to(dtype)


def linear(x: Tensor, weight: PackedInt4, bias: Tensor | None = None) -> Tensor:
    """`x · Wᵀ + bias`: [.., in] -> [.., out], with W dequantized to x's dtype.

    Products are summed in float32 at least and rounded once.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.to(wide) @ dequantize(weight, x.dtype).to(wide).t()
    if bias is not None:
        y += bias.to(wide)
    return y.to(x.dtype)


def grouped_linear(x: Tensor, weights: PackedInt4Stack, ends: Tensor) -> Tensor:
    """Rows `ends[e - 1]:ends[e]` of x, [M, in] -> [M, out], times expert e's weight as `linear`.

    Rows past `ends[-1]` become zero.
    """
    return expert_by_expert(linear, x, weights, ends)
