"""Expert ids across prunes: what an earlier prune left, and what it and this one leave together.

Joins the keep-list of a checkpoint with the provenance that the checkpoint carries. The record
always uses the ids of the first, unpruned model, the keep-list those of the checkpoint as it is
now; nothing outside this module translates between the two.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from shardsurgeon.checkpoint.provenance import (
    PROVENANCE_NAME,
    LayerRecord,
    Provenance,
    SourceIdentity,
    Step,
)
from shardsurgeon.errors import CheckpointError, ScoreError
from shardsurgeon.pruning.keep_lists import KeepList, LayerKeep
from shardsurgeon.pruning.plan_model import PlannedModel
from shardsurgeon.pruning.request import SelectionRequest

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_SCORES_DECIDE: Mapping[int, str] = MappingProxyType({})


def survivors(previous: Provenance, layer: int) -> tuple[int, ...]:
    """The original ids of the experts a layer has now, in their present order.

    Raises CheckpointError where the record lacks the layer.
    """
    if layer not in previous.layers:
        known = f"{len(previous.layers)} layers from {min(previous.layers)}"
        known += f" to {max(previous.layers)}"
        problem = f"records {known}, the model has a MoE layer {layer} as well"
        raise CheckpointError(PROVENANCE_NAME, problem)
    return previous.layers[layer].retained


def check_lineage(previous: Provenance | None, counts: Mapping[int, int]) -> None:
    """Check that the record a checkpoint carries is about this checkpoint.

    counts: MoE layer → its experts now. Raises CheckpointError where a layer is missing from the
    record or has another number of experts there.
    """
    if previous is None:
        return
    for layer, num_experts in counts.items():
        left = len(survivors(previous, layer))
        if left != num_experts:
            problem = f"says {left} experts are left in layer {layer}, the model has {num_experts}"
            remedy = "restore the file that belongs to this checkpoint, or move it away"
            raise CheckpointError(PROVENANCE_NAME, problem, remedy)


def restrict(
    values: Mapping[int, NDArray[np.float64]],
    previous: Provenance | None,
    counts: Mapping[int, int],
    where: str,
) -> dict[int, NDArray[np.float64]]:
    """One value per expert the model has now, from values made for it or for the original.

    values: layer → float64 [experts], of the experts now (`counts`: layer → how many) or of the
    original's; layers must be the model's. Raises ScoreError, naming the score file `where`, for
    any other length.
    """
    fitting: dict[int, NDArray[np.float64]] = {}
    for layer, row in values.items():
        original = None if previous is None else previous.layers[layer].num_experts
        if len(row) == counts[layer]:
            fitting[layer] = row
        elif previous is not None and len(row) == original:
            fitting[layer] = row[list(survivors(previous, layer))]
        else:
            has = f"layer {layer} has {len(row)} scores, the model has {counts[layer]} experts"
            if previous is not None:
                has += f" ({original} before it was pruned)"
            raise ScoreError(where, has, "use scores made for this model")
    return fitting


def restrict_ids(
    ids: Mapping[int, Collection[int]], previous: Provenance | None, made_for: Mapping[int, int]
) -> dict[int, tuple[int, ...]]:
    """Present ids of experts found in values for the model as it is now, or for the original.

    ids: layer → what was found; made_for: layer → how many experts the values were for. Used for
    super experts: their threshold needs the original values of all layers, so they are found
    before experts that are gone are left out.
    """
    if previous is None or all(
        len(survivors(previous, layer)) == count for layer, count in made_for.items()
    ):
        return {layer: tuple(sorted(chosen)) for layer, chosen in ids.items()}
    return {
        layer: tuple(new for new, old in enumerate(survivors(previous, layer)) if old in chosen)
        for layer, chosen in ids.items()
    }


def step_of(
    request: SelectionRequest,
    keep_list: KeepList,
    metric: str | None,
    source: SourceIdentity,
    made_for: PlannedModel | None = None,
) -> Step:
    """The record of this prune: the request as it was meant, the counts as they came out.

    metric: the one that decided, None where a keep-list did; source: the checkpoint that is
    pruned; made_for: the other model whose plan was used.
    """
    other = None
    if made_for is not None:
        other = SourceIdentity(made_for.name, None, made_for.config_sha256)
    return Step(
        num_experts_before=keep_list.num_experts,
        num_experts_after=keep_list.most,
        ratio=request.ratio if request.ratio is not None else _removed_share(keep_list),
        rounding=request.effective_rounding,
        metric=metric,
        selection=request.selection,
        source=source,
        saliency_of=other,
    )


def _removed_share(keep_list: KeepList) -> float:
    layers = keep_list.layers.values()
    return sum(len(keep.pruned) for keep in layers) / sum(keep.num_experts for keep in layers)


def compose(
    previous: Provenance | None,
    keep_list: KeepList,
    step: Step,
    n_group: int = 1,
    policies: Mapping[int, str] = _SCORES_DECIDE,
) -> Provenance:
    """The record of the checkpoint that `keep_list` makes.

    previous: the record of the checkpoint that is pruned, None where it is an original;
    keep_list: in ids of that checkpoint; step: of this prune; n_group: the router's groups;
    policies: layer → what decided there, where it was not the scores. Layers that only
    `previous` has (MTP layers dropped since) are left out.
    """
    original = keep_list.num_experts if previous is None else previous.num_experts_before
    layers = {}
    for layer, keep in sorted(keep_list.layers.items()):
        policy = policies.get(layer, "scores")
        if previous is None:
            everyone = tuple(range(keep.num_experts))
            earlier = LayerRecord(everyone, (), (), (None,) * keep.num_experts)
        else:
            survivors(previous, layer)
            earlier = previous.layers[layer]
        layers[layer] = _compose_layer(earlier, keep, policy)
    steps = (step,) if previous is None else (*previous.steps, step)
    return Provenance(original, step.num_experts_after, n_group, layers, steps)


def _compose_layer(earlier: LayerRecord, keep: LayerKeep, policy: str) -> LayerRecord:
    old_ids = earlier.retained
    retained = tuple(old_ids[new_id] for new_id in keep.retained)
    preserved = {old_ids[new_id] for new_id in keep.preserved}
    # An expert preserved in an earlier prune may have less saliency than experts pruned there.
    preserved |= set(earlier.preserved).intersection(retained)
    return LayerRecord(
        retained=retained,
        pruned=tuple(sorted(set(range(earlier.num_experts)).difference(retained))),
        preserved=tuple(sorted(preserved)),
        saliency=_compose_saliency(earlier, keep),
        policy=policy,
    )


def _compose_saliency(earlier: LayerRecord, keep: LayerKeep) -> tuple[float | None, ...]:
    """One saliency per original id.

    Experts pruned earlier keep theirs only where the scores are the same, that is where every
    expert of the checkpoint has the saliency recorded for it: values of two calibrations do not
    compare.
    """
    now = keep.saliency or (None,) * len(earlier.retained)
    present = {
        old_id: None if value is None or not math.isfinite(value) else value
        for old_id, value in zip(earlier.retained, now, strict=True)
    }
    same = all(earlier.saliency[old_id] == value for old_id, value in present.items())
    return tuple(
        present.get(old_id, value if same else None)
        for old_id, value in enumerate(earlier.saliency)
    )
