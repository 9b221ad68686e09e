"""Intervals of shares and of differences, against published ones and the equations they solve."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardsurgeon.errors import UsageError
from shardsurgeon.operations.intervals import answers_needed, newcombe, require_detect, wilson

Z2 = 1.959963984540054**2
COUNTED = st.integers(1, 5000).flatmap(lambda of: st.tuples(st.integers(0, of), st.just(of)))


# Newcombe, Statistics in Medicine 17 (1998), pages 857-872, table I, method 3.
@pytest.mark.parametrize(
    ("count", "of", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (7, 100, 0.0343, 0.1375),
    ],
)
def test_published_intervals_of_shares(count: int, of: int, low: float, high: float) -> None:
    found = wilson(count, of)
    assert found.value == count / of
    assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5)


# The same, pages 873-890, table II, method 10.
@pytest.mark.parametrize(
    ("first", "second", "low", "high"),
    [
        ((56, 70), (48, 80), 0.0524, 0.3339),
        ((9, 10), (3, 10), 0.1705, 0.8090),
        ((6, 7), (2, 7), 0.0582, 0.8062),
        ((5, 56), (0, 29), -0.0381, 0.1926),
        ((0, 10), (0, 20), -0.1611, 0.2775),
        ((10, 10), (0, 20), 0.6791, 1.0),
    ],
)
def test_published_intervals_of_differences(
    first: tuple[int, int], second: tuple[int, int], low: float, high: float
) -> None:
    found = newcombe(wilson(*first), wilson(*second))
    assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5)


@given(COUNTED)
def test_the_ends_are_the_shares_that_the_count_is_just_as_far_from_as_chance_allows(
    counted: tuple[int, int],
) -> None:
    count, of = counted
    found = wilson(count, of)
    assert 0 <= found.low <= found.value <= found.high <= 1
    for end in (found.low, found.high):
        assert math.isclose(
            (found.value - end) ** 2, Z2 * end * (1 - end) / of, rel_tol=1e-6, abs_tol=1e-12
        )


@given(COUNTED)
def test_failures_and_successes_mirror_each_other(counted: tuple[int, int]) -> None:
    count, of = counted
    failed, worked = wilson(count, of), wilson(of - count, of)
    assert (failed.low, failed.high) == pytest.approx((1 - worked.high, 1 - worked.low))


@given(COUNTED, COUNTED)
def test_a_difference_is_that_of_the_shares_within_its_ends_and_turns_its_sign(
    first: tuple[int, int], second: tuple[int, int]
) -> None:
    one, two = wilson(*first), wilson(*second)
    found, turned = newcombe(one, two), newcombe(two, one)
    assert found.value == pytest.approx(first[0] / first[1] - second[0] / second[1])
    below = math.sqrt((one.value - one.low) ** 2 + (two.high - two.value) ** 2)
    above = math.sqrt((one.high - one.value) ** 2 + (two.value - two.low) ** 2)
    assert (found.low, found.high) == pytest.approx((found.value - below, found.value + above))
    assert (turned.low, turned.high) == pytest.approx((-found.high, -found.low))
    assert -1 - 1e-12 <= found.low <= found.value <= found.high <= 1 + 1e-12


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0.005, 0.5))
def test_the_answers_needed_are_enough_and_one_less_is_not(
    first: float, second: float, detect: float
) -> None:
    def width(of: int) -> float:
        return newcombe(wilson(first * of, of), wilson(second * of, of)).width

    needed = answers_needed(first, second, detect)
    assert width(needed) <= detect
    assert needed <= 2 or width(needed - 1) > detect


def test_two_thousand_answers_tell_what_fifty_cannot() -> None:
    """The published case: 3.6 % of answers loop, then 7.2 %."""
    many = newcombe(wilson(144, 2000), wilson(72, 2000))
    few = newcombe(wilson(4, 50), wilson(2, 50))
    assert many.low > 0 > few.low


@pytest.mark.parametrize("detect", [0, 1, -0.1, math.nan, math.inf])
def test_a_difference_that_no_shares_have_is_refused(detect: float) -> None:
    with pytest.raises(UsageError, match="between 0 and 1"):
        require_detect(detect)
