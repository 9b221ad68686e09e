"""Planning, and the check of a result, beside the time that `json` needs for the same headers.

    sudo python tests/bench/planning.py WORK            prints the table of README.md
    python tests/bench/planning.py WORK --no-check      without root: planning alone

WORK: a folder for 100 MB, and for 10 GB where sharing does not work. The models are sparse
Kimi-K2.5s of 8, 30 and 61 layers, whose tensors lie in the shards as the safetensors library writes
them. They lie on a btrfs that compresses, in a loop device: what the check reads is the result of a
real `apply --no-verify`, and there its zeros take next to no space. Each measurement is a process
of its own, beside which another parses the headers; the two alternate, so that a machine whose
speed drifts drifts for both. In process, the clock runs when everything is imported. Ends with 1
where a median of the pairs, or a peak of memory, is more than is promised.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import measure
from measure import Sample

ROOT = Path(__file__).parents[2]
LAYERS = (8, 30, 61)
LAYERS_PER_SHARD = 61 / 64
MOST_TIMES, MOST_RSS = 2.5, 160e6
DISK_NBYTES = 400 << 30

# Prints the seconds and the peak memory of what a process did; `begun` is when it began.
TOLD = """
wall = time.perf_counter() - begun
print(json.dumps([wall, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024]))
"""
KEPT = "kept = [json.loads(header) for header in headers]"
PARSE = f"""
import json, resource, sys, time
headers = []
for path in sys.argv[1:]:
    with open(path, "rb") as file:
        headers.append(file.read(int.from_bytes(file.read(8), "little")))
begun = time.perf_counter()
{KEPT}
{TOLD}"""
# What is kept Python looks through for cycles, again and again; here nothing is.
PARSE_AND_DROP = PARSE.replace(KEPT, "for header in headers:\n    json.loads(header)")
# In its own words what a command line would do: the whole process is measured.
PARSE_ALL = """
import json, sys
for path in sys.argv[1:]:
    with open(path, "rb") as file:
        json.loads(file.read(int.from_bytes(file.read(8), "little")))
"""
IMPORT = """
import contextlib, importlib, json, resource, sys, time
for name in json.loads(open(sys.argv[1]).read()):
    with contextlib.suppress(ImportError):
        importlib.import_module(name)
