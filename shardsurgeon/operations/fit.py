"""`fit`: how many experts fit which GPUs, and with how much context. Reads headers alone."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from os import PathLike

from shardsurgeon.checkpoint.anatomy import read_anatomy
from shardsurgeon.checkpoint.checkpoint import Checkpoint
from shardsurgeon.checkpoint.open import reopened
from shardsurgeon.operations.prune import plan
from shardsurgeon.pruning.fit import ASSUMED, Fit, MachineFit
from shardsurgeon.pruning.machines import FitRequest, usual_machines
from shardsurgeon.pruning.request import SelectionRequest
from shardsurgeon.reports import Report
from shardsurgeon.scores.files import read_scores
from shardsurgeon.scores.table import Scores
from shardsurgeon.storage.phases import phase


@dataclass(frozen=True, slots=True, repr=False)
class FitReport(Report):
    """Which counts of experts fit which machines.

    context, sequences, kv_dtype: asked for, as they are used; token_nbytes, state_nbytes: KV
    cache of one more token of a long sequence, and states of a sequence, on one GPU alone;
    sequence_nbytes: of one sequence of the context, there; usual: whether the machines are the
    usual ones; assumptions: the numbers that are no fact of the model.

    >>> report = shardsurgeon.fit("fixtures/kimi_k25", gpus="1x24GB,8x80GB", context=4096)
    >>> [(machine.machine, machine.kept) for machine in report.machines]
    [('1x24GB', 32), ('8x80GB', None)]
    >>> report.machines[1].problem
    '2 attention heads do not divide by 8 ranks'
    """

    name: str
    family: str
    num_experts: int
    context: int
    longest_context: int | None
    sequences: int
    kv_dtype: str
    token_nbytes: float
    state_nbytes: int
    sequence_nbytes: int
    expert_parallel: bool
    usual: bool
    machines: tuple[MachineFit, ...]
    assumptions: tuple[str, ...] = field(default=ASSUMED)

    @property
    def title(self) -> str:
        """`Kimi-K2.5: which of 384 experts per layer fit`."""
        return (
            f"{self.name}: how many of {self.num_experts} experts per layer fit, with "
            f"{self.sequences} sequences of {self.context:,} tokens"
        )


def fit(
    model: str | PathLike[str] | Checkpoint | None = None,
    request: FitRequest | None = None,
    *,
    scores: str | PathLike[str] | Scores | None = None,
    family: str | None = None,
) -> FitReport:
    """Which counts of experts fit which machines. Reads headers and JSON only.

    model, family: as of `inspect`; scores: a score file or a table: what each count drops. Raises
    UsageError for a context beyond the model's, FamilyError where the model's attention is unknown,
    ScoreError for scores that are not of the model.
    """
    request = request or FitRequest()
    checkpoint = reopened(model, family, follow_links=True)
    with phase("finding experts"):
        anatomy = read_anatomy(checkpoint)
        fitted = Fit(checkpoint, anatomy, request)
        machines = request.machines or usual_machines()
        found = tuple(
            fitted.on(machine, fitted.counts(request.tensor_parallel or machine.gpus))
            for machine in machines
        )
    if scores is not None:
        found = _scored(checkpoint, scores, found)
    alone = fitted.alone
    return FitReport(
        name=checkpoint.source.name,
        family=anatomy.family.name,
        num_experts=anatomy.num_experts,
        context=fitted.context,
        longest_context=alone.context,
        sequences=request.sequences,
        kv_dtype=alone.dtype,
        token_nbytes=alone.token_nbytes,
        state_nbytes=alone.state_nbytes,
        sequence_nbytes=alone.sequence_nbytes(fitted.context),
        expert_parallel=request.expert_parallel,
        usual=not request.machines,
        machines=found,
    )


def _scored(
    checkpoint: Checkpoint,
    scores: str | PathLike[str] | Scores,
    machines: tuple[MachineFit, ...],
) -> tuple[MachineFit, ...]:
    """The machines, each row with what its count drops of the saliency."""
    table = scores if isinstance(scores, Scores) else read_scores(scores)
    counts = {row.kept for machine in machines for row in machine.rows if row.ratio > 0}
    dropped = {}
    for count in sorted(counts):
        report = plan(checkpoint, table, SelectionRequest(keep=count)).report
        dropped[count] = report.saliency_dropped_mean, report.saliency_dropped_worst
    return tuple(
        replace(
            machine,
            rows=tuple(
                replace(row, saliency_dropped_mean=mean, saliency_dropped_worst=worst)
                for row in machine.rows
                for mean, worst in [dropped.get(row.kept, (0.0, 0.0))]
            ),
        )
        for machine in machines
    )
