"""What vLLM makes of folders, asked of the interpreter of the serving environment."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from tests.serving.cases import STAND_INS
from tests.serving.environment import default_folder, environment

HERE = Path(__file__).parent


@cache
def planned(ranks: int, folders: tuple[Path, ...]) -> dict[str, Any]:
    """What vLLM plans for each folder, by its name."""
    return {Path(line["folder"]).name: line for line in answers("specs.py", ranks, *folders)}


def answers(script: str, *arguments: object) -> Sequence[dict[str, Any]]:
    """The lines of JSON that a script of this folder prints in vLLM's environment."""
    named = os.environ.get("SHARDSURGEON_SERVING_VENV")
    engine = environment(Path(named) if named else default_folder())
    surroundings = {
        **{key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        "PYTHONPATH": str(STAND_INS),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "CRITICAL",
        "HF_HUB_OFFLINE": "1",
    }
    command = [str(engine.python), str(HERE / script), *map(str, arguments)]
    done = subprocess.run(command, env=surroundings, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
