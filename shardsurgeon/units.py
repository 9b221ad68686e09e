"""Sizes and counts: from text and to text."""

from __future__ import annotations

import re
from collections.abc import Iterable
from fractions import Fraction

from shardsurgeon.errors import UsageError

_FACTORS = {
    "": 1,
    "B": 1,
    **{f"{prefix}B": 10 ** (3 * power) for power, prefix in enumerate("KMGTP", start=1)},
    **{f"{prefix}IB": 2 ** (10 * power) for power, prefix in enumerate("KMGTP", start=1)},
}
_LETTERS = {"T": 10**12, "B": 10**9, "M": 10**6, "K": 10**3}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


def parse_size(text: str, option: str = "size") -> int:
    """Turn `5GB` (10^9 based), `5GiB` (2^30 based) or a plain byte count into bytes.

    Raises UsageError, naming `option`, where the text is not a positive size.
    """
    match = _SIZE.fullmatch(text)
    factor = _FACTORS.get(match[2].upper()) if match else None
    nbytes = int(Fraction(match[1]) * factor) if match and factor else 0
    if nbytes <= 0:
        raise UsageError(option, f"'{text}' is not a size", "write it like 122GB, 5GiB or 500MB")
    return nbytes


def format_size(nbytes: int) -> str:
    """Bytes as a short decimal size, 10^9 based as on model cards: `208.4 GB`."""
    if abs(nbytes) < 1000:
        return f"{nbytes} B"
    value = float(nbytes)
    for unit in ("kB", "MB", "GB", "TB"):
        value /= 1000
        if abs(value) < 999.95 or unit == "TB":
            return f"{value:.1f} {unit}"
    raise AssertionError("unreachable")


def number_ranges(numbers: Iterable[int]) -> str:
    """Ascending numbers as `1-60` or `3-5, 7`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{a}-{b}" if b > a else str(a) for a, b in runs)


def counted(count: int, thing: str) -> str:
    """`1 shard`, `64 shards`."""
    return f"{count:,} {thing}" if count == 1 else f"{count:,} {thing}s"


def parameters(count: int, form: str = ".3g", units: str = "TBMK") -> str:
    """A parameter count as `1.03T`, `35.1B`, `640M`: three digits that count.

    form: how the number is written; units: the letters that may follow it, largest first.
    """
    for unit in units:
        factor = _LETTERS[unit]
        # What would be written as 1000 of the next unit is written as 1 of this one.
        if count >= factor - factor // 2000:
            return f"{count / factor:{form}}{unit}"
    return str(count)


def percent(share: float) -> str:
    """A share of 1 as `65 %`, with a decimal where it has one."""
    return f"{round(100 * share, 1):g} %"
