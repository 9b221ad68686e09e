"""A remote source and a destination that count, and that do as a test tells them."""

import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from shardsurgeon.execution.journal import read_journal
from shardsurgeon.storage.source import MemorySource, SourceFile
from tests.support.tiny_job import SIDE, A, B, Job, content

FILES = {"a.safetensors": A, "b.safetensors": B, **SIDE}


class FarSource(MemorySource):
    """Bytes that come in small pieces.

    requests: every stream that was begun. nbytes: what was sent. on_piece: called with the file's
    name before each piece. lists: how often all files were listed.
    """

    def __init__(self, files: Mapping[str, bytes] = FILES, piece: int = 700) -> None:
        super().__init__(files, "far", remote=True)
        self.piece = piece
        self.requests: list[tuple[str, int, int]] = []
        self.nbytes = 0
        self.lists = 0
        self.on_piece: Callable[[str], None] = lambda name: None
        self._counting = threading.Lock()

    def list(self) -> tuple[SourceFile, ...]:
        self.lists += 1
        return super().list()

    def stream(self, name: str, begin: int, end: int) -> Iterator[bytes]:
        self.requests.append((name, begin, end))
        for at in range(begin, end, self.piece):
            self.on_piece(name)
            yield b""
            data = self.read(name, at, min(at + self.piece, end))
            with self._counting:
                self.nbytes += len(data)
            yield data


def far_job(job: Job, source: FarSource | None = None) -> Job:
    """The same job, its source at the other end of a network."""
    source = source or FarSource()
    return Job(source, replace(job.plan, source_files=source.list()), job.expected)


def noted(out: Path) -> int:
    """How many bytes of shards the journal says are done."""
    record = read_journal(Path(f"{out}.partial") / "shardsurgeon.journal")
    if record is None:
        return 0
    parts = (pair for part in record.done.parts.values() for pair in part)
    return sum(record.done.finished.values()) + sum(end - begin for begin, end in parts)


def receipts(out: Path) -> dict[str, str]:
    """The receipts in the journal."""
    record = read_journal(Path(f"{out}.partial") / "shardsurgeon.journal")
    return record.done.sent if record else {}


class FolderDestination:
    """Sends to one folder, delivers to another.

    sends: every shard that came, in order. on_send: called with a shard's name before it is kept.
    """

    def __init__(self, folder: Path) -> None:
        self.arrived = folder / "arrived"
        self.delivered = folder / "delivered"
        self.sends: list[str] = []
        self.on_send: Callable[[str], None] = lambda name: None

    @property
    def address(self) -> str:
        return str(self.delivered)

    def send(self, name: str, path: Path) -> str:
        self.on_send(name)
        self.sends.append(name)
        target = self.arrived / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
        return f"receipt {len(self.sends)} of {name}"

    def publish(self, folder: Path, receipts: Mapping[str, str]) -> None:
        shutil.rmtree(self.delivered, ignore_errors=True)
        shutil.copytree(folder, self.delivered)
        for name, receipt in receipts.items():
            assert receipt.endswith(f" of {name}")
            (self.delivered / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(self.arrived / name, self.delivered / name)

    def content(self) -> dict[str, bytes]:
        return content(self.delivered)
