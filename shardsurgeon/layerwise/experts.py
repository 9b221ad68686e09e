"""A layer's experts, read one by one: what they give to the tokens routed to them, and the sums.

Below `passing`. The model's router has decided; here every expert that was chosen by any token
of the chunk is read once, computes its tokens, is recorded, and is let go.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from shardsurgeon.errors import WorkError
from shardsurgeon.layerwise.accumulators import Accumulators
from shardsurgeon.layerwise.decoding import PackedWeight
from shardsurgeon.layerwise.memory import MOST_ROWS
from shardsurgeon.layerwise.text_model import ExpertModule

Parameters: TypeAlias = Mapping[str, Tensor | PackedWeight]


@dataclass(slots=True)
class Routing:
    """What one batch brings to a layer's experts.

    layer: its number; inputs: [N, H]; index: int64 [N, K]; weights: [N, K], the router's gate
    weights; real: bool [N], False for padding, None where there is none.
    """

    layer: int
    inputs: Tensor
    index: Tensor
    weights: Tensor
    real: Tensor | None

    def choices(self) -> tuple[Tensor, Tensor, Tensor]:
        """(token, expert, gate weight) of every choice of a token that is no padding."""
        index, weights = self.index, self.weights
        tokens = torch.arange(len(index), device=index.device)
        if self.real is not None:
            tokens, index, weights = tokens[self.real], index[self.real], weights[self.real]
        width = index.shape[1]
        return tokens.repeat_interleave(width), index.reshape(-1), weights.reshape(-1)

    @property
    def num_tokens(self) -> int:
        """Tokens that are no padding."""
        return len(self.inputs) if self.real is None else int(self.real.sum())


class Recorder:
    """Sums over the tokens of one layer, in float64 where the tensors are."""

    def __init__(self, layer: str, num_experts: int, device: str) -> None:
        self._layer = layer
        self._num_experts = num_experts
        self._tokens = 0
        # counts, gate weights, norms, their products, the largest component
        self._sums = torch.zeros(5, num_experts, dtype=torch.float64, device=device)

    def saw(self, tokens: int) -> None:
        """Note that so many tokens passed the layer."""
        self._tokens += tokens

    def add(self, expert: int, outputs: Tensor, weights: Tensor) -> None:
        """Note an expert's outputs [n, H] and their gate weights [n]."""
        norms = torch.linalg.vector_norm(outputs, dim=-1, dtype=torch.float64)
        gates = weights.double()
        sums = self._sums
        sums[0, expert] += len(outputs)
        sums[1, expert] += gates.sum()
        sums[2, expert] += norms.sum()
        sums[3, expert] += torch.dot(norms, gates)
        sums[4, expert] = torch.maximum(sums[4, expert], outputs.amax().double())

    def result(self) -> Accumulators:
        """The sums. Raises WorkError where an expert's outputs were no finite numbers."""
        sums = self._sums.cpu().numpy()
        wrong = ~np.isfinite(sums).all(0)
        if wrong.any():
            problem = f"expert {int(np.argmax(wrong))} gave numbers that are not finite"
            raise WorkError(self._layer, problem, "calibrate with --dtype bfloat16 or float32")
        return Accumulators(self._tokens, sums[0].astype(np.int64), *sums[1:])


class StreamedExperts:
    """The experts of one layer. expert: reads an expert's parameters by its id."""

    def __init__(
        self,
        module: ExpertModule,
        num_experts: int,
        expert: Callable[[int], Parameters],
        recorder: Recorder,
    ) -> None:
        self._module = module
        self._num_experts = num_experts
        self._expert = expert
        self._recorder = recorder

    def compute(self, routings: list[Routing]) -> list[Tensor]:
        """The outputs [N, H] for each batch; what padding gets is 0."""
        inputs = torch.cat([routing.inputs for routing in routings])
        kinds = (routings[0].inputs.dtype, routings[0].weights.dtype)
        outputs = torch.zeros_like(inputs, dtype=torch.promote_types(*kinds))
        sizes = [len(routing.inputs) for routing in routings]
        tokens, experts, weights = _together(routings, sizes)
        self._recorder.saw(sum(routing.num_tokens for routing in routings))
        counts = torch.bincount(experts, minlength=self._num_experts).tolist()
        pieces = zip(counts, tokens.split(counts), weights.split(counts), strict=True)
        chosen = {
            expert: (own, gates) for expert, (count, own, gates) in enumerate(pieces) if count
        }
        for expert, parameters in self._read(chosen):
            self._compute(expert, parameters, inputs, outputs, *chosen[expert])
        self._module.clear()
        return [part.to(kinds[0]) for part in outputs.split(sizes)]

    def _read(self, chosen: Iterable[int]) -> Iterator[tuple[int, Parameters | None]]:
        """Experts with their parameters, None for one that copies; the next one is read while
        this one computes. Ids behind the last expert stand for none."""
        known = self._num_experts + (self._module.copies or 0)
        wanted = [expert for expert in chosen if expert < known]
        with ThreadPoolExecutor(1, thread_name_prefix="expert") as pool:
            ahead: deque[Future[Parameters | None]] = deque()
            for expert in wanted[:2]:
                ahead.append(pool.submit(self._parameters, expert))
            for position, expert in enumerate(wanted):
                parameters = ahead.popleft().result()
                yield expert, parameters
                if position + 2 < len(wanted):
                    ahead.append(pool.submit(self._parameters, wanted[position + 2]))

    def _parameters(self, expert: int) -> Parameters | None:
        return self._expert(expert) if expert < self._num_experts else None

    def _compute(
        self,
        expert: int,
        parameters: Parameters | None,
        inputs: Tensor,
        outputs: Tensor,
        tokens: Tensor,
        weights: Tensor,
    ) -> None:
        """Add what one expert gives to its tokens, a number of them at a time."""
        if parameters is not None:
            self._module.load(parameters)
        for chosen, gates in zip(tokens.split(MOST_ROWS), weights.split(MOST_ROWS), strict=True):
            given = inputs[chosen]
            made = given if parameters is None else self._outputs(given)
            if parameters is not None:
                self._recorder.add(expert, made, gates)
            if self._module.scales_inputs:
                made = self._outputs(given * gates[:, None])
            else:
                made = made * gates[:, None]
            outputs.index_add_(0, chosen, made.to(outputs.dtype))

    def _outputs(self, inputs: Tensor) -> Tensor:
        """The expert's outputs [n, H], computed for a few rows more where that helps."""
        rows = len(inputs)
        even = _even_rows(rows) if inputs.device.type == "cpu" else rows
        if even > rows:
            inputs = functional.pad(inputs, (0, 0, 0, even - rows))
        return self._module.compute(inputs)[:rows]


def _even_rows(rows: int) -> int:
    """The next of eight numbers between a power of two and the next.

    Every expert gets another number of tokens, and torch keeps code for every shape of a
    product that it has met: of few shapes there is little to keep.
    """
    step = max(1, 1 << (rows - 1).bit_length() >> 4)
    return -(-rows // step) * step


def _together(routings: list[Routing], sizes: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """(token, expert, gate weight) of all batches' choices, sorted by expert; tokens are counted
    through the batches."""
    parts = [routing.choices() for routing in routings]
    begins = np.cumsum([0, *sizes[:-1]]).tolist()
    tokens = torch.cat([part[0] + begin for part, begin in zip(parts, begins, strict=True)])
    experts, order = torch.cat([part[1] for part in parts]).sort(stable=True)
    weights = torch.cat([part[2] for part in parts])[order]
    return tokens[order], experts, weights
