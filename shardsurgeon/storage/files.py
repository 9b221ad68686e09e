"""Bytes that are whole once their name exists: exact reads, full writes, atomic files.

Here, and nowhere else, an `OSError` becomes a `SourceReadError` or an `OutputWriteError`. Weights
are copied by the kernel or through a buffer, never through a memory map: a source that is cut
short under a map kills the process with SIGBUS, a read returns an error that can be reported.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from io import FileIO
from pathlib import Path

from shardsurgeon.errors import OutputError, OutputWriteError, SourceReadError
from shardsurgeon.storage.pipes import is_stream, open_file, write_into
from shardsurgeon.storage.sharing import BlockSharing, whole_blocks
from shardsurgeon.storage.system import System, default_system
from shardsurgeon.units import BLOCK_NBYTES

# In the folder of work that an interrupted command left: what it is and what is done of it.
JOURNAL_NAME = "shardsurgeon.journal"

# Large enough that the calls cost nothing beside the bytes, small enough for any machine.
BUFFER_NBYTES = 1 << 20

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")

_WRITE_REMEDIES = {
    errno.ENOSPC: "free some space there, then run the same command again",
    errno.EDQUOT: "raise the quota or free some space, then run the same command again",
    errno.EROFS: "choose an output place that can be written",
    errno.EACCES: "choose an output place that you may write to",
    errno.EPERM: "choose an output place that you may write to",
    errno.EFBIG: "the file system takes no such large files; see `apply --max-shard-size`",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "close other programs: the system is out of open files",
    errno.EIO: "check the disk, then run the same command again",
}
_READ_REMEDIES = {
    errno.ENOENT: "the file is missing; fetch it again",
    errno.EACCES: "make the file readable",
    errno.EPERM: "make the file readable",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "close other programs: the system is out of open files",
    errno.EIO: "check the disk, or fetch this file again",
}


@contextmanager
def reading(where: str | Path) -> Iterator[None]:
    """Turn an OSError while `where` is read into a SourceReadError."""
    try:
        yield
    except OSError as error:
        remedy = _READ_REMEDIES.get(error.errno or 0, "")
        raise SourceReadError(where, f"cannot be read ({_said(error)})", remedy) from error


@contextmanager
def writing(where: str | Path) -> Iterator[None]:
    """Turn an OSError while `where` is written into an OutputWriteError."""
    try:
        yield
    except OSError as error:
        remedy = _WRITE_REMEDIES.get(error.errno or 0, "")
        raise OutputWriteError(where, f"cannot be written ({_said(error)})", remedy) from error


def _said(error: OSError) -> str:
    return error.strerror or str(error) or type(error).__name__


def open_regular(path: Path) -> FileIO:
    """A file, open for reading. Raises SourceReadError for a pipe or a device: neither is waited
    for."""
    with reading(path):
        return open_file(path)


def read_exact(
    file: FileIO, begin: int, end: int, where: str | Path, system: System | None = None
) -> bytes:
    """The bytes [begin, end) of an open file, however few the system returns at a time.

    Raises SourceReadError, naming `where`, if the file ends before `end`.
    """
    data = bytearray(end - begin)
    read_into(file, memoryview(data), begin, where, system or default_system())
    return bytes(data)


def read_into(
    file: FileIO, buffer: memoryview, begin: int, where: str | Path, system: System
) -> None:
    """Fill `buffer` from byte `begin` of an open file. Raises SourceReadError if it ends early."""
    filled = 0
    with reading(where):
        while filled < len(buffer):
            count = system.read_at(file, buffer[filled:], begin + filled)
            if count == 0:
                raise SourceReadError(
                    where,
                    f"ends at byte {begin + filled:,}, byte {begin + len(buffer):,} was expected",
                    "it was cut short; fetch it again",
                )
            filled += count


def write_all(
    file: FileIO, data: bytes | memoryview, at: int, where: str | Path, system: System
) -> None:
    """Write all of `data` from byte `at` of an open file. Raises OutputWriteError."""
    left = memoryview(data)
    with writing(where):
        while left:
            count = system.write_at(file, left, at)
            if count == 0:
                raise OSError(errno.EIO, "the system takes no more bytes")
            left = left[count:]
            at += count


# Bytes of a copy: where they begin in the source and in the target, and how many they are.
Part = tuple[int, int, int]


class FileCopier:
    """Copies ranges between open files. One per worker: it owns the worker's only buffer."""

    def __init__(
        self,
        system: System,
        advance: Callable[[int], None],
        sharing: BlockSharing | None = None,
    ) -> None:
        """advance: called with the bytes of every step that was copied or shared; sharing: asked
        for blocks before any is copied, None for copying all."""
        self._system = system
        self._advance = advance
        self._sharing = sharing
        self._buffer = memoryview(bytearray(BUFFER_NBYTES))

    def copy(self, source: FileIO, target: FileIO, parts: Iterable[Part]) -> None:
        """Copy parts of one file to another, in the order given.

        Whole blocks that lie alike in both files are shared where that works, and their edges
        copied after all of them. The kernel is asked to copy what is left and has a block or more;
        where it declines, even half-way, the rest goes through the buffer. Raises SourceReadError
        or OutputWriteError, with the name of the file at fault.
        """
        for begin, at, nbytes in self._share(source, target, parts) if self._sharing else parts:
            done = 0
            while nbytes >= BLOCK_NBYTES and done < nbytes:
                count = self._system.kernel_copy(
                    source, begin + done, target, at + done, nbytes - done
                )
                if count == 0:
                    break
                done += count
                self._advance(count)
            while done < nbytes:
                part = self._buffer[: nbytes - done]
                read_into(source, part, begin + done, str(source.name), self._system)
                write_all(target, part, at + done, str(target.name), self._system)
                done += len(part)
                self._advance(len(part))

    def _share(self, source: FileIO, target: FileIO, parts: Iterable[Part]) -> list[Part]:
        """Share what can be shared; what is left to be copied."""
        assert self._sharing is not None
        left: list[Part] = []
        edges: list[Part] = []
        for begin, at, nbytes in parts:
            first, last = whole_blocks(begin, at, nbytes)
            if not self._sharing.share(source, begin + first - at, target, first, last - first):
                left.append((begin, at, nbytes))
                continue
            self._advance(last - first)
            edges += [
                (begin, at, first - at),
                (begin + last - at, last, at + nbytes - last),
            ]
        # All at once, for the disk to fetch side by side: they lie far apart.
        for begin, _, nbytes in edges:
            self._system.will_need(source, begin, begin + nbytes)
        return left + edges


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content, in hex. Raises SourceReadError."""
    with reading(path), open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_file(path: Path, data: bytes, system: System | None = None) -> None:
    """Make a work file hold `data`, whole or not at all, whatever happens meanwhile.

    Its temporary name is always the same, so that a rerun clears what a kill left. Raises
    OutputWriteError.
    """
    _write_by_way_of(path.with_name(path.name + ".writing"), path, data, system)


def _write_by_way_of(temporary: Path, path: Path, data: bytes, system: System | None) -> None:
    system = system or default_system()
    with new_file(temporary, path) as file:
        write_all(file, data, 0, path, system)
        system.sync_file(file)
    publish(temporary, path, system)


def write_new(path: Path, pieces: Iterable[bytes | memoryview]) -> None:
    """Make a file of pieces, one behind the other, whole or not at all.

    Raises OutputError where there is one of its name, OutputWriteError where the disk does not take
    it, and what making the pieces raises.
    """
    require_folder_of(path)
    if os.path.lexists(path):
        raise OutputError(path, "exists already", "choose another name or remove it")
    system = default_system()
    # No other file has such a name, not even one that somebody laid there.
    temporary = path.with_name(f".{secrets.token_hex(8)}.writing")
    try:
        with new_file(temporary, path) as file:
            at = 0
            for piece in pieces:
                write_all(file, piece, at, path, system)
                at += len(piece)
            system.sync_file(file)
        publish(temporary, path, system)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


@contextmanager
def new_file(path: Path, where: Path | None = None) -> Iterator[FileIO]:
    """A file that did not exist before, open for writing; what had its name is removed first.

    A link of that name is removed and not followed: it may have been laid there. where: what an
    OutputWriteError names.
    """
    with writing(where or path):
        path.unlink(missing_ok=True)
        file = FileIO(path, "x")
        with file:
            yield file


def unexpanded_home(path: str | os.PathLike[str]) -> str:
    """What to do about a ~ that no shell expanded, in quotes or behind a =; "" without one."""
    text = os.fspath(path)
    full = os.path.expanduser(text)
    if not text.startswith("~") or full == text or os.path.lexists(text.split("/")[0]):
        return ""
    return f"the shell left the ~ as it is: write {full}"


def output_path(out: str | os.PathLike[str]) -> Path:
    """The place that -o names, a path of this machine. Raises OutputError for an address, for a ~
    that no shell expanded, and for no name at all."""
    if not os.fspath(out):
        raise OutputError("-o", "is an empty name", "say where to write")
    if _ADDRESS.match(os.fspath(out)):
        problem = "is an address, and results are written to folders and files of this machine"
        raise OutputError(out, problem, "give a path; `apply --push-to-hub REPO_ID` pushes")
    if home := unexpanded_home(out):
        raise OutputError(out, "is in no folder of this name", home)
    return Path(out)


def require_folder_of(path: Path) -> None:
    """Raise OutputError where the folder is missing that a file is to be written in."""
    if os.path.isdir(path.parent):
        return
    above = [path.parent, *path.parent.parents]
    missing = next((each for each in reversed(above) if not os.path.isdir(each)), path.parent)
    if os.path.lexists(missing):
        raise OutputError(path, f"{missing} is no folder", "choose another -o")
    raise OutputError(
        path, f"there is no folder {missing}", f"make it first: mkdir -p {path.parent}"
    )


@dataclass(frozen=True, slots=True)
class Output:
    """A file that the user named, and the one rule of what may become of what is there already.

    An input stays, whatever was asked. So does every other file, except that `force` lets one of
    the same kind make way. A device or a pipe is written into. All else is refused.

    kind: what the command writes, in words; is_kind: whether a file that exists is one; inputs:
    files that the command reads; folder_is_made: whether the command makes the folder of the file
    where it is missing.
    """

    path: Path
    kind: str
    is_kind: Callable[[Path], bool]
    force: bool = False
    inputs: tuple[Path, ...] = ()
    folder_is_made: bool = False

    def apart_from(self, inputs: Iterable[Path | None]) -> Output:
        """The same output, which is none of these files either; those that are None are nowhere.

        For the time before any work. Raises OutputError where it can be nothing that this command
        wrote or may replace.
        """
        output = replace(self, inputs=(*self.inputs, *filter(None, inputs)))
        output._found()
        return output

    def refuse(self) -> None:
        """Raise OutputError for a file that stays."""
        remedy = "choose another -o"
        remedy += "" if self.force else f", or replace {self.kind} with --force"
        raise OutputError(self.path, "exists and holds something else", remedy)

    def write(self, data: bytes, system: System | None = None) -> bool:
        """Make it hold `data`, whole or not at all; False where it does already.

        Raises OutputError where it may not, OutputWriteError where the disk does not take it.
        """
        found = self._found()
        if found is None:
            with writing(self.path):
                write_into(self.path, data)
            return True
        if os.path.lexists(found):
            with writing(self.path):
                same = found.stat().st_size == len(data) and found.read_bytes() == data
            if same:
                return False
            if not self.force:
                self.refuse()
        # No other file has such a name, not even one that somebody laid there.
        temporary = found.with_name(f".{secrets.token_hex(8)}.writing")
        try:
            _write_by_way_of(temporary, found, data, system)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
        return True

    def _found(self) -> Path | None:
        """The path to write to by way of another name; None for what is written into as it is.

        A link stays one: its end is written.
        """
        with writing(self.path):
            if not os.path.lexists(self.path):
                if not self.folder_is_made:
                    require_folder_of(self.path)
                return self.path
            mode = self.path.stat().st_mode if self.path.exists() else 0
            if is_stream(mode):
                return None
            if mode and any(each.exists() and self.path.samefile(each) for each in self.inputs):
                raise OutputError(self.path, "is read by this command", "choose another -o")
        if not stat.S_ISREG(mode):
            problem = "is no file that can be written"
            raise OutputError(self.path, problem, "choose another -o")
        if not self.is_kind(self.path):
            self.refuse()
        return Path(os.path.realpath(self.path))


def publish(temporary: Path, path: Path, system: System) -> None:
    """Give a synced file (or folder) its final name, and sync the name."""
    with writing(path):
        system.rename(temporary, path)
        system.sync_folder(path.parent)


def make_folder(path: Path, system: System) -> None:
    """Make a folder and those above it, and sync their names. Raises OutputWriteError."""
    with writing(path):
        if path.is_dir():
            return
        if path.parent != path:
            make_folder(path.parent, system)
        path.mkdir(exist_ok=True)
        system.sync_folder(path.parent)


def reserve_file(
    path: Path,
    nbytes: int,
    system: System,
    claimed: Iterable[tuple[int, int]] | None = None,
) -> None:
    """Make an empty file of `nbytes`, its blocks claimed where the system can.

    claimed: the ranges whose blocks are; None for all.
    """
    with new_file(path) as file:
        file.truncate(nbytes)
        for begin, end in [(0, nbytes)] if claimed is None else claimed:
            system.reserve(file, begin, end)


def carry_mode(origins: Iterable[Path | None], copy: Path) -> None:
    """Let nobody read a copy who may not read what it was made of; keep scripts executable.

    origins: None for those that are on no disk. What these allow, the user's umask may still take
    away. The owner can always read and write. Raises SourceReadError and OutputWriteError.
    """
    allowed, executable = 0o777, 0
    for origin in filter(None, origins):
        with reading(origin):
            mode = origin.stat().st_mode
        allowed, executable = allowed & mode, executable | mode & 0o111
    with writing(copy):
        before = stat.S_IMODE(copy.stat().st_mode)
        mode = (before | executable) & allowed | before & 0o600
        if mode != before:
            copy.chmod(mode)


def sync_path(path: Path, system: System) -> None:
    """Return when the content of a file that another library wrote is on the disk."""
    with writing(path), FileIO(path, "r+") as file:
        system.sync_file(file)
        system.let_go(file, 0, os.fstat(file.fileno()).st_size)


def free_space(path: Path, system: System) -> int:
    """Free bytes where `path` is, or will be once its missing parents are made."""
    place = nearest(path)
    with writing(place):
        return system.free_space(place)


def nearest(path: Path) -> Path:
    """The path, or the nearest above it that exists."""
    place = Path(os.path.abspath(path))
    while not os.path.exists(place) and place.parent != place:
        place = place.parent
    return place
