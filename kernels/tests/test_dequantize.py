"""Every implementation that a CPU runs gives compressed-tensors' decompression, bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from int4_layers import FLOATS, Layer, layer, layers, same_bits

from shardsurgeon_kernels import PackedInt4, dequantize, eager, native, pack, reference

IMPLEMENTATIONS = [reference, eager, native]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@given(case=layers())
def test_in_the_scales_dtype_it_is_the_librarys_decompression(implementation, case: Layer) -> None:
    found = implementation.dequantize(case.weight, case.weight.scale.dtype)
    assert same_bits(found, case.decompressed)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
@given(case=layers())
def test_another_dtype_is_the_float32_product_rounded_once(
    implementation, dtype: torch.dtype, case: Layer
) -> None:
    zeros = case.weight.zeros if case.weight.zeros is not None else torch.zeros(1, 1)
    width = case.weight.columns_per_scale
    wide = torch.promote_types(dtype, torch.float32)
    whole = case.values.to(wide).unflatten(1, (-1, width)) - zeros.unsqueeze(-1).to(wide)
    expected = (whole * case.weight.scale.to(wide).unsqueeze(-1)).flatten(1).to(dtype)
    assert same_bits(implementation.dequantize(case.weight, dtype), expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("columns", [70, 101])
@pytest.mark.parametrize("group_size", [5, 6, 32])
def test_a_last_group_may_be_shorter(implementation, columns: int, group_size: int) -> None:
    values = (torch.arange(3 * columns).view(3, columns) * 7 % 16 - 8).to(torch.int8)
    scale = torch.arange(1, 3 * -(-columns // group_size) + 1).view(3, -1).to(torch.float32)
    weight = PackedInt4(pack(values), scale, None, (3, columns), group_size)
    expected = [
        [int(values[o, i]) * float(scale[o, i // group_size]) for i in range(columns)]
        for o in range(3)
    ]
    assert implementation.dequantize(weight, torch.float32).tolist() == expected


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_extreme_scales_round_as_the_library_rounds_them(implementation, dtype) -> None:
    values = torch.arange(-8, 8, dtype=torch.int8).repeat(9, 4)
    tiny, huge = torch.finfo(dtype).smallest_normal, torch.finfo(dtype).max
    scale = torch.tensor([0.0, -0.0, -1.0, tiny, tiny / 16, huge, -huge / 3, torch.inf, torch.nan])
    weight = PackedInt4(pack(values), scale.to(dtype).unsqueeze(1), None, (9, 64), None)
    found = implementation.dequantize(weight, dtype)
    expected = values.to(dtype) * scale.to(dtype).unsqueeze(1)
    assert found.isnan().equal(expected.isnan())
    assert same_bits(found.nan_to_num(nan=0.0), expected.nan_to_num(nan=0.0))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_enough_for_several_blocks_and_threads(implementation) -> None:
    case = layer(300, 8192, 32, torch.bfloat16, asymmetric=True)
    assert same_bits(implementation.dequantize(case.weight, torch.bfloat16), case.decompressed)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", [(0, 64), (5, 0)])
def test_an_empty_weight_stays_empty(implementation, shape: tuple[int, int]) -> None:
    words, groups = -(-shape[1] // 8), -(-shape[1] // 32)
    packed = torch.zeros(shape[0], words, dtype=torch.int32)
    weight = PackedInt4(packed, torch.ones(shape[0], groups), None, shape, 32)
    assert implementation.dequantize(weight, torch.float32).shape == shape


def test_an_integer_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match=r"not to torch\.int8"):
        dequantize(layer(2, 32, 32, torch.float32).weight, torch.int8)
