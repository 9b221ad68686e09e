"""What is done with a view, called with plain arguments from notebooks and pipelines."""

from __future__ import annotations

from shardsurgeon.execution.workers import Listener
from shardsurgeon.operations import materialize as materializing
from shardsurgeon.operations.bars import bars
from shardsurgeon.operations.materialize import MaterializeReport
from shardsurgeon.operations.python_calls import AnyPath, as_text, public
from shardsurgeon.operations.request import RunOptions


@public
def materialize(
    view: AnyPath,
    out: AnyPath | None = None,
    *,
    workers: int = 0,
    verify: bool = True,
    restart: bool = False,
    checksums: bool = False,
    allow_nonuniform: bool = False,
    family: AnyPath | None = None,
    follow_links: bool = False,
    progress: bool = False,
    on_progress: Listener | None = None,
) -> MaterializeReport:
    """Make the shards of a view: a folder with the bytes that `apply` would have written.

    view: the folder that `apply` wrote with `view=True`; it stays as it is. out: the folder to
    write, by default the view's name without `-view`. allow_nonuniform: as for `plan`. family,
    follow_links: the same, for the check. workers, verify, restart, checksums, progress,
    on_progress: as for `apply`.

    Raises CheckpointError and its children where the folder is no view, is not as `apply` wrote it
    (but for README.md, which may be edited), or where its source is gone or has changed; UsageError
    where `out` is needed, or where layers keep different numbers of experts and that is not
    allowed; OutputError where `out` holds anything else, or belongs to another run; WorkError and
    its children where the work fails. What is finished is kept for a rerun.

    >>> plan = shardsurgeon.plan("fixtures/kimi_k25", "fixtures/kimi_k25/scores.pt", ratio=0.65)
    >>> written = shardsurgeon.apply(plan, "small-view", view=True)
    >>> report = shardsurgeon.materialize("small-view", "small")
    >>> report.files, report.verification.holds
    (22, True)
    """
    options = RunOptions(
        workers=workers,
        verify=verify,
        restart=restart,
        checksums=checksums,
        progress=on_progress,
    )
    with bars(progress):
        return materializing.materialize(
            view,
            out,
            options,
            allow_nonuniform=allow_nonuniform,
            family=as_text(family),
            follow_links=follow_links,
        )
