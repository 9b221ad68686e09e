"""What an evaluation says of plans, and the command that measures those that it does not know."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from shardsurgeon.checkpoint.anatomy import Anatomy
from shardsurgeon.checkpoint.checkpoint import Checkpoint
from shardsurgeon.checkpoint.recognition import EVALUATION
from shardsurgeon.checkpoint.wrong_files import require_file
from shardsurgeon.errors import ScoreError
from shardsurgeon.operations.evaluation_report import (
    CandidateDamage,
    EvaluationReport,
    candidate_of,
    read_evaluation,
)
from shardsurgeon.pruning.keep_lists import KeepList, keep_sha256
from shardsurgeon.pruning.report import Measured, PlanReport
from shardsurgeon.pruning.request import Allocation, Rounding, SelectionRequest
from shardsurgeon.scores.table import Scores
from shardsurgeon.storage.files import sha256_of
from shardsurgeon.storage.open import address_of

AnyPath = str | os.PathLike[str]

_MOST_NAMED, _MOST_LETTERS = 8, 40


@dataclass(frozen=True, slots=True)
class Evaluation:
    """An evaluation that plans are looked up in.

    file: as the user named it; sha256: of what was read, "" of a pipe; command: measures the plans.
    """

    file: str
    sha256: str
    report: EvaluationReport = field(repr=False)
    command: Sequence[str]

    @classmethod
    def read(cls, file: AnyPath, command: Sequence[str]) -> Evaluation:
        """Raises ScoreError where the file is missing, or is no evaluation."""
        require_file(file, EVALUATION, ScoreError)
        sha256 = sha256_of(Path(file)) if os.path.isfile(file) and os.access(file, os.R_OK) else ""
        return cls(os.fspath(file), sha256, read_evaluation(file), tuple(command))

    @property
    def files(self) -> dict[Path, str]:
        """Its file, from the root → its SHA-256; none where it was read from a pipe."""
        return {Path(self.file).absolute(): self.sha256} if self.sha256 else {}

    def require_of(self, checkpoint: Checkpoint) -> None:
        """Raise ScoreError where another model was evaluated."""
        found, model = self.report, checkpoint.source.name
        if found.config_sha256 != checkpoint.config_sha256:
            problem = (
                f"is of {_short(found.model)}, whose config.json has sha256 "
                f"{found.config_sha256[:12]}…, that of {model} has {checkpoint.config_sha256[:12]}…"
            )
            raise ScoreError(self.file, problem, "evaluate this model, or leave it out")

    def told(self, plan: PlanReport, keep: KeepList, anatomy: Anatomy) -> PlanReport:
        """The report with what was measured of its keep-lists, or a note that nothing was."""
        found = candidate_of(self.report, keep_sha256(keep, main_layers(anatomy)))
        if found is not None:
            return replace(plan, measured=_measured(self.report, found))
        return replace(plan, notes=(*plan.notes, self._unknown()))

    def _unknown(self) -> str:
        names = [_short(each.name) for each in self.report.candidates[:_MOST_NAMED]]
        more = len(self.report.candidates) - len(names)
        named = ", ".join(names) + (f" and {more} more" if more else "")
        known = f"{self.file} measured {named} and no other prune"
        return f"{known}; `{shlex.join(self.command)}` measures what is missing"


def main_layers(anatomy: Anatomy) -> list[int]:
    """The layers whose keep-lists an evaluation runs."""
    return [layer.index for layer in anatomy.main_layers]


def measuring(
    model: AnyPath | Checkpoint | None,
    scores: AnyPath | Scores | None,
    requests: Sequence[SelectionRequest],
    family: str | None = None,
    out: str = "evaluation.json",
) -> tuple[str, ...]:
    """The command that measures what plans cost, as words.

    The arguments are those of the plans; requests: one, or several that differ in their ratio. DATA
    stands for what the user has to choose, PLAN for keep-lists to be saved first, where `evaluate`
    has no option that means the same, and SCORES for scores without a file.
    """
    first = requests[0]
    words = ["shardsurgeon", "evaluate"]
    counts = [f"{request.ratio:g}" for request in requests if request.ratio is not None]
    if _has_no_option(first):
        chosen = ["--plan", "PLAN"]
    elif first.plan_file is not None:
        chosen = ["--plan", os.fspath(first.plan_file)]
    else:
        words.append(_file_of(scores))
        chosen = ["--ratio", ",".join(counts)] if counts else ["--keep", str(first.keep)]
        chosen += ["--metric", first.metric] if first.metric is not None else []
        uniform = first.allocate is Allocation.UNIFORM
        chosen += [] if uniform else ["--allocate", str(first.allocate)]
    address = address_of(model.source) if isinstance(model, Checkpoint) else model
    words += ["--model", str(address)] if address is not None else []
    words += ["--family", family] if family is not None else []
    return (*words, *chosen, "--dataset", "DATA", "-o", out)


def _has_no_option(request: SelectionRequest) -> bool:
    """Whether something decides which experts stay that `evaluate` cannot be told."""
    return (
        request.target_size is not None
        or request.rounding not in (None, Rounding.FLOOR)
        or request.multiple_of is not None
        or request.preserve_super_experts
        or request.lists is not None
    )


def _file_of(scores: AnyPath | Scores | None) -> str:
    if isinstance(scores, Scores):
        return scores.origin if os.path.isfile(scores.origin) else "SCORES"
    return "SCORES" if scores is None else os.fspath(scores)


def _measured(report: EvaluationReport, found: CandidateDamage) -> Measured:
    damage = found.damage
    return Measured(
        candidate=found.name,
        dataset=report.dataset,
        tokens=report.predicted,
        perplexity_before=report.original.perplexity,
        perplexity=damage.perplexity,
        perplexity_ratio=found.perplexity_ratio,
        kl_mean=damage.kl_mean,
        kl_p99=damage.kl_p99,
        agreement=damage.agreement,
        worst_part=found.worst_part,
    )


def _short(name: str) -> str:
    return name if len(name) <= _MOST_LETTERS else f"{name[: _MOST_LETTERS - 1]}…"
