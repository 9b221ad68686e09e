"""Files that no index lists and that are parts of the model all the same.

Heads that predict further tokens are published in files of their own, and not every index lists
them. An engine that the config promises such a head fails without it, so it has to go where the
model goes. Headers alone tell it from what else lies beside a model: adapters, tables of scores,
leftovers of another quantization or of the model before it was pruned.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from shardsurgeon.checkpoint.config import Numbers, counts_no_mtp, read_numbers
from shardsurgeon.checkpoint.roles import Carried, ExpertTensor, NameReader, Surplus
from shardsurgeon.checkpoint.shards import Shard
from shardsurgeon.errors import ConfigError, FamilyError
from shardsurgeon.families.schema import Family
from shardsurgeon.storage.formats.tensor_table import TensorRecord


def forgotten_parts(
    shards: Sequence[Shard], others: Iterable[Shard], family: Family, config: Mapping[str, Any]
) -> list[Shard]:
    """Those of `others` that are parts of the model whose shards are given.

    A file is one where every tensor in it that the model lacks is one that a layer should have:
    of a layer that is lacking altogether, of a kind that other layers have, or of an MTP layer,
    unless the config says that there is none. Nothing is found for a config that cannot be read,
    or does not fit the shards: reading the anatomy says why.
    """
    try:
        model = _Model(shards, family, config, read_numbers(family, config, ""))
    except (ConfigError, FamilyError):
        return []
    return [shard for shard in others if model.lacks(shard)]


class _Model:
    """What the listed shards have of each layer."""

    def __init__(
        self, shards: Sequence[Shard], family: Family, config: Mapping[str, Any], numbers: Numbers
    ) -> None:
        """Raises FamilyError for a tensor that does not fit the config."""
        counts = numbers.num_layers, numbers.experts, numbers.extra_rows
        self._reader = NameReader(family, *counts)
        self._num_layers = numbers.num_layers
        self._last = numbers.num_layers + numbers.mtp_layers
        self._without_mtp = numbers.mtp_layers == 0 and counts_no_mtp(family, config)
        self._names: set[str] = set()
        self._layers: set[int] = set()
        self._kinds: set[str] = set()
        self._mtp_modules: set[str] = set()
        for record in (record for shard in shards for record in shard.header.tensors):
            self._names.add(record.name)
            layer, kind, mtp = self._described(record)
            if layer is not None:
                self._layers.add(layer)
                self._kinds.add(kind)
            if mtp:
                self._mtp_modules.add(_module(record.name))

    def lacks(self, shard: Shard) -> bool:
        """Whether the file has what belongs to the model and is not there, and nothing else."""
        new = [record for record in shard.header.tensors if record.name not in self._names]
        try:
            found = {record.name: self._should_be_there(record) for record in new}
        except FamilyError:
            return False  # of other numbers of experts than the config says
        # What has no two dimensions anywhere is a table about the layers, not a part of them.
        return all(found[record.name] is not False for record in new) and any(
            found[record.name] and len(record.shape) > 1 for record in new
        )

    def _should_be_there(self, record: TensorRecord) -> bool | None:
        """Whether a layer should have it; None where it is of no layer."""
        layer, kind, mtp = self._described(record)
        if mtp:
            if self._without_mtp:
                return False
            if layer is None or layer in self._layers:
                return kind in self._kinds or _module(record.name) not in self._mtp_modules
            # A config that says nothing of MTP layers does not say how many there are.
            counted = self._last > self._num_layers and not self._reader.counts_apart(record.name)
            return layer < self._last or not counted
        if layer is None:
            return None
        return layer not in self._layers or kind in self._kinds

    def _described(self, record: TensorRecord) -> tuple[int | None, str, bool]:
        """(layer, name within it without an expert's number, whether it is of an MTP layer)."""
        role = self._reader.role(record)
        place = self._reader.place(record.name)
        if place is None:
            return None, "", isinstance(role, Carried) and role.mtp
        layer, start = place
        kind = record.name[start:]
        if isinstance(role, ExpertTensor | Surplus):
            if role.expert >= self._reader.experts_of(layer) and isinstance(role, ExpertTensor):
                raise FamilyError(record.name, f"layer {layer} has fewer experts")
            kind = f"{record.name[start : role.begin]}{{}}{record.name[role.end :]}"
        return layer, kind, self._reader.is_mtp(layer)


def _module(name: str) -> str:
    return name.rpartition(".")[0]
