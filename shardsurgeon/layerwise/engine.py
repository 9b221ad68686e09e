"""The calibration itself: all samples through one decoder layer after another.

Takes a checkpoint and samples; gives the accumulators of each layer to a sink and the hidden
states to a store, so that an interrupted run continues after the layers that were saved last. What
is read how often and held where, a schedule says before it starts.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace

import torch

from shardsurgeon.checkpoint.anatomy import Anatomy, read_anatomy
from shardsurgeon.checkpoint.checkpoint import Checkpoint
from shardsurgeon.checkpoint.transformers_model import silence_hub
from shardsurgeon.layerwise.activations import ActivationStore
from shardsurgeon.layerwise.devices import READERS, Arrival, Device, require_device
from shardsurgeon.layerwise.experts import Recorder, StreamedExperts
from shardsurgeon.layerwise.forward import Batch
from shardsurgeon.layerwise.grouped import may_be_grouped
from shardsurgeon.layerwise.memory import ModelSize, free_memory, model_size, program_memory
from shardsurgeon.layerwise.model import Model, MtpLayer
from shardsurgeon.layerwise.samples import Sample, total_tokens
from shardsurgeon.layerwise.schedule import (
    Chunk,
    Hold,
    Limits,
    Schedule,
    chunks,
    costs,
    make_schedule,
    words,
)
from shardsurgeon.layerwise.settings import LayerSink, Listener, Progress, Settings
from shardsurgeon.layerwise.supply import Held, Make, Passing, Staying, Supply
from shardsurgeon.layerwise.text_model import ExpertModule

_log = logging.getLogger(__name__)


def calibrate_layers(
    checkpoint: Checkpoint,
    samples: Sequence[Sample],
    settings: Settings,
    store: ActivationStore,
    sink: LayerSink,
    on_progress: Listener,
    *,
    memory: int | None = None,
    device: Device | None = None,
    adjust: Callable[[Schedule], Schedule] = lambda schedule: schedule,
) -> Schedule:
    """Run samples through a model, give each layer's accumulators to the sink; how it was done.

    settings: with a dtype; store: for samples of these lengths; memory: bytes that it may take on
    the device, None for what is free; device: None for the one that the settings name; adjust:
    changes the schedule that the cost model chose. Raises UsageError where transformers cannot
    build the model, the device does not exist or a layer does not fit into memory; FamilyError
    where experts or weights have an unknown form; WorkError where an expert's outputs are not
    finite; OutputWriteError where hidden states or results cannot be written.
    """
    require_device(settings.device)
    device = device or Device(settings.device)
    anatomy = read_anatomy(checkpoint)
    with silence_hub(), torch.inference_mode(), device.current():
        model = Model(checkpoint, anatomy, settings, device)
        size = replace(model_size(checkpoint, anatomy), outside=model.resident)
        lengths = [sample.num_tokens for sample in samples]
        limits = _limits(model, settings, store, memory)
        schedule = store.keep_schedule(adjust(make_schedule(size, lengths, limits)))
        run = _Run(model, anatomy, samples, schedule, device, store, sink, on_progress)
        with run:
            run.run(size)
    return schedule


def _limits(model: Model, settings: Settings, store: ActivationStore, memory: int | None) -> Limits:
    """What is free now."""
    device = settings.device
    free = free_memory(device)
    if memory is not None:
        free = min(free, memory)
    return Limits(
        itemsize=model.dtype.itemsize,
        on_gpu=device != "cpu",
        device_free=free,
        host_free=free if device == "cpu" else free_memory("cpu"),
        states_budget=store.budget,
        batch_size=settings.batch_size,
        attention_pair=model.attention_pair,
        groups=tuple(model.groups()),
        device=device,
    )


class _Run:
    """One calibration: which layers are left, how samples are grouped, how far it is."""

    def __init__(
        self,
        model: Model,
        anatomy: Anatomy,
        samples: Sequence[Sample],
        schedule: Schedule,
        device: Device,
        store: ActivationStore,
        sink: LayerSink,
        on_progress: Listener,
    ) -> None:
        self._model = model
        self._samples = samples
        self._schedule = schedule
        self._device = device
        self._store = store
        self._sink = sink
        self._listener = on_progress
        self._readers = ThreadPoolExecutor(READERS[device.is_gpu], thread_name_prefix="expert")
        self._ahead: dict[int, Supply] = {}
        lengths = [sample.num_tokens for sample in samples]
        self._chunks = chunks(lengths, schedule, mixed=model.may_pad)
        self._batches = [batch for chunk in self._chunks for batch in chunk]
        self._numbers = {id(batch): number for number, batch in enumerate(self._batches)}
        self._num_experts = {layer.index: layer.num_experts for layer in anatomy.main_layers}
        self._groups = model.groups()
        if model.mtp is None:
            # Nothing needs the output of dense layers behind the last MoE layer.
            last = max(self._num_experts)
            self._groups = [group for group in self._groups if group.start <= last]
        else:
            self._num_experts[model.mtp.index] = anatomy.mtp_layers[0].num_experts
        self._tokens = total_tokens(samples)
        layers = self._groups[-1].stop + (model.mtp is not None)
        self._progress = Progress(0, 0, layers, 0, layers * self._tokens)

    def __enter__(self) -> _Run:
        return self

    def __exit__(self, *failure: object) -> None:
        for supply in self._ahead.values():
            supply.close()
        self._readers.shutdown(cancel_futures=True)

    def run(self, size: ModelSize) -> None:
        """Run every group of layers that an earlier run has not finished; say first how."""
        done = self._sink.done_layers()
        if self._num_experts.keys() <= done:
            return
        lengths = [sample.num_tokens for sample in self._samples]
        crossings = len(self._groups) + (self._model.mtp is not None)
        each = self._model.dtype.itemsize
        cost = costs(size, lengths, self._schedule, each, len(self._chunks), crossings)
        for line in words(self._schedule, cost, program_memory(self._device.name)):
            _log.info(line)
        self._model.prepare(self._samples[0].ids)
        place, spare = self._schedule.states, self._schedule.spare
        self._store.arrange(self._batches, place, spare, self._device)
        if self._store.generation is None:
            self._embed()
        for number, group in enumerate(self._groups):
            assert self._store.generation is not None
            if number < self._store.generation:
                self._report_group(group)
            else:
                self._run_group(number, group)
        mtp = self._model.mtp
        if mtp is not None and mtp.index not in done:
            self._run_mtp(mtp)

    def _embed(self) -> None:
        """Store the states that enter the first layer."""
        for number, positions in enumerate(self._batches):
            batch = self._batch(positions)
            self._model.runner.embed(batch)
            self._store.keep(number, batch.packed())
        self._store.advance(0)

    def _run_group(self, number: int, group: range) -> None:
        """Run all samples through one group of layers, and keep what its experts added up."""
        is_last = self._model.mtp is None and number + 1 == len(self._groups)
        with self._model.filled(group), ExitStack() as stack:
            recorders: dict[int, Recorder] = {}
            experts: dict[int, StreamedExperts] = {}
            for layer in group:
                if layer in self._num_experts:
                    recorders[layer] = self._recorder(layer, f"layer {layer}")
                    module, supply = self._supply(layer)
                    stack.callback(supply.close)
                    supply.start()
                    experts[layer] = self._streamed(module, layer, supply, recorders[layer])
            for following in self._groups[number + 1 :][:1]:
                self._begin_reading(following)
            for chunk, batches in self._chunks_with_states():
                self._model.runner.run(batches, group, experts)
                for positions, batch in zip(chunk, batches, strict=True):
                    if not is_last:
                        self._store.keep(self._numbers[id(positions)], batch.packed())
                    batch.states = None
                    self._report(group.start, batch.num_tokens * len(group))
        for layer, recorder in recorders.items():
            self._sink.finished_layer(layer, False, recorder.result())
        if not is_last:
            # After the sink: a layer that the store counts as done must not lack its results.
            self._store.advance(group.stop)
        self._report_group(group, tokens_counted=True)

    def _run_mtp(self, mtp: MtpLayer) -> None:
        """Run all samples through the MTP layer, from the output of the main layers."""
        recorder = self._recorder(mtp.index, f"MTP layer {mtp.index}")
        twin = range(mtp.twin, mtp.twin + 1)
        hold = self._schedule.hold is Hold.STORED
        module, make = self._model.mtp_experts(mtp, hold=hold)
        with self._model.filled_mtp(mtp), ExitStack() as stack:
            supply = self._made_supply(module, make, self._num_experts[mtp.index])
            stack.callback(supply.close)
            supply.start()
            experts = {mtp.twin: self._streamed(module, mtp.index, supply, recorder)}
            for chunk, batches in self._chunks_with_states():
                entered = []
                for positions, batch in zip(chunk, batches, strict=True):
                    # The layer sees pairs of a state and the next token: one token has no pair.
                    if batch.ids.shape[1] > 1:
                        pairs = self._batch(positions, left_out=1)
                        pairs.states = self._model.enter_mtp(mtp, batch)
                        entered.append(pairs)
                    batch.states = None
                if entered:
                    self._model.runner.run(entered, twin, experts)
                self._report(mtp.index, sum(batch.num_tokens for batch in batches))
        self._sink.finished_layer(mtp.index, True, recorder.result())
        self._report_group(range(mtp.index, mtp.index + 1), tokens_counted=True)

    def _begin_reading(self, group: range) -> None:
        """Read a group's experts while the group before computes, or let the system do so."""
        self._model.read_ahead(group)
        for layer in group if self._schedule.ahead else ():
            if layer in self._num_experts:
                self._ahead[layer] = self._supply(layer)[1]
                self._ahead[layer].start()

    def _supply(self, layer: int) -> tuple[ExpertModule, Supply]:
        module, make = self._model.experts(layer, hold=self._schedule.hold is Hold.STORED)
        if layer in self._ahead:
            return module, self._ahead.pop(layer)
        return module, self._made_supply(module, make, self._num_experts[layer])

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
        self, module: ExpertModule, layer: int, supply: Supply, recorder: Recorder
    ) -> StreamedExperts:
        rows = self._schedule.rows
        return StreamedExperts(module, self._num_experts[layer], supply, recorder, rows)

    def _recorder(self, layer: int, name: str) -> Recorder:
        return Recorder(name, self._num_experts[layer], self._device.name)

    def _batch(self, positions: list[int], *, left_out: int = 0) -> Batch:
        """Samples without states. left_out: tokens at the end of each."""
        own = [self._samples[position] for position in positions]
        ends = [sample.num_tokens - left_out for sample in own]
        parts = list(zip(own, ends, strict=True))
        return Batch.of(
            [sample.ids[:end] for sample, end in parts],
            self._device.name,
            counted=[None if one.counted is None else one.counted[:end] for one, end in parts],
            gaps=[None if one.gaps is None else one.gaps[:end] for one, end in parts],
        )

    def _chunks_with_states(self) -> Iterator[tuple[Chunk, list[Batch]]]:
        """Each chunk with its batches, whose states are on the device; those of the next batch
        are on their way where batches do not wait for one another."""
        sent: list[tuple[torch.Tensor, Arrival]] = []
        one_ahead = self._schedule.hold is not Hold.GROUPS
        for number, chunk in enumerate(self._chunks):
            arriving = sent or self._send(chunk)
            sent = []
            if one_ahead and number + 1 < len(self._chunks):
                sent = self._send(self._chunks[number + 1])
            batches = [self._batch(positions) for positions in chunk]
            for batch, (states, arrival) in zip(batches, arriving, strict=True):
                arrival.wait()
                batch.set_packed(states)
            arriving.clear()
            yield chunk, batches

    def _send(self, chunk: Chunk) -> list[tuple[torch.Tensor, Arrival]]:
        return [self._store.send(self._numbers[id(positions)]) for positions in chunk]

    def _report(self, layer: int, tokens: int) -> None:
        done = self._progress.tokens_done + tokens
        self._progress = replace(self._progress, layer=layer, tokens_done=done)
        self._listener(self._progress)

    def _report_group(self, group: range, *, tokens_counted: bool = False) -> None:
        """Report that a group is done; tokens_counted: whether its tokens were reported."""
        layers = self._progress.layers_done + len(group)
        self._progress = replace(self._progress, layers_done=layers)
        self._report(group[-1], 0 if tokens_counted else self._tokens * len(group))
