"""How large the weight files get with so many experts a layer, before anything is chosen."""

from __future__ import annotations

from functools import cached_property

from shardsurgeon.anatomy import Anatomy
from shardsurgeon.checkpoint import Checkpoint
from shardsurgeon.formats.safetensors import TensorRecord
from shardsurgeon.roles import ExpertTensor


class Sizing:
    """Kept count → bytes of the weight files, headers included.

    Never too few: header entries are counted as long as they are in the source, where expert
    ids and offsets are at least as large.
    """

    def __init__(self, checkpoint: Checkpoint, anatomy: Anatomy, *, drop_mtp: bool) -> None:
        self._checkpoint = checkpoint
        self._anatomy = anatomy
        self._drop_mtp = drop_mtp

    def nbytes(self, kept: int) -> int:
        """Bytes of all weight files with `kept` experts in every MoE layer."""
        data = self._anatomy.total_nbytes(kept, drop_mtp=self._drop_mtp)
        headers = sum(shard.header.data_begin for shard in self._checkpoint.shards)
        gone = self._per_expert * (self._anatomy.num_experts - kept) // self._anatomy.num_experts
        return data + headers - gone

    @cached_property
    def _per_expert(self) -> int:
        """Bytes of all header entries of experts' tensors. Few requests ask for a size."""
        return sum(
            _entry_nbytes(record)
            for shard in self._checkpoint.shards
            for record in shard.header.tensors
            if isinstance(self._anatomy.role(record), ExpertTensor)
        )


def _entry_nbytes(record: TensorRecord) -> int:
    """Bytes of a tensor's entry in a compact header."""
    shape = ",".join(map(str, record.shape))
    offsets = f"{record.begin},{record.end}"
    frame = '"":{"dtype":"","shape":[],"data_offsets":[]},'
    return len(frame) + len(record.name) + len(record.dtype) + len(shape) + len(offsets)
