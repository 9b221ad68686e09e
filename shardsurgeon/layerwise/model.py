"""A checkpoint as a model that runs layer by layer, its MTP layer included.

Builds transformers' model from the config, sorts the checkpoint's tensors by layer, fills layers
with weights and empties them again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from shardsurgeon.checkpoint.anatomy import Anatomy
from shardsurgeon.checkpoint.checkpoint import Checkpoint
from shardsurgeon.checkpoint.quantization_schemes import Shape
from shardsurgeon.checkpoint.transformers_model import (
    MetaModel,
    as_transformers_reads,
    engine_name,
    is_known,
)
from shardsurgeon.errors import FamilyError, UsageError
from shardsurgeon.layerwise.decoding import Decoder
from shardsurgeon.layerwise.devices import Device
from shardsurgeon.layerwise.experts import NoExperts
from shardsurgeon.layerwise.forward import Batch, LayerRunner
from shardsurgeon.layerwise.loading import (
    LayerWeights,
    Loader,
    ParameterNames,
    layer_weights,
    sort_weights,
)
from shardsurgeon.layerwise.memory import OUTSIDE, free_memory
from shardsurgeon.layerwise.mtp import MtpLayer, find_mtp_layer
from shardsurgeon.layerwise.precision import NARROWER, TRIAL_TOKENS, Trials, stored_wider
from shardsurgeon.layerwise.settings import Settings
from shardsurgeon.layerwise.supply import Make
from shardsurgeon.layerwise.tensors import HeldTensors, TensorReader
from shardsurgeon.layerwise.text_model import ExpertModule, TextModel
from shardsurgeon.pruning.layer_counts import without_overrides
from shardsurgeon.storage.formats.tensor_table import TensorRecord

_ELSEWHERE = "measure with an engine that runs it"


class Model:
    """One model whose layers are filled when they are needed.

    runner: runs batches through it; reader: reads its tensors; dtype: of weights and activations;
    device: where they are.
    """

    def __init__(
        self, checkpoint: Checkpoint, anatomy: Anatomy, settings: Settings, device: Device
    ) -> None:
        """Build it without reading a weight. settings: with a dtype.

        Raises UsageError where transformers cannot build it, FamilyError where its tensors do
        not fit.
        """
        assert settings.dtype is not None
        self.dtype: torch.dtype = getattr(torch, settings.dtype)
        self.device = device.name
        self._config = checkpoint.settings
        self._anatomy = anatomy
        meta = meta_model(checkpoint, anatomy, checkpoint.settings, settings.dtype)
        self._shapes = meta.expected
        self._names = ParameterNames(meta, anatomy.family.transformers)
        self._text = TextModel(meta, self._names, anatomy)
        self.reader = TensorReader(checkpoint, device)
        self._decoder = Decoder(self.reader, checkpoint.settings)
        self._loader = Loader(meta.model, self._names, self._decoder, self.dtype, device.name)
        self._records = sort_weights(checkpoint, anatomy)
        self._embeddings: dict[str, tuple[str, Shape]] = {}
        self._outside = self._weights_outside()
        self.runner = LayerRunner(self._text, self._rows, self.dtype, device)

    def groups(self) -> list[range]:
        """Layers that must run together, in their order."""
        return self._text.groups()

    @property
    def may_pad(self) -> bool:
        """Whether samples of different lengths may be in one batch."""
        return self._text.may_pad

    @property
    def resident(self) -> int:
        """Parameters of the text model that are in no layer and no embedding."""
        return sum(math.prod(self._shapes[name]) for name in self._text.resident())

    @property
    def attention_pair(self) -> int:
        """Bytes of the scores of one pair of tokens, where attention is computed in full."""
        config = self._text.text.config
        if getattr(config, "_attn_implementation", "eager") != "eager":
            return 0
        heads = getattr(config, "num_attention_heads", None)
        return (self.dtype.itemsize + 4) * heads if isinstance(heads, int) else 0

    def prepare(self, ids: NDArray[np.int64]) -> None:
        """Read the weights outside of layers, and find out how the model calls its layers.

        ids: int64 [tokens] of any sample, for a trial call.
        """
        wanted = self._text.resident()
        with torch.no_grad():
            self._fill(self._loader, self._outside, wanted)
            for name, module in self._text.text.named_modules():
                if not name.startswith("layers."):
                    self._make_buffers(module)
            for module in self._text.embeddings.values():
                # Models ask it for its device; each call brings the rows that it needs.
                none = torch.empty(0, module.embedding_dim, dtype=self.dtype, device=self.device)
                module._parameters["weight"] = nn.Parameter(none, requires_grad=False)
        self.runner.probe(torch.from_numpy(ids[:64].copy())[None].to(self.device))
        if self.dtype in NARROWER:
            self._loader.kept = self._kept_in_float32(np.resize(ids, TRIAL_TOKENS))

    def _kept_in_float32(self, ids: NDArray[np.int64]) -> frozenset[str]:
        """Parameters of layers that no dtype rounds; ids: of a trial run."""
        first = Batch.of([ids], self.device)
        self.runner.embed(first)

        def run(group: range) -> torch.dtype:
            batch = replace(first)
            self.runner.run([batch], group, {layer: NoExperts() for layer in group})
            assert batch.states is not None
            return batch.states.dtype

        buffers = {name for name, _ in self._text.model.named_buffers()}
        wide = {
            layer: stored_wider(records, self._anatomy, self._names, buffers)
            for layer, records in self._records.items()
            if layer != OUTSIDE
        }
        return Trials(self._text, run, self.dtype, self.device).kept(wide)

    @property
    def head_nbytes(self) -> int:
        """Bytes of the head, which makes logits of states, while `with_head` holds it."""
        return sum(4 * math.prod(self._shapes[name]) for name in self._head())

    @property
    def vocabulary(self) -> int:
        """How many logits the head gives."""
        return max((self._shapes[name][0] for name in self._head()), default=0)

    @contextmanager
    def with_head(self) -> Iterator[None]:
        """Fill the head, for `runner.logits`; in float32 at least, and the final norm too.

        Raises FamilyError where the model has no head that predicts tokens.
        """
        wide = torch.promote_types(self.dtype, torch.float32)
        wanted = self._head()
        output = self._predictor()[1].get_output_embeddings()
        outside = self._layer(OUTSIDE).dense
        targets = {name: self._names.target(name) for name in outside}
        own = {n: outside[n] for n, to in targets.items() if to and to.parameter in wanted}
        empty = dict(output._parameters)
        with torch.no_grad():
            if own:
                self._fill(self._loader, own, wanted)
            else:
                output._parameters["weight"] = nn.Parameter(self._tied(), requires_grad=False)
        norms = [module for _, module in self._text.outside()]
        for module in (output, *norms):
            for values in (module._parameters, module._buffers):
                for name, value in values.items():
                    if value is not None and value.is_floating_point() and not value.is_meta:
                        values[name] = _in_dtype(value, wide)
        self.runner.head_dtype = wide
        try:
            yield
        finally:
            output._parameters.update(empty)

    def _head(self) -> set[str]:
        """Full names of the head's parameters."""
        prefix, model = self._predictor()
        head = model.get_output_embeddings()
        return {
            f"{prefix}{path}.{name}"
            for path, module in model.named_modules()
            if module is head
            for name, _ in module.named_parameters(recurse=False)
        }

    def _predictor(self) -> tuple[str, Any]:
        found = self._text.predictor
        if found is None:
            where = type(self._text.model).__name__
            raise FamilyError(where, "has no head that predicts tokens", "it cannot be evaluated")
        return found

    def _tied(self) -> Tensor:
        """The matrix of embeddings, where it is the head as well."""
        embedding = self._text.text.get_input_embeddings()
        name = next(name for name, known in self._text.embeddings.items() if known is embedding)
        found = self._embeddings[f"{name}.weight"]
        return self._decoder.weight(*found).to(self.device)

    @cached_property
    def mtp(self) -> MtpLayer | None:
        """The MTP layer that can be run, None where there is none."""
        layers = self._anatomy.mtp_layers
        if not layers:
            return None
        weights, outside = self._layer(layers[0].index), self._layer(OUTSIDE).dense
        return find_mtp_layer(weights, outside, self._anatomy, self._text, self._names)

    def enter_mtp(self, mtp: MtpLayer, batch: Batch) -> Tensor:
        """The states that enter an MTP layer, [B, S - 1, H]: one for each pair of a state and the
        next token.

        batch: with the states behind the last main layer, [B, S, ...], at least two tokens wide.
        """
        read = cache(lambda name: self.reader.read(name).to(self.dtype))
        norm = self._text.layers[mtp.twin].input_layernorm
        with torch.inference_mode():
            states = self.runner.finish(batch)[:, :-1]
            with self._embeddings_of(mtp):
                embedded = self.runner.embedded(batch.ids[:, 1:])
            return mtp.enter(read, norm, states, embedded)

    @contextmanager
    def _embeddings_of(self, mtp: MtpLayer) -> Iterator[None]:
        """Look embeddings of tokens up in the MTP layer's own matrix, where it has one."""
        module = self._text.text.get_input_embeddings()
        name = next(name for name, known in self._text.embeddings.items() if known is module)
        parameter = f"{name}.weight"
        before = self._embeddings[parameter]
        self._embeddings[parameter] = mtp.entrance.embedding or before
        try:
            yield
        finally:
            self._embeddings[parameter] = before

    @contextmanager
    def filled_mtp(self, mtp: MtpLayer) -> Iterator[None]:
        """Fill an MTP layer's twin with its weights, experts left out; empty it at the end."""
        with self._filled([(self._loader.named(mtp.names), mtp.twin, mtp.dense)]):
            yield

    @contextmanager
    def filled(self, group: range) -> Iterator[None]:
        """Fill some layers with their weights, experts left out; empty them at the end."""
        with self._filled([(self._loader, layer, self._layer(layer).dense) for layer in group]):
            yield

    @contextmanager
    def _filled(self, work: list[tuple[Loader, int, Mapping[str, Shape]]]) -> Iterator[None]:
        """Fill layers, given as (loader, layer, weights); empty them at the end."""
        with self._text.emptied(layer for _, layer, _ in work):
            with torch.no_grad():
                for loader, layer, weights in work:
                    self._fill(loader, weights, self._text.parameters_of(layer))
                    for module in self._text.layers[layer].modules():
                        self._make_buffers(module)
            yield

    def experts(self, layer: int, *, hold: bool = False) -> tuple[ExpertModule, Make]:
        """The module that a layer's experts compute in, and what reads them, one by its id.

        hold: keep what was read as it is stored, and make it anew each time.
        """
        return self._experts(layer, layer, self._loader, hold)

    def mtp_experts(self, mtp: MtpLayer, *, hold: bool = False) -> tuple[ExpertModule, Make]:
        """The same for an MTP layer's experts, which run in its twin."""
        return self._experts(mtp.twin, mtp.index, self._loader.named(mtp.names), hold)

    def _experts(
        self, place: int, layer: int, loader: Loader, hold: bool
    ) -> tuple[ExpertModule, Make]:
        decoder = Decoder(HeldTensors(self.reader), self._config) if hold else self._decoder
        recipe = loader.recipe(self._layer(layer).parts, decoder)
        module = self._text.experts[place]
        own = module.module.named_parameters(recurse=False)
        if missing := {f"{module.path}.{name}" for name, _ in own} - recipe.parameters:
            raise _missing(min(missing))
        return module, recipe.make

    def read_ahead(self, group: range) -> None:
        """Let the system read the tensors of some layers before they are needed."""
        names = [record.name for layer in group for record in self._records.get(layer, ())]
        # The other half of the memory is for what computes meanwhile.
        self.reader.read_ahead(names, free_memory("cpu") // 2)

    def layer(self, layer: int) -> nn.Module:
        """The module of a layer, as it is filled now."""
        module: nn.Module = self._text.layers[layer]
        return module

    def layer_prefix(self, layer: int) -> str:
        """How the names of a layer's parameters begin."""
        return self._text.layer_prefix(layer)

    def experts_of(self, layer: int) -> ExpertModule:
        """The module that stands for a layer's experts."""
        return self._text.experts[layer]

    def records_of(self, layer: int) -> Sequence[TensorRecord]:
        """The headers' entries of a layer's tensors."""
        return self._records.get(layer, ())

    def dense_of(self, layer: int) -> Mapping[str, Shape]:
        """A layer's weights that are not of experts, by name."""
        return self._layer(layer).dense

    @property
    def kept_in_float32(self) -> frozenset[str]:
        """Parameters that no dtype rounds."""
        return self._loader.kept

    def make_missing_buffers(self, module: nn.Module) -> None:
        """Compute the buffers that are in no checkpoint, where they are not there yet."""
        own = (module._buffers[name] for name in module._non_persistent_buffers_set)
        if any(value is not None and value.is_meta for value in own):
            self._make_buffers(module)

    def _layer(self, layer: int) -> LayerWeights:
        return layer_weights(self._records.get(layer, []), self._anatomy, self._config)

    def _weights_outside(self) -> dict[str, Shape]:
        """The weights of the text model that are in no layer; embeddings are set apart."""
        wanted = self._text.resident() | {f"{name}.weight" for name in self._text.embeddings}
        outside = {}
        for name, shape in self._layer(OUTSIDE).dense.items():
            target = self._names.target(name)
            if target is None or target.parameter not in wanted:
                continue
            if target.parameter.removesuffix(".weight") in self._text.embeddings:
                self._embeddings[target.parameter] = (name, shape)
            else:
                outside[name] = shape
        return outside

    def _fill(self, loader: Loader, weights: Mapping[str, Shape], wanted: set[str]) -> None:
        """Read weights. Raises FamilyError where a wanted parameter gets no value."""
        filled = loader.fill(weights)
        if missing := wanted - filled:
            raise _missing(min(missing))

    def _make_buffers(self, module: nn.Module) -> None:
        """Compute the buffers that are in no checkpoint, such as rotary frequencies."""
        own = [
            name
            for name in module._non_persistent_buffers_set
            if module._buffers.get(name) is not None
        ]
        for name in own:
            buffer = module._buffers[name]
            assert buffer is not None
            module._buffers[name] = torch.empty_like(buffer, device=self.device)
        if own:
            self._text.text._init_weights(module)

    def _rows(self, parameter: str, ids: Tensor) -> Tensor:
        """Rows of an embedding, [ids, width], read from its shard."""
        name, shape = self._embeddings[parameter]
        record = self.reader.record(name)
        if record is not None and record.dtype in ("BF16", "F16", "F32", "F64"):
            return self.reader.rows(name, ids.tolist()).to(self.dtype)
        return self._whole(name, shape)[ids].to(self.dtype)

    @cache  # noqa: B019 (a model lives as long as its calibration)
    def _whole(self, name: str, shape: Shape) -> Tensor:
        """A quantized embedding, which is decoded once."""
        return self._decoder.weight(name, shape)


def meta_model(
    checkpoint: Checkpoint, anatomy: Anatomy, settings: Mapping[str, Any], dtype: str
) -> MetaModel:
    """The model of a config without weights. Raises UsageError where transformers cannot build
    it."""
    view = anatomy.family.transformers
    # Each layer's experts come from its tensors; transformers need not know that they differ.
    alike = without_overrides(settings, anatomy.family.config)
    config = as_transformers_reads(alike, view, is_known)
    if config is None:
        reason = view.unknown or f"it does not know model type {settings.get('model_type')!r}"
        raise UsageError(
            checkpoint.location, f"{engine_name()} cannot run it: {reason}", _ELSEWHERE
        )
    try:
        return MetaModel(config, checkpoint.location, attention=None, dtype=dtype)
    except UsageError as error:
        raise UsageError("running a model", error.problem, _ELSEWHERE) from error


def _in_dtype(value: Tensor, dtype: torch.dtype) -> Tensor:
    wide = value.to(dtype)
    return nn.Parameter(wide, requires_grad=False) if isinstance(value, nn.Parameter) else wide


def _missing(name: str) -> FamilyError:
    return FamilyError(name, "transformers' model needs it and the checkpoint lacks it")
