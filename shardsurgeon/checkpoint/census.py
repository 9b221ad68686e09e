"""Every tensor of a checkpoint counted: which layers have experts, and how large these are.

A Census is shown the shards one after the other, then asked. What is not as a model of its family
is (an expert that is missing, a layer without a router) it refuses, by name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardsurgeon.checkpoint.layer_consistency import LayerTensors, check_layers_consistent
from shardsurgeon.checkpoint.roles import (
    Carried,
    ExpertTensor,
    NameReader,
    Role,
    Sliced,
    Surplus,
    Tabled,
)
from shardsurgeon.errors import FamilyError
from shardsurgeon.storage.formats.tensor_table import Column, TensorRecord, TensorTable
from shardsurgeon.storage.limits import MAX_EXPERTS_IN_ALL

# What experts may be called in a layout that no rule knows.
_EXPERTS = re.compile(r"expert|moe|switch|\bw[123]\b", re.IGNORECASE)


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
    expert_nbytes: tuple[int, ...] = field(repr=False)
    router: str

    @property
    def num_experts(self) -> int:
        """How many experts it has."""
        return len(self.expert_nbytes)


class Census:
    """Counts tensors and bytes in two passes, the second over the few that no expert owns.

    The first finds the layers that have experts, adds up the experts' own bytes, and notes which
    of an expert's tensors exist. The second, with the layers known, adds up everything else and
    refuses what no rule claims.
    """

    def __init__(self, location: str, reader: NameReader) -> None:
        self._location = location
        self._reader = reader
        # Layer → part of a name around its expert's number → the experts that have it. No mask of
        # all experts, which a stranger's config may count in ten thousands, for each part.
        self._parts: dict[int, dict[tuple[str, str], list[Column]]] = {}
        self._stored: dict[tuple[str, str], tuple[str, tuple[int, ...]]] = {}
        # Layer → expert beyond those that it should have → the part of one of its names.
        self._beyond: dict[int, dict[int, tuple[str, str]]] = {}
        self.uneven: set[int] = set()
        self.incomplete: dict[int, dict[int, str]] = {}
        self._blocks: dict[int, LayerTensors] = {}
        self._own_nbytes: dict[int, Column] = {}
        self._in_all = 0
        self._others: list[TensorRecord] = []
        self._stacked: set[int] = set()
        self._routers: dict[int, str] = {}
        self._rows: dict[int, int] = {}
        self.behind: set[int] = set()
        self.apart: set[int] = set()
        self.carried = 0
        self.mtp = 0
        self._has_mtp = False

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Layers with experts or a router, ascending."""
        return tuple(sorted({*self._with_experts, *self._stacked, *self._routers}))

    @property
    def _with_experts(self) -> set[int]:
        """Layers whose experts have tensors of their own."""
        return {*self._parts, *self._beyond}

    def see(self, table: TensorTable) -> None:
        """Note the tensors of a shard: the first pass."""
        layer, expert = self._reader.experts(table)
        for place in np.flatnonzero(layer < 0).tolist():
            self._see_other(table[place])
        places = np.flatnonzero(layer >= 0)
        places = places[np.argsort(table.code[places], kind="stable")]
        begins = np.flatnonzero(np.diff(table.code[places], prepend=-1))
        for same in np.split(places, begins[1:]) if len(places) else ():
            self._see_experts(table, int(same[0]), int(layer[same[0]]), expert[same])

    def _see_experts(self, table: TensorTable, place: int, layer: int, experts: Column) -> None:
        """Note one tensor each of some experts; the one at `place` is among them."""
        series = table.series[table.code[place]]
        part = series.head, series.tail
        if layer not in self._parts:
            self._in_all += self._reader.experts_of(layer)
        if self._in_all <= MAX_EXPERTS_IN_ALL:  # else `check` refuses it
            own = self._own_nbytes.setdefault(layer, self._none(layer, np.int64))
            own[experts] += series.nbytes
        stored = series.dtype, series.shape
        if self._stored.setdefault(part, stored) != stored:
            self.uneven.add(layer)
        parts = self._parts.setdefault(layer, {})
        if part not in parts:
            parts[part] = []
            record = table[place]
            self._note(record, self._reader.role(record))
        parts[part].append(experts)

    def _none(self, layer: int, kind: type[np.generic]) -> NDArray[Any]:
        """A value for each expert of a layer: nothing."""
        return np.zeros(self._reader.experts_of(layer), kind)

    def _see_other(self, record: TensorRecord) -> None:
        role = self._reader.role(record)
        if isinstance(role, ExpertTensor):
            part = record.name[: role.begin], record.name[role.end :]
            self._beyond.setdefault(role.layer, {}).setdefault(role.expert, part)
            return
        self._others.append(record)
        if isinstance(role, Sliced) and not role.is_router:
            self._stacked.add(role.layer)
        elif isinstance(role, Sliced) and self._reader.is_router_weight(record):
            self._routers[role.layer] = record.name
        self._note(record, role)

    def _note(self, record: TensorRecord, role: Role) -> None:
        """Remember what a layer's block has, to compare the layers with each other."""
        place = self._reader.place(record.name)
        if place is None:
            return
        layer, start = place
        if self._reader.is_mtp(layer):
            apart = self._reader.counts_apart(record.name)
            (self.apart if apart else self.behind).add(layer)
        block = self._blocks.get(layer)
        if block is None:
            block = self._blocks[layer] = LayerTensors(record.name[:start])
        if isinstance(role, ExpertTensor | Surplus):
            name = f"{record.name[start : role.begin]}{{}}{record.name[role.end :]}"
            block.weights[name] = record.dtype
        elif isinstance(role, Tabled) or (isinstance(role, Sliced) and role.is_router):
            block.routers.add(record.name[start:])
        elif isinstance(role, Sliced) or self._reader.in_block(record.name, start):
            block.weights[record.name[start:]] = record.dtype

    def weigh_others(self) -> None:
        """Add up what no expert owns, and give each expert its rows of stacked tensors."""
        for record in self._others:
            role = self._reader.role(record)
            if isinstance(role, Sliced):
                each = record.nbytes // (record.shape[role.axis] // role.each)
                self._rows[role.layer] = self._rows.get(role.layer, 0) + each
                self._carry(each * role.tail, self._reader.is_mtp(role.layer))
            elif isinstance(role, Carried):
                self._carry(record.nbytes, role.mtp)
            else:
                self._carry(record.nbytes, self._reader.is_mtp(role.layer))

    def absent(self, mtp_layers: int) -> int:
        """How many of so many MTP layers have no tensors, once everything is weighed."""
        present = sum(self._reader.is_mtp(layer) for layer in self._blocks)
        if not present and self._has_mtp:
            return 0  # the family does not number them
        return max(mtp_layers - present, 0)

    def check(self) -> None:
        """Every MoE layer has a router and experts 0..E-1; experts that lack a tensor are noted."""
        if not self._with_experts and not self._stacked:
            raise self._no_experts()
        in_all = sum(map(self._reader.experts_of, self.moe_layers))
        if in_all > MAX_EXPERTS_IN_ALL:
            problem = f"its {len(self.moe_layers):,} layers with experts would have {in_all:,}"
            problem += f", no model has more than {MAX_EXPERTS_IN_ALL:,}"
            raise FamilyError(self._location, problem, "fetch the checkpoint again")
        for layer in self.moe_layers:
            if layer not in self._routers:
                name = self._blocks[layer].prefix + self._router_name()
                problem = f"layer {layer} has experts and no router weight such as {name}"
                raise FamilyError(self._location, problem, "fetch the checkpoint again")
            if layer in self._with_experts:
                self._check_experts(layer)
            elif layer not in self._stacked:
                raise FamilyError(self._location, f"layer {layer} has a router and no experts")

    def _no_experts(self) -> FamilyError:
        """The error for a checkpoint in which no rule finds an expert, dense or not."""
        experts = self._reader.experts_of(0)
        if experts < 2:
            problem = "has no expert tensors: a dense model has none to prune"
            return FamilyError(self._location, problem)
        found = [record.name for record in self._others]
        odd = (name for name in found if _EXPERTS.search(name))
        return FamilyError(
            self._location,
            f"none of its {len(found):,} tensors is one of the {experts} experts per layer that "
            f"config.json counts: looked for {self._reader.expert_name}, and found names such as "
            f"{next(odd, min(found, default='none'))}",
            "fetch the whole model, or declare its names with --family FILE: see 'Adding a family' "
            "in CONTRIBUTING.md",
        )

    def compare(self) -> None:
        """Every MoE layer has the tensors that the others have."""
        blocks = {layer: self._blocks[layer] for layer in self.moe_layers}
        reader = self._reader
        check_layers_consistent(
            blocks, lambda layer: not reader.is_mtp(layer), reader.varies, self._location
        )

    def _router_name(self) -> str:
        """A router's name behind its layer's prefix, taken from another layer where one has it."""
        for layer, name in self._routers.items():
            return name.removeprefix(self._blocks[layer].prefix)
        return self._reader.router_name

    def _check_experts(self, layer: int) -> None:
        parts, beyond = self._parts.get(layer, {}), self._beyond.get(layer, {})
        experts = self._reader.experts_of(layer)
        present = self._none(layer, np.bool_)
        for having in parts.values():
            present[np.concatenate(having)] = True
        missing, surplus = np.flatnonzero(~present).tolist(), sorted(beyond)
        if missing or surplus:
            number = (missing or surplus)[0]
            what = f"lacks expert {number}" if missing else f"has an expert {number}"
            head, tail = next(iter([*parts, *beyond.values()]))
            raise FamilyError(
                self._location,
                f"layer {layer} {what} ({head}{number}{tail}): the config says {experts} experts, "
                f"the shards hold {int(present.sum()) + len(beyond)}",
                "experts must be 0..E-1 without gaps; fetch the checkpoint again",
            )
        whole = present
        for (head, tail), having in parts.items():
            has = self._none(layer, np.bool_)
            has[np.concatenate(having)] = True
            for expert in np.flatnonzero(whole & ~has).tolist():
                self.incomplete.setdefault(layer, {})[expert] = f"{head}{expert}{tail}"
            whole = whole & has
            if not whole.any():
                break

    def layers(self) -> tuple[MoELayer, ...]:
        """The layers found, with the sizes of their experts."""
        return tuple(
            MoELayer(
                index=layer,
                is_mtp=self._reader.is_mtp(layer),
                stacked=layer not in self._with_experts,
                expert_nbytes=self._expert_nbytes(layer),
                router=self._routers[layer],
            )
            for layer in self.moe_layers
        )

    def _expert_nbytes(self, layer: int) -> tuple[int, ...]:
        """Bytes of each expert: its own tensors and its rows of stacked ones."""
        own = self._own_nbytes.get(layer, self._none(layer, np.int64))
        return tuple((own + self._rows.get(layer, 0)).tolist())

    def _carry(self, nbytes: int, mtp: bool) -> None:
        if mtp:
            self._has_mtp = True
            self.mtp += nbytes
        else:
            self.carried += nbytes
