"""Datasets: what `--dataset` names, and the records of it.

    name            a dataset of the Hub, a local folder, or a .jsonl, .json, .parquet or .txt file
    name[subset]    one of its subsets
    name(split)     one of its splits
    name@revision   as it was at a commit or tag of the Hub
    name:n          n samples of it; parts without a number share the rest of --samples

Parts are separated by commas. Local .jsonl, .json and .txt files are read here, one record at a
time. Parquet files, folders and datasets of the Hub are read by the `datasets` library. What is
local is known by its SHA-256, so that it is the same on every machine and under every path.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from io import FileIO
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from shardsurgeon.errors import DatasetError, UsageError
from shardsurgeon.layerwise.library_datasets import (
    LibraryRecords,
    load_parquet,
    load_saved,
    load_split,
)
from shardsurgeon.storage.files import BUFFER_NBYTES, read_exact, reading
from shardsurgeon.storage.pipes import open_file

OPTION = "--dataset"
DEFAULT_SAMPLES = 512

_COUNT = re.compile(r"(?P<name>.+?):(?P<count>[0-9]+)")
_NAME = re.compile(
    r"(?P<name>[^\[\]()@]+)(?:@(?P<revision>[^\[\]()@]+))?"
    r"(?:\[(?P<subset>[^\[\]]+)\])?(?:\((?P<split>[^()]+)\))?"
)
_GRAMMAR = "write it like name:256, name[subset]:256, name(split):256 or file.jsonl:256"
# Parts are separated by commas; those inside brackets belong to a name. Empty parts count.
_PARTS = re.compile(r"(?:[^,\[(]|\[[^\]]*\]?|\([^)]*\)?)+|(?<=,)(?=,|\Z)|\A(?=,|\Z)")

_PARQUET = ".parquet"
# `save_to_disk` writes one of these into its folder.
_SAVED = ("state.json", "dataset_dict.json")
# Written beside the data, with times and paths of the machine in them.
_LIBRARY_FILES = frozenset((*_SAVED, "dataset_info.json", "dataset_infos.json"))
_DIGEST_MARK, _DIGITS = "@sha256:", 12

Record: TypeAlias = dict[str, Any] | str
"""The fields of a record, or a line of text."""


@dataclass(frozen=True, slots=True)
class DatasetPart:
    """One dataset of a spec; count: samples to draw from it, None where the spec does not say."""

    name: str
    subset: str | None = None
    split: str | None = None
    revision: str | None = None
    count: int | None = None

    @property
    def words(self) -> str:
        """How the spec names it, without the number of samples."""
        words = self.name
        words += f"@{self.revision}" if self.revision else ""
        words += f"[{self.subset}]" if self.subset else ""
        return words + (f"({self.split})" if self.split else "")


def parse_spec(
    text: str, samples: int | None = None, default: int = DEFAULT_SAMPLES
) -> tuple[DatasetPart, ...]:
    """The parts of a spec, each with its count.

    samples: of all parts together; None for the sum of the parts' numbers or, where a part has
    none, the default. Raises UsageError for a text that is not a spec, a dataset named twice,
    and numbers that contradict each other.
    """
    parts = [_part(piece.strip()) for piece in _PARTS.findall(text)]
    names = [part.words for part in parts]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(OPTION, f"names {name} {names.count(name)} times", "add them up")
    return _share_out(parts, samples, default)


def _part(piece: str) -> DatasetPart:
    counted = _COUNT.fullmatch(piece)
    name, count = (counted["name"], int(counted["count"])) if counted else (piece, None)
    if count == 0:
        raise UsageError(OPTION, f"'{piece}' asks for no sample", _GRAMMAR)
    # The name of an existing file or folder may contain any character.
    if name and os.path.exists(name):
        return DatasetPart(name, count=count)
    match = _NAME.fullmatch(name)
    if not match:
        raise UsageError(OPTION, f"'{piece}' is not a dataset", _GRAMMAR)
    return DatasetPart(**match.groupdict(), count=count)


def renamed(text: str, rename: Callable[[str], str]) -> str:
    """A spec with other names of its parts; their numbers, subsets and splits stay."""
    pieces = _PARTS.findall(text)
    return ",".join(
        rename(name) + piece.strip()[len(name) :]
        for name, piece in zip(_names(text), pieces, strict=True)
    )


def without_folders(text: str) -> str:
    """A spec as files record it: where local data lay on one machine says nothing to another."""
    return renamed(text, lambda name: Path(name).name if os.path.exists(name) else name)


def _names(text: str) -> list[str]:
    """The parts of a spec without their numbers."""
    pieces = [piece.strip() for piece in _PARTS.findall(text)]
    counted = [_COUNT.fullmatch(piece) for piece in pieces]
    return [each["name"] if each else piece for each, piece in zip(counted, pieces, strict=True)]


def local_parts(text: str) -> Iterator[tuple[str, str]]:
    """(path, SHA-256) of the files of a spec; of folders the first digits of that of their data."""
    for path in _names(text):
        if os.path.isdir(path):
            yield path, folder_content_name(Path(path)).rpartition(_DIGEST_MARK)[2]
        elif os.path.isfile(path):
            yield path, _sha256(Path(path))


def _share_out(
    parts: Sequence[DatasetPart], samples: int | None, default: int
) -> tuple[DatasetPart, ...]:
    """The parts, those without a number with an equal share of the samples that are left."""
    counted = sum(part.count or 0 for part in parts)
    uncounted = sum(part.count is None for part in parts)
    if not uncounted:
        if samples not in (None, counted):
            problem = f"the parts ask for {counted:,} samples together, --samples for {samples:,}"
            raise UsageError(OPTION, problem, "leave one of them out")
        return tuple(parts)
    left = (default if samples is None else samples) - counted
    if left < uncounted:
        problem = (
            f"of --samples {counted + left:,} the parts with a number take {counted:,}, {left:,}"
        )
        problem += f" are left for {uncounted}"
        raise UsageError(OPTION, problem, "ask for more samples")
    share, more = divmod(left, uncounted)
    counts = iter([share + (number < more) for number in range(uncounted)])
    return tuple(
        replace(part, count=next(counts)) if part.count is None else part for part in parts
    )


class Records(Protocol):
    """The records of a dataset, by their number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...


