"""Words and values, against compressed-tensors' packing and by hand."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given
from hypothesis import strategies as st

from shardsurgeon_kernels import eager, native, pack, reference, unpack

IMPLEMENTATIONS = [reference, eager, native]


def values_of(rows: int, columns: int, seed: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 8, (rows, columns), generator=random, dtype=torch.int8)


def test_the_first_value_lies_in_the_lowest_nibble() -> None:
    words = pack(torch.tensor([[-8, -7, -6, -5, -4, -3, -2, 7, 1]], dtype=torch.int8))
    assert [int(word) & 0xFFFFFFFF for word in words[0]] == [0xF6543210, 0x9]


@given(st.integers(1, 30), st.integers(1, 90), st.integers(0, 2**31))
def test_packing_is_the_librarys(rows: int, columns: int, seed: int) -> None:
    values = values_of(rows, columns, seed)
    assert torch.equal(pack(values), pack_to_int32(values, 4))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@given(rows=st.integers(1, 30), columns=st.integers(1, 90), seed=st.integers(0, 2**31))
def test_unpacking_gives_back_every_value(implementation, rows, columns, seed) -> None:
    values = values_of(rows, columns, seed)
    packed = pack_to_int32(values, 4)
    assert torch.equal(implementation.unpack(packed, columns), values)


def test_arbitrary_words_unpack_as_the_library_does() -> None:
    packed = torch.tensor([[-1, 0, 1 << 30, -(1 << 31)], [0x12345678, -2, 7, 255]]).to(torch.int32)
    for columns in range(25, 33):
        expected = unpack_from_int32(packed, 4, torch.Size((2, columns)))
        assert torch.equal(unpack(packed, columns), expected)


def test_words_that_are_not_contiguous_unpack_alike() -> None:
    values = values_of(6, 64, 1)
    wide = torch.zeros(6, 16, dtype=torch.int32)
    wide[:, ::2] = pack(values)
    for implementation in IMPLEMENTATIONS:
        assert torch.equal(implementation.unpack(wide[:, ::2], 64), values)
        assert torch.equal(implementation.unpack(wide.t()[:1].t(), 8), values[:, :8])
        assert torch.equal(implementation.unpack(wide[:1, ::16], 8), values[:1, :8])


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (torch.full((2, 2), 8, dtype=torch.int8), "values span 8..8; INT4 holds -8..7"),
        (torch.full((2, 2), -9, dtype=torch.int8), "values span -9..-9"),
        (torch.zeros(2, 2), "expected int8"),
        (torch.zeros(2, dtype=torch.int8), r"torch.int8 \[2\]"),
    ],
)
def test_what_is_no_int4_is_refused(values: torch.Tensor, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        pack(values)


def test_words_of_another_width_are_refused() -> None:
    with pytest.raises(ValueError, match=r"packed has shape \[2, 3\]; expected \[2, 4\]"):
        unpack(torch.zeros(2, 3, dtype=torch.int32), 25)
    with pytest.raises(ValueError, match=r"packed is torch\.int64"):
        unpack(torch.zeros(2, 3, dtype=torch.int64), 24)
