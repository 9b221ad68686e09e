"""Products in float32 for a CPU without units for 16-bit floats, and when they are chosen."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from int4_layers import assert_product, layer
from torch import Tensor
from torch.nn import functional

from shardsurgeon_kernels import eager, native, wide


@pytest.fixture(autouse=True)
def timed_afresh() -> Iterator[None]:
    wide.pays.cache_clear()
    yield
    wide.pays.cache_clear()


def pretend(monkeypatch: pytest.MonkeyPatch, narrow: float, in_float32: float) -> None:
    """A processor that needs so many seconds for a product."""

    def seconds(dtype: torch.dtype) -> float:
        return in_float32 if dtype is torch.float32 else narrow

    monkeypatch.setattr(wide, "_seconds", seconds)


@pytest.mark.parametrize("implementation", [eager, native])
@pytest.mark.parametrize("dtype", wide.HALVES)
@pytest.mark.parametrize("group_size", [32, None, 6])
def test_the_product_is_exact_but_for_one_rounding(
    implementation: ModuleType,
    dtype: torch.dtype,
    group_size: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    multiplied: list[tuple[torch.dtype, int, int]] = []
    product = functional.linear

    def recorded(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        multiplied.append((x.dtype, x.shape[0], weight.shape[0]))
        return product(x, weight, bias)

    pretend(monkeypatch, narrow=3.0, in_float32=1.0)
    monkeypatch.setattr(functional, "linear", recorded)
    monkeypatch.setattr(wide, "BLOCK_ELEMENTS", 20 * 96)  # 41 rows: two blocks and a rest of one
    monkeypatch.setattr(wide, "TOKENS_AT_ONCE", 4)
    case = layer(41, 96, group_size, dtype, asymmetric=group_size != 6)
    x = torch.randn(2, 3, 96, generator=torch.Generator().manual_seed(3)).to(dtype)
    bias = torch.linspace(-1, 1, 41).to(dtype)
    y = implementation.linear(x, case.weight, bias)
    assert multiplied == [(torch.float32, t, r) for t in (4, 2) for r in (20, 20, 1)]
    assert_product(y, x, case.decompressed, bias)
    assert_product(implementation.linear(x, case.weight), x, case.decompressed, None)


@pytest.mark.parametrize(("narrow", "chosen"), [(2.1, True), (1.9, False), (0.3, False)])
def test_float32_is_chosen_where_it_is_twice_as_fast(
    narrow: float, chosen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, narrow, in_float32=1.0)
    assert [wide.pays(dtype) for dtype in wide.HALVES] == [chosen, chosen]
    assert not wide.pays(torch.float32)


def test_the_timing_leaves_the_number_of_threads_alone() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        wide.pays(torch.bfloat16)
        assert torch.get_num_threads() == threads + 1
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("leading", [(), (0,), (2, 3)])
def test_any_leading_dimensions_are_kept(
    leading: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, narrow=3.0, in_float32=1.0)
    case = layer(10, 64, 32, torch.bfloat16)
    assert native.linear(torch.ones(*leading, 64).bfloat16(), case.weight).shape == (*leading, 10)
