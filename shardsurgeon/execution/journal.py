"""The journal in OUT.partial: what a run has done, so that the same command can resume it.

One JSON value per line: first which run it belongs to, then what was done. A line is written only
when what it says is on the disk, or has arrived at the destination:

    {"finished": name, "nbytes": n}             the output file is whole and has its name
    {"begun": name}                             a download of it begins, none of it is written
    {"filled": name, "ranges": [[0, 9], ...]}   these bytes of it are written
    {"sent": name, "to": place, "receipt": text}    it has been sent, and may be removed here

A kill while a line is written leaves a torn last line, which counts as not written.
"""

from __future__ import annotations

import json
import re
import textwrap
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from io import FileIO
from pathlib import Path
from typing import Self

from shardsurgeon._version import __version__
from shardsurgeon.errors import OutputError, redacted
from shardsurgeon.storage.files import write_all, write_file, writing
from shardsurgeon.storage.limits import JOURNAL, require_size
from shardsurgeon.storage.source import SourceFile
from shardsurgeon.storage.system import System
from shardsurgeon.units import counted

FORMAT = "shardsurgeon journal"
VERSION = 3
_START_OVER = "--restart starts over"
# How values of `asked` are written that only a machine can compare.
_DIGEST = re.compile(r"(SHA-256 )?[0-9a-f]{12}([0-9a-f]{52})?")
# Characters of a command that a message quotes.
_LONGEST = 300


@dataclass(frozen=True, slots=True)
class Run:
    """Which run a journal belongs to.

    result, source: digests of what the run is to make and of what it makes it from; a run with
    the same two goes on, whatever program wrote the journal. The rest names what differs. asked:
    the command, in words and values; source_files: what `source` was taken from; origin: the
    exact source, if a name leads to it again (`hf://org/name@` and a commit), else ""; program:
    the version of shardsurgeon. For people who find it: command: the words of the run, "" where it
    had none; shards, nbytes: how many it is to write and their bytes, 0 where it writes none;
    begun: when that was, as ISO 8601 writes it, "" where it is to begin or nobody noted it.
    """

    result: str
    source: str
    source_files: tuple[SourceFile, ...]
    origin: str = ""
    asked: Mapping[str, str] = field(default_factory=dict)
    program: str = __version__
    command: str = ""
    shards: int = 0
    nbytes: int = 0
    begun: str = field(default="", compare=False)


@dataclass(slots=True)
class JournalState:
    """What the lines of a journal add up to; an output file is in at most one of the three.

    finished: name -> size in bytes. parts: name -> (first, one past the last) byte of every range
    that is on the disk, in the order of arrival. sent: name -> receipt;
    address: where those were sent. sizes: of files that are finished or were sent.
    """

    finished: dict[str, int] = field(default_factory=dict)
    parts: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    sent: dict[str, str] = field(default_factory=dict)
    address: str = ""

    sizes: dict[str, int] = field(default_factory=dict, compare=False)

    @property
    def shards(self) -> int:
        """How many output files are finished, sent or not."""
        return len(self.finished) + len(self.sent)

    @property
    def nbytes(self) -> int:
        """Bytes of files that are finished, sent, or written in part."""
        parts = (end - begin for ranges in self.parts.values() for begin, end in ranges)
        return sum(self.sizes.values()) + sum(parts)

    def follow(self, line: object) -> bool:
        """Apply the value of one more line; False if a journal has no such line."""
        match line:
            case {"finished": str(name), "nbytes": int(nbytes)}:
                self._forget(name)
                self.finished[name] = self.sizes[name] = nbytes
            case {"begun": str(name)}:
                self._forget(name)
                self.sizes.pop(name, None)
                self.parts[name] = []
            case {"filled": str(name), "ranges": list(ranges)} if name in self.parts:
                pairs = [pair for pair in map(_pair, ranges) if pair]
                self.parts[name] += pairs
                return len(pairs) == len(ranges)
            case {"sent": str(name), "to": str(address), "receipt": str(receipt)}:
                self._forget(name)
                self.sent[name], self.address = receipt, address
            case _:
                return False
        return True

    def _forget(self, name: str) -> None:
        for one in (self.finished, self.parts, self.sent):
            one.pop(name, None)


