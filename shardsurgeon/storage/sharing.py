"""Blocks that an output shares with its source, so that no byte of them is read or written.

Whether that works is never assumed: it is tried once for every device that sources lie on. A
device and not a file system, because one file system may have several (btrfs its subvolumes), and
the files of one folder may lie on several (links).
"""

from __future__ import annotations

import os
import threading
from io import FileIO
from pathlib import Path

from shardsurgeon.storage.system import System
from shardsurgeon.units import BLOCK_NBYTES


def whole_blocks(begin: int, at: int, nbytes: int) -> tuple[int, int]:
    """The part of a copy that can be shared: [first, last) of the output, whole blocks.

    The copy is of `nbytes` from byte `begin` of a source to byte `at` of the output. Empty where
    the two do not lie alike in their blocks, or no whole block is inside.
    """
    first = -(-at // BLOCK_NBYTES) * BLOCK_NBYTES
    last = (at + nbytes) // BLOCK_NBYTES * BLOCK_NBYTES
    if (begin - at) % BLOCK_NBYTES or first >= last:
        return at, at
    return first, last


class BlockSharing:
    """Which files can share blocks with those of one folder, and how much has been shared.

    Safe to use from several threads.
    """

    def __init__(self, folder: Path, system: System) -> None:
        """folder: where the output is written, or the nearest above that exists."""
        self._folder = folder
        self._system = system
        self._probing = threading.Lock()
        self._counting = threading.Lock()
        self._works: dict[int, bool] = {}
        self._nbytes = 0

    @property
    def nbytes(self) -> int:
        """Bytes shared so far."""
        return self._nbytes

    def works_for(self, source: FileIO) -> bool:
        """Whether blocks of this open file can be shared with files of the folder.

        Found by sharing one with a file that has no name, so that nothing appears and a kill leaves
        nothing. It is the second block: where a file system's blocks are larger than ours, none
        begins there.
        """
        status = os.fstat(source.fileno())
        with self._probing:
            if status.st_dev not in self._works:
                if status.st_size < 2 * BLOCK_NBYTES:
                    return False  # too short to tell, and of no weight
                self._works[status.st_dev] = self._try(source)
            return self._works[status.st_dev]

    def _try(self, source: FileIO) -> bool:
        try:
            probe = self._system.unnamed(self._folder)
            if probe is None:
                return False
            with probe:
                return self._system.share(source, BLOCK_NBYTES, probe, 0, BLOCK_NBYTES)
        except OSError:  # a folder that takes no file says so when the output is written
            return False

    def share(self, source: FileIO, begin: int, target: FileIO, at: int, nbytes: int) -> bool:
        """Share `nbytes`, whole blocks; False where there are none, or not all could be shared.

        Raises nothing: the copy that must follow then finds a real fault by itself.
        """
        if nbytes == 0 or not self.works_for(source):
            return False
        try:
            shared = self._system.share(source, begin, target, at, nbytes)
        except OSError:
            return False
        if shared:
            with self._counting:
                self._nbytes += nbytes
        return shared
