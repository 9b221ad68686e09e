"""The bench of the network's faults: the checkpoint lies on a local Hub, the link is at hand."""

from __future__ import annotations

import hashlib
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from shardsurgeon.execution.journal import read_journal
from tests.faults.trial import ENVIRONMENT, Bench, Ended, Lost, State
from tests.support.hub.server import LocalHub

# Requests that bring bytes of files.
BYTES = r"GET /(cdn|api/resolve-cache)/"


class RemoteBench(Bench):
    """The command prunes a repository into a folder."""

    id = "org/tiny"

    def move_in(self, folder: Path) -> None:
        self.hub = LocalHub(folder / "storage")
        self.hub.start()
        self.commit = self.hub.add_model(self.id, self.model)
        self.address = self.id
        self.environment = ENVIRONMENT | self.hub.environment(folder / "home")
        shards = sum(path.stat().st_size for path in self.model.glob("*.safetensors"))
        self._settings = {"batch": max(shards // 60, 20_000)}

    def close(self) -> None:
        self.hub.stop()

    def clear(self) -> None:
        """Empty the place; the Hub is as it was in the beginning."""
        super().clear()
        self.mend()
        self.hub.reset_counts()

    def mend(self) -> None:
        """No more faults: what is served is the first commit, over a link without limits."""
        self.hub.clear_faults()
        self.hub.limit_bandwidth(None)
        self.hub.start()
        self.hub.branch(self.id, "main", self.commit)

    def start(self, *more: str, fault: Mapping[str, object] | None = None) -> subprocess.Popen[str]:
        return super().start(*more, fault={**self._settings, **(fault or {})})

    def run_soon(self, fault: Mapping[str, object]) -> Ended:
        """The command from begin to end; raises Lost where it has not ended after a minute."""
        try:
            return self.finish(self.start(fault=fault), timeout=60)
        except subprocess.TimeoutExpired as expired:
            raise Lost("it hangs") from expired

    def bytes_sent(self) -> int:
        """Bytes of files that the Hub sent since the counts began."""
        return self.hub.sent(BYTES)

    def requests_of(self, pattern: str) -> int:
        """How many such requests a run makes that nothing disturbs."""
        ended = self.run()
        self.require(ended.status == 0, "the undisturbed run failed", ended)
        count = sum(pattern in f"{one.method} {one.path}" for one in self.hub.requests)
        self.clear()
        return count

    def noted(self) -> int:
        """How many bytes of shards the journal says are done; those with a receipt not counted."""
        record = read_journal(self.place / "out.partial" / "shardsurgeon.journal")
        if record is None:
            return 0
        parts = (pair for part in record.done.parts.values() for pair in part)
        return sum(record.done.finished.values()) + sum(end - begin for begin, end in parts)

    def kill_when(self, due: Callable[[], bool], *more: str) -> Ended:
        """Start the command and kill it as soon as it is due, if it lives that long."""
        process = self.start(*more)
        while process.poll() is None and not due():
            time.sleep(0.002)
        process.kill()
        return self.finish(process)


class StreamBench(RemoteBench):
    """The command prunes a repository into another one; there is no OUT."""

    target = "me/pruned"

    def move_in(self, folder: Path) -> None:
        super().move_in(folder)
        # Room for two or three of the shards that come out.
        sizes = sorted(path.stat().st_size for path in self.model.glob("*.safetensors"))
        self._budget = sizes[-1] * 3 // 2

    def words(self, *more: str) -> list[str]:
        where = ["--stream-push", self.target, "--disk-budget", str(self._budget)]
        return super().words(*where, *more)

    def clear(self) -> None:
        super().clear()
        self.hub.store.repositories.pop(self.target, None)

    def result(self) -> State:
        found: dict[str, Any] = {}
        if self.is_published():
            for name in self.hub.files(self.target):
                digest = hashlib.blake2b(self.hub.read(self.target, name)).hexdigest()
                found[name] = digest
        return found

    def is_published(self) -> bool:
        """Whether the commit is there."""
        repositories = self.hub.store.repositories
        return self.target in repositories and "config.json" in self.hub.files(self.target)

    def require_no_out(self, ended: Ended) -> None:
        """There is no OUT; what is in the repository, if anything is, is everything."""
        self.require(not self.out.exists(), "OUT is there", ended)
        if self.is_published():
            self.require(self.result() == self.reference, "the repository is not right", ended)

    def require_finishes(self, *more: str, run: Callable[..., Ended] | None = None) -> None:
        """A rerun publishes the reference bytes, sends nothing twice and leaves nothing here."""
        ended = Ended(0, "")
        if list(self.place.iterdir()) or not self.is_published():
            ended = (run or self.run)(*more)
        self.require(ended.status == 0, "the rerun failed", ended)
        left = sorted(path.name for path in self.place.iterdir())
        self.require(left == [], f"the rerun left {left}", ended)
        self.require(self.result() == self.reference, "the repository is not right", ended)
        twice = {oid: count for oid, count in self.hub.uploads.items() if count > 1}
        self.require(not twice, f"uploaded more than once: {twice}", ended)
