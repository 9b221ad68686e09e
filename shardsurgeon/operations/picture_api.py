"""Pages and pictures, for notebooks and pipelines."""

from __future__ import annotations

from shardsurgeon.operations import plots
from shardsurgeon.operations.page import PageReport, report_page
from shardsurgeon.operations.python_calls import AnyPath, KvDtypeName, as_text, public
from shardsurgeon.pruning.machines import SEQUENCES, FitRequest, parse_machines

plot_scores = public(plots.plot_scores)


@public
def report(
    place: AnyPath,
    out: AnyPath,
    *,
    scores: AnyPath | None = None,
    evaluation: AnyPath | None = None,
    probe: AnyPath | None = None,
    gpus: str | None = None,
    context: int | None = None,
    sequences: int = SEQUENCES,
    kv_dtype: KvDtypeName = "auto",
    tensor_parallel: int | None = None,
    expert_parallel: bool = False,
    model: AnyPath | None = None,
    family: AnyPath | None = None,
    force: bool = False,
) -> PageReport:
    """Write one page about a plan, or a pruned folder, that can be sent.

    place: a file that `write_plan` saved, or a folder that `apply` wrote; out: the .html file.
    scores: what the plan was made from, by default what a folder keeps; evaluation: what was
    measured of the unpruned model's prunes; probe: what was found of the pruned model's answers.
    gpus: machines that the page says the room of, such as "8x80GB"; context, sequences, kv_dtype,
    tensor_parallel, expert_parallel: how it is served there, as for `fit`. model: that of a plan,
    which gives sizes; family: as for `plan`. force: replace another report.

    Raises KeepListError, CheckpointError, ScoreError and UsageError for a file that is missing,
    broken, or about another model; OutputError where `out` holds something else.

    >>> plan = shardsurgeon.plan("fixtures/kimi_k25", "fixtures/kimi_k25/scores.pt", ratio=0.65)
    >>> plan.write_plan("keep.json")
    True
    >>> shardsurgeon.report("keep.json", "report.html", scores="fixtures/kimi_k25/scores.pt")
    kimi_k25: 32 experts in 3 layers -> report.html
    """
    request = None
    if gpus is not None:
        machines = parse_machines(gpus, "gpus")
        request = FitRequest(
            machines=machines,
            context=context,
            sequences=sequences,
            kv_dtype=kv_dtype,
            tensor_parallel=tensor_parallel,
            expert_parallel=expert_parallel,
        )
    return report_page(
        place,
        out,
        scores=scores,
        evaluation=evaluation,
        probe=probe,
        gpus=request,
        model=model,
        family=as_text(family),
        force=force,
    )
