"""OUT.partial: the folder in which an output is written, locked by one run at a time.

Used by the executor and, for score files, by calibration. Its layout:

    OUT.partial/
        shardsurgeon.lock       locked while a run works here
        shardsurgeon.journal    which run it belongs to, what is finished
        writing/                files that are not whole yet; once the run has ended, worthless
                                unless the journal says what is in them
        files/                  whole files; the last step renames this folder to OUT

So OUT never holds anything that is not part of the output, and at every moment either the journal
or an all but empty folder says which run the place belongs to.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from io import FileIO
from itertools import chain
from pathlib import Path

from shardsurgeon.errors import OutputError, OutputWriteError
from shardsurgeon.execution.journal import Journal, JournalFile, Run, read_journal, require_same
from shardsurgeon.execution.plan import Plan
from shardsurgeon.execution.workers import ProgressMeter
from shardsurgeon.storage.files import (
    JOURNAL_NAME,
    free_space,
    make_folder,
    nearest,
    publish,
    writing,
)
from shardsurgeon.storage.sharing import BlockSharing
from shardsurgeon.storage.source import Source
from shardsurgeon.storage.system import System, is_strangers, mount_of

_LOCK = "shardsurgeon.lock"


@dataclass(frozen=True, slots=True)
class RunContext:
    """What every part of one run has. sharable: the files of the source whose blocks can be shared
    with what is written."""

    plan: Plan
    source: Source
    workdir: WorkDir
    journal: Journal
    meter: ProgressMeter
    sharable: frozenset[str] = frozenset()


class WorkDir:
    """The paths below OUT.partial, and what may be done with them while it is locked."""

    def __init__(self, out: Path, system: System) -> None:
        """Name the paths; nothing is read or written."""
        self.out = out
        self.folder = Path(f"{out}.partial")
        self.files = self.folder / "files"
        self.writing = self.folder / "writing"
        self.journal = self.folder / JOURNAL_NAME
        self.system = system
        self._journal: Journal | None = None

    @cached_property
    def sharing(self) -> BlockSharing:
        """What files that are written here share with others. For the time once the folders are
        made, or where none will be."""
        return BlockSharing(nearest(self.writing), self.system)

    def require_free_name(self) -> None:
        """Raise OutputError if OUT exists already."""
        if os.path.lexists(self.out):
            raise OutputError(self.out, "exists", "choose another -o or remove it")

    def require_ours(self) -> None:
        """Raise OutputError if OUT.partial holds files that shardsurgeon did not write."""
        with writing(self.folder):
            try:
                present = set(os.listdir(self.folder))
            except FileNotFoundError:
                if not self.folder.is_symlink():
                    return
                present = {"a link to nowhere"}
            except NotADirectoryError:
                if self.out.parent.is_dir():
                    present = {"a file of that name"}
                else:
                    raise OutputError(
                        self.out, "would be inside a file", "choose another -o"
                    ) from None
        # A kill in a run's first moments leaves the lock, and at most half a journal.
        if JOURNAL_NAME not in present and present - {_LOCK, JOURNAL_NAME + ".writing"}:
            raise OutputError(
                self.folder,
                "is in the way and was not made by shardsurgeon",
                "choose another -o or move it away",
            )
        # Another run may be about to remove the folder.
        with writing(self.folder), suppress(FileNotFoundError):
            self._require_plain()

    def _require_plain(self) -> None:
        """Raise OutputError where OUT.partial, or what is in it, is another user's or leads
        elsewhere: a link, a pipe, a device, a journal or a lock that has a second name."""
        tree = os.walk(self.folder)
        inside = (Path(below, name) for below, *names in tree for name in chain(*names))
        for path in (self.folder, *inside):
            status = path.lstat()
            if is_strangers(status):
                raise OutputError(path, "belongs to another user", "choose another -o or remove it")
            if stat.S_ISLNK(status.st_mode):
                what = "is a link"
            elif stat.S_ISDIR(status.st_mode):
                continue
            elif not stat.S_ISREG(status.st_mode):
                what = "is a pipe or a device"
            elif status.st_nlink > 1 and path.parent == self.folder:
                what = "is a file of two names"  # those here are written on, no others are
            else:
                continue
            raise OutputError(path, f"{what}, and shardsurgeon makes none", "remove it, run again")

    def require_one_mount(self) -> None:
        """Raise OutputError where the finished files could not be renamed to OUT."""
        with writing(self.folder):
            here = mount_of(self.folder.parent)
            for place in (self.folder, self.files, self.writing):
                if place.exists() and mount_of(place) != here:
                    raise OutputError(
                        place,
                        f"is mounted from elsewhere, and could not become {self.out.name}",
                        "choose an -o beside which nothing is mounted, or unmount it",
                    )

    def open_journal(self, run: Run, restart: bool) -> Journal:
        """Prepare the folder for `run`; the journal says what is finished.

        restart: throw away what an earlier run left, whatever run it was. Raises OutputError if
        the folder belongs to another run, or the journal cannot be read.
        """
        record = self.earlier_work(run, restart)
        if restart:
            _remove_tree(self.files)
        _remove_tree(self.writing, record.done.parts if record else ())
        self._journal = Journal(self.journal, run, record, self.system)
        make_folder(self.files, self.system)
        make_folder(self.writing, self.system)
        return self._journal

    def earlier_work(self, run: Run, restart: bool) -> JournalFile | None:
        """The journal that `run` would go on with, None for none; reads only.

        Raises what `open_journal` raises of what it finds.
        """
        record = None if restart else read_journal(self.journal)
        if record:
            require_same(record.run, run, self.folder, record.done)
        return record

    @property
    def opened(self) -> Journal | None:
        """This run's journal, once it has been opened; closed by then, maybe."""
        return self._journal

    @property
    def is_ours(self) -> bool:
        """Whether the folder belongs to this run: its journal has been opened."""
        return self._journal is not None

    @property
    def folds_case(self) -> bool:
        """Whether a name in another case is the same file there, or where the folder will be."""
        place = nearest(self.folder / _LOCK)
        twin = place.with_name(place.name.swapcase()) if place.name else place
        return twin.name != place.name and twin.exists() and twin.samefile(place)

    def has(self, name: str, nbytes: int, begins: bytes) -> bool:
        """Whether the file is finished, has that size, and begins with those bytes."""
        return has_file(self.files / name, nbytes, begins)

    def has_part(self, name: str, nbytes: int) -> bool:
        """Whether the file is being written and already has its final size.

        One that has another name as well, such as in a backup made of hard links, is not written
        on.
        """
        path = self.writing / name
        with writing(path):
            if not path.is_file():
                return False
            status = path.stat()
            return status.st_size == nbytes and status.st_nlink <= 1

    def space(self, *, restart: bool = False) -> int:
        """Free bytes on the disk, plus those that unfinished files of an earlier run take.

        restart: as if its finished ones had been thrown away too.
        """
        held = self._held(self.writing) + (self._held(self.files) if restart else 0)
        return free_space(self.folder, self.system) + held

    def _held(self, folder: Path) -> int:
        """Bytes of disk that come free where the files below a folder go."""
        total = 0
        for name in _files_below(folder):
            path = folder / name
            with writing(path), suppress(FileNotFoundError), FileIO(path) as file:
                status = os.fstat(file.fileno())
                # Windows does not report blocks; there a reserved file takes its whole length.
                nbytes = getattr(status, "st_blocks", -(-status.st_size // 512)) * 512
                total += max(nbytes - self.system.shared(file), 0)
        return total

    def begin_file(self, name: str) -> Path:
        """The path under which to write a file until it is whole; its folder is made."""
        path = self.writing / name
        make_folder(path.parent, self.system)
        return path

    def finish_file(self, name: str) -> None:
        """Move a file that is whole and synced to the finished files."""
        path = self.files / name
        make_folder(path.parent, self.system)
        publish(self.writing / name, path, self.system)

    def drop_file(self, name: str) -> None:
        """Remove a finished file that is no longer needed here."""
        path = self.files / name
        with writing(path):
            path.unlink(missing_ok=True)

    def publish(self, names: set[str]) -> None:
        """Make the finished files OUT. Raises OutputError or OutputWriteError unless they are
        exactly `names`. Whatever is raised, there is no OUT.
        """
        present = set(_files_below(self.files))
        for name in sorted(present - names):
            raise OutputError(self.files / name, "is not of this run", "move it away, run again")
        for name in sorted(names - present):
            raise OutputWriteError(self.files / name, "disappeared", "run the same command again")
        self.require_free_name()
        try:
            publish(self.files, self.out, self.system)
        except BaseException:
            # The new name may not survive a crash: take it back, so that a rerun publishes again.
            with suppress(OSError):
                if not os.path.lexists(self.files):
                    self.system.rename(self.out, self.files)
            raise

    def discard(self) -> None:
        """Remove everything: the result has been published elsewhere. The journal goes last, so
        that a kill on the way leaves a folder that is known to be ours.
        """
        self._journal = None
        _remove_tree(self.writing)
        _remove_tree(self.files)
        with writing(self.journal):
            self.journal.unlink(missing_ok=True)

    def clean_up(self) -> None:
        """Remove what is of no use to a later run; all of it if nothing was finished."""
        self.journal.with_name(JOURNAL_NAME + ".writing").unlink(missing_ok=True)
        if self._journal is None:
            return
        done = self._journal.done
        parts = [name for name, ranges in done.parts.items() if ranges]
        _remove_tree(self.writing, parts)
        if not parts and not done.sent and not any(_files_below(self.files)):
            _remove_tree(self.files)
            self.journal.unlink(missing_ok=True)


def has_file(path: Path, nbytes: int, begins: bytes) -> bool:
    """Whether there is a file of that size that begins with those bytes."""
    with writing(path):
        if not path.is_file() or path.stat().st_size != nbytes:
            return False
        with FileIO(path) as file:
            return file.read(len(begins)) == begins


@contextmanager
def lock_workdir(out: Path, system: System, *, may_exist: bool = False) -> Iterator[WorkDir]:
    """Lock OUT.partial for one run.

    may_exist: OUT may be there. Raises OutputError if another run has the folder, or OUT exists
    and may not.
    """
    workdir = WorkDir(out, system)

    def require() -> None:
        if not may_exist:
            workdir.require_free_name()
        workdir.require_ours()

    require()
    lock = _take_lock(workdir, system)
    try:
        require()  # the run that had the lock before may just have finished
        yield workdir
    finally:
        # The run's own result or error is what counts; files left behind do no harm.
        with suppress(OSError, OutputWriteError):
            workdir.clean_up()
        _release_lock(workdir, lock)


def look_at_workdir(out: Path, system: System) -> WorkDir:
    """OUT.partial as a run would find it; nothing is made or removed.

    Raises what `lock_workdir` raises, and OutputWriteError where the folder could not be made.
    """
    workdir = WorkDir(out, system)
    workdir.require_free_name()
    workdir.require_ours()
    with writing(workdir.folder):
        place = nearest(workdir.folder)
        for path in {place, place / _LOCK}:
            if path.exists() and not os.access(path, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        if not place.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(place))
        if (workdir.folder / _LOCK).is_file():
            with FileIO(workdir.folder / _LOCK, "r+") as lock:
                if not system.lock(lock):
                    raise _in_use(workdir)
    return workdir


def _in_use(workdir: WorkDir) -> OutputError:
    problem = "is in use: another run writes there now"
    return OutputError(workdir.folder, problem, "wait for it, or choose another -o")


def _take_lock(workdir: WorkDir, system: System) -> FileIO:
    path = workdir.folder / _LOCK
    make_folder(workdir.folder.parent, system)
    while True:
        with writing(path):
            with suppress(FileExistsError):
                workdir.folder.mkdir()
            try:
                lock = FileIO(path, "a+")
            except FileNotFoundError:  # another run ended here and took the folder with it
                continue
            try:
                held = system.lock(lock)
                if held and _is_file(path, lock):
                    return lock
            except BaseException:
                lock.close()
                raise
            lock.close()
        if not held:
            raise _in_use(workdir)


def _is_file(path: Path, lock: FileIO) -> bool:
    """Whether the path still names the open file: the run that had the lock may have removed it."""
    try:
        return os.path.samestat(path.stat(), os.fstat(lock.fileno()))
    except FileNotFoundError:
        return False


def _release_lock(workdir: WorkDir, lock: FileIO) -> None:
    """Release the lock and remove the folder if nothing else is in it."""
    with suppress(OSError):
        if os.listdir(workdir.folder) == [_LOCK]:
            # Removed while locked, so that no other run locks a file that is about to go. Windows
            # cannot remove an open file: there it is closed first.
            try:
                (workdir.folder / _LOCK).unlink()
            except PermissionError:
                lock.close()
                (workdir.folder / _LOCK).unlink()
            workdir.folder.rmdir()
    lock.close()


def _files_below(folder: Path) -> Iterator[str]:
    for below, _, names in os.walk(folder):
        for name in names:
            yield Path(below, name).relative_to(folder).as_posix()


def _remove_tree(folder: Path, kept: Collection[str] = ()) -> None:
    """Remove a folder with everything in it, or only the files that are not in `kept`."""
    with writing(folder), suppress(FileNotFoundError):
        if kept:
            for name in set(_files_below(folder)) - set(kept):
                (folder / name).unlink()
        else:
            shutil.rmtree(folder)
