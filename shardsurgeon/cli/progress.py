"""What a command is at, on stderr: one line in place on a terminal, plain lines anywhere else.

The work tells its phases (`storage.phases`) and logs what happens meanwhile; how that is shown is
decided here, once for all commands. A thread looks at the phase a few times a second and writes, so
that counting costs the work next to nothing and a phase that never counts is seen to go on.

On a terminal there is a bar for bytes and `reading headers 12/64` for the rest; the line goes when
its phase ends. Elsewhere every phase has a line when it begins, and then one every 30 s or 5 %.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import StrEnum

import click

from shardsurgeon.errors import UsageError, printable
from shardsurgeon.storage.phases import BYTES, Phase, listening
from shardsurgeon.units import format_size

VARIABLE = "SHARDSURGEON_PROGRESS"
PROGRAM = "shardsurgeon"

# Seconds between two looks at the phase.
_TICK = 0.2
# A phase without numbers says how long it has lasted from then on.
_SAID_SECONDS = 2.0
# Without a terminal: so many seconds from one line to the next, or so much of the whole.
_LINE_SECONDS, _LINE_SHARE = 30.0, 0.05
# ... but no lines that follow each other faster than that, however fast the work is.
_LEAST_SECONDS = 2.0
# Of drawing a line anew because a phase begins: shorter phases would only flicker.
_FLICKER_SECONDS = 0.05
_SILENT = logging.CRITICAL + 1


class Mode(StrEnum):
    """How progress is shown; what SHARDSURGEON_PROGRESS may say."""

    AUTO = "auto"
    BAR = "bar"
    PLAIN = "plain"
    NONE = "none"


class _Display:
    """Shows the innermost phase that is under way. Its methods are for any thread."""

    def __init__(self, mode: Mode) -> None:
        """mode: BAR or PLAIN."""
        self._in_place = mode is Mode.BAR
        self._stream = sys.stderr
        self._lock = threading.RLock()
        # Gone with the first phase that the work names.
        self._starting = Phase("starting")
        self._phases = [self._starting]
        self._drawn = ""
        self._drawn_at = self._lined_at = 0.0
        self._lined: tuple[str, float] = ("", 0.0)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work, name="progress", daemon=True)
        self._show(self._starting)
        with suppress(RuntimeError):  # where the system starts no more threads, nothing ticks
            self._thread.start()

    def begin(self, phase: Phase) -> None:
        """Show the phase from now on."""
        with self._lock:
            self._phases = [each for each in self._phases if each is not self._starting]
            self._phases.append(phase)
            self._show(phase)

    def end(self, phase: Phase) -> None:
        """Show what it was a part of, if anything."""
        with self._lock:
            self._phases = [each for each in self._phases if each is not phase]
            if not self._phases:
                self.clear()

    def line(self, text: str) -> None:
        """Print a line that stays."""
        with self._lock:
            self.clear()
            self._write(f"{PROGRAM}: {text}\n")

    def clear(self) -> None:
        """Take the line away that is shown in place, if one is."""
        with self._lock:
            if self._drawn:
                self._write("\r" + " " * len(self._drawn) + "\r")
                self._drawn = ""

    def rest(self) -> None:
        """Show nothing until another phase begins."""
        with self._lock:
            self._phases = []
            self.clear()

    def close(self) -> None:
        """Show nothing any more."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join(_TICK)
        self.rest()

    def _work(self) -> None:
        while not self._over.wait(_TICK):
            with self._lock:
                if self._over.is_set() or not self._phases:
                    continue
                if self._in_place:
                    self._draw(self._phases[-1])
                elif self._is_due(self._phases[-1]):
                    self._say(self._phases[-1])

    def _show(self, phase: Phase) -> None:
        if not self._in_place:
            # Of a phase within another, only if it lasts.
            if len(self._phases) == 1 and phase.name != self._lined[0]:
                self._say(phase)
        elif phase.total or time.monotonic() >= self._drawn_at + _FLICKER_SECONDS:
            self._draw(phase)

    def _draw(self, phase: Phase) -> None:
        width = _width(self._stream)
        text = status(phase, width, _encodes_bar(self._stream))
        if text != self._drawn:
            self._write("\r" + text + " " * (len(self._drawn) - len(text)))
        self._drawn, self._drawn_at = text, time.monotonic()

    def _is_due(self, phase: Phase) -> bool:
        silent = time.monotonic() - self._lined_at
        if phase.name != self._lined[0]:
            return silent >= _LEAST_SECONDS and time.monotonic() >= phase.begun + _LEAST_SECONDS
        more = _share(phase) >= self._lined[1] + _LINE_SHARE
        return silent >= _LINE_SECONDS or (silent >= _LEAST_SECONDS and more)

    def _say(self, phase: Phase) -> None:
        self._lined, self._lined_at = (phase.name, _share(phase)), time.monotonic()
        self.line(plain(phase))

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


# The display of the command that runs; what is printed beside it takes its line away first.
_display: _Display | None = None


def rest() -> None:
    """Take away what is shown in place: the report is about to be printed."""
    if _display is not None:
        _display.rest()


