"""The calibration itself: layer after layer, all samples through each.

Above every other room of `calibration` that touches the model. Takes a checkpoint and samples,
gives accumulators layer by layer to a sink and hidden states to a store, so that a run that was
stopped goes on behind its last whole group of layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from shardsurgeon.checkpoint.anatomy import Anatomy, read_anatomy
from shardsurgeon.checkpoint.checkpoint import Checkpoint
from shardsurgeon.checkpoint.transformers_model import silence_hub
from shardsurgeon.errors import UsageError
from shardsurgeon.layerwise.experts import Recorder, StreamedExperts
from shardsurgeon.layerwise.forward import Batch
from shardsurgeon.layerwise.memory import MOST_BATCHES, BatchSizes, batch_sizes, free_memory
from shardsurgeon.layerwise.model import Model, MtpLayer
from shardsurgeon.layerwise.resume import ActivationStore
from shardsurgeon.layerwise.samples import Sample
from shardsurgeon.layerwise.settings import LayerSink, Listener, Progress, Settings

Chunk = list[list[int]]
"""Batches whose tokens each expert is read for once; a batch is the positions of its samples."""


def calibrate_layers(
    checkpoint: Checkpoint,
    samples: Sequence[Sample],
    settings: Settings,
    store: ActivationStore,
    sink: LayerSink,
    on_progress: Listener,
    *,
    chunk_tokens: int | None = None,
) -> None:
    """Push samples through a model and hand what they add up to, layer by layer, to the sink.

    chunk_tokens: for how many tokens an expert is read at once, None for what memory allows.
    Raises UsageError where transformers cannot build the model, the device is not there or a
    layer does not fit; FamilyError where the model's experts or the form of its weights are not
    known; WorkError where outputs overflow.
    """
    _require_device(settings.device)
    anatomy = read_anatomy(checkpoint)
    with silence_hub(), torch.inference_mode():
        model = Model(checkpoint, anatomy, settings)
        cutting = _Cutting(model, samples, settings, chunk_tokens)
        run = _Run(model, anatomy, samples, settings, store, sink, on_progress, cutting)
        run.go()


class _Cutting:
    """Samples cut into chunks and batches, as memory allows."""

    def __init__(
        self, model: Model, samples: Sequence[Sample], settings: Settings, chunk: int | None
    ) -> None:
        """Raises UsageError where one layer and one batch do not fit."""
        self._lengths = [sample.num_tokens for sample in samples]
        self._footprint = model.layer_memory()
        self._mixed = model.may_pad
        self._settings = settings
        self._chunk = chunk
        self._portions(0)

    def chunks(self) -> list[Chunk]:
        """As this moment's memory allows."""
        return _chunks(self._lengths, self._portions(0), mixed=self._mixed)

    def lasting_chunks(self, store: ActivationStore, reserved: int) -> list[Chunk]:
        """The same at every resumption of a run, because sums are rounded as batches are cut.

        reserved: bytes of the free memory that the hidden states will take.
        """
        fit = self._portions(reserved)
        kept = BatchSizes(*store.batch_sizes(fit.batch_size, fit.chunk))
        return _chunks(self._lengths, kept, mixed=self._mixed)

    def _portions(self, reserved: int) -> BatchSizes:
        device = self._settings.device
        free = free_memory(device)
        if device == "cpu":
            free -= reserved
        return batch_sizes(
            self._footprint, self._lengths, self._settings.batch_size, self._chunk, free, device
        )


