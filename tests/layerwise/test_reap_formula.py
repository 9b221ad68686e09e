"""Our saliencies beside the paper's formula and beside the authors' code, both written anew.

The paper (arXiv 2510.13999) weighs the output of expert j by the gate that the model itself gives
it: S_j = 1/|X_j| Σ g_j(x)·‖f_j(x)‖₂ over the tokens X_j that chose it. The code (CerebrasResearch/
reap, `observer.py` and `pruning_metrics.py`) works choice and gates out anew from the router's
logits, by one rule for every family: the highest logits, weighed by their softmax. What comes of
it on these fixtures is the table in `shardsurgeon/layerwise/reap.md`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from tests.families.specimens import fixture, written
from tests.layerwise import in_memory
from tests.layerwise.streaming import stream, token_ids

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.filterwarnings("ignore:`rope_scaling` is deprecated:FutureWarning"),
]

TABLE = Path(__file__).parents[2] / "shardsurgeon" / "layerwise" / "reap.md"
Gates: TypeAlias = tuple[Tensor, Tensor]
"""Chosen experts, int64 [T, K], and their gates [T, K]."""
Saliencies: TypeAlias = NDArray[np.float64]


@dataclass
class Layer:
    """What enters the experts of a layer: hidden states [T, H]; and the block that holds them."""

    hidden: Tensor
    block: Any

    @property
    def logits(self) -> Tensor:
        router = self.block.router if hasattr(self.block, "router") else self.block.gate
        return functional.linear(self.hidden.float(), router.weight.float())

    @property
    def bias(self) -> Tensor:
        """What a sigmoid router adds to choose, and does not weigh by."""
        named = dict(self.block.named_buffers()) | dict(self.block.named_parameters())
        return next(t for n, t in named.items() if n.endswith("e_score_correction_bias")).reshape(
            -1
        )

    def norms(self) -> Tensor:
        """‖f_j(x)‖₂ of every token and expert [T, E], from the weights."""
        experts, found = self.block.experts, []
        transposed = "Llama4" in type(experts).__name__
        for gate_up, down in zip(experts.gate_up_proj, experts.down_proj, strict=True):
            gate_up, down = (gate_up.T, down.T) if transposed else (gate_up, down)
            gate, up = functional.linear(self.hidden, gate_up).chunk(2, dim=-1)
            output = functional.linear(functional.silu(gate) * up, down)
            found.append(output.double().norm(dim=-1))
        return torch.stack(found, dim=1)


def saliencies(layer: Layer, gates: Gates) -> Saliencies:
    """S_j for gates: the mean over the tokens that chose j; 0 where none did."""
    chosen, weights = gates
    norms = layer.norms()
    found = np.zeros(norms.shape[1])
    for expert in range(norms.shape[1]):
        rows, places = torch.where(chosen == expert)
        if len(rows):
            found[expert] = (weights[rows, places].double() * norms[rows, expert]).mean().item()
    return found


def softmax_renormalized(layer: Layer, config: Any) -> Gates:
    """Qwen3, Mixtral: the highest of a softmax, which sum to 1."""
    values, chosen = layer.logits.softmax(-1).topk(config.num_experts_per_tok)
    return chosen, values / values.sum(-1, keepdim=True)


def softmax_as_it_is(layer: Layer, config: Any) -> Gates:
    """OLMoE: the highest of a softmax."""
    values, chosen = layer.logits.softmax(-1).topk(config.num_experts_per_tok)
    return chosen, values


def softmax_with_bias(layer: Layer, config: Any) -> Gates:
    """ERNIE 4.5: chosen by softmax plus bias, weighed by the softmax, which sums to 1."""
    scores = layer.logits.softmax(-1)
    chosen = (scores + layer.bias).topk(config.moe_k).indices
    values = scores.gather(1, chosen)
    return chosen, values / values.sum(-1, keepdim=True)


def softmax_in_groups(layer: Layer, config: Any) -> Gates:
    """DeepSeek-V2: the highest of a softmax in the groups with the highest, scaled."""
    scores = layer.logits.softmax(-1)
    groups = scores.unflatten(1, (config.n_group, -1))
    best = groups.amax(-1).topk(config.topk_group).indices
    open_to = torch.zeros(groups.shape[:2]).scatter(1, best, 1.0)[..., None]
    values, chosen = (groups * open_to).flatten(1).topk(config.num_experts_per_tok)
    return chosen, values * config.routed_scaling_factor


def sigmoid_in_groups(layer: Layer, config: Any) -> Gates:
    """GLM-4.5, DeepSeek-V3: chosen by sigmoid plus bias in the groups whose two highest add up to
    most, weighed by the sigmoid, which sums to the scaling factor."""
    scores = layer.logits.sigmoid()
    groups = (scores + layer.bias).unflatten(1, (config.n_group, -1))
    best = groups.topk(2).values.sum(-1).topk(config.topk_group).indices
    closed = torch.ones(groups.shape[:2]).scatter(1, best, 0.0)[..., None].bool()
    chosen = groups.masked_fill(closed, 0.0).flatten(1).topk(config.num_experts_per_tok).indices
    values = scores.gather(1, chosen)
    return chosen, values / values.sum(-1, keepdim=True) * config.routed_scaling_factor


def sigmoid_of_one(layer: Layer, config: Any) -> Gates:
    """Llama 4: the highest, weighed by its sigmoid."""
    values, chosen = layer.logits.topk(config.num_experts_per_tok)
    return chosen, values.sigmoid()


def as_the_code(layer: Layer, top_k: int, *, renormalize: bool) -> Gates:
    """What the authors' observer takes for choice and gates, whatever the family."""
    chosen = layer.logits.topk(top_k).indices
    weights = layer.logits.softmax(-1)
    if renormalize:
        weights = weights / weights.gather(1, chosen).sum(-1, keepdim=True)
    return chosen, weights.gather(1, chosen)


