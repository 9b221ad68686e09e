"""Which tensor is what: a checkpoint read by the declaration of its family.

`read_anatomy` makes an Anatomy of a Checkpoint: the MoE layers with their experts' sizes, the
routing numbers, and `role`, which says what removing experts does to a tensor. Every tensor in an
MoE block is claimed by a rule of the family, or refused by name.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from shardsurgeon.checkpoint.census import Census, MoELayer
from shardsurgeon.checkpoint.checkpoint import Checkpoint
from shardsurgeon.checkpoint.config import Numbers, published_list, read_numbers
from shardsurgeon.checkpoint.layer_consistency import Incomplete
from shardsurgeon.checkpoint.roles import NameReader, Role
from shardsurgeon.errors import ConfigError, FamilyError
from shardsurgeon.families.schema import Family, family_for
from shardsurgeon.storage.formats.tensor_table import TensorRecord


@dataclass(frozen=True)
class Anatomy:
    """A checkpoint's layers, experts and routing.

    layers: ascending by index, MTP layers last. carried_nbytes: bytes outside of experts and MTP
    layers; mtp_nbytes: bytes outside of experts that are removed with the MTP layers. num_layers:
    decoder layers without MTP. num_mtp_layers: as the config counts them; absent_mtp_layers: how
    many of these have no tensors. num_experts: of the largest layers. shared_count: the count that
    the config gives for all layers; own_mtp_count: whether it gives the MTP layers another one.
    uneven: layers whose experts differ in dtype or shape. incomplete: experts that lack a tensor
    which others of their layer have; such an expert can be pruned, not kept.
    """

    family: Family
    layers: tuple[MoELayer, ...]
    num_layers: int
    num_experts: int
    top_k: int
    n_group: int
    topk_group: int
    num_mtp_layers: int
    absent_mtp_layers: int
    carried_nbytes: int
    mtp_nbytes: int
    shared_count: int
    own_mtp_count: bool
    uneven: frozenset[int]
    incomplete: Incomplete
    reader: NameReader = field(repr=False)

    @property
    def main_layers(self) -> tuple[MoELayer, ...]:
        """The MoE layers of the main model."""
        return tuple(layer for layer in self.layers if not layer.is_mtp)

    @property
    def mtp_layers(self) -> tuple[MoELayer, ...]:
        """The MoE layers that predict tokens further ahead."""
        return tuple(layer for layer in self.layers if layer.is_mtp)

    @property
    def experts_per_layer(self) -> dict[int, int]:
        """MoE layer → its experts."""
        return {layer.index: layer.num_experts for layer in self.layers}

    @property
    def apart(self) -> frozenset[int]:
        """The MTP layers, where the config says of them alone how many experts they have."""
        return frozenset(layer.index for layer in self.mtp_layers if self.own_mtp_count)

    def is_uniform(self, left: Mapping[int, int]) -> bool:
        """Whether one count, and one for the MTP layers where the config has that, says it all.

        left: MoE layer → its experts.
        """
        counts = {(layer in self.apart, count) for layer, count in left.items()}
        return len(counts) == len({apart for apart, _ in counts})

    def shares_count(self, layer: MoELayer) -> bool:
        """Whether engines build a layer with the count that the config says of all layers."""
        return layer.index not in self.apart and layer.num_experts == self.shared_count

    @property
    def layout(self) -> str:
        """`stacked` or `per-expert`, as most layers are."""
        stacked = sum(layer.stacked for layer in self.layers)
        return "stacked" if 2 * stacked > len(self.layers) else "per-expert"

    @property
    def expert_nbytes(self) -> tuple[int, int]:
        """Bytes of the smallest and of the largest expert of any layer."""
        sizes = [nbytes for layer in self.layers for nbytes in layer.expert_nbytes]
        return min(sizes), max(sizes)

    @property
    def expert_nbytes_over_layers(self) -> tuple[int, int]:
        """Bytes of one expert of every layer, of the smallest ones and of the largest ones."""
        sizes = [layer.expert_nbytes for layer in self.layers]
        return sum(map(min, sizes)), sum(map(max, sizes))

    def role(self, record: TensorRecord) -> Role:
        """What removing experts does to a tensor. Raises FamilyError where no rule claims it."""
        return self.reader.role(record)

    def total_nbytes(self, kept: int | Mapping[int, int], *, drop_mtp: bool = False) -> int:
        """Bytes of tensor data that `kept` experts per layer, or kept[layer], make at most.

        Exact where the experts of a layer have one size; otherwise the largest ones are counted.
        """
        nbytes = self.carried_nbytes + (0 if drop_mtp else self.mtp_nbytes)
        for layer in self.layers:
            if not (drop_mtp and layer.is_mtp):
                count = kept if isinstance(kept, int) else kept[layer.index]
                nbytes += sum(sorted(layer.expert_nbytes, reverse=True)[:count])
        return nbytes


def read_anatomy(checkpoint: Checkpoint) -> Anatomy:
    """Read a checkpoint's layers and experts.

    Raises FamilyError where the family is unknown, the model is dense, an expert or a layer's
    tensor is missing, or a tensor in an MoE block is claimed by no rule; ConfigError where
    config.json lacks a count or contradicts the tensors.
    """
    where = checkpoint.config_place
    config = checkpoint.settings
    # One name of each series: no rule tells two numbers of an expert apart.
    names = [each.name for table in checkpoint.tables for each in table.examples()]
    family = checkpoint.family or family_for(config, where, names)
    if family.refusal:
        raise FamilyError(where, f"{config.get('model_type')}: {family.refusal}")
    numbers = read_numbers(family, config, where)
    reader = NameReader(family, numbers.num_layers, numbers.experts, numbers.extra_rows, names)
    census = Census(checkpoint.location, reader)
    for table in checkpoint.tables:
        census.see(table)
    # A family may have both spellings; a checkpoint has its MTP layers under one.
    numbered_on = bool(family.config.mtp_layers) and not census.apart
    _require_known_layers(census.behind, numbers, numbered_on, where)
    census.check()
    reader.settle(census.moe_layers)
    census.weigh_others()
    census.compare()
    layers = census.layers()
    own_mtp = numbers.own_mtp_count
    most = max(layer.num_experts for layer in layers if not (layer.is_mtp and own_mtp))
    every = numbers.experts.every
    # Beside another tool's list the count may be that of the model before it was pruned.
    if most != every and not (most < every and published_list(family, config)):
        problem = f"says {every} experts, the largest layers have {most}"
        raise ConfigError(where, problem, "make the spellings agree")
    return Anatomy(
        family=family,
        layers=layers,
        num_layers=numbers.num_layers,
        num_experts=max(layer.num_experts for layer in layers),
        top_k=numbers.top_k,
        n_group=numbers.n_group,
        topk_group=numbers.topk_group,
        num_mtp_layers=numbers.mtp_layers,
        absent_mtp_layers=census.absent(numbers.mtp_layers),
        carried_nbytes=census.carried,
        mtp_nbytes=census.mtp,
        reader=reader,
        shared_count=every,
        own_mtp_count=own_mtp,
        uneven=frozenset(census.uneven),
        incomplete=census.incomplete,
    )


def _require_known_layers(
    behind: Collection[int], numbers: Numbers, numbered_on: bool, where: str
) -> None:
    """Raise ConfigError where the shards have more layers than the config says.

    behind: those numbered behind num_layers, which would be taken for MTP layers; numbered_on:
    whether MTP layers are numbered so here. A config may be silent about a single one.
    """
    if len(behind) > (max(numbers.mtp_layers, 1) if numbered_on else 0):
        problem = f"says {numbers.num_layers} layers and {numbers.mtp_layers} MTP layers, the "
        problem += f"shards have a layer {max(behind)}"
        raise ConfigError(where, problem, "fetch the config and the shards from one revision")