def _pair(value: object) -> tuple[int, int] | None:
    match value:
        case [int(begin), int(end)] if 0 <= begin < end:
            return begin, end
    return None


@dataclass(frozen=True, slots=True)
class JournalFile:
    """A journal as it was read. nbytes: how much of the file is whole lines."""

    run: Run
    done: JournalState
    nbytes: int


class Journal:
    """An open journal, safe for any number of threads; its `with` block closes it."""

    def __init__(self, path: Path, run: Run, record: JournalFile | None, system: System) -> None:
        """Continue after `record`; None starts a new journal. Raises OutputWriteError."""
        self._path = path
        self._system = system
        self._writing = threading.Lock()
        if record is None:
            run = replace(run, begun=datetime.now(UTC).isoformat(timespec="seconds"))
            head = _line({"format": FORMAT, "version": VERSION, **_run_as_json(run)})
            write_file(path, head, system)
            self._end = len(head)
        else:
            self._end = record.nbytes
        self.run = record.run if record else run
        self.done = record.done if record else JournalState()
        with writing(path):
            self._file = FileIO(path, "r+")
            self._file.truncate(self._end)

    # Each of these returns when its line is on the disk, or raises OutputWriteError.

    def finish(self, name: str, nbytes: int) -> None:
        """Record that the output file is on the disk under its name."""
        self._add({"finished": name, "nbytes": nbytes})

    def begin(self, name: str) -> None:
        """Record that the output file starts over: what was written of it is void."""
        self._add({"begun": name})

    def fill(self, name: str, ranges: Sequence[tuple[int, int]]) -> None:
        """Record that these bytes of a file that was begun are on the disk."""
        self._add({"filled": name, "ranges": ranges})

    def send(self, name: str, address: str, receipt: str) -> None:
        """Record that the output file was sent, where to, and the receipt."""
        self._add({"sent": name, "to": address, "receipt": receipt})

    def _add(self, value: dict[str, object]) -> None:
        line = _line(value)
        with self._writing:
            write_all(self._file, line, self._end, self._path, self._system)
            with writing(self._path):
                self._system.sync_file(self._file)
            self._end += len(line)
            understood = self.done.follow(json.loads(line))
        assert understood, line

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        self._file.close()


def read_journal(path: Path) -> JournalFile | None:
    """The journal at `path`, or None if there is none.

    Raises OutputError if it is not one that this version wrote.
    """
    if not path.is_file():
        return None
    with writing(path):
        require_size(path.stat().st_size, JOURNAL, str(path), OutputError, _START_OVER)
        data = path.read_bytes()
    *lines, torn = data.split(b"\n")
    values: list[object] = []
    for number, line in enumerate(lines, start=1):
        try:
            values.append(json.loads(line))
        except (ValueError, RecursionError):
            raise _garbled(path, number) from None
    if not values:
        raise _garbled(path, 1)
    run = _run_from_json(values[0], path)
    done = JournalState()
    for number, value in enumerate(values[1:], start=2):
        if not done.follow(value):
            raise _garbled(path, number)
    return JournalFile(run, done, len(data) - len(torn))


def require_same(found: Run, wanted: Run, where: Path, done: JournalState | None = None) -> None:
    """Raise OutputError, naming the difference, unless the folder `where` belongs to this run.

    done: what the run that was found has done.
    """
    if (found.result, found.source) == (wanted.result, wanted.source):
        return
    for name in [*wanted.asked, *found.asked]:
        before, now = found.asked.get(name, "unsaid"), wanted.asked.get(name, "unsaid")
        if before != now:
            raise OutputError(
                where,
                f"{_whose(found, done)} different command ({_differs(name, before, now)})",
                f"repeat that command, choose another -o, or {_START_OVER}",
            )
    if found.source != wanted.source:
        can_go_on = found.origin not in ("", wanted.origin)
        raise OutputError(
            where,
            f"the source changed since the interrupted run: {_difference(found, wanted)}",
            (f"--model {found.origin} goes on with it, " if can_go_on else "") + _START_OVER,
        )

    raise OutputError(
        where,
        f"was begun by shardsurgeon {found.program}, and this one, {wanted.program}, would write "
        "other bytes for the same command",
        f"finish with that version, choose another -o, or {_START_OVER}",
    )


