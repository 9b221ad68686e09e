"""All samples through one group of layers after another: what is read when, and where states wait.

A schedule says how samples are grouped and what becomes of experts; a store keeps the hidden
states between two groups. What is measured on the way is for the caller, who wraps the experts and
looks at what leaves a layer. Several models that share their weights can run side by side, each in
a lane with hidden states of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace

import torch

from shardsurgeon.layerwise.activations import ActivationStore
from shardsurgeon.layerwise.devices import READERS, Arrival, Device
from shardsurgeon.layerwise.experts import Experts, Recorder, StreamedExperts
from shardsurgeon.layerwise.forward import Batch
from shardsurgeon.layerwise.grouped import may_be_grouped
from shardsurgeon.layerwise.model import Model
from shardsurgeon.layerwise.samples import Sample, total_tokens
from shardsurgeon.layerwise.schedule import Chunk, Hold, Schedule, chunks
from shardsurgeon.layerwise.settings import Listener, Progress
from shardsurgeon.layerwise.supply import Held, Make, Passing, Staying, Supply
from shardsurgeon.layerwise.text_model import ExpertModule

Opened = Callable[[int, StreamedExperts], Experts]
"""(layer, its experts) → what computes in their place."""


class LayerStream:
    """Samples on their way through a model's layers; a context manager.

    chunks: how they are grouped. A batch is a list of positions: sample s of lane l is position
    l · samples + s, and the batches of one lane are those of every other.
    """

    def __init__(
        self,
        model: Model,
        samples: Sequence[Sample],
        schedule: Schedule,
        device: Device,
        store: ActivationStore,
        num_experts: Mapping[int, int],
        listener: Listener,
        *,
        groups: Sequence[range],
        num_layers: int,
        lanes: int = 1,
        parts: Sequence[int] | None = None,
    ) -> None:
        """num_experts: of each layer that has some; groups: of layers that run together, in order;
        num_layers: of the whole run, for its progress; parts: the number of the part of the data
        that each sample is of."""
        self.model = model
        self.samples = samples
        self.groups = groups
        self._schedule = schedule
        self._device = device
        self._store = store
        self.num_experts = num_experts
        self._parts = parts
        self._listener = listener
        self._lanes = lanes
        self._readers = ThreadPoolExecutor(READERS[device.is_gpu], thread_name_prefix="expert")
        self._ahead: dict[int, Supply] = {}
        lengths = [sample.num_tokens for sample in samples]
        self.chunks = chunks(lengths, schedule, mixed=model.may_pad, lanes=lanes)
        self._batches = [batch for chunk in self.chunks for batch in chunk]
        self._numbers = {id(batch): number for number, batch in enumerate(self._batches)}
        self._tokens = total_tokens(samples) * lanes
        self._progress = Progress(0, 0, num_layers, 0, num_layers * self._tokens)

    def __enter__(self) -> LayerStream:
        return self

    def __exit__(self, *failure: object) -> None:
        for supply in self._ahead.values():
            supply.close()
        self._readers.shutdown(cancel_futures=True)

    def begin(self) -> None:
        """Make the model ready and the states that enter the first layer, or find those that an
        earlier run saved."""
        self.model.prepare(self.samples[0].ids)
        place, spare = self._schedule.states, self._schedule.spare
        self._store.arrange(self._batches, place, spare, self._device)
        if self._store.generation is not None:
            return
        embedded: dict[tuple[int, ...], Batch] = {}
        for number, positions in enumerate(self._batches):
            batch = self.batch(positions)
            # The lanes of a batch follow one another, and are the same before the first layer.
            own = tuple(position % len(self.samples) for position in positions)
            if own not in embedded:
                self.model.runner.embed(batch)
                embedded = {own: batch}
            self._store.keep(number, embedded[own].packed())
        self._store.advance(0)

    @property
    def groups_done(self) -> int:
        """Groups of layers that the stored states have behind them."""
        assert self._store.generation is not None
        return self._store.generation

    def run_group(
        self,
        number: int,
        opened: Opened,
        *,
        keep: bool = True,
        beside: Callable[[range], AbstractContextManager[None]] | None = None,
    ) -> None:
        """Run all samples through one group of layers.

        keep: whether their states are kept, as those of one more group, once `advance` is called;
        beside: entered once the layers are filled, to fill those of other lanes.
        """
        group = self.groups[number]
        with self.model.filled(group), ExitStack() as stack:
            if beside is not None:
                stack.enter_context(beside(group))
            experts: dict[int, Experts] = {}
            for layer in group:
                if layer in self.num_experts:
                    module, supply = self._supply(layer)
                    stack.callback(supply.close)
                    supply.start()
                    experts[layer] = opened(layer, self._streamed(module, layer, supply))
            for following in self.groups[number + 1 :][:1]:
                self._begin_reading(following)
            for chunk, batches in self.chunks_with_states():
                self.model.runner.run(batches, group, experts)
                for positions, batch in zip(chunk, batches, strict=True):
                    if keep:
                        self._store.keep(self._numbers[id(positions)], batch.packed())
                    batch.states = None
                    self.report(group.start, batch.num_tokens * len(group))

    def advance(self, number: int) -> None:
        """Count the states behind a group as the current ones. What the group gave must be safe
        by then: it is not computed again."""
        self._store.advance(self.groups[number].stop)

    def open_experts(
        self, module: ExpertModule, make: Make, layer: int, recorder: Recorder, stack: ExitStack
    ) -> StreamedExperts:
        """Experts of a layer that is in no group, being read until the stack ends."""
        supply = self._made_supply(module, make, self.num_experts[layer])
        stack.callback(supply.close)
        supply.start()
        return self._streamed(module, layer, supply, recorder)

    def _begin_reading(self, group: range) -> None:
        """Read a group's experts while the group before computes, or let the system do so."""
        self.model.read_ahead(group)
        for layer in group if self._schedule.ahead else ():
            if layer in self.num_experts:
                self._ahead[layer] = self._supply(layer)[1]
                self._ahead[layer].start()

    def _supply(self, layer: int) -> tuple[ExpertModule, Supply]:
        module, make = self.model.experts(layer, hold=self._schedule.hold is Hold.STORED)
        if layer in self._ahead:
            return module, self._ahead.pop(layer)
        return module, self._made_supply(module, make, self.num_experts[layer])

    def _made_supply(self, module: ExpertModule, make: Make, num_experts: int) -> Supply:
        """What gives a layer's experts, as the schedule says."""
        grouped = self._schedule.grouped and module.copies is None and not module.scales_inputs
        grouped = grouped and may_be_grouped(module.module)
        if self._schedule.hold is Hold.LAYER:
            return Staying(make, num_experts, self._device, self._readers, stacked=grouped)
        kind = Held if self._schedule.hold is Hold.STORED else Passing
        group = min(self._schedule.group, num_experts) if grouped else 0
        return kind(make, num_experts, self._device, self._readers, group)

    def _streamed(
        self, module: ExpertModule, layer: int, supply: Supply, recorder: Recorder | None = None
    ) -> StreamedExperts:
        rows = self._schedule.rows
        return StreamedExperts(module, self.num_experts[layer], supply, recorder, rows)

    def batch(self, positions: Sequence[int], *, left_out: int = 0) -> Batch:
        """Samples without states. left_out: tokens at the end of each."""
        own = [self.samples[position % len(self.samples)] for position in positions]
        ends = [sample.num_tokens - left_out for sample in own]
        parts = list(zip(own, ends, strict=True))
        batch = Batch.of(
            [sample.ids[:end] for sample, end in parts],
            self._device.name,
            counted=[None if one.counted is None else one.counted[:end] for one, end in parts],
            gaps=[None if one.gaps is None else one.gaps[:end] for one, end in parts],
            parts=[self._parts[position % len(self.samples)] for position in positions]
            if self._parts is not None
            else (),
        )
        batch.lane = positions[0] // len(self.samples)
        batch.positions = tuple(position % len(self.samples) for position in positions)
        return batch

    def chunks_with_states(self) -> Iterator[tuple[Chunk, list[Batch]]]:
        """Each chunk with its batches, whose states are on the device; those of the next batch
        are on their way where batches do not wait for one another."""
        sent: list[tuple[torch.Tensor, Arrival]] = []
        one_ahead = self._schedule.hold is not Hold.GROUPS
        for number, chunk in enumerate(self.chunks):
            arriving = sent or self._send(chunk)
            sent = []
            if one_ahead and number + 1 < len(self.chunks):
                sent = self._send(self.chunks[number + 1])
            batches = [self.batch(positions) for positions in chunk]
            for batch, (states, arrival) in zip(batches, arriving, strict=True):
                arrival.wait()
                batch.set_packed(states)
            arriving.clear()
            yield chunk, batches

    def _send(self, chunk: Chunk) -> list[tuple[torch.Tensor, Arrival]]:
        return [self._store.send(self._numbers[id(positions)]) for positions in chunk]

    def report(self, layer: int, tokens: int) -> None:
        """Tell the listener of tokens that passed a layer."""
        done = self._progress.tokens_done + tokens
        self._progress = replace(self._progress, layer=layer, tokens_done=done)
        self._listener(self._progress)

    def report_layers(self, layers: range, *, tokens_counted: bool = False) -> None:
        """Tell it that layers are done; tokens_counted: whether their tokens were reported."""
        done = self._progress.layers_done + len(layers)
        self._progress = replace(self._progress, layers_done=done)
        self.report(layers[-1], 0 if tokens_counted else self._tokens * len(layers))
