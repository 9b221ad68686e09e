"""Records of local .jsonl, .json and .txt files, read one at a time, without any library.

A file's identity is its content: where it lies, or what it is called, is not the same on two
machines that share a calibration.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Callable, Sequence
from io import FileIO
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from shardsurgeon.errors import DatasetError
from shardsurgeon.storage.durable import BUFFER_NBYTES, read_exact, reading

Record: TypeAlias = dict[str, Any] | str
"""The fields of a record, or a line of text."""


class Records(Protocol):
    """The records of a dataset, by their number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...


class Lines:
    """Lines of a file that are not blank. Holds 24 bytes a line."""

    def __init__(self, path: Path, parse: Callable[[str, str], Record]) -> None:
        """parse: a line and where it stands, for messages → a record."""
        self._path = path
        self._parse = parse
        self._begins, self._ends, self._numbers = array("Q"), array("Q"), array("Q")
        at = 0
        with reading(path), path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    self._begins.append(at)
                    self._ends.append(at + len(line))
                    self._numbers.append(number)
                at += len(line)

    def __len__(self) -> int:
        return len(self._begins)

    def __getitem__(self, index: int) -> Record:
        where = f"{self._path}, line {self._numbers[index]:,}"
        with reading(self._path), FileIO(self._path) as file:
            raw = read_exact(file, self._begins[index], self._ends[index], self._path)
        try:
            text = raw.decode("utf-8-sig" if self._begins[index] == 0 else "utf-8")
        except UnicodeDecodeError as error:
            raise DatasetError(where, f"is not UTF-8 ({error.reason})", "convert it") from error
        return self._parse(text.rstrip("\r\n"), where)


def json_lines(path: Path) -> Records:
    """A file with a JSON object a line."""
    return Lines(path, _json_object)


def text_lines(path: Path) -> Records:
    """A file of text; each line that is not blank is a record."""
    return Lines(path, lambda line, where: line)


def json_list(path: Path) -> Sequence[Record]:
    """A file that holds one JSON list of objects. Raises DatasetError for anything else."""
    with reading(path):
        raw = path.read_bytes()
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise DatasetError(path, f"is not JSON ({error})", "is it .jsonl?") from error
    if not isinstance(content, list):
        raise DatasetError(path, "holds no JSON list of records", "is it .jsonl?")
    for number, record in enumerate(content):
        if not isinstance(record, dict | str):
            raise DatasetError(path, f"record {number:,} is neither an object nor a text")
    return content


def content_name(path: Path) -> str:
    """A file's name with the beginning of its SHA-256: `chats.jsonl@sha256:1f0c9ad2b4e6`."""
    digest = hashlib.sha256()
    with reading(path), path.open("rb") as file:
        while block := file.read(BUFFER_NBYTES):
            digest.update(block)
    return f"{path.name}@sha256:{digest.hexdigest()[:12]}"


def _json_object(line: str, where: str) -> Record:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DatasetError(where, f"is not JSON ({error})", "one JSON object a line") from error
    if not isinstance(record, dict | str):
        raise DatasetError(where, "is not a JSON object", "one JSON object a line")
    return record
