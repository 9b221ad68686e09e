"""A checkpoint as a model that runs in layers, next-token-prediction layers included.

Builds transformers' model from the config, sorts the checkpoint's tensors by layer, fills layers
and frees them again.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from shardsurgeon.checkpoint.anatomy import Anatomy
from shardsurgeon.checkpoint.checkpoint import Checkpoint
from shardsurgeon.checkpoint.quantization import Shape
from shardsurgeon.checkpoint.transformers_model import (
    MetaModel,
    as_transformers_reads,
    engine_name,
    is_known,
)
from shardsurgeon.errors import FamilyError, UsageError
from shardsurgeon.layerwise.decoding import Decoder
from shardsurgeon.layerwise.experts import Recorder, StreamedExperts
from shardsurgeon.layerwise.forward import Batch, LayerRunner
from shardsurgeon.layerwise.loading import (
    OUTSIDE,
    ExpertRecipe,
    LayerWeights,
    Loader,
    ParameterNames,
    layer_weights,
    sort_weights,
)
from shardsurgeon.layerwise.memory import LayerMemory, free_memory, layer_memory
from shardsurgeon.layerwise.settings import DTYPES, Settings
from shardsurgeon.layerwise.tensors import TensorReader
from shardsurgeon.layerwise.text_model import TextModel

# Norm of the embedding, norm of the state, projection of both: inside the layer, or beside it.
_FORMS = (
    ("enorm.weight", "hnorm.weight", "eh_proj.weight"),
    ("pre_fc_norm_embedding.weight", "pre_fc_norm_hidden.weight", "fc.weight"),
)

_ELSEWHERE = "use scores that were made with the model's engine"


@dataclass(frozen=True, slots=True)
class Entrance:
    """Names of the weights by which an MTP layer is entered."""

    embedding_norm: str
    state_norm: str
    projection: str


@dataclass(frozen=True)
class MtpLayer:
    """An MTP layer that can be run.

    index: its number; twin: the main layer in whose place it runs; entrance: its way in;
    dense: the weights of the layer itself that are not experts; names: its own way from names
    to the twin's parameters.
    """

    index: int
    twin: int
    entrance: Entrance
    dense: Mapping[str, Shape]
    names: ParameterNames

    def enter(
        self, read: Callable[[str], Tensor], norm: nn.Module, states: Tensor, embedded: Tensor
    ) -> Tensor:
        """What the layer takes, [B, S, H].

        read: reads a weight; norm: one of the model's norms, for its kind; states: of the main
        model behind its final norm; embedded: of the tokens one further on.
        """
        parts = [
            _normed(norm, read(self.entrance.embedding_norm), embedded),
            _normed(norm, read(self.entrance.state_norm), states),
        ]
        return functional.linear(torch.cat(parts, dim=-1), read(self.entrance.projection))


def find_mtp_layer(
    weights: LayerWeights,
    outside: Mapping[str, Shape],
    anatomy: Anatomy,
    text: TextModel,
    names: ParameterNames,
) -> MtpLayer | None:
    """The first MTP layer with experts, where it is built like a main layer; else None.

    weights: its own; outside: weights in no layer.
    """
    layer = anatomy.mtp_layers[0]
    prefix = _prefix(layer.router, anatomy)
    entrance = _entrance(prefix, {**outside, **weights.dense})
    if entrance is None or layer.index != anatomy.num_layers:
        return None
    for twin in reversed(anatomy.main_layers):
        if twin.num_experts != layer.num_experts or text.borrows(twin.index):
            continue
        own = names.renamed(prefix, _prefix(twin.router, anatomy))
        placed = {name: own.target(name) for name in weights.dense}
        dense = {name: weights.dense[name] for name, target in placed.items() if target}
        filled = {target.parameter for target in placed.values() if target}
        if filled == text.parameters_of(twin.index):
            return MtpLayer(layer.index, twin.index, entrance, dense, own)
    return None


def _prefix(router: str, anatomy: Anatomy) -> str:
    place = anatomy.reader.place(router)
    assert place is not None
    return router[: place[1]]


def _entrance(prefix: str, weights: Mapping[str, Shape]) -> Entrance | None:
    """The way into a layer; prefix: of its tensors' names."""
    beside = prefix.split("layers.")[0]
    for stem in (prefix, beside):
        for form in _FORMS:
            if all(stem + part in weights for part in form):
                embedding_norm, state_norm, projection = (stem + part for part in form)
                return Entrance(embedding_norm, state_norm, projection)
    return None


def _normed(norm: nn.Module, weight: Tensor, states: Tensor) -> Tensor:
    own = copy.copy(norm)
    own._parameters = {"weight": nn.Parameter(weight, requires_grad=False)}
    result: Tensor = own(states)
    return result


