"""The product, against a float64 product with the library's decompressed weight."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from int4_layers import FLOATS, Layer, assert_product, layer, layers

from shardsurgeon_kernels import eager, linear, native, reference

IMPLEMENTATIONS = [reference, eager, native]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@given(case=layers(), tokens=st.integers(1, 20), with_bias=st.booleans())
def test_the_product_is_exact_but_for_rounding(
    implementation, case: Layer, tokens: int, with_bias: bool
) -> None:
    rows, columns = case.weight.shape
    dtype = case.weight.scale.dtype
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(tokens)).to(dtype)
    bias = torch.linspace(-1, 1, rows).to(dtype) if with_bias else None
    assert_product(implementation.linear(x, case.weight, bias), x, case.decompressed, bias)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_wider_or_narrower_input_decides_the_weights_dtype(implementation, dtype) -> None:
    case = layer(24, 96, 32, torch.float32)
    x = torch.randn(7, 96, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert_product(implementation.linear(x, case.weight), x, case.decompressed.to(dtype), None)


@pytest.mark.parametrize("group_size", [32, None])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_a_weight_of_several_blocks_is_one_product(
    group_size: int | None, asymmetric: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "BLOCK_ELEMENTS", 7 * 96)  # 41 rows: five blocks and a rest of 6
    case = layer(41, 96, group_size, torch.float32, asymmetric=asymmetric)
    x = torch.randn(2, 3, 96, generator=torch.Generator().manual_seed(3))
    bias = torch.linspace(-1, 1, 41)
    assert_product(native.linear(x, case.weight, bias), x, case.decompressed, bias)
    assert_product(native.linear(x, case.weight), x, case.decompressed, None)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("leading", [(), (0,), (2, 3)])
def test_any_leading_dimensions_are_kept(implementation, leading: tuple[int, ...]) -> None:
    case = layer(10, 64, 32, torch.float32)
    x = torch.randn(*leading, 64, generator=torch.Generator().manual_seed(2))
    assert implementation.linear(x, case.weight).shape == (*leading, 10)


def test_no_gradient_flows_through() -> None:
    x = torch.ones(2, 64, requires_grad=True)
    assert not linear(x, layer(10, 64, 32, torch.float32).weight).requires_grad


def test_an_input_that_does_not_fit_is_refused() -> None:
    weight = layer(10, 64, 32, torch.float32).weight
    with pytest.raises(ValueError, match=r"x is torch.float32 \[2, 63\].*\[\.\., 64\]"):
        linear(torch.zeros(2, 63), weight)
    with pytest.raises(ValueError, match=r"x is torch\.int64"):
        linear(torch.zeros(2, 64, dtype=torch.int64), weight)
    with pytest.raises(ValueError, match="x lies on meta, the weight on cpu"):
        linear(torch.zeros(2, 64, device="meta"), weight)
