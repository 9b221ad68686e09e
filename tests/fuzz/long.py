"""The readers under a coverage-guided fuzzer; prints a table: see README.md here.

    pip install atheris
    python tests/fuzz/long.py --executions 1000000
    python tests/fuzz/long.py --executions 20000 --only torch
    python tests/fuzz/long.py --minutes 20 --only header,index,config

Inputs that break a promise are kept in `--findings`, named by their target.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

MAX_NBYTES = 8192
MAX_MEMORY_MB = 4096
# Where the targets lead. Lines beyond their reach (files that vanish, 100 MB inputs) count too.
FUZZED = [
    *("storage/formats/" + name for name in (
        "safetensors.py", "strict_json.py", "index.py", "json_edit.py", "pickle_reader.py",
        "torch_file.py", "torch_objects.py", "torch_tensors.py", "zip_reader.py", "npz.py",
        "dtypes.py", "view.py", "gzip_lines.py", "columns.py", "tensor_table.py",
    )),
    "pruning/keep_list_files.py", "pruning/keep_lists.py",
    "scores/files.py", "scores/shapes.py", "scores/table.py",
    "checkpoint/provenance.py", "execution/journal.py", "storage/hub/listing.py",
    "checkpoint/config.py", "checkpoint/anatomy.py", "checkpoint/census.py",
    "checkpoint/quantization_names.py",
    "families/schema.py", "families/templates.py",
]  # fmt: skip
# What in these modules writes, or runs when they are imported.
NOT_READING = re.compile(
    r"_Editor|_removals|_check_collisions|build_header|tensor_nbytes|write_plan|_fields"
    r"|_finite|_json$|Journal|require_same|_difference|_line|_run_as_json|_eight_bit_floats"
    r"|_powers_of_two|_string.|_number.|_bytes.|_constant|write_scores|score_file|_torch_file"
    r"|ManifestWriter|_npz|_safetensors|_flat|_listed|_small_values|_suffix|_tree|is_torch_file"
    r"|score_output|_is_score_file|check_samples|check_score_file_name|fetch_listing|HubHeaders"
)


@dataclass
class Result:
    """What fuzzing one target came to; edges: branches of the bytecode that inputs took."""

    name: str
    executions: int = 0
    edges: int = 0
    corpus: int = 0
    seconds: float = 0.0
    lines: int = 0
    findings: list[str] = field(default_factory=list)

    def line(self) -> str:
        """A row of markdown."""
        figures = f"{self.executions:,} | {self.edges:,} | {self.lines:,} | {self.corpus:,}"
        figures += f" | {self.seconds:.0f}"
        return f"| {self.name} | {figures} | {len(self.findings)} |"


def fuzz_here(name: str, arguments: list[str]) -> None:
    """Fuzz one target in this process, which ends with it."""
    import atheris  # type: ignore[import-untyped]

    with atheris.instrument_imports(include=["shardsurgeon"]):
        from tests.fuzz.guard import Guard
        from tests.fuzz.targets import TARGETS

    target = next(one for one in TARGETS if one.name == name)
    guard = Guard(target.run, Path(tempfile.mkdtemp(dir=arguments.pop())))
    atheris.Setup([name, *arguments], guard)
    atheris.Fuzz()


def fuzz(
    name: str, executions: int, minutes: float, work: Path, findings: Path, seed: int
) -> Result:
    """Fuzz a target in processes of its own, a new one after each finding.

    minutes: how long, whatever the number of executions; 0 for as long as these take.
    """
    corpus = prepare(name, work)
    result = Result(name)
    begun = time.monotonic()
    while len(result.findings) < 5:
        left = 60 * minutes - (time.monotonic() - begun)
        if left < 1 if minutes else result.executions >= executions:
            break
        options = [
            f"-max_total_time={left:.0f}" if minutes else f"-runs={executions - result.executions}",
            f"-max_len={max(MAX_NBYTES, *(path.stat().st_size for path in corpus.iterdir()))}",
            *([f"-dict={words}"] if (words := work / f"{name}.dict").stat().st_size else []),
            f"-artifact_prefix={findings / name}-",
            f"-seed={seed + len(result.findings)}",
            f"-rss_limit_mb={MAX_MEMORY_MB}",
            "-timeout=30",
            "-print_final_stats=1",
            str(corpus),
        ]
        done = subprocess.run(
            [sys.executable, __file__, "--here", name, *options, str(work)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        executed = re.findall(r"number_of_executed_units: (\d+)", done.stderr)
        result.executions += int(executed[-1]) if executed else 0
        result.edges = max([result.edges, *map(int, re.findall(r"cov: (\d+)", done.stderr))])
        kept = re.findall(r"Test unit written to (\S+)", done.stderr)
        if kept:
            result.findings.append(f"{kept[-1]}: {problem(done.stdout + done.stderr)}")
        elif done.returncode or not executed:
            raise SystemExit(done.stderr[-4000:])
    result.corpus = len(list(corpus.iterdir()))
    result.seconds = time.monotonic() - begun
    done = subprocess.run(
        [sys.executable, __file__, "--lines", name, str(work)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    result.lines = int(done.stdout) if done.stdout else 0
    return result


def prepare(name: str, work: Path) -> Path:
    """Write a target's seeds and words; the folder of the seeds."""
    from tests.fuzz.targets import TARGETS

    target = next(one for one in TARGETS if one.name == name)
    corpus = work / name
    corpus.mkdir(exist_ok=True)
    for number, seed in enumerate(target.seeds()):
        (corpus / f"seed-{number}").write_bytes(seed)
    words = ("".join(f"\\x{byte:02x}" for byte in word) for word in target.words)
    Path(f"{corpus}.dict").write_text("".join(f'"{word}"\n' for word in words))
    return corpus


