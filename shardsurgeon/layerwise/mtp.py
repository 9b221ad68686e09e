"""A layer that predicts one token further ahead, run as one more decoder layer.

Beside `model`. transformers leaves these layers out, but where one is a decoder layer behind a
projection of the embedding and the hidden state, it is built like a main layer: its weights are
put in that layer's place. As engines serve it, position i takes the main model's state of i
behind the final norm, and the embedding of token i + 1.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from shardsurgeon.checkpoint.anatomy import Anatomy
from shardsurgeon.checkpoint.grain import Shape
from shardsurgeon.layerwise.loading import LayerWeights
from shardsurgeon.layerwise.naming import ParameterNames
from shardsurgeon.layerwise.textmodel import TextModel

# Norm of the embedding, norm of the state, projection of both: inside the layer, or beside it.
_FORMS = (
    ("enorm.weight", "hnorm.weight", "eh_proj.weight"),
    ("pre_fc_norm_embedding.weight", "pre_fc_norm_hidden.weight", "fc.weight"),
)


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
