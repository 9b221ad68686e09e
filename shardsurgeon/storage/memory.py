"""A checkpoint held in memory: for tests and examples, and as the shortest of all sources."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from shardsurgeon.errors import SourceReadError
from shardsurgeon.storage.base import PIECE_NBYTES, SourceFile


class MemorySource:
    """Files given as bytes. The mapping is not copied, so a test may change it under a run."""

    def __init__(
        self, files: Mapping[str, bytes], name: str = "memory", *, remote: bool = False
    ) -> None:
        """files: name (with forward slashes) → content; remote: stands for a far place."""
        self._files = files
        self._name = name
        self._remote = remote

    @property
    def name(self) -> str:
        """The name it was given."""
        return self._name

    @property
    def location(self) -> str:
        """The name it was given: there is no other place."""
        return self._name

    @property
    def revision(self) -> str | None:
        """None: memory knows no commits."""
        return None

    @property
    def is_remote(self) -> bool:
        """What it was told to be."""
        return self._remote

    def list(self) -> tuple[SourceFile, ...]:
        """Every file, sorted by name; the stamp is a digest of the content."""
        return tuple(
            SourceFile(name, len(data), hashlib.sha256(data).hexdigest())
            for name, data in sorted(self._files.items())
        )

    def read(self, name: str, begin: int, end: int) -> bytes:
        """Exactly the bytes [begin, end) of a file; SourceReadError where it has them not."""
        where = f"{self._name}/{name}"
        data = self._files.get(name)
        if data is None:
            raise SourceReadError(where, "there is no such file")
        if end > len(data):
            raise SourceReadError(where, f"ends at byte {len(data):,}, byte {end:,} was expected")
        return data[begin:end]

    def stream(self, name: str, begin: int, end: int) -> Iterator[bytes]:
        """The same bytes, piece by piece."""
        for at in range(begin, end, PIECE_NBYTES):
            yield self.read(name, at, min(at + PIECE_NBYTES, end))

    def local_path(self, name: str) -> Path | None:
        """None: nothing here lies on a disk."""
        return None