def problem(said: str) -> str:
    """The exception that ended a process, as its last lines tell it."""
    lines = [line for line in said.splitlines() if re.match(r"\w+(Error|Exception)\b", line)]
    return lines[-1] if lines else "timeout or memory"


def lines_reached(work: Path, name: str = "") -> tuple[int, int]:
    """Lines of the fuzzed modules that the corpora reach, and how many there are.

    name: the target whose corpus is meant, "" for all of them.
    """
    from tests.fuzz.targets import TARGETS

    wanted = {str(ROOT / "shardsurgeon" / file) for file in FUZZED}
    reached: set[tuple[str, int]] = set()

    def trace(frame: FrameType, event: str, argument: object) -> object:
        file = frame.f_code.co_filename
        if file not in wanted:
            return None
        reached.add((file, frame.f_lineno))
        return trace

    scratch = Path(tempfile.mkdtemp(dir=work))
    sys.settrace(trace)  # type: ignore[arg-type]
    try:
        for target in (one for one in TARGETS if name in ("", one.name)):
            for path in (work / target.name).glob("*"):
                target.run(path.read_bytes(), scratch)
    finally:
        sys.settrace(None)
    there = set().union(*(lines_of(Path(file)) for file in wanted))
    return len(reached & there), len(there)


def lines_of(path: Path) -> set[tuple[str, int]]:
    """The lines of a file's reading functions; those of modules and classes run anyway."""
    found: set[tuple[str, int]] = set()
    waiting = [compile(path.read_text(encoding="utf-8"), str(path), "exec")]
    while waiting:
        code = waiting.pop()
        if code.co_flags & 0x2 and not NOT_READING.match(code.co_qualname):  # a function
            lines = {line for _, _, line in code.co_lines() if line}
            found |= {(str(path), line) for line in lines - {code.co_firstlineno}}
        waiting += [inner for inner in code.co_consts if isinstance(inner, CodeType)]
    return found


def main() -> int:
    from tests.fuzz.targets import TARGETS

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--executions", type=int, default=1_000_000, help="over all targets")
    parser.add_argument("--minutes", type=float, default=0, help="each target so long instead")
    parser.add_argument(
        "--only", default="", help="targets whose names begin with one of these, by commas"
    )
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--findings", type=Path, default=Path("findings"))
    parser.add_argument("--corpus", type=Path, help="keep what was found to be worth a try here")
    options = parser.parse_args()
    names = [one.name for one in TARGETS if one.name.startswith(tuple(options.only.split(",")))]
    options.findings.mkdir(exist_ok=True, parents=True)
    with tempfile.TemporaryDirectory() as folder:
        work = options.corpus or Path(folder)
        work.mkdir(exist_ok=True, parents=True)
        share = -(-options.executions // len(names))
        print("| target | executions | edges | lines | corpus | seconds | findings |")
        print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |", flush=True)
        results = []
        with ThreadPoolExecutor(options.jobs) as pool:
            for result in pool.map(
                lambda name: fuzz(
                    name, share, options.minutes, work, options.findings, options.seed
                ),
                names,
            ):
                results.append(result)
                print(result.line(), flush=True)
        findings = [finding for result in results for finding in result.findings]
        print(f"\n{sum(result.executions for result in results):,} executions")
        if not findings and len(names) == len(TARGETS):
            reached, there = lines_reached(work)
            print(f"{reached:,} of {there:,} lines ({reached / there:.0%}) of the readers reached")
    for finding in findings:
        print(finding)
    return 1 if findings else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--here"]:
        fuzz_here(sys.argv[2], sys.argv[3:])
    if sys.argv[1:2] == ["--lines"]:
        print(lines_reached(Path(sys.argv[3]), sys.argv[2])[0])
        sys.exit()
    sys.exit(main())
