"""Pruned models beside the whole one: layers that share its weights but for their routers.

A candidate's layer is one of transformers' model for its number of experts, so that all behind
the router is what the pruned folder computes. What a prune leaves as it is, it takes from the
filled layer of the whole model; what a prune changes (routers, their biases, tables of expert
ids) is read as the plan would write it. Its experts are those of the whole model, asked for under
their old numbers.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from shardsurgeon.checkpoint.anatomy import Anatomy
from shardsurgeon.checkpoint.checkpoint import Checkpoint
from shardsurgeon.checkpoint.quantization import read_weights
from shardsurgeon.checkpoint.roles import ExpertTensor
from shardsurgeon.errors import FamilyError
from shardsurgeon.execution.plan import OutputTensor
from shardsurgeon.layerwise.damage import Candidate
from shardsurgeon.layerwise.decoding import Decoder
from shardsurgeon.layerwise.loading import Loader, ParameterNames
from shardsurgeon.layerwise.model import Model, meta_model
from shardsurgeon.layerwise.tensors import TensorReader
from shardsurgeon.layerwise.text_model import route_experts
from shardsurgeon.pruning.config_edits import settings_with_counts
from shardsurgeon.pruning.keep_lists import KeepList, LayerKeep
from shardsurgeon.storage.formats.tensor_table import TensorRecord


class CandidateLayers:
    """The layers of some candidates; candidate i runs in lane i + 1 of the model's runner."""

    def __init__(
        self,
        model: Model,
        checkpoint: Checkpoint,
        anatomy: Anatomy,
        candidates: Sequence[Candidate],
    ) -> None:
        self._model = model
        self._checkpoint = checkpoint
        self._anatomy = anatomy
        self._candidates = candidates
        self._models: dict[int, _OfCount] = {}

    @contextmanager
    def filled(self, group: range) -> Iterator[None]:
        """Give the candidates their layers of a group, which the model has filled.

        Raises FamilyError where transformers' model of fewer experts lacks a value.
        """
        others = self._model.runner.others
        for lane, candidate in enumerate(self._candidates, start=1):
            for layer in group:
                kept = candidate.keep.layers.get(layer)
                # MTP layers, which may be among the keep-lists, are in no group.
                if kept is not None and kept.pruned:
                    others[lane, layer] = self._layer(layer, kept, candidate.changed[layer]).forward
        try:
            yield
        finally:
            others.clear()

    def _layer(self, layer: int, kept: LayerKeep, changed: Mapping[str, OutputTensor]) -> Any:
        count = len(kept.retained)
        if count not in self._models:
            settings = settings_with_counts(self._checkpoint, self._anatomy, self._alike(count))
            self._models[count] = _OfCount(self._model, self._checkpoint, self._anatomy, settings)
        device = self._model.device
        retained = torch.tensor(kept.retained, device=device)
        route = partial(self._route, layer, kept.num_experts, retained)
        twin = self._models[count].layer(layer, changed)
        return route_experts(twin, self._model.experts_of(layer), route)

    def _alike(self, count: int) -> KeepList:
        """Keep-lists with the same number in every layer: transformers reads one for all."""
        layers = {
            layer.index: LayerKeep(tuple(range(least)), tuple(range(least, layer.num_experts)))
            for layer in self._anatomy.layers
            if (least := min(count, layer.num_experts))
        }
        return KeepList(self._anatomy.num_experts, layers)

    def _route(
        self,
        layer: int,
        num_experts: int,
        retained: Tensor,
        inputs: Tensor,
        index: Tensor,
        weights: Tensor,
    ) -> Tensor:
        """The experts' outputs. Ids after the last expert (of copies) stay behind the last."""
        beyond = index - len(retained)
        old = torch.where(
            beyond < 0, retained[index.clamp(max=len(retained) - 1)], beyond + num_experts
        )
        return self._model.runner.route(layer, inputs, old, weights)


