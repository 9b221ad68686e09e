"""From a model and its scores (or a keep-list file) to the keep-lists of every layer.

Joins `scores`, `keeplists`, `lineage` and `selection`; the one thing it reads of the model's
weights is the router of an MTP layer that has no scores.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shardsurgeon.anatomy import Anatomy, MoELayer
from shardsurgeon.checkpoint import Checkpoint
from shardsurgeon.counts import (
    MtpPolicy,
    RoutingFacts,
    SelectionRequest,
    kept_count,
)
from shardsurgeon.errors import FamilyError, ScoreError
from shardsurgeon.formats.numbers import decode
from shardsurgeon.keeplists import KeepList, LayerKeep, read_keeplist, resolve
from shardsurgeon.lineage import check_lineage, restrict, restrict_ids
from shardsurgeon.scores import Scores, check_values
from shardsurgeon.selection import check_keep_list, check_order, select, super_experts

Values = Mapping[int, NDArray[np.float64]]

_SUPER_METRIC = "max_activations"


@dataclass(frozen=True, slots=True)
class Decision:
    """Which experts stay, and why.

    keep: in ids of the checkpoint at hand; kept: experts per MoE layer afterwards; metric: the
    one that decided, None with a keep-list file; policies: layer → what decided where it was
    not the scores; never_routed: layer → experts that no calibration token reached.
    """

    keep: KeepList
    kept: int
    drop_mtp: bool
    metric: str | None
    policies: Mapping[int, str]
    never_routed: Mapping[int, tuple[int, ...]]
    notes: tuple[str, ...]


def routing_facts(anatomy: Anatomy) -> RoutingFacts:
    """What the selection must know of a model's router."""
    return RoutingFacts(
        num_experts=anatomy.num_experts,
        top_k=anatomy.top_k,
        n_group=anatomy.n_group,
        topk_group=anatomy.topk_group,
        group_score_top=anatomy.family.group_score_top,
    )


def decide(
    checkpoint: Checkpoint,
    anatomy: Anatomy,
    scores: Scores | None,
    request: SelectionRequest,
    size_of: Callable[[int], int],
) -> Decision:
    """The keep-lists that a request means for a checkpoint.

    size_of: kept count → bytes of the result, for a target size. Raises UsageError, ScoreError
    or KeepListError where request, scores and model do not fit, VerificationError where a
    pruned expert would beat a retained one.
    """
    check_lineage(checkpoint.provenance, anatomy.num_experts, [la.index for la in anatomy.layers])
    facts = routing_facts(anatomy)
    if request.plan_file is not None:
        decision = _from_file(checkpoint, anatomy, request, facts)
    elif scores is None:
        raise ScoreError(
            "SCORES", "no score file was given", "give one, or a keep-list with --plan"
        )
    else:
        decision = _from_scores(checkpoint, anatomy, scores, request, facts, size_of)
    check_order(decision.keep, facts)
    return decision


def _from_scores(
    checkpoint: Checkpoint,
    anatomy: Anatomy,
    scores: Scores,
    request: SelectionRequest,
    facts: RoutingFacts,
    size_of: Callable[[int], int],
) -> Decision:
    scores = scores.assign_rows([layer.index for layer in anatomy.main_layers])
    metric, table = scores.select(request.metric)
    values = restrict(
        _by_number(table, anatomy, scores.origin),
        checkpoint.provenance,
        anatomy.num_experts,
        scores.origin,
    )
    drop_mtp = request.mtp is MtpPolicy.DROP
    if drop_mtp:
        values = {layer: row for layer, row in values.items() if layer < anatomy.num_layers}
    never_routed = _check(values, scores, checkpoint, anatomy)
    count = kept_count(request, facts, size_of)
    preserved: dict[int, tuple[int, ...]] = {}
    if request.preserve_super_experts:
        preserved = _super(checkpoint, anatomy, scores)
        preserved = {layer: ids for layer, ids in preserved.items() if layer in values}
    keep = select(values, count.kept, facts, preserved)
    keep, policies = _with_mtp(keep, checkpoint, anatomy, request.mtp, facts)
    notes = (count.note,) if count.note else ()
    return Decision(keep, count.kept, drop_mtp, metric, policies, never_routed, notes)


def _from_file(
    checkpoint: Checkpoint, anatomy: Anatomy, request: SelectionRequest, facts: RoutingFacts
) -> Decision:
    if request.plan_file is None:
        raise TypeError("there is no keep-list file")
    drop_mtp = request.mtp is MtpPolicy.DROP
    listed = read_keeplist(request.plan_file)
    keep = resolve(
        listed,
        [layer.index for layer in anatomy.main_layers],
        anatomy.num_experts,
        [layer.index for layer in anatomy.mtp_layers],
        num_layers=anatomy.num_layers,
    )
    if drop_mtp:
        layers = {n: kept for n, kept in keep.layers.items() if n < anatomy.num_layers}
        keep = KeepList(keep.num_experts, layers)
    check_keep_list(keep, facts, listed.origin)
    policies = dict.fromkeys(keep.layers, "plan")
    keep, others = _with_mtp(keep, checkpoint, anatomy, request.mtp, facts)
    kept = len(next(iter(keep.layers.values())).retained)
    return Decision(keep, kept, drop_mtp, None, {**policies, **others}, {}, ())


