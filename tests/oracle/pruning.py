"""Prune a checkpoint by the real command, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

FIXTURES = Path(__file__).parents[2] / "fixtures"


@dataclass(frozen=True)
class Pruned:
    """A fixture, its pruned copy, and which experts each layer kept."""

    source: Path
    folder: Path
    retained: dict[int, list[int]]


def prune(source: Path, out: Path, ratio: str) -> Pruned:
    """Run `shardsurgeon apply` in a process of its own and read what it kept."""
    arguments = [
        str(source / "scores.pt"),
        "--model",
        str(source),
        "--ratio",
        ratio,
        "-o",
        str(out),
    ]
    command = [sys.executable, "-m", "shardsurgeon", "apply", *arguments]
    done = subprocess.run(
        command, cwd=FIXTURES.parent, capture_output=True, text=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    metadata = json.loads((out / "calibration" / "reap_pruning_metadata.json").read_text())
    retained = {int(layer): entry["retained"] for layer, entry in metadata["layers"].items()}
    return Pruned(source, out, retained)
