"""Rank correlations against their definitions, pair by pair; overlaps by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardsurgeon.errors import ScoreError
from shardsurgeon.pruning.agreement import OverlapReport, compare, kendall, overlap, spearman
from shardsurgeon.scores.table import Scores

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


def scores(name: str, metric: str, layers: dict[int | str, list[float]]) -> Scores:
    return Scores(name, {layer: {metric: np.array(row)} for layer, row in layers.items()})


def test_two_files_are_compared_in_the_layers_that_both_have() -> None:
    up, down, flat = [1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0], [1.0] * 4
    a = scores("a.npz", "reap", {0: up, 1: up, 2: [*up, 5.0], 5: up})
    b = scores("b.npz", "ean", {1: down, 2: [*up, 5.0], 3: up, 0: flat})
    report = compare(a, b, [0.5], ("reap", None))
    assert (report.a, report.b, report.metric_a, report.metric_b) == (
        "a.npz",
        "b.npz",
        "reap",
        "ean",
    )
    assert ([layer.layer for layer in report.layers], report.only_a, report.only_b) == (
        [0, 1, 2],
        (5,),
        (3,),
    )
    assert [layer.kendall for layer in report.layers] == [None, -1.0, pytest.approx(1.0)]
    # Of four 2 stay, of five 3: {2, 3} and {0, 1}, twice, and the same three.
    assert [layer.overlaps["0.5"] for layer in report.layers] == [
        OverlapReport(2, 0.0, 0.0),
        OverlapReport(2, 0.0, 0.0),
        OverlapReport(3, 1.0, 1.0),
    ]
    mean = report.mean
    assert (mean.layer, mean.num_experts) == ("mean", 5)
    assert [mean.spearman, mean.kendall] == pytest.approx([0.0, 0.0])
    assert mean.overlaps == {"0.5": OverlapReport(None, pytest.approx(1 / 3), pytest.approx(1 / 3))}


def test_each_file_is_compared_by_the_metric_that_is_named_for_it() -> None:
    up, down = np.array([1.0, 2.0, 3.0]), np.array([3.0, 2.0, 1.0])
    both = Scores("x.npz", {1: {"reap": up, "ean": down}})
    for metrics, agree in ((("reap", "ean"), -1.0), (("ean", "ean"), 1.0)):
        report = compare(both, both, [], metrics)
        assert (report.metric_a, report.metric_b) == metrics
        assert report.layers[0].spearman == report.mean.spearman == pytest.approx(agree)


def test_rows_without_names_are_the_layers_of_the_other_file() -> None:
    table = Scores("table.npy", {}, rows={"reap": np.array([[1.0, 2.0], [2.0, 1.0]])})
    named = scores("b.npz", "reap", {4: [1.0, 2.0], 7: [1.0, 2.0], "mtp.0": [1.0, 2.0]})
    for one, other in ((table, named), (named, table)):
        report = compare(one, other, [], (None, None))
        assert [(layer.layer, layer.kendall) for layer in report.layers] == [(4, 1.0), (7, -1.0)]


@pytest.mark.parametrize(
    ("layers", "says"),
    [
        ({9: [1.0, 2.0]}, r"b\.npz: has no layer in common with a\.npz"),
        ({1: [1.0, 2.0]}, r"b\.npz: layer 1 has 2 scores, in a\.npz 3"),
    ],
)
def test_files_of_two_models_are_not_compared(
    layers: dict[int | str, list[float]], says: str
) -> None:
    with pytest.raises(ScoreError, match=says):
        compare(
            scores("a.npz", "reap", {1: [1.0, 2.0, 3.0]}),
            scores("b.npz", "reap", layers),
            [0.5],
            (None, None),
        )
