"""`scores show`: what a score file says of each layer, and where the layers could be cut.

What a cut costs is the share of a layer's saliency that goes with the pruned experts.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from shardsurgeon.checkpoint.anatomy import Anatomy
from shardsurgeon.checkpoint.census import MoELayer
from shardsurgeon.checkpoint.checkpoint import Checkpoint
from shardsurgeon.errors import KeepListError, ScoreError, UsageError, VerificationError
from shardsurgeon.pruning.counts import Counts
from shardsurgeon.pruning.keep_lists import KeepList, LayerKeep
from shardsurgeon.pruning.request import MtpPolicy
from shardsurgeon.pruning.routing import RoutingFacts, check_routing, fewest_kept
from shardsurgeon.scores.router_norms import router_scores

# The metric that super experts are found by: the largest output norm seen of each expert.
SUPER_METRIC = "max_activations"

# The numbers of REAP's rule for super experts.
_SUPER_QUANTILE = 0.995
_SUPER_FRACTION_OF_MAXIMUM = 10
_SUPER_SHARE_OF_LAYERS = 0.75

_NONE_PRESERVED: Mapping[int, Collection[int]] = MappingProxyType({})


def select(
    values: Mapping[int, NDArray[np.float64]],
    kept: int | Mapping[int, int],
    facts: RoutingFacts,
    preserved: Mapping[int, Collection[int]] = _NONE_PRESERVED,
) -> KeepList:
    """Keep the `kept` most salient experts of every layer, or kept[layer] of each.

    values: layer → float64 [experts], index = expert id; as long as the layer has experts, at
    most facts.num_experts. The unit is the metric's own, only the order within a layer counts:
    for `reap`, S_j = mean over the tokens routed to expert j of g_j(x) * ||f_j(x)||_2, with the
    router's weight g_j and the expert's output f_j (Lasby et al. 2025). NaN, a never-routed
    expert, counts as the lowest; +inf marks a preserved expert.
    kept: suits the router (`check_routing`). facts: of the largest layers; with n_group > 1
    every group keeps kept / n_group, chosen within the group.
    preserved: layer → further ids that stay whatever their saliency; all preserved experts
    count towards `kept`.

    Among equals the lower id stays, so that the same scores give the same result. In the result
    NaN and +inf stand as None.

    Raises UsageError where more experts are preserved than a layer or a group may keep.
    """
    layers = {}
    for layer in sorted(values):
        count = kept if isinstance(kept, int) else kept[layer]
        layers[layer] = _select_layer(layer, values[layer], count, facts, preserved.get(layer, ()))
    return KeepList(num_experts=facts.num_experts, layers=layers)


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


def super_experts(
    max_activations: Mapping[int, NDArray[np.float64]],
) -> dict[int, tuple[int, ...]]:
    """The experts with extreme activation norms: layer → ascending ids, of layers that have any.

    max_activations: layer → float64 [experts], the largest output norm seen of each expert. An
    expert is one of them if its norm is strictly above

        threshold = max(99.5th percentile, maximum / 10)

    of all layers together (the percentile interpolated linearly), and its layer one of the first
    int(0.75 * layers). The rule is that of the REAP reference code (`get_super_expert_indices` in
    its model_util.py), which however takes the row of a layer by the layer's number, and so
    misses by the number of dense layers before it; here a row is its layer's.

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
    norms = np.concatenate([max_activations[layer] for layer in layers])
    percentile = float(np.quantile(norms, _SUPER_QUANTILE, method="linear"))
    threshold = max(percentile, float(norms.max()) / _SUPER_FRACTION_OF_MAXIMUM)
    considered = layers[: int(len(layers) * _SUPER_SHARE_OF_LAYERS)]
    above = {layer: np.flatnonzero(max_activations[layer] > threshold) for layer in considered}
    return {layer: tuple(map(int, ids)) for layer, ids in above.items() if ids.size}


