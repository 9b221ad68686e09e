"""A checkpoint in a local folder, be it downloaded, copied or a snapshot in the Hugging Face cache.

The source that most runs read from. What its bytes mean, `checkpoint` knows.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import NoReturn

from shardsurgeon.errors import CheckpointError
from shardsurgeon.storage.files import read_exact, reading
from shardsurgeon.storage.source import (
    CHUNK_NBYTES,
    SKIPPED_FOLDERS,
    Source,
    SourceFile,
    require_inside,
)

_GIVE_FOLDER = "give the folder that holds the model"


class LocalSource(Source):
    """The files below one folder. Safe to use from several threads: nothing is kept open.

    name: the folder's own; for a snapshot in the Hub's cache, the model's. revision: the commit of
    a snapshot.
    """

    is_remote = False

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """path: the folder, or one `.safetensors` file, which stands for the folder it lies in.

        Raises CheckpointError where it is neither.
        """
        place = Path(path)
        if place.is_file() and place.suffix == ".safetensors":
            place = place.parent
        elif place.is_file():
            raise CheckpointError(place, "is not a .safetensors file", _GIVE_FOLDER)
        # Resolved once: a later change of the working directory must not move the source.
        self._folder = place.resolve()
        self.location = str(place) if str(place) != "." else str(self._folder)
        self.name, self.revision = _identity(self._folder)
        self._require_folder()

    def list(self) -> tuple[SourceFile, ...]:
        """Every file below the folder, sorted by name.

        Links to files count as files; links to folders and everything that is neither a file nor a
        folder are left out. Raises CheckpointError where the folder is gone or a link leads
        to nothing, SourceReadError where a folder may not be listed.
        """
        self._require_folder()
        found = []
        for folder, folders, files in os.walk(self._folder, onerror=_raise):
            folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS]
            found += [self._describe(Path(folder, name)) for name in files]
        return tuple(sorted(filter(None, found), key=lambda file: file.name))

    def read(self, name: str, begin: int, end: int) -> bytes:
        """Exactly the bytes [begin, end) of a file; SourceReadError where it is shorter."""
        path = self.local_path(name)
        with reading(path), FileIO(path) as file:
            return read_exact(file, begin, end, path)

    def stream(self, name: str, begin: int, end: int) -> Iterator[bytes]:
        """The same bytes, piece by piece."""
        return pieces_of(self.local_path(name), begin, end)

    def local_path(self, name: str) -> Path:
        """The file's path. Raises CheckpointError where the name leads out of the folder."""
        require_inside(name, self.location, "fetch it again")
        return self._folder / name

    def _require_folder(self) -> None:
        if not self._folder.is_dir():
            problem = "is not a folder" if self._folder.exists() else "there is no such folder"
            raise CheckpointError(self.location, problem, _GIVE_FOLDER)

    def _describe(self, path: Path) -> SourceFile | None:
        """Size and stamp of one file; None where it is not a file or has just been removed."""
        try:
            status = path.stat()
        except OSError as error:
            if path.is_symlink():
                raise CheckpointError(
                    path,
                    "is a link to a missing file",
                    "the download is incomplete, fetch it again",
                ) from error
            if isinstance(error, FileNotFoundError):
                return None
            _raise(error)
        if not stat.S_ISREG(status.st_mode):
            return None
        name = path.relative_to(self._folder).as_posix()
        # Reading and hard-linking leave both parts alone; writing and replacing do not.
        return SourceFile(name, status.st_size, f"{status.st_mtime_ns}:{status.st_ino}")


def pieces_of(path: Path, begin: int, end: int) -> Iterator[bytes]:
    """The bytes [begin, end) of a file on this machine. Raises SourceReadError."""
    with reading(path):
        file = FileIO(path)
    with file:
        for at in range(begin, end, CHUNK_NBYTES):
            yield read_exact(file, at, min(at + CHUNK_NBYTES, end), path)


def _identity(folder: Path) -> tuple[str, str | None]:
    """Name and revision; the Hugging Face cache keeps `models--org--name/snapshots/<commit>`."""
    repository = folder.parent.parent.name
    if folder.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.rsplit("--", 1)[1], folder.name
    return folder.name or "model", None


def _raise(error: OSError) -> NoReturn:
    with reading(error.filename):
        raise error
    raise AssertionError("unreachable")
