"""An MTP layer's sums are those of the layer run after the whole model, set up by hand."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from shardsurgeon.checkpoint.anatomy import read_anatomy
from shardsurgeon.checkpoint.checkpoint import open_checkpoint
from tests.families.specimens import fixture, written
from tests.layerwise import in_memory
from tests.layerwise.streaming import Sink, stream, token_ids
from tests.oracle.byte_oracle import read_tensors

pytestmark = pytest.mark.oracle

Tensors = dict[str, torch.Tensor]


class Identity(nn.Module):
    """A layer that returns its input."""

    def forward(self, hidden: torch.Tensor, *more: Any, **named: Any) -> torch.Tensor:
        return hidden


def with_experts_stacked(layer: Tensors) -> Tensors:
    """Per-expert projections as transformers holds them: gate above up, [E, 2I, H]."""
    experts = {n: t for n, t in layer.items() if re.search(r"\.experts\.\d+\.", n)}
    if not experts:
        return layer
    count = 1 + max(int(n.split("experts.")[1].split(".")[0]) for n in experts)
    out = {n: t for n, t in layer.items() if n not in experts}

    def whole(part: str) -> torch.Tensor:
        return torch.stack([layer[f"mlp.experts.{e}.{part}.weight"] for e in range(count)])

    out["mlp.experts.gate_up_proj"] = torch.cat([whole("gate_proj"), whole("up_proj")], dim=1)
    out["mlp.experts.down_proj"] = whole("down_proj")
    return out


CASES = {
    # fixture: prefix of the layer's names, prefix of the entrance's names, norms and projection
    "deepseek_v3": ("model.layers.3.", "model.layers.3.", ("enorm", "hnorm", "eh_proj")),
    "glm4_moe": ("model.layers.3.", "model.layers.3.", ("enorm", "hnorm", "eh_proj")),
    "qwen3_next": (
        "mtp.layers.0.",
        "mtp.",
        ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "fc"),
    ),
}


def with_embeddings(made: Any, name: str, own: bool) -> Any:
    """The fixture with embeddings of its MTP layer that are not the model's, or are the same."""
    main = made.tensors["model.embed_tokens.weight"]
    if not own and name not in made.tensors:
        return made
    other = torch.randn(main.shape, generator=torch.Generator().manual_seed(8)).to(main)
    return replace(made, tensors=made.tensors | {name: other if own else main.clone()})


@pytest.mark.parametrize("own_embeddings", [False, True])
@pytest.mark.parametrize("name", list(CASES))
def test_the_mtp_layers_sums_are_those_of_a_layer_behind_the_final_norm(
    name: str, own_embeddings: bool, tmp_path: Path
) -> None:
    prefix, entrance, parts = CASES[name]
    made = with_embeddings(fixture(name), f"{entrance}embed_tokens.weight", own_embeddings)
    folder, ids = written(made, tmp_path), token_ids()
    model = in_memory.load(name, folder, tmp_path)
    tensors = {n: t.float() for n, t in read_tensors(folder).items()}
    shared = tensors["model.embed_tokens.weight"]
    embeddings = tensors.get(f"{entrance}embed_tokens.weight", shared)
    assert torch.equal(embeddings, shared) != own_embeddings
    norms = [copy.deepcopy(model.model.layers[-1].input_layernorm) for _ in range(2)]
    for norm, part in zip(norms, parts, strict=False):
        norm.weight.data = tensors[f"{entrance}{part}.weight"]

    entered = []
    with torch.inference_mode():
        for sequence in (torch.from_numpy(sequence)[None] for sequence in ids):
            states = model.model(input_ids=sequence, use_cache=False).last_hidden_state
            embedded = embeddings[sequence[:, 1:]]
            both = torch.cat([norms[0](embedded), norms[1](states[:, :-1])], dim=-1)
            entered.append(both @ tensors[f"{entrance}{parts[2]}.weight"].T)

    layer = model.model.layers[-1]
    own = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    expected_names = set(layer.state_dict())
    own = {n: t for n, t in with_experts_stacked(own).items() if n in expected_names}
    layer.load_state_dict(own)
    others = [Identity() for _ in model.model.layers[:-1]]
    for other, before in zip(others, model.model.layers, strict=False):
        other.__dict__["layer_type"] = getattr(before, "layer_type", None)
    model.model.layers = nn.ModuleList([*others, layer])
    expected = in_memory.Sums()
    hook = layer.mlp.experts.register_forward_pre_hook(in_memory.on_experts(expected))
    with torch.inference_mode():
        for states in entered:
            if states.shape[1]:
                model.model(inputs_embeds=states, use_cache=False)
    hook.remove()

    sink = Sink()
    stream(folder, ids, tmp_path / "store", batch_size=2, sink=sink)
    index = read_anatomy(open_checkpoint(folder)).mtp_layers[0].index
    assert sink.mtp == {index}
    in_memory.assert_equal({index: sink.layers[index]}, {index: expected})


def test_an_mtp_layer_with_a_structure_of_its_own_has_no_scores(tmp_path: Path) -> None:
    folder, sink = written(fixture("deepseek_v4"), tmp_path), Sink()
    stream(folder, token_ids((9,)), tmp_path / "store", sink=sink)
    anatomy = read_anatomy(open_checkpoint(folder))
    assert anatomy.mtp_layers
    assert sink.layers.keys() == {layer.index for layer in anatomy.main_layers}
