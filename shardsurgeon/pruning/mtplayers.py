"""What becomes of next-token-prediction layers that have experts: how many stay, and which.

Between `selection` and `decision`. Engines build these layers with the count that the config says
of all layers, so that they follow the main layers in it; which experts stay, where neither scores
nor a keep-list speak of them, is a matter of --mtp.
"""

from __future__ import annotations

import numpy as np

from shardsurgeon.checkpoint.anatomy import Anatomy, MoELayer
from shardsurgeon.checkpoint.checkpoint import Checkpoint
from shardsurgeon.errors import KeepListError, UsageError
from shardsurgeon.pruning.allocation import Counts
from shardsurgeon.pruning.counts import MtpPolicy, RoutingFacts, fewest_kept
from shardsurgeon.pruning.keeplists import KeepList, LayerKeep
from shardsurgeon.pruning.selection import select
from shardsurgeon.scores.routerscores import router_scores


def with_mtp(
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
    main = {layer.index: keep.layers[layer.index] for layer in anatomy.main_layers}
    counts = mtp_counts(anatomy, facts, {n: len(kept.retained) for n, kept in main.items()})
    layers = dict(keep.layers)
    for layer in open_layers:
        if policy is MtpPolicy.LAST:
            layers[layer.index] = _like(main[max(main)], layer, counts[layer.index], facts)
        else:
            norms = router_scores(checkpoint, [layer])
            layers.update(select(norms, counts, facts).layers)
    policies = {layer.index: str(policy) for layer in open_layers}
    return KeepList(keep.num_experts, dict(sorted(layers.items()))), policies


def mtp_counts(anatomy: Anatomy, facts: RoutingFacts, main: Counts) -> dict[int, int]:
    """What MTP layers keep: as many as the largest main layers, whose count the config says, or
    the same share of experts where they have another number of them."""
    most = max(main.values())
    largest = max(layer.num_experts for layer in anatomy.main_layers)
    counts = {}
    for layer in anatomy.mtp_layers:
        count = max(
            -(-layer.num_experts * most // largest), fewest_kept(facts.of_layer(layer.num_experts))
        )
        whole_groups = -(-count // facts.n_group) * facts.n_group
        counts[layer.index] = min(whole_groups, layer.num_experts)
    return counts


def _like(last: LayerKeep, layer: MoELayer, count: int, facts: RoutingFacts) -> LayerKeep:
    """The choice of the last main layer, widened to `count` experts by its own saliencies."""
    has = f"layer {layer.index} keeps {count} of {layer.num_experts} experts"
    problem = f"{has}, the last main layer {len(last.retained)} of {last.num_experts}"
    if last.num_experts != layer.num_experts:
        raise UsageError("--mtp", problem, "give --mtp router-norm or --mtp drop")
    if len(last.retained) == count:
        return LayerKeep(last.retained, last.pruned)
    if last.saliency is None:
        problem += " and no saliency to choose more by"
        raise UsageError("--mtp", problem, "give --mtp router-norm or --mtp drop")
    values = np.array([np.nan if value is None else value for value in last.saliency])
    wider = select({0: values}, count, facts, {0: last.preserved}).layers[0]
    return LayerKeep(wider.retained, wider.pruned)


def check_mtp_counts(keep: KeepList, anatomy: Anatomy, where: str) -> None:
    """MTP layers that share the config's count end with the count that the config will say."""
    for layer in anatomy.mtp_layers:
        kept = keep.layers.get(layer.index)
        if kept is None or len(kept.retained) == keep.kept or not anatomy.shares_count(layer):
            continue
        problem = f"MTP layer {layer.index} keeps {len(kept.retained)} experts, the largest layer "
        problem += f"{keep.kept}, and engines build both with one count"
        raise KeepListError(where, problem, f"keep {keep.kept} there, or leave the layer out")