@dataclass(frozen=True, slots=True)
class OpenDataset:
    """A part of a spec, opened. source: the name that score files give it."""

    part: DatasetPart
    source: str
    records: Records


def open_dataset(part: DatasetPart) -> OpenDataset:
    """Open one part. Raises DatasetError where the dataset does not exist or is empty."""
    path = Path(part.name).expanduser()
    suffix = path.suffix.lower()
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        raise DatasetError(path, "is a pipe or a device", "save it to a file first")
    if os.path.isfile(path) or suffix in (*_READERS, _PARQUET):
        source, records = _open_file(part, path, suffix)
    else:
        source, records = _open_with_library(part, path)
    opened = OpenDataset(part, source, records)
    if not len(opened.records):
        raise DatasetError(part.words, "is empty", "give a dataset with records")
    return opened


def _open_file(part: DatasetPart, path: Path, suffix: str) -> tuple[str, Records]:
    if not os.path.isfile(path):
        raise DatasetError(path, "there is no such file", "check the path")
    if part.subset or part.split or part.revision:
        raise DatasetError(part.words, "is a file, and files have no subset, split or revision")
    if suffix == _PARQUET:
        records = load_parquet(path, part.words)
        return content_name(path), LibraryRecords(records, str(path))
    if suffix not in _READERS:
        known = ", ".join((*_READERS, _PARQUET))
        raise DatasetError(path, f"'{suffix}' is not read", f"give a file that ends in {known}")
    return content_name(path), _READERS[suffix](path)


def _open_with_library(part: DatasetPart, path: Path) -> tuple[str, Records]:
    is_local = os.path.isdir(path)
    if is_local and any((path / name).is_file() for name in _SAVED):
        dataset, split = load_saved(path, part.words, part.name, part.subset, part.split)
    else:
        place = str(path) if is_local else part.name
        dataset, split = load_split(
            place, part.words, part.subset, part.split, part.revision, from_hub=not is_local
        )
    # With the split, even where the spec leaves it out, so that one dataset has one name.
    name = folder_content_name(path) if is_local else part.name
    return replace(part, name=name, split=split).words, LibraryRecords(dataset, part.words)


