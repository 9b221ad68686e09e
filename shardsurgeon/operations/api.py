"""The commands for notebooks and pipelines, called with plain arguments."""

from __future__ import annotations

from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import TypeVar

from shardsurgeon.checkpoint.checkpoint import Checkpoint
from shardsurgeon.errors import UsageError
from shardsurgeon.execution.workers import Listener
from shardsurgeon.operations import apply as applying
from shardsurgeon.operations import prune
from shardsurgeon.operations import verify as verification
from shardsurgeon.operations.prune import Pruning, require_apart
from shardsurgeon.operations.reports import ApplyReport, PushReport
from shardsurgeon.operations.request import Destination, RunOptions
from shardsurgeon.pruning.request import Allocation, MtpPolicy, Rounding, SelectionRequest
from shardsurgeon.scores.table import Scores
from shardsurgeon.units import parse_size
from shardsurgeon.verification.findings import VerifyReport

AnyPath = str | PathLike[str]
_Choice = TypeVar("_Choice", Rounding, MtpPolicy, Allocation)


def plan(
    checkpoint: Checkpoint | AnyPath,
    scores: Scores | AnyPath | None = None,
    *,
    ratio: float | None = None,
    keep: int | None = None,
    target_size: int | str | None = None,
    plan_file: AnyPath | None = None,
    rounding: str | None = None,
    multiple_of: int | None = None,
    metric: str | None = None,
    preserve_super_experts: bool = False,
    mtp: str = "router-norm",
    allocate: str = "uniform",
    allow_nonuniform: bool = False,
    out: AnyPath | None = None,
    max_shard_size: int | str | None = None,
    family: str | None = None,
) -> Pruning:
    """Decide which experts stay and plan every byte of the result. Writes nothing.

    Exactly one of ratio (fraction removed, 0 < ratio < 1), keep (experts per MoE layer),
    target_size (bytes or `"122GB"`) and plan_file says how many. The other arguments are the
    options of the same names. Raises InputError and its children for whatever does not fit.
    """
    request = SelectionRequest(
        ratio=ratio,
        keep=keep,
        target_size=_nbytes(target_size, "target_size"),
        plan_file=plan_file,
        rounding=None if rounding is None else _choice(Rounding, rounding, "rounding"),
        multiple_of=multiple_of,
        metric=metric,
        preserve_super_experts=preserve_super_experts,
        mtp=_choice(MtpPolicy, mtp, "mtp"),
        allocate=_choice(Allocation, allocate, "allocate"),
        allow_nonuniform=allow_nonuniform,
    )
    limit = _nbytes(max_shard_size, "max_shard_size")
    return prune.plan(checkpoint, scores, request, out=out, max_shard_nbytes=limit, family=family)


def apply(
    plan: Pruning,
    out: AnyPath | None = None,
    *,
    workers: int = 0,
    verify: bool = True,
    restart: bool = False,
    on_progress: Listener | None = None,
    push_to_hub: str | None = None,
    stream_push: str | None = None,
    disk_budget: int | str | None = None,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    card: AnyPath | bool = True,
) -> ApplyReport:
    """Carry a plan out, into the folder `out` or the one that the plan names.

    workers: threads, 0 for a number that suits the machine. push_to_hub: a repository to push
    the result to; stream_push: one to send every shard to when it is finished, so that nothing
    stays here, with at most disk_budget (bytes or `"20GB"`) of them on the disk; the others as
    for `push`. Raises OutputError where the place is taken or belongs to another run, WorkError
    and its children where the work fails.
    """
    if out is not None:
        plan = replace(plan, out=Path(out))
        require_apart(plan.checkpoint, plan.out)
    own, with_card = _card(card)
    destination = Destination.of(
        push_to_hub,
        stream_push,
        private=private,
        revision=revision,
        create_pr=create_pr,
        card=own,
        with_card=with_card,
        disk_budget=_nbytes(disk_budget, "disk_budget"),
    )
    options = RunOptions(workers=workers, verify=verify, restart=restart, progress=on_progress)
    return applying.apply(plan, options, destination)


def push(
    pruned: AnyPath,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    card: AnyPath | bool = True,
    family: str | None = None,
) -> PushReport:
    """Push a folder that `apply` wrote to `org/name` on the Hub, in one commit.

    private: of a repository that is made; revision: the branch, made where it is missing;
    create_pr: open a pull request instead; card: a README.md to use, False for none but the
    source's own. A rerun uploads nothing twice. Raises CheckpointError where the folder is no
    complete prune, UsageError where the Hub refuses, PublishError where the upload fails.
    """
    from shardsurgeon.operations import push as publishing

    destination = Destination(repo_id, private, revision, create_pr, *_card(card))
    return publishing.push(pruned, destination, family=family)


def _card(card: AnyPath | bool) -> tuple[AnyPath | None, bool]:
    """(the user's own card, whether there is to be one)."""
    return (None, card) if isinstance(card, bool) else (card, True)


def verify(
    source: AnyPath,
    pruned: AnyPath,
    *,
    sample: int | None = None,
    architecture: bool = False,
    family: str | None = None,
) -> VerifyReport:
    """Compare a pruned folder with its source, byte by byte, or `sample` tensors per shard.

    architecture: check as well that transformers' model of the pruned config takes exactly
    these tensors.
    """
    return verification.verify(
        source, pruned, sample=sample, architecture=architecture, family=family
    )


def _nbytes(size: int | str | None, option: str) -> int | None:
    return parse_size(size, option) if isinstance(size, str) else size


def _choice(kind: type[_Choice], value: str, option: str) -> _Choice:
    try:
        return kind(value)
    except ValueError:
        names = ", ".join(kind)
        raise UsageError(option, f"{value!r} is none of {names}") from None
