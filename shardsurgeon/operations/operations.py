"""One function per command: each introduces the rooms to one another and returns a report."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from shardsurgeon.checkpoint.anatomy import Anatomy, read_anatomy
from shardsurgeon.checkpoint.checkpoint import Checkpoint, open_checkpoint
from shardsurgeon.checkpoint.opening import open_model
from shardsurgeon.checkpoint.parameters import count_parameters
from shardsurgeon.errors import OutputError, UsageError
from shardsurgeon.execution.execution import execute
from shardsurgeon.execution.outlets import Outlet
from shardsurgeon.execution.progress import Listener
from shardsurgeon.execution.surgeryplan import SurgeryPlan
from shardsurgeon.operations.naming import default_out, require_apart
from shardsurgeon.operations.proving import SelfCheck
from shardsurgeon.operations.reports import ApplyReport, InspectReport, PlanReport, VerifyReport
from shardsurgeon.pruning.allocation import uniform_counts
from shardsurgeon.pruning.assembly import assemble
from shardsurgeon.pruning.counts import MtpPolicy, SelectionRequest
from shardsurgeon.pruning.decision import (
    Decision,
    decide,
    expert_id_tables,
    main_facts,
    routing_facts,
)
from shardsurgeon.pruning.keeplists import write_plan
from shardsurgeon.pruning.modelconfig import quantization_name
from shardsurgeon.pruning.mtplayers import mtp_counts
from shardsurgeon.pruning.planning import plan_shards
from shardsurgeon.pruning.planreport import plan_report
from shardsurgeon.pruning.sizing import Sizing
from shardsurgeon.scores.scores import Scores, read_scores
from shardsurgeon.storage.durable import write_file
from shardsurgeon.storage.origins import address_of
from shardsurgeon.storage.places import open_source
from shardsurgeon.verification.check import check_architecture
from shardsurgeon.verification.proof import verify_checkpoint

RATIOS_SHOWN = (0.25, 0.5, 0.65, 0.75)

# Makes the outlet of a run, given the check that each of its shards has to pass.
OutletMaker = Callable[[Callable[[str, Path], None]], Outlet]


def inspect(model: str | None = None, *, family: str | None = None) -> InspectReport:
    """What a model is made of. Reads headers and JSON only; family: as for `plan`."""
    checkpoint = open_model(model, family)
    anatomy = read_anatomy(checkpoint)
    config = checkpoint.settings
    records = (record for shard in checkpoint.shards for record in shard.header.tensors)
    return InspectReport(
        name=checkpoint.source.name,
        model_type=config.get("model_type"),
        architectures=tuple(config.get("architectures") or ()),
        family=anatomy.family.name,
        num_hidden_layers=anatomy.num_layers,
        moe_layers=tuple(layer.index for layer in anatomy.main_layers),
        mtp_layers=tuple(layer.index for layer in anatomy.mtp_layers),
        num_experts=anatomy.num_experts,
        top_k=anatomy.top_k,
        n_group=anatomy.n_group,
        topk_group=anatomy.topk_group,
        expert_layout=anatomy.layout,
        quantization=quantization_name(config),
        shards=len(checkpoint.shards),
        tensors=checkpoint.num_tensors,
        total_size=checkpoint.total_size,
        total_parameters=count_parameters(records, config),
        expert_size=anatomy.expert_nbytes,
        sizes_at=_sizes_at(anatomy),
        notes=checkpoint.notes,
        num_experts_per_layer=None if _alike(anatomy) else anatomy.experts_per_layer,
    )


def _sizes_at(anatomy: Anatomy) -> dict[str, int]:
    """Ratio → bytes, for the ratios that this model's routing allows."""
    sizes = {}
    for ratio in RATIOS_SHOWN:
        try:
            kept = uniform_counts(SelectionRequest(ratio=ratio), main_facts(anatomy)).kept
        except UsageError:
            continue
        mtp = mtp_counts(anatomy, routing_facts(anatomy), kept)
        sizes[str(ratio)] = anatomy.total_nbytes({**kept, **mtp})
    return sizes


def _alike(anatomy: Anatomy) -> bool:
    """Whether all MoE layers have the same number of experts."""
    return len(set(anatomy.experts_per_layer.values())) == 1


