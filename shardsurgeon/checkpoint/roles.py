"""What a tensor's name means: a family's rules, compiled for one checkpoint's numbers.

`anatomy` asks for the role of every tensor. The planner and the verifier ask again instead of
keeping the answers: a large model has 200,000 tensors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from shardsurgeon.checkpoint.layouts import is_companion, with_other_layouts
from shardsurgeon.errors import FamilyError
from shardsurgeon.families.schema import Family, Rule
from shardsurgeon.families.templates import pattern
from shardsurgeon.storage.formats.tensor_table import (
    Column,
    Series,
    TensorRecord,
    TensorTable,
    split_name,
)


@dataclass(frozen=True, slots=True)
class Carried:
    """A tensor that is copied whole. mtp: whether it is removed with the MTP layers."""

    mtp: bool = False


class ExpertTensor(NamedTuple):
    """A tensor of one expert. begin, end: the span of its number in the name."""

    layer: int
    expert: int
    begin: int
    end: int

    def renamed(self, name: str, expert: int) -> str:
        """The tensor's name with another expert number."""
        return f"{name[: self.begin]}{expert}{name[self.end :]}"


@dataclass(frozen=True, slots=True)
class Sliced:
    """A tensor with an expert axis.

    tail: rows behind the experts' own, kept as they are; each: rows of one expert, side by side.
    """

    layer: int
    axis: int
    tail: int
    is_router: bool
    each: int = 1


@dataclass(frozen=True, slots=True)
class Counted:
    """An integer tensor whose first element is the number of experts."""

    layer: int


@dataclass(frozen=True, slots=True)
class Tabled:
    """An integer table whose values are expert ids."""

    layer: int


@dataclass(frozen=True, slots=True)
class Surplus:
    """A tensor of an identity expert, which computes nothing.

    transformers re-saves such tensors and reads no checkpoint of its own without them, so they
    stay and get the numbers after the experts that are left. begin, end: as in ExpertTensor.
    """

    layer: int
    expert: int
    begin: int
    end: int

    def renamed(self, name: str, expert: int) -> str:
        """The tensor's name with another expert number."""
        return f"{name[: self.begin]}{expert}{name[self.end :]}"


# Types in which a tensor may hold the number of experts → how numpy names them.
COUNT_TYPES = {"I32": "<i4", "I64": "<i8", "U32": "<u4", "U64": "<u8"}
_INTEGERS = ("I32", "I64")

Role = Carried | ExpertTensor | Sliced | Counted | Tabled | Surplus


@dataclass(frozen=True, slots=True)
class ExpertCounts:
    """How many experts a config says its layers have.

    every: of all layers without a count of their own; per_layer: layer → its own count; mtp: of
    MTP layers without one.
    """

    every: int
    per_layer: Mapping[int, int]
    mtp: int


# Beginnings and ends of names that are remembered: a model of 200,000 tensors has some thousands.
_MOST_KNOWN = 100_000


