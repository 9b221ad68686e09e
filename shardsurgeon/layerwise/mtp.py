"""The layer for next-token prediction: how its input is made, and whether it can be run.

It is run as a twin of a main layer that is built alike.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from shardsurgeon.checkpoint.anatomy import Anatomy
from shardsurgeon.checkpoint.quantization_schemes import Shape
from shardsurgeon.layerwise.loading import LayerWeights, ParameterNames
from shardsurgeon.layerwise.text_model import TextModel

# Names of the weights that lead into an MTP layer: norm of the embedding, norm of the state,
# projection of both. DeepSeek-V3 and its relatives; Qwen3-Next.
_FORMS = (
    ("enorm.weight", "hnorm.weight", "eh_proj.weight"),
    ("pre_fc_norm_embedding.weight", "pre_fc_norm_hidden.weight", "fc.weight"),
)
# Beside these, where the layer does not share the model's embeddings: as published; as DeepSeek's
# own code and Bailing name it.
_OWN_EMBEDDINGS = ("embed_tokens.weight", "emb.tok_emb.weight", "word_embeddings.weight")


@dataclass(frozen=True, slots=True)
class Entrance:
    """Names of the weights that combine hidden states and embeddings into an MTP layer's input.

    embedding: name and shape of its own matrix of embeddings, None where it has the model's.
    """

    embedding_norm: str
    state_norm: str
    projection: str
    embedding: tuple[str, Shape] | None


@dataclass(frozen=True)
class MtpLayer:
    """An MTP layer that can be run.

    index: its number; twin: the main layer of the same structure, which is filled with its
    weights to run it; entrance: the weights that make its input; dense: its own weights, experts
    left out; names: maps its names to the twin's parameters.
    """

    index: int
    twin: int
    entrance: Entrance
    dense: Mapping[str, Shape]
    names: ParameterNames

    def enter(
        self, read: Callable[[str], Tensor], norm: nn.Module, states: Tensor, embedded: Tensor
    ) -> Tensor:
        """The layer's input, [B, S, H]: projection · [norm(embedded); norm(states)].

        Section 2.2 of the DeepSeek-V3 report (arXiv 2412.19437); published projections take the
        embedding first.

        read: reads a weight by its name; norm: a norm of the kind that the model uses; states:
        [B, S, H] of the main model behind its final norm; embedded: [B, S, H] of each position's
        next token.
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
    """The first MTP layer with experts, None where it is not built like a main layer.

    weights: the MTP layer's; outside: name → shape of the weights in no layer.
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
    """How the names of a router's layer begin."""
    place = anatomy.reader.place(router)
    assert place is not None
    return router[: place[1]]


def _entrance(prefix: str, weights: Mapping[str, Shape]) -> Entrance | None:
    """The entrance of a layer; prefix: how its tensors' names begin."""
    # In the layer, or beside the list of layers.
    for stem in (prefix, prefix.split("layers.")[0]):
        for form in _FORMS:
            if all(stem + part in weights for part in form):
                embedding_norm, state_norm, projection = (stem + part for part in form)
                own = (stem + name for name in _OWN_EMBEDDINGS if stem + name in weights)
                embedding = next(((name, weights[name]) for name in own), None)
                return Entrance(embedding_norm, state_norm, projection, embedding)
    return None


def _normed(norm: nn.Module, weight: Tensor, states: Tensor) -> Tensor:
    """The states normalized with another weight than the norm's own."""
    own = copy.copy(norm)
    own._parameters = {"weight": nn.Parameter(weight, requires_grad=False)}
    result: Tensor = own(states)
    return result