class Lines:
    """The lines of a file that are not blank. Holds 24 bytes of memory a line."""

    def __init__(self, path: Path, parse: Callable[[str, str], Record]) -> None:
        """parse: (a line, its place for messages) → a record."""
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
    """A file with one JSON object a line. Raises DatasetError for a record of another form."""
    return Lines(path, _json_object)


def text_lines(path: Path) -> Records:
    """A file of text; each line that is not blank is a record."""
    return Lines(path, lambda line, where: line)


class Listed:
    """The records of a JSON list."""

    def __init__(self, path: Path, content: Sequence[Any]) -> None:
        self._path = path
        self._content = content

    def __len__(self) -> int:
        return len(self._content)

    def __getitem__(self, index: int) -> Record:
        record: Any = self._content[index]
        if not isinstance(record, dict | str):
            raise DatasetError(
                self._path, f"record {index:,} is neither an object nor a text", "mend it"
            )
        return record


def json_list(path: Path) -> Records:
    """A file that holds one JSON list. Its records raise DatasetError where they are neither
    objects nor texts. Raises DatasetError for another file."""
    with reading(path):
        raw = path.read_bytes()
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise DatasetError(path, f"is not JSON ({error})", "is it .jsonl?") from error
    if not isinstance(content, list):
        raise DatasetError(path, "holds no JSON list of records", "is it .jsonl?")
    return Listed(path, content)


def identity(source: str) -> str:
    """What tells the dataset of this name from others: its content where the name has its digest.

    source: as `OpenDataset.source` gives it. A copy under another name has the same identity.
    """
    _, mark, content = source.rpartition(_DIGEST_MARK)
    return mark + content


def words_of(source: str) -> DatasetPart | None:
    """What the name of a dataset says; None where it is that of a file's or folder's content."""
    if _DIGEST_MARK in source:
        return None
    match = _NAME.fullmatch(source)
    if match is None:
        return DatasetPart(source)
    return DatasetPart(match["name"], match["subset"], match["split"], match["revision"])


def content_name(path: Path) -> str:
    """A file's name with 12 digits of its SHA-256: `chats.jsonl@sha256:1f0c9ad2b4e6`."""
    return f"{path.name}{_DIGEST_MARK}{_sha256(path)[:_DIGITS]}"


def folder_content_name(folder: Path) -> str:
    """A folder's name with 12 digits of the SHA-256 of its data: `chats@sha256:1f0c9ad2b4e6`.

    The data are the names, below the folder, and the bytes of its files. Left out are hidden
    files, documents, and what the `datasets` library writes for itself.
    """
    digest = hashlib.sha256()
    with reading(folder):
        named = sorted((path.relative_to(folder).as_posix(), path) for path in _files_in(folder))
    for name, path in named:
        if _is_data(name):
            digest.update(os.fsencode(f"{name}\n{_sha256(path)}\n"))
    return f"{Path(os.path.realpath(folder)).name}{_DIGEST_MARK}{digest.hexdigest()[:_DIGITS]}"


def _files_in(folder: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise error

    for place, _, names in os.walk(folder, onerror=refuse):
        yield from (Path(place, name) for name in names)


def _is_data(name: str) -> bool:
    *folders, file = name.split("/")
    own = file in _LIBRARY_FILES or file.startswith("cache-") or file.endswith((".md", ".lock"))
    return not own and not any(part.startswith(".") for part in (*folders, file))


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with reading(path), open_file(path) as file:
        while block := file.read(BUFFER_NBYTES):
            digest.update(block)
    return digest.hexdigest()


def _json_object(line: str, where: str) -> Record:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DatasetError(where, f"is not JSON ({error})", "one JSON object a line") from error
    if not isinstance(record, dict | str):
        raise DatasetError(where, "is not a JSON object", "one JSON object a line")
    return record


_READERS: dict[str, Callable[[Path], Records]] = {
    ".jsonl": json_lines,
    ".json": json_list,
    ".txt": text_lines,
}
