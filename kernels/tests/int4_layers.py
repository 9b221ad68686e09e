"""Quantized weights for the tests, made and decompressed by compressed-tensors itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from hypothesis import strategies as st
from torch import Tensor

from shardsurgeon_kernels import PackedInt4

FLOATS = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Layer:
    """A weight as a checkpoint holds it, and what the library makes of it."""

    weight: PackedInt4
    values: Tensor
    decompressed: Tensor


def layer(
    rows: int,
    columns: int,
    group_size: int | None,
    dtype: torch.dtype,
    *,
    asymmetric: bool = False,
    seed: int = 0,
) -> Layer:
    """Random values and scales, packed by the library."""
    random = torch.Generator().manual_seed(seed)
    groups = columns // group_size if group_size else 1
    values = torch.randint(-8, 8, (rows, columns), generator=random, dtype=torch.int8)
    scale = torch.randn(rows, groups, generator=random).to(dtype)
    state = {
        "weight_packed": pack_to_int32(values, 4),
        "weight_scale": scale,
        "weight_shape": torch.tensor([rows, columns]),
    }
    if asymmetric:
        zeros = torch.randint(-8, 8, (rows, groups), generator=random, dtype=torch.int8)
        state["weight_zero_point"] = pack_to_int32(zeros, 4, packed_dim=0)
    weight = PackedInt4(
        state["weight_packed"], scale, state.get("weight_zero_point"), (rows, columns), group_size
    )
    decompressed = PackedQuantizationCompressor.decompress(state, _scheme(group_size, asymmetric))
    return Layer(weight, values, decompressed["weight"])


def _scheme(group_size: int | None, asymmetric: bool) -> QuantizationScheme:
    args = QuantizationArgs(
        num_bits=4,
        type="int",
        symmetric=not asymmetric,
        strategy="group" if group_size else "channel",
        group_size=group_size,
    )
    return QuantizationScheme(targets=["Linear"], weights=args)


@st.composite
def layers(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = FLOATS) -> Layer:
    """Any group size of the library's, odd row counts, and odd widths where a row is one group."""
    group_size = draw(st.sampled_from([None, 32, 40, 64, 128]))
    columns = draw(st.integers(1, 300 if group_size is None else 5)) * (group_size or 1)
    asymmetric = draw(st.booleans())
    # compressed-tensors 0.20 cannot unpack grouped zero points of eight rows or fewer.
    fewest_rows = 9 if asymmetric and group_size else 1
    return layer(
        draw(st.integers(fewest_rows, 40)),
        columns,
        group_size,
        draw(st.sampled_from(dtypes)),
        asymmetric=asymmetric,
        seed=draw(st.integers(0, 2**31)),
    )


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal in dtype, shape and every bit, signs of zeros included."""
    return (
        a.dtype is b.dtype
        and a.shape == b.shape
        and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
    )
