"""The metrics from sums, against token-by-token arithmetic in Python; parts add up."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardsurgeon.errors import ScoreError
from shardsurgeon.layerwise.accumulators import Accumulators

EXPERTS = 4
METRICS = {
    "reap",
    "ean_mean",
    "ean_sum",
    "weighted_ean_sum",
    "weighted_expert_frequency_sum",
    "expert_frequency",
    "max_activations",
    "msan",
}


@dataclass(frozen=True)
class Token:
    """One token: chosen expert → (gate weight, output of the expert)."""

    chosen: dict[int, tuple[float, tuple[float, ...]]]


def added(tokens: list[Token]) -> Accumulators:
    """The sums over these tokens, added one at a time."""
    sums = Accumulators.zeros(EXPERTS)
    for token in tokens:
        one = Accumulators.zeros(EXPERTS)
        one.total_tokens = 1
        for expert, (weight, output) in token.chosen.items():
            norm = math.hypot(*output)
            one.counts[expert] = 1
            one.weight_sum[expert] = weight
            one.norm_sum[expert] = norm
            one.weighted_norm_sum[expert] = weight * norm
            one.max_activation[expert] = max(0.0, *output)
            assert one.norm_square_sum is not None
            one.norm_square_sum[expert] = sum(number * number for number in output)
        sums.add(one)
    return sums


TOKENS = [
    Token({0: (0.75, (3.0, 4.0)), 1: (0.25, (0.0, -2.0))}),
    Token({0: (0.5, (-6.0, 8.0)), 3: (0.5, (1.0, 0.0))}),
]


def test_the_metrics_are_those_worked_out_by_hand() -> None:
    sums = added(TOKENS)
    assert sums.total_tokens == 2
    found = {name: row.tolist() for name, row in sums.metrics().items()}
    assert found == {
        "expert_frequency": [2, 1, 0, 1],
        "ean_sum": [15.0, 2.0, 0.0, 1.0],
        "ean_mean": [7.5, 2.0, 0.0, 1.0],
        "weighted_expert_frequency_sum": [1.25, 0.25, 0.0, 0.5],
        "weighted_ean_sum": [8.75, 0.5, 0.0, 0.5],
        "reap": [4.375, 0.5, 0.0, 0.5],
        # The largest component, not the largest magnitude, and never below 0: as REAP has it.
        "max_activations": [8.0, 0.0, 0.0, 1.0],
        # (25 + 100) / 2: the mean of the squares, not the square of the mean.
        "msan": [62.5, 4.0, 0.0, 1.0],
    }


def test_every_metric_is_there_in_float64() -> None:
    metrics = Accumulators.zeros(3).metrics()
    assert metrics.keys() == METRICS
    assert all(row.dtype == np.float64 and row.tolist() == [0, 0, 0] for row in metrics.values())


positive = st.floats(1e-6, 1e6)
output = st.tuples(*[st.floats(-1e6, 1e6)] * 3)
token = st.builds(
    Token, st.dictionaries(st.integers(0, EXPERTS - 1), st.tuples(positive, output), max_size=2)
)


@settings(max_examples=60, deadline=None)
@given(st.lists(token, max_size=24), st.data())
def test_parts_in_any_order_add_up_to_the_whole(tokens: list[Token], data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(tokens)), max_size=3)))
    parts = [tokens[a:b] for a, b in zip([0, *cuts], [*cuts, len(tokens)], strict=True)]
    total = Accumulators.zeros(EXPERTS)
    for part in data.draw(st.permutations(parts)):
        total.add(added(part))
    whole = added(tokens)
    assert total.total_tokens == whole.total_tokens == len(tokens)
    for name, expected in whole.arrays().items():
        found = total.arrays()[name]
        if found.dtype == np.int64 or name == "max_activation":
            np.testing.assert_array_equal(found, expected)
        else:
            np.testing.assert_allclose(found, expected, rtol=1e-12, atol=0)


def test_arrays_are_those_of_the_file_and_come_back() -> None:
    sums = added(TOKENS)
    arrays = sums.arrays()
    assert {name: (array.dtype.str[1:], array.shape) for name, array in arrays.items()} == {
        "total_tokens": ("i8", ()),
        "counts": ("i8", (4,)),
        "weight_sum": ("f8", (4,)),
        "norm_sum": ("f8", (4,)),
        "weighted_norm_sum": ("f8", (4,)),
        "max_activation": ("f8", (4,)),
        "norm_square_sum": ("f8", (4,)),
    }
    again = Accumulators.from_arrays(arrays, "s.pt", 3)
    again.add(Accumulators.zeros(4))
    assert again.counts.dtype == np.int64
    for name, array in sums.arrays().items():
        np.testing.assert_array_equal(again.arrays()[name], array)


def test_sums_of_an_older_file_are_read_and_a_total_with_them_lacks_what_they_lack() -> None:
    arrays = added(TOKENS).arrays()
    del arrays["norm_square_sum"]
    for order in (False, True):
        old, new = Accumulators.from_arrays(arrays, "old.pt", 3), added(TOKENS)
        assert old.metrics().keys() == METRICS - {"msan"}
        first, second = (old, new) if order else (new, old)
        first.add(second)
        assert first.metrics().keys() == METRICS - {"msan"}
        assert first.arrays().keys() == arrays.keys()
        np.testing.assert_array_equal(first.norm_sum, 2 * arrays["norm_sum"])


def test_accumulators_do_not_share_memory_with_their_arrays() -> None:
    arrays = added(TOKENS).arrays()
    Accumulators.from_arrays(arrays, "s.pt", 3).add(added(TOKENS))
    np.testing.assert_array_equal(arrays["counts"], [2, 1, 0, 1])


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("counts", None, "no accumulator 'counts'"),
        ("total_tokens", None, "no accumulator 'total_tokens'"),
        ("norm_sum", [1.0, 2.0], r"norm_sum has shape \[2\], counts has 4 experts"),
        ("counts", [], r"has shape \[0\]"),
        ("total_tokens", [2], r"total_tokens has shape \[1\]"),
        ("norm_sum", [1.0, math.nan, 1.0, 1.0], "norm_sum holds nan at expert 1"),
        ("weighted_norm_sum", [1.0, 0.0, math.inf, 1.0], "holds inf at expert 2"),
        ("max_activation", [1.0, 0.0, -1.0, 1.0], "holds -1.0 at expert 2"),
        ("norm_square_sum", [1.0, -1.0, 1.0, 1.0], "norm_square_sum holds -1.0 at expert 1"),
        ("counts", [3, 0, 0, 0], "counts 3.0 of 2.0 tokens"),
        ("counts", [0.5, 0, 0, 0], "counts 0.5 of 2.0 tokens"),
    ],
)
def test_numbers_that_cannot_be_sums_are_refused_by_name(
    name: str, value: list[float] | None, message: str
) -> None:
    arrays = added(TOKENS).arrays()
    if value is None:
        del arrays[name]
    else:
        arrays[name] = np.array(value)
    with pytest.raises(ScoreError, match=f"layer 7, .*{message}") as caught:
        Accumulators.from_arrays(arrays, "s.pt", 7)
    assert caught.value.where == "s.pt"
