"""Mutation testing: would the tests notice if one small thing in the code were wrong?

    python tests/mutation/run.py --sample 500 --seed 0

Works on copies of the tree in a temporary folder. First every test file is run by itself and the
lines that it reaches are noted. Then each mutant of the sample is put into a copy, and the test
files that reach it are run until one test fails: those of its own package, then others, the
quickest first, as far as `--others` goes. Results are lines of JSON; a mutant that has one is not
run again, so that what was interrupted goes on. `--again` runs those that had survived.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tests.mutation.mutants import Mutant, mutants  # noqa: E402
from tests.mutation.trial import Copy, Job, run  # noqa: E402
from tests.support.loops import needs_torch  # noqa: E402

# What is changed, and the folder of its own tests.
OWN_TESTS = {
    "shardsurgeon/pruning/*.py": "tests/pruning",
    "shardsurgeon/execution/*.py": "tests/execution",
    "shardsurgeon/verification/*.py": "tests/verification",
    "shardsurgeon/storage/formats/safetensors.py": "tests/storage/formats",
    "shardsurgeon/storage/formats/index.py": "tests/storage/formats",
}
# Its tests need torch, and minutes.
LEFT_OUT = {"shardsurgeon/verification/architecture.py"}
# Where a mutant that its own tests let live may be noticed.
OTHER_TESTS = ["cli", "families", "operations", "quantization"]
# By the clock, for tests that take one second of the processor: what takes longer will not end.
TIMES_SLOWER, SECONDS_MORE = 8, 40.0


@dataclass(frozen=True)
class TestFile:
    """A test file: the seconds that it takes, and the lines that it reaches, by module."""

    path: str
    seconds: float
    lines: dict[str, frozenset[int]]

    def reaches(self, mutant: Mutant) -> bool:
        first, last = mutant.lines
        return not self.lines.get(mutant.path, frozenset()).isdisjoint(range(first, last + 1))


def main() -> None:
    """Run the sample and print what it comes to."""
    parser = argparse.ArgumentParser(description="Mutation testing of the modules that matter.")
    parser.add_argument("--sample", type=int, default=500, help="how many mutants; 0 takes all")
    parser.add_argument("--seed", type=int, default=0, help="which ones")
    parser.add_argument("--only", default="", help="of those, whose name contains this")
    parser.add_argument("--others", type=float, default=20, help="seconds of other tests each")
    parser.add_argument("--jobs", type=int, default=2, help="how many at once")
    parser.add_argument("--results", type=Path, default=Path("mutation.jsonl"))
    parser.add_argument("--again", action="store_true", help="run those again that had survived")
    parser.add_argument("--list", action="store_true", help="name the mutants, run none")
    options = parser.parse_args()
    sample = [one for one in sampled(options.sample, options.seed) if options.only in one.name]
    if options.list:
        print(*(one.name for one in sample), sep="\n")
        return
    known = results(options.results)
    if options.again:
        known = {name: one for name, one in known.items() if one["by"]}
    todo = [one for one in sample if one.name not in known]
    if todo:
        with tempfile.TemporaryDirectory(prefix="mutation-") as work:
            copies = [Copy(Path(work, str(number)), ROOT) for number in range(options.jobs)]
            tests = covered(copies, options.results.with_suffix(".lines.json"))
            run(jobs(todo, tests, options.others, options.results), copies)
    summarize(sample, results(options.results))


def sampled(size: int, seed: int) -> list[Mutant]:
    """The mutants of a sample: those with the smallest hashes, whatever code comes and goes."""
    sources = {name: (ROOT / name).read_bytes() for name in modules()}
    found = [one for name, source in sources.items() for one in mutants(name, source)]
    found.sort(key=lambda one: one.rank(seed))
    sound = (one for one in found if one.compiles(sources[one.path]))
    return list(islice(sound, size or None))


def modules() -> list[str]:
    """The modules that are changed."""
    paths = {path for pattern in OWN_TESTS for path in ROOT.glob(pattern)}
    return sorted({path.relative_to(ROOT).as_posix() for path in paths} - LEFT_OUT)


def own_tests(mutant: Mutant) -> str:
    """The folder of a mutant's own tests."""
    path = Path(mutant.path)
    return next(OWN_TESTS[pattern] for pattern in OWN_TESTS if path.match(pattern))


