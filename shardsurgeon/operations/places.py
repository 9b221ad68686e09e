"""Where a result may go: never into what it is made of."""

from __future__ import annotations

import os
from pathlib import Path

from shardsurgeon.errors import OutputError
from shardsurgeon.storage.source import Source
from shardsurgeon.storage.view import ViewSource


def default_place(source: Source, name: str) -> Path:
    """The place of a result of this name where the user named none: in the current folder, or,
    where that is in the source, beside the source.

    Raises OutputError where that would be inside a Hub cache.
    """
    folder = Path.cwd()
    for part, _, home in _homes(source):
        if folder.is_relative_to(home):
            folder = home.parent
            if part.revision is not None:
                problem = "would be inside the Hub's cache"
                raise OutputError(folder / name, problem, "say where to write with -o")
    return folder / name


def require_apart(source: Source, out: Path) -> None:
    """Raise OutputError where the output, or the folder that it is made in, would be inside the
    source, or the source inside it. Of a view, its own source is meant as well."""
    for _, what, home in _homes(source):
        for place in (out, Path(f"{out}.partial")):
            target = Path(os.path.realpath(place.absolute().parent), place.name)
            if target == home:
                raise OutputError(place, f"is {what} itself", "choose another -o")
            if target.is_relative_to(home):
                raise OutputError(place, f"is inside {what} {home}", "choose another -o")
            if home.is_relative_to(target):
                raise OutputError(place, f"contains {what} {home}", "choose another -o")


def _homes(source: Source) -> list[tuple[Source, str, Path]]:
    """The folders on this machine that a source is read from, and what each is called."""
    parts = [(source, "the source")]
    if isinstance(source, ViewSource):
        parts = [(source, "the view"), (source.origin, "the view's source")]
    paths = [(part, what, part.local_path("config.json")) for part, what in parts]
    # The folder is resolved, not the file: in a Hub cache config.json is a link to a blob.
    return [
        (part, what, Path(os.path.realpath(path.absolute().parent)))
        for part, what, path in paths
        if path is not None
    ]
