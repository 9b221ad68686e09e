"""A checkpoint in a local folder, be it downloaded, copied or a snapshot in the Hugging Face cache.

The source that most runs read from. What its bytes mean, `checkpoint` knows.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from io import FileIO
from pathlib import Path
from typing import NoReturn

from shardsurgeon.errors import CheckpointError, SourceChangedError
from shardsurgeon.storage.files import (
    JOURNAL_NAME,
    open_regular,
    read_exact,
    reading,
    unexpanded_home,
)
from shardsurgeon.storage.source import (
    CHUNK_NBYTES,
    NOWHERE,
    OUTSIDE,
    RUN_AGAIN,
    SKIPPED_FOLDERS,
    Source,
    SourceFile,
    is_left_behind,
    require_inside,
    unusual,
)

_GIVE_FOLDER = "give the folder that holds the model"
# Files of a model that stand for the folder they lie in, beside those of weights.
_OF_FOLDER = re.compile(r"config\.json|.*\.safetensors\.index\.json")
# Where the Hub's cache keeps the bytes that the files of its snapshots, and of folders that
# `hf download` made, are links to.
_BLOB = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
# Folders in folders that are looked into.
_DEEPEST = 100
_KINDS = {
    stat.S_IFIFO: "FIFO",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "device",
    stat.S_IFBLK: "device",
}


class LocalSource(Source):
    """The files below one folder. Safe to use from several threads: nothing is kept open.

    name: the folder's own; for a snapshot in the Hub's cache, the model's. revision: the commit of
    a snapshot.
    """

    is_remote = False

    def __init__(self, path: str | os.PathLike[str], *, follow_links: bool = False) -> None:
        """path: the folder, or a `.safetensors` file, the index of some or the config, any of which
        stands for the folder it lies in; follow_links: whether a link that leads out of the
        folder is as good as a file.

        Raises CheckpointError where it is neither.
        """
        place = Path(path)
        # Unlike Path, os.path takes a name that is too long for one that is not there.
        is_file = os.path.isfile(place)
        if is_file and (place.suffix == ".safetensors" or _OF_FOLDER.fullmatch(place.name)):
            place = place.parent
        elif is_file:
            raise CheckpointError(place, "is a file and no .safetensors file", _GIVE_FOLDER)
        # Resolved once: a later change of the working directory must not move the source.
        self._folder = Path(os.path.realpath(place))
        self.location = str(place) if str(place) != "." else str(self._folder)
        self.name, self.revision = _identity(self._folder)
        self.follows_links = follow_links
        snapshot = _snapshot(self._folder)
        self._blobs = snapshot.parent.parent / "blobs" if snapshot else None
        # Name → the file at the first listing, its device and inode, its last change of any kind.
        self._first: dict[str, tuple[SourceFile, tuple[int, int], int]] = {}
        self._require_folder()

    def list(self) -> tuple[SourceFile, ...]:
        """Every file below the folder, sorted by name.

        Links to files count as files. What is neither a file nor a folder is left out, and so are
        links to nothing and to folders: `odd` names them. Raises CheckpointError where the folder
        is gone, SourceReadError where a folder may not be listed.
        """
        self._require_folder()
        found: list[SourceFile | None] = []
        odd: dict[str, str] = {}
        for folder, folders, files in os.walk(self._folder, onerror=_raise):
            folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS]
            if folder.count(os.sep) - str(self._folder).count(os.sep) >= _DEEPEST:
                odd[self._name_of(Path(folder))] = "folder that is too deep"
                folders.clear()
            for path in (Path(folder, name) for name in folders):
                if path.is_symlink():
                    odd[self._name_of(path)] = "linked folder"
            found += [self._describe(Path(folder, name), odd) for name in files]
        self.odd = odd
        return tuple(sorted(filter(None, found), key=lambda file: file.name))

    def described(self, names: Iterable[str]) -> tuple[SourceFile, ...]:
        """Those of some files that are there; looks at these only, however large the folder is.

        Raises CheckpointError for a name that leads out, and where the folder is gone.
        """
        self._require_folder()
        wanted = sorted(set(names))
        odd = {name: what for name, what in self.odd.items() if name not in wanted}
        found = [self._described(name, odd) for name in wanted]
        self.odd = odd
        return tuple(filter(None, found))

    def _described(self, name: str, odd: dict[str, str]) -> SourceFile | None:
        path = self.local_path(name)
        # A linked folder is not gone into, as `list` does not.
        parents = path.relative_to(self._folder).parents[:-1]
        if is_left_behind(name) or any((self._folder / parent).is_symlink() for parent in parents):
            return None
        return self._describe(path, odd)

    def read(self, name: str, begin: int, end: int) -> bytes:
        """Exactly the bytes [begin, end) of a file; SourceReadError where it is shorter."""
        path = self.local_path(name)
        with self.open(name) as file:
            return read_exact(file, begin, end, path)

    def stream(self, name: str, begin: int, end: int) -> Iterator[bytes]:
        """The same bytes, piece by piece."""
        return pieces_of(partial(self.open, name), begin, end)

    def open(self, name: str) -> FileIO:
        """The file itself. Raises SourceReadError, and SourceChangedError where another one or a
        link has taken its place since it was first listed."""
        file = open_regular(self.local_path(name))
        status, first = os.fstat(file.fileno()), self._first.get(name)
        if first is not None and first[1] != (status.st_dev, status.st_ino):
            file.close()
            problem = "was replaced since it was listed"
            raise SourceChangedError(f"{self.location}/{name}", problem, RUN_AGAIN)
        return file

    def local_path(self, name: str) -> Path:
        """The file's path. Raises CheckpointError where the name leads out of the folder."""
        require_inside(name, self.location, "fetch it again")
        return self._folder / name

    def _require_folder(self) -> None:
        if not os.path.isdir(self._folder):
            there = os.path.lexists(self._folder)
            problem = "is not a folder" if there else "there is no such folder"
            work = f"{self.location.rstrip(os.sep)}.partial"
            remedy = unexpanded_home(self.location) or _GIVE_FOLDER
            if not there and os.path.isfile(os.path.join(work, JOURNAL_NAME)):
                remedy = f"its unfinished work is in {work}: run the command again that writes it"
            raise CheckpointError(self.location, problem, remedy)

    def _name_of(self, path: Path) -> str:
        return path.relative_to(self._folder).as_posix()

    def _describe(self, path: Path, odd: dict[str, str]) -> SourceFile | None:
        """Size and stamp of one file; None where it is not a file or has just been removed.

        odd: is told what it is where it is no plain file. Nothing is opened.
        """
        name = self._name_of(path)
        try:
            status = path.stat()
        except OSError as error:
            if path.is_symlink():
                odd[name] = NOWHERE
                return None
            if isinstance(error, FileNotFoundError | NotADirectoryError):
                return None
            _raise(error)
        if (what := unusual(name, os.fsencode)) is not None:
            odd[name] = what
            return None
        if not stat.S_ISREG(status.st_mode):
            odd[name] = _KINDS.get(stat.S_IFMT(status.st_mode), "special file")
            return None
        if path.is_symlink() and not self.follows_links and not self._is_inside(path):
            odd[name] = OUTSIDE
        # Reading and hard-linking leave both parts alone; writing and replacing do not.
        found = SourceFile(name, status.st_size, f"{status.st_mtime_ns}:{status.st_ino}")
        now = found, (status.st_dev, status.st_ino), status.st_ctime_ns
        first = self._first.setdefault(name, now)
        # The time of writing can be put back, this one cannot. A new mode is a change to it as
        # well, so that it is no part of the stamp and counts within one run only.
        if found == first[0] and now[2] != first[2]:
            self.touched |= {name}
        return found

    def _is_inside(self, link: Path) -> bool:
        """Whether a link's end is a file of the model; what is hidden in the folder is not."""
        end = Path(os.path.realpath(link))
        if end.is_relative_to(self._folder):
            return not any(part.startswith(".") for part in end.relative_to(self._folder).parts)
        if not _BLOB.fullmatch(end.name):
            return False
        if self._blobs is not None and end.parent == Path(os.path.realpath(self._blobs)):
            return True
        return end.parent.name == "blobs" and end.parent.parent.name.startswith("models--")


def pieces_of(opened: Callable[[], FileIO], begin: int, end: int) -> Iterator[bytes]:
    """The bytes [begin, end) of a file on this machine. Raises what opening it raises, and
    SourceReadError."""
    with opened() as file:
        for at in range(begin, end, CHUNK_NBYTES):
            yield read_exact(file, at, min(at + CHUNK_NBYTES, end), str(file.name))


def _identity(folder: Path) -> tuple[str, str | None]:
    """Name and revision; of a folder in a snapshot, with what leads to it."""
    snapshot = _snapshot(folder)
    if snapshot is None:
        return folder.name or "model", None
    repository = snapshot.parent.parent.name.rsplit("--", 1)[1]
    return "-".join((repository, *folder.relative_to(snapshot).parts)), snapshot.name


def _snapshot(folder: Path) -> Path | None:
    """The snapshot of the Hub's cache that a folder is, or lies in.

    The cache keeps them as `models--org--name/snapshots/<commit>`.
    """
    for each in (folder, *folder.parents):
        if each.parent.name == "snapshots" and each.parent.parent.name.startswith("models--"):
            return each
    return None


def _raise(error: OSError) -> NoReturn:
    with reading(error.filename):
        raise error
    raise AssertionError("unreachable")
