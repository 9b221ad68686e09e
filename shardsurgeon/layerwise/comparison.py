"""What leaves a layer of several models that run side by side: candidates against the whole model.

Sums alone are kept, in float64 and in an order that no timing changes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from shardsurgeon.errors import WorkError
from shardsurgeon.layerwise.damage import LayerSums
from shardsurgeon.layerwise.devices import Device
from shardsurgeon.layerwise.experts import Routing, StreamedExperts, segments
from shardsurgeon.layerwise.forward import Batch
from shardsurgeon.layerwise.stream import LayerStream

# Tokens that are compared at a time, in float64.
_COMPARED = 1024


def predicting(batch: Batch) -> Tensor:
    """Bool [B · S], which tokens predict one that is asked for."""
    assert batch.counted is not None
    return batch.counted


class WatchedExperts:
    """A layer's experts, and the gate weights that the whole model gives them."""

    def __init__(self, experts: StreamedExperts, comparison: Comparison) -> None:
        self._experts = experts
        self._comparison = comparison

    def compute(self, routings: list[Routing]) -> list[Tensor]:
        """As the experts compute."""
        for routing in routings:
            if routing.lane == 0:
                self._comparison.routed(routing)
        return self._experts.compute(routings)


@dataclass
class _Sums:
    """Sums of one layer: compared [lanes - 1, 2, parts] (relative errors, cosines), gates [parts,
    experts]."""

    compared: Tensor
    gates: Tensor | None = None


class Comparison:
    """What leaves the layers of a group: candidates against the whole model."""

    def __init__(self, stream: LayerStream, num_parts: int, lanes: int, device: Device) -> None:
        self._stream = stream
        self._num_parts = num_parts
        self._lanes = lanes
        self._device = device
        self._layers: dict[int, _Sums] = {}
        # (layer, positions in lane 0) → the whole model's states, until all candidates are through.
        self._whole: dict[tuple[int, tuple[int, ...]], tuple[Tensor, int]] = {}

    def watch(self, layer: int, batch: Batch, states: Tensor) -> None:
        """Called with the output of each layer for each batch."""
        key = (layer, batch.positions)
        if batch.lane == 0:
            self._whole[key] = (states, self._lanes - 1)
            return
        whole, left = self._whole[key]
        if left == 1:
            del self._whole[key]
        else:
            self._whole[key] = (whole, left - 1)
        sums = self._of(layer).compared[batch.lane - 1]
        both = [each.flatten(0, 1) for each in (states, whole)]
        assert batch.parts is not None
        for asked in predicting(batch).nonzero()[:, 0].split(_COMPARED):
            parts = batch.parts.numbers[asked]
            ours, theirs = (each[asked].flatten(1).double() for each in both)
            # States of zeros differ from nothing, and have no direction.
            least = torch.finfo(torch.float64).tiny
            norm, own = (
                torch.linalg.vector_norm(x, dim=-1).clamp(min=least) for x in (theirs, ours)
            )
            apart = torch.linalg.vector_norm(ours - theirs, dim=-1)
            cosine = ours.mul_(theirs).sum(-1) / norm / own
            for part in range(self._num_parts):
                for place, values in enumerate((apart / norm, cosine)):
                    sums[place, part] += torch.where(parts == part, values, 0.0).sum()

    def routed(self, routing: Routing) -> None:
        """Add the gate weights that the whole model gave; copies of the input get none."""
        assert routing.counted is not None and routing.parts is not None
        sums = self._of(routing.layer)
        if sums.gates is None:
            experts = self._stream.num_experts[routing.layer]
            sums.gates = self._zeros(self._num_parts, experts)
        experts = sums.gates.shape[1]
        asked = routing.counted.nonzero()[:, 0]
        index, weights = routing.index[asked], routing.weights[asked].double()
        places = (routing.parts.numbers[asked][:, None] * experts + index)[index < experts]
        places, order = places.sort(stable=True)
        every = torch.arange(self._num_parts * experts + 1, device=places.device)
        lengths = torch.searchsorted(places, every).diff()
        row = weights[index < experts][order]
        sums.gates.view(-1).add_(segments(row[None], lengths, "sum")[0])

    def results(self) -> Iterator[tuple[int, LayerSums]]:
        """Layer → its sums. Raises WorkError where they are not finite."""
        assert not self._whole
        for layer, sums in sorted(self._layers.items()):
            compared = sums.compared.cpu().numpy()
            if not np.isfinite(compared).all():
                problem = "its output has numbers that are not finite"
                remedy = "evaluate with --dtype bfloat16 or float32"
                raise WorkError(f"layer {layer}", problem, remedy)
            gates = None if sums.gates is None else sums.gates.cpu().numpy()
            yield layer, LayerSums(compared, gates)

    def _of(self, layer: int) -> _Sums:
        if layer not in self._layers:
            shape = (self._lanes - 1, 2, self._num_parts)
            self._layers[layer] = _Sums(self._zeros(*shape))
        return self._layers[layer]

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=self._device.name)