@dataclass(frozen=True)
class Pruning:
    """A prune that is decided and planned, and not yet done.

    decision: which experts stay; surgery: the bytes to move; out: the folder they go to;
    max_shard_nbytes, declared: what it was planned with (declared: the words of --family).
    """

    checkpoint: Checkpoint
    anatomy: Anatomy
    request: SelectionRequest
    decision: Decision
    surgery: SurgeryPlan
    out: Path
    max_shard_nbytes: int | None = None
    declared: str | None = None

    @cached_property
    def report(self) -> PlanReport:
        """What it would do, for people."""
        return plan_report(
            self.checkpoint,
            self.anatomy,
            self.request,
            self.decision,
            self.surgery,
            str(self.out),
        )

    def write_plan(self, path: str | os.PathLike[str]) -> None:
        """Save the keep-lists as a plan.json that `--plan` reads."""
        data = write_plan(
            self.decision.keep,
            selection=_selection_words(self),
            source={
                "name": self.checkpoint.source.name,
                "config_sha256": self.checkpoint.config_sha256,
            },
        )
        write_file(Path(path), data)


def plan(
    model: str | os.PathLike[str] | Checkpoint | None,
    scores: str | os.PathLike[str] | Scores | None,
    request: SelectionRequest,
    *,
    out: str | os.PathLike[str] | None = None,
    max_shard_nbytes: int | None = None,
    family: str | None = None,
) -> Pruning:
    """Decide which experts stay and plan every byte of the result. Writes nothing.

    model: a folder, an opened checkpoint, or None for the current folder; scores: a score
    file, a table that `read_scores` gave, or None with a keep-list file; out: where the
    result is to go (None: named after the model); max_shard_nbytes: None keeps the source's
    cutting; family: a file with the model's declaration, or `auto` to read a model without
    one, where that leaves no doubt. Raises InputError and its children for whatever does not fit.
    """
    checkpoint = model if isinstance(model, Checkpoint) else open_model(model, family)
    anatomy = read_anatomy(checkpoint)
    table = scores if isinstance(scores, Scores) or scores is None else read_scores(scores)
    given = [path for path in (_path(scores), _path(request.plan_file)) if path is not None]
    sizing = Sizing(checkpoint, anatomy, drop_mtp=request.mtp is MtpPolicy.DROP)
    decision = decide(checkpoint, anatomy, table, request, sizing.nbytes)
    shards = plan_shards(
        checkpoint,
        anatomy,
        decision.keep,
        tables=expert_id_tables(checkpoint, anatomy, decision.keep),
        drop_mtp=decision.drop_mtp,
        max_shard_nbytes=max_shard_nbytes,
    )
    folder = Path(out) if out is not None else default_out(checkpoint, request, decision.keep)
    require_apart(checkpoint, folder)
    surgery = assemble(checkpoint, anatomy, request, decision, shards, given, max_shard_nbytes)
    return Pruning(
        checkpoint, anatomy, request, decision, surgery, folder, max_shard_nbytes, family
    )


def apply(
    model: str | None,
    scores: str | None,
    request: SelectionRequest,
    *,
    out: str | None = None,
    max_shard_nbytes: int | None = None,
    workers: int = 0,
    verify: bool = True,
    dry_run: bool = False,
    restart: bool = False,
    progress: Listener | None = None,
    family: str | None = None,
) -> ApplyReport:
    """`plan` and `carry_out` in one."""
    return carry_out(
        # Not kept here: what is planned takes room that the check at the end needs.
        plan(model, scores, request, out=out, max_shard_nbytes=max_shard_nbytes, family=family),
        workers=workers,
        verify=verify,
        dry_run=dry_run,
        restart=restart,
        progress=progress,
    )