class _OfCount:
    """transformers' model with another number of experts, on the meta device."""

    def __init__(
        self, model: Model, checkpoint: Checkpoint, anatomy: Anatomy, settings: Mapping[str, Any]
    ) -> None:
        self._whole = model
        self._checkpoint = checkpoint
        self._anatomy = anatomy
        self._settings = settings
        view = anatomy.family.transformers
        meta = meta_model(checkpoint, anatomy, settings, str(model.dtype).removeprefix("torch."))
        self._model = meta.model.eval()
        self._names = ParameterNames(meta, view)

    def layer(self, index: int, changed: Mapping[str, OutputTensor]) -> nn.Module:
        """A layer with the whole model's weights and, of its own, those that a prune changes."""
        prefix = self._whole.layer_prefix(index)
        whole = self._whole.layer(index)
        own: nn.Module = self._model.get_submodule(prefix.rstrip("."))
        before = _values(own)
        try:
            filled = self._fill(index, changed)
            twin = _twin(own)
        finally:
            for module, name, owner in before:
                getattr(module, owner)[name] = before[module, name, owner]
        experts = f"{self._whole.experts_of(index).path}."
        for path, module in twin.named_modules():
            for owner in ("_parameters", "_buffers"):
                values = getattr(module, owner)
                for name in [name for name, value in values.items() if value is not None]:
                    full = f"{prefix}{path}.{name}" if path else f"{prefix}{name}"
                    if full not in filled and not full.startswith(experts):
                        values[name] = _shared(whole, path, owner, name, values[name])
            self._whole.make_missing_buffers(module)
            for name, value in module.named_parameters(path, recurse=False):
                if value.is_meta and not f"{prefix}{name}".startswith(experts):
                    problem = "has another size with fewer experts, and no tensor gives it a value"
                    raise FamilyError(f"{prefix}{name}", problem, "measure the pruned folder")
        return twin

    def _fill(self, index: int, changed: Mapping[str, OutputTensor]) -> set[str]:
        """Read what a prune changes into the model's own layer; the parameters' full names."""
        dense = self._whole.dense_of(index)
        role = self._anatomy.reader.role
        records = [
            _record(changed[record.name]) if record.name in changed else record
            for record in self._whole.records_of(index)
            if not isinstance(role(record), ExpertTensor)
        ]
        shapes = read_weights(records, self._checkpoint.settings).shapes
        weights = {name: shape for name, shape in shapes.items() if name in dense}
        targets = {name: self._names.target(name) for name in weights}
        stems = {name.rpartition(".")[0] for name in changed}
        touched = {
            target.parameter
            for name, target in targets.items()
            if target is not None and (name in changed or name.rpartition(".")[0] in stems)
        }
        wanted = {
            name: weights[name]
            for name, target in targets.items()
            if target is not None and target.parameter in touched
        }
        reader = _Changed(self._whole.reader, changed)
        decoder = Decoder(reader, self._checkpoint.settings)
        dtype, device = self._whole.dtype, self._whole.device
        loader = Loader(self._model, self._names, decoder, dtype, device)
        loader.kept = self._whole.kept_in_float32
        with torch.no_grad():
            return loader.fill(wanted) & touched


class _Changed:
    """Tensors as a prune would write them."""

    def __init__(self, reader: TensorReader, changed: Mapping[str, OutputTensor]) -> None:
        self._reader = reader
        self._changed = changed

    def record(self, name: str) -> TensorRecord | None:
        """As of the reader behind it, for the changed tensor."""
        changed = self._changed.get(name)
        return self._reader.record(name) if changed is None else _record(changed)

    def read(self, name: str, row: int | None = None) -> Tensor:
        """As of the reader behind it."""
        changed = self._changed.get(name)
        if changed is None:
            return self._reader.read(name, row)
        whole = self._reader.planned(changed)
        return whole if row is None else whole[row : row + 1]


def _record(tensor: OutputTensor) -> TensorRecord:
    return TensorRecord(tensor.name, tensor.dtype, tensor.shape, 0, tensor.nbytes)


def _values(module: nn.Module) -> dict[tuple[nn.Module, str, str], Any]:
    """(module, name, where it is kept) → each parameter and buffer below a module."""
    return {
        (part, name, owner): value
        for part in module.modules()
        for owner in ("_parameters", "_buffers")
        for name, value in getattr(part, owner).items()
    }


def _twin(module: nn.Module) -> nn.Module:
    """A module of the same values, whose values can be set without changing the other's."""
    own = copy.copy(module)
    for owner in ("_parameters", "_buffers"):
        setattr(own, owner, dict(getattr(module, owner)))
    own._modules = {
        name: None if child is None else _twin(child) for name, child in module._modules.items()
    }
    return own


def _shared(whole: nn.Module, path: str, owner: str, name: str, own: Tensor) -> Tensor:
    """The whole model's value of a parameter or buffer; `own` where it has another shape."""
    value = getattr(whole.get_submodule(path), owner).get(name)
    if value is None or value.shape != own.shape:
        return own
    result: Tensor = value
    return result