"""
PLAN = """
import json, resource, sys, time, shardsurgeon
model, ratio, out = sys.argv[2:]
begun = time.perf_counter()
pruning = shardsurgeon.plan(model, model + "/scores.json", ratio=float(ratio), out=out)
report = pruning.report
"""
# What `apply` calls at its end, with the source opened anew.
CHECK = """
import json, resource, sys, time
from shardsurgeon.checkpoint.open import open_model
from shardsurgeon.operations.verify import SAMPLED_NBYTES, SAMPLED_TENSORS
from shardsurgeon.verification.verify import verify_checkpoint
model, out = sys.argv[2:]
begun = time.perf_counter()
source = open_model(model, None)
report = verify_checkpoint(source, out, sample=SAMPLED_TENSORS, sample_nbytes=SAMPLED_NBYTES)
assert report.holds, report.differences
"""
LIST = "\nprint(json.dumps(sorted(set(sys.modules) - {'__main__'})))"


@dataclass(frozen=True)
class Row:
    """What was measured beside what. name, beside: as the table shows them; ours, theirs: by turns;
    promises: whether the command fails where it is more than is promised."""

    name: str
    beside: str
    ours: Sequence[Sample]
    theirs: Sequence[Sample]
    promises: bool = True

    @property
    def times(self) -> float:
        """The median of our time by theirs, pair by pair."""
        pairs = zip(self.ours, self.theirs, strict=True)
        return statistics.median(our.wall / their.wall for our, their in pairs)

    @property
    def peak(self) -> float:
        """The most memory of any run, in bytes."""
        return max(sample.rss for sample in self.ours)

    def cells(self, tensors: int) -> list[str]:
        """The row of the table."""
        walls = [sample.wall for sample in self.ours]
        theirs = measure.median(self.theirs)
        return [
            self.name,
            self.beside,
            f"{tensors:,}",
            f"{statistics.median(walls):.3f}",
            f"{min(walls):.3f}-{max(walls):.3f}",
            f"{theirs.wall:.3f}",
            f"{self.times:.2f}",
            f"{self.peak / 1e6:,.0f}",
        ]

    def missed(self, tensors: int) -> list[str]:
        """What was promised and is not so."""
        found: list[str] = []
        if not self.promises:
            return found
        if self.times > MOST_TIMES:
            found.append(f"{self.times:.2f} times {self.beside}, promised {MOST_TIMES}")
        if self.peak > MOST_RSS:
            found.append(f"peak {self.peak / 1e6:,.0f} MB, promised {MOST_RSS / 1e6:,.0f}")
        return [f"{self.name}, {tensors:,} tensors: {problem}" for problem in found]


def in_process(code: str, *words: str) -> Callable[[], Sample]:
    """Code that tells its own time and memory."""

    def once() -> Sample:
        sample, (wall, rss) = measure.told([sys.executable, "-c", code, *words])
        return Sample(wall, sample.cpu, rss)

    return once


def by_turns(
    name: str, beside: str, ours: Callable[[], Sample], theirs: Callable[[], Sample], runs: int
) -> Row:
    """A row of so many pairs."""
    pairs = [(theirs(), ours()) for _ in range(runs)]
    return Row(name, beside, [our for _, our in pairs], [their for their, _ in pairs])


def imported(code: str, folder: Path, *words: str) -> str:
    """Code that first imports what it needs; which that is, is seen by running it once.

    The list lies in `folder`, and is the code's first argument.
    """
    nothing = folder / "nothing.json"
    nothing.write_text("[]")
    _, modules = measure.told([sys.executable, "-c", code + LIST, str(nothing), *words])
    (folder / "modules.json").write_text(json.dumps(modules))
    return IMPORT + code + TOLD


def planning(model: Path, ratio: float, runs: int) -> list[Row]:
    """The rows of planning."""
    folder, out, shards = model.parent, str(model.parent / "out"), shards_of(model)
    words = [str(model), str(ratio), out]
    code = imported(PLAN, folder, *words)
    ours = in_process(code, str(folder / "modules.json"), *words)
    command = [sys.executable, "-m", "shardsurgeon", "plan", str(model / "scores.json")]
    command += ["--model", str(model), "--ratio", str(ratio)]
    parse = [sys.executable, "-c", PARSE_ALL, *shards]
    return [
        by_turns("planning, in process", "json.loads", ours, in_process(PARSE, *shards), runs),
        dropping("planning, in process", ours, shards, runs),
        by_turns(
            "`plan`, the command",
            "a process that parses",
            lambda: measure.run(command),
            lambda: measure.run(parse),
            runs,
        ),
    ]


def dropping(name: str, ours: Callable[[], Sample], shards: list[str], runs: int) -> Row:
    """A row beside `json.loads` whose results nobody keeps, of which nothing is promised."""
    theirs = in_process(PARSE_AND_DROP, *shards)
    return replace(by_turns(name, "json.loads, nothing kept", ours, theirs, runs), promises=False)


def checking(model: Path, ratio: float, runs: int) -> list[Row]:
    """The rows of the check at the end of `apply`."""
    folder, out = model.parent, model.parent / "out"
    command = [sys.executable, "-m", "shardsurgeon", "apply", str(model / "scores.json")]
    command += ["--model", str(model), "--ratio", str(ratio), "--no-verify", "-o", str(out)]
    measure.run(command)
    code = imported(CHECK, folder, str(model), str(out))
    ours = in_process(code, str(folder / "modules.json"), str(model), str(out))
    both = [*shards_of(model), *shards_of(out)]
    rows = [
        by_turns(
            "checking, in process",
            "json.loads of both models",
            ours,
            in_process(PARSE, *both),
            runs,
        ),
        dropping("checking, in process", ours, both, runs),
    ]
    measure.remove(out)
    return rows


def shards_of(folder: Path) -> list[str]:
    """The paths of a model's shards."""
    return [str(path) for path in sorted(folder.glob("*.safetensors"))]


def tensors_of(model: Path) -> int:
    """How many tensors a model has, by its index."""
    return len(json.loads((model / "model.safetensors.index.json").read_text())["weight_map"])


@contextmanager
def place(folder: Path, check: bool) -> Iterator[Path]:
    """Where the models lie."""
    if not check:
        yield folder
        return
    with measure.disk("btrfs", DISK_NBYTES, folder, "compress=zstd:1") as mounted:
        yield mounted


def rows_of(folder: Path, layers: int, given: argparse.Namespace) -> list[tuple[Row, int]]:
    """The rows of a model of so many layers, and its number of tensors."""
    shards = max(round(layers / LAYERS_PER_SHARD), 1)
    words = ["--by-name", "--layers", str(layers), "--shards", str(shards)]
    model = measure.make_model(folder / "model", *words)
    tensors = tensors_of(model)
    rows = planning(model, given.ratio, given.runs)
    rows += checking(model, given.ratio, given.runs) if given.check else []
    measure.remove(model)
    return [(row, tensors) for row in rows]


def main() -> int:
    """The command line above."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--ratio", type=float, default=0.65)
    parser.add_argument("--layers", type=int, nargs="+", default=LAYERS, metavar="N")
    parser.add_argument("--no-check", dest="check", action="store_false")
    parser.add_argument(
        "--in-process", action="store_true", help="promise nothing of the whole command"
    )
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    os.environ["PYTHONPATH"] = str(ROOT)
    print(f"load {os.getloadavg()[0]:.1f}, ratio {given.ratio}, {given.runs} pairs\n", flush=True)
    with tempfile.TemporaryDirectory(dir=given.work) as name, place(Path(name), given.check) as at:
        measured = [found for layers in given.layers for found in rows_of(at, layers, given)]
    headings = [
        "",
        "beside",
        "tensors",
        "s",
        "range",
        "json s",
        "÷ json, median of pairs",
        "peak MB",
    ]
    print(measure.table(headings, [row.cells(tensors) for row, tensors in measured]))
    judged = [found for found in measured if not given.in_process or "in process" in found[0].name]
    missed = [problem for row, tensors in judged for problem in row.missed(tensors)]
    print("".join(f"\nmissed: {problem}" for problem in missed))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
