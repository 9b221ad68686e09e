"""How sure a share is that was counted: intervals of shares and of their differences.

Wilson's score interval for a share, and for the difference of two shares Newcombe's hybrid of two
of them (Statistics in Medicine 17, 1998, 873-890, method 10). Both hold where shares are close to
0, as those of failures are, and never leave the range of what they estimate. Answers are taken as
independent of one another, those to the same prompt too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from shardsurgeon.errors import UsageError

# Of the normal distribution, what lies within so many deviations: 95 %.
_Z = 1.959963984540054
# Nobody asks for more answers; the search for a number ends here.
_MOST_NEEDED = 10**12


@dataclass(frozen=True, slots=True)
class Interval:
    """Where a value lies with a confidence of 95 %: from low to high, around value."""

    value: float
    low: float
    high: float

    @property
    def width(self) -> float:
        """How far apart its ends are."""
        return self.high - self.low


def wilson(count: float, of: float) -> Interval:
    """The share count / of, and its interval. of: above 0; neither has to be whole."""
    share, z2 = count / of, _Z * _Z
    centre = (share + z2 / (2 * of)) / (1 + z2 / of)
    half = _Z / (1 + z2 / of) * math.sqrt(share * (1 - share) / of + z2 / (4 * of * of))
    # At the ends rounding would leave the range by a hair.
    low = max(centre - half, 0.0) if count else 0.0
    high = min(centre + half, 1.0) if count < of else 1.0
    return Interval(share, low, high)


def newcombe(first: Interval, second: Interval) -> Interval:
    """The difference first - second of two shares, given as `wilson` gives them."""
    value = first.value - second.value
    below = math.hypot(first.value - first.low, second.high - second.value)
    above = math.hypot(first.high - first.value, second.value - second.low)
    return Interval(value, value - below, value + above)


def answers_needed(first: float, second: float, detect: float) -> int:
    """How many answers each of two shares takes until the interval of their difference is no wider
    than `detect`, if the shares stay what they are.
    """
    few, many = 1, 2
    while _width(first, second, many) > detect and many < _MOST_NEEDED:
        few, many = many, 2 * many
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (middle, many) if _width(first, second, middle) > detect else (few, middle)
    return many


def _width(first: float, second: float, of: int) -> float:
    return newcombe(wilson(first * of, of), wilson(second * of, of)).width


def require_detect(detect: float) -> None:
    """Raise UsageError, naming --detect, unless it is a difference that shares can have."""
    if not 0 < detect < 1:
        remedy = "give a difference of shares, such as 0.02 for two in a hundred"
        raise UsageError("--detect", f"{detect:g} is not between 0 and 1", remedy)
