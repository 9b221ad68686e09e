"""transformers' text model on the meta device, of which a few layers at a time are real.

Between `loading`, which reads weights, and `forward`, which runs samples. The whole model is
built, without weights. Every decoder layer's `forward` is replaced: a layer that is not active
returns its input, so that masks, positions and whatever else a model prepares for its layers come
from its own code. Every module of experts is replaced by one with a single expert.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from shardsurgeon.checkpoint.anatomy import Anatomy
from shardsurgeon.checkpoint.transformers_model import MetaModel
from shardsurgeon.errors import FamilyError
from shardsurgeon.layerwise.decoding import PackedWeight
from shardsurgeon.layerwise.loading import ParameterNames

# Attributes for the number of experts, of experts that only copy their input, and of both.
_COUNTS = ("num_experts", "num_routed_experts", "num_local_experts")
_COPIES, _ALL = "zero_expert_num", "total_experts"

Visit = Callable[..., Any]
"""(layer, the layer's own forward, its arguments, hidden states first) → the layer's output."""
Route = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, inputs [N, H], expert ids [N, K], gate weights [N, K]) → outputs [N, H]."""


@dataclass(frozen=True)
class ExpertModule:
    """The module of one layer's experts, reduced to one expert.

    path: its name in the model; module: the module; empty: its parameters on the meta device;
    copies: how many experts, numbered after the routed ones, return their input, None where the
    class has no such experts; scales_inputs: whether the model multiplies an expert's input by
    the gate weight instead of its output.
    """

    path: str
    module: nn.Module
    empty: Mapping[str, nn.Parameter]
    copies: int | None
    scales_inputs: bool

    def compute(self, inputs: Tensor) -> Tensor:
        """The expert's outputs [N, H] for inputs [N, H], by its class's own code."""
        forward = type(self.module).forward
        if self.scales_inputs:
            return forward(self.module, inputs)
        # Classes with copying experts need at least two choices a token: the copy gets weight 0.
        width = 1 if self.copies is None else 2
        index = torch.arange(width, device=inputs.device).expand(len(inputs), width)
        weights = (index == 0).to(inputs.dtype)
        return forward(self.module, inputs, index, weights)

    def load(self, parameters: Mapping[str, Tensor | PackedWeight]) -> None:
        """Set an expert's parameters, by their full names.

        Raises FamilyError where a shape is not the one that the config gives.
        """
        own = self.module._parameters
        for name, value in parameters.items():
            leaf = name.rpartition(".")[2]
            before = self.empty[leaf]
            if tuple(value.shape) != tuple(before.shape):
                problem = f"an expert has shape {list(value.shape[1:])}, the config makes it "
                raise FamilyError(name, f"{problem}{list(before.shape[1:])}")
            packed = isinstance(value, PackedWeight)
            own[leaf] = value if packed else nn.Parameter(value, requires_grad=False)

    def clear(self) -> None:
        """Drop the expert's weights."""
        self.module._parameters.update(self.empty)


class TextModel:
    """The part of a model that reads text, and its decoder layers."""

    def __init__(self, meta_model: MetaModel, names: ParameterNames, anatomy: Anatomy) -> None:
        """Find the text model and reduce each layer's experts to one.

        Raises FamilyError where the experts have an unknown form.
        """
        self.model: Any = meta_model.model
        self.model.eval()
        self.prefix = _prefix(names, anatomy)
        self.text: Any = self.model.get_submodule(self.prefix.rstrip("."))
        self.layers: Any = self.text.layers
        self._shapes = meta_model.expected
        self.experts = {
            layer.index: self._shrink(layer.index, layer.num_experts)
            for layer in anatomy.layers
            if layer.index < len(self.layers)
        }
        self.embeddings = {
            name: module
            for name, module in self.outside()
            if isinstance(module, nn.Embedding) and f"{name}.weight" in self._shapes
        }

    def take_over(self, visit: Visit, route: Route) -> None:
        """Replace the forward of every layer by `visit`, and that of experts by `route`."""
        for index, layer in enumerate(self.layers):
            layer.forward = partial(visit, index, layer.forward)
        for index, experts in self.experts.items():
            layer = self.model.get_submodule(self.layer_prefix(index).rstrip("."))
            route_experts(layer, experts, partial(route, index))

    @property
    def predictor(self) -> tuple[str, Any] | None:
        """The innermost model around this one that predicts tokens, and how the names of its
        parameters begin; None where there is none."""
        parts = self.prefix.rstrip(".").split(".")
        for end in range(len(parts), -1, -1):
            path = ".".join(parts[:end])
            model = self.model.get_submodule(path)
            head = getattr(model, "get_output_embeddings", lambda: None)()
            if head is not None:
                return f"{path}." if path else "", model
        return None

    @contextmanager
    def emptied(self, layers: Iterable[int]) -> Iterator[None]:
        """At the end, take out of some layers what was put into them."""
        before = [
            (owner, name, value)
            for layer in layers
            for module in self.layers[layer].modules()
            for owner in (module._parameters, module._buffers)
            for name, value in owner.items()
        ]
        try:
            yield
        finally:
            for owner, name, value in before:
                owner[name] = value

    def layer_prefix(self, layer: int) -> str:
        """How the names of a layer's parameters begin."""
        return f"{self.prefix}layers.{layer}."

    def resident(self) -> set[str]:
        """Parameters and buffers of the text model that are in no layer and no embedding."""
        embeddings = {f"{name}.weight" for name in self.embeddings}
        return {
            name
            for name in self._shapes
            if name.startswith(self.prefix)
            and not name.startswith(f"{self.prefix}layers.")
            and name not in embeddings
        }

    def parameters_of(self, layer: int) -> set[str]:
        """A layer's parameters and buffers that are in a checkpoint, experts left out."""
        prefix = self.layer_prefix(layer)
        experts = f"{self.experts[layer].path}." if layer in self.experts else "\0"
        return {
            name
            for name in self._shapes
            if name.startswith(prefix) and not name.startswith(experts)
        }

    @property
    def may_pad(self) -> bool:
        """Whether padding at the end of a sample changes nothing before it.

        Attention that selects keys by an indexer ignores keys after a token, but breaks ties
        among the others by how many keys there are. A classifier of tokens looks ahead.
        """
        parts = [part for layer in self.layers for part in layer.named_modules()]
        indexed = any(name.rpartition(".")[2] == "indexer" for name, _ in parts)
        return not indexed and all(getattr(part, "is_causal", True) for _, part in parts)

    def groups(self) -> list[range]:
        """Layers that must be filled together, in their order.

        Attention that uses the keys of an earlier layer, or its selection of keys, cannot run
        without that layer. All other groups are single layers.
        """
        total = len(self.layers)
        shares = [i for i in range(total) if self._attention(i, "store_full_length_kv")]
        starts = []
        for index in range(total):
            later = range(index, total)
            inside = bool(shares) and shares[0] < index and any(map(self.borrows, later))
            if index == 0 or not (inside or self._attention(index, "skip_topk")):
                starts.append(index)
        return [range(begin, end) for begin, end in zip(starts, [*starts[1:], total], strict=True)]

    def borrows(self, layer: int) -> bool:
        """Whether a layer's attention uses keys, or a selection of keys, of an earlier layer."""
        facts = ("skip_topk", "is_kv_shared_layer")
        return any(self._attention(layer, fact) for fact in facts)

    def _attention(self, layer: int, fact: str) -> bool:
        attention = getattr(self.layers[layer], "self_attn", None)
        return bool(getattr(attention, fact, False))

    def outside(self) -> Iterator[tuple[str, nn.Module]]:
        """The text model's modules that are in no layer, by full name."""
        for name, module in self.text.named_modules():
            if not name.startswith("layers."):
                yield (self.prefix + name).rstrip("."), module

    def _shrink(self, layer: int, experts: int) -> ExpertModule:
        """Replace a layer's module of experts by one of the same class with one expert."""
        path, module = self._find_experts(layer)
        one = copy.copy(module)
        one._parameters = {}
        one._modules = dict(module._modules)
        copies = getattr(module, _COPIES, None)
        for name, value in module.named_parameters(recurse=False):
            if value.shape[:1] not in ((experts,), (experts + (copies or 0),)):
                raise _unknown_block(f"{path}.{name}", f"has shape {list(value.shape)}")
            first = torch.empty(1, *value.shape[1:], dtype=value.dtype, device="meta")
            one._parameters[name] = nn.Parameter(first, requires_grad=False)
        for name in _COUNTS:
            if hasattr(one, name):
                setattr(one, name, 1)
        if copies is not None:
            setattr(one, _COPIES, 1)
            setattr(one, _ALL, 2)
        if hasattr(one, "config"):
            one.config._experts_implementation = "eager"
        parent, _, leaf = path.rpartition(".")
        setattr(self.model.get_submodule(parent), leaf, one)
        inputs = list(inspect.signature(type(one).forward).parameters)
        return ExpertModule(
            path, one, dict(one._parameters), copies, scales_inputs=len(inputs) == 2
        )

    def _find_experts(self, layer: int) -> tuple[str, nn.Module]:
        found = [
            (self.layer_prefix(layer) + name, module)
            for name, module in self.layers[layer].named_modules()
            if name.rpartition(".")[2] == "experts" and not isinstance(module, nn.ModuleList)
        ]
        if len(found) != 1:
            where = self.layer_prefix(layer).rstrip(".")
            raise _unknown_block(where, f"has {len(found)} modules of stacked experts")
        return found[0]


def route_experts(layer: Any, experts: ExpertModule, route: Callable[..., Tensor]) -> Any:
    """Replace the forward of a layer's experts by `route`, without the layer's number; the layer.

    experts: those of this layer, or of one that is built like it.
    """
    path = re.split(r"layers\.\d+\.", experts.path)[-1]
    module = layer.get_submodule(path)
    if experts.scales_inputs:
        block = layer.get_submodule(path.rpartition(".")[0])
        block.forward = partial(_input_scaling_block, block, route)
    else:
        module.forward = route
    return layer


def _prefix(names: ParameterNames, anatomy: Anatomy) -> str:
    """How the names of the text model's parameters begin, such as `model.`."""
    router = anatomy.main_layers[0].router
    target = names.target(router)
    match = re.match(r"(.*?)layers\.\d+\.", target.parameter) if target else None
    if match is None:
        raise _unknown_block(router, "transformers' model has no place for it")
    return match[1]


def _input_scaling_block(block: Any, route: Callable[..., Tensor], hidden_states: Tensor) -> Any:
    """The forward of an MoE block (Llama 4) that multiplies experts' inputs by gate weights.

    The block's own router chooses; it gives a score of 0 to experts that are not chosen.
    """
    flat = hidden_states.reshape(-1, hidden_states.shape[-1])
    scores, logits = block.router(flat)
    index = torch.topk(logits, block.top_k, dim=1).indices
    routed = route(flat, index, scores.gather(1, index))
    return block.shared_expert(flat) + routed, logits


def _unknown_block(where: str, problem: str) -> FamilyError:
    return FamilyError(where, problem, "experts built like this cannot be run here")
