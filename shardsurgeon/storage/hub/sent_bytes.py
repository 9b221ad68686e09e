"""How many bytes of a file have been uploaded, as far as huggingface_hub lets it be seen.

It shows this to its own bars only, one or more for each file. Here one phase counts all files: an
LFS upload reads the file through us, and Xet reports to the reporter that stands here in place of
huggingface_hub's. That one has a private name; in a version without it, files count as a whole.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

from huggingface_hub import CommitOperationAdd, utils

from shardsurgeon.storage.phases import Phase

_REPORTER, _DISABLED = "XetUploadProgressReporter", "are_progress_bars_disabled"
_now = threading.local()


class SentBytes:
    """Counts one file's bytes for a phase, once each, however often they are sent."""

    def __init__(self, phase: Phase | None) -> None:
        """phase: None where nobody counts."""
        self._phase = phase
        self._counting = threading.Lock()
        self._sent = 0

    def reach(self, nbytes: int) -> None:
        """So many bytes of the file have been sent, from its beginning."""
        with self._counting:
            more, self._sent = max(nbytes - self._sent, 0), max(nbytes, self._sent)
        if self._phase is not None and more:
            self._phase.advance(more)

    def __enter__(self) -> SentBytes:
        """What this thread uploads in a `with` is this file."""
        _now.sent = self
        return self

    def __exit__(self, *failure: object) -> None:
        _now.sent = None


class CountedAddition(CommitOperationAdd):
    """A file to upload that tells how far its reader is."""

    @contextmanager
    def as_file(self, with_tqdm: bool = False) -> Iterator[BinaryIO]:
        """The file, open for reading; a bar is never shown."""
        sent: SentBytes | None = getattr(_now, "sent", None)
        with super().as_file() as file:
            if sent is not None and with_tqdm:  # what is not for a bar is not for the network
                read = file.read

                def counted(size: int = -1) -> bytes:
                    data: bytes = read(size)
                    sent.reach(file.tell())
                    return data

                file.read = counted  # type: ignore[method-assign]
            yield file


class _Reporter:
    """Is told by Xet, on a thread of its own, how far a file is."""

    def __init__(self, *words: Any, **options: Any) -> None:
        self._sent: SentBytes | None = getattr(_now, "sent", None)

    def update_progress(self, group: Any, items: Any = None) -> None:
        """group: sums over the files of one upload, of which there is one."""
        nbytes = getattr(group, "total_bytes_completed", 0)
        if self._sent is not None and isinstance(nbytes, int):
            self._sent.reach(nbytes)

    def close(self) -> None:
        """Nothing is open."""


@contextmanager
def xet_counted() -> Iterator[None]:
    """Within a `with`, have Xet report to this module. Affects the whole process."""
    try:
        from huggingface_hub.utils import _xet_progress_reporting as reporting

        before = getattr(reporting, _REPORTER), getattr(utils, _DISABLED)
    except (ImportError, AttributeError):
        yield
        return
    setattr(reporting, _REPORTER, _Reporter)
    # It reports nothing where bars are disabled, as they are; they ask under another name.
    setattr(utils, _DISABLED, lambda *name: False)
    try:
        yield
    finally:
        setattr(reporting, _REPORTER, before[0])
        setattr(utils, _DISABLED, before[1])
