"""Which experts stay: one saliency per expert and a kept count become keep-lists. Pure.

Next-token-prediction layers follow the main layers in their count, because engines build them
with the count that the config says of all layers; which of their experts stay, where neither
scores nor a keep-list say so, is decided by --mtp.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from shardsurgeon.checkpoint.anatomy import Anatomy, MoELayer
from shardsurgeon.checkpoint.checkpoint import Checkpoint
from shardsurgeon.errors import KeepListError, ScoreError, UsageError, VerificationError
from shardsurgeon.pruning.counts import Counts, RoutingFacts, check_routing, fewest_kept
from shardsurgeon.pruning.keep_lists import KeepList, LayerKeep
from shardsurgeon.pruning.request import MtpPolicy
from shardsurgeon.scores.router_norms import router_scores

SUPER_QUANTILE = 0.995
SUPER_FRACTION_OF_MAXIMUM = 10
SUPER_SHARE_OF_LAYERS = 0.75

_NOBODY: Mapping[int, Collection[int]] = MappingProxyType({})


def select(
    values: Mapping[int, NDArray[np.float64]],
    kept: int | Mapping[int, int],
    facts: RoutingFacts,
    preserved: Mapping[int, Collection[int]] = _NOBODY,
) -> KeepList:
    """Keep the `kept` most salient experts of every layer, or kept[layer] of each.

    values: layer → float64 [experts], index = expert id; as long as the layer has experts, at
    most facts.num_experts. NaN, a never-routed expert, counts as the lowest; +inf marks a
    preserved expert. preserved: layer → further ids that stay whatever their saliency; all
    preserved count towards `kept`. Among equals the lower id stays. With n_group > 1 every
    group keeps kept / n_group, chosen within the group. `kept` must suit the router
    (`check_routing`). In the result NaN and +inf stand as None.

    Raises UsageError where more experts are preserved than a layer or a group may keep.
    """
    layers = {}
    for layer in sorted(values):
        count = kept if isinstance(kept, int) else kept[layer]
        layers[layer] = _select_layer(layer, values[layer], count, facts, preserved.get(layer, ()))
    return KeepList(num_experts=facts.num_experts, layers=layers)


def super_experts(
    max_activations: Mapping[int, NDArray[np.float64]],
) -> dict[int, tuple[int, ...]]:
    """The experts with extreme activation norms, layer → ascending ids; layers without any
    are left out.

    max_activations: layer → float64 [E], the largest output norm seen per expert. The rule is
    that of the REAP reference code (`get_super_expert_indices` in its model_util.py): over all
    layers together the threshold is the larger of the 99.5th percentile (linear interpolation)
    and a tenth of the maximum; experts strictly above it count, in the first int(0.75 × layers)
    layers only. The reference then looks its rows up by layer number, which misses by the number
    of dense layers before them; here a row is its layer.

    Raises ScoreError for values that are not finite: a percentile over them means nothing.
    """
    layers = sorted(max_activations)
    if not layers:
        return {}
    for layer in layers:
        unusable = np.flatnonzero(~np.isfinite(max_activations[layer]))
        if unusable.size:
            value = max_activations[layer][unusable[0]]
            problem = f"max_activations of expert {unusable[0]} is {value}"
            raise ScoreError(f"layer {layer}", problem, "give finite values, 0 for never routed")
    everything = np.concatenate([max_activations[layer] for layer in layers])
    percentile = float(np.quantile(everything, SUPER_QUANTILE, method="linear"))
    threshold = max(percentile, float(everything.max()) / SUPER_FRACTION_OF_MAXIMUM)
    considered = layers[: int(len(layers) * SUPER_SHARE_OF_LAYERS)]
    above = {layer: np.flatnonzero(max_activations[layer] > threshold) for layer in considered}
    return {layer: tuple(map(int, ids)) for layer, ids in above.items() if ids.size}


def check_order(keep_list: KeepList, facts: RoutingFacts) -> None:
    """Prove from the saliencies that in every layer no pruned expert beats a retained one.

    Preserved experts are left out; an unknown saliency counts as lower than any other. Where
    routing is group-limited the comparison is within each group, because every group keeps the
    same number. Layers without saliencies have nothing to compare.

    Raises VerificationError naming the first layer (and group) where it does not hold.
    """
    for layer, keep in sorted(keep_list.layers.items()):
        if keep.saliency is None:
            continue
        judged = _judged(keep)
        size = keep.num_experts // facts.n_group
        for group in range(facts.n_group):
            ids = range(group * size, (group + 1) * size)
            lowest = min((_rank(keep, old) for old in judged if old in ids), default=math.inf)
            highest = max(
                (_rank(keep, old) for old in keep.pruned if old in ids),
                default=-math.inf,
            )
            if lowest < highest:
                place = f"layer {layer}" + (f", group {group}" if facts.n_group > 1 else "")
                problem = f"a retained expert has saliency {lowest}, a pruned one {highest}"
                raise VerificationError(place, problem)


def check_uniform(keep_list: KeepList, where: str) -> None:
    """Raise KeepListError, naming `where`, unless every layer keeps the same number."""
    first, *others = sorted(keep_list.layers) or [0]
    for layer in others:
        kept = [len(keep_list.layers[each].retained) for each in (first, layer)]
        if kept[0] != kept[1]:
            problem = f"layer {first} keeps {kept[0]} experts, layer {layer} {kept[1]}"
            remedy = "keep the same number in every layer, or give --allow-nonuniform"
            raise KeepListError(where, problem, remedy)


def check_keep_list(keep_list: KeepList, facts: RoutingFacts, where: str) -> None:
    """Check that a keep-list made elsewhere suits the model's routing.

    It prunes something, and in every layer it leaves the router enough, every group as many as
    the others. Raises KeepListError, naming `where`.
    """
    if keep_list.num_experts != facts.num_experts:
        problem = f"is for {keep_list.num_experts} experts, the model has {facts.num_experts}"
        raise KeepListError(where, problem, "use a keep-list made for this model")
    if not keep_list.layers:
        raise KeepListError(where, "holds 0 layers")
    if not any(keep.pruned for keep in keep_list.layers.values()):
        problem = f"keeping {facts.num_experts} of {facts.num_experts} experts prunes nothing"
        raise KeepListError(where, problem, f"keep fewer than {facts.num_experts}")
    for layer, keep in sorted(keep_list.layers.items()):
        kept = len(keep.retained)
        place = where if keep_list.is_uniform else f"{where}: layer {layer}"
        check_routing(kept, facts.of_layer(keep.num_experts), place, KeepListError)
        size, quota = keep.num_experts // facts.n_group, kept // facts.n_group
        for group in range(facts.n_group):
            survivors = sum(old // size == group for old in keep.retained)
            if survivors != quota:
                problem = f"layer {layer} keeps {survivors} experts of group {group}, not {quota}"
                raise KeepListError(where, problem, "keep the same number in every group")


@dataclass(frozen=True, slots=True)
class LayerSummary:
    """What a table shows of one layer.

    min_retained and max_pruned: the saliencies at the cut, preserved and unknown ones left out,
    None where nothing is left; under group-limited routing they are over all groups, so the
    first may be the smaller. dropped_share: pruned / all saliency over the known values, None
    where that means nothing (none known, a negative one, all zero). never_routed: experts
    without a saliency that no mark preserves.
    """

    layer: int
    kept: int
    pruned: int
    preserved: int
    min_retained: float | None
    max_pruned: float | None
    dropped_share: float | None
    never_routed: int


def summarize(keep_list: KeepList) -> tuple[LayerSummary, ...]:
    """One summary per layer, in layer order."""
    return tuple(_summary(layer, keep) for layer, keep in sorted(keep_list.layers.items()))


def _select_layer(
    layer: int,
    values: NDArray[np.float64],
    kept: int,
    facts: RoutingFacts,
    preserved: Collection[int],
) -> LayerKeep:
    marked = np.isposinf(values)
    marked[list(preserved)] = True
    rank = np.where(np.isnan(values), -np.inf, values)
    rank[marked] = np.inf
    size, quota = len(values) // facts.n_group, kept // facts.n_group
    keeps = np.zeros(len(values), dtype=bool)
    for group in range(facts.n_group):
        begin = group * size
        count = int(marked[begin : begin + size].sum())
        if count > quota:
            of_group = f" of group {group}" if facts.n_group > 1 else ""
            problem = f"{count} experts{of_group} are preserved, {quota} may be kept"
            raise UsageError(f"layer {layer}", problem, "keep more experts or preserve fewer")
        # A stable sort of the negated ranks puts the lower id first among equals.
        best = np.argsort(-rank[begin : begin + size], kind="stable")[:quota]
        keeps[begin + best] = True
    return LayerKeep(
        retained=tuple(map(int, np.flatnonzero(keeps))),
        pruned=tuple(map(int, np.flatnonzero(~keeps))),
        preserved=tuple(map(int, np.flatnonzero(marked))),
        saliency=tuple(float(value) if np.isfinite(value) else None for value in values),
    )


def _judged(keep: LayerKeep) -> list[int]:
    """The retained experts that stay by their saliency."""
    preserved = frozenset(keep.preserved)
    return [old for old in keep.retained if old not in preserved]


def _rank(keep: LayerKeep, old_id: int) -> float:
    value = keep.saliency[old_id] if keep.saliency is not None else None
    return -math.inf if value is None or math.isnan(value) else value


def _known(keep: LayerKeep, ids: Collection[int]) -> list[float]:
    ranks = (_rank(keep, old) for old in ids)
    return [rank for rank in ranks if math.isfinite(rank)]


def _summary(layer: int, keep: LayerKeep) -> LayerSummary:
    everyone = range(len(keep.saliency or ()))
    unknown = {old for old in everyone if _rank(keep, old) == -math.inf}
    pruned = _known(keep, keep.pruned)
    return LayerSummary(
        layer=layer,
        kept=len(keep.retained),
        pruned=len(keep.pruned),
        preserved=len(keep.preserved),
        min_retained=min(_known(keep, _judged(keep)), default=None),
        max_pruned=max(pruned, default=None),
        dropped_share=_share(pruned, _known(keep, everyone)),
        never_routed=len(unknown.difference(keep.preserved)),
    )


def _share(part: list[float], whole: list[float]) -> float | None:
    top = max(whole, default=0.0)
    if top <= 0 or min(whole) < 0:
        return None
    # Divided by the largest first, so that no sum can overflow.
    total = math.fsum(value / top for value in whole)
    return math.fsum(value / top for value in part) / total


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
