"""From a model and its scores (or a keep-list file) to the keep-lists of every layer.

First the counts, then the experts, then the MTP layers, then the check that no pruned expert beats
a retained one. Of the model's weights only the routers of MTP layers without scores are read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shardsurgeon.checkpoint.anatomy import Anatomy
from shardsurgeon.checkpoint.checkpoint import Checkpoint
from shardsurgeon.checkpoint.layer_names import Layer, layer_number, listed_layers
from shardsurgeon.errors import KeepListError, ScoreError, UsageError, VerificationError
from shardsurgeon.pruning.counts import Counts, LayerCounts, allocate, uniform_counts
from shardsurgeon.pruning.keep_list_files import read_keeplist
from shardsurgeon.pruning.keep_list_shapes import KeepListFile, Meaning
from shardsurgeon.pruning.keep_lists import KeepList, resolve
from shardsurgeon.pruning.layer_counts import engines_on_unequal
from shardsurgeon.pruning.lineage import check_lineage, restrict, restrict_ids
from shardsurgeon.pruning.plan_model import PlannedModel, other_model
from shardsurgeon.pruning.request import Allocation, Lists, MtpPolicy, SelectionRequest
from shardsurgeon.pruning.routing import RoutingFacts, main_facts, routing_facts
from shardsurgeon.pruning.selection import (
    SUPER_METRIC,
    check_keep_list,
    check_mtp_counts,
    check_order,
    check_uniform,
    mtp_counts,
    select,
    super_experts,
    with_mtp,
)
from shardsurgeon.scores.checks import check_values, require_measured, unmeasured
from shardsurgeon.scores.rankings import RankingOrder, as_ranking
from shardsurgeon.scores.table import Scores

Values = Mapping[int, NDArray[np.float64]]
_MEANINGS: Mapping[Lists | None, Meaning] = {Lists.KEPT: "kept", Lists.DROPPED: "dropped"}
# What every layer keeps, or each of them → bytes of the checkpoint.
SizeOf = Callable[[int | Counts], int]


@dataclass(frozen=True, slots=True)
class Decision:
    """Which experts stay, and why.

    keep: in ids of the checkpoint as it is now; metric: the one that decided, None with a
    keep-list file; policies: layer → what decided where it was not the scores; never_routed:
    layer → experts that no calibration token reached; uniform: the choice with as many experts
    in every layer, to compare a shared budget with; None without --allocate, or
    where it would keep too few experts for those preserved; made_for: the model whose plan was
    used and whose saliencies these are, where it is another one; ratio: the one asked for, by
    the request or by the plan that it names.
    """

    keep: KeepList
    drop_mtp: bool
    metric: str | None
    policies: Mapping[int, str]
    never_routed: Mapping[int, tuple[int, ...]]
    notes: tuple[str, ...]
    uniform: KeepList | None = None
    made_for: PlannedModel | None = None
    ratio: float | None = None

    @property
    def kept(self) -> int:
        """Experts per MoE layer afterwards, of the largest layers, as `KeepList.kept`."""
        return self.keep.kept


def decide(
    checkpoint: Checkpoint,
    anatomy: Anatomy,
    scores: Scores | None,
    request: SelectionRequest,
    size_of: SizeOf,
) -> Decision:
    """The keep-lists that a request means for a checkpoint.

    scores: of this model, or of the one that it was pruned from; unused where the request has a
    keep-list file. size_of: kept experts → bytes of the result, for a target size
    (`SizeEstimate.nbytes`).

    Raises UsageError, ScoreError or KeepListError where request, scores and model do not fit,
    CheckpointError where the record of an earlier prune is about another checkpoint,
    VerificationError where a pruned expert would beat a retained one.
    """
    check_lineage(checkpoint.provenance, anatomy.experts_per_layer)
    facts = routing_facts(anatomy)
    if request.plan_file is not None:
        listed = read_keeplist(request.plan_file, _MEANINGS.get(request.lists))
        decision = _from_file(checkpoint, anatomy, listed, request, facts)
    elif scores is None:
        remedy = "give one, or a keep-list with --plan"
        raise ScoreError("SCORES", "no score file was given", remedy)
    else:
        decision = _from_scores(checkpoint, anatomy, scores, request, facts, size_of)
    try:
        check_order(decision.keep, facts)
    except VerificationError as error:
        if request.plan_file is None:
            raise
        # Not this program's choice but what the file says of its own.
        problem = f"{error.where}: {error.problem}"
        remedy = "make the plan again, or name the expert among the preserved"
        raise KeepListError(request.plan_file, problem, remedy) from error
    return decision


def _from_scores(
    checkpoint: Checkpoint,
    anatomy: Anatomy,
    scores: Scores,
    request: SelectionRequest,
    facts: RoutingFacts,
    size_of: SizeOf,
) -> Decision:
    scores = scores.assign_rows([layer.index for layer in anatomy.main_layers])
    if request.lists is not None:
        scores = as_ranking(scores, request.metric, RankingOrder(request.lists))
    metric, values = model_values(checkpoint, anatomy, scores, request.metric)
    drop_mtp = request.mtp is MtpPolicy.DROP
    if request.mtp.overrules:
        values = {layer: row for layer, row in values.items() if layer < anatomy.num_layers}
    never_routed = never_routed_experts(checkpoint, anatomy, scores, values)
    _require_measured(anatomy, scores, metric, values)
    preserved: dict[int, tuple[int, ...]] = {}
    if request.preserve_super_experts:
        preserved = model_super_experts(checkpoint, anatomy, scores)
        preserved = {layer: ids for layer, ids in preserved.items() if layer in values}
    uniform = uniform_counts(request, main_facts(anatomy), size_of)
    counts, compared = uniform, None
    if request.allocate is not Allocation.UNIFORM:
        counts = _shared_out(anatomy, values, preserved, facts, uniform, request, size_of)
        compared = _if_uniform(values, preserved, uniform, facts)
    every = {**counts.kept, **mtp_counts(anatomy, facts, counts.kept)}
    keep = select(values, every, facts, preserved)
    keep, policies = with_mtp(keep, checkpoint, anatomy, request.mtp, facts)
    notes = [counts.note, _ranked_by(scores), _unreached_kept(keep, values, never_routed)]
    said = tuple(filter(None, notes))
    return Decision(
        keep, drop_mtp, metric, policies, never_routed, said, compared, ratio=request.ratio
    )


def _require_measured(anatomy: Anatomy, scores: Scores, metric: str, values: Values) -> None:
    """Refuse scores that would prune by chance: as the file has them, and what is left of them
    for the experts that the model has now. values: those that decide."""
    mtp = [layer.index for layer in anatomy.mtp_layers]
    named = {layer: layer_number(layer, anatomy.num_layers, mtp) for layer in scores.layers}
    decide = [layer for layer, number in named.items() if number in values]
    main = [layer for layer in decide if named[layer] < anatomy.num_layers]
    require_measured(scores, metric, main, [layer for layer in decide if layer not in main])
    for layer, row in values.items():
        if problem := unmeasured(row):
            problem = f"layer {layer}: of the experts that are left, {problem}"
            raise ScoreError(scores.origin, problem, "use scores made for the pruned model")


def _ranked_by(scores: Scores) -> str:
    return f"{scores.origin} is read as a ranking, {scores.ranking}" if scores.ranking else ""


def _unreached_kept(
    keep: KeepList, values: Values, never_routed: Mapping[int, tuple[int, ...]]
) -> str:
    """The note on layers that keep experts which no token reached: their ids alone decided."""
    odd = []
    for layer, row in sorted(values.items()):
        known = ~np.isnan(row)
        # A saliency of 0 is no token's where none is negative.
        reached = known if (row[known] < 0).any() else known & (row != 0)
        unreached = {*np.flatnonzero(~reached).tolist(), *never_routed.get(layer, ())}
        kept = keep.layers[layer]
        count = len(unreached.intersection(kept.retained).difference(kept.preserved))
        if count:
            odd.append(f"{count} of {len(kept.retained)} in layer {layer}")
    if not odd:
        return ""
    more = f" and in {len(odd) - 5} more layers" if len(odd) > 5 else ""
    return (
        f"kept although no calibration token reached them: {', '.join(odd[:5])}{more}; "
        "among those the lower ids stay"
    )


def _shared_out(
    anatomy: Anatomy,
    values: Values,
    preserved: Mapping[int, tuple[int, ...]],
    facts: RoutingFacts,
    uniform: LayerCounts,
    request: SelectionRequest,
    size_of: SizeOf,
) -> LayerCounts:
    """As many experts as `uniform` in all, or as fit the target size, given to the layers that
    need them most."""
    allocation = allocate(values, preserved, main_facts(anatomy), request)
    budget = sum(uniform.kept.values())
    if request.target_size is None:
        kept = allocation.counts(budget)
    else:
        mtp = request.mtp is not MtpPolicy.DROP

        def size(counts: Counts) -> int:
            return size_of({**counts, **(mtp_counts(anatomy, facts, counts) if mtp else {})})

        kept = allocation.largest_fitting(size, request.target_size, budget)
    total = f"{sum(kept.values()):,} experts kept in {len(kept)} layers together"
    return LayerCounts(kept, f"{uniform.note}; {total}" if uniform.note else total)


def _if_uniform(
    values: Values,
    preserved: Mapping[int, tuple[int, ...]],
    uniform: LayerCounts,
    facts: RoutingFacts,
) -> KeepList | None:
    """The choice with uniform counts; None where they are too small for those preserved."""
    try:
        return select({n: values[n] for n in uniform.kept}, uniform.kept, facts, preserved)
    except UsageError:
        return None


def _from_file(
    checkpoint: Checkpoint,
    anatomy: Anatomy,
    listed: KeepListFile,
    request: SelectionRequest,
    facts: RoutingFacts,
) -> Decision:
    drop_mtp = request.mtp is MtpPolicy.DROP
    keep = resolve(
        listed,
        [layer.index for layer in anatomy.main_layers],
        anatomy.num_experts,
        [layer.index for layer in anatomy.mtp_layers],
        num_layers=anatomy.num_layers,
        per_layer=anatomy.experts_per_layer,
        apart=anatomy.apart,
    )
    if request.mtp.overrules:
        layers = {n: kept for n, kept in keep.layers.items() if n < anatomy.num_layers}
        keep = KeepList(keep.num_experts, layers)
    check_keep_list(keep, facts, listed.origin)
    check_mtp_counts(keep, anatomy, listed.origin)
    if not request.allow_nonuniform:
        engines = engines_on_unequal(checkpoint.settings, anatomy)
        check_uniform(keep, listed.origin, engines)
    policies = dict.fromkeys(keep.layers, "plan")
    keep, others = with_mtp(keep, checkpoint, anatomy, request.mtp, facts)
    other = other_model(listed.made_for, checkpoint, anatomy, listed.origin)
    notes = () if other is None else (_of_another_model(checkpoint, listed.origin, other),)
    policies |= others
    ratio = listed.ratio
    return Decision(keep, drop_mtp, None, policies, {}, notes, made_for=other, ratio=ratio)


def _of_another_model(checkpoint: Checkpoint, origin: str, other: PlannedModel) -> str:
    """Says that a plan was made for a model with another config: a quantization, a fine-tune."""
    here = checkpoint.source.name
    differs = f"whose {checkpoint.names.config} is not that of {here}"
    used = f"its keep-lists are used, and the saliencies shown are those of {other.name}"
    return f"{origin} was made for {other.name}, {differs}: {used}"


def model_values(
    checkpoint: Checkpoint, anatomy: Anatomy, scores: Scores, metric: str | None
) -> tuple[str, dict[int, NDArray[np.float64]]]:
    """One metric of scores that name their layers, as the model has its experts now.

    Gives the metric's name and layer number → float64 [experts]. Raises ScoreError where the
    scores are not made for this model or the one that it was pruned from.
    """
    name, table = scores.select(metric)
    numbered = _by_number(table, anatomy, scores.origin)
    counts = anatomy.experts_per_layer
    return name, restrict(numbered, checkpoint.provenance, counts, scores.origin)


def never_routed_experts(
    checkpoint: Checkpoint, anatomy: Anatomy, scores: Scores, values: Values
) -> dict[int, tuple[int, ...]]:
    """Layer → experts that no calibration token reached, of the layers that have any.

    values: what `model_values` gave. Raises ScoreError for NaN and infinities that mean nothing.
    """
    frequencies = _numbered(scores.frequencies(), anatomy)
    counted = restrict(
        {layer: row for layer, row in frequencies.items() if layer in values},
        checkpoint.provenance,
        anatomy.experts_per_layer,
        scores.origin,
    )
    found = {
        layer: check_values(layer, row, counted.get(layer), scores.origin)
        for layer, row in values.items()
    }
    return {layer: ids for layer, ids in found.items() if ids}


def model_super_experts(
    checkpoint: Checkpoint, anatomy: Anatomy, scores: Scores
) -> dict[int, tuple[int, ...]]:
    """Layer → experts with extreme activations, in the model's own ids.

    Found among the main layers, by `super_experts`. Raises ScoreError where the file lacks the
    metric `max_activations`.
    """
    _, table = scores.select(SUPER_METRIC)
    main = {layer.index for layer in anatomy.main_layers}
    activations = {n: row for n, row in _numbered(table, anatomy).items() if n in main}
    # Checked as scores are: every row is for the model as it is, or for the original.
    restrict(activations, checkpoint.provenance, anatomy.experts_per_layer, scores.origin)
    lengths = {layer: len(row) for layer, row in activations.items()}
    return restrict_ids(super_experts(activations), checkpoint.provenance, lengths)


def _by_number(
    table: Mapping[Layer, NDArray[np.float64]], anatomy: Anatomy, origin: str
) -> dict[int, NDArray[np.float64]]:
    """The table by layer number; every main MoE layer must be there, and no other layer."""
    values: dict[int, NDArray[np.float64]] = {}
    mtp = [layer.index for layer in anatomy.mtp_layers]
    for key, row in table.items():
        number = layer_number(key, anatomy.num_layers, mtp)
        if number in values:
            raise ScoreError(origin, f"has two tables for layer {number} ({key})")
        values[number] = row
    known = {layer.index for layer in anatomy.layers}
    if missing := {layer.index for layer in anatomy.main_layers}.difference(values):
        problem = f"has no scores for MoE layer {listed_layers(missing)}"
        raise ScoreError(origin, problem, "use scores made for this model")
    if extra := set(values) - known:
        problem = f"has scores for layer {listed_layers(extra)}, which has no experts in the model"
        raise ScoreError(origin, problem, "use scores made for this model")
    return dict(sorted(values.items()))


def _numbered(
    table: Mapping[Layer, NDArray[np.float64]], anatomy: Anatomy
) -> dict[int, NDArray[np.float64]]:
    mtp = [layer.index for layer in anatomy.mtp_layers]
    return {layer_number(layer, anatomy.num_layers, mtp): row for layer, row in table.items()}
