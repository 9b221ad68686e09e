"""One command under a fault, what it leaves, and the run after it: what each fault must pass."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.faults.checkpoint import ROOT, write_checkpoint

DRIVER = Path(__file__).with_name("driver.py")
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "SHARDSURGEON_PROGRESS": "none"}
ENVIRONMENT.pop("SHARDSURGEON_DEBUG", None)

State = Mapping[str, str]
# How long any command may take on the small checkpoint, whatever happens to it.
LIMIT_SECONDS = 60


@dataclass(frozen=True)
class Ended:
    """How a command ended; status as shells give it: 128 and the signal's number."""

    status: int
    stderr: str


def contents(folder: Path) -> State:
    """Every file below a folder and the digest of its bytes."""
    return {
        path.relative_to(folder).as_posix(): hashlib.blake2b(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


class Lost(AssertionError):
    """A fault did harm."""


class Bench:
    """A checkpoint, the bytes its pruned twin must have, and a place to prune it again."""

    def __init__(self, folder: Path, hidden: int, width: int) -> None:
        self.model = folder / "model"
        self.place = folder / "place"
        self.place.mkdir(parents=True)
        write_checkpoint(self.model, hidden, width)
        self.environment = ENVIRONMENT
        self._counts: dict[str, int] = {}
        self.address = str(self.model)
        self.move_in(folder)
        self.source = contents(self.model)
        ended = self.run()
        if ended.status:
            raise Lost(ended.stderr)
        self.reference = self.result()
        self.clear()

    def move_in(self, folder: Path) -> None:
        """Make ready what else is needed; a checkpoint that is not here gets its address."""

    def close(self) -> None:
        """Let go of what was made ready."""

    @property
    def out(self) -> Path:
        return self.place / "out"

    def result(self) -> State:
        """What the command makes."""
        return contents(self.out)

    def clear(self) -> None:
        """Empty the place."""
        for path in self.place.iterdir():
            shutil.rmtree(path)

    def words(self, *more: str) -> list[str]:
        """The command, without the program."""
        scores = str(self.model / "scores.pt")
        # The bytes are random, NaN among them, so that routers have no norm to score by.
        given = ["--model", self.address, "--ratio", "0.5", "--mtp", "last"]
        given += ["-o", str(self.out)]
        return ["apply", scores, *given, "--workers", "2", *more]

    def start(self, *more: str, fault: Mapping[str, object] | None = None) -> subprocess.Popen[str]:
        """Begin the command, with the driver's fault if there is one."""
        begin = [str(DRIVER), json.dumps(fault)] if fault else ["-m", "shardsurgeon"]
        return subprocess.Popen(
            [sys.executable, *begin, *self.words(*more)],
            env=self.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def finish(self, process: subprocess.Popen[str], timeout: float = 120) -> Ended:
        """Wait for a command's end."""
        try:
            _, said = process.communicate(timeout=timeout)
        finally:
            process.kill()
        status = process.returncode
        return Ended(128 - status if status < 0 else status, said)

    def run_words(
        self,
        words: list[str],
        fault: Mapping[str, object] | None = None,
        *,
        closed: bool = False,
        alone: float = 0.0,
    ) -> Ended:
        """Any command from begin to end.

        closed: without stdout and stderr; alone: seconds that it takes undisturbed, where that is
        long. Raises Lost where it takes a minute more.
        """
        begin = [str(DRIVER), json.dumps(fault)] if fault else ["-m", "shardsurgeon"]
        command = [sys.executable, *begin, *words]
        process = subprocess.Popen(
            ["sh", "-c", 'exec "$@" >&- 2>&-', "sh", *command] if closed else command,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            return self.finish(process, timeout=LIMIT_SECONDS + alone)
        except subprocess.TimeoutExpired:
            raise Lost(f"hangs: {' '.join(command)}") from None

    def run(self, *more: str, fault: Mapping[str, object] | None = None) -> Ended:
        """The command from begin to end."""
        return self.finish(self.start(*more, fault=fault))

    def count(self, **fault: Any) -> int:
        """How many of the calls there are in a run that nothing disturbs, counted once."""
        kind = json.dumps(fault | {"what": ""}, sort_keys=True)
        if kind in self._counts:
            return self._counts[kind]
        counted = self.place.parent / "counted"
        ended = self.run(fault={**fault, "what": "", "nth": 0, "counted": str(counted)})
        if ended.status:
            raise Lost(ended.stderr)
        self.clear()
        self._counts[kind] = int(counted.read_text())
        return self._counts[kind]

    # What must hold

    def require(self, holds: bool, problem: str, ended: Ended) -> None:
        """Raise Lost unless it holds."""
        if not holds:
            raise Lost(f"{problem}; status {ended.status}: {ended.stderr}")

    def require_told(self, ended: Ended, statuses: set[int], says: str) -> None:
        """The status is expected, and one line says what happened; nothing after a kill."""
        self.require(ended.status in statuses, f"status is not in {statuses}", ended)
        if ended.status == 128 + signal.SIGKILL:
            return
        # That a server is waited for is said as well.
        lines = [line for line in ended.stderr.splitlines() if ": waiting " not in line]
        self.require(len(lines) == 1, f"{len(lines)} lines on stderr", ended)
        self.require(re.search(says, ended.stderr) is not None, f"does not say {says!r}", ended)

    def require_no_out(self, ended: Ended) -> None:
        """There is no OUT, unless it is complete and the command said so, or could not."""
        if not self.out.exists():
            return
        told = "is complete" in ended.stderr or ended.status == 128 + signal.SIGKILL
        self.require(told, "OUT is there", ended)
        self.require(contents(self.out) == self.reference, "OUT is not the reference", ended)

    def require_source(self, ended: Ended) -> None:
        """The source's bytes are what they were."""
        self.require(contents(self.model) == self.source, "the source changed", ended)

    def require_finishes(self, *more: str, run: Callable[..., Ended] | None = None) -> None:
        """A rerun gives the reference bytes and leaves nothing beside them."""
        if not self.out.exists():
            ended = (run or self.run)(*more)
            self.require(ended.status == 0, "the rerun failed", ended)
            left = sorted(path.name for path in self.place.iterdir())
            self.require(left == ["out"], f"the rerun left {left}", ended)
        ended = Ended(0, "")
        self.require(contents(self.out) == self.reference, "the rerun's bytes differ", ended)
