"""One run of one command: wall time, CPU time and peak memory, by the system's own accounts.

This process stays small and loads no library: a child's peak memory counts what its parent had
when it was made.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

BLOCK_NBYTES = 8 << 20
# How often the limit of a command is looked at, in seconds.
WATCH_SECONDS = 0.5


@dataclass(frozen=True)
class Sample:
    """One run, or the median of several, figure by figure. Seconds and bytes."""

    wall: float
    cpu: float
    rss: float


def median(samples: Sequence[Sample]) -> Sample:
    """The middle of each figure."""
    return Sample(
        statistics.median(sample.wall for sample in samples),
        statistics.median(sample.cpu for sample in samples),
        statistics.median(sample.rss for sample in samples),
    )


def run(
    command: Sequence[str],
    flushed: Path | None = None,
    said: IO[bytes] | None = None,
    is_over: Callable[[], bool] | None = None,
) -> Sample:
    """Run a command; the clock stops when what lies in `flushed` is on the disk as well.

    said: a file for what it prints; is_over: asked now and then, kills it where it says so. Exits
    where the command fails.
    """
    with tempfile.TemporaryFile() as errors:
        begun = time.perf_counter()
        child = subprocess.Popen(command, stdout=said or subprocess.DEVNULL, stderr=errors)
        with _watched(child, is_over) if is_over is not None else nullcontext():
            _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if flushed is not None:
            sync(flushed)
        wall = time.perf_counter() - begun
        if child.returncode:
            errors.seek(0)
            problem = errors.read().decode(errors="replace")[-2000:]
            sys.exit(f"{' '.join(command)}: exit status {child.returncode}\n{problem}")
    unit = 1 if sys.platform == "darwin" else 1024
    return Sample(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * unit)


def told(command: Sequence[str], is_over: Callable[[], bool] | None = None) -> tuple[Sample, Any]:
    """Run a command that prints JSON: the run, and what it printed."""
    with tempfile.TemporaryFile() as said:
        sample = run(command, said=said, is_over=is_over)
        said.seek(0)
        return sample, json.loads(said.read())


@contextmanager
def _watched(child: subprocess.Popen[bytes], is_over: Callable[[], bool]) -> Iterator[None]:
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(WATCH_SECONDS):
            if is_over():
                # Not `child.kill()`, which asks for the status that `run` waits for.
                os.kill(child.pid, signal.SIGKILL)
                return

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


def make_model(folder: Path, *options: str) -> Path:
    """Write a model as `skeleton.py` does, in a process of its own, which may grow."""
    words = [sys.executable, str(Path(__file__).with_name("skeleton.py")), str(folder), *options]
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    return folder


def sync(folder: Path) -> None:
    """Return when the files below a folder are on the disk."""
    for path in files(folder):
        with path.open("rb") as file:
            os.fsync(file.fileno())


def warm(folder: Path) -> None:
    """Read every file once, so that the next reader finds it in memory."""
    for path in files(folder):
        with path.open("rb", buffering=0) as file:
            while file.read(BLOCK_NBYTES):
                pass


def chill(folder: Path) -> None:
    """Have the system forget the files, so that the next reader goes to the disk."""
    sync(folder)
    for path in files(folder):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def files(folder: Path) -> Iterator[Path]:
    """The files below a folder."""
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def remove(folder: Path) -> None:
    """Remove a folder and let the disk finish with it."""
    if folder.exists():
        shutil.rmtree(folder)
    os.sync()


@contextmanager
def disk(kind: str, nbytes: int, within: Path, options: str = "") -> Iterator[Path]:
    """A file system of its own in a sparse file. Needs root and the file system's mkfs."""
    image, mount = within / f"{kind}.img", within / kind
    mount.mkdir()
    with image.open("wb") as file:
        file.truncate(nbytes)
    force = "-F" if kind == "ext4" else "-f"
    device = ""
    try:
        _do("mkfs." + kind, "-q", force, str(image))
        device = _do("losetup", "--find", "--show", "--direct-io=on", str(image)).strip()
        _do("mount", *(["-o", options] if options else []), device, str(mount))
        try:
            yield mount
        finally:
            _do("umount", str(mount))
    finally:
        if device:
            _do("losetup", "--detach", device)
        image.unlink()
        mount.rmdir()


def _do(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A markdown table; all columns but the first are numbers."""
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
