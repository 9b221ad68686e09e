"""Pruned models measured against the whole one, before a byte is moved.

The whole model and every candidate go through the layers side by side, each with hidden states of
its own: lane 0 is the whole model. Weights are read once for all of them. What leaves a layer is
compared there; behind the last one the head predicts every next token.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shardsurgeon.checkpoint.anatomy import read_anatomy
from shardsurgeon.checkpoint.checkpoint import Checkpoint
from shardsurgeon.checkpoint.transformers_model import silence_hub
from shardsurgeon.errors import UsageError
from shardsurgeon.layerwise.activations import ActivationStore
from shardsurgeon.layerwise.candidates import CandidateLayers
from shardsurgeon.layerwise.comparison import Comparison, WatchedExperts, predicting
from shardsurgeon.layerwise.damage import Candidate, LayerSums, Predictions
from shardsurgeon.layerwise.devices import Device, require_device
from shardsurgeon.layerwise.engine import limits_of
from shardsurgeon.layerwise.experts import Experts, StreamedExperts
from shardsurgeon.layerwise.forward import Batch
from shardsurgeon.layerwise.memory import ModelSize, model_size, program_memory
from shardsurgeon.layerwise.model import Model
from shardsurgeon.layerwise.samples import Sample
from shardsurgeon.layerwise.schedule import (
    Limits,
    Place,
    Schedule,
    costs,
    make_schedule,
    words,
)
from shardsurgeon.layerwise.settings import Listener, Settings
from shardsurgeon.layerwise.stream import LayerStream
from shardsurgeon.units import format_size

_log = logging.getLogger(__name__)

# Bytes of the logits that are made at a time. Of one token's there are four in float64: the logs of
# two distributions, how far they are apart, and one that is computed with.
_LOGITS_NBYTES = {False: 256 << 20, True: 1 << 30}
_OF_A_LOGIT = 4 * 8
# What torch takes for code and buffers of its own when it first computes; seen: 80 MB.
_WORKSPACE = 128 << 20
# Bytes of what is kept of one predicted token (`Predictions`), and sorted for percentiles.
_OF_A_PREDICTION = 18 + 16


class DamageSink(Protocol):
    """Receives what is found in finished layers."""

    def finished_layer(self, index: int, sums: LayerSums) -> None:
        """Keep what was added up in a layer; for a layer that is kept, do nothing."""
        ...


def evaluate_layers(
    checkpoint: Checkpoint,
    samples: Sequence[Sample],
    parts: Sequence[int],
    candidates: Sequence[Candidate],
    settings: Settings,
    store: ActivationStore,
    sink: DamageSink,
    on_progress: Listener,
    *,
    memory: int | None = None,
    device: Device | None = None,
    adjust: Callable[[Schedule], Schedule] = lambda schedule: schedule,
) -> list[Predictions]:
    """Run samples through a model and its candidates; what each model predicts, the whole first.

    samples: of at least two tokens; a token is predicted where its sample counts it and another
    one precedes it; parts: the number of the part of the data that each sample is of; store: for
    samples of these lengths, as often as there are models. The other arguments, and what is
    raised, are those of `calibrate_layers`.
    """
    require_device(settings.device)
    device = device or Device(settings.device)
    anatomy = read_anatomy(checkpoint)
    lanes = len(candidates) + 1
    asked = [_predicting(sample) for sample in samples]
    with silence_hub(), torch.inference_mode(), device.current():
        model = Model(checkpoint, anatomy, settings, device)
        groups = model.groups()
        together = max(map(len, groups))
        size = model_size(checkpoint, anatomy)
        # Each candidate has routers of its own.
        routers = len(candidates) * together * anatomy.num_experts * size.width
        main = tuple(layer for layer in size.layers if not layer.is_mtp)
        size = replace(size, layers=main, outside=model.resident + routers)
        lengths = [sample.num_tokens for sample in samples] * lanes
        compared = together * size.state * model.dtype.itemsize
        limits = replace(limits_of(model, settings, store, memory), compared=compared)
        schedule = make_schedule(size, lengths, limits)
        schedule = store.keep_schedule(
            adjust(_with_head(schedule, model, size, lengths, limits, lanes))
        )
        stream = LayerStream(
            model,
            asked,
            schedule,
            device,
            store,
            {layer.index: layer.num_experts for layer in anatomy.main_layers},
            on_progress,
            groups=groups,
            num_layers=groups[-1].stop,
            lanes=lanes,
            parts=parts,
        )
        cost = costs(size, lengths, schedule, model.dtype.itemsize, len(stream.chunks), len(groups))
        for line in words(schedule, cost, program_memory(device.name)):
            _log.info(line)
        layers = CandidateLayers(model, checkpoint, anatomy, candidates)
        with stream:
            run = _Evaluation(stream, layers, max(parts) + 1, lanes, device, sink)
            run.run()
            return run.predict()


def _with_head(
    schedule: Schedule,
    model: Model,
    size: ModelSize,
    lengths: Sequence[int],
    limits: Limits,
    lanes: int,
) -> Schedule:
    """The schedule, with the peak of the head where that is higher than that of the layers.

    lengths: of all lanes' samples. Raises UsageError where the head does not fit.
    """
    state, tokens = size.state * model.dtype.itemsize, sum(lengths)
    held = 0 if schedule.states is Place.FILE else tokens * state + schedule.spare
    if schedule.states is Place.HOST and limits.on_gpu:
        held = 0
    # While it is read, the head is there as it is stored, too.
    head = model.head_nbytes
    batches = (lanes * schedule.batch_size * max(lengths) + schedule.chunk) * state
    logits = max(_LOGITS_NBYTES[limits.on_gpu], _OF_A_LOGIT * model.vocabulary)
    logits = min(logits, _OF_A_LOGIT * model.vocabulary * tokens)
    found = 0 if limits.on_gpu else _WORKSPACE + tokens * _OF_A_PREDICTION
    needed = held + found + max(2 * head, head + batches + logits)
    if needed > limits.device_free:
        problem = f"the head takes {format_size(2 * head)}, a batch of {lanes} models and its "
        problem += f"logits {format_size(batches + logits)}, what waits {format_size(held + found)}"
        problem += f", and {format_size(limits.device_free)} are free"
        remedy = "give fewer candidates, a smaller --batch-size or --samples, or more memory"
        raise UsageError(f"--device {limits.device}", problem, remedy)
    peak = max(schedule.device_nbytes + (0 if limits.on_gpu else _WORKSPACE), needed)
    host = schedule.host_nbytes if limits.on_gpu else peak
    return replace(schedule, device_nbytes=peak, host_nbytes=host)


def _predicting(sample: Sample) -> Sample:
    """The sample, whose counted tokens are those that predict a token which is asked for."""
    asked = np.zeros(sample.num_tokens, np.bool_)
    asked[:-1] = True if sample.counted is None else sample.counted[1:]
    return replace(sample, counted=asked)


class _Evaluation:
    """One evaluation: what leaves each layer compared, and what the head predicts."""

    def __init__(
        self,
        stream: LayerStream,
        layers: CandidateLayers,
        num_parts: int,
        lanes: int,
        device: Device,
        sink: DamageSink,
    ) -> None:
        self._stream = stream
        self._layers = layers
        self._num_parts = num_parts
        self._lanes = lanes
        self._device = device
        self._sink = sink
        self._comparison: Comparison | None = None

    def run(self) -> None:
        """Run every group of layers that an earlier run has not finished."""
        stream = self._stream
        stream.begin()
        runner = stream.model.runner
        for number, group in enumerate(stream.groups):
            if number < stream.groups_done:
                stream.report_layers(group)
                continue
            found = Comparison(stream, self._num_parts, self._lanes, self._device)
            self._comparison, runner.watch = found, found.watch
            try:
                stream.run_group(number, self._opened, beside=self._layers.filled)
            finally:
                runner.watch = None
            for layer, sums in found.results():
                self._sink.finished_layer(layer, sums)
            stream.advance(number)
            stream.report_layers(group, tokens_counted=True)

    def _opened(self, layer: int, experts: StreamedExperts) -> Experts:
        assert self._comparison is not None
        return WatchedExperts(experts, self._comparison)

    def predict(self) -> list[Predictions]:
        """What the head predicts from the states behind the last layer, for each model."""
        counts = [sample.num_counted for sample in self._stream.samples]
        begins = np.cumsum([0, *counts]).tolist()
        found = [Predictions.empty(begins[-1]) for _ in range(self._lanes)]
        model = self._stream.model
        at_once = max(1, _LOGITS_NBYTES[self._device.is_gpu] // (_OF_A_LOGIT * model.vocabulary))
        waiting: list[Batch] = []
        with model.with_head():
            for _, batches in self._stream.chunks_with_states():
                for batch in batches:
                    waiting.append(batch)
                    if len(waiting) == self._lanes:
                        own = waiting[0].positions
                        places = [np.arange(begins[place], begins[place + 1]) for place in own]
                        self._predict(waiting, np.concatenate(places), at_once, found)
                        waiting = []
        return found

    def _predict(
        self,
        lanes: list[Batch],
        places: NDArray[np.int64],
        at_once: int,
        found: list[Predictions],
    ) -> None:
        """One batch of all models. places: of its predicted tokens among those of the run."""
        ids = lanes[0].ids.flatten()
        asked = predicting(lanes[0]).nonzero()[:, 0]
        for begin in range(0, len(asked), at_once):
            part = asked[begin : begin + at_once]
            given, following = ids[part], ids[part + 1]
            whole: _Distribution | None = None
            for lane, batch in zip(found, lanes, strict=True):
                assert batch.states is not None
                states = batch.states.flatten(0, 1)[part]
                own = _Distribution(self._stream.model.runner.logits(given, states).double())
                whole = whole or own
                lane.put(places[begin : begin + at_once], own.against(whole, following))
                del own


class _Distribution:
    """What a model says of the next token. logits: float64 [n, vocabulary]."""

    def __init__(self, logits: Tensor) -> None:
        self._logs = logits.log_softmax(-1)
        self._first = logits.argmax(-1)

    @cached_property
    def _shares(self) -> Tensor:
        return self._logs.exp()

    def against(self, whole: _Distribution, following: Tensor) -> list[np.ndarray]:
        """nll, KL from the whole model's, agreement with it, and with the tokens that follow."""
        nll = -self._logs.gather(1, following[:, None])[:, 0]
        p = whole._shares
        kl = (whole._logs - self._logs).mul_(p)
        # A token that the whole model excludes has no part in the sum: 0 · inf is none.
        kl = kl.masked_fill_(p == 0, 0.0).sum(-1)
        agrees, hits = self._first == whole._first, self._first == following
        return [values.cpu().numpy() for values in (nll, kl, agrees, hits)]
