"""The question that `execution` and its rooms put to a source: are you what was planned with?"""

from __future__ import annotations

from collections.abc import Iterable

from shardsurgeon.errors import SourceChangedError
from shardsurgeon.storage.base import Source, SourceFile


def require_unchanged(source: Source, planned: Iterable[SourceFile]) -> None:
    """Raise SourceChangedError, with the name, unless the files are as they were planned."""
    present = {file.name: file for file in source.list()}
    for file in planned:
        found = present.get(file.name)
        if found == file:
            continue
        if found is None:
            problem = "was there when the run was planned and is gone now"
        elif found.nbytes != file.nbytes:
            problem = f"had {file.nbytes:,} bytes when the run was planned, has {found.nbytes:,}"
        else:
            problem = "was written to or replaced since the run was planned"
        raise SourceChangedError(
            f"{source.location}/{file.name}",
            problem,
            "once it is whole, run the command again with --restart",
        )
