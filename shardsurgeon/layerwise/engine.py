"""The calibration itself: all samples through one decoder layer after another.

Takes a checkpoint and samples; gives the accumulators of each layer to a sink and the hidden
states to a store, so that an interrupted run continues after the layers that were saved last. What
is read how often and held where, a schedule says before it starts.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import torch

from shardsurgeon.checkpoint.anatomy import read_anatomy
from shardsurgeon.checkpoint.checkpoint import Checkpoint
from shardsurgeon.checkpoint.transformers_model import silence_hub
from shardsurgeon.layerwise.activations import ActivationStore
from shardsurgeon.layerwise.datasets import identity
from shardsurgeon.layerwise.devices import Device, require_device
from shardsurgeon.layerwise.experts import Recorder, StreamedExperts
from shardsurgeon.layerwise.memory import free_memory, model_size, program_memory
from shardsurgeon.layerwise.model import Model
from shardsurgeon.layerwise.mtp import MtpLayer
from shardsurgeon.layerwise.samples import Sample
from shardsurgeon.layerwise.schedule import (
    Hold,
    Limits,
    Schedule,
    costs,
    make_schedule,
    words,
)
from shardsurgeon.layerwise.settings import LayerSink, Listener, Settings
from shardsurgeon.layerwise.stream import LayerStream

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
        limits = limits_of(model, settings, store, memory)
        schedule = store.keep_schedule(adjust(make_schedule(size, lengths, limits)))
        num_experts = {layer.index: layer.num_experts for layer in anatomy.main_layers}
        groups, mtp = model.groups(), model.mtp
        if mtp is None:
            # Nothing needs the output of dense layers behind the last MoE layer.
            groups = [group for group in groups if group.start <= max(num_experts)]
        else:
            num_experts[mtp.index] = anatomy.mtp_layers[0].num_experts
        if num_experts.keys() <= sink.done_layers():
            return schedule
        layers = groups[-1].stop + (mtp is not None)
        identities = [identity(sample.source) for sample in samples]
        parts = sorted({*identities})
        numbers = [parts.index(part) for part in identities] if len(parts) > 1 else None
        stream = LayerStream(
            model,
            samples,
            schedule,
            device,
            store,
            num_experts,
            on_progress,
            groups=groups,
            num_layers=layers,
            parts=numbers,
        )
        crossings = len(groups) + (mtp is not None)
        each = model.dtype.itemsize
        cost = costs(size, lengths, schedule, each, len(stream.chunks), crossings)
        for line in words(schedule, cost, program_memory(device.name)):
            _log.info(line)
        with stream:
            _Calibration(stream, mtp, num_experts, schedule, device, sink, parts).run()
    return schedule


def limits_of(
    model: Model, settings: Settings, store: ActivationStore, memory: int | None
) -> Limits:
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


class _Calibration:
    """One calibration: which layers are left, and what their experts add up."""

    def __init__(
        self,
        stream: LayerStream,
        mtp: MtpLayer | None,
        num_experts: Mapping[int, int],
        schedule: Schedule,
        device: Device,
        sink: LayerSink,
        parts: Sequence[str],
    ) -> None:
        """parts: the identities of the datasets that samples are of."""
        self._stream = stream
        self._parts = parts
        self._mtp = mtp
        self._num_experts = num_experts
        self._schedule = schedule
        self._device = device
        self._sink = sink

    def run(self) -> None:
        """Run every group of layers that an earlier run has not finished."""
        stream, last = self._stream, len(self._stream.groups) - 1
        stream.begin()
        for number, group in enumerate(stream.groups):
            if number < stream.groups_done:
                stream.report_layers(group)
                continue
            recorders: dict[int, Recorder] = {}

            is_last = self._mtp is None and number == last
            stream.run_group(number, partial(self._opened, recorders), keep=not is_last)
            for layer, recorder in recorders.items():
                self._sink.finished_layer(layer, False, recorder.result())
            if not is_last:
                # After the sink: a layer that the store counts as done must not lack its results.
                stream.advance(number)
            stream.report_layers(group, tokens_counted=True)
        if self._mtp is not None and self._mtp.index not in self._sink.done_layers():
            self._run_mtp(self._mtp)

    def _opened(
        self, recorders: dict[int, Recorder], layer: int, experts: StreamedExperts
    ) -> StreamedExperts:
        experts.recorder = recorders[layer] = self._recorder(layer, f"layer {layer}")
        return experts

    def _run_mtp(self, mtp: MtpLayer) -> None:
        """Run all samples through the MTP layer, from the output of the main layers."""
        stream, model = self._stream, self._stream.model
        recorder = self._recorder(mtp.index, f"MTP layer {mtp.index}")
        twin = range(mtp.twin, mtp.twin + 1)
        hold = self._schedule.hold is Hold.STORED
        module, make = model.mtp_experts(mtp, hold=hold)
        with model.filled_mtp(mtp), ExitStack() as stack:
            experts = stream.open_experts(module, make, mtp.index, recorder, stack)
            for chunk, batches in stream.chunks_with_states():
                entered = []
                for positions, batch in zip(chunk, batches, strict=True):
                    # The layer sees pairs of a state and the next token: one token has no pair.
                    if batch.ids.shape[1] > 1:
                        pairs = stream.batch(positions, left_out=1)
                        pairs.states = model.enter_mtp(mtp, batch)
                        entered.append(pairs)
                    batch.states = None
                if entered:
                    model.runner.run(entered, twin, {mtp.twin: experts})
                stream.report(mtp.index, sum(batch.num_tokens for batch in batches))
        self._sink.finished_layer(mtp.index, True, recorder.result())
        stream.report_layers(range(mtp.index, mtp.index + 1), tokens_counted=True)

    def _recorder(self, layer: int, name: str) -> Recorder:
        return Recorder(name, self._num_experts[layer], self._device.name, self._parts)
