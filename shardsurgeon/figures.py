"""Numbers as model cards write them."""

from __future__ import annotations


def parameters(count: int) -> str:
    """`1.03T`, `35.1B`, `640M`: three digits that count."""
    for unit, factor in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if count >= factor - factor // 2000:
            return f"{count / factor:.3g}{unit}"
    return str(count)


def percent(share: float) -> str:
    """A share of 1 as `65 %`, with a decimal where it has one."""
    return f"{round(100 * share, 1):g} %"
