"""What every report can do: be a JSON document, one line, and small tables in a notebook.

A report is a frozen dataclass of plain values. `--json` prints its document, the commands print
its title above their tables, and a notebook shows the title and the tables made here.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from html import escape
from itertools import islice
from typing import Any, ClassVar

from shardsurgeon._version import __version__
from shardsurgeon.errors import ShardSurgeonError, printable, redacted
from shardsurgeon.units import format_size, number_ranges, percent

# Raised where a key of a document goes away or comes to mean something else.
SCHEMA = 1

# What a notebook shows: a file of cells must stay small whatever the model.
_MOST_ROWS = 64
_MOST_LISTED = 8
_MOST_LETTERS = 48
_MOST_IN_FACT = 400
# Names of numbers that are bytes, and of those that are shares of 1.
_SIZES = re.compile(r"(^|_)(size|sizes|bytes|nbytes|space)(_|$)")
_SHARES = re.compile(r"(^|_)(dropped|share|shares|lost|cut)(_|$)")


class Titled(ABC):
    """What a notebook's cell may end in: as text it is its title, as HTML that and small tables.

    Its children are frozen dataclasses, without a repr of their own.
    """

    __slots__ = ()

    @property
    @abstractmethod
    def title(self) -> str:
        """The whole in one line."""

    @abstractmethod
    def shown(self) -> Iterable[tuple[str, Any]]:
        """What the tables show: (name, value)."""

    def __repr__(self) -> str:
        return printable(self.title)

    def _repr_html_(self) -> str:
        return as_html(self.title, self.shown())


class Report(Titled):
    """What a command did or found."""

    __slots__ = ()

    # Properties that stand in the document beside the fields.
    figures: ClassVar[tuple[str, ...]] = ()

    def shown(self) -> Iterable[tuple[str, Any]]:
        """Its fields and figures."""
        return _items(self)

    def to_dict(self) -> dict[str, Any]:
        """The document that `--json` prints: text, numbers, lists and dicts by text alone.

        A number that JSON lacks (inf, NaN) is None, a token in a text is three stars.
        """
        return document(self)


def document(report: Report | Mapping[str, Any]) -> dict[str, Any]:
    """A report, or what stands in for one, as the JSON document that is printed."""
    return {"schema": SCHEMA, "version": __version__, **_plain(report)}


def failure(where: str, problem: str, remedy: str, status: int) -> dict[str, Any]:
    """The `error` of the document of a command that failed; status: what it exits with."""
    parts = {"where": where, "problem": problem, "remedy": remedy}
    return {**{key: printable(text) for key, text in parts.items()}, "status": status}


def failure_of(error: ShardSurgeonError) -> dict[str, Any]:
    """The `error` that one of ours is."""
    return failure(error.where, error.problem, error.remedy, error.exit_status)


def _items(value: Any) -> Iterator[tuple[str, Any]]:
    """The named values of a dataclass; of a report its figures too."""
    names = [each.name for each in fields(value)]
    names += value.figures if isinstance(value, Report) else ()
    return ((name, getattr(value, name)) for name in names)


def _plain(value: Any) -> Any:
    """A value made of what JSON has."""
    if is_dataclass(value):
        return {name: _plain(item) for name, item in _items(value)}
    if isinstance(value, Mapping):
        return {redacted(str(key)): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, str):
        # Redacted value by value: in the document, a secret's end and a string's look alike.
        return redacted(str(value))
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def as_html(title: str, items: Iterable[tuple[str, Any]]) -> str:
    """A title and named values as HTML: what is small in one table, every sequence of rows in one.

    items: (name, value); the name says what a number is, as `total_size` and `share` do. Whatever
    stands in them is escaped, and long ones are cut: this is for the eye.
    """
    facts, below = [], []
    for name, value in items:
        label = name.replace("_", " ")
        if value is None or value == () or value == {}:
            continue
        if isinstance(value, Report):
            below.append(as_html(f"{label}: {value.title}", _items(value)))
        elif _is_rows(value):
            below.append(_table(label, value))
        else:
            facts.append((label, _shown(name, value, _MOST_IN_FACT)))
    rows = "".join(
        f"<tr><th>{_safe(label)}</th><td>{_safe(text)}</td></tr>" for label, text in facts
    )
    listed = f"<table>{rows}</table>" if rows else ""
    return f"<div><b>{_safe(title)}</b>{listed}{''.join(below)}</div>"


def _is_rows(value: Any) -> bool:
    return isinstance(value, tuple) and all(map(is_dataclass, value))


def _table(label: str, rows: Sequence[Any]) -> str:
    """Rows that are dataclasses of one kind; a column without a value in any row is left out."""
    shown = [dict(_items(row)) for row in rows[:_MOST_ROWS]]
    names = [name for name in shown[0] if any(row[name] not in (None, (), {}) for row in shown)]
    head = "".join(f"<th>{_safe(name.replace('_', ' '))}</th>" for name in names)
    body = "".join(
        "<tr>"
        + "".join(f"<td>{_safe(_shown(name, row[name], _MOST_LETTERS))}</td>" for name in names)
        + "</tr>"
        for row in shown
    )
    more = len(rows) - len(shown)
    rest = f"<p>{more:,} more {_safe(label)}</p>" if more else ""
    return f"<p>{_safe(label)}</p><table><tr>{head}</tr>{body}</table>{rest}"


def _safe(text: str) -> str:
    return escape(printable(text))


def _shown(name: str, value: Any, letters: int) -> str:
    """A value as a cell of a table, of so many letters at most."""
    text = _text(name, value)
    return text if len(text) <= letters else f"{text[: letters - 1]}…"


def _text(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return format_size(value) if _SIZES.search(name) else f"{value:,}"
    if isinstance(value, float):
        return percent(value) if _SHARES.search(name) else f"{value:.4g}"
    if isinstance(value, Report):
        return value.title
    if is_dataclass(value):
        return ", ".join(f"{label} {_text(label, item)}" for label, item in _items(value))
    if isinstance(value, Mapping):
        pairs = (f"{key}: {_text(name, item)}" for key, item in islice(value.items(), _MOST_LISTED))
        return ", ".join(pairs) + _more(value)
    if isinstance(value, list | tuple):
        if all(type(item) is int for item in value) and list(value) == sorted(set(value)):
            return number_ranges(value)
        return ", ".join(_text(name, item) for item in value[:_MOST_LISTED]) + _more(value)
    return str(value)


def _more(value: Mapping[Any, Any] | Sequence[Any]) -> str:
    more = len(value) - _MOST_LISTED
    return f", {more:,} more" if more > 0 else ""
