"""The calibration itself: all samples through one decoder layer after another.

Takes a checkpoint and samples; gives the accumulators of each layer to a sink and the hidden
states to a store, so that an interrupted run continues after its last finished group of layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from shardsurgeon.checkpoint.anatomy import Anatomy, read_anatomy
from shardsurgeon.checkpoint.checkpoint import Checkpoint
from shardsurgeon.checkpoint.transformers_model import silence_hub
from shardsurgeon.errors import UsageError
from shardsurgeon.layerwise.experts import Recorder
from shardsurgeon.layerwise.forward import Batch
from shardsurgeon.layerwise.memory import MOST_BATCHES, BatchSizes, batch_sizes, free_memory
from shardsurgeon.layerwise.model import Model, MtpLayer
from shardsurgeon.layerwise.resume import ActivationStore
from shardsurgeon.layerwise.samples import Sample, total_tokens
from shardsurgeon.layerwise.settings import LayerSink, Listener, Progress, Settings

Chunk = list[list[int]]
"""Batches for which each expert is read once; a batch is a list of sample positions."""


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
    """Run samples through a model and give each layer's accumulators to the sink.

    settings: with a dtype; store: for samples of these lengths; chunk_tokens: for how many tokens
    an expert is read once, None for what memory allows. Raises UsageError where transformers
    cannot build the model, the device does not exist or a layer does not fit into memory;
    FamilyError where experts or weights have an unknown form; WorkError where an expert's
    outputs are not finite; OutputWriteError where hidden states or results cannot be written.
    """
    require_device(settings.device)
    anatomy = read_anatomy(checkpoint)
    with silence_hub(), torch.inference_mode():
        model = Model(checkpoint, anatomy, settings)
        _Run(model, anatomy, samples, settings, store, sink, on_progress, chunk_tokens).run()


def require_device(device: str) -> None:
    """Raise UsageError where torch cannot use the device."""
    if device == "cpu":
        return
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    number = int(device.partition(":")[2] or 0)
    if number >= count:
        problem = f"torch {torch.__version__} finds {count} CUDA devices"
        raise UsageError(f"--device {device}", problem, "give another device, such as cpu")


class _Run:
    """One calibration: which layers are left, how samples are grouped, how far it is."""

    def __init__(
        self,
        model: Model,
        anatomy: Anatomy,
        samples: Sequence[Sample],
        settings: Settings,
        store: ActivationStore,
        sink: LayerSink,
        on_progress: Listener,
        chunk_tokens: int | None,
    ) -> None:
        """Raises UsageError where one layer and one batch do not fit into memory."""
        self._model = model
        self._samples = samples
        self._settings = settings
        self._store = store
        self._sink = sink
        self._listener = on_progress
        self._chunk_tokens = chunk_tokens
        self._layer_memory = model.layer_memory()
        self._chunks = self._cut(self._fitting_sizes())
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

    def run(self) -> None:
        """Run every group of layers that an earlier run has not finished."""
        done = self._sink.done_layers()
        if self._num_experts.keys() <= done:
            return
        self._model.prepare(self._samples[0].ids)
        if self._store.generation is None:
            self._embed()
        # The states of the next generation take as much memory as those of this one.
        reserved = self._states_nbytes() if self._store.in_memory else 0
        fitting = self._fitting_sizes(reserved)
        kept = self._store.keep_batch_sizes(fitting.batch_size, fitting.chunk)
        self._chunks = self._cut(BatchSizes(*kept))
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
        for positions in (batch for chunk in self._chunks for batch in chunk):
            batch = self._batch(positions)
            self._model.runner.embed(batch)
            self._keep_states(positions, batch)
        self._store.advance()

    def _run_group(self, number: int, group: range) -> None:
        """Run all samples through one group of layers, and keep what its experts added up."""
        is_last = self._model.mtp is None and number + 1 == len(self._groups)
        with self._model.filled(group):
            for following in self._groups[number + 1 :][:1]:
                self._model.read_ahead(following)
            recorders = {
                layer: self._recorder(layer, f"layer {layer}")
                for layer in group
                if layer in self._num_experts
            }
            experts = {
                layer: self._model.experts(layer, self._num_experts[layer], recorder)
                for layer, recorder in recorders.items()
            }
            for chunk in self._chunks:
                batches = [self._batch_with_states(positions) for positions in chunk]
                self._model.runner.run(batches, group, experts)
                for positions, batch in zip(chunk, batches, strict=True):
                    if not is_last:
                        self._keep_states(positions, batch)
                    self._report(group.start, batch.num_tokens * len(group))
        for layer, recorder in recorders.items():
            self._sink.finished_layer(layer, False, recorder.result())
        if not is_last:
            # After the sink: a layer that the store counts as done must not lack its results.
            self._store.advance()
        self._report_group(group, tokens_counted=True)

    def _run_mtp(self, mtp: MtpLayer) -> None:
        """Run all samples through the MTP layer, from the output of the main layers."""
        recorder = self._recorder(mtp.index, f"MTP layer {mtp.index}")
        twin = range(mtp.twin, mtp.twin + 1)
        with self._model.filled_mtp(mtp):
            experts = {
                mtp.twin: self._model.mtp_experts(mtp, self._num_experts[mtp.index], recorder)
            }
            for chunk in self._chunks:
                batches = [self._batch_with_states(positions) for positions in chunk]
                # The layer sees pairs of a state and the next token: a single token has no pair.
                entered = [
                    self._model.enter_mtp(mtp, batch) for batch in batches if batch.ids.shape[1] > 1
                ]
                if entered:
                    self._model.runner.run(entered, twin, experts)
                self._report(mtp.index, sum(batch.num_tokens for batch in batches))
        self._sink.finished_layer(mtp.index, True, recorder.result())
        self._report_group(range(mtp.index, mtp.index + 1), tokens_counted=True)

    def _recorder(self, layer: int, name: str) -> Recorder:
        return Recorder(name, self._num_experts[layer], self._settings.device)

    def _batch(self, positions: list[int]) -> Batch:
        ids = [self._samples[position].ids for position in positions]
        return Batch.of(ids, self._settings.device)

    def _batch_with_states(self, positions: list[int]) -> Batch:
        batch = self._batch(positions)
        batch.set_states([self._store.read(position) for position in positions])
        return batch

    def _keep_states(self, positions: list[int], batch: Batch) -> None:
        for position, states in zip(positions, batch.unpadded_states(), strict=True):
            self._store.write(position, states)

    def _states_nbytes(self) -> int:
        state = self._store.read(0)
        nbytes: int = state.numel() // len(state) * state.element_size() * self._tokens
        return nbytes

    def _fitting_sizes(self, reserved: int = 0) -> BatchSizes:
        """What fits into the memory that is free now.

        reserved: bytes of the host's free memory that the hidden states will take.
        """
        device = self._settings.device
        free = free_memory(device) - (reserved if device == "cpu" else 0)
        lengths = [sample.num_tokens for sample in self._samples]
        asked = self._settings.batch_size
        return batch_sizes(self._layer_memory, lengths, asked, self._chunk_tokens, free, device)

    def _cut(self, sizes: BatchSizes) -> list[Chunk]:
        lengths = [sample.num_tokens for sample in self._samples]
        return _chunks(lengths, sizes, mixed=self._model.may_pad)

    def _report(self, layer: int, tokens: int) -> None:
        done = self._progress.tokens_done + tokens
        self._progress = replace(self._progress, layer=layer, tokens_done=done)
        self._listener(self._progress)

    def _report_group(self, group: range, *, tokens_counted: bool = False) -> None:
        """Report that a group is done; tokens_counted: whether its tokens were reported."""
        layers = self._progress.layers_done + len(group)
        self._progress = replace(self._progress, layers_done=layers)
        self._report(group[-1], 0 if tokens_counted else self._tokens * len(group))


def _chunks(lengths: Sequence[int], sizes: BatchSizes, *, mixed: bool) -> list[Chunk]:
    """Group batches into chunks of at most `sizes.chunk` tokens, padding included.

    mixed: whether samples of different lengths may be in one batch.
    """
    chunks: list[Chunk] = []
    left = 0
    for batch in _batches(lengths, sizes.batch_size, mixed=mixed):
        tokens = lengths[batch[0]] * len(batch)
        if not chunks or tokens > left or len(chunks[-1]) == MOST_BATCHES:
            chunks.append([])
            left = sizes.chunk
        chunks[-1].append(batch)
        left -= tokens
    return chunks


def _batches(lengths: Sequence[int], size: int, *, mixed: bool) -> Iterator[list[int]]:
    """Positions of samples of similar lengths, the longest first."""
    order = sorted(range(len(lengths)), key=lambda position: (-lengths[position], position))
    batch: list[int] = []
    for position in order:
        differs = batch and not mixed and lengths[position] != lengths[batch[0]]
        if differs or len(batch) == size:
            yield batch
            batch = []
        batch.append(position)
    yield batch
