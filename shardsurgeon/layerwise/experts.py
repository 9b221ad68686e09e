"""A layer's experts at work: their outputs for the routed tokens, and the sums of these.

The model's router has chosen. Tokens are sorted by expert once; then experts compute one by one,
by their class's own code, or many in one grouped product; a recorder adds up the outputs before
they are multiplied by the gate weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from shardsurgeon.errors import WorkError
from shardsurgeon.layerwise.accumulators import Accumulators
from shardsurgeon.layerwise.grouped import Stack, grouped_outputs
from shardsurgeon.layerwise.supply import Parameters, Supply
from shardsurgeon.layerwise.text_model import ExpertModule

# Tokens whose experts' outputs are put together at once.
_TOKENS_ADDED = 8192


@dataclass(frozen=True, slots=True)
class TokenParts:
    """Which part of a mix of datasets each of some tokens is of.

    numbers: int64 [N]; counted: the numbers that occur → how many tokens of them are added up.
    """

    numbers: Tensor
    counted: Mapping[int, int]


@dataclass(slots=True)
class Routing:
    """The tokens of one batch, and which experts of a layer they go to.

    layer: the layer's number; inputs: [N, H]; index: int64 [N, K], expert ids; weights: [N, K],
    gate weights; real: int64, the tokens that are not padding, None where there is no padding;
    counted: bool [N], the tokens that are added up, None for all; num_counted: how many they are;
    parts: of the N tokens, None where all samples are of one part; lane: of its batch.
    """

    layer: int
    inputs: Tensor
    index: Tensor
    weights: Tensor
    real: Tensor | None
    counted: Tensor | None
    num_counted: int
    parts: TokenParts | None = None
    lane: int = 0


@dataclass(slots=True)
class _Choices:
    """All choices of some batches' tokens, padding left out, sorted by expert; M of them.

    tokens: [M], numbered through the batches; experts: [M], ascending; gates: [M], gate weights;
    counted: bool [M], None where all are added up; order: [M], the place of each where they are
    sorted by token; real: [M / K], the tokens in that order; width: K; parts: int64 [M], None
    where all are of one part.
    """

    tokens: Tensor
    experts: Tensor
    gates: Tensor
    counted: Tensor | None
    order: Tensor
    real: Tensor
    width: int
    parts: Tensor | None = None

    def kinds(self, rows: slice) -> tuple[Tensor | None, Tensor | None]:
        """Which of some choices are added up, and of which parts they are."""
        counted = None if self.counted is None else self.counted[rows]
        return counted, None if self.parts is None else self.parts[rows]


def _sorted_choices(routings: Sequence[Routing]) -> _Choices:
    begins = np.cumsum([0, *(len(routing.inputs) for routing in routings)]).tolist()
    parts = [
        torch.arange(len(routing.index), device=routing.index.device)
        if routing.real is None
        else routing.real
        for routing in routings
    ]
    real = torch.cat([part + begin for part, begin in zip(parts, begins, strict=False)])
    pairs = list(zip(routings, parts, strict=True))
    index = torch.cat([routing.index.index_select(0, part) for routing, part in pairs])
    gates = torch.cat([routing.weights.index_select(0, part) for routing, part in pairs])
    width = index.shape[1]
    experts, order = index.flatten().sort(stable=True)
    counted = None
    if any(routing.counted is not None for routing in routings):
        masks = [
            torch.ones_like(part, dtype=torch.bool)
            if routing.counted is None
            else routing.counted.index_select(0, part)
            for routing, part in pairs
        ]
        counted = torch.cat(masks).index_select(0, order // width)
    mixed = [
        routing.parts.numbers.index_select(0, part)
        for routing, part in pairs
        if routing.parts is not None
    ]
    return _Choices(
        tokens=real.index_select(0, order // width),
        experts=experts,
        gates=gates.flatten().index_select(0, order),
        counted=counted,
        order=order,
        real=real,
        width=width,
        parts=torch.cat(mixed).index_select(0, order // width) if mixed else None,
    )


class Recorder:
    """Adds up the outputs of one layer's experts, in float64 on the device of the tensors.

    layer: its name in messages; parts: the identities of the datasets that samples are of, by the
    number that `TokenParts` has. Nothing here waits for the device until `result`.
    """

    def __init__(self, layer: str, num_experts: int, device: str, parts: Sequence[str]) -> None:
        self._layer = layer
        self._parts = parts
        self._tokens = 0
        self._tokens_of = [0] * len(parts)
        # The parts that the tokens at hand are of.
        self._present: list[int] = []
        # Rows: counts, gate weights, norms, norms times gate weights, squared norms, the largest
        # component.
        self._sums = torch.zeros(6, num_experts, dtype=torch.float64, device=device)
        apart = len(parts) if len(parts) > 1 else 0
        self._sums_of = self._sums.new_zeros(apart, *self._sums.shape)

    def add_tokens(self, routings: Sequence[Routing]) -> None:
        """Count the tokens of some batches, whose outputs come next, as gone through the layer."""
        self._tokens += sum(routing.num_counted for routing in routings)
        mixed = [routing.parts.counted for routing in routings if routing.parts is not None]
        for counted in mixed:
            for part, tokens in counted.items():
                self._tokens_of[part] += tokens
        self._present = sorted({part for counted in mixed for part in counted})

    def add(
        self,
        first: int,
        outputs: Tensor,
        gates: Tensor,
        counted: Tensor | None,
        parts: Tensor | None,
        ends: Tensor,
    ) -> None:
        """Add outputs [n, H] of consecutive experts, before they meet the gate weights [n].

        first: the first of the experts; counted: bool [n], which rows are added up, None for all;
        parts: int64 [n], the part that each row is of, None where there is one; ends: int
        [experts], where each one's rows end; rows behind the last end are left out.
        """
        weights = gates.double()
        norms = torch.linalg.vector_norm(outputs, dim=-1, dtype=torch.float64)
        largest = outputs.amax(-1).double()
        ones = torch.ones_like(norms)
        rows = torch.stack([ones, weights, norms, norms * weights, norms * norms, largest])
        if counted is not None:
            # Not by a product: what is not counted may not be finite.
            rows = torch.where(counted, rows, 0.0)
        lengths = ends.diff(prepend=ends.new_zeros(1)).long()
        experts = slice(first, first + len(ends))
        _add_rows(self._sums[:, experts], rows, lengths)
        if parts is not None:
            for part in self._present:
                own = rows if len(self._present) == 1 else torch.where(parts == part, rows, 0.0)
                _add_rows(self._sums_of[part, :, experts], own, lengths)

    def result(self) -> Accumulators:
        """The sums, and those of each part. Raises WorkError where an expert's outputs were not
        finite."""
        sums = self._sums.cpu().numpy()
        wrong = ~np.isfinite(sums).all(0)
        if wrong.any():
            problem = f"expert {int(np.argmax(wrong))} gave numbers that are not finite"
            raise WorkError(self._layer, problem, "calibrate with --dtype bfloat16 or float32")
        total = _accumulators(self._tokens, sums)
        if len(self._parts) == 1:
            return total.of_one(self._parts[0])
        own = map(_accumulators, self._tokens_of, self._sums_of.cpu().numpy())
        return replace(total, parts=dict(zip(self._parts, own, strict=True)))


def _accumulators(tokens: int, sums: NDArray[np.float64]) -> Accumulators:
    """sums: [6, E], as a recorder has them."""
    return Accumulators(tokens, sums[0].astype(np.int64), *sums[[1, 2, 3, 5, 4]])


def _add_rows(sums: Tensor, rows: Tensor, lengths: Tensor) -> None:
    """Add rows [6, n] to the sums [6, experts] of those whose segments they are."""
    sums[:5] += segments(rows[:5], lengths, "sum")
    sums[5] = torch.maximum(sums[5], segments(rows[5:], lengths, "max")[0])


def segments(rows: Tensor, lengths: Tensor, how: str) -> Tensor:
    """Each row [n] reduced over consecutive segments: [rows, segments]. In the order of the
    elements, so that the result does not depend on timing."""
    return torch.stack(
        [
            torch.segment_reduce(row, how, lengths=lengths, initial=0, unsafe=True)
            for row in rows.unbind()
        ]
    )


class Experts(Protocol):
    """What computes in place of a layer's experts."""

    def compute(self, routings: list[Routing]) -> list[Tensor]:
        """The outputs [N, H] for each batch."""
        ...