class NameReader:
    """A family's rules, compiled for one checkpoint's numbers."""

    def __init__(
        self,
        family: Family,
        num_layers: int,
        counts: ExpertCounts,
        tail: int,
        tensors: Iterable[str] = (),
    ) -> None:
        """tensors: the checkpoint's names, which tell who wrote it."""
        names = with_other_layouts(family.tensors, tensors)
        self._family = family
        self._num_layers = num_layers
        self._expert_counts = counts
        self._tail = tail
        self._main = _any(prefix + "." for prefix in names.layers)
        self._mtp = _any(prefix + "." for prefix in names.mtp)
        self._mtp_others = _any(names.mtp_others)
        self._blocks = _any([*names.blocks, *(f"{block}.*" for block in names.blocks)])
        self._experts = _rules(names.experts)
        self._stacked = _rules(names.stacked)
        self._routers = _rules(names.routers)
        self._shared = _rules(names.shared)
        self._counts = _rules(names.expert_counts)
        self._ids = _rules(names.expert_ids)
        self._beside = _any(names.beside)
        self._elsewhere = _any(names.elsewhere)
        self._varies = _any(names.varies)
        self._moe_layers: frozenset[int] | None = None
        # (head, tail) of a series → what `layer_of` says of it.
        self._layers: dict[tuple[str, str], int | None] = {}

    def settle(self, moe_layers: Iterable[int]) -> None:
        """Say which layers have experts; from then on `role` refuses what no rule claims there."""
        self._moe_layers = frozenset(moe_layers)

    def place(self, name: str) -> tuple[int, int] | None:
        """(layer number, length of its prefix) of a layer's tensor; None for any other."""
        if match := self._main.match(name):
            return _layer_number(match), match.end()
        if match := self._mtp.match(name):
            return self._num_layers + _layer_number(match), match.end()
        return None

    def experts_of(self, layer: int) -> int:
        """How many experts a layer has, if it has any."""
        counts = self._expert_counts
        return counts.per_layer.get(layer, counts.mtp if self.is_mtp(layer) else counts.every)

    def is_mtp(self, layer: int) -> bool:
        """Whether a layer number belongs to an MTP layer."""
        return layer >= self._num_layers

    def counts_apart(self, name: str) -> bool:
        """Whether a layer's tensor is of an MTP layer whose number counts from 0 on its own."""
        return self._main.match(name) is None

    @property
    def router_name(self) -> str:
        """The name of the router's matrix in this family, behind a layer's prefix."""
        return self._family.tensors.routers[0].name

    @property
    def expert_name(self) -> str:
        """A name of an expert's tensor in this family, its layer's prefix included."""
        names = self._family.tensors
        return f"{names.layers[0]}.{(*names.experts, *names.stacked)[0].name}"

    def in_block(self, name: str, start: int) -> bool:
        """Whether a layer's tensor, its prefix `start` characters long, is in the MoE block."""
        return self._blocks.fullmatch(name, start) is not None

    def varies(self, rest: str) -> bool:
        """Whether only some MoE layers have the tensor; rest: its name behind the prefix."""
        return self._varies.fullmatch(rest) is not None

    def is_elsewhere(self, name: str) -> bool:
        """Whether a name outside the layers is known to belong to experts that are not pruned."""
        return self._elsewhere.fullmatch(name) is not None

    def is_router_weight(self, record: TensorRecord) -> bool:
        """Whether the tensor is the router's matrix, one row per expert."""
        place = self.place(record.name)
        if place is None or is_companion(record.name):
            return False
        return any(
            rule.axis == 0 and len(record.shape) == 2 and regex.fullmatch(record.name, place[1])
            for regex, rule in self._routers
        )

    def role(self, record: TensorRecord) -> Role:
        """What removing experts does to a tensor. Raises FamilyError where no rule claims it."""
        name = record.name
        head, number, tail = split_name(name)
        own = self._layer_of(head, tail)
        if own is not None and number < self.experts_of(own):
            return ExpertTensor(own, number, len(head), len(name) - len(tail))
        place = self.place(name)
        if place is None:
            return self._outside(name)
        layer, start = place
        for regex, _ in self._experts:
            if match := regex.fullmatch(name, start):
                expert = int(match["expert"])
                if 0 <= expert - self.experts_of(layer) < self._tail:
                    return Surplus(layer, expert, *match.span("expert"))
                return ExpertTensor(layer, expert, *match.span("expert"))
        for regex, _ in self._counts:
            if regex.fullmatch(name, start) and record.shape != () and math.prod(record.shape) > 2:
                return _counted(record, layer)
        for regex, _ in self._ids:
            if regex.fullmatch(name, start):
                return Tabled(layer)
        for regex, rule in self._stacked:
            if regex.fullmatch(name, start):
                return self._stacked_role(record, layer, rule)
        for regex, rule in self._routers:
            if regex.fullmatch(name, start):
                return self._sliced(record, layer, rule, is_router=True)
        return self._unclaimed(record, layer, start)

    def layer_of(self, series: Series) -> int | None:
        """The layer whose experts have one tensor each in a series, its number the expert's; None
        for every other series."""
        return self._layer_of(series.head, series.tail)

    def _layer_of(self, head: str, tail: str) -> int | None:
        """Looked up: a large model has 200,000 tensors and a few thousand such names."""
        if (head, tail) not in self._layers:
            if len(self._layers) >= _MOST_KNOWN:
                self._layers.clear()
            self._layers[head, tail] = self._layer_by_rule(head, tail)
        return self._layers[head, tail]

    def _layer_by_rule(self, head: str, tail: str) -> int | None:
        # Of a name without a number there is no head, and no layer either.
        name = f"{head}0{tail}"
        place = self.place(name) if head else None
        if place is None:
            return None
        for regex, _ in self._experts:
            if match := regex.fullmatch(name, place[1]):
                return place[0] if match.start("expert") == len(head) else None
        return None

    def experts(self, table: TensorTable) -> tuple[Column, Column]:
        """(layer, expert) of each tensor that is one expert's own; layer is -1 of all others, whose
        role has to be asked for."""
        layers = [self.layer_of(each) for each in table.series]
        layer = table.by_series([-1 if each is None else each for each in layers])
        most = table.by_series([0 if each is None else self.experts_of(each) for each in layers])
        return np.where(table.number < most, layer, -1), table.number

    def _stacked_role(self, record: TensorRecord, layer: int, rule: Rule) -> Role:
        """A tensor of all experts: rows for each of them, or one value for all."""
        one_row = len(record.shape) == 1 and record.dtype in _INTEGERS
        if one_row and record.name.endswith("_shape"):
            # The packed weight's shape: [E, out, in], or [out, in] that all experts have.
            return Counted(layer) if record.shape[0] > 2 else Carried(self.is_mtp(layer))
        for_all = record.shape[:1] == (1,) and "scale" in record.name[record.name.rfind(".") :]
        if math.prod(record.shape) == 1 or for_all:
            # One scale for all experts.
            return Carried(self.is_mtp(layer))
        return self._sliced(record, layer, rule)

    def _sliced(
        self, record: TensorRecord, layer: int, rule: Rule, *, is_router: bool = False
    ) -> Sliced:
        expected = self.experts_of(layer)
        if rule.axis >= len(record.shape):
            raise FamilyError(
                record.name,
                f"shape {list(record.shape)} has no dimension {rule.axis}, where the family says "
                f"that {expected} experts are counted",
                "the family's declaration is not for this tensor",
            )
        rows = record.shape[rule.axis]
        # A re-save may stack weights of identity experts, with which nothing is computed.
        with_tail = (is_router and rule.tail) or rows == expected + self._tail
        tail = self._tail if with_tail else 0
        expected += tail
        each = max(1, rows // expected) if rule.flat else 1
        if rows != expected * each:
            what, many = ("rows", "a multiple of ") if rule.flat else ("experts", "")
            raise FamilyError(
                record.name,
                f"shape {list(record.shape)} has {rows} {what} in dimension {rule.axis}, "
                f"expected {many}{expected}",
                "the config and the tensors are not of one model",
            )
        return Sliced(layer, rule.axis, tail, is_router, each)

    def _outside(self, name: str) -> Role:
        if self._mtp_others.fullmatch(name):
            return Carried(mtp=True)
        if ".experts." in name and not self.is_elsewhere(name):
            raise FamilyError(
                name,
                f"an expert tensor that no rule of family {self._family.name} claims",
                "see 'Adding a family' in CONTRIBUTING.md",
            )
        return Carried()

    def _unclaimed(self, record: TensorRecord, layer: int, start: int) -> Role:
        """The role of a tensor that no rule names: carried where it surely has no expert axis."""
        carried = Carried(self.is_mtp(layer))
        if self._moe_layers is not None and layer not in self._moe_layers:
            return carried
        name = record.name
        if any(regex.fullmatch(name, start) for regex, _ in self._shared):
            return carried
        experts = self.experts_of(layer)
        rows = {experts, experts + self._tail}
        axes = [axis for axis, size in enumerate(record.shape) if size in rows]
        in_block = self._blocks.fullmatch(name, start)
        if not in_block and (not axes or self._beside.fullmatch(name, start)):
            return carried
        if self._moe_layers is None:
            return carried
        what = f"has {experts} in dimension {axes[0]}" if axes else "is in an MoE block"
        shape, family = list(record.shape), self._family.name
        raise FamilyError(
            name,
            f"shape {shape} {what} and no rule of family {family} claims it",
            "see 'Adding a family' in CONTRIBUTING.md",
        )


def _counted(record: TensorRecord, layer: int) -> Counted:
    if record.dtype not in COUNT_TYPES:
        raise FamilyError(
            record.name,
            f"is {record.dtype}, and a number of experts is one of {', '.join(COUNT_TYPES)}",
            "the family's entry expert_counts is not for this tensor",
        )
    return Counted(layer)


_Rules = tuple[tuple[re.Pattern[str], Rule], ...]


def _rules(rules: Iterable[Rule]) -> _Rules:
    return tuple((re.compile(pattern(rule.name)), rule) for rule in rules)


def _any(templates: Iterable[str]) -> re.Pattern[str]:
    """One pattern for several templates; the placeholder of each gets a group of its own."""
    parts = [
        re.sub(r"\?P<(\w+)>", rf"?P<\g<1>_{number}>", pattern(template))
        for number, template in enumerate(templates)
    ]
    # No template at all must match nothing, not everything.
    return re.compile("|".join(f"(?:{part})" for part in parts) or r"(?!)")


def _layer_number(match: re.Match[str]) -> int:
    # Of several prefixes one matched, and a prefix has one placeholder.
    return int(match[match.lastindex or 0])