def with_mtp(
    keep: KeepList,
    checkpoint: Checkpoint,
    anatomy: Anatomy,
    policy: MtpPolicy,
    facts: RoutingFacts,
) -> tuple[KeepList, dict[int, str]]:
    """The keep-list with MTP layers added that have experts and are not in it yet.

    keep: has all main layers. Gives also layer → policy, of the layers added; with
    MtpPolicy.DROP none is. Raises UsageError where the last main layer's choice does not fit
    (MtpPolicy.LAST) or the config has no place for a count of its own (MtpPolicy.KEEP), and what
    `router_scores` raises.
    """
    open_layers = [layer for layer in anatomy.mtp_layers if layer.index not in keep.layers]
    if policy is MtpPolicy.DROP or not open_layers:
        return keep, {}
    main = {layer.index: keep.layers[layer.index] for layer in anatomy.main_layers}
    counts = mtp_counts(anatomy, facts, {n: len(kept.retained) for n, kept in main.items()})
    layers = dict(keep.layers)
    for layer in open_layers:
        if policy is MtpPolicy.KEEP:
            _require_apart(layer, anatomy, counts[layer.index])
            layers[layer.index] = LayerKeep(tuple(range(layer.num_experts)), ())
        elif policy is MtpPolicy.LAST:
            layers[layer.index] = _like(main[max(main)], layer, counts[layer.index], facts)
        else:
            norms = router_scores(checkpoint, [layer])
            layers.update(select(norms, counts, facts).layers)
    policies = {layer.index: str(policy) for layer in open_layers}
    apart = anatomy.apart.intersection(layers)
    return KeepList(keep.num_experts, dict(sorted(layers.items())), apart), policies


