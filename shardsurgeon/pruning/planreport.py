"""What a plan would do, as the report that people decide from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from shardsurgeon.checkpoint.anatomy import Anatomy
from shardsurgeon.checkpoint.checkpoint import Checkpoint
from shardsurgeon.checkpoint.parameters import count_parameters
from shardsurgeon.execution.surgeryplan import Literal, OutputTensor, SurgeryPlan
from shardsurgeon.operations.reports import LayerReport, PlanReport
from shardsurgeon.pruning.counts import SelectionRequest
from shardsurgeon.pruning.decision import Decision
from shardsurgeon.pruning.finishing import is_other_weight_format
from shardsurgeon.pruning.mixedprecision import mixed_precision_notes
from shardsurgeon.pruning.modelconfig import nonuniform_notes, says_per_layer
from shardsurgeon.pruning.selection import summarize


def plan_report(
    checkpoint: Checkpoint,
    anatomy: Anatomy,
    request: SelectionRequest,
    decision: Decision,
    surgery: SurgeryPlan,
    out: str,
) -> PlanReport:
    """The report of a plan; out: the folder that the result would go to.

    Raises ConfigError where a quantization list cannot follow its experts.
    """
    config = checkpoint.settings
    records = [record for shard in checkpoint.shards for record in shard.header.tensors]
    tensors = [tensor for shard in surgery.shards for tensor in shard.tensors]
    return PlanReport(
        model=checkpoint.source.name,
        selection=request.selection,
        ratio=request.ratio,
        rounding=request.effective_rounding,
        metric=decision.metric,
        num_experts_before=anatomy.num_experts,
        num_experts_after=decision.kept,
        layers=_layer_reports(anatomy, decision),
        mtp_dropped=decision.drop_mtp and anatomy.mtp_nbytes > 0,
        total_size_before=checkpoint.total_size,
        total_size_after=sum(tensor.nbytes for tensor in tensors),
        total_parameters_before=count_parameters(records, config),
        total_parameters_after=count_parameters(tensors, config),
        shards_before=len(checkpoint.shards),
        shards_after=len(surgery.shards),
        space_needed=_space_needed(checkpoint, surgery),
        out=out,
        allocate=request.allocate,
        stock_engines=decision.keep.is_uniform or says_per_layer(config, anatomy) != "",
        notes=(
            *checkpoint.notes,
            *decision.notes,
            *_grouped(anatomy),
            *nonuniform_notes(config, anatomy, decision.keep),
            *mixed_precision_notes(checkpoint, anatomy, decision.keep),
            *_rewritten(tensors),
            *_left_out(checkpoint),
        ),
    )


def _layer_reports(anatomy: Anatomy, decision: Decision) -> tuple[LayerReport, ...]:
    compared = summarize(decision.uniform) if decision.uniform is not None else ()
    uniform = {layer.layer: layer.dropped_share for layer in compared}
    return tuple(
        LayerReport(
            layer=layer.layer,
            is_mtp=layer.layer >= anatomy.num_layers,
            kept=layer.kept,
            pruned=layer.pruned,
            preserved=layer.preserved,
            never_routed=len(decision.never_routed.get(layer.layer, ())),
            min_retained_saliency=layer.min_retained,
            max_pruned_saliency=layer.max_pruned,
            saliency_dropped=layer.dropped_share,
            policy=decision.policies.get(layer.layer, "scores"),
            saliency_dropped_uniform=uniform.get(layer.layer),
        )
        for layer in summarize(decision.keep)
    )


def _space_needed(checkpoint: Checkpoint, surgery: SurgeryPlan) -> int:
    """Bytes that the finished folder takes."""
    sizes = {file.name: file.nbytes for file in checkpoint.files}
    return (
        sum(shard.nbytes for shard in surgery.shards)
        + sum(len(content) for _, content in surgery.documents)
        + sum(sizes[name] for name in surgery.side_files)
        + sum(Path(path).stat().st_size for _, path in surgery.extra_files)
    )


def _grouped(anatomy: Anatomy) -> list[str]:
    if anatomy.n_group == 1:
        return []
    return [
        f"every one of the router's {anatomy.n_group} groups keeps its own best experts, so the "
        "lowest kept may be below the highest pruned of another group"
    ]


def _rewritten(tensors: Sequence[OutputTensor]) -> list[str]:
    """Names the tensors that are no copy of the source's bytes."""
    names = [t.name for t in tensors if any(isinstance(piece, Literal) for piece in t.pieces)]
    what = "hold expert counts or ids and get new values"
    return [f"{len(names)} tensors {what}: {', '.join(names)}"] if names else []


def _left_out(checkpoint: Checkpoint) -> list[str]:
    names = [f.name for f in checkpoint.files if is_other_weight_format(f.name)]
    return [f"{name} holds weights in another format and is left out" for name in names]
