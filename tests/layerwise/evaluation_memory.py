"""Run as a program: the peak memory of an evaluation, and what was announced.

python -m tests.layerwise.evaluation_memory FOLDER CANDIDATES SAMPLES TOKENS DTYPE
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from shardsurgeon.layerwise import evaluate
from tests.families.specimens import fixture, written
from tests.layerwise.evaluating import evaluated, every_other
from tests.layerwise.streaming import token_ids


def with_vocabulary(folder: Path, size: int, hidden: int = 64) -> Path:
    """qwen3_moe with so many tokens, whose embeddings and head are drawn."""
    made = fixture("qwen3_moe")
    drawn = torch.randn(size, hidden, generator=torch.Generator().manual_seed(3)).bfloat16()
    tensors: dict[str, Any] = {**made.tensors}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert tensors[name].shape[1] == hidden
        tensors[name] = drawn
    return written(
        replace(made, config={**made.config, "vocab_size": size}, tensors=tensors), folder
    )


def main() -> None:
    """The command line above; prints JSON."""
    folder, candidates, samples, tokens, dtype = Path(sys.argv[1]), *sys.argv[2:]
    announced: list[int] = []
    words = evaluate.words

    def noted(schedule: Any, cost: Any, program: int) -> Any:
        announced.append(schedule.device_nbytes)
        announced.append(program)
        return words(schedule, cost, program)

    evaluate.words = noted
    keeps = [every_other(folder, 8, first=first) for first in range(int(candidates))]
    ids = token_ids((int(tokens),) * int(samples), vocabulary=50_000)
    with tempfile.TemporaryDirectory() as scratch:
        evaluated(folder, keeps, ids, Path(scratch), batch_size="auto", dtype=dtype)
    # Not `ru_maxrss`, which begins with what the parent had.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    peak = int(status["VmHWM"].split()[0]) << 10
    sys.stdout.write(json.dumps({"announced": announced, "peak": peak}) + "\n")


if __name__ == "__main__":
    main()
