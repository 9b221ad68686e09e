"""Sizes as people write them, and back."""

from __future__ import annotations

import re
from fractions import Fraction

from shardsurgeon.errors import UsageError

_FACTORS = {
    "": 1,
    "B": 1,
    **{f"{prefix}B": 10 ** (3 * power) for power, prefix in enumerate("KMGTP", start=1)},
    **{f"{prefix}IB": 2 ** (10 * power) for power, prefix in enumerate("KMGTP", start=1)},
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


def parse_size(text: str, option: str = "size") -> int:
    """Turn `5GB` (10^9 based), `5GiB` (2^30 based) or a plain byte count into bytes.

    Raises UsageError, naming `option`, where the text is no positive size.
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
