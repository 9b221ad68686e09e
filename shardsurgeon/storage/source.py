"""Where a checkpoint lies: what can be listed, what ranges of it can be read, what it is called."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from shardsurgeon.errors import CheckpointError, SourceChangedError, SourceReadError
from shardsurgeon.storage.files import open_regular

if TYPE_CHECKING:
    from shardsurgeon.storage.formats.safetensors import Header

# Folders that tools leave beside a model; they are not part of it.
SKIPPED_FOLDERS = frozenset({".git", ".cache", "__pycache__", ".huggingface"})
# The largest piece of a stream.
CHUNK_NBYTES = 1 << 20

# Bytes of a file's name, and characters of its path, that any file system takes.
_LONGEST, _LONGEST_PATH = 255, 1024

# What to do about a file that changes while it is read. Only what resumes has --restart.
RUN_AGAIN = "once it is whole, run the command again (`apply` and `calibrate` with --restart)"
# What may lie in a folder and is no file of it.
OUTSIDE, NOWHERE = "link out of the folder", "link to nothing"
_REMEDIES = {
    OUTSIDE: "put the file itself there, or take it with --follow-links",
    NOWHERE: "the download is incomplete, fetch it again",
}


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


class Source(ABC):
    """A read-only tree of files, for several threads at once.

    A new kind of place sets the attributes and has `list` and `stream`; the other methods are
    there to be replaced where the place has a better way. None writes and none follows `..`.

    name: the model's name, as the default output folder carries it: `Kimi-K2.5`.
    location: where it is, as messages print it: `/models/Kimi-K2.5`.
    revision: the commit it is pinned to; None where the place knows no commits.
    is_remote: whether every read travels a network: read exactly what is needed, several at once.
    notes: what a user should know about what was found, a line each.
    odd: names that the last listing met and that are no plain files of the place → what they are.
    Links that lead out of it are listed as well, and nothing else is.
    follows_links: whether a link out of the place is as good as a file.
    touched: files that changed since the first listing in a way that no stamp shows.
    """

    name: str
    location: str
    revision: str | None = None
    is_remote: bool
    notes: tuple[str, ...] = ()
    odd: Mapping[str, str] = MappingProxyType({})
    follows_links: bool = False
    touched: frozenset[str] = frozenset()

    @abstractmethod
    def list(self) -> tuple[SourceFile, ...]:
        """Every file, sorted by name. Raises CheckpointError where the place does not exist."""

    def described(self, names: Iterable[str]) -> tuple[SourceFile, ...]:
        """Those of some files that are there, as `list` has them; `odd` then says of the others
        what they are. A place that need not look at all its files for that does not."""
        wanted = set(names)
        return tuple(file for file in self.list() if file.name in wanted)

    @abstractmethod
    def stream(self, name: str, begin: int, end: int) -> Iterator[bytes]:
        """The bytes [begin, end) of a file, piece by piece as they arrive, 1 MiB at most.

        A remote place is asked for all of them at once; what is cut goes on where it stopped.
        While it waits for another try it yields empty pieces, so that the caller can stop.

        Raises SourceReadError where the file is missing or shorter than `end`,
        SourceChangedError where its size or stamp is no longer the listed one, and NetworkError
        where trying again did not help.
        """

    def read(self, name: str, begin: int, end: int) -> bytes:
        """Exactly the bytes [begin, end) of a file. Raises what `stream` raises."""
        return b"".join(self.stream(name, begin, end))

    def known_header(self, name: str) -> Header | None:
        """What a shard's header says, where the place has read and checked it already."""
        return None

    def local_path(self, name: str) -> Path | None:
        """The file's path on this machine, where it has one."""
        return None

    def open(self, name: str) -> FileIO | None:
        """The file itself where it lies on this machine: lets the kernel move its bytes.

        Raises SourceReadError, and SourceChangedError where it is not the one that was listed.
        """
        path = self.local_path(name)
        return None if path is None else open_regular(path)