def covered(copies: list[Copy], notes: Path) -> list[TestFile]:
    """Run every test file by itself, without a mutant; all must pass.

    notes: where that is kept for the next time, under hashes of all that it depends on.
    """
    known = json.loads(notes.read_text("utf-8")) if notes.exists() else {}
    found: dict[str, dict[str, Any]] = {}

    def note(path: str, key: str, answer: dict[str, Any]) -> None:
        if answer["by"]:
            raise SystemExit(f"{path} fails without a mutant: {answer['by']}")
        found[path] = {"key": key, **answer}
        notes.write_text(json.dumps(known | found), encoding="utf-8")
        print(f"{answer['seconds']:5.1f} s  {path}", flush=True)

    def jobs() -> Iterator[Job]:
        folders = [*OWN_TESTS.values(), *(f"tests/{name}" for name in OTHER_TESTS)]
        files = {path for folder in folders for path in (ROOT / folder).rglob("test_*.py")}
        shared = _shared_digest(copies[0].root)
        for path in sorted(path for path in files if not needs_torch(path)):
            name = path.relative_to(ROOT).as_posix()
            key = hashlib.sha256(shared + (copies[0].root / name).read_bytes()).hexdigest()
            if known.get(name, {}).get("key") == key:
                found[name] = known[name]
            else:
                yield Job([name], 600, partial(note, name, key), traced=modules())

    run(jobs(), copies)
    return [TestFile(path, one["seconds"], _frozen(one["lines"])) for path, one in found.items()]


def _frozen(lines: dict[str, list[int]]) -> dict[str, frozenset[int]]:
    return {path: frozenset(numbers) for path, numbers in lines.items()}


def _shared_digest(root: Path) -> bytes:
    """A hash of all Python files that are no tests, and none of these."""
    found = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        if not path.name.startswith("test_") and path.parent.name != "mutation":
            found.update(path.read_bytes())
    return found.digest()


def jobs(
    todo: list[Mutant], tests: list[TestFile], most_of_others: float, path: Path
) -> Iterator[Job]:
    """A job for every mutant, whose result is written when it is done."""
    for number, mutant in enumerate(todo, start=1):
        own, others = chosen(mutant, tests, most_of_others)
        seconds = sum(one.seconds for one in (*own, *others))
        limit = TIMES_SLOWER * seconds + SECONDS_MORE
        done = partial(_write, path, mutant, len(own) + len(others), f"{number} of {len(todo)}")
        files = [one.path for one in (*own, *others)]
        if files:
            yield Job(files, limit, done, mutant)
        else:
            done({"by": "", "seconds": 0.0})


def chosen(
    mutant: Mutant, tests: list[TestFile], most_of_others: float
) -> tuple[list[TestFile], list[TestFile]]:
    """The test files that reach a mutant: of its own package, the module's first, and others,
    which take so many seconds at most.
    """
    reaching = [one for one in tests if one.reaches(mutant)]
    folder, stem = own_tests(mutant) + "/", Path(mutant.path).stem
    own = [one for one in reaching if one.path.startswith(folder)]
    own.sort(key=lambda one: (stem not in one.path, one.seconds))
    others: list[TestFile] = []
    for one in sorted(reaching, key=lambda one: one.seconds):
        if one not in own and sum(other.seconds for other in (*others, one)) <= most_of_others:
            others.append(one)
    return own, others


def _write(path: Path, mutant: Mutant, files: int, place: str, answer: dict[str, Any]) -> None:
    own = answer["by"].startswith((own_tests(mutant) + "/", "time", "crash"))
    result = {"name": mutant.name, "by": answer["by"], "own": own, "files": files}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(result, ensure_ascii=False) + "\n")
    outcome = "killed  " if answer["by"] else "SURVIVED"
    print(f"{place} {outcome} {answer['seconds']:5.1f} s  {mutant.name}", flush=True)


def results(path: Path) -> dict[str, dict[str, Any]]:
    """Name → the last result of every mutant that has one."""
    if not path.exists():
        return {}
    lines = map(json.loads, path.read_text("utf-8").splitlines())
    return {one["name"]: one for one in lines}


def summarize(sample: list[Mutant], known: dict[str, dict[str, Any]]) -> None:
    """Print what a sample came to, by package, and who survived."""
    counts: dict[str, Counter[str]] = {}
    survivors = []
    for mutant in sample:
        result = known[mutant.name]
        outcome = "survived" if not result["by"] else "own" if result["own"] else "others"
        counts.setdefault(own_tests(mutant), Counter())[outcome] += 1
        if outcome == "survived":
            survivors.append(mutant.name)
    for folder, outcomes in [*sorted(counts.items()), ("all", sum(counts.values(), Counter()))]:
        size, killed = outcomes.total(), outcomes.total() - outcomes["survived"]
        print(
            f"{folder}: {size} mutants, {killed} killed ({killed / size:.0%}), "
            f"{outcomes['own']} of them by their own tests; {outcomes['survived']} survived"
        )
    print(*sorted(survivors), sep="\n")


if __name__ == "__main__":
    main()