def mtp_counts(anatomy: Anatomy, facts: RoutingFacts, main: Counts) -> dict[int, int]:
    """MTP layer → experts that it keeps, from what the main layers keep.

    As many as the main layer that keeps the most, whose count the config says; the same share
    of its experts where an MTP layer has another number of them. Never fewer than its router
    needs, and always whole groups.
    """
    most = max(main.values())
    largest = max(layer.num_experts for layer in anatomy.main_layers)
    counts = {}
    for layer in anatomy.mtp_layers:
        fewest = fewest_kept(facts.of_layer(layer.num_experts))
        count = max(-(-layer.num_experts * most // largest), fewest)
        whole_groups = -(-count // facts.n_group) * facts.n_group
        counts[layer.index] = min(whole_groups, layer.num_experts)
    return counts


def _require_apart(layer: MoELayer, anatomy: Anatomy, shared: int) -> None:
    """Raise UsageError where an MTP layer that keeps all its experts would be built with fewer."""
    if anatomy.shares_count(layer):
        problem = f"keep leaves MTP layer {layer.index} its {layer.num_experts} experts, and this "
        problem += f"config has one count for all layers, of which the others keep {shared}"
        remedy = "give --mtp router-norm, last or drop"
        raise UsageError("--mtp", problem, remedy)


def _like(last: LayerKeep, layer: MoELayer, count: int, facts: RoutingFacts) -> LayerKeep:
    """The choice of the last main layer, widened to `count` experts by its own saliencies.

    Saliencies are left out of the result: they are not the MTP layer's own.
    """
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


def check_order(keep_list: KeepList, facts: RoutingFacts) -> None:
    """Prove from the saliencies that in every layer no pruned expert beats a retained one.

    Preserved experts are left out; an unknown saliency counts as lower than any other. Where
    routing is group-limited the comparison is within each group, because every group keeps the
    same number. Layers without saliencies have nothing to compare. Kept apart from `select`, so
    that a mistake there is found before anything is written.

    Raises VerificationError naming the first layer (and group) where it does not hold.
    """
    for layer, keep in sorted(keep_list.layers.items()):
        if keep.saliency is None:
            continue
        scored = _kept_by_saliency(keep)
        size = keep.num_experts // facts.n_group
        for group in range(facts.n_group):
            ids = range(group * size, (group + 1) * size)
            lowest = min((_rank(keep, old) for old in scored if old in ids), default=math.inf)
            highest = max(
                (_rank(keep, old) for old in keep.pruned if old in ids),
                default=-math.inf,
            )
            if lowest < highest:
                place = f"layer {layer}" + (f", group {group}" if facts.n_group > 1 else "")
                problem = f"a retained expert has saliency {lowest}, a pruned one {highest}"
                raise VerificationError(place, problem)


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


def check_uniform(keep_list: KeepList, where: str, engines: str) -> None:
    """Raise KeepListError, naming `where`, unless one count says how many each layer keeps.

    engines: what stock engines do with such a model.
    """
    if keep_list.is_uniform:
        return
    alone = keep_list.apart
    first, *others = sorted(keep_list.layers, key=lambda layer: (layer in alone, layer)) or [0]
    for layer in others:
        if layer in alone and first not in alone:
            first = layer
        kept = [len(keep_list.layers[each].retained) for each in (first, layer)]
        if kept[0] != kept[1]:
            problem = f"layer {first} keeps {kept[0]} experts, layer {layer} {kept[1]}: {engines}"
            remedy = (
                "keep the same number in every layer, give --allow-nonuniform, or `apply --view`"
            )
            raise KeepListError(where, problem, remedy)


def check_mtp_counts(keep: KeepList, anatomy: Anatomy, where: str) -> None:
    """Raise KeepListError, naming `where`, unless MTP layers fit the count of the config.

    It will say what the main layers keep, and MTP layers without a count of their own are built
    with it. Where main layers differ, it says what the largest layer keeps, and a list in the
    config what each of them does.
    """
    main = {len(keep.layers[layer.index].retained) for layer in anatomy.main_layers}
    others, expected = ("the others", *main) if len(main) == 1 else ("the largest layer", keep.kept)
    for layer in anatomy.mtp_layers:
        kept = keep.layers.get(layer.index)
        if kept is None or len(kept.retained) == expected or not anatomy.shares_count(layer):
            continue
        problem = f"MTP layer {layer.index} keeps {len(kept.retained)} experts, {others} "
        problem += f"{expected}: engines build both with one count, and this config has no other"
        remedy = f"keep {expected} there, leave the layer out of the list, or give --mtp drop"
        raise KeepListError(where, problem, remedy)


def saliency_cut(keep: LayerKeep) -> tuple[float | None, float | None]:
    """The lowest saliency retained and the highest pruned.

    Preserved and unknown ones are left out; None where nothing is left. Under group-limited
    routing they are over all groups, so the first may be the smaller.
    """
    retained = _known(keep, _kept_by_saliency(keep))
    return min(retained, default=None), max(_known(keep, keep.pruned), default=None)


def dropped_share(keep: LayerKeep) -> float | None:
    """The share of the layer's saliency that goes with the pruned experts, 0 to 1.

    Over the known values; None where a share means nothing: none known, a negative one, all 0.
    """
    known = _known(keep, range(len(keep.saliency or ())))
    top = max(known, default=0.0)
    if top <= 0 or min(known) < 0:
        return None
    # Divided by the largest first, so that no sum can overflow.
    total = math.fsum(value / top for value in known)
    return math.fsum(value / top for value in _known(keep, keep.pruned)) / total


def _kept_by_saliency(keep: LayerKeep) -> list[int]:
    """The retained experts that are not preserved."""
    preserved = frozenset(keep.preserved)
    return [old for old in keep.retained if old not in preserved]


def _rank(keep: LayerKeep, old_id: int) -> float:
    """The saliency as a number to compare; -inf where it is unknown."""
    value = keep.saliency[old_id] if keep.saliency is not None else None
    return -math.inf if value is None or math.isnan(value) else value


def _known(keep: LayerKeep, ids: Collection[int]) -> list[float]:
    """The saliencies of the ids that have one."""
    ranks = (_rank(keep, old) for old in ids)
    return [rank for rank in ranks if math.isfinite(rank)]
