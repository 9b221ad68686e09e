"""stdout and stderr that may go away: a pipe whose reader leaves, a full disk, a terminal hung up.

What that costs is the words. Work goes on; a command whose result is elsewhere ends as if it had
been heard; one that only prints ends with an error, or quietly where its reader had enough.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TextIO


class StdoutLost(Exception):
    """What was printed could not be written. No OSError, which might be one of the work.

    reader_left: whether there is nobody to miss it.
    """

    def __init__(self, error: OSError | ValueError, *, reader_left: bool = False) -> None:
        """error: what the stream said of it."""
        self.reader_left = reader_left
        super().__init__(getattr(error, "strerror", None) or str(error))


class _Forgiving(io.TextIOBase):
    """A stream that may be lost, None where it never was: what is written after that is lost too.

    For stderr that is all. A bar that raised would stop the work that it only tells of.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream

    def _lost(self, stream: TextIO, error: OSError | ValueError) -> None:
        """Called once. The flush at exit would fail as well: it goes to the null device."""
        with suppress(OSError, ValueError):
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, stream.fileno())
            os.close(nothing)

    def write(self, text: str, /) -> int:
        if not isinstance(text, str):  # click asks so whether a stream is a binary one
            raise TypeError(f"{type(text).__name__} is no text")
        if text:
            # What the stream cannot spell is escaped: a file name may be any bytes.
            spelled = text.encode(self.encoding, "backslashreplace").decode(self.encoding)
            self._try(lambda stream: stream.write(spelled))
        return len(text)

    def flush(self) -> None:
        self._try(lambda stream: stream.flush())

    def _try(self, use: Callable[[TextIO], object]) -> None:
        if (stream := self._stream) is not None:
            try:
                use(stream)
            except (OSError, ValueError) as error:
                self._stream = None
                self._lost(stream, error)

    def isatty(self) -> bool:
        return self._stream is not None and self._stream.isatty()

    def fileno(self) -> int:
        if self._stream is None:
            raise OSError(errno.EBADF, "the stream is gone")
        return self._stream.fileno()

    def writable(self) -> bool:
        return True

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return (self._stream and self._stream.encoding) or "utf-8"

    @property
    def errors(self) -> str:  # type: ignore[override]
        return (self._stream and self._stream.errors) or "backslashreplace"


class WatchedStdout(_Forgiving):
    """For stdout: the first word that is lost raises StdoutLost. used: whether one was written."""

    def __init__(self, stream: TextIO | None) -> None:
        super().__init__(stream)
        self._never_was = stream is None
        self.used = False

    def write(self, text: str, /) -> int:
        """As a stream does; raises StdoutLost."""
        self.used = self.used or bool(text)
        if self._never_was and text:
            raise StdoutLost(OSError(errno.EBADF, "it is closed"))
        return super().write(text)

    def _lost(self, stream: TextIO, error: OSError | ValueError) -> None:
        super()._lost(stream, error)
        raise StdoutLost(error, reader_left=isinstance(error, BrokenPipeError))


@contextmanager
def watched_streams() -> Iterator[WatchedStdout]:
    """For the time of a `with`: a stderr whose loss nobody notices, a stdout whose loss is
    StdoutLost, and no file of the work under the numbers of these two."""
    _fill_descriptors()
    streams = sys.stdout, sys.stderr
    stdout = WatchedStdout(sys.stdout)
    sys.stdout, sys.stderr = stdout, _Forgiving(sys.stderr)
    try:
        yield stdout
    finally:
        with suppress(StdoutLost):
            sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = streams


def _fill_descriptors() -> None:
    """Give stdin, stdout and stderr that are closed the null device: the next file that is opened
    would have their number, and what a library says there would be written into it."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            with suppress(OSError):
                os.open(os.devnull, os.O_RDWR)  # the lowest number that is free is this one
