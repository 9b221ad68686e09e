"""Datasets that the `datasets` library reads: parquet files, folders, and those of the Hub.

Without a network the library asks the Hub again and again, for half a minute. So whether the Hub
answers at all is found out before; where it does not, the library may take what lies in its cache,
and is told not to ask.
"""

from __future__ import annotations

import logging as logs
import textwrap
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from shardsurgeon.errors import DatasetError
from shardsurgeon.layerwise.settings import require

_DEFAULT_SPLIT = "train"


class LibraryRecords:
    """The records of a `datasets.Dataset`."""

    def __init__(self, dataset: Any, where: str) -> None:
        """where: its name, for messages."""
        self._dataset = dataset
        self._where = where

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        with _as_dataset_error(f"{self._where}, record {index:,}"):
            record: dict[str, Any] = self._dataset[index]
        return record


def load_parquet(path: Path, where: str) -> Any:
    """The records of a parquet file. where: what messages call it."""
    library = require("datasets")
    with _as_dataset_error(where), _quietly(library), _offline(library):
        return library.load_dataset(
            "parquet", split=_DEFAULT_SPLIT, data_files={_DEFAULT_SPLIT: str(path)}
        )


def load_split(
    place: str,
    where: str,
    subset: str | None,
    split: str | None,
    revision: str | None,
    *,
    from_hub: bool,
) -> tuple[Any, str]:
    """One split of a dataset, and the split's name.

    place: a folder, or a name on the Hub; where: what messages call it. Raises DatasetError where
    it cannot be opened; where the Hub does not answer, within seconds.
    """
    from shardsurgeon.storage.hub.reachability import refusal_of_the_hub

    refusal = refusal_of_the_hub() if from_hub else ""
    library = require("datasets")
    split = split or _DEFAULT_SPLIT
    with ExitStack() as around:
        around.enter_context(_as_dataset_error(where, refusal))
        around.enter_context(_quietly(library))
        if refusal:
            around.enter_context(_offline(library))
        return library.load_dataset(place, subset, split=split, revision=revision), split


def load_saved(
    folder: Path, where: str, name: str, subset: str | None, split: str | None
) -> tuple[Any, str | None]:
    """A folder that `save_to_disk` wrote: one dataset, or one for each split.

    where, name: what messages call it, with and without its split.
    """
    library = require("datasets")
    with _as_dataset_error(where), _quietly(library):
        loaded = library.load_from_disk(str(folder))
    if not isinstance(loaded, library.DatasetDict):
        if split or subset:
            raise DatasetError(where, "is one saved dataset, without subsets and splits")
        return loaded, None
    split = split or _DEFAULT_SPLIT
    if split not in loaded:
        known = ", ".join(loaded)
        problem = f"has no split '{split}', it has {known}"
        raise DatasetError(where, problem, f"write {name}(split)")
    return loaded[split], split


@contextmanager
def _offline(library: Any) -> Iterator[None]:
    """Keep the library from asking the Hub; what lies in its cache it takes."""
    from shardsurgeon.storage.hub.reachability import hub_offline

    before = library.config.HF_HUB_OFFLINE
    library.config.HF_HUB_OFFLINE = True
    try:
        with hub_offline():
            yield
    finally:
        library.config.HF_HUB_OFFLINE = before


@contextmanager
def _as_dataset_error(where: str, refusal: str = "") -> Iterator[None]:
    """Turn an error of the library, or of what it reads with, into a DatasetError of one line.

    refusal: why the Hub could not be asked, where that is so.
    """
    try:
        yield
    except (DatasetError, MemoryError):
        raise
    # The library does not translate errors of its readers and its downloader.
    except Exception as error:
        if refusal:
            problem = f"{refusal}, and no copy of it is in the cache"
            raise DatasetError(where, problem, "check the connection") from error
        name = type(error).__name__
        reason = textwrap.shorten(str(error), 300, placeholder=" …") or name
        remedy = "check its name, subset and split"
        if name in ("ConnectionError", "OfflineModeIsEnabled"):
            remedy = "check its name and the connection"
        raise DatasetError(where, f"cannot be opened: {reason}", remedy) from error


@contextmanager
def _quietly(library: Any) -> Iterator[None]:
    """Run the library, and what it downloads with, without progress bars and warnings."""
    hub = logs.getLogger("huggingface_hub")
    level = hub.level
    hub.setLevel(logs.CRITICAL)
    logging = library.logging
    verbosity, bars = logging.get_verbosity(), library.is_progress_bar_enabled()
    logging.set_verbosity_error()
    library.disable_progress_bars()
    try:
        yield
    finally:
        hub.setLevel(level)
        logging.set_verbosity(verbosity)
        if bars:
            library.enable_progress_bars()