def carry_out(
    pruning: Pruning,
    *,
    workers: int = 0,
    verify: bool = True,
    dry_run: bool = False,
    restart: bool = False,
    progress: Listener | None = None,
    outlet: OutletMaker | None = None,
    disk_budget: int | None = None,
) -> ApplyReport:
    """Move the bytes of a plan, check the result, and only then give it its name.

    workers: threads, 0 for a number that suits the machine; verify: compare the structure of
    everything and the bytes of a sample; dry_run: say what would happen and write nothing.
    outlet: where the result goes instead of a folder; disk_budget: bytes of shards that may be
    here at a time on their way there.

    Raises UsageError where layers keep different numbers and nobody allowed that, OutputError
    where the place is taken, WorkError and its children where the work fails or the check does
    not hold. What was finished is kept for a rerun.
    """
    require_ready(pruning)
    if dry_run:
        return ApplyReport(pruning.report, True, None, 0, 0, 0, 0.0, None)
    report, checkpoint, out = pruning.report, pruning.checkpoint, pruning.out
    surgery = pruning.surgery
    small = len(surgery.documents) + len(surgery.side_files) + len(surgery.extra_files)
    files = len(surgery.shards) + small
    check = SelfCheck(checkpoint, surgery, out, by_shard=outlet is not None)
    taken = outlet(check.shard if verify else _unchecked) if outlet else None
    # Half a trillion parameters take 40 MB to plan: whoever keeps no plan has them for the check.
    handed = [surgery]
    del pruning, surgery
    try:
        done = execute(
            handed.pop(),
            checkpoint.source,
            out,
            workers=workers,
            restart=restart,
            on_progress=progress,
            before_delivery=(check.rest if taken else check.whole) if verify else None,
            outlet=taken,
            disk_budget=disk_budget,
        )
    except BaseException as stop:
        # A signal in the last moment: the result is there, and there is nothing to resume.
        if os.path.lexists(out):
            stop.add_note(complete(str(out)))
        raise
    return ApplyReport(
        plan=report,
        dry_run=False,
        out=None if taken else str(out),
        files=files,
        bytes_copied=done.bytes_copied,
        bytes_resumed=done.bytes_resumed,
        seconds=done.seconds,
        verification=check.report,
        bytes_downloaded=done.bytes_downloaded,
        source=address_of(checkpoint.source),
    )


def _unchecked(name: str, path: Path) -> None:
    """What --no-verify checks of a shard."""


def require_ready(pruning: Pruning) -> None:
    """Raise UsageError where layers keep different numbers and the request does not allow it,
    OutputError where there is an OUT already."""
    keep = pruning.decision.keep
    if not keep.is_uniform and not pruning.request.allow_nonuniform:
        counts = [len(layer.retained) for layer in keep.layers.values()]
        problem = (
            f"is needed: layers keep {min(counts)} to {max(counts)} experts, and stock engines"
        )
        remedy = "give it for an engine that reads a count per layer"
        raise UsageError("--allow-nonuniform", f"{problem} read one count for all", remedy)
    if os.path.lexists(pruning.out):
        raise OutputError(pruning.out, "exists", "choose another -o or remove it")


def complete(out: str) -> str:
    """What an interrupted command says where its result is already there."""
    return f"{out} is complete"


def verify(
    source: str | os.PathLike[str],
    pruned: str | os.PathLike[str],
    *,
    sample: int | None = None,
    architecture: bool = False,
    progress: Callable[[int, int], None] | None = None,
    family: str | None = None,
) -> VerifyReport:
    """Prove a pruned model, a folder or a repository, against its source.

    sample: tensors per shard whose bytes are compared, None for all; architecture: check as
    well that transformers' model of the pruned config takes exactly these tensors. Raises
    UsageError, before any weight is read, where that cannot be checked.
    """
    before = open_model(source, family)
    if isinstance(pruned, str) and not os.path.lexists(pruned):
        there = open_source(pruned)
        fits = check_architecture(before, open_checkpoint(there)) if architecture else None
        report = verify_checkpoint(before, there, sample=sample, on_progress=progress)
    else:
        fits = check_architecture(before, pruned) if architecture else None
        report = verify_checkpoint(before, pruned, sample=sample, on_progress=progress)
    return replace(report, architecture=fits)


def _path(value: object) -> Path | None:
    return Path(value).absolute() if isinstance(value, str | os.PathLike) else None


def _selection_words(pruning: Pruning) -> dict[str, object]:
    request, decision = pruning.request, pruning.decision
    return {
        "selection": request.selection,
        "ratio": request.ratio,
        "rounding": request.effective_rounding,
        "metric": decision.metric,
        "kept": decision.kept,
        "allocate": request.allocate,
        "mtp": request.mtp,
    }
