"""Numbers as model cards write them."""

from __future__ import annotations

from collections.abc import Iterable


def parameters(count: int) -> str:
    """`1.03T`, `35.1B`, `640M`: three digits that count."""
    for unit, factor in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if count >= factor - factor // 2000:
            return f"{count / factor:.3g}{unit}"
    return str(count)


def percent(share: float) -> str:
    """A share of 1 as `65 %`, with a decimal where it has one."""
    return f"{round(100 * share, 1):g} %"


def counted(number: int, thing: str) -> str:
    """`1 layer`, `60 layers`."""
    return f"{number:,} {thing}" if number == 1 else f"{number:,} {thing}s"


def number_ranges(numbers: Iterable[int]) -> str:
    """Ascending numbers as `1-60` or `3-5, 7`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{a}-{b}" if b > a else str(a) for a, b in runs)
