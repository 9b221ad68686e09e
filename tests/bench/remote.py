"""The benchmark of the network: what travels, in what time, and how much disk it needs.

    python -m tests.bench.remote WORK                              2 GB, 50 MB/s
    python -m tests.bench.remote WORK --size 500 --bandwidth 20    all in MB
    python -m tests.bench.remote WORK --layout stacked --disk-budget 400

The local Hub of tests/support/hub serves checkpoints of random bytes over a link of fixed
bandwidth, so much each way. Bytes are those of the bodies of the server's answers, whatever the
command says of itself. Disk is all that lies in the folder where a command has its output, its
cache of the Hub and its temporary files. WORK needs room for three times the size; what is made
there is removed at the end. The exit status is 1 where `Costs.problems` finds something.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

from tests.bench import measure

# At run time only where they are needed: see `_run`.
if TYPE_CHECKING:
    from tests.support.hub.models import Sample
    from tests.support.hub.server import LocalHub

ROOT = Path(__file__).parents[2]
LAYOUTS = {"int4": "per-expert INT4", "stacked": "stacked bf16"}
MODEL, RESULT, RATIO = "org/name", "me/pruned", "0.65"
MOST_DOWNLOADED = 1.02
LOOK_SECONDS = 0.02
# What a push adds, renames or finds in the repository.
OF_THE_HUB = {"README.md", "README.source.md", ".gitattributes", "calibration/saliency.png"}
# Listings and the like, which are JSON; behind resolve-cache lie files.
API_ANSWERS = r" /(api/(?!resolve-cache/)|.*/info/lfs/)"
SNAPSHOT = """
import sys, huggingface_hub
huggingface_hub.snapshot_download(sys.argv[1], local_dir=(sys.argv[2:] or [None])[0])
"""
HEADINGS = [
    "",
    "wall s",
    "downloaded MB",
    "of these headers, JSON",
    "kept MB",
    "other bytes ÷ kept",
    "peak disk MB",
    "peak memory MB",
]


@dataclass(frozen=True)
class Cost:
    """One way to a result. Seconds and bytes.

    sent: all that the server sent; facts: how much of it is headers and JSON if these are sent
    once; kept: the files of the result; disk, rss: the most at any time, of the largest process.
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
        return (self.sent - self.facts) / self.kept

    def row(self, layout: str) -> list[str]:
        """The line of the table."""
        kept = [_megabytes(self.kept), f"{self.ratio:.3f}"] if self.kept else ["", ""]
        facts = _megabytes(self.facts) if self.facts else ""
        sizes = [_megabytes(self.sent), facts, *kept, _megabytes(self.disk)]
        return [f"{layout}: {self.name}", f"{self.wall:.1f}", *sizes, f"{self.rss / 1e6:,.0f}"]


@dataclass(frozen=True)
class Costs:
    """All ways, for one layout. differing: files that are not what a local prune makes them."""

    layout: str
    inspected: Cost
    pruned: Cost
    downloaded: Cost
    streamed: Cost
    budget: int
    differing: Sequence[str]

    def problems(self) -> list[str]:
        """What is not as it must be."""
        found = [f"{name} is not what a local prune makes" for name in self.differing]
        seen, facts = self.inspected.sent, self.inspected.facts
        if seen != facts:
            found.append(f"inspect: {seen:,} bytes, headers and JSON have {facts:,}")
        for cost in (self.pruned, self.streamed):
            if cost.ratio > MOST_DOWNLOADED:
                found.append(f"{cost.name}: {cost.ratio:.4f} bytes downloaded for each byte kept")
        if self.streamed.disk > self.budget:
            found.append(f"{self.streamed.disk:,} bytes of disk, the budget is {self.budget:,}")
        return [f"{self.layout}: {problem}" for problem in found]

    def rows(self) -> list[list[str]]:
        """The lines of the table."""
        costs = (self.downloaded, self.pruned, self.streamed, self.inspected)
        return [cost.row(LAYOUTS[self.layout]) for cost in costs]