def _whose(found: Run, done: JournalState | None) -> str:
    """`was made on 2026-11-29 14:02 by `shardsurgeon apply …`, 3 of 12 shards done; this is a`."""
    when = ""
    with suppress(ValueError, OverflowError, OSError):
        when = f"on {datetime.fromisoformat(found.begun).astimezone():%Y-%m-%d %H:%M} "
    if not found.command:
        return f"belongs to an interrupted run {when}of a"
    words = f"was made {when}by `{textwrap.shorten(found.command, _LONGEST, placeholder=' …')}`"
    if done is not None and found.shards:
        words += f", {done.shards} of {counted(found.shards, 'shard')} done"
    return f"{words}; this is a"


def _differs(name: str, before: str, now: str) -> str:
    digests = _DIGEST.fullmatch(before) and _DIGEST.fullmatch(now)
    return f"it differs in {name}" if digests else f"{name}: {before}, this one {now}"


def _difference(found: Run, wanted: Run) -> str:
    before = {file.name: file for file in found.source_files}
    after = {file.name: file for file in wanted.source_files}
    for name in sorted(before.keys() | after.keys()):
        old, new = before.get(name), after.get(name)
        if old is None:
            return f"{name} is new"
        if new is None:
            return f"{name} is gone"
        if old.nbytes != new.nbytes:
            return f"{name} had {old.nbytes:,} bytes, it has {new.nbytes:,}"
        if old.stamp != new.stamp:
            return f"{name} was written to"
    return "its headers differ"


def _line(value: dict[str, object]) -> bytes:
    return json.dumps(value).encode() + b"\n"


def _run_as_json(run: Run) -> dict[str, object]:
    files = [[file.name, file.nbytes, file.stamp] for file in run.source_files]
    return {
        "command": redacted(run.command),
        "begun": run.begun,
        "shards": run.shards,
        "nbytes": run.nbytes,
        "result": run.result,
        "source": run.source,
        "asked": dict(run.asked),
        "program": run.program,
        "origin": run.origin,
        "source_files": files,
    }


def _run_from_json(value: object, path: Path) -> Run:
    match value:
        case {"format": "shardsurgeon journal", "version": version} if version != VERSION:
            raise OutputError(
                path,
                f"was written by another version of shardsurgeon (journal version {version}, "
                f"this one writes {VERSION})",
                f"finish with that version, or {_START_OVER}",
            )
        case {
            "format": "shardsurgeon journal",
            "result": str(result),
            "source": str(source),
            "asked": dict(asked),
            "program": str(program),
            "origin": str(origin),
            "source_files": list(files),
        } if all(isinstance(value, str) for value in asked.values()):
            described = tuple(_source_file(file, path) for file in files)
            return Run(result, source, described, origin, asked, program, *_for_people(value))
    raise _garbled(path, 1)


def _for_people(head: object) -> tuple[str, int, int, str]:
    """What identifies a run to people; earlier versions wrote none of it."""
    match head:
        case {
            "command": str(command),
            "begun": str(begun),
            "shards": int(shards),
            "nbytes": int(nbytes),
        }:
            return command, shards, nbytes, begun
    return "", 0, 0, ""


def _source_file(value: object, path: Path) -> SourceFile:
    match value:
        case [str(name), int(nbytes), str(stamp)]:
            return SourceFile(name, nbytes, stamp)
    raise _garbled(path, 1)


def _garbled(path: Path, line: int) -> OutputError:
    return OutputError(path, f"is not a journal that shardsurgeon wrote (line {line})", _START_OVER)
