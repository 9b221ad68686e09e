"""Tensors that do not fit each other are refused before any kernel sees them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from shardsurgeon_kernels import PackedInt4

FITTING: dict[str, Any] = {
    "packed": torch.zeros(9, 12, dtype=torch.int32),
    "scale": torch.ones(9, 3),
    "zero_point": None,
    "shape": (9, 96),
    "group_size": 32,
}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"packed": torch.zeros(9, 11, dtype=torch.int32)}, r"packed has shape \[9, 11\]"),
        ({"packed": torch.zeros(9, 12, dtype=torch.int64)}, "packed is torch.int64"),
        ({"scale": torch.ones(9, 4)}, r"scale has shape \[9, 4\]; expected \[9, 3\]"),
        ({"scale": torch.ones(9)}, r"scale has shape \[9\]"),
        ({"scale": torch.ones(9, 3, dtype=torch.float64)}, "scale is torch.float64"),
        ({"group_size": 64}, r"scale has shape \[9, 3\]; expected \[9, 2\]"),
        ({"group_size": 0}, "group_size is 0"),
        ({"group_size": None}, r"scale has shape \[9, 3\]; expected \[9, 1\]"),
        ({"shape": (8, 96)}, r"packed has shape \[9, 12\]; expected \[8, 12\]"),
        (
            {"zero_point": torch.zeros(1, 3, dtype=torch.int32)},
            r"zero_point has shape \[1, 3\]; expected \[2, 3\]",
        ),
        (
            {"zero_point": torch.zeros(2, 3, dtype=torch.int8)},
            r"zero_point has shape \[2, 3\]; expected \[9, 3\]",
        ),
        ({"zero_point": torch.zeros(9, 3)}, "zero_point is torch.float32"),
        ({"scale": torch.ones(9, 3, device="meta")}, "2 devices"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change: dict[str, Any], said: str) -> None:
    PackedInt4(**FITTING)
    with pytest.raises(ValueError, match=said):
        PackedInt4(**FITTING | change)


def test_channel_wise_is_written_minus_one_as_well() -> None:
    scale = torch.ones(9, 1)
    for group_size in (None, -1):
        weight = PackedInt4(**FITTING | {"scale": scale, "group_size": group_size})
        assert (weight.groups, weight.columns_per_scale) == (1, 96)


def test_packed_zero_points_lie_along_the_output_dimension() -> None:
    # Rows 0..7 of a column share a word, row 8 begins the next one.
    words = torch.tensor([[0x76543210], [0xF]], dtype=torch.int32)
    weight = PackedInt4(torch.zeros(9, 1, dtype=torch.int32), torch.ones(9, 1), words, (9, 8), None)
    assert weight.zeros is not None
    assert weight.zeros.flatten().tolist() == [-8, -7, -6, -5, -4, -3, -2, -1, 7]
