"""How large the weight files get with so many experts a layer, before anything is chosen."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

from shardsurgeon.checkpoint.anatomy import Anatomy
from shardsurgeon.checkpoint.checkpoint import Checkpoint
from shardsurgeon.checkpoint.roles import ExpertTensor
from shardsurgeon.storage.formats.safetensors import TensorRecord


class Sizing:
    """Kept count → bytes of the weight files, headers included.

    Never too few: header entries are counted as long as they are in the source, where expert
    ids and offsets are at least as large.
    """

    def __init__(self, checkpoint: Checkpoint, anatomy: Anatomy, *, drop_mtp: bool) -> None:
        self._checkpoint = checkpoint
        self._anatomy = anatomy
        self._drop_mtp = drop_mtp

    @cached_property
    def _entries(self) -> dict[int, int]:
        """Layer → bytes of its experts' header entries. A look at every tensor: not for nothing."""
        entries = dict.fromkeys(self._anatomy.experts_per_layer, 0)
        for shard in self._checkpoint.shards:
            for record in shard.header.tensors:
                role = self._anatomy.role(record)
                if isinstance(role, ExpertTensor):
                    entries[role.layer] += _entry_nbytes(record)
        return entries

    def nbytes(self, kept: int | Mapping[int, int]) -> int:
        """Bytes of all weight files with `kept` experts in every MoE layer, or kept[layer]."""
        data = self._anatomy.total_nbytes(kept, drop_mtp=self._drop_mtp)
        headers = sum(shard.header.data_begin for shard in self._checkpoint.shards)
        others = headers - sum(self._entries.values())
        entries = 0
        for layer in self._anatomy.layers:
            whole = self._entries[layer.index]
            count = kept if isinstance(kept, int) else kept.get(layer.index, layer.num_experts)
            entries += -(-whole * min(count, layer.num_experts) // layer.num_experts)
        return data + others + entries


def _entry_nbytes(record: TensorRecord) -> int:
    """Bytes of a tensor's entry in a compact header."""
    shape = ",".join(map(str, record.shape))
    offsets = f"{record.begin},{record.end}"
    frame = '"":{"dtype":"","shape":[],"data_offsets":[]},'
    return len(frame) + len(record.name) + len(record.dtype) + len(shape) + len(offsets)
