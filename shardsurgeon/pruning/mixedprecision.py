"""Layers whose experts are not all stored or quantized alike: what a user must be told.

Engines read how a layer's experts are quantized from one of them and take it for all (vLLM
from expert 0), and pruning can make another expert number 0. Pure: headers, config and
keep-lists in, notes for the report out.
"""

from __future__ import annotations

from collections.abc import Iterable

from shardsurgeon.checkpoint.anatomy import Anatomy
from shardsurgeon.checkpoint.checkpoint import Checkpoint
from shardsurgeon.checkpoint.roles import ExpertTensor
from shardsurgeon.pruning.keeplists import KeepList
from shardsurgeon.pruning.modelconfig import partial_lists

# Rest of an expert tensor's name, dtype and shape.
_Kind = tuple[str, str, tuple[int, ...]]


def mixed_precision_notes(checkpoint: Checkpoint, anatomy: Anatomy, keep: KeepList) -> list[str]:
    """One note per layer whose survivors differ in dtype or shape, and per list that names some
    of a layer's survivors only. Raises ConfigError as `modelconfig.pruned_config` does.
    """
    kinds = _kinds(checkpoint, anatomy, keep)
    layers = [_note(layer, kinds[layer], keep.layers[layer].retained) for layer in sorted(kinds)]
    return [*filter(None, layers), *partial_lists(checkpoint, anatomy, keep)]


def _kinds(
    checkpoint: Checkpoint, anatomy: Anatomy, keep: KeepList
) -> dict[int, dict[_Kind, set[int]]]:
    """Uneven layer → how its survivors' tensors are stored → the survivors stored so."""
    found: dict[int, dict[_Kind, set[int]]] = {}
    survivors = {
        layer: set(keep.layers[layer].retained) for layer in anatomy.uneven & {*keep.layers}
    }
    if not survivors:
        return found
    for shard in checkpoint.shards:
        for record in shard.header.tensors:
            role = anatomy.role(record)
            if isinstance(role, ExpertTensor) and role.expert in survivors.get(role.layer, ()):
                kind = record.name[role.end :], record.dtype, record.shape
                found.setdefault(role.layer, {}).setdefault(kind, set()).add(role.expert)
    return found


def _note(layer: int, kinds: dict[_Kind, set[int]], retained: Iterable[int]) -> str:
    """A note if not every survivor has every kind of tensor, else ""."""
    retained = tuple(retained)
    uneven = [kind for kind, experts in kinds.items() if len(experts) < len(retained)]
    if not uneven:
        return ""
    (rest, dtype, shape) = next((k for k in uneven if retained[0] in kinds[k]), uneven[0])
    alike = len(kinds[rest, dtype, shape])
    return (
        f"the survivors of layer {layer} are not stored alike: {rest.lstrip('.')} is {dtype} "
        f"{list(shape)} in {alike} of {len(retained)}; engines read a layer's quantization from "
        f"its expert 0, which was {retained[0]}"
    )
