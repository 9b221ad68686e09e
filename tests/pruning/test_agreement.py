"""Rank correlations against their definitions, pair by pair; overlaps by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardsurgeon.pruning.agreement import kendall, overlap, spearman

NAN, INF = math.nan, math.inf


def sign(a: float, b: float) -> int:
    return (a > b) - (a < b)


def tau_b(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Kendall 1945: over all pairs, the sum of products of signs over the root of the squares."""
    pairs = [(sign(x[i], x[j]), sign(y[i], y[j])) for i in range(len(x)) for j in range(i)]
    size = sum(a * a for a, _ in pairs) * sum(b * b for _, b in pairs)
    return sum(a * b for a, b in pairs) / math.sqrt(size) if size else None


def rho(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Pearson's correlation of the ranks, in fractions; a tie has the mean of its ranks."""
    u, v = (
        [Fraction(sum(a > b for b in w) * 2 + sum(a == b for b in w) + 1, 2) for a in w]
        for w in (x, y)
    )
    mean = Fraction(len(x) + 1, 2)
    across = sum((a - mean) * (b - mean) for a, b in zip(u, v, strict=True))
    size = sum((a - mean) ** 2 for a in u) * sum((b - mean) ** 2 for b in v)
    return float(across) / math.sqrt(size) if size else None


# Few different values, so that ties are many; up to more than one division of the sort.
tied = st.lists(st.tuples(*[st.integers(0, 9).map(float)] * 2), min_size=2, max_size=150)
untied = st.lists(st.tuples(*[st.floats(-1e9, 1e9)] * 2), min_size=2, max_size=30)


@settings(max_examples=80, deadline=None)
@given(tied | untied)
def test_the_correlations_are_those_of_their_definitions(rows: list[tuple[float, float]]) -> None:
    x, y = zip(*rows, strict=True)
    for ours, definition in ((kendall, tau_b), (spearman, rho)):
        found, expected = ours(np.array(x), np.array(y)), definition(x, y)
        assert found == (None if expected is None else pytest.approx(expected, abs=1e-12))


def test_correlations_worked_by_hand() -> None:
    a, b = np.array([1.0, 2, 3, 4, 5]), np.array([1.0, 3, 2, 5, 4])
    assert kendall(a, b) == pytest.approx(0.6)  # 8 pairs agree, 2 do not
    assert spearman(a, b) == pytest.approx(0.8)  # 1 - 6 * 4 / (5 * 24)
    for correlation in (kendall, spearman):
        assert correlation(a, -a) == pytest.approx(-1)
        assert correlation(a, np.exp(a)) == pytest.approx(1)


def test_never_routed_ranks_lowest_and_preserved_highest() -> None:
    marked, plain = np.array([NAN, 1.0, INF, -5.0]), np.array([-9.0, 1.0, 9.0, -5.0])
    assert kendall(marked, plain) == pytest.approx(1)
    assert spearman(marked, plain) == pytest.approx(1)


def test_what_ranks_nothing_has_no_correlation() -> None:
    same, other = np.ones(4), np.arange(4.0)
    assert kendall(same, other) is None
    assert spearman(other, same) is None
    assert kendall(np.ones(1), np.ones(1)) is None


def test_overlaps_worked_by_hand() -> None:
    a, b = np.array([5.0, 4, 3, 2, 1, 0]), np.array([0.0, 9, 8, 7, 0, 0])
    both = overlap(a, b, 3)  # 0, 1, 2 and 1, 2, 3
    assert (both.kept, both.share, both.jaccard) == (3, pytest.approx(2 / 3), 0.5)
    assert overlap(a, a, 4).jaccard == overlap(a, a, 4).share == 1
    assert overlap(a, -a, 3).share == overlap(a, -a, 3).jaccard == 0


def test_an_overlap_breaks_ties_by_the_lower_id() -> None:
    assert overlap(np.ones(4), np.array([1.0, 1, 0, 0]), 2).share == 1
    assert overlap(np.array([NAN, NAN, 0.0]), np.array([1.0, 0, 2]), 2).share == 1


def test_a_large_layer_is_quick() -> None:
    numbers = np.random.default_rng(0)
    a = numbers.random(4096)
    b = a + numbers.random(4096)
    assert 0 < (kendall(a, b) or 0) < (spearman(a, b) or 0) < 1
