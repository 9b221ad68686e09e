"""The faults, many times over, on a mid-size checkpoint; prints the table of README.md here.

python tests/faults/long.py --kills 200
python tests/faults/long.py --kills 20 --only EIO
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.faults.bench import StreamBench
from tests.faults.catalogue import CATALOGUE, Entry, Unavailable
from tests.faults.network import BENCHES
from tests.faults.odd_files import ODD_FILES
from tests.faults.places import PLACES, SmallBench
from tests.faults.streams import SENDINGS, TERMINALS
from tests.faults.trial import Bench, Ended, Lost


class Row:
    """What the tries of one fault came to."""

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self.tries = 0
        self.problem = ""
        self.seen: dict[str, int] = {}
        self.unavailable = ""

    def run(self, bench: Bench, tries: int, numbers: random.Random) -> None:
        """Stops at the first try that loses something, which is a defect to be looked at."""
        try:
            for ended in self.entry.attempt(bench, tries, numbers):
                self.tries += 1
                line = sight(ended, bench)
                self.seen[line] = self.seen.get(line, 0) + 1
        except Unavailable as reason:
            self.unavailable = str(reason)
        except Lost as lost:
            self.tries += 1
            self.problem = str(lost)

    def line(self) -> str:
        """A row of markdown; the sight is the most frequent one that says something."""
        if self.unavailable:
            return f"| {self.entry.name} | 0 | | not tried: {self.unavailable} |"
        told = {line: count for line, count in self.seen.items() if "`" in line}
        seen = told or self.seen
        sights = max(seen, key=seen.__getitem__, default="")
        return f"| {self.entry.name} | {self.tries} | {int(bool(self.problem))} | {sights} |"


def sight(ended: Ended, bench: Bench) -> str:
    """What the user sees: the line without this machine's paths, and the status."""
    if ended.status == 0:
        return "nothing: the run finishes"
    if not ended.stderr:
        return f"status {ended.status}"
    line = ended.stderr.strip().removeprefix("shardsurgeon: ")
    for folder, name in ((bench.place, ""), (bench.model, "model"), (bench.place.parent, "")):
        line = line.replace(f"{folder}/", f"{name}/" if name else "").replace(str(folder), name)
    return f"`{line}` ({ended.status})"


def try_out(entry: Entry, bench: Bench, options: argparse.Namespace) -> Row:
    """One row, printed as soon as it is there."""
    tries = max(1, round(entry.share * options.kills / 200))
    row = Row(entry)
    row.run(bench, tries, random.Random(f"{options.seed} {entry.name}"))
    bench.clear()
    print(row.line(), flush=True)
    if options.verbose:
        for line, count in sorted(row.seen.items()):
            print(f"    {count} × {line}", file=sys.stderr)
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--only", default="", help="faults whose name contains this")
    parser.add_argument("--hidden", type=int, default=768, help="768: 173 MB of tensors")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--verbose", action="store_true", help="every sight of every fault")
    options = parser.parse_args()
    begun = time.monotonic()
    rows: list[Row] = []
    print("| fault | tries | lost | what the user sees (status) |", flush=True)
    print("| --- | ---: | ---: | --- |")
    local = (Bench, [*CATALOGUE, *ODD_FILES])
    small = (SmallBench, [*TERMINALS, *PLACES])
    for make_bench, catalogue in [local, small, *BENCHES, (StreamBench, SENDINGS)]:
        entries = [entry for entry in catalogue if options.only.lower() in entry.name.lower()]
        if entries:
            with tempfile.TemporaryDirectory() as folder:
                bench = make_bench(Path(folder), options.hidden, 2 * options.hidden // 3)
                rows += [try_out(entry, bench, options) for entry in entries]
                bench.close()
    lost = [row for row in rows if row.problem]
    for row in lost:
        print(f"\n{row.entry.name}: {row.problem}", file=sys.stderr)
    tries = sum(row.tries for row in rows)
    print(f"\n{tries} tries, {len(lost)} lost, {time.monotonic() - begun:.0f} s")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
