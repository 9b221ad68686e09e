"""Where words go: reports to stdout, a bar in bytes to stderr."""

from __future__ import annotations

import io
import json
import math
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from tqdm import tqdm

    from shardsurgeon.execution.progress import Progress


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
