"""Pieces of a page as HTML: tables, facts, intervals, a curve with two axes. Text is escaped here.

A curve is SVG that the page's style sheet colours, so that it follows dark mode and print.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape

from shardsurgeon.errors import printable

# Of the drawing, in units of its own; text in it is some 13 of them high.
_WIDTH, _HEIGHT = 480, 300
_LEFT, _TOP, _BOTTOM = 62, 30, 46
# With an axis of sizes at the right, and without.
_SIZED, _BARE = 96, 24
_TICKS = 5
# Of the points of a series, so that no colour is needed to tell two apart.
_SHAPES = (
    "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0",
    "M-4-4h8v8h-8z",
    "M0-5l5 9h-10z",
    "M0-6l5 6-5 6-5-6z",
)


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of text under headings. legend: what a reader must know of them, a line each."""

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    legend: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Point:
    """A point of a curve. label: what is said where one points at it; marked: with a ring."""

    x: float
    y: float
    label: str
    marked: bool = False


@dataclass(frozen=True, slots=True)
class Series:
    """Points of one kind; joined: with a line through them, in the order of x."""

    name: str
    points: Sequence[Point]
    joined: bool = True


def safe(text: object) -> str:
    """Text from anywhere as HTML that is nothing but text: escaped, without secrets."""
    return escape(printable(str(text)))


def section(name: str, title: str, *parts: str) -> str:
    """A part of the page; "" where all that it has in it is empty. name: what links call it."""
    if not any(parts):
        return ""
    return f'<section id="{name}"><h2>{safe(title)}</h2>{"".join(parts)}</section>\n'


def paragraph(text: str) -> str:
    """A line of small text."""
    return f'<p class="note">{safe(text)}</p>'


def facts(items: Iterable[tuple[str, str]]) -> str:
    """Names and values; those without a value are left out."""
    rows = "".join(f"<dt>{safe(name)}</dt><dd>{safe(text)}</dd>" for name, text in items if text)
    return f"<dl>{rows}</dl>" if rows else ""


def table(found: Table) -> str:
    """A table in a box that scrolls by itself where the screen is narrow."""
    head = "".join(f'<th scope="col">{safe(text)}</th>' for text in found.headings)
    body = "".join(_row(map(safe, row)) for row in found.rows)
    return _boxed(head, body) + "".join(map(paragraph, found.legend))


def interval_table(
    headings: Sequence[str], rows: Sequence[tuple[Sequence[str], tuple[float, float, float]]]
) -> str:
    """A table whose last column draws intervals: (cells, (low, value, high)) in shares of 1."""
    top = max((high for _, (_, _, high) in rows), default=0.0) or 1.0
    head = "".join(f'<th scope="col">{safe(text)}</th>' for text in headings)
    head += f'<th scope="col" class="wide">0 to {100 * top:.2f} %</th>'
    body = "".join(_row([*map(safe, cells), _interval(ends, top)]) for cells, ends in rows)
    return _boxed(head, body)


def _interval(ends: tuple[float, float, float], top: float) -> str:
    low, value, high = (100 * end / top for end in ends)
    line = f'<i style="left:{low:.2f}%;width:{high - low:.2f}%"></i>'
    return f'<span class="interval">{line}<b style="left:{value:.2f}%"></b></span>'


def _row(cells: Iterable[str]) -> str:
    first, *others = cells
    return f'<tr><th scope="row">{first}</th>' + "".join(f"<td>{c}</td>" for c in others) + "</tr>"


def _boxed(head: str, body: str) -> str:
    rows = f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="box" tabindex="0"><table>{rows}</table></div>'


def curve(
    series: Sequence[Series],
    title: str,
    size: Callable[[float], float] | None = None,
    size_text: Callable[[float], str] = str,
) -> str:
    """Points over the share of experts removed, and, dashed, the size on an axis at the right.

    series: y from 0 up; title: what y is; size: share removed → bytes, None to go without.
    """
    points = [point for each in series for point in each.points]
    step, most = _scale(max((point.y for point in points), default=0.0))
    right = min(1.0, max((point.x for point in points), default=0.0))
    right = min(1.0, max(0.1, math.ceil(right * 10 + 0.5) / 10))

    end = _WIDTH - (_BARE if size is None else _SIZED)

    def x(share: float) -> float:
        return _LEFT + share / right * (end - _LEFT)

    def y(share: float) -> float:
        return _HEIGHT - _BOTTOM - min(share, 1.0) * (_HEIGHT - _TOP - _BOTTOM)

    parts = [*_axes(right, step, most, x, y)]
    if size is not None:
        whole = size(0.0)
        parts.append(_path("size", [(x(0), y(1)), (x(right), y(size(right) / whole))]))
        for number in range(round(most / step) + 1):
            share = number * step / most
            text = safe(size_text(share * whole))
            parts.append(_text(end + 6, y(share) + 4, text, "start"))
        parts.append(_text(_WIDTH - 4, 16, "size, dashed", "end"))
    for number, each in enumerate(series):
        shape = _SHAPES[number % len(_SHAPES)]
        parts.append(f'<g class="series s{number % len(_SHAPES)}">')
        if each.joined:
            along = sorted(each.points, key=lambda point: point.x)
            parts.append(_path("line", [(x(p.x), y(p.y / most)) for p in along]))
        for point in each.points:
            at = f"translate({x(point.x):.1f} {y(point.y / most):.1f})"
            ring = '<circle class="ring" r="9"/>' if point.marked else ""
            drawn = f'<title>{safe(point.label)}</title>{ring}<path d="{shape}"/>'
            parts.append(f'<g transform="{at}">{drawn}</g>')
        parts.append("</g>")
    parts.append(_text(4, 16, safe(title), "start"))
    parts.append(_text(x(right / 2), _HEIGHT - 6, "experts removed", "middle"))
    label = safe(f"{title} over the share of experts removed")
    drawing = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">'
    return f"{drawing}{''.join(parts)}</svg>{_legend(series)}"


def _axes(
    right: float,
    step: float,
    most: float,
    x: Callable[[float], float],
    y: Callable[[float], float],
) -> Iterator[str]:
    for number in range(round(most / step) + 1):
        at = y(number * step / most)
        yield f'<path class="grid" d="M{_LEFT} {at:.1f}H{x(right):.1f}"/>'
        yield _text(_LEFT - 6, at + 4, f"{number * step:.3g}", "end")
    wide = 2 if right > 0.5 else 1
    for tenth in range(0, round(right * 10) + 1, wide):
        yield _text(x(tenth / 10), _HEIGHT - _BOTTOM + 18, f"{10 * tenth} %", "middle")


def _scale(top: float) -> tuple[float, float]:
    """A round step, and the multiple of it that a value up to `top` needs."""
    if not 0 < top < math.inf:
        return 0.25, 1.0
    rough = top / (_TICKS - 1)
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * f for f in (1, 2, 2.5, 5, 10) if unit * f >= rough * (1 - 1e-9))
    return step, step * math.ceil(top / step * (1 - 1e-9))


def _path(kind: str, points: Iterable[tuple[float, float]]) -> str:
    line = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    return f'<path class="{kind}" d="M{line}"/>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>'


def _legend(series: Sequence[Series]) -> str:
    box = '<svg viewBox="-7 -7 14 14" aria-hidden="true">'
    rows = "".join(
        f'<li class="series s{n % len(_SHAPES)}">{box}<path d="{_SHAPES[n % len(_SHAPES)]}"/></svg>'
        f"{safe(each.name)}</li>"
        for n, each in enumerate(series)
    )
    return f'<ul class="legend">{rows}</ul>'
