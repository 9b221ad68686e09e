"""The table of families, from the declarations, the fixtures and the test results.

    python -m tests.families.table             run the proofs, print the table
    python -m tests.families.table --write     and put it into shardsurgeon/families/README.md
    python -m tests.families.table --junit results.xml [--serving serving.json]

`--junit` takes the results of a run that was made with `pytest --junitxml`; `--serving` those of
tests/serving. A proof counts for a family only where its test passed in those results.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from shardsurgeon.checkpoint.anatomy import Anatomy, read_anatomy
from shardsurgeon.errors import FamilyError
from shardsurgeon.families.schema import all_families, family_for
from shardsurgeon.pruning.config_edits import quantization_name
from tests.families.specimens import builders, specimen

ROOT = Path(__file__).parents[2]
DOCUMENT = "shardsurgeon/families/README.md"
BEGIN, END = "<!-- families: begin -->", "<!-- families: end -->"
SUITES = ["tests/oracle", "tests/families"]

# Beginnings of test names → what a pass proves; the fixture's name stands in the test's id.
PROOFS = {
    "test_every_tensor_is_the_sources": "bytes",
    "test_a_pruned_model_is_the_original": "logits",
    "test_the_pruned_model_is_the_original": "logits",
    "test_a_softmax_that_is_not_renormalised": "logits",
    "test_the_text_model_of_a_pruned_wrapper": "text logits",
    "test_survivors_keep_their_router_logits": "router logits",
}
ORDER = ["bytes", "logits", "text logits", "router logits", "vLLM"]


def results(junit: Path) -> Iterator[tuple[str, str]]:
    """(fixture, proof) of every test that passed."""
    for case in ElementTree.parse(junit).iter("testcase"):
        if len(case.findall("failure") + case.findall("error") + case.findall("skipped")):
            continue
        name, _, parameter = case.get("name", "").partition("[")
        for beginning, proof in PROOFS.items():
            if name.startswith(beginning):
                # With several parameters the fixture is one of them.
                for word in re.split(r"[-\]]", parameter):
                    yield word, proof


def family_of(fixture: str) -> str:
    return family_for(specimen(fixture).config, fixture).name


def anatomy_of(fixture: str) -> Anatomy | None:
    try:
        return read_anatomy(specimen(fixture).checkpoint())
    except FamilyError:
        return None  # declared in order to be refused


def table(proofs: dict[str, set[str]]) -> str:
    """Markdown, one row per family."""
    fixtures = defaultdict(list)
    for fixture in builders():
        fixtures[family_of(fixture)].append(fixture)
    lines = [
        "| family | model types | layout | MTP | groups | quantizations | proven by |",
        "|---|---|---|---|---|---|---|",
    ]
    for family in all_families():
        anatomies = [a for a in map(anatomy_of, fixtures[family.name]) if a is not None]
        if family.refusal or not anatomies:
            reason = family.refusal or "no fixture"
            lines.append(
                f"| `{family.name}` | {_types(family.model_types)} | refused: {reason} |||||"
            )
            continue
        shown = [proof for proof in ORDER if proof in proofs[family.name]]
        # Of the three kinds of logits, the one that proves most.
        kinds = [proof for proof in shown if proof.endswith("logits")]
        shown = [proof for proof in shown if proof not in kinds[1:]]
        cells = [
            f"`{family.name}`",
            _types(family.model_types),
            " and ".join(sorted({anatomy.layout for anatomy in anatomies})),
            _mtp(anatomies),
            str(max(anatomy.n_group for anatomy in anatomies) or "") if _grouped(anatomies) else "",
            ", ".join(sorted(_quantizations(fixtures[family.name]))),
            ", ".join(shown),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _types(names: tuple[str, ...]) -> str:
    return ", ".join(names)


def _mtp(anatomies: list[Anatomy]) -> str:
    if any(anatomy.mtp_layers for anatomy in anatomies):
        return "with experts"
    return "dense" if any(anatomy.mtp_nbytes for anatomy in anatomies) else ""


def _grouped(anatomies: list[Anatomy]) -> bool:
    return any(anatomy.n_group > 1 for anatomy in anatomies)


def _quantizations(fixtures: list[str]) -> set[str]:
    return {quantization_name(specimen(name).config) or "none" for name in fixtures}


def run_proofs() -> Path:
    """Run the tests that prove families; their results as a JUnit file."""
    junit = Path(tempfile.mkdtemp()) / "results.xml"
    loop = ("--loop", "full", "-n", "2")
    command = [sys.executable, "-m", "pytest", "-q", *loop, f"--junitxml={junit}", *SUITES]
    if subprocess.run(command, cwd=ROOT).returncode:
        sys.exit("the proofs did not pass: there is no table to make")
    return junit


def main() -> None:
    """The command line above."""
    parser = argparse.ArgumentParser(description="Make the table of families.")
    parser.add_argument("--junit", type=Path, help="results of an earlier run")
    parser.add_argument("--serving", type=Path, help="results of tests/serving")
    parser.add_argument("--write", action="store_true", help=f"put the table into {DOCUMENT}")
    given = parser.parse_args()
    proofs: dict[str, set[str]] = defaultdict(set)
    known = builders()
    for fixture, proof in results(given.junit or run_proofs()):
        if fixture in known:
            proofs[family_of(fixture)].add(proof)
    if given.serving:
        for family, result in json.loads(given.serving.read_text())["served"].items():
            if result["passed"]:
                proofs[family].add("vLLM")
    made = table(proofs)
    if given.write:
        document = ROOT / DOCUMENT
        text = document.read_text(encoding="utf-8")
        head, rest = text.split(BEGIN)
        _, tail = rest.split(END)
        document.write_text(f"{head}{BEGIN}\n{made}\n{END}{tail}", encoding="utf-8")
    else:
        sys.stdout.write(f"{made}\n")


if __name__ == "__main__":
    main()
