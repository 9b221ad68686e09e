"""Every fault: how it is brought about, what the command must say, and what must follow.

A fault is a generator of tries; each try runs the command, checks what it left and reruns it.
`Lost` is raised where a fault did harm. The calls at which faults strike are spread evenly
over the whole run, planning to delivery, with a random place within each part.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from shardsurgeon.storage.system import System
from tests.faults.trial import Bench, Ended, Lost

EVERY_CALL = [field.name for field in fields(System)]
READS = ["read_at", "kernel_copy"]
WRITES = ["write_at", "kernel_copy", "share", "reserve"]
RESUMES = "stopped; (.*the same command resumes|nothing is finished yet.*|.* is complete)$"

Attempt = Callable[[Bench, int, random.Random], Iterator[Ended]]


@dataclass(frozen=True)
class Entry:
    """A row of the table. share: how many tries it gets for every 200 kills."""

    name: str
    attempt: Attempt
    share: int = 20


class Unavailable(Exception):
    """This machine cannot bring the fault about, for the reason given."""


def spread(count: int, tries: int, numbers: random.Random) -> list[int]:
    """`tries` places from 1 to `count`, one in each of as many equal parts."""
    places = [1 + int(count * (part + numbers.random()) / tries) for part in range(tries)]
    return [min(place, count) for place in places]


def injected(
    statuses: set[int],
    says: str,
    *,
    calls: list[str],
    rerun: tuple[str, ...] = (),
    **fault: Any,
) -> Attempt:
    """The driver brings the fault about at one of the calls."""

    def attempt(bench: Bench, tries: int, numbers: random.Random) -> Iterator[Ended]:
        count = bench.count(calls=calls, **fault)
        struck = not statuses
        for nth in spread(count, tries, numbers):
            ended = bench.run(fault={**fault, "calls": calls, "nth": nth})
            struck = struck or ended.status != 0
            if ended.status == 0:  # short counts are no fault, and threads may have had fewer calls
                bench.require_finishes()
            else:
                bench.require_told(ended, statuses, says)
                bench.require_no_out(ended)
            bench.require_source(ended)
            bench.require_finishes(*rerun)
            bench.clear()
            yield ended
        if not struck and tries > 4:
            raise Lost("the fault never struck")

    return attempt


def kills(bench: Bench, tries: int, numbers: random.Random) -> Iterator[Ended]:
    """SIGKILL at a call; of every three resumed runs one is killed as well before the last."""
    count = bench.count(calls=EVERY_CALL)
    for number, nth in enumerate(spread(count, tries, numbers)):
        fault: dict[str, Any] = {"calls": EVERY_CALL, "what": "kill", "nth": nth}
        ended = bench.run(fault={**fault, "portable": number % 2 == 1})
        if number % 3 == 0 and not bench.out.exists():
            ended = bench.run(fault={**fault, "nth": numbers.randint(1, count)})
        if ended.status:
            bench.require_told(ended, {137}, "")
            bench.require_no_out(ended)
        bench.require_source(ended)
        bench.require_finishes()
        bench.clear()
        yield ended


def killed_from_outside(bench: Bench, tries: int, numbers: random.Random) -> Iterator[Ended]:
    """SIGKILL from another process at a random moment of the run's wall time."""
    begun = time.monotonic()
    bench.run()
    whole = time.monotonic() - begun
    bench.clear()
    for _ in range(tries):
        process = bench.start()
        time.sleep(numbers.uniform(0, whole))
        process.send_signal(signal.SIGKILL)
        ended = bench.finish(process)
        if ended.status:
            bench.require_told(ended, {137}, "")
            bench.require_no_out(ended)
        bench.require_source(ended)
        bench.require_finishes()
        bench.clear()
        yield ended


def changed_source(what: str, problem: str) -> Attempt:
    """A shard changes while it is read; afterwards it is whole again and the run starts over."""
    says = rf"model-00002-of-000004\.safetensors: .*({problem})"

    def attempt(bench: Bench, tries: int, numbers: random.Random) -> Iterator[Ended]:
        victim = sorted(bench.model.glob("*.safetensors"))[1]
        kept = bench.place.parent / "kept.safetensors"
        shutil.copy2(victim, kept)
        fault: dict[str, Any] = {"calls": READS, "what": what, "victim": str(victim)}
        count = bench.count(**fault)
        for number, nth in enumerate(spread(count, tries, numbers)):
            portable = number % 2 == 1
            ended = bench.run(fault={**fault, "nth": nth, "portable": portable})
            shutil.copy2(kept, victim)
            # Found while it is planned, it is bad input; found later, the work fails.
            if ended.status:
                bench.require_told(ended, {1, 2}, says)
                bench.require_no_out(ended)
            bench.require_source(ended)
            bench.require_finishes("--restart")
            bench.clear()
            yield ended
        kept.unlink()

    return attempt


