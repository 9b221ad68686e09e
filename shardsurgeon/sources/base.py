"""What a place that holds a checkpoint can do: list, read a range, say where it lies."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file of a source.

    name: path relative to the source, with forward slashes.
    nbytes: size in bytes.
    stamp: changes when the file's content may have changed (local: mtime in nanoseconds and
    inode; remote: etag).
    """

    name: str
    nbytes: int
    stamp: str


class Source(Protocol):
    """A read-only tree of files. Implementations never write and never follow `..`."""

    @property
    def name(self) -> str:
        """The model's name, as the default output folder carries it: `Kimi-K2.5`."""
        ...

    @property
    def location(self) -> str:
        """Where it is, as messages print it: `/models/Kimi-K2.5`."""
        ...

    @property
    def revision(self) -> str | None:
        """The commit it is pinned to, where the place knows commits."""
        ...

    def list(self) -> tuple[SourceFile, ...]:
        """Every file, sorted by name. Raises CheckpointError where the place does not exist."""
        ...

    def read(self, name: str, begin: int, end: int) -> bytes:
        """Exactly the bytes [begin, end) of a file.

        Raises SourceReadError where the file is missing or shorter than `end`.
        """
        ...

    def local_path(self, name: str) -> Path | None:
        """The file's path on this machine, where it has one: lets the kernel move its bytes."""
        ...