class NoExperts:
    """Stands for a layer's experts in a trial, and gives 0."""

    def compute(self, routings: list[Routing]) -> list[Tensor]:
        """Zeros [N, H] for each batch."""
        return [torch.zeros_like(routing.inputs) for routing in routings]


class StreamedExperts:
    """The experts of one layer."""

    def __init__(
        self,
        module: ExpertModule,
        num_experts: int,
        supply: Supply,
        recorder: Recorder | None,
        rows: int,
    ) -> None:
        """supply: their weights; recorder: what adds their outputs up, if anything; rows: of one
        product."""
        self._module = module
        self._num_experts = num_experts
        self._supply = supply
        self.recorder = recorder
        self._rows = rows

    def compute(self, routings: list[Routing]) -> list[Tensor]:
        """The outputs [N, H] for each batch; those of padding are 0."""
        inputs = torch.cat([routing.inputs for routing in routings])
        dtypes = (routings[0].inputs.dtype, routings[0].weights.dtype)
        outputs = torch.zeros_like(inputs, dtype=torch.promote_types(*dtypes))
        choices = _sorted_choices(routings)
        if self.recorder is not None:
            self.recorder.add_tokens(routings)
        if self._supply.stacked:
            self._together(inputs, outputs, choices)
        else:
            self._one_by_one(inputs, outputs, choices)
        sizes = [len(routing.inputs) for routing in routings]
        return [part.to(dtypes[0]) for part in outputs.split(sizes)]

    def _one_by_one(self, inputs: Tensor, outputs: Tensor, choices: _Choices) -> None:
        """Add every expert's outputs to those of its tokens. Waits for the device once.

        Some routers choose ids after the last expert, which stand for no expert.
        """
        counts = torch.bincount(choices.experts, minlength=self._num_experts).tolist()
        ends = np.cumsum(counts).tolist()
        known = self._num_experts + (self._module.copies or 0)
        chosen = [expert for expert, count in enumerate(counts[:known]) if count]
        for expert, parameters in self._supply.each(chosen):
            if parameters is not None:
                self._module.load(parameters)
            for begin in range(ends[expert] - counts[expert], ends[expert], self._rows):
                rows = slice(begin, min(begin + self._rows, ends[expert]))
                self._one(expert, parameters, rows, inputs, outputs, choices)
        self._module.clear()

    def _one(
        self,
        expert: int,
        parameters: Parameters | None,
        rows: slice,
        inputs: Tensor,
        outputs: Tensor,
        choices: _Choices,
    ) -> None:
        tokens, gates = choices.tokens[rows], choices.gates[rows]
        own = inputs.index_select(0, tokens)
        # An expert without parameters copies its input.
        made = own if parameters is None else self._outputs(own)
        if parameters is not None and self.recorder is not None:
            ends = torch.tensor([len(made)], device=made.device)
            self.recorder.add(expert, made, gates, *choices.kinds(rows), ends)
        if self._module.scales_inputs:
            made = self._outputs(own * gates[:, None])
        else:
            made = made * gates[:, None]
        outputs.index_add_(0, tokens, made.to(outputs.dtype))

    def _outputs(self, inputs: Tensor) -> Tensor:
        """The expert's outputs [n, H], computed on the CPU for a few rows more."""
        rows = len(inputs)
        even = _even_rows(rows) if inputs.device.type == "cpu" else rows
        if even > rows:
            inputs = functional.pad(inputs, (0, 0, 0, even - rows))
        return self._module.compute(inputs)[:rows]

    def _together(self, inputs: Tensor, outputs: Tensor, choices: _Choices) -> None:
        """The same by grouped products. The host waits for nothing where the experts are one
        stack, and once where they come in several."""
        every = torch.arange(self._num_experts, device=inputs.device)
        ends = torch.searchsorted(choices.experts, every, right=True)
        made = inputs.new_empty(len(choices.tokens), outputs.shape[1], dtype=outputs.dtype)
        limits: list[int] = []
        for experts, stack in self._supply.stacks():
            first, last = 0, len(choices.tokens)
            if len(experts) < self._num_experts:
                limits = limits or [0, *ends.tolist()]
                first, last = limits[experts.start], limits[experts.stop]
            for begin in range(first, last, self._rows):
                rows = slice(begin, min(begin + self._rows, last))
                made[rows] = self._slab(experts, stack, rows, ends, inputs, choices)
        # Rows of ids that stand for no expert lie behind all others.
        made.masked_fill_((choices.experts >= self._num_experts)[:, None], 0)
        place = choices.order.argsort().view(-1, choices.width)
        for tokens, places in zip(
            choices.real.split(_TOKENS_ADDED), place.split(_TOKENS_ADDED), strict=True
        ):
            of_tokens = made.index_select(0, places.flatten())
            # Added up in the order of choices: atomic additions would come in any order.
            total = of_tokens.view(*places.shape, -1).sum(1)
            outputs.index_copy_(0, tokens, total)

    def _slab(
        self,
        experts: range,
        stack: Stack,
        rows: slice,
        ends: Tensor,
        inputs: Tensor,
        choices: _Choices,
    ) -> Tensor:
        """Some rows' outputs times their gate weights."""
        own = inputs.index_select(0, choices.tokens[rows])
        here = (ends[experts.start : experts.stop] - rows.start).clamp(0, len(own))
        made = grouped_outputs(self._module.module, stack, own, here.int())
        gates = choices.gates[rows]
        if self.recorder is not None:
            self.recorder.add(experts.start, made, gates, *choices.kinds(rows), here)
        return made * gates[:, None]


def _even_rows(rows: int) -> int:
    """`rows` rounded up to one of eight numbers between two powers of two.

    Every expert gets another number of tokens, and on the CPU torch keeps compiled code for each
    shape of a matrix product: few shapes keep that memory small.
    """
    step = max(1, 1 << (rows - 1).bit_length() >> 4)
    return -(-rows // step) * step
