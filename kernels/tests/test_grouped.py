"""Stacks of experts: what is refused, their weights, and products of rows sorted by expert."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from int4_layers import FLOATS, assert_grouped, ends_of, same_bits, stack

from shardsurgeon_kernels import (
    PackedInt4Stack,
    dequantize,
    dequantize_stack,
    dispatch,
    eager,
    grouped_linear,
    linear,
    native,
    reference,
)

IMPLEMENTATIONS = [reference, eager, native]
FITTING: dict[str, Any] = {
    "packed": torch.zeros(4, 9, 12, dtype=torch.int32),
    "scale": torch.ones(4, 9, 3),
    "zero_point": None,
    "shape": (4, 9, 96),
    "group_size": 32,
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "counts", [[3, 0, 5, 1], [0, 0, 9, 0], [9, 0, 0, 0], [2, 1, 0, 1], [0, 0, 0, 0]]
)
def test_rows_meet_their_own_expert(implementation: ModuleType, counts: list[int]) -> None:
    x = torch.randn(9, 96, generator=torch.Generator().manual_seed(1))
    for dtype in FLOATS:
        for group_size, asymmetric in [(32, True), (None, False), (12, False)]:
            case = stack(4, 17, 96, group_size, dtype, asymmetric=asymmetric)
            y = implementation.grouped_linear(x.to(dtype), case.weights, ends_of(counts))
            assert_grouped(y, x.to(dtype), case.decompressed, counts)


def test_one_call_gives_what_a_call_for_each_expert_gives() -> None:
    case = stack(3, 40, 64, 32, torch.bfloat16)
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    y = grouped_linear(x, case.weights, ends_of([1, 2, 3]))
    for expert, (begin, end) in enumerate([(0, 1), (1, 3), (3, 6)]):
        assert same_bits(y[begin:end], linear(x[begin:end], case.weights[expert]))


def test_no_rows_give_no_rows() -> None:
    case = stack(3, 40, 64, 32, torch.float32)
    assert grouped_linear(torch.ones(0, 64), case.weights, ends_of([0, 0, 0])).shape == (0, 40)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("group_size", [32, None])
def test_some_experts_dequantize_to_the_librarys_weights(
    implementation: ModuleType,
    group_size: int | None,
    asymmetric: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, implementation.NAME)
    case = stack(4, 17, 64, group_size, torch.bfloat16, asymmetric=asymmetric)
    for begin, end in [(0, None), (1, 3), (3, 4), (2, 2)]:
        found = dequantize_stack(case.weights, torch.bfloat16, begin, end)
        assert same_bits(found, case.decompressed[begin:end])
    assert len(case.weights) == 4
    for expert in range(4):
        one = dequantize(case.weights[expert], torch.bfloat16)
        assert same_bits(one, case.decompressed[expert])


def test_a_view_of_one_expert_shares_the_stacks_memory() -> None:
    weights = PackedInt4Stack(**FITTING | {"zero_point": torch.zeros(4, 9, 3, dtype=torch.int8)})
    one = weights[2]
    assert one.packed.data_ptr() == weights.packed[2].data_ptr()
    assert one.scale.data_ptr() == weights.scale[2].data_ptr()
    assert one.zeros is not None
    assert weights.zero_point is not None
    assert one.zeros.data_ptr() == weights.zero_point[2].data_ptr()
    with pytest.raises(IndexError):
        weights[4]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"shape": (0, 9, 96)}, r"shape is \[0, 9, 96\]; a stack has at least one"),
        ({"shape": (3, 9, 96)}, r"packed has shape \[4, 9, 12\]; expected \[3, \.\., \.\.\]"),
        ({"shape": (4, 8, 96)}, r"packed has shape \[9, 12\]; expected \[8, 12\]"),
        ({"packed": torch.zeros(4, 9, dtype=torch.int32)}, r"packed has shape \[4, 9\]"),
        ({"scale": torch.ones(3, 9, 3)}, r"scale has shape \[3, 9, 3\]"),
        ({"group_size": 64}, r"scale has shape \[9, 3\]; expected \[9, 2\]"),
        (
            {"zero_point": torch.zeros(2, 9, 3, dtype=torch.int8)},
            r"zero_point has shape \[2, 9, 3\]",
        ),
        (
            {"zero_point": torch.zeros(4, 1, 3, dtype=torch.int32)},
            r"zero_point has shape \[1, 3\]; expected \[2, 3\]",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change: dict[str, Any], said: str) -> None:
    PackedInt4Stack(**FITTING)
    with pytest.raises(ValueError, match=said):
        PackedInt4Stack(**FITTING | change)


@pytest.mark.parametrize(("begin", "end"), [(-1, 2), (3, 2), (0, 5)])
def test_experts_that_the_stack_lacks_are_refused(begin: int, end: int) -> None:
    with pytest.raises(ValueError, match=f"experts {begin}:{end} are asked for.*0:4"):
        dequantize_stack(PackedInt4Stack(**FITTING), torch.float32, begin, end)


@pytest.mark.parametrize(
    ("x", "ends", "said"),
    [
        (torch.ones(5, 95), ends_of([1, 1, 1, 1]), r"float32 \[5, 95\].*\[M, 96\]"),
        (torch.ones(1, 5, 96), ends_of([1, 1, 1, 1]), r"\[1, 5, 96\].*\[M, 96\]"),
        (torch.ones(5, 96, dtype=torch.int8), ends_of([1, 1, 1, 1]), "x is torch.int8"),
        (torch.ones(5, 96), ends_of([1, 1, 1]), r"ends is torch.int32 \[3\]; .* \[4\]"),
        (torch.ones(5, 96), torch.tensor([1, 2, 3, 4]), "ends is torch.int64"),
        (torch.ones(5, 96, device="meta"), ends_of([1, 1, 1, 1]), "x lies on meta"),
        (torch.ones(5, 96), ends_of([1, 1, 1, 1]).to("meta"), "ends on meta"),
        (torch.ones(5, 96), ends_of([1, 1, 2, 2]), r"ends\[3\] is 6; expected 4 to 5"),
        (torch.ones(5, 96), ends_of([2, -1, 1, 1]), r"ends\[1\] is 1; expected 2 to 5"),
    ],
)
def test_rows_that_do_not_fit_are_refused(x: torch.Tensor, ends: torch.Tensor, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        grouped_linear(x, PackedInt4Stack(**FITTING), ends)
