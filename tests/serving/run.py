"""Prune checkpoints, serve them with vLLM, compare: `python -m tests.serving.run [family ...]`.

Prints a table (Markdown) and exits with status 1 if an answer is not as close as it must be.
See README.md beside this file.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from transformers.utils import logging

from tests.serving.cases import CASES, NOT_SERVED
from tests.serving.environment import default_folder, environment
from tests.serving.proof import PROMPTS, Distance, Result, prove

HEADER = (
    "family",
    "experts",
    "dtype",
    "settings",
    "Δ transformers, pruned",
    "Δ transformers, original masked",
    "Δ original unmasked (median)",
    "tolerance",
    "greedy equal",
    "",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    options = _parser().parse_args(arguments)
    engine = environment(options.venv)
    # The table is the output; transformers would draw a bar for every checkpoint.
    log: Any = logging
    log.set_verbosity_error()
    log.disable_progress_bar()
    _print_row(HEADER)
    _print_row(["---"] * len(HEADER))
    results = []
    with tempfile.TemporaryDirectory(prefix="shardsurgeon-serving-") as scratch:
        work = options.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        for family in options.family or CASES:
            result = prove(CASES[family], engine.python, work)
            _print_row(_cells(result))
            results.append(result)
            if options.json:
                _record(options.json, result, engine.versions)
    return 0 if all(result.passed for result in results) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.serving.run",
        description="Serve pruned checkpoints with vLLM's CPU build and compare its answers.",
    )
    parser.add_argument("family", nargs="*", choices=[*CASES, []], help="default: all")
    parser.add_argument(
        "--venv",
        type=Path,
        default=default_folder(),
        metavar="DIR",
        help="vLLM's environment; installed there if it is not (default: %(default)s)",
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the results there, family by family"
    )
    parser.add_argument(
        "--work", type=Path, metavar="DIR", help="keep checkpoints and server logs there"
    )
    return parser


def _cells(result: Result) -> list[str]:
    case = result.case
    bound = f"{case.tolerance:.0e}"
    if case.share < 1:
        bound += f" at {case.share:.0%} of places"
    equal = min(result.pruned.greedy_equal, result.masked.greedy_equal)
    return [
        case.family,
        "{} → {}".format(*result.experts),
        case.dtype,
        case.settings,
        _difference(result.pruned, case.share),
        _difference(result.masked, case.share),
        f"{result.unmasked.median:.1e}",
        bound,
        f"{equal} of {PROMPTS}",
        "passed" if result.passed else "FAILED",
    ]


def _difference(distance: Distance, share: float) -> str:
    if share == 1:
        return f"{distance.largest:.1e}"
    return f"{distance.at_share:.1e} (largest {distance.largest:.1e})"


def _print_row(cells: Iterable[str]) -> None:
    print("| " + " | ".join(cells) + " |", flush=True)


def _record(file: Path, result: Result, engine: dict[str, str]) -> None:
    """Write the result beside those of other families."""
    served: dict[str, Any] = {}
    if file.exists():
        served = json.loads(file.read_text(encoding="utf-8"))["served"]
    served[result.case.family] = asdict(result) | {
        "settings": result.case.settings,
        "passed": result.passed,
        "engine": engine,
        "reference": {name: metadata.version(name) for name in ("torch", "transformers")},
    }
    everything = {"served": dict(sorted(served.items())), "not_served": NOT_SERVED}
    text = json.dumps(everything, indent=2, ensure_ascii=False)
    file.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
