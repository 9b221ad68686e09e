"""Printing: reports as JSON or text, progress bars, numbers and tables at 80 columns."""

from __future__ import annotations

import io
import json
import math
import os
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from tqdm import tqdm

    from shardsurgeon.execution.workers import Progress

WIDTH = 80
_LABEL = 14


def print_lines(lines: Iterable[str]) -> None:
    """Print a report for people."""
    click.echo("\n".join(lines))


def print_json(document: Any) -> None:
    """Print one JSON document, plain ASCII. A number that JSON lacks (inf, NaN) becomes null."""
    click.echo(json.dumps(_finite(document), indent=2, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def let_any_text_through() -> None:
    """File names need be no text, and consoles need not know every letter: escape those."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def silence_stdout() -> None:
    """Where stdout takes no more, point it at nothing, so that exit does not fail on it too."""
    try:
        sys.stdout.flush()
    except OSError:
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, sys.stdout.fileno())
        os.close(nothing)


class ByteBar:
    """A tqdm bar in bytes, with rate and time left; opens at the first news it hears."""

    def __init__(self) -> None:
        """Show nothing yet."""
        self._bar: tqdm[Any] | None = None

    def on_progress(self, progress: Progress) -> None:
        """Hear of a run. Bytes that an earlier run left count as done, not towards the rate."""
        self.on_bytes(progress.done, progress.total, progress.resumed)
        if self._bar is not None:
            shards = f"{progress.shards_done}/{progress.shards_total} shards"
            shards += f", {progress.shards_sent} sent" if progress.shards_sent else ""
            self._bar.set_description_str(shards, refresh=False)

    def on_bytes(self, done: int, total: int, resumed: int = 0) -> None:
        """Hear that `done` of `total` bytes are behind us."""
        if self._bar is None:
            from tqdm import tqdm

            self._bar = tqdm(
                total=total,
                initial=resumed,
                unit="B",
                unit_scale=True,
                dynamic_ncols=True,
                file=sys.stderr,
            )
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        """Leave the bar as it is and end its line."""
        if self._bar is not None:
            self._bar.close()


def shows_progress(asked: bool | None) -> bool:
    """Whether to show bars. asked: what the user wants; None: where stderr is a terminal."""
    return sys.stderr.isatty() if asked is None else asked


@contextmanager
def byte_bar(asked: bool | None) -> Iterator[ByteBar | None]:
    """A bar for the time of a `with`; None where nobody would see it. asked: as above."""
    if not shows_progress(asked):
        yield None
        return
    bar = ByteBar()
    try:
        yield bar
    finally:
        bar.close()


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
