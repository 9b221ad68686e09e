"""What a view of a trillion-parameter model costs: to make, beside `plan`, to keep, and to open.

    python tests/bench/views.py WORK            prints the tables of README.md

WORK: a folder for 60 MB. The model is a sparse Kimi-K2.5, 595 GB of it holes; plans and views
alternate, so that a machine whose speed drifts drifts for both, and the tables show medians. Ends
with 1 where a folder, or opening it, takes more than is promised.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import sys
import tempfile
from pathlib import Path

import measure
from measure import Sample

ROOT = Path(__file__).parents[2]
RATIOS = (0.25, 0.5, 0.65)
MOST_NBYTES, MOST_SECONDS, MOST_RSS = 30e6, 2.0, 200e6
OPEN = "import sys, shardsurgeon; shardsurgeon.open_view(sys.argv[1], framework='np')"


def command(*words: str) -> list[str]:
    """Our own command."""
    return [sys.executable, "-m", "shardsurgeon", *words]


def made(model: Path, ratio: float, out: Path) -> Sample:
    """Make a view; `out` is new each time, as it is for a user."""
    measure.remove(out)
    words = ["apply", str(model / "scores.json"), "--model", str(model), "--ratio", str(ratio)]
    return measure.run(command(*words, "--view", "-o", str(out)))


def planned(model: Path, ratio: float) -> Sample:
    """Plan the same."""
    words = ["plan", str(model / "scores.json"), "--model", str(model), "--ratio", str(ratio)]
    return measure.run(command(*words))


def pairs(model: Path, out: Path, number: int) -> str:
    """The table of time and memory of `plan` and `apply --view`."""
    samples: dict[str, list[Sample]] = {"`plan`": [], "`apply --view`": []}
    for _ in range(number):
        samples["`plan`"].append(planned(model, RATIOS[-1]))
        samples["`apply --view`"].append(made(model, RATIOS[-1], out))
    rows = []
    for name, runs in samples.items():
        middle, walls = measure.median(runs), [run.wall for run in runs]
        spread = f"{min(walls):.2f}-{max(walls):.2f}"
        peak = f"{middle.rss / 1e6:,.0f}"
        rows.append([name, f"{middle.wall:.2f}", spread, f"{middle.cpu:.2f}", peak])
    return measure.table(["", "wall s", "range", "CPU s", "peak MB"], rows)


def sizes(model: Path, out: Path, number: int) -> tuple[str, bool]:
    """The table of what views take, and whether all is as promised."""
    rows, holds = [], True
    for ratio in RATIOS:
        made(model, ratio, out)
        manifest = out / "shardsurgeon_view.jsonl.gz"
        head = json.loads(gzip.decompress(manifest.read_bytes()).partition(b"\n")[0])
        folder = sum(path.stat().st_size for path in measure.files(out))
        opened = measure.median(
            [measure.run([sys.executable, "-c", OPEN, str(out)]) for _ in range(number)]
        )
        seen = measure.median([measure.run(command("inspect", str(out))) for _ in range(number)])
        holds &= folder < MOST_NBYTES and opened.rss < MOST_RSS and opened.wall < MOST_SECONDS
        figures = [head["tensors"], manifest.stat().st_size / 1e6, folder / 1e6]
        row = [f"{ratio}", f"{figures[0]:,}", f"{figures[1]:.2f}", f"{figures[2]:.1f}"]
        for sample in (opened, seen):
            row += [f"{sample.wall:.2f}", f"{sample.cpu:.2f}", f"{sample.rss / 1e6:,.0f}"]
        rows.append(row)
    headings = [
        "ratio",
        "tensors",
        "manifest MB",
        "folder MB",
        "opened: wall s",
        "CPU s",
        "peak MB",
    ]
    return measure.table([*headings, "`inspect`: wall s", "CPU s", "peak MB"], rows), holds


def main() -> int:
    """The command line above."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--runs", type=int, default=5)
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    os.environ["PYTHONPATH"] = str(ROOT)
    with tempfile.TemporaryDirectory(dir=given.work) as name:
        model, out = measure.make_model(Path(name) / "model"), Path(name) / "view"
        print(f"load {os.getloadavg()[0]:.1f}\n\n{pairs(model, out, given.runs)}\n", flush=True)
        table, holds = sizes(model, out, given.runs)
        print(table)
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
