"""Sizes and counts: from text and to text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from fractions import Fraction

from shardsurgeon.errors import UsageError

# What file systems that share blocks between files share: whole blocks of this size, in bytes, at
# multiples of it in both files. Where blocks are larger, a probe finds that nothing can be shared.
BLOCK_NBYTES = 4096

_FACTORS = {
    "": 1,
    "B": 1,
    **{prefix: 10 ** (3 * power) for power, prefix in enumerate("KMGTP", start=1)},
    **{f"{prefix}B": 10 ** (3 * power) for power, prefix in enumerate("KMGTP", start=1)},
    **{f"{prefix}I": 2 ** (10 * power) for power, prefix in enumerate("KMGTP", start=1)},
    **{f"{prefix}IB": 2 ** (10 * power) for power, prefix in enumerate("KMGTP", start=1)},
}
_LETTERS = {"T": 10**12, "B": 10**9, "M": 10**6, "K": 10**3}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*([A-Za-z]*)\s*", re.ASCII)
_DECIMAL_COMMA = re.compile(r"(\s*\d*),(\d+\s*[A-Za-z]*\s*)", re.ASCII)
# A number without a unit that is no size of anything here, in bytes.
_TOO_FEW_NBYTES = 10_000

_NUMBER = re.compile(r"\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?|nan)\s*(%?)\s*", re.A | re.I)
# Ratios with a decimal comma, separated by anything; a list of ratios has no zeros in it.
_COMMA_RATIO = r"\s*0?,(\d+)\s*"
_COMMA_RATIOS = re.compile(rf"{_COMMA_RATIO}(?:[,; ]{_COMMA_RATIO})*", re.ASCII)
_LIKE_RATIOS = "write it like 0.65 or 65%, several like 0.5,0.65"


def parse_size(text: str, option: str = "size") -> int:
    """Turn `5GB` or `5g` (10^9 based), `5GiB` or `5Gi` (2^30 based) or a byte count into bytes.

    Raises UsageError, naming `option`, where the text is not a positive size, or a number so small
    that its unit was forgotten.
    """
    match = _SIZE.fullmatch(text)
    factor = _FACTORS.get(match[2].upper()) if match else None
    nbytes = int(Fraction(match[1]) * factor) if match and factor else 0
    if nbytes <= 0:
        comma = _DECIMAL_COMMA.fullmatch(text)
        meant = f"{comma[1].strip() or 0}.{comma[2].strip()}" if comma else ""
        how = f"did you mean {meant}?" if meant else "write it like 122GB, 5GiB or 500MB"
        raise UsageError(option, f"'{text}' is not a size", how)
    if match and not match[2] and nbytes < _TOO_FEW_NBYTES:
        raise UsageError(option, f"{nbytes} alone is bytes", f"did you mean {nbytes}GB?")
    return nbytes


def number_of(text: str, option: str, what: str) -> int:
    """Turn `32768`, `32,768` or `32k` (1024 each) into a number of `what`.

    Raises UsageError, naming `option`, where the text is no whole number above 0.
    """
    match = re.fullmatch(r"\s*(\d[\d,_]{0,14})\s*(k|m)?\s*", text, re.ASCII | re.I)
    factor = {"": 1, "k": 2**10, "m": 2**20}[(match[2] or "").lower()] if match else 0
    number = int(re.sub("[,_]", "", match[1])) * factor if match else 0
    if number < 1:
        problem = f"'{text}' is not a number of {what}"
        raise UsageError(option, problem, "write it like 32768 or 32k")
    return number


def parse_ratios(text: str, option: str = "--ratio") -> tuple[float, ...]:
    """Turn `0.65`, `65%` or a list such as `0.5,0.65` into ratios, each above 0 and below 1.

    Raises UsageError, naming `option`, with what was probably meant: for `65`, for `0,65`.
    """
    if _COMMA_RATIOS.fullmatch(text):
        meant = [f"0.{digits}" for digits in re.findall(rf"{_COMMA_RATIO}[,; ]?", text)]
        if any(float(ratio) for ratio in meant):
            problem = f"'{text.strip()}' has a decimal comma, and commas separate ratios"
            raise UsageError(option, problem, f"did you mean {','.join(meant)}?")
    values = []
    for part in text.split(","):
        match = _NUMBER.fullmatch(part)
        if match is None:
            raise UsageError(option, f"'{text}' is not a number", _LIKE_RATIOS)
        values.append(float(Fraction(match[1]) / 100) if match[2] else float(match[1]))
    require_ratios(values, option)
    return tuple(values)


def require_ratios(values: Sequence[float], option: str = "--ratio") -> None:
    """Raise UsageError, naming `option`, unless every value is above 0 and below 1.

    It says what was probably meant where they are percentages, or below 0.
    """
    # Written so that NaN, which compares false with everything, is refused too.
    wrong = next((value for value in values if not 0 < value < 1), None)
    if wrong is None:
        return
    meant = [_meant(value) for value in values]
    remedy = "give the fraction of the experts to remove, such as 0.5"
    if None not in meant:
        remedy = f"did you mean {','.join(f'{ratio:g}' for ratio in meant)}?"
    raise UsageError(option, f"{wrong:g} is not between 0 and 1", remedy)


def _meant(value: float) -> float | None:
    """The ratio that a number stands for; None where that is anyone's guess."""
    value = abs(value)
    if 0 < value < 1:
        return value
    return value / 100 if 2 <= value < 100 else None


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
