"""How far two scorings of the same experts agree: rank correlation, overlap of keep-lists. Pure.

Scores of different methods are on different scales; only their order can be compared. NaN, a
never-routed expert, ranks below everything, +inf, a preserved one, above it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]

# Below this, comparing each with each is quicker than dividing further.
_FEW = 64


@dataclass(frozen=True, slots=True)
class Overlap:
    """Two keep-lists of one length. kept: experts in each; common: in both.

    jaccard: common / in either; share: common / kept.
    """

    kept: int
    common: int

    @property
    def jaccard(self) -> float:
        """1 for the same experts, 0 for none in common."""
        return self.common / (2 * self.kept - self.common)

    @property
    def share(self) -> float:
        """The part of one list that is in the other; by chance, kept / experts."""
        return self.common / self.kept


def spearman(a: Values, b: Values) -> float | None:
    """Spearman's rho of two scorings of the same experts, float64 [experts].

    The correlation of their ranks, equal values sharing the mean of theirs. None where one of
    them ranks nothing: all its values are equal.
    """
    x, y = (_mean_ranks(values) for values in (a, b))
    x, y = x - x.mean(), y - y.mean()
    size = math.sqrt(float(x @ x)) * math.sqrt(float(y @ y))
    return min(1.0, max(-1.0, float(x @ y) / size)) if size else None


def kendall(a: Values, b: Values) -> float | None:
    """Kendall's tau-b: pairs ordered alike less pairs ordered otherwise, corrected for ties.

    None where one of them ranks nothing. Knight's method: sorted by one, what is out of order in
    the other are the discordant pairs.
    """
    x, y = (_codes(values) for values in (a, b))
    pairs = _pairs(np.array([len(x)]))
    tied_x, tied_y = (_pairs(np.bincount(codes)) for codes in (x, y))
    tied_both = _pairs(np.unique(x * len(y) + y, return_counts=True)[1])
    size = math.sqrt(pairs - tied_x) * math.sqrt(pairs - tied_y)
    if not size:
        return None
    discordant = _inversions(y[np.lexsort((y, x))])
    agreement = pairs - tied_x - tied_y + tied_both - 2 * discordant
    return min(1.0, max(-1.0, agreement / size))


def overlap(a: Values, b: Values, kept: int) -> Overlap:
    """What two keep-lists of the `kept` most salient experts share; ties keep the lower id."""
    return Overlap(kept, len(_keep_list(a, kept) & _keep_list(b, kept)))


def _keep_list(values: Values, kept: int) -> set[int]:
    return set(np.argsort(-_order(values), kind="stable")[:kept].tolist())


def _order(values: Values) -> Values:
    return np.where(np.isnan(values), -np.inf, values)


def _codes(values: Values) -> NDArray[np.int64]:
    """Equal values as equal numbers 0, 1, …, in order."""
    return np.asarray(np.unique(_order(values), return_inverse=True)[1], np.int64)


def _mean_ranks(values: Values) -> Values:
    codes = _codes(values)
    counts = np.bincount(codes)
    return np.asarray((np.cumsum(counts) - (counts - 1) / 2)[codes])


def _pairs(counts: NDArray[np.int64]) -> int:
    return int((counts * (counts - 1) // 2).sum())


def _inversions(codes: NDArray[np.int64]) -> int:
    """How many pairs stand in descending order."""
    count = len(codes)
    if count <= _FEW:
        return int(np.triu(codes[:, None] > codes[None, :]).sum())
    left, right = codes[: count // 2], codes[count // 2 :]
    across = np.searchsorted(np.sort(right), left, side="left").sum()
    return _inversions(left) + _inversions(right) + int(across)