def two_runs(bench: Bench, tries: int, numbers: random.Random) -> Iterator[Ended]:
    """A run pauses at a call, another is started on the same OUT, the first goes on."""
    # Calls that come once the lock is held.
    calls = ["write_at", "kernel_copy", "reserve", "sync_file"]
    count = bench.count(calls=calls)
    for nth in spread(count, tries, numbers):
        first = bench.start(fault={"calls": calls, "what": "pause", "nth": nth})
        try:
            _, status = os.waitpid(first.pid, os.WUNTRACED)
            second = bench.run()
            bench.require(os.WIFSTOPPED(status), "the first run did not pause", second)
            bench.require_told(second, {2}, "is in use: another run writes there now")
            bench.require_no_out(second)
        finally:
            first.send_signal(signal.SIGCONT)
        ended = bench.finish(first)
        bench.require(ended.status == 0, "the first run failed", ended)
        bench.require_source(ended)
        bench.require_finishes()
        bench.clear()
        yield second


def _mount(place: Path, options: str) -> None:
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise Unavailable("there is no mount command") from error
    if done.returncode:
        raise Unavailable("only root may mount a small file system")


def _remount(place: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(place)], check=True)


def full_disk(bench: Bench, tries: int, numbers: random.Random) -> Iterator[Ended]:
    """A file system that is too small, then large enough.

    In turn: found by asking before the first byte, when blocks are reserved, while writing.
    """
    nbytes = sum(path.stat().st_size for path in bench.model.rglob("*"))
    _mount(bench.place, f"size={2 * nbytes}")
    try:
        for number in range(tries):
            _remount(bench.place, f"size={int(nbytes * numbers.uniform(0.05, 0.45))}")
            fault = {"ample": number % 3 > 0, "portable": number % 3 == 2}
            ended = bench.run(fault=fault)
            says = "the disk is too small: .* are free;" if number % 3 == 0 else "No space left"
            bench.require_told(ended, {1}, says)
            bench.require_no_out(ended)
            bench.require_source(ended)
            _remount(bench.place, f"size={2 * nbytes}")
            bench.require_finishes()
            bench.clear()
            yield ended
    finally:
        subprocess.run(["umount", str(bench.place)], check=True)


def read_only(bench: Bench, tries: int, numbers: random.Random) -> Iterator[Ended]:
    """A file system mounted read-only: from the first moment, or after a run was killed."""
    _mount(bench.place, "size=1g")
    try:
        for number in range(tries):
            if number % 2:
                bench.run(fault={"calls": ["rename"], "what": "kill", "nth": 3})
            _remount(bench.place, "ro")
            ended = bench.run()
            bench.require_told(ended, {1}, "Read-only file system.*choose an output place")
            bench.require_no_out(ended)
            bench.require_source(ended)
            _remount(bench.place, "rw")
            bench.require_finishes()
            bench.clear()
            yield ended
    finally:
        subprocess.run(["umount", str(bench.place)], check=True)


RENAMES = ["rename", "sync_folder"]
CATALOGUE = [
    Entry("SIGKILL at a random system call", kills, 200),
    Entry("SIGKILL at a random moment", killed_from_outside, 40),
    Entry(
        "SIGTERM",
        injected({143}, RESUMES, calls=EVERY_CALL, what="terminate"),
    ),
    Entry(
        "Ctrl-C (SIGINT)",
        injected({130}, RESUMES, calls=EVERY_CALL, what="interrupt"),
    ),
    Entry("disk too small (tmpfs): before, while reserving, while writing", full_disk, 18),
    Entry(
        "ENOSPC at a random write",
        injected(
            {1}, "No space left.*free some space", calls=WRITES, what="error", code=errno.ENOSPC
        ),
    ),
    Entry(
        "EIO on write",
        injected({1}, "Input/output error.*check the disk", calls=WRITES, what="error",
                 code=errno.EIO, portable=True),
    ),
    Entry(
        "EIO on sync",
        injected({1}, "Input/output error.*check the disk", calls=["sync_file", "sync_folder"],
                 what="error", code=errno.EIO),
    ),
    Entry(
        "EIO on rename",
        injected({1}, "Input/output error.*check the disk", calls=["rename"],
                 what="error", code=errno.EIO),
    ),
    Entry(
        "EIO on read",
        injected({1}, "Input/output error.*check the disk", calls=READS, what="error",
                 code=errno.EIO),
    ),
    Entry(
        "short reads and writes",
        injected(set(), "", calls=[*READS, "write_at"], what="short"),
    ),
    Entry(
        "a read finds the end too early",
        injected({1, 2}, r"ends at byte [\d,]+, byte [\d,]+ was expected|truncated|empty",
                 calls=READS, what="end"),
    ),
    Entry(
        "a source shard is replaced",
        changed_source("replace", "replaced since|the header is said to be"),
    ),
    Entry(
        "a source shard is truncated",
        changed_source("truncate", "had .* bytes when the run was planned|ends at byte|truncated"),
    ),
    Entry(
        "a source shard grows",
        changed_source("grow", "had .* bytes when the run was planned|surplus"),
    ),
    Entry(
        "a source shard is removed",
        changed_source("remove", "gone now|missing|cannot be read"),
    ),
    Entry("two runs on one OUT", two_runs, 10),
    Entry("read-only target", read_only, 10),
    Entry(
        "no more open files (RLIMIT_NOFILE)",
        injected({1}, "Too many open files.*ulimit -n", calls=EVERY_CALL, what="no files"),
    ),
]  # fmt: skip
