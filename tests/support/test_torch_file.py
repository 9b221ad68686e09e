"""What is written without torch is what torch writes: torch and our reader find the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from shardsurgeon.storage.formats.dtypes import StoredArray
from shardsurgeon.storage.formats.torch_file import read_torch_file
from tests.support.torch_file import STORAGES, save

ARRAYS = [
    *(np.arange(6).astype(kind).reshape(shape) for kind in STORAGES for shape in ((6,), (2, 3))),
    np.broadcast_to(np.float32([[1.0], [2.0]]), (2, 5)),
]
VALUE = {3: {"reap": ARRAYS[0], "note": ["x", 1.5, (1, 2)]}, "all": ARRAYS}


def test_our_reader_finds_what_was_saved(tmp_path: Path) -> None:
    found = read_torch_file(save(VALUE, tmp_path / "a.pt"), "a.pt")
    assert isinstance(found, dict)
    assert found[3]["note"] == ["x", 1.5, (1, 2)]
    for stored, array in zip([found[3]["reap"], *found["all"]], [ARRAYS[0], *ARRAYS], strict=True):
        assert isinstance(stored, StoredArray)
        np.testing.assert_array_equal(stored.load(), array)


@pytest.mark.torch
def test_torch_finds_what_was_saved(tmp_path: Path) -> None:
    import torch

    found = torch.load(save(VALUE, tmp_path / "a.pt"), weights_only=True)
    assert found[3]["note"] == ["x", 1.5, (1, 2)]
    for tensor, array in zip(found["all"], ARRAYS, strict=True):
        assert tensor.numpy().dtype == array.dtype
        np.testing.assert_array_equal(tensor.numpy(), array)
