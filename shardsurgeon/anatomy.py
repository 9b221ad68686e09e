"""Which tensor is what: a checkpoint read with the eyes of its family.

Takes a Checkpoint, gives an Anatomy: the MoE layers with their experts' sizes, the routing
facts, and `role`, which says of any tensor what removing experts does to it. Everything in an
MoE block is claimed by a rule of the family or refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from shardsurgeon.checkpoint import CONFIG_NAME, Checkpoint, config_section
from shardsurgeon.errors import ConfigError, FamilyError
from shardsurgeon.families.schema import Family, family_for
from shardsurgeon.formats.safetensors import TensorRecord
from shardsurgeon.roles import Carried, Counted, ExpertTensor, NameReader, Role, Sliced, Tabled


@dataclass(frozen=True, slots=True)
class MoELayer:
    """One layer with experts.

    index: its number; MTP layer j is num_hidden_layers + j, however its tensors are named.
    expert_nbytes: bytes of each expert's own tensors and slices, by expert id.
    router: name of the router weight.
    """

    index: int
    is_mtp: bool
    stacked: bool
    expert_nbytes: tuple[int, ...]
    router: str


@dataclass(frozen=True)
class Anatomy:
    """A checkpoint's layers, experts and routing.

    layers: ascending by index, MTP layers last. mtp_nbytes: bytes that go when the MTP layers
    go. num_layers: decoder layers without MTP.
    """

    family: Family
    layers: tuple[MoELayer, ...]
    num_layers: int
    num_experts: int
    top_k: int
    n_group: int
    topk_group: int
    num_mtp_layers: int
    carried_nbytes: int
    mtp_nbytes: int
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
    def layout(self) -> str:
        """`stacked` or `per-expert`, as most layers are."""
        stacked = sum(layer.stacked for layer in self.layers)
        return "stacked" if 2 * stacked > len(self.layers) else "per-expert"

    @property
    def expert_nbytes(self) -> int:
        """Bytes of one expert of one layer: the largest there is."""
        return max(max(layer.expert_nbytes) for layer in self.layers)

    def role(self, record: TensorRecord) -> Role:
        """What removing experts does to a tensor. Raises FamilyError where no rule claims it."""
        return self.reader.role(record)

    def total_nbytes(self, kept: int, *, drop_mtp: bool = False) -> int:
        """Bytes of tensor data with `kept` experts a layer, at most.

        Exact where a layer's experts are of one size; else it counts the largest ones.
        """
        nbytes = self.carried_nbytes + (0 if drop_mtp else self.mtp_nbytes)
        for layer in self.layers:
            if not (drop_mtp and layer.is_mtp):
                nbytes += sum(sorted(layer.expert_nbytes, reverse=True)[:kept])
        return nbytes


def read_anatomy(checkpoint: Checkpoint) -> Anatomy:
    """Read a checkpoint's layers and experts.

    Raises FamilyError where the family is unknown, the model is dense, an expert or a tensor
    is missing, or a tensor in an MoE block is claimed by no rule; ConfigError where
    config.json lacks a count or contradicts the tensors.
    """
    where = f"{checkpoint.location}/{CONFIG_NAME}"
    config = checkpoint.settings
    family = family_for(config, where)
    if family.refusal:
        raise FamilyError(where, f"{config.get('model_type')}: {family.refusal}")
    numbers = _Numbers.read(family, config, where)
    reader = NameReader(family, numbers.num_layers, numbers.num_experts, numbers.extra_rows)
    census = _Census(checkpoint.location, numbers.num_experts)
    records = (record for shard in checkpoint.shards for record in shard.header.tensors)
    others = [record for record in records if not census.see(reader, record)]
    census.check()
    reader.settle(census.moe_layers)
    for record in others:
        census.weigh(reader, record)
    return Anatomy(
        family=family,
        layers=census.layers(reader),
        num_layers=numbers.num_layers,
        num_experts=numbers.num_experts,
        top_k=numbers.top_k,
        n_group=numbers.n_group,
        topk_group=numbers.topk_group,
        num_mtp_layers=numbers.mtp_layers,
        carried_nbytes=census.carried,
        mtp_nbytes=census.mtp,
        reader=reader,
    )


@dataclass(frozen=True, slots=True)
class _Numbers:
    """What config.json says, every spelling considered."""

    num_layers: int
    num_experts: int
    top_k: int
    n_group: int
    topk_group: int
    mtp_layers: int
    extra_rows: int

    @classmethod
    def read(cls, family: Family, config: Mapping[str, Any], where: str) -> _Numbers:
        keys = family.config
        sections = [s for s in (config_section(config, at) for at in keys.at) if s is not None]
        section = next((s for s in sections if any(key in s for key in keys.num_experts)), None)
        if section is None:
            raise ConfigError(
                where,
                f"has no expert count ({' or '.join(keys.num_experts)})",
                "a dense model has no experts to prune",
            )

        def number(names: tuple[str, ...], default: int | None) -> int:
            return _number(section, names, default, where)

        num_experts = number(keys.num_experts, None)
        for name in keys.num_experts:
            said = _whole(section.get(name))
            if said and set(said) != {num_experts}:
                problem = f"says {num_experts} and {section[name]} experts ({name})"
                raise ConfigError(where, problem, "make the spellings agree")
        n_group = max(number(keys.n_group, 1), 1)
        return cls(
            num_layers=number(keys.num_layers, None),
            num_experts=num_experts,
            top_k=number(keys.top_k, None),
            n_group=n_group,
            topk_group=max(number(keys.topk_group, n_group), 1),
            mtp_layers=number(keys.mtp_layers, 0),
            extra_rows=number((keys.extra_rows,), 0) if keys.extra_rows else 0,
        )


def _number(
    section: Mapping[str, Any], names: tuple[str, ...], default: int | None, where: str
) -> int:
    for name in names:
        value = section.get(name)
        if value is None:
            continue
        numbers = _whole(value)
        if not numbers or min(numbers) < 0:
            raise ConfigError(where, f"{name} is {value!r}, expected a whole number")
        return max(numbers)
    if default is None:
        raise ConfigError(where, f"has no {' or '.join(names)}")
    return default


def _whole(value: object) -> list[int]:
    """A whole number, or a list of them (one per layer), as a list; else nothing."""
    numbers = value if isinstance(value, list) else [value]
    return [n for n in numbers if type(n) is int] if all(type(n) is int for n in numbers) else []


class _Census:
    """Counts what is there, in two passes.

    The first pass finds the layers that have experts and which of an expert's tensors exist,
    and weighs these; the second, with those layers known, weighs the few other tensors and
    refuses what no rule claims.
    """

    def __init__(self, location: str, num_experts: int) -> None:
        self._location = location
        self._num_experts = num_experts
        self._parts: dict[str, int] = {}
        self._experts: dict[int, dict[int, int]] = {}
        self._stacked: set[int] = set()
        self._routers: dict[int, str] = {}
        self._nbytes: dict[int, list[int]] = {}
        self.carried = 0
        self.mtp = 0

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Layers with experts or a router, ascending."""
        return tuple(sorted({*self._experts, *self._stacked, *self._routers}))

    def see(self, reader: NameReader, record: TensorRecord) -> bool:
        """First pass: who is there. True for a tensor of one expert: it needs no second look."""
        role = reader.role(record)
        if isinstance(role, ExpertTensor):
            # The same for every expert of the layer; told apart by one bit each.
            part = f"{record.name[: role.begin]}{{}}{record.name[role.end :]}"
            bit = 1 << self._parts.setdefault(part, len(self._parts))
            layer = self._experts.setdefault(role.layer, {})
            layer[role.expert] = layer.get(role.expert, 0) | bit
            if role.expert < self._num_experts:  # any other is refused by `check`
                self._row(role.layer)[role.expert] += record.nbytes
            return True
        if isinstance(role, Sliced) and not role.is_router:
            self._stacked.add(role.layer)
        elif isinstance(role, Sliced) and reader.is_router_weight(record):
            self._routers[role.layer] = record.name
        return False

    def weigh(self, reader: NameReader, record: TensorRecord) -> None:
        """Second pass: what the others weigh."""
        role = reader.role(record)
        if isinstance(role, Sliced):
            row = self._row(role.layer)
            each = record.nbytes // record.shape[role.axis]
            row[:] = [nbytes + each for nbytes in row]
            self._carry(each * role.tail, reader.is_mtp(role.layer))
        elif isinstance(role, Counted | Tabled):
            self._carry(record.nbytes, reader.is_mtp(role.layer))
        elif isinstance(role, Carried):
            self._carry(record.nbytes, role.mtp)

    def check(self) -> None:
        """Every MoE layer has a router and experts 0..E-1 with the same tensors each."""
        if not self._experts and not self._stacked:
            raise FamilyError(
                self._location, "has no expert tensors: a dense model has none to prune"
            )
        for layer in self.moe_layers:
            if layer not in self._routers:
                raise FamilyError(self._location, f"layer {layer} has experts and no router weight")
            if layer in self._experts:
                self._check_experts(layer)
            elif layer not in self._stacked:
                raise FamilyError(self._location, f"layer {layer} has a router and no experts")

    def _check_experts(self, layer: int) -> None:
        masks = self._experts[layer]
        missing = sorted(set(range(self._num_experts)) - set(masks))
        surplus = sorted(set(masks) - set(range(self._num_experts)))
        if missing or surplus:
            what = f"lacks expert {missing[0]}" if missing else f"has an expert {surplus[0]}"
            raise FamilyError(
                self._location,
                f"layer {layer} {what}: the config says {self._num_experts} experts, "
                f"the shards hold {len(masks)}",
                "experts must be 0..E-1 without gaps; fetch the checkpoint again",
            )
        full = 0
        for mask in masks.values():
            full |= mask
        for expert, mask in sorted(masks.items()):
            if mask != full:
                part = next(p for p, bit in self._parts.items() if (full & ~mask) >> bit & 1)
                raise FamilyError(
                    self._location,
                    f"tensor {part.format(expert)} is missing",
                    "every expert needs the same tensors; fetch the checkpoint again",
                )

    def layers(self, reader: NameReader) -> tuple[MoELayer, ...]:
        """The layers found, weighed."""
        return tuple(
            MoELayer(
                index=layer,
                is_mtp=reader.is_mtp(layer),
                stacked=layer not in self._experts,
                expert_nbytes=tuple(self._nbytes[layer]),
                router=self._routers[layer],
            )
            for layer in self.moe_layers
        )

    def _row(self, layer: int) -> list[int]:
        return self._nbytes.setdefault(layer, [0] * self._num_experts)

    def _carry(self, nbytes: int, mtp: bool) -> None:
        if mtp:
            self.mtp += nbytes
        else:
            self.carried += nbytes
