"""The order of tensors in an output shard: valid and never worse than simple, for any columns;
and nearly all shared for the files that models come in."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from shardsurgeon.pruning.layout import Layout, lay_out, shared_nbytes

BLOCK = 4096
# As the safetensors library sorts them: wider ones first.
WIDTHS = {"I64": 8, "F32": 4, "I32": 4, "BF16": 2, "U8": 1, "F8": 1}
DTYPES = ["I64", "F32", "I32", "BF16", "F8", "U8"]

Column = NDArray[np.int64]
Row = tuple[int, int, int, int]


class Columns(NamedTuple):
    nbytes: Column
    width: Column
    phase: Column
    gain: Column


class Tensor(NamedTuple):
    """Of a source: kept is its size in the result, 0 if it goes; expert: its id, if it has one."""

    name: str
    dtype: str
    nbytes: int
    expert: int | None = None
    kept: int | None = None


def columns(rows: Iterable[Row]) -> Columns:
    """Columns of rows of nbytes, width, phase and gain."""
    table = np.array(list(rows), dtype=np.int64).reshape(-1, 4)
    return Columns(*(np.ascontiguousarray(column) for column in table.T))


def shared_by_hand(layout: Layout, given: Columns) -> int:
    """What a file in this order shares, byte for byte where it lies; checks that it is valid."""
    assert sorted(layout.order.tolist()) == list(range(len(given.nbytes)))
    if layout.start is None:
        at, shares = 0, False
    else:
        assert 0 <= layout.start < BLOCK and layout.start % 8 == 0
        at, shares = layout.start, True
    shared = 0
    for place in layout.order.tolist():
        assert at % given.width[place] == 0
        if shares and at % BLOCK == given.phase[place]:
            shared += int(given.gain[place])
        at += int(given.nbytes[place])
    return shared


def simple_share(given: Columns) -> int:
    """What wider dtypes first, then source order, share with the best of all starts."""
    order = sorted(range(len(given.nbytes)), key=lambda place: -given.width[place])
    shares: dict[int, int] = {}
    at = 0
    for place in order:
        if given.phase[place] >= 0:
            start = (int(given.phase[place]) - at) % BLOCK
            shares[start] = shares.get(start, 0) + int(given.gain[place])
        at += int(given.nbytes[place])
    return max((share for start, share in shares.items() if start % 8 == 0), default=0)


@st.composite
def any_rows(draw: st.DrawFn) -> list[Row]:
    """Tensors of a few sizes, as models have them, or of all sizes; phases also misaligned."""
    few = draw(st.lists(st.integers(0, 3 * BLOCK), min_size=1, max_size=4))
    sizes = st.one_of(
        st.sampled_from(few), st.integers(0, 40), st.integers(0, 20_000), st.just(5 * BLOCK)
    )
    phases = st.one_of(
        st.just(-1),
        st.integers(0, BLOCK - 1),
        st.integers(0, 31).map(lambda step: step * 8),
        st.integers(0, 7).map(lambda step: step * 512 + 4),
    )
    rows = []
    for nbytes, width, phase in draw(
        st.lists(st.tuples(sizes, st.sampled_from([1, 2, 4, 8]), phases), max_size=40)
    ):
        gain = draw(st.sampled_from([BLOCK, 3 * BLOCK, 1000 * BLOCK])) if phase >= 0 else 0
        rows.append((nbytes // width * width, width, phase, gain))
    return rows


@given(any_rows())
@example([])
@example([(8, 8, -1, 0), (4096, 1, 3, 4096)])
@example([(6, 2, -1, 0), (4096, 2, 6, 4096), (4, 4, -1, 0), (4096, 8, 8, 4096)])
def test_any_tensors_make_a_valid_file_that_shares_no_less_than_a_simple_one(
    rows: list[Row],
) -> None:
    given = columns(rows)
    layout = lay_out(*given)
    shared = shared_by_hand(layout, given)
    assert shared == shared_nbytes(
        layout.order, layout.start, given.nbytes, given.phase, given.gain
    )
    assert shared >= simple_share(given)
    assert (layout.start is None) == (shared == 0)


@given(any_rows(), st.randoms(use_true_random=False))
def test_the_order_that_tensors_come_in_is_undone_by_their_place_in_the_source(
    rows: list[Row], chance: random.Random
) -> None:
    keyed = list(enumerate(rows))
    chance.shuffle(keyed)
    keyed.sort()
    first, second = lay_out(*columns(rows)), lay_out(*columns(row for _, row in keyed))
    assert (first.order == second.order).all() and first.start == second.start
