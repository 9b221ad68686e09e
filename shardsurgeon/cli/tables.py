"""Numbers and tables as people read them, at 80 columns. Knows no reports."""

from __future__ import annotations

import os
import shlex
import subprocess
import textwrap
from collections.abc import Iterable, Sequence

WIDTH = 80
_LABEL = 14


def fact(label: str, text: str) -> list[str]:
    """One aligned line `label  text`, wrapped under itself where it is too long."""
    indent = " " * (_LABEL + 2)
    lines = textwrap.wrap(
        text,
        WIDTH,
        initial_indent=f"  {label:<{_LABEL}}",
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return lines or [f"  {label}"]


def facts(pairs: Iterable[tuple[str, str]]) -> list[str]:
    """Aligned lines, one fact after another."""
    return [line for label, text in pairs for line in fact(label, text)]


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Right-aligned columns under headings, whose lines are separated by newlines."""
    rows = list(rows)
    heads = [heading.split("\n") for heading in headings]
    height = max(len(head) for head in heads)
    heads = [[""] * (height - len(head)) + head for head in heads]
    lines = [*zip(*heads, strict=True), *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headings))]
    gap = 2 if sum(widths) + 2 * len(widths) <= WIDTH else 1
    out = [
        "".join(f"{cell:>{width + gap}}" for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]
    rule = "".join(" " * gap + "-" * width for width in widths)
    return [*out[:height], rule, *out[height:]]


def percent(share: float | None) -> str:
    """A share of 1 as `40.4%`; `-` where it is unknown."""
    return "-" if share is None else f"{100 * share:.1f}%"


def change(before: int, after: int, shown: Sequence[str]) -> str:
    """Two sizes as `594.1 GB -> 240.3 GB (40.4%)`; shown: how to write them."""
    share = f" ({percent(after / before)})" if before else ""
    return f"{shown[0]} -> {shown[1]}{share}"


def parameters(count: int | None) -> str:
    """A parameter count as model cards write it, `35.1B`; `-` where it is unknown."""
    if count is None:
        return "-"
    for unit, factor in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if count >= factor - factor // 2000:
            return f"{count / factor:,.1f}{unit}"
    return str(count)


def saliency(value: float | None) -> str:
    """Four significant digits; `-` where there is none."""
    return "-" if value is None else f"{value:.4g}"


def as_typed(path: str) -> str:
    """A path as it must be typed in this system's shell."""
    return subprocess.list2cmdline([path]) if os.name == "nt" else shlex.quote(path)
