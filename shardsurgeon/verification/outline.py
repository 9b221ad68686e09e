"""A pruned model of which some shards are elsewhere: their headers, and the files that are here.

What is on trial where shards leave the disk before the last one is written. Headers come from
whoever wrote them and are compared with the shards themselves by `shards`, before each leaves.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from shardsurgeon.errors import SourceReadError
from shardsurgeon.storage.base import Source, SourceFile


@dataclass(frozen=True, slots=True)
class Heading:
    """A shard without its data. header: its first bytes, length prefix included; nbytes: in all."""

    header: bytes
    nbytes: int


class Outline:
    """A Source: shards as headings, every other file as another source has it."""

    def __init__(
        self,
        headings: Mapping[str, Heading],
        rest: Source,
        location: str,
        present: Mapping[str, Path] | None = None,
    ) -> None:
        """rest: the other files; location: what messages call the model; present: shards that are
        on the disk, and where.
        """
        self._headings = headings
        self._rest = rest
        self._location = location
        self._present = present or {}

    def with_shard(self, name: str, path: Path) -> Outline:
        """The same, with one shard at hand."""
        return Outline(self._headings, self._rest, self._location, {name: path})

    def heading(self, name: str) -> Heading:
        """What is known of a shard."""
        return self._headings[name]

    @property
    def name(self) -> str:
        """The last part of its place."""
        return Path(self._location).name

    @property
    def location(self) -> str:
        """What messages call it."""
        return self._location

    @property
    def revision(self) -> str | None:
        """None: it is no commit yet."""
        return None

    @property
    def is_remote(self) -> bool:
        """False: what can be read of it is here."""
        return False

    def list(self) -> tuple[SourceFile, ...]:
        """The shards and every other file, sorted by name."""
        shards = [SourceFile(name, one.nbytes, "") for name, one in self._headings.items()]
        others = [file for file in self._rest.list() if file.name not in self._headings]
        return tuple(sorted([*shards, *others], key=lambda file: file.name))

    def read(self, name: str, begin: int, end: int) -> bytes:
        """Bytes of a header, or of another file; SourceReadError for a shard's data."""
        heading = self._headings.get(name)
        if heading is None:
            return self._rest.read(name, begin, end)
        if end > len(heading.header):
            where = f"{self._location}/{name}"
            raise SourceReadError(where, f"its data is not here, byte {end:,} was asked for")
        return heading.header[begin:end]

    def stream(self, name: str, begin: int, end: int) -> Iterator[bytes]:
        """The same bytes, in one piece."""
        yield self.read(name, begin, end)

    def local_path(self, name: str) -> Path | None:
        """The path of a shard at hand, or of another file."""
        if name in self._headings:
            return self._present.get(name)
        return self._rest.local_path(name)
