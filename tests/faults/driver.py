"""The command line with a fault in its system calls: `python driver.py SPEC WORD...`.

SPEC is JSON, the fields of `Fault`. Everything else is the real program: real process, real
signals, real files. The fault comes at the `nth` of the named calls, counted over all threads.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from io import FileIO
from pathlib import Path
from typing import Any

from shardsurgeon.cli.main import main
from shardsurgeon.execution import shards
from shardsurgeon.storage import system as systems

SIGNALS = {
    "kill": "SIGKILL",
    "terminate": "SIGTERM",
    "interrupt": "SIGINT",
    "pause": "SIGSTOP",
    "hang up": "SIGHUP",
}
LOSSES = ("reader left", "log disk full", "terminal hung up")


@dataclass(frozen=True)
class Fault:
    """What happens, and when.

    calls: the calls of `System` that are counted; nth: which of them it is, from 1, 0 for none;
    what: a key of SIGNALS; `error` (this call and all later ones fail with `code`); `short`
    (this call and all later ones move at most 7 bytes); `end` (reads find the end of the file);
    `replace`, `truncate`, `grow` or `remove` (done to `victim`); `no files` (the process may
    open no more files); one of LOSSES (stdout and stderr lead there from now on; with nth 0 from
    the beginning). nohup: SIGHUP is ignored. inside, beyond: only reads of files whose path has
    this in it count, from this byte on. portable: without the kernel's copy; ample: free space is
    not asked. counted: a file that receives how many calls there were. batch: how many bytes a
    worker asks of a network at a time, so that small checkpoints take as many requests as big
    ones; hasty: without pauses between the tries at a request; window: over so many seconds a
    connection is measured.
    """

    what: str = ""
    calls: list[str] = field(default_factory=list)
    nth: int = 0
    code: int = 0
    victim: str = ""
    portable: bool = False
    ample: bool = False
    inside: str = ""
    beyond: int = 0
    counted: str = ""
    batch: int = 0
    hasty: bool = False
    nohup: bool = False
    window: float = 0.0


class FaultySystem:
    """Wraps every call of a System."""

    def __init__(self, fault: Fault) -> None:
        self.fault = fault
        self.count = 0
        self._counting = threading.Lock()

    def wrapped(self, real: systems.System) -> systems.System:
        calls = {one.name: self._call(one.name, getattr(real, one.name)) for one in fields(real)}
        if self.fault.ample:
            calls["free_space"] = lambda folder: 1 << 60
        return systems.System(**calls)

    def _call(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        if name not in self.fault.calls:
            return real

        def call(*arguments: Any) -> Any:
            if not self._concerns(arguments):
                return real(*arguments)
            with self._counting:
                self.count += 1
                count = self.count
            if count == self.fault.nth:
                self._happen()
            if self.fault.nth and count >= self.fault.nth:
                return self._spoiled(name, real, arguments)
            return real(*arguments)

        return call

    def _concerns(self, arguments: tuple[Any, ...]) -> bool:
        """Whether a call is one of those that are counted."""
        if not self.fault.inside:
            return True
        file, _, offset = arguments
        return self.fault.inside in str(file.name) and offset >= self.fault.beyond

    def _happen(self) -> None:
        what, victim = self.fault.what, Path(self.fault.victim)
        if what in SIGNALS:
            os.kill(os.getpid(), getattr(signal, SIGNALS[what]))
        elif what == "no files":
            _open_no_more_files()
        elif what in LOSSES:
            lose_streams(what)
        elif what == "replace":
            spoiled = victim.with_name("replacement")
            spoiled.write_bytes(victim.read_bytes()[::-1])
            os.replace(spoiled, victim)
        elif what == "truncate":
            os.truncate(victim, victim.stat().st_size // 2)
        elif what == "grow":
            with victim.open("ab") as file:
                file.write(b"more")
        elif what == "remove":
            victim.unlink()

    def _spoiled(self, name: str, real: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        what = self.fault.what
        if what == "error":
            if name == "kernel_copy":  # the real one takes any error for declining
                return 0
            if name == "share":
                return False
            raise OSError(self.fault.code, os.strerror(self.fault.code))
        if what == "end" and name == "share":
            return False
        if what == "end" and name in ("read_at", "kernel_copy"):
            return 0
        if what == "short" and name in ("read_at", "write_at"):
            file, data, at = arguments
            return real(file, data[: max(7, len(data) // 3)], at)
        if what == "short" and name == "kernel_copy":
            *places, nbytes = arguments
            return real(*places, max(7, nbytes // 3))
        return real(*arguments)


def lose_streams(how: str) -> None:
    """Point stdout and stderr at what takes no word."""
    if how == "reader left":
        reader, writer = os.pipe()
        os.close(reader)
    elif how == "log disk full":
        writer = os.open("/dev/full", os.O_WRONLY)
    else:
        leader, writer = os.openpty()
        os.close(leader)
    for number in (1, 2):
        os.dup2(writer, number)
    os.close(writer)


def _open_no_more_files() -> None:
    import resource

    probe = FileIO("/dev/null")
    highest = probe.fileno()
    probe.close()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest, hard))


def _make_hasty() -> None:
    from shardsurgeon.storage import retry

    def at_once(seconds: float) -> Iterator[bytes]:
        yield b""

    retry._waiting = at_once


def _measure_over(seconds: float) -> None:
    from shardsurgeon.storage.hub.source import HubSource
    from shardsurgeon.storage.retry import RetryPolicy

    policy = RetryPolicy(window=seconds)
    HubSource.__init__.__defaults__ = (None, policy)  # type: ignore[misc]


def run(spec: str, words: list[str]) -> int:
    """The command's exit status."""
    fault = Fault(**json.loads(spec))
    real = systems.portable() if fault.portable else systems.native()
    faulty = FaultySystem(fault)
    system = faulty.wrapped(real)
    systems.native = lambda: system
    if fault.batch:
        shards.REMOTE_BATCH_NBYTES = fault.batch
    if fault.hasty:
        _make_hasty()
    if fault.window:
        _measure_over(fault.window)
    # A shell that runs this harness in the background has SIGINT ignored, and children inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if fault.nohup:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    if fault.what in LOSSES and not fault.nth:
        lose_streams(fault.what)
    status = main(words)
    if fault.counted:
        Path(fault.counted).write_text(str(faulty.count))
    return status


if __name__ == "__main__":
    sys.exit(run(sys.argv[1], sys.argv[2:]))