FAMILIES: dict[str, Callable[[Layer, Any], Gates]] = {
    "qwen3_moe": softmax_renormalized,
    "mixtral": softmax_renormalized,
    "olmoe": softmax_as_it_is,
    "ernie4_5_moe": softmax_with_bias,
    "deepseek_v2": softmax_in_groups,
    "glm4_moe": sigmoid_in_groups,
    "deepseek_v3": sigmoid_in_groups,
    "llama4": sigmoid_of_one,
}


@dataclass(frozen=True)
class Deviation:
    """How far the code's saliencies are from the formula's.

    largest: of any expert that both count, relative; pruned: share of the half that would go which
    is another one, over all layers.
    """

    largest: float
    pruned: float

    @property
    def words(self) -> str:
        return "equal" if self.largest < 1e-6 else f"{self.largest:.2f}"


def layers_of(model: Any, ids: list[NDArray[np.int64]]) -> dict[int, Layer]:
    """Layer → what enters its experts, over all samples."""
    seen: dict[int, list[Tensor]] = {}
    blocks: dict[int, Any] = {}
    hooks = []
    for name, module in model.named_modules():
        place = re.search(r"\.layers\.(\d+)\.\w+$", name)
        if place and hasattr(module, "experts"):
            index = int(place[1])
            blocks[index] = module

            def keep(_: Any, given: tuple[Tensor, ...], index: int = index) -> None:
                seen.setdefault(index, []).append(given[0].flatten(0, -2))

            hooks.append(module.register_forward_pre_hook(keep))
    with torch.inference_mode():
        for each in ids:
            model(input_ids=torch.from_numpy(each)[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return {index: Layer(torch.cat(seen[index]), block) for index, block in blocks.items()}


def deviation(theirs: list[Saliencies], ours: list[Saliencies]) -> Deviation:
    largest, others, gone = 0.0, 0, 0
    for one, other in zip(theirs, ours, strict=True):
        both = (one > 0) & (other > 0)
        largest = max(largest, float(np.abs(one[both] / other[both] - 1).max()))
        half = len(one) // 2
        lowest = [set(np.argsort(each, kind="stable")[:half].tolist()) for each in (one, other)]
        others, gone = others + len(lowest[0] - lowest[1]), gone + half
    return Deviation(largest, others / gone)


@pytest.mark.parametrize("name", FAMILIES)
def test_ours_follow_the_formula_and_the_table_says_how_far_the_code_does(
    name: str, tmp_path: Path
) -> None:
    folder, ids = written(fixture(name), tmp_path), token_ids()
    model = in_memory.load(name, folder, tmp_path)
    config = model.config.get_text_config()
    streamed = stream(folder, ids, tmp_path / "store", batch_size=6)
    top_k = getattr(config, "moe_k", None) or config.num_experts_per_tok
    # With `main.py` the config decides, with `layerwise_prune.py` the default of an option, True.
    ways = {"main": bool(getattr(config, "norm_topk_prob", False)), "layerwise": True}
    formula: list[Saliencies] = []
    code: dict[str, list[Saliencies]] = {way: [] for way in ways}
    with torch.inference_mode():
        for index, layer in sorted(layers_of(model, ids).items()):
            formula.append(saliencies(layer, FAMILIES[name](layer, config)))
            ours = streamed[index].metrics()["reap"]
            np.testing.assert_allclose(ours, formula[-1], rtol=1e-5, atol=1e-12)
            for way, renormalize in ways.items():
                gates = as_the_code(layer, top_k, renormalize=renormalize)
                code[way].append(saliencies(layer, gates))
    found = {way: deviation(values, formula) for way, values in code.items()}
    cells = [f"{each.words}, {each.pruned:.0%}" for each in found.values()]
    row = next(line for line in TABLE.read_text().splitlines() if line.startswith(f"| `{name}` |"))
    said = [cell.strip() for cell in row.strip("|").split("|")][2:]
    assert said == cells
