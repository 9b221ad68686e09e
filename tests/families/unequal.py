"""The config of a fixture whose layers keep different numbers of experts, or the same."""

from __future__ import annotations

import json
from typing import Any

from shardsurgeon.checkpoint.anatomy import read_anatomy
from shardsurgeon.pruning.config_edits import pruned_config
from shardsurgeon.pruning.keep_lists import KeepList, LayerKeep
from tests.families.specimens import specimen


def pruned_config_of(name: str, *, unequal: bool) -> dict[str, Any]:
    """The fixture's config after a prune of its first MoE layer, or of all layers alike."""
    checkpoint = specimen(name).checkpoint()
    anatomy = read_anatomy(checkpoint)
    first = anatomy.main_layers[0].index
    keeps = {}
    for layer in anatomy.layers:
        ids = range(layer.num_experts)
        # One expert of every group goes.
        size = layer.num_experts // anatomy.n_group
        gone = [n for n in ids if n % size == 0] if layer.index == first or not unequal else []
        keeps[layer.index] = LayerKeep(tuple(n for n in ids if n not in gone), tuple(gone))
    keep = KeepList(anatomy.num_experts, keeps)
    config: dict[str, Any] = json.loads(pruned_config(checkpoint, anatomy, keep, drop_mtp=False))
    return config