class _Run:
    """One calibration on its way."""

    def __init__(
        self,
        model: Model,
        anatomy: Anatomy,
        samples: Sequence[Sample],
        settings: Settings,
        store: ActivationStore,
        sink: LayerSink,
        on_progress: Listener,
        cutting: _Cutting,
    ) -> None:
        self._model = model
        self._anatomy = anatomy
        self._samples = samples
        self._device = settings.device
        self._store = store
        self._sink = sink
        self._listener = on_progress
        self._cutting = cutting
        self._chunks = cutting.chunks()
        self._experts = {layer.index: layer.num_experts for layer in anatomy.main_layers}
        last = max(self._experts)
        self._groups = [group for group in model.groups() if group.start <= last]
        self._mtp = model.mtp
        if self._mtp is not None:
            self._experts[self._mtp.index] = anatomy.mtp_layers[0].num_experts
            self._groups = model.groups()
        layers = self._groups[-1].stop + (self._mtp is not None)
        tokens = sum(sample.num_tokens for sample in samples)
        self._progress = Progress(0, 0, layers, 0, layers * tokens)

    def go(self) -> None:
        """Every group of layers that is not done yet."""
        done = self._sink.done_layers()
        if self._experts.keys() <= done:
            return
        self._model.prepare(self._samples[0].ids)
        if self._store.generation is None:
            self._embed()
        # The next generation will be as large as this one.
        reserved = self._state_nbytes() if self._store.in_memory else 0
        self._chunks = self._cutting.lasting_chunks(self._store, reserved)
        for number, group in enumerate(self._groups):
            assert self._store.generation is not None
            if number < self._store.generation:
                self._count(group)
                continue
            self._work(number, group)
        if self._mtp is not None and self._mtp.index not in done:
            self._work_mtp(self._mtp)

    def _embed(self) -> None:
        """The states in front of the first layer."""
        for positions in (batch for chunk in self._chunks for batch in chunk):
            batch = self._batch(positions)
            self._model.passage.embed(batch)
            self._keep(positions, batch)
        self._store.advance()

    def _state_nbytes(self) -> int:
        state = self._store.read(0)
        each: int = state.numel() // len(state) * state.element_size()
        return each * sum(sample.num_tokens for sample in self._samples)

    def _work(self, number: int, group: range) -> None:
        """Lead all samples through one group of layers, and keep what it added up to."""
        recorders: dict[int, Recorder] = {}
        is_last = self._mtp is None and number + 1 == len(self._groups)
        with self._model.filled(group):
            for following in self._groups[number + 1 :][:1]:
                self._model.read_ahead(following)
            work = {
                layer: self._at_work(layer, recorders) for layer in group if layer in self._experts
            }
            for chunk in self._chunks:
                self._pass(chunk, group, work, keep=not is_last)
        for layer, recorder in recorders.items():
            self._sink.finished_layer(layer, False, recorder.result())
        if not is_last:
            # Behind the sink: what the store has done, the sink has.
            self._store.advance()
        self._count(group, tokens=False)

    def _work_mtp(self, mtp: MtpLayer) -> None:
        """Lead all samples through the MTP layer, from what the main layers gave."""
        experts = self._experts[mtp.index]
        recorder = Recorder(f"MTP layer {mtp.index}", experts, self._device)
        twin = range(mtp.twin, mtp.twin + 1)
        with self._model.filled_mtp(mtp):
            work = {mtp.twin: self._model.mtp_experts(mtp, experts, recorder)}
            for chunk in self._chunks:
                batches = [self._batch_with_states(positions) for positions in chunk]
                # One token has none behind it to predict from.
                entered = [
                    self._model.enter_mtp(mtp, batch) for batch in batches if batch.ids.shape[1] > 1
                ]
                if entered:
                    self._model.passage.run(entered, twin, work)
                self._told(mtp.index, sum(batch.num_tokens for batch in batches))
        self._sink.finished_layer(mtp.index, True, recorder.result())
        self._count(range(mtp.index, mtp.index + 1), tokens=False)

    def _at_work(self, layer: int, recorders: dict[int, Recorder]) -> StreamedExperts:
        where = f"layer {layer}"
        recorders[layer] = Recorder(where, self._experts[layer], self._device)
        return self._model.experts(layer, self._experts[layer], recorders[layer])

    def _pass(
        self, chunk: Chunk, group: range, work: dict[int, StreamedExperts], *, keep: bool
    ) -> None:
        batches = [self._batch_with_states(positions) for positions in chunk]
        self._model.passage.run(batches, group, work)
        for positions, batch in zip(chunk, batches, strict=True):
            if keep:
                self._keep(positions, batch)
            self._told(group.start, batch.num_tokens * len(group))

    def _batch(self, positions: list[int]) -> Batch:
        return Batch.of([self._samples[position].ids for position in positions], self._device)

    def _batch_with_states(self, positions: list[int]) -> Batch:
        batch = self._batch(positions)
        batch.take([self._store.read(position) for position in positions])
        return batch

    def _keep(self, positions: list[int], batch: Batch) -> None:
        for position, states in zip(positions, batch.give(), strict=True):
            self._store.write(position, states)

    def _told(self, layer: int, tokens: int) -> None:
        done = self._progress.tokens_done + tokens
        self._progress = replace(self._progress, layer=layer, tokens_done=done)
        self._listener(self._progress)

    def _count(self, group: range, *, tokens: bool = True) -> None:
        """Note that a group is done; tokens: whether its tokens were not counted yet."""
        layers = self._progress.layers_done + len(group)
        self._progress = replace(self._progress, layers_done=layers)
        every = sum(sample.num_tokens for sample in self._samples) * len(group)
        self._told(group[-1], every if tokens else 0)


def _chunks(lengths: Sequence[int], shares: BatchSizes, *, mixed: bool) -> list[Chunk]:
    """Cut samples into batches of like lengths, and batches into chunks of at most so many
    tokens, padding counted. mixed: whether lengths of a batch may differ."""
    chunks: list[Chunk] = []
    room = 0
    for batch in _batches(lengths, shares.batch_size, mixed=mixed):
        size = lengths[batch[0]] * len(batch)
        if not chunks or size > room or len(chunks[-1]) == MOST_BATCHES:
            chunks.append([])
            room = shares.chunk
        chunks[-1].append(batch)
        room -= size
    return chunks


def _batches(lengths: Sequence[int], size: int, *, mixed: bool) -> Iterator[list[int]]:
    """Positions of samples, the longest first."""
    order = sorted(range(len(lengths)), key=lambda position: (-lengths[position], position))
    batch: list[int] = []
    for position in order:
        other = batch and not mixed and lengths[position] != lengths[batch[0]]
        if other or len(batch) == size:
            yield batch
            batch = []
        batch.append(position)
    yield batch


def _require_device(device: str) -> None:
    """Raise UsageError where torch cannot use the device."""
    if device == "cpu":
        return
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    number = int(device.partition(":")[2] or 0)
    if number >= count:
        problem = f"torch {torch.__version__} finds {count} CUDA devices"
        raise UsageError(f"--device {device}", problem, "give another device, such as cpu")
