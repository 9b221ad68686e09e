"""What an interrupted run had finished, so that the same command goes on from there.

`workplace` keeps it in OUT.partial; `execution` adds a line for every shard that has reached the
disk. One JSON value a line: first whose run it is, then what is finished. A kill while a line is
written leaves a torn last line, which counts as not written.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Self

from shardsurgeon.durable import write_all, write_file, writing
from shardsurgeon.errors import OutputError
from shardsurgeon.sources.base import SourceFile
from shardsurgeon.system import System

FORMAT = "shardsurgeon journal"
VERSION = 1
_START_OVER = "--restart starts over"


@dataclass(frozen=True, slots=True)
class Run:
    """Whose work it is.

    request, source: the plan's two fingerprints. source_files: what the second one was taken
    from, so that a changed file can be named.
    """

    request: str
    source: str
    source_files: tuple[SourceFile, ...]


@dataclass(frozen=True, slots=True)
class Record:
    """A journal as it was found: its run, and the size of every shard that is finished.

    nbytes: how much of the file holds whole lines.
    """

    run: Run
    finished: dict[str, int]
    nbytes: int


class Journal:
    """An open journal, for one thread at a time; the end of its `with` block closes it."""

    def __init__(self, path: Path, run: Run, record: Record | None, system: System) -> None:
        """Go on after `record`, or begin anew where that is None. Raises OutputWriteError."""
        self._path = path
        self._system = system
        if record is None:
            head = _line({"format": FORMAT, "version": VERSION, **_run_as_json(run)})
            write_file(path, head, system)
            self._end = len(head)
        else:
            self._end = record.nbytes
        self.finished = dict(record.finished) if record else {}
        with writing(path):
            self._file = FileIO(path, "r+")
            self._file.truncate(self._end)

    def add(self, name: str, nbytes: int) -> None:
        """Record that the output file is on the disk under its name. Raises OutputWriteError."""
        line = _line({"finished": name, "nbytes": nbytes})
        write_all(self._file, line, self._end, self._path, self._system)
        with writing(self._path):
            self._system.sync_file(self._file)
        self._end += len(line)
        self.finished[name] = nbytes

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        self._file.close()


def read_journal(path: Path) -> Record | None:
    """The journal at `path`, None where there is none.

    Raises OutputError where it is not one that this version wrote.
    """
    if not path.is_file():
        return None
    with writing(path):
        data = path.read_bytes()
    *lines, torn = data.split(b"\n")
    values: list[object] = []
    for number, line in enumerate(lines, start=1):
        with suppress(ValueError):
            values.append(json.loads(line))
        if len(values) != number:
            raise _garbled(path, number)
    if not values:
        raise _garbled(path, 1)
    run = _run_from_json(values[0], path)
    return Record(run, _finished(values[1:], path), len(data) - len(torn))


def require_same(found: Run, wanted: Run, where: Path) -> None:
    """Raise OutputError, saying what differs, unless the work in `where` is the wanted run's."""
    if found.request != wanted.request:
        raise OutputError(
            where,
            "belongs to an interrupted run of a different command "
            f"(request {found.request[:12]}, this one is {wanted.request[:12]})",
            f"repeat that command, choose another -o, or {_START_OVER}",
        )
    if found.source != wanted.source:
        raise OutputError(
            where,
            f"the source changed since the interrupted run: {_difference(found, wanted)}",
            _START_OVER,
        )


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
    return {"request": run.request, "source": run.source, "source_files": files}


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
            "request": str(request),
            "source": str(source),
            "source_files": list(files),
        }:
            return Run(request, source, tuple(_source_file(file, path) for file in files))
    raise _garbled(path, 1)


def _source_file(value: object, path: Path) -> SourceFile:
    match value:
        case [str(name), int(nbytes), str(stamp)]:
            return SourceFile(name, nbytes, stamp)
    raise _garbled(path, 1)


def _finished(values: Sequence[object], path: Path) -> dict[str, int]:
    finished = {}
    for number, value in enumerate(values, start=2):
        match value:
            case {"finished": str(name), "nbytes": int(nbytes)}:
                finished[name] = nbytes
            case _:
                raise _garbled(path, number)
    return finished


def _garbled(path: Path, line: int) -> OutputError:
    return OutputError(path, f"is not a journal that shardsurgeon wrote (line {line})", _START_OVER)
