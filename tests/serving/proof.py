"""One family, from an empty folder to a verdict.

Builds the checkpoint, prunes it with the real command, asks transformers (pruned; original with
the pruned experts masked; original as it is) and then vLLM the same questions, and compares.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.oracle.pruning import FIXTURES, Pruned, prune
from tests.serving import reference
from tests.serving.cases import STAND_INS, Case
from tests.serving.engine import Answer, serving

PROMPTS, PROMPT_TOKENS, NEW_TOKENS, VOCABULARY = 8, 24, 8, 512
RATIO = "0.5"
CLEARLY_DIFFERENT = 0.1


@dataclass(frozen=True)
class Distance:
    """How far two models' answers are apart: differences of natural log-probabilities.

    A place is a token of a prompt (the largest difference over the whole vocabulary) or a
    greedy token (its own), as long as both models have chosen the same tokens before.
    largest, median, at_share: over all places, and what the case's share of them keeps to.
    greedy_equal: prompts with the same continuation.
    """

    largest: float
    median: float
    at_share: float
    greedy_equal: int


@dataclass(frozen=True)
class Result:
    """vLLM's answers for the pruned checkpoint, against three models run by transformers."""

    case: Case
    experts: tuple[int, int]
    pruned: Distance
    masked: Distance
    unmasked: Distance

    @property
    def passed(self) -> bool:
        same = all(
            distance.at_share <= self.case.tolerance
            and (distance.greedy_equal == PROMPTS or not self.case.greedy)
            for distance in (self.pruned, self.masked)
        )
        # Or the equality above proves nothing.
        return same and self.unmasked.median > CLEARLY_DIFFERENT


def prove(case: Case, python: Path, work: Path) -> Result:
    """Prune and serve the family in the folder `work`/<family>, which is made anew."""
    pruned = pruned_checkpoint(case.family, work)
    asked = prompts()
    wanted = [
        reference.answers(folder, asked, NEW_TOKENS, retained)
        for folder, retained in (
            (pruned.folder, None),
            (pruned.source, pruned.retained),
            (pruned.source, None),
        )
    ]
    answers = served_answers(case, python, pruned.folder, pruned.folder.with_name("server.log"))
    distances = [distance(answers, one, case.share) for one in wanted]
    return Result(case, _experts(pruned.folder), *distances)


def pruned_checkpoint(family: str, work: Path) -> Pruned:
    """The family's checkpoint of serving size and its pruned copy, in `work`/<family>."""
    folder = (work / family).absolute()
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-m", "builders.serving", family, "--out", str(folder)]
    subprocess.run(command, cwd=FIXTURES, check=True)
    return prune(folder / family, folder / "pruned", RATIO)


def prompts() -> list[list[int]]:
    """Token ids, the same in every run."""
    generator = torch.Generator().manual_seed(7)
    asked: list[list[int]] = torch.randint(
        0, VOCABULARY, (PROMPTS, PROMPT_TOKENS), generator=generator
    ).tolist()
    return asked


def served_answers(case: Case, python: Path, folder: Path, log: Path) -> list[Answer]:
    """What vLLM says about the checkpoint in `folder`."""
    arguments = ["--dtype", case.dtype, *case.arguments]
    import_path = STAND_INS if case.stand_ins else None
    with serving(python, folder, arguments, import_path, log) as server:
        return [server.answer(prompt, NEW_TOKENS) for prompt in prompts()]


def distance(left: Sequence[Answer], right: Sequence[Answer], share: float) -> Distance:
    """How far the answers are apart, place by place."""
    places = torch.cat([_differences(*pair) for pair in zip(left, right, strict=True)])
    return Distance(
        largest=float(places.max()),
        median=float(places.median()),
        at_share=float(places.quantile(share)),
        greedy_equal=sum(a.tokens == b.tokens for a, b in zip(left, right, strict=True)),
    )


def _differences(left: Answer, right: Answer) -> torch.Tensor:
    same = [a == b for a, b in zip(left.tokens, right.tokens, strict=True)]
    together = same.index(False) if False in same else len(same)
    return torch.cat(
        [
            (left.prompt - right.prompt).abs().amax(dim=1),
            (left.chosen - right.chosen).abs()[:together],
        ]
    )


def _experts(folder: Path) -> tuple[int, int]:
    """The number of experts before and after, from what `apply` recorded."""
    file = folder / "calibration" / "reap_pruning_metadata.json"
    record = json.loads(file.read_text(encoding="utf-8"))
    return record["num_experts_before"], record["num_experts_after"]
