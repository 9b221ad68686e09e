"""Quantized weights for the tests, made and decompressed by compressed-tensors itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from hypothesis import strategies as st
from torch import Tensor

from shardsurgeon_kernels import PackedInt4, PackedInt4Stack

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


@dataclass(frozen=True)
class Stack:
    """The weights of some experts, and what the library makes of them, [E, out, in]."""

    weights: PackedInt4Stack
    decompressed: Tensor


def stack(
    experts: int,
    rows: int,
    columns: int,
    group_size: int | None,
    dtype: torch.dtype,
    *,
    asymmetric: bool = False,
) -> Stack:
    """Layers one upon the other, each with values of its own."""
    each = [
        layer(rows, columns, group_size, dtype, asymmetric=asymmetric, seed=expert)
        for expert in range(experts)
    ]
    zeros = [one.weight.zero_point for one in each if one.weight.zero_point is not None]
    weights = PackedInt4Stack(
        torch.stack([one.weight.packed for one in each]),
        torch.stack([one.weight.scale for one in each]),
        torch.stack(zeros) if zeros else None,
        (experts, rows, columns),
        group_size,
    )
    return Stack(weights, torch.stack([one.decompressed for one in each]))


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


def assert_product(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """y is the product within one rounding to its dtype and a float32 sum's errors."""
    exact = x.double() @ weight.double().t()
    size = x.double().abs() @ weight.double().abs().t()
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    allowed = torch.finfo(y.dtype).eps * exact.abs() + 2.0**-21 * size
    assert y.dtype is x.dtype
    assert y.shape == exact.shape
    assert bool(((y.double() - exact).abs() <= allowed).all())


def assert_grouped(y: Tensor, x: Tensor, weights: Tensor, counts: list[int]) -> None:
    """Every expert's rows are its product; what no expert has is zero."""
    assert y.dtype is x.dtype
    assert y.shape == (x.shape[0], weights.shape[1])
    begin = 0
    for count, weight in zip(counts, weights, strict=True):
        assert_product(y[begin : begin + count], x[begin : begin + count], weight, None)
        begin += count
    assert not y[begin:].any()


def ends_of(counts: list[int]) -> Tensor:
    """Rows of each expert, added up."""
    return torch.tensor(counts).cumsum(0).to(torch.int32)