def _by_number(
    table: Mapping[int | str, NDArray[np.float64]], anatomy: Anatomy, origin: str
) -> dict[int, NDArray[np.float64]]:
    """The table by layer number; every main MoE layer must be there, and no other layer."""
    values: dict[int, NDArray[np.float64]] = {}
    for key, row in table.items():
        number = key if isinstance(key, int) else anatomy.num_layers + int(key.split(".")[1])
        if number in values:
            raise ScoreError(origin, f"has two tables for layer {number} ({key})")
        values[number] = row
    known = {layer.index for layer in anatomy.layers}
    if missing := sorted({layer.index for layer in anatomy.main_layers} - set(values)):
        problem = f"has no scores for MoE layer {_listed(missing)}"
        raise ScoreError(origin, problem, "use scores made for this model")
    if extra := sorted(set(values) - known):
        problem = f"has scores for layer {_listed(extra)}, which has no experts in the model"
        raise ScoreError(origin, problem, "use scores made for this model")
    return dict(sorted(values.items()))


def _listed(layers: Sequence[int]) -> str:
    shown = ", ".join(map(str, layers[:5]))
    return shown if len(layers) <= 5 else f"{shown} and {len(layers) - 5} more"


def _check(
    values: Values, scores: Scores, checkpoint: Checkpoint, anatomy: Anatomy
) -> dict[int, tuple[int, ...]]:
    """Refuse NaN and infinities that mean nothing; layer → never-routed experts."""
    counted = restrict(
        {n: row for n, row in _numbered(scores.frequencies(), anatomy).items() if n in values},
        checkpoint.provenance,
        anatomy.num_experts,
        scores.origin,
    )
    found = {
        layer: check_values(layer, row, counted.get(layer), scores.origin)
        for layer, row in values.items()
    }
    return {layer: ids for layer, ids in found.items() if ids}


def _numbered(
    table: Mapping[int | str, NDArray[np.float64]], anatomy: Anatomy
) -> dict[int, NDArray[np.float64]]:
    return {
        key if isinstance(key, int) else anatomy.num_layers + int(key.split(".")[1]): row
        for key, row in table.items()
    }


def _super(checkpoint: Checkpoint, anatomy: Anatomy, scores: Scores) -> dict[int, tuple[int, ...]]:
    _, table = scores.select(_SUPER_METRIC)
    main = {layer.index for layer in anatomy.main_layers}
    activations = {n: row for n, row in _numbered(table, anatomy).items() if n in main}
    lengths = {len(row) for row in activations.values()}
    if len(lengths) != 1:
        raise ScoreError(scores.origin, f"{_SUPER_METRIC} has rows of {sorted(lengths)} experts")
    return restrict_ids(super_experts(activations), checkpoint.provenance, lengths.pop())


def _with_mtp(
    keep: KeepList,
    checkpoint: Checkpoint,
    anatomy: Anatomy,
    policy: MtpPolicy,
    facts: RoutingFacts,
) -> tuple[KeepList, dict[int, str]]:
    """Give MTP layers that have experts and no keep-list one by the policy."""
    open_layers = [layer for layer in anatomy.mtp_layers if layer.index not in keep.layers]
    if policy is MtpPolicy.DROP or not open_layers:
        return keep, {}
    last = keep.layers[max(layer.index for layer in anatomy.main_layers)]
    layers = dict(keep.layers)
    for layer in open_layers:
        if policy is MtpPolicy.LAST:
            layers[layer.index] = LayerKeep(last.retained, last.pruned)
        else:
            norms = {layer.index: router_norms(checkpoint, anatomy, layer)}
            layers.update(select(norms, len(last.retained), facts).layers)
    policies = {layer.index: str(policy) for layer in open_layers}
    return KeepList(keep.num_experts, dict(sorted(layers.items()))), policies


def router_norms(checkpoint: Checkpoint, anatomy: Anatomy, layer: MoELayer) -> NDArray[np.float64]:
    """The L2 norm of each expert's row of a layer's router, float64 [num_experts].

    Raises FamilyError where the router is stored in a form that has no norms without its
    scales.
    """
    for shard in checkpoint.shards:
        for record in shard.header.tensors:
            if record.name != layer.router:
                continue
            if record.dtype not in ("BF16", "F16", "F32", "F64"):
                raise FamilyError(
                    record.name,
                    f"is stored as {record.dtype}, whose rows have no norm by themselves",
                    "give --mtp last or --mtp drop",
                )
            begin = shard.header.data_begin
            raw = checkpoint.source.read(shard.file, begin + record.begin, begin + record.end)
            rows = decode(record.dtype, raw).reshape(record.shape)[: anatomy.num_experts]
            return np.asarray(np.sqrt((rows * rows).sum(axis=1)))
    raise AssertionError(f"{layer.router} was there when the anatomy was read")