@contextmanager
def shown(quiet: bool = False, verbose: bool = False, asked: bool | None = None) -> Iterator[None]:
    """Show what happens in a `with`: the phases, and what the package logs.

    quiet: show nothing; verbose: log in detail; asked: whether there is to be progress, None for
    what SHARDSURGEON_PROGRESS says. Raises UsageError for words that contradict each other.
    """
    global _display
    if quiet and (verbose or asked):
        other = "--verbose" if verbose else "--progress"
        raise UsageError("--quiet", f"and {other} contradict each other", "give one of them")
    mode = _mode(False if quiet else asked)
    level = logging.WARNING if mode is Mode.NONE else logging.INFO
    level = _SILENT if quiet else logging.DEBUG if verbose else level
    with _logged(level):
        if mode is Mode.NONE:
            yield
            return
        _display = display = _Display(mode)
        try:
            with listening(display):
                yield
        finally:
            _display = None
            display.close()


def _mode(asked: bool | None) -> Mode:
    words = os.environ.get(VARIABLE) or Mode.AUTO
    try:
        mode = Mode(words)
    except ValueError:
        problem = f"'{words}' is none of {', '.join(Mode)}"
        raise UsageError(VARIABLE, problem, "correct it or unset it") from None
    if asked is False or (mode is Mode.NONE and asked is None):
        return Mode.NONE
    if mode in (Mode.AUTO, Mode.NONE):
        able = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        return Mode.BAR if able else Mode.PLAIN
    return mode


class _Lines(logging.Handler):
    """What the package logs, as lines on stderr that no bar is torn by."""

    def emit(self, record: logging.LogRecord) -> None:
        text = printable(record.getMessage())
        if _display is not None:
            _display.line(text)
        else:
            click.echo(f"{PROGRAM}: {text}", err=True)


@contextmanager
def _logged(level: int) -> Iterator[None]:
    """Within a `with`, print what the package logs, from a level on."""
    log, lines, before = logging.getLogger(PROGRAM), _Lines(level), logging.getLogger(PROGRAM).level
    log.addHandler(lines)
    log.setLevel(min(level, logging.WARNING))
    try:
        yield
    finally:
        log.setLevel(before)
        log.removeHandler(lines)


def status(phase: Phase, width: int, blocks: bool = True) -> str:
    """A phase as one line in place, less than `width` columns. blocks: draw bars with them."""
    name = printable(f"{phase.name} {phase.detail}".rstrip())
    seconds = time.monotonic() - phase.begun
    if phase.unit and phase.total:
        from tqdm import tqdm

        return tqdm.format_meter(
            min(phase.done, phase.total),
            phase.total,
            seconds,
            ncols=width - 1,
            prefix=name,
            ascii=not blocks,
            unit=phase.unit,
            unit_scale=True,
            initial=phase.resumed,
        )
    if phase.total:
        name += f" {phase.done}/{phase.total}"
    if seconds >= _SAID_SECONDS:
        name += f" ({_duration(seconds)})"
    return name[: width - 1]


def plain(phase: Phase) -> str:
    """A phase as a line of a log: `copying: 45 %, 93.8 GB of 208.4 GB, 410.2 MB/s, 4 min left`."""
    seconds = time.monotonic() - phase.begun
    if not phase.total:
        words = [f"{_duration(seconds)} so far"] if seconds >= _SAID_SECONDS else []
    elif not phase.done:
        words = [_amount(phase.total, phase.unit)]
    elif phase.unit:
        done, total = (_amount(count, phase.unit) for count in (phase.done, phase.total))
        words = [f"{_share(phase):.0%}".replace("%", " %"), f"{done} of {total}"]
        rate = (phase.done - phase.resumed) / max(seconds, 0.001)
        if rate > 0 and seconds >= _SAID_SECONDS:
            left = (phase.total - phase.done) / rate
            words += [f"{_amount(int(rate), phase.unit)}/s", f"{_duration(left)} left"]
    else:
        words = [f"{phase.done:,} of {phase.total:,}"]
    words = [*words, *([phase.detail] if phase.detail else [])]
    return printable(phase.name + (f": {', '.join(words)}" if words else ""))


def _amount(count: int, unit: str) -> str:
    return format_size(count) if unit == BYTES else f"{count:,} {unit}".rstrip()


def _share(phase: Phase) -> float:
    return min(phase.done / phase.total, 1.0) if phase.total else 0.0


def _duration(seconds: float) -> str:
    """`40 s`, `4 min 40 s`, `2 h 5 min`."""
    minutes, rest = divmod(int(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if minutes else f"{rest} s"
    return f"{minutes // 60:,} h {minutes % 60} min"


def _width(stream: object) -> int:
    """Columns of the terminal that a stream writes to, 80 where nobody knows."""
    try:
        columns = os.get_terminal_size(stream.fileno()).columns  # type: ignore[attr-defined]
    except (OSError, ValueError):
        columns = 0
    return columns or shutil.get_terminal_size().columns


def _encodes_bar(stream: object) -> bool:
    """Whether a stream can spell the blocks of a bar."""
    try:
        "█▏".encode(getattr(stream, "encoding", None) or "ascii")
    except (UnicodeError, LookupError):
        return False
    return True