class Model:
    """One model whose layers are filled when they are needed."""

    def __init__(self, checkpoint: Checkpoint, anatomy: Anatomy, settings: Settings) -> None:
        """Build it, and read no weight. Raises UsageError where transformers cannot build it,
        FamilyError where its tensors do not fit."""
        self._config = config = _config(checkpoint, anatomy)
        self._dtype_name = settings.dtype or _dtype_of(config)
        self._dtype: torch.dtype = getattr(torch, self._dtype_name)
        self._device = settings.device
        self._settings = checkpoint.settings
        self._anatomy = anatomy
        meta_model = _blueprint(config, checkpoint.location, self._dtype_name)
        self._shapes = meta_model.expected
        self._names = ParameterNames(meta_model, anatomy.family.transformers)
        self._text = TextModel(meta_model, self._names, anatomy)
        self._reader = TensorReader(checkpoint, settings.device)
        self._decoder = Decoder(self._reader, checkpoint.settings)
        self._loader = Loader(
            meta_model.model, self._names, self._decoder, self._dtype, settings.device
        )
        self._records = sort_weights(checkpoint, anatomy)
        self._location = checkpoint.location
        self._outside = self._fitting(OUTSIDE)
        self.passage = LayerRunner(self._text, self._rows, self._dtype)

    def groups(self) -> list[range]:
        """Layers that must run together, in their order."""
        return self._text.groups()

    @property
    def may_pad(self) -> bool:
        """Whether samples of different lengths may pass in one batch."""
        return self._text.may_pad

    def layer_memory(self) -> LayerMemory:
        """What the largest group of layers takes."""
        size, text = self._dtype.itemsize, self._text.text.config
        largest = max(
            sum(self._nbytes(self._text.parameters_of(layer)) for layer in group)
            for group in self._text.groups()
        )
        expert = max(
            sum(value.numel() for value in experts.module.parameters())
            for experts in self._text.experts.values()
        )
        eager = getattr(text, "_attn_implementation", "eager") == "eager"
        return layer_memory(
            weights=self._nbytes(self._text.resident()) + largest,
            expert=expert,
            config=text.to_dict(),
            itemsize=size,
            eager=eager,
        )

    def _nbytes(self, parameters: Iterable[str]) -> int:
        size: int = self._dtype.itemsize
        return size * sum(math.prod(self._shapes[name]) for name in parameters)

    def prepare(self, ids: NDArray[np.int64]) -> None:
        """Read what every layer needs; ids: tokens of some sample, to try the model with."""
        wanted = self._text.resident()
        with torch.no_grad():
            self._fill(self._loader, self._outside, wanted)
            for name, module in self._text.text.named_modules():
                if not name.startswith("layers."):
                    self._make_buffers(module)
            for module in self._text.embeddings.values():
                # Models ask it for its device; rows are put in for a call each.
                none = torch.empty(0, module.embedding_dim, dtype=self._dtype, device=self._device)
                module._parameters["weight"] = nn.Parameter(none, requires_grad=False)
        self.passage.probe(torch.from_numpy(ids[:64].copy())[None].to(self._device))

    @cached_property
    def mtp(self) -> MtpLayer | None:
        """The MTP layer that can be run, where there is one."""
        layers = self._anatomy.mtp_layers
        if not layers:
            return None
        outside = layer_weights(self._records[OUTSIDE], self._anatomy, self._settings).dense
        weights = self._layer(layers[0].index)
        return find_mtp_layer(weights, outside, self._anatomy, self._text, self._names)

    def enter_mtp(self, mtp: MtpLayer, batch: Batch) -> Batch:
        """A batch at the entrance of an MTP layer: one token shorter."""
        read = cache(lambda name: self._reader.read(name).to(self._dtype))
        norm = self._text.layers[mtp.twin].input_layernorm
        with torch.inference_mode():
            states = self.passage.finish(batch)[:, :-1]
            embedded = self.passage.embedded(batch.ids[:, 1:])
            taken = mtp.enter(read, norm, states, embedded)
        lengths = [max(0, length - 1) for length in batch.lengths]
        return Batch(batch.ids[:, :-1], lengths, taken)

    @contextmanager
    def filled_mtp(self, mtp: MtpLayer) -> Iterator[None]:
        """An MTP layer's weights in the place of its twin, their experts' left out."""
        loader = self._loader.named(mtp.names)
        with self._filled([(loader, mtp.twin, mtp.dense)]):
            yield

    @contextmanager
    def filled(self, group: range) -> Iterator[None]:
        """Some layers with their weights, their experts' left out."""
        with self._filled([(self._loader, layer, self._layer(layer).dense) for layer in group]):
            yield

    @contextmanager
    def _filled(self, work: list[tuple[Loader, int, Mapping[str, Shape]]]) -> Iterator[None]:
        """Layers filled by these loaders with these weights, and emptied again."""
        before = [
            (owner, name, value)
            for _, layer, _ in work
            for module in self._text.layers[layer].modules()
            for owner in (module._parameters, module._buffers)
            for name, value in owner.items()
        ]
        try:
            with torch.no_grad():
                for loader, layer, weights in work:
                    self._fill(loader, weights, self._text.parameters_of(layer))
                    for module in self._text.layers[layer].modules():
                        self._make_buffers(module)
            yield
        finally:
            for owner, name, value in before:
                owner[name] = value

    def experts(self, layer: int, num_experts: int, recorder: Recorder) -> StreamedExperts:
        """A layer's experts, ready to be asked."""
        recipe = self._loader.recipe(self._layer(layer).parts)
        return self._at_work(layer, recipe, num_experts, recorder)

    def mtp_experts(self, mtp: MtpLayer, num_experts: int, recorder: Recorder) -> StreamedExperts:
        """An MTP layer's experts, in the place of its twin's."""
        recipe = self._loader.named(mtp.names).recipe(self._layer(mtp.index).parts)
        return self._at_work(mtp.twin, recipe, num_experts, recorder)

    def _at_work(
        self, layer: int, recipe: ExpertRecipe, num_experts: int, recorder: Recorder
    ) -> StreamedExperts:
        module = self._text.experts[layer]
        own = module.module.named_parameters(recurse=False)
        if missing := {f"{module.path}.{name}" for name, _ in own} - recipe.parameters:
            raise _missing(min(missing))
        return StreamedExperts(module, num_experts, recipe.make, recorder)

    def read_ahead(self, group: range) -> None:
        """Let the system read the tensors of some layers before they are needed."""
        names = [record.name for layer in group for record in self._records.get(layer, ())]
        # The other half of the memory is for what computes meanwhile.
        self._reader.read_ahead(names, free_memory("cpu") // 2)

    def _layer(self, layer: int) -> LayerWeights:
        return layer_weights(self._records.get(layer, []), self._anatomy, self._settings)

    def _fitting(self, layer: int) -> dict[str, Shape]:
        """The weights outside of layers that belong to the text model."""
        wanted = self._text.resident() | {f"{name}.weight" for name in self._text.embeddings}
        dense = layer_weights(self._records.get(layer, []), self._anatomy, self._settings).dense
        self._embeddings: dict[str, str] = {}
        self._embedding_shapes: dict[str, Shape] = {}
        fitting = {}
        for name, shape in dense.items():
            target = self._names.target(name)
            if target is None or target.parameter not in wanted:
                continue
            if target.parameter.removesuffix(".weight") in self._text.embeddings:
                self._embeddings[target.parameter] = name
                self._embedding_shapes[name] = shape
            else:
                fitting[name] = shape
        return fitting

    def _fill(self, loader: Loader, weights: Mapping[str, Shape], wanted: set[str]) -> None:
        """Read weights. Raises FamilyError where a parameter that is wanted gets none."""
        filled = loader.fill(weights)
        if missing := wanted - filled:
            raise _missing(min(missing))

    def _make_buffers(self, module: nn.Module) -> None:
        """Compute the buffers that no checkpoint holds, such as rotary frequencies."""
        own = [
            name
            for name in module._non_persistent_buffers_set
            if module._buffers.get(name) is not None
        ]
        for name in own:
            buffer = module._buffers[name]
            assert buffer is not None
            module._buffers[name] = torch.empty_like(buffer, device=self._device)
        if own:
            self._text.text._init_weights(module)

    def _rows(self, parameter: str, ids: Tensor) -> Tensor:
        """Rows of an embedding, read from its shard."""
        name = self._embeddings[parameter]
        record = self._reader.record(name)
        if record is not None and record.dtype in ("BF16", "F16", "F32", "F64"):
            return self._reader.rows(name, ids.tolist()).to(self._dtype)
        return self._whole(name)[ids].to(self._dtype)

    @cache  # noqa: B019 (a model lives as long as its calibration)
    def _whole(self, name: str) -> Tensor:
        """An embedding that is quantized, decoded once."""
        return self._decoder.weight(name, self._embedding_shapes[name])


def _config(checkpoint: Checkpoint, anatomy: Anatomy) -> dict[str, Any]:
    """The config as transformers reads it. Raises UsageError where it has no such model."""
    settings, view = checkpoint.settings, anatomy.family.transformers
    config = as_transformers_reads(settings, view, is_known)
    if config is None:
        reason = view.unknown or f"it does not know model type {settings.get('model_type')!r}"
        problem = f"{engine_name()} cannot run {checkpoint.location}: {reason}"
        raise UsageError("calibrate", problem, _ELSEWHERE)
    return config


def _blueprint(config: dict[str, Any], location: str, dtype: str) -> MetaModel:
    """The model without weights. Raises UsageError where transformers cannot build it."""
    try:
        return MetaModel(config, location, attention=None, dtype=dtype)
    except UsageError as error:
        raise UsageError("calibrate", error.problem, _ELSEWHERE) from error


def _dtype_of(config: Any) -> str:
    """The dtype that a config names, for its text model where it has one; else bfloat16."""
    for node in (config, *(config.get(key) for key in ("text_config", "thinker_config"))):
        if isinstance(node, dict):
            name = str(node.get("torch_dtype", node.get("dtype", ""))).removeprefix("torch.")
            if name in DTYPES:
                return name
    return "bfloat16"


def _missing(name: str) -> FamilyError:
    return FamilyError(name, "transformers' model needs it and the checkpoint lacks it")