class Bench:
    """A Hub with one model. Commands use it one after the other, in a place that is then cleared.

    bandwidth: bytes per second, None for all there is.
    """

    def __init__(self, hub: LocalHub, sample: Sample, work: Path, bandwidth: float | None) -> None:
        self._hub, self._sample, self._bandwidth = hub, sample, bandwidth
        self._place = work / "place"
        self._commit = hub.add_model(MODEL, sample.folder)
        shards = sample.folder.glob("*.safetensors")
        told = [sample.folder / "config.json", sample.folder / "model.safetensors.index.json"]
        self._facts = sum(map(_header_nbytes, shards)) + sum(path.stat().st_size for path in told)

    def costs(self, layout: str, budget: int) -> Costs:
        """Go all ways, and compare what they lead to."""
        inspected, _ = self._go("`inspect`", _shardsurgeon("inspect", MODEL))
        pruned, direct = self._go("`apply`", self._apply(MODEL))
        both = (_snapshot(MODEL), self._apply(self._cached()))
        downloaded, local = self._go("`snapshot_download`, local `apply`", *both)
        words = ("--stream-push", RESULT, "--disk-budget", str(budget))
        streamed, _ = self._go("`apply --stream-push`", self._apply(MODEL, *words))
        self._bandwidth = None
        _, there = self._go("", _snapshot(RESULT, str(self._place / "out")))
        return Costs(
            layout=layout,
            inspected=inspected,
            pruned=pruned,
            # Whatever it is that comes, it comes because all of it is asked for.
            downloaded=replace(downloaded, facts=0),
            streamed=replace(streamed, kept=pruned.kept),
            budget=budget,
            differing=[*_differing(direct, local, set()), *_differing(there, local, OF_THE_HUB)],
        )

    def _go(self, name: str, *commands: list[str]) -> tuple[Cost, dict[str, str]]:
        """Run commands over the shaped link; what it cost, and the digests of what is in `out`."""
        for folder in ("home", "tmp"):
            (self._place / folder).mkdir(parents=True)
        self._hub.limit_bandwidth(self._bandwidth)
        self._hub.reset_counts()
        with peak_disk(self._place) as disk:
            runs = [_run(command, self._environment()) for command in commands]
        self._hub.limit_bandwidth(None)
        out = self._place / "out"
        cost = Cost(
            name=name,
            wall=sum(run.wall for run in runs),
            rss=max(run.rss for run in runs),
            sent=self._hub.sent(),
            facts=self._facts + self._hub.sent(API_ANSWERS),
            disk=max(disk),
            kept=sum(path.stat().st_size for path in measure.files(out)),
        )
        made = digests(out)
        shutil.rmtree(self._place)
        return cost, made

    def _apply(self, model: str, *more: str) -> list[str]:
        out = str(self._place / "out")
        words = ["--model", model, "--ratio", RATIO, "-o", out, *more]
        return _shardsurgeon("apply", str(self._sample.scores), *words)

    def _cached(self) -> str:
        """Where huggingface_hub has a snapshot of the model."""
        folder = "models--" + MODEL.replace("/", "--")
        return str(self._place / "home" / "hub" / folder / "snapshots" / self._commit)

    def _environment(self) -> dict[str, str]:
        temporary = dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(self._place / "tmp"))
        return self._hub.environment(self._place / "home") | temporary | {"PYTHONPATH": str(ROOT)}


def _shardsurgeon(*words: str) -> list[str]:
    return [sys.executable, "-m", "shardsurgeon", *words]


def _snapshot(repo_id: str, *folder: str) -> list[str]:
    return [sys.executable, "-c", SNAPSHOT, repo_id, *folder]


def _run(command: list[str], environment: dict[str, str]) -> measure.Sample:
    """Run a command as the child of a small process: it begins with its parent's peak of memory.

    This process has a server in it. The small one imports what stands above, no more.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as apart:
        return apart.submit(_run_here, command, environment).result()


def _run_here(command: list[str], environment: dict[str, str]) -> measure.Sample:
    os.environ.update(environment)
    return measure.run(command)


@contextmanager
def peak_disk(folder: Path) -> Iterator[list[int]]:
    """The bytes that the files below a folder take up, looked at every 20 ms and at the end."""
    seen = [0]
    stopped = threading.Event()

    def look() -> None:
        over = False
        while not over:
            over = stopped.wait(LOOK_SECONDS)
            # What goes and what comes while one looks was not there at the same time.
            seen.append(min(_occupied(folder), _occupied(folder)))

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield seen
    finally:
        stopped.set()
        watcher.join()


def _occupied(folder: Path) -> int:
    """Bytes on the disk, each file once however many names it has."""
    found: dict[int, int] = {}
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                status = os.lstat(os.path.join(parent, name))
                found[status.st_ino] = status.st_blocks * 512
    return sum(found.values())


def digests(folder: Path) -> dict[str, str]:
    """Every file below a folder and the sha256 of its content."""
    found = {}
    for path in measure.files(folder):
        if ".cache" not in path.relative_to(folder).parts:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            found[path.relative_to(folder).as_posix()] = digest
    return found


def _differing(made: dict[str, str], expected: dict[str, str], apart: set[str]) -> list[str]:
    names = sorted((made.keys() | expected.keys()) - apart)
    return [name for name in names if made.get(name) != expected.get(name)]


def _header_nbytes(shard: Path) -> int:
    with shard.open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def _megabytes(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.2f}"


def costs(
    work: Path, layout: str, nbytes: int, *, budget: int, bandwidth: float | None = None
) -> Costs:
    """Make a model of about `nbytes` in the empty folder `work`, serve it, and use it all ways."""
    from tests.support.hub.models import write_checkpoint
    from tests.support.hub.server import LocalHub

    sample = write_checkpoint(work / "model", layout, nbytes)
    (work / "hub").mkdir()
    hub = LocalHub(work / "hub")
    hub.start()
    try:
        return Bench(hub, sample, work, bandwidth).costs(layout, budget)
    finally:
        hub.stop()


def main() -> None:
    """The command line above."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--layout", choices=(*LAYOUTS, "both"), default="both")
    parser.add_argument("--size", type=float, default=2000, metavar="MB")
    parser.add_argument("--bandwidth", type=float, default=50, metavar="MB/s")
    parser.add_argument("--disk-budget", type=float, metavar="MB", help="[default: 15 % of size]")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    budget = int(1e6 * (given.disk_budget or 0.15 * given.size))
    rows: list[list[str]] = []
    problems: list[str] = []
    for layout in LAYOUTS if given.layout == "both" else [given.layout]:
        with tempfile.TemporaryDirectory(dir=given.work) as name:
            how = {"budget": budget, "bandwidth": given.bandwidth * 1e6}
            found = costs(Path(name), layout, int(given.size * 1e6), **how)
        rows += found.rows()
        problems += found.problems()
    link, size = f"{given.bandwidth:g} MB/s", f"{given.size:g} MB"
    print(f"{size} in 8 shards, ratio {RATIO}, {link}, --disk-budget {budget / 1e6:g}MB\n")
    print(measure.table(HEADINGS, rows))
    if problems:
        sys.exit("\n" + "\n".join(problems))


if __name__ == "__main__":
    main()
