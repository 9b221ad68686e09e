"""A prune of the whole of Kimi-K2.5, with 512 MB of memory, killed in the middle, then verified.

    sudo python tests/bench/rehearsal.py WORK

Needs Linux and root (a loop device, a memory cgroup), btrfs-progs, about 12 GB of disk below WORK
and half an hour. The model is a sparse file of 554 GiB in which every tensor begins with a mark
of its own; the result, 209 GiB, goes to a btrfs that compresses. So the bytes that move are those
of a real prune, and all that is missing is the disk's own time. What is made is removed at the
end; the report is a markdown table.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import measure

SHARDS = 64
CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class MemoryGroup:
    """A cgroup with a limit, of either version. Its counters are bytes."""

    folder: Path
    peak_file: str
    is_v2: bool

    @property
    def peak(self) -> int:
        """The most that was in use at once, pages of files included."""
        return int((self.folder / self.peak_file).read_text())

    @property
    def kills(self) -> int:
        """How many processes were killed because memory ran out."""
        name = "memory.events" if self.is_v2 else "memory.oom_control"
        words = dict(line.split() for line in (self.folder / name).read_text().splitlines())
        return int(words.get("oom_kill", 0))

    def enter(self) -> None:
        """Move the calling process there."""
        (self.folder / "cgroup.procs").write_text(str(os.getpid()))


@contextmanager
def memory_group(limit: int) -> Iterator[MemoryGroup]:
    """A new group below our own (version 1) or below the root (version 2)."""
    is_v2 = (CGROUPS / "cgroup.controllers").exists()
    if is_v2:
        parent, limit_file, peak_file = CGROUPS, "memory.max", "memory.peak"
    else:
        lines = (line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().split())
        own = next(path for _, controllers, path in lines if "memory" in controllers.split(","))
        parent = CGROUPS / "memory" / own.lstrip("/")
        limit_file, peak_file = "memory.limit_in_bytes", "memory.max_usage_in_bytes"
    folder = parent / f"rehearsal-{os.getpid()}"
    folder.mkdir()
    try:
        (folder / limit_file).write_text(str(limit))
        yield MemoryGroup(folder, peak_file, is_v2)
    finally:
        folder.rmdir()


@dataclass(frozen=True)
class Act:
    """One command of the rehearsal: how it ended, in what time, with how much memory."""

    name: str
    status: str
    wall: float
    cpu: float
    rss: int
    report: dict[str, object]


def act(
    name: str, words: list[str], group: MemoryGroup, until: Path | None = None, files: int = 0
) -> Act:
    """Run a command in the group; kill it as soon as folder `until` holds that many files."""
    begun = time.perf_counter()
    command = [sys.executable, "-m", "shardsurgeon", *words, "--json"]
    with tempfile.TemporaryFile() as said:
        child = subprocess.Popen(command, stdout=said, preexec_fn=group.enter)
        while until is not None and child.returncode is None:
            if until.exists() and len(os.listdir(until)) >= files:
                child.send_signal(signal.SIGKILL)
                break
            time.sleep(0.2)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        wall = time.perf_counter() - begun
        said.seek(0)
        report = json.loads(said.read() or b"{}")
    ended = "killed" if child.returncode == -signal.SIGKILL else f"status {child.returncode}"
    cpu = usage.ru_utime + usage.ru_stime
    result = Act(name, ended, wall, cpu, usage.ru_maxrss * 1024, report)
    print(f"{name}: {ended} after {wall:,.0f} s, peak {result.rss / 1e6:,.0f} MB", flush=True)
    return result


def rehearse(model: Path, mounted: Path, ratio: str, group: MemoryGroup) -> list[Act]:
    """The whole play: dry run, apply, kill, apply again, verify."""
    out = mounted / "out"
    words = ["apply", str(model / "scores.json"), "--model", str(model), "--ratio", ratio]
    words += ["--rounding", "nearest", "-o", str(out)]
    partial = Path(f"{out}.partial") / "files"
    return [
        act("apply --dry-run", [*words, "--dry-run"], group),
        act("apply, killed half-way", words, group, until=partial, files=SHARDS // 2),
        act("apply again", words, group),
        act("verify --sample 8", ["verify", str(model), str(out), "--sample", "8"], group),
    ]


def report(acts: list[Act], group: MemoryGroup, limit: int, image: Path) -> str:
    """What happened, in numbers."""
    rows = [
        [
            one.name,
            one.status,
            f"{one.wall:,.0f}",
            f"{one.cpu:,.0f}",
            f"{one.rss / 1e6:,.0f}",
            _size(one.report.get("bytes_copied")),
            _size(one.report.get("bytes_resumed")),
        ]
        for one in acts
    ]
    headings = ["", "ended", "wall s", "CPU s", "peak MB", "GB copied", "GB resumed"]
    verified = acts[-1].report
    lines = [
        measure.table(headings, rows),
        "",
        f"Memory limit {limit / 1e6:,.0f} MB, file pages included; most in use "
        f"{group.peak / 1e6:,.0f} MB; killed for want of memory: {group.kills}.",
        f"Verification compared {verified.get('tensors_compared'):,} tensors, "
        f"{_size(verified.get('bytes_compared'))} GB; "
        f"differences: {len(verified.get('differences', [1]))}.",  # type: ignore[arg-type]
        f"The result takes {image.stat().st_blocks * 512 / 1e9:.1f} GB of the disk.",
    ]
    return "\n".join(lines)


def _size(nbytes: object) -> str:
    return f"{nbytes / 1e9:,.1f}" if isinstance(nbytes, int) else ""


def main() -> None:
    """The command line above."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--ratio", default="0.65")
    parser.add_argument("--memory", type=int, default=512, metavar="MB")
    parser.add_argument("--layers", type=int, default=61, help="fewer make a shorter rehearsal")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    limit = given.memory * 1_000_000
    with tempfile.TemporaryDirectory(dir=given.work) as name:
        folder = Path(name)
        words = ["--layers", str(given.layers), "--shards", str(SHARDS), "--stamp"]
        model = measure.make_model(folder / "model", *words)
        with (
            measure.disk("btrfs", 300 << 30, folder, "compress=zstd:1") as mounted,
            memory_group(limit) as group,
        ):
            acts = rehearse(model, mounted, given.ratio, group)
            os.sync()
            print("\n" + report(acts, group, limit, folder / "btrfs.img"))
    if [one.status for one in acts] != ["status 0", "killed", "status 0", "status 0"]:
        sys.exit("the rehearsal failed")


if __name__ == "__main__":
    main()
