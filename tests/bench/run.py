"""The benchmark: shardsurgeon beside `cp`, compressed-tensors and the script people publish.

    python tests/bench/run.py WORK                          8 GB, INT4, warm cache
    python tests/bench/run.py WORK --layout stacked --cold  bf16 stacked, from the disk
    python tests/bench/run.py WORK --disks ext4,xfs,btrfs   on loop devices; needs root
    python tests/bench/run.py WORK --growth growth.png      time against size, as a picture

WORK is a folder on the disk to be measured, with room for three times the size; what is made
there is removed at the end. Every round runs all contenders one after the other, so that a
machine whose speed drifts drifts for all; the table shows medians. The clock of every contender
stops when its output is on the disk.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import growth
import measure
from skeleton import parse_size

HERE = Path(__file__).parent
RATIOS = (0.5, 0.65)


@dataclass(frozen=True)
class Contender:
    """name: as the table shows it; command: from the paths of a setting; syncs: by itself."""

    name: str
    command: Callable[[Setting], list[str]]
    syncs: bool = False
    is_peer: bool = False


@dataclass(frozen=True)
class Setting:
    """One model at one ratio. kept: a folder of exactly the files that pruning leaves.

    shares_blocks: whether a copy of a whole file would copy nothing there.
    """

    model: Path
    ratio: float
    keep: Path
    kept: Path
    out: Path
    shares_blocks: bool = False


def shardsurgeon(workers: int, verify: bool = True) -> Contender:
    """Our own command."""

    def command(at: Setting) -> list[str]:
        scores, model = str(at.model / "scores.json"), str(at.model)
        words = ["apply", scores, "--model", model, "--ratio", str(at.ratio), "-o", str(at.out)]
        words += ["--workers", str(workers), "--verify" if verify else "--no-verify"]
        return [sys.executable, "-m", "shardsurgeon", *words]

    checked = "" if verify else ", unverified"
    return Contender(f"shardsurgeon, {workers} worker{'s'[: workers > 1]}{checked}", command, True)


def cp(at: Setting) -> list[str]:
    """A plain copy. Where a file system shares blocks between files, `cp` is kept from it."""
    shares = ["--reflink=never"] if at.shares_blocks else []
    return ["cp", "-r", *shares, str(at.kept), str(at.out)]


def peer(script: str) -> Callable[[Setting], list[str]]:
    """A script beside this one."""
    path = str(HERE / script)
    return lambda at: [sys.executable, path, str(at.model), str(at.out), str(at.keep)]


CP = Contender("cp of the kept bytes", cp)
CONTENDERS = (
    CP,
    *(shardsurgeon(workers) for workers in (1, 2, 4)),
    *(shardsurgeon(workers, verify=False) for workers in (1, 2, 4)),
    Contender("compressed-tensors", peer("peer_converter.py"), is_peer=True),
    Contender("safe_open and save_file", peer("peer_script.py"), is_peer=True),
)


def compare(model: Path, ratio: float, given: argparse.Namespace, kind: str) -> str:
    """The table of one ratio."""
    work, shares = model.parent, kind in ("xfs", "btrfs")
    at = Setting(model, ratio, work / "keep.json", work / "kept", work / "out", shares)
    measure.remove(at.out)
    _prune_once(at)
    kept = sum(path.stat().st_size for path in measure.files(at.kept))
    chosen = [one for one in CONTENDERS if given.peers or not one.is_peer]
    samples: dict[Contender, list[measure.Sample]] = {one: [] for one in chosen}
    for _ in range(given.runs):
        for one in chosen:
            measure.remove(at.out)
            for folder in (at.model, at.kept):
                (measure.chill if given.cold else measure.warm)(folder)
            samples[one].append(measure.run(one.command(at), None if one.syncs else at.out))
    measure.remove(at.out)
    measure.remove(at.kept)
    medians = {one: measure.median(runs) for one, runs in samples.items()}
    title = f"ratio {ratio}, {kept / 1e9:.2f} GB kept"
    return f"**{title}**\n\n{_rows(medians, samples)}\n"


def _prune_once(at: Setting) -> None:
    """Make the folder that `cp` copies, and the keep-lists that the peers follow."""
    words = shardsurgeon(2).command(replace(at, out=at.kept))
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    record = json.loads((at.kept / "calibration" / "reap_pruning_metadata.json").read_text())
    layers = {layer: facts["retained"] for layer, facts in record["layers"].items()}
    at.keep.write_text(json.dumps(layers))


def _rows(
    medians: dict[Contender, measure.Sample], samples: dict[Contender, list[measure.Sample]]
) -> str:
    peers = [median.wall for one, median in medians.items() if one.is_peer]
    rows = []
    for one, figures in medians.items():
        walls = [sample.wall for sample in samples[one]]
        rows.append(
            [
                one.name,
                f"{figures.wall:.2f}",
                f"{min(walls):.2f}-{max(walls):.2f}",
                f"{figures.cpu:.2f}",
                f"{figures.rss / 1e6:,.0f}",
                f"{figures.wall / medians[CP].wall:.2f}",
                f"{min(peers) / figures.wall:.1f}" if peers else "",
            ]
        )
    headings = ["", "wall s", "range", "CPU s", "peak MB", "wall ÷ cp", "× faster than best peer"]
    return measure.table(headings, rows)


def benchmark(given: argparse.Namespace, folder: Path, kind: str = "") -> None:
    """All tables of one file system."""
    size, shards = f"{given.size / 1e9}GB", str(given.shards)
    words = ["--layout", given.layout, "--size", size, "--shards", shards, "--fill"]
    model = measure.make_model(folder / "model", *words)
    cache = "cold" if given.cold else "warm"
    where = f"{given.layout}, {given.size / 1e9:g} GB, {cache} cache, {given.runs} runs"
    print(f"\n### {where}, load {os.getloadavg()[0]:.1f}\n", flush=True)
    for ratio in RATIOS:
        print(compare(model, ratio, given, kind), flush=True)
    shutil.rmtree(model)


def main() -> None:
    """The command line above."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--layout", choices=("int4", "stacked", "tiny"), default="int4")
    parser.add_argument("--size", type=parse_size, default=parse_size("8GB"))
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--cold", action="store_true", help="read from the disk, not from memory")
    parser.add_argument("--no-peers", dest="peers", action="store_false")
    parser.add_argument("--disks", default="", help="file systems to make on loop devices")
    parser.add_argument("--growth", type=Path, metavar="PNG", help="draw time against size")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=given.work) as name:
        folder = Path(name)
        if given.growth is not None:
            growth.draw(folder, given.growth, given.runs)
        elif given.disks:
            for kind in given.disks.split(","):
                print(f"\n## {kind}")
                with measure.disk(kind, 4 * given.size + (4 << 30), folder) as mounted:
                    benchmark(given, mounted, kind)
        else:
            benchmark(given, folder)


if __name__ == "__main__":
    main()
