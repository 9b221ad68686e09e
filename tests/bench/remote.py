"""The benchmark of the network: what travels, in what time, through how much disk.

    python -m tests.bench.remote WORK                                  2 GB, 50 MB/s
    python -m tests.bench.remote WORK --size 500 --bandwidth 20        all in MB
    python -m tests.bench.remote WORK --layout stacked --disk-budget 400

The local Hub of tests/hub serves a checkpoint of random bytes over a link of fixed bandwidth, each
way for itself. Bytes are those of the bodies that left the server, whatever the command says of
itself; disk is what lies below the folder that holds the command's output, its cache of the Hub
and its temporary files. WORK needs room for three times the size; what is made there is removed
at the end. The exit status is 1 where something of `Costs.problems` is the case.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

from tests.bench import measure

# Importing them makes a process big, and its children would start with that as their peak.
if TYPE_CHECKING:
    from tests.hub.models import Sample
    from tests.hub.server import LocalHub

ROOT = Path(__file__).parents[2]
LAYOUTS = {"int4": "per-expert INT4", "stacked": "stacked bf16"}
MODEL, RESULT = "org/name", "me/pruned"
RATIO = "0.65"
MOST_DOWNLOADED = 1.02
LOOK_SECONDS = 0.02
# What a push adds, renames or finds in the repository.
OF_THE_HUB = {"README.md", "README.source.md", ".gitattributes"}
API_ANSWER = r" /(api/(?!resolve-cache/)|.*/info/lfs/)"
# In a process that lets nothing of the library's linger but what it downloads.
SNAPSHOT = "import sys, huggingface_hub as hub; hub.snapshot_download(sys.argv[1], local_dir={})"


@dataclass(frozen=True)
class Cost:
    """One way to a result. Seconds and bytes.

    sent: by the server in all; facts: how much of it may be headers and JSON that tell what there
    is; kept: the files of the result; disk: the most that was there at once; rss: of the largest
    process.
    """

    name: str
    wall: float
    rss: float
    sent: int
    facts: int
    disk: int
    kept: int = 0

    @property
    def ratio(self) -> float:
        """Bytes sent for each byte kept, headers and JSON apart."""
        return (self.sent - self.facts) / self.kept if self.kept else 0.0


@dataclass(frozen=True)
class Costs:
    """All ways, for one layout. differing: files that a download of the result has otherwise."""

    layout: str
    inspected: Cost
    pruned: Cost
    downloaded: Cost
    streamed: Cost
    budget: int
    differing: tuple[str, ...]

    def problems(self) -> list[str]:
        """What is not as it must be."""
        found = [f"{name} is not what a local prune makes" for name in self.differing]
        if self.inspected.sent != self.inspected.facts:
            said = f"{self.inspected.sent:,} bytes for {self.inspected.facts:,} of headers and JSON"
            found.append(f"inspect: the server sent {said}")
        for cost in (self.pruned, self.streamed):
            if cost.ratio > MOST_DOWNLOADED:
                found.append(f"{cost.name}: {cost.ratio:.4f} bytes downloaded for each kept")
        if self.streamed.disk > self.budget:
            found.append(f"{self.streamed.disk:,} bytes of disk, the budget is {self.budget:,}")
        return [f"{self.layout}: {problem}" for problem in found]

    def rows(self) -> Iterator[list[str]]:
        """The lines of the table."""
        for cost in (self.pruned, self.downloaded, self.streamed, self.inspected):
            yield [
                f"{LAYOUTS[self.layout]}: {cost.name}",
                f"{cost.wall:.1f}",
                _megabytes(cost.sent),
                _megabytes(cost.facts),
                _megabytes(cost.kept) if cost.kept else "",
                f"{cost.ratio:.4f}" if cost.kept else "",
                _megabytes(cost.disk),
                f"{cost.rss / 1e6:,.0f}",
            ]


HEADINGS = [
    "",
    "wall s",
    "downloaded MB",
    "of it headers, JSON",
    "kept MB",
    "downloaded ÷ kept",
    "peak disk MB",
    "peak memory MB",
]


class Bench:
    """A Hub with one model, and room for commands that use it one after the other."""

    def __init__(
        self, hub: LocalHub, sample: Sample, work: Path, bandwidth: float | None = None
    ) -> None:
        self._hub, self._sample, self._work = hub, sample, work
        self._bandwidth = bandwidth
        shards = sample.folder.glob("*.safetensors")
        told = [sample.folder / "config.json", sample.folder / "model.safetensors.index.json"]
        self._facts = sum(map(_header_nbytes, shards)) + sum(path.stat().st_size for path in told)

    def cost(self, name: str, place: str, *commands: list[str], facts: bool = True) -> Cost:
        """Run commands in the new folder `place`, over the shaped link.

        facts: whether headers and JSON count for themselves; else they are part of what was sent.
        """
        folder = self.folder(place)
        environment = self._environment(folder)
        self._hub.limit_bandwidth(self._bandwidth)
        self._hub.reset_counts()
        with peak_disk(folder) as disk:
            runs = [_run_apart(command, environment) for command in commands]
        self._hub.limit_bandwidth(None)
        wall, rss = sum(run.wall for run in runs), max(run.rss for run in runs)
        told = self._facts + self._hub.sent(API_ANSWER) if facts else 0
        kept = sum(path.stat().st_size for path in measure.files(folder / "out"))
        return Cost(name, wall, rss, self._hub.sent(), told, max(disk), kept)

    def folder(self, place: str) -> Path:
        """The folder of that name, with the places where a process puts things."""
        folder = self._work / place
        for name in ("home", "tmp"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        return folder

    def apply(self, model: str, *more: str) -> list[str]:
        """The command that prunes."""
        return _shardsurgeon(
            "apply", str(self._sample.scores), "--model", model, "--ratio", RATIO, *more
        )

    def download(self, repo_id: str, folder: Path) -> list[str]:
        """The command that downloads whole."""
        return [sys.executable, "-c", SNAPSHOT.format("sys.argv[2]"), repo_id, str(folder)]

    def _environment(self, folder: Path) -> dict[str, str]:
        temporary = dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(folder / "tmp"))
        return self._hub.environment(folder / "home") | temporary | {"PYTHONPATH": str(ROOT)}
