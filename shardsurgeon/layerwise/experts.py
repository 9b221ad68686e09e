"""A layer's experts, read one by one: their outputs for the routed tokens, and the sums of these.

The model's router has chosen. Each expert that any token of the chunk chose is read once,
computes its tokens, and is dropped; a recorder adds up its outputs.
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
    """The tokens of one batch, and which experts of a layer they go to.

    layer: the layer's number; inputs: [N, H]; index: int64 [N, K], expert ids; weights: [N, K],
    gate weights; real: bool [N], False for padding, None where there is no padding.
    """

    layer: int
    inputs: Tensor
    index: Tensor
    weights: Tensor
    real: Tensor | None

    def choices(self) -> tuple[Tensor, Tensor, Tensor]:
        """(token, expert, gate weight) of every choice, padding left out; three vectors."""
        index, weights = self.index, self.weights
        tokens = torch.arange(len(index), device=index.device)
        if self.real is not None:
            tokens, index, weights = tokens[self.real], index[self.real], weights[self.real]
        width = index.shape[1]
        return tokens.repeat_interleave(width), index.reshape(-1), weights.reshape(-1)

    @property
    def num_tokens(self) -> int:
        """Tokens without padding."""
        return len(self.inputs) if self.real is None else int(self.real.sum())


class Recorder:
    """Adds up the outputs of one layer's experts, in float64 on the device of the tensors.

    layer: its name in messages.
    """

    def __init__(self, layer: str, num_experts: int, device: str) -> None:
        self._layer = layer
        self._num_experts = num_experts
        self._tokens = 0
        # Rows: counts, gate weights, norms, norms times gate weights, the largest component.
        self._sums = torch.zeros(5, num_experts, dtype=torch.float64, device=device)

    def add_tokens(self, tokens: int) -> None:
        """Count tokens that went through the layer."""
        self._tokens += tokens

    def add(self, expert: int, outputs: Tensor, weights: Tensor) -> None:
        """Add an expert's outputs [n, H], before they are multiplied by the gate weights [n]."""
        norms = torch.linalg.vector_norm(outputs, dim=-1, dtype=torch.float64)
        gates = weights.double()
        sums = self._sums
        sums[0, expert] += len(outputs)
        sums[1, expert] += gates.sum()
        sums[2, expert] += norms.sum()
        sums[3, expert] += torch.dot(norms, gates)
        sums[4, expert] = torch.maximum(sums[4, expert], outputs.amax().double())

    def result(self) -> Accumulators:
        """The sums. Raises WorkError where an expert's outputs were not finite."""
        sums = self._sums.cpu().numpy()
        wrong = ~np.isfinite(sums).all(0)
        if wrong.any():
            problem = f"expert {int(np.argmax(wrong))} gave numbers that are not finite"
            raise WorkError(self._layer, problem, "calibrate with --dtype bfloat16 or float32")
        return Accumulators(self._tokens, sums[0].astype(np.int64), *sums[1:])


class StreamedExperts:
    """The experts of one layer."""

    def __init__(
        self,
        module: ExpertModule,
        num_experts: int,
        read_expert: Callable[[int], Parameters],
        recorder: Recorder,
    ) -> None:
        """read_expert: an expert's parameters by its id; it runs in another thread."""
        self._module = module
        self._num_experts = num_experts
        self._read_expert = read_expert
        self._recorder = recorder

    def compute(self, routings: list[Routing]) -> list[Tensor]:
        """The outputs [N, H] for each batch; those of padding are 0."""
        inputs = torch.cat([routing.inputs for routing in routings])
        dtypes = (routings[0].inputs.dtype, routings[0].weights.dtype)
        outputs = torch.zeros_like(inputs, dtype=torch.promote_types(*dtypes))
        sizes = [len(routing.inputs) for routing in routings]
        tokens, experts, weights = _sorted_by_expert(routings, sizes)
        self._recorder.add_tokens(sum(routing.num_tokens for routing in routings))
        counts = torch.bincount(experts, minlength=self._num_experts).tolist()
        parts = zip(counts, tokens.split(counts), weights.split(counts), strict=True)
        chosen = {expert: (own, gates) for expert, (count, own, gates) in enumerate(parts) if count}
        for expert, parameters in self._read(chosen):
            self._compute(expert, parameters, inputs, outputs, *chosen[expert])
        self._module.clear()
        return [part.to(dtypes[0]) for part in outputs.split(sizes)]

    def _read(self, chosen: Iterable[int]) -> Iterator[tuple[int, Parameters | None]]:
        """(expert, parameters), None for an expert that copies its input.

        The next expert is read while this one computes. Some routers choose ids after the last
        expert, which stand for no expert.
        """
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
        return self._read_expert(expert) if expert < self._num_experts else None

    def _compute(
        self,
        expert: int,
        parameters: Parameters | None,
        inputs: Tensor,
        outputs: Tensor,
        tokens: Tensor,
        weights: Tensor,
    ) -> None:
        """Add one expert's outputs for its tokens to `outputs`, MOST_ROWS tokens at a time."""
        if parameters is not None:
            self._module.load(parameters)
        for chosen, gates in zip(tokens.split(MOST_ROWS), weights.split(MOST_ROWS), strict=True):
            own = inputs[chosen]
            made = own if parameters is None else self._outputs(own)
            if parameters is not None:
                self._recorder.add(expert, made, gates)
            if self._module.scales_inputs:
                made = self._outputs(own * gates[:, None])
            else:
                made = made * gates[:, None]
            outputs.index_add_(0, chosen, made.to(outputs.dtype))

    def _outputs(self, inputs: Tensor) -> Tensor:
        """The expert's outputs [n, H], computed on the CPU for a few rows more."""
        rows = len(inputs)
        even = _even_rows(rows) if inputs.device.type == "cpu" else rows
        if even > rows:
            inputs = functional.pad(inputs, (0, 0, 0, even - rows))
        return self._module.compute(inputs)[:rows]


def _even_rows(rows: int) -> int:
    """`rows` rounded up to one of eight numbers between two powers of two.

    Every expert gets another number of tokens, and on the CPU torch keeps compiled code for each
    shape of a matrix product: few shapes keep that memory small.
    """
    step = max(1, 1 << (rows - 1).bit_length() >> 4)
    return -(-rows // step) * step


def _sorted_by_expert(routings: list[Routing], sizes: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """(token, expert, gate weight) of all batches' choices, sorted by expert.

    sizes: rows of each batch; tokens are numbered through the batches.
    """
    parts = [routing.choices() for routing in routings]
    begins = np.cumsum([0, *sizes[:-1]]).tolist()
    tokens = torch.cat([part[0] + begin for part, begin in zip(parts, begins, strict=True)])
    experts, order = torch.cat([part[1] for part in parts]).sort(stable=True)
    weights = torch.cat([part[2] for part in parts])[order]
    return tokens[order], experts, weights
