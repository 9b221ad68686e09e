"""The benchmark runs, and says what was measured on what."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

import shardsurgeon_kernels

RUN = Path(__file__).parent.parent / "bench" / "run.py"


def test_one_command_prints_the_tables() -> None:
    home = str(Path(shardsurgeon_kernels.__file__).parent.parent)
    paths = os.pathsep.join([home, os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(RUN), "--shape", "1024x2048", "--tokens", "2", "--rounds", "1"]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("| 1024 x 2048 | 2 |")]
    devices = 1 + torch.cuda.is_available()
    assert len(rows) == 2 * devices  # one projection, and four experts
    assert ("No GPU was found" in done.stdout) == (devices == 1)