def leads_out(name: str) -> bool:
    """Whether a file name is not one inside its place, on the system that this runs on."""
    path = Path(name)
    return bool(
        path.is_absolute() or path.drive or ".." in path.parts or "\0" in name or not path.parts
    )


def unusual(name: str, encode: Callable[[str], bytes] = str.encode) -> str | None:
    """What keeps a file of this name, inside its place, from being written here; None if nothing.

    Names as stores and repositories can have them: `a//b`, `./a`, longer than any file system
    takes, no text. encode: what makes bytes of a name; it raises UnicodeEncodeError.
    """
    parts = name.split("/")
    if any(part in ("", ".") for part in parts):
        return "name that is no plain path"
    try:
        longest = max(len(encode(part)) for part in parts)
    except UnicodeEncodeError:
        return "name that is no text"
    return "name that is too long" if longest > _LONGEST or len(name) > _LONGEST_PATH else None


def require_inside(name: str, location: str, remedy: str = "") -> None:
    """Raise CheckpointError where a file name leads out of the folder `location`."""
    if leads_out(name):
        raise CheckpointError(location, f"file name {name!r} leads out of the folder", remedy)


def require_plain(source: Source, names: Iterable[str], *, links: bool = False) -> None:
    """Raise CheckpointError for the first of some needed files that is no plain file.

    links: whether a link out of the place is as good as a file. Names that are not there pass.
    """
    for name in names:
        what = source.odd.get(name)
        if what is not None and not (links and what == OUTSIDE):
            remedy = _REMEDIES.get(what, "put the file itself there")
            raise CheckpointError(f"{source.location}/{name}", f"is a {what}", remedy)


def is_left_behind(name: str) -> bool:
    """Whether a file lies in a folder that tools leave beside a model."""
    return not SKIPPED_FOLDERS.isdisjoint(name.split("/")[:-1])


class MemorySource(Source):
    """Files given as bytes. The mapping is not copied, so a test may change it under a run."""

    def __init__(
        self, files: Mapping[str, bytes], name: str = "memory", *, remote: bool = False
    ) -> None:
        """files: name (with forward slashes) → content; remote: pretends to be remote."""
        self._files = files
        self.name = self.location = name
        self.is_remote = remote

    def list(self) -> tuple[SourceFile, ...]:
        """Every file, sorted by name; the stamp is a digest of the content."""
        return tuple(
            SourceFile(name, len(data), hashlib.sha256(data).hexdigest())
            for name, data in sorted(self._files.items())
        )

    def read(self, name: str, begin: int, end: int) -> bytes:
        """Exactly the bytes [begin, end) of a file; SourceReadError where it is shorter."""
        where = f"{self.location}/{name}"
        data = self._files.get(name)
        if data is None:
            raise SourceReadError(where, "there is no such file")
        if end > len(data):
            raise SourceReadError(where, f"ends at byte {len(data):,}, byte {end:,} was expected")
        return data[begin:end]

    def stream(self, name: str, begin: int, end: int) -> Iterator[bytes]:
        """The same bytes, piece by piece."""
        for at in range(begin, end, CHUNK_NBYTES):
            yield self.read(name, at, min(at + CHUNK_NBYTES, end))


def require_unchanged(source: Source, planned: Iterable[SourceFile]) -> None:
    """Raise SourceChangedError, with the name, unless the files are as they were planned."""
    planned = tuple(planned)
    present = {file.name: file for file in source.described(file.name for file in planned)}
    for file in planned:
        found = present.get(file.name)
        if found == file and file.name not in source.touched:
            continue
        if found is None:
            problem = "was there when the run was planned and is gone now"
        elif found.nbytes != file.nbytes:
            problem = f"had {file.nbytes:,} bytes when the run was planned, has {found.nbytes:,}"
        elif found == file:
            problem = (
                "was touched since the run was planned, though its time of writing is as it was"
            )
        else:
            problem = "was written to or replaced since the run was planned"
        raise SourceChangedError(
            f"{source.location}/{file.name}",
            problem,
            RUN_AGAIN,
        )
