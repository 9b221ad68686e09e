"""Tables of expert ids after a prune: survivors renumbered, the rest spread over them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardsurgeon.errors import FamilyError
from shardsurgeon.pruning.planner import remapped


def table(
    rows: list[list[int]], dtype: str, keep: tuple[int, ...], experts: int
) -> list[list[int]]:
    width = {"I32": np.int32, "I64": np.int64}[dtype]
    old = np.array(rows, dtype=width)
    raw = remapped("tid2eid", dtype, old.shape, old.tobytes(), keep, experts)
    new: list[list[int]] = np.frombuffer(raw, width).reshape(old.shape).tolist()
    return new


@pytest.mark.parametrize("dtype", ["I32", "I64"])
def test_survivors_get_their_new_number_and_pruned_ids_the_next_free_one(dtype: str) -> None:
    # Kept are 1, 4, 6 and 7, from now on 0, 1, 2 and 3.
    rows = [[1, 4], [7, 6], [5, 1], [5, 4], [0, 3], [3, 7], [2, 0]]
    # 5 mod 4 is 1, taken in the fourth row by 4; 3 mod 4 is 3, taken in the sixth by 7.
    expected = [[0, 1], [3, 2], [1, 0], [2, 1], [0, 3], [0, 3], [2, 0]]
    assert table(rows, dtype, (1, 4, 6, 7), 8) == expected


@given(st.data())
def test_rows_stay_distinct_and_survivors_stay_themselves(data: st.DataObject) -> None:
    experts = data.draw(st.integers(2, 40))
    keep = tuple(sorted(data.draw(st.sets(st.integers(0, experts - 1), min_size=1))))
    width = data.draw(st.integers(1, len(keep)))
    row = st.lists(st.integers(0, experts - 1), min_size=width, max_size=width, unique=True)
    rows = data.draw(st.lists(row, min_size=1, max_size=8))
    for old, new in zip(rows, table(rows, "I64", keep, experts), strict=True):
        assert len(set(new)) == width
        assert all(0 <= expert < len(keep) for expert in new)
        assert all(keep[n] == o for o, n in zip(old, new, strict=True) if o in keep)


def test_a_table_that_does_not_fit_the_experts_is_refused() -> None:
    raw = np.array([[0, 9]], dtype=np.int64).tobytes()
    with pytest.raises(FamilyError, match="from 0 to 9"):
        remapped("tid2eid", "I64", (1, 2), raw, (0, 1), 8)
    with pytest.raises(FamilyError, match="cannot be renumbered for 1 experts"):
        remapped("tid2eid", "I64", (1, 2), raw, (0,), 10)
    with pytest.raises(FamilyError, match="type F32"):
        remapped("tid2eid", "F32", (1, 4), raw, (0, 1, 2, 3), 10)
