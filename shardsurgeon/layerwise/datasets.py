"""Datasets opened: one part of a spec → its records, and the name that says which they are.

Local .jsonl, .json and .txt files are read as they are. Parquet files, folders and datasets of
the Hub go through the `datasets` library, which downloads, caches and maps them.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shardsurgeon.errors import DatasetError
from shardsurgeon.layerwise.localfiles import (
    Record,
    Records,
    content_name,
    json_lines,
    json_list,
    text_lines,
)
from shardsurgeon.layerwise.packages import require
from shardsurgeon.layerwise.specs import DatasetPart

_READERS: dict[str, Callable[[Path], Records]] = {
    ".jsonl": json_lines,
    ".json": json_list,
    ".txt": text_lines,
}
_PARQUET = ".parquet"
# Either of them makes a folder one that `save_to_disk` wrote.
_SAVED = ("state.json", "dataset_dict.json")
_DEFAULT_SPLIT = "train"


@dataclass(frozen=True, slots=True)
class OpenDataset:
    """A part of a spec, opened. source: the name that samples carry."""

    part: DatasetPart
    source: str
    records: Records


def open_dataset(part: DatasetPart) -> OpenDataset:
    """Open one part. Raises DatasetError where there is no such dataset, or nothing in it."""
    path = Path(part.name).expanduser()
    suffix = path.suffix.lower()
    if path.is_file() or suffix in (*_READERS, _PARQUET):
        source, records = _open_file(part, path, suffix)
    else:
        source, records = _open_with_library(part, path)
    opened = OpenDataset(part, source, records)
    if not len(opened.records):
        raise DatasetError(part.words, "is empty", "give a dataset with records")
    return opened


def _open_file(part: DatasetPart, path: Path, suffix: str) -> tuple[str, Records]:
    if not path.is_file():
        raise DatasetError(path, "there is no such file", "check the path")
    if part.subset or part.split or part.revision:
        raise DatasetError(part.words, "is a file, and files have no subset, split or revision")
    if suffix == _PARQUET:
        records, _ = _load(part, "parquet", data_files={_DEFAULT_SPLIT: str(path)})
        return content_name(path), LibraryRecords(records, str(path))
    if suffix not in _READERS:
        known = ", ".join((*_READERS, _PARQUET))
        raise DatasetError(path, f"'{suffix}' is not read", f"give a file that ends in {known}")
    return content_name(path), _READERS[suffix](path)


def _open_with_library(part: DatasetPart, path: Path) -> tuple[str, Records]:
    if path.is_dir() and any((path / name).is_file() for name in _SAVED):
        dataset, split = _load_from_disk(part, path)
    else:
        dataset, split = _load(part, str(path) if path.is_dir() else part.name)
    # The split is named even where the spec does not, so that one dataset has one name.
    return replace(part, split=split).words, LibraryRecords(dataset, part.words)


class LibraryRecords:
    """A `datasets.Dataset`, seen as records."""

    def __init__(self, dataset: Any, where: str) -> None:
        """where: its name, for messages."""
        self._dataset = dataset
        self._where = where

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Record:
        with _as_dataset_error(f"{self._where}, record {index:,}"):
            record: dict[str, Any] = self._dataset[index]
        return record


def _load(part: DatasetPart, path: str, **options: Any) -> tuple[Any, str]:
    """One split of a dataset, and the split's name."""
    library = require("datasets")
    split = part.split or _DEFAULT_SPLIT
    with _as_dataset_error(part.words), _quietly(library):
        loaded = library.load_dataset(
            path, part.subset, split=split, revision=part.revision, **options
        )
    return loaded, split


def _load_from_disk(part: DatasetPart, path: Path) -> tuple[Any, str | None]:
    """A folder that `save_to_disk` wrote: one dataset, or one for each split."""
    library = require("datasets")
    with _as_dataset_error(part.words), _quietly(library):
        loaded = library.load_from_disk(str(path))
    if not isinstance(loaded, library.DatasetDict):
        if part.split or part.subset:
            raise DatasetError(part.words, "is one saved dataset, without subsets and splits")
        return loaded, None
    split = part.split or _DEFAULT_SPLIT
    if split not in loaded:
        known = ", ".join(loaded)
        problem = f"has no split '{split}', it has {known}"
        raise DatasetError(part.words, problem, f"write {part.name}(split)")
    return loaded[split], split


@contextmanager
def _as_dataset_error(where: str) -> Iterator[None]:
    """What the library, or whatever it reads with, says of a dataset, as one line."""
    try:
        yield
    except (DatasetError, MemoryError):
        raise
    # It lets through whatever its readers and its downloader raise.
    except Exception as error:
        name = type(error).__name__
        reason = textwrap.shorten(str(error), 300, placeholder=" …") or name
        remedy = "check its name, subset and split"
        if name in ("ConnectionError", "OfflineModeIsEnabled"):
            remedy = "check its name and the connection"
        raise DatasetError(where, f"cannot be opened: {reason}", remedy) from error


@contextmanager
def _quietly(library: Any) -> Iterator[None]:
    """The library without its bars and warnings."""
    logging = library.logging
    verbosity, bars = logging.get_verbosity(), library.is_progress_bar_enabled()
    logging.set_verbosity_error()
    library.disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            library.enable_progress_bars()
