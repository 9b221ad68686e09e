"""A checkpoint's logits by transformers, in float32, with or without experts masked.

Routers differ in where an expert can be taken out of the original:
- sigmoid routers add a bias for the choice alone: -inf there removes an expert and leaves
  every other weight as it was, so the pruned model must agree to the last bit;
- routers that take a softmax over the chosen logits only: -inf as an expert's logit, and
  again nothing else changes, to the last bit;
- routers that take a softmax over all experts and renormalise their choice: the same mask,
  but the sum in the softmax has fewer terms: equal but for rounding, as tests/oracle/closeness.py
  says;
- routers that take a softmax over all experts and do not renormalise: removing experts makes
  the softmax one over the survivors, so the gate weight of expert e grows to
  p_e / (sum of p over the survivors). `relation=True` computes exactly that from the
  original's own probabilities.

The order of an unsorted top-k and the summation order of the router's matrix product are
fixed the same way in every model compared, as in tests/oracle/logits_oracle.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

ROUTER_CLASS = re.compile(r"(TopKRouter|TopkRouter|TokenChoiceRouter|MoEV1Gate)$")
BIASES = ("e_score_correction_bias", "expert_bias")
_topk = torch.topk

Kept = dict[int, list[int]]


def load(folder: Path, model_class: Any = AutoModelForCausalLM, unread: str = r"(?!)") -> Any:
    """The model in float32. unread: names in the file that the class is known not to read."""
    model, report = model_class.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
    )
    assert not report["missing_keys"]
    assert not report["mismatched_keys"]
    surplus = [name for name in report["unexpected_keys"] if not re.match(unread, name)]
    assert surplus == []
    return model.eval()


def logits(model: Any, retained: Kept | None = None, *, relation: bool = False) -> torch.Tensor:
    """Logits `[2, 40, vocab]` for fixed tokens; only the retained experts may be chosen."""
    tokens = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(7))
    with torch.inference_mode(), _routers(model, retained, relation):
        result: torch.Tensor = model(input_ids=tokens, use_cache=False).logits
    assert torch.isfinite(result).all()
    return result


@contextmanager
def _routers(model: Any, retained: Kept | None, relation: bool) -> Iterator[None]:
    found = {
        _layer(name): module
        for name, module in model.named_modules()
        if ROUTER_CLASS.search(type(module).__name__)
    }
    assert found
    biases = [
        (name, bias)
        for name, bias in [*model.named_buffers(), *model.named_parameters()]
        if name.endswith(BIASES)
    ]
    before = [bias.clone() for _, bias in biases]
    if retained is not None:
        assert found.keys() <= retained.keys()
        for name, bias in biases:
            bias[_gone(len(bias), retained[_layer(name)])] = float("-inf")
    forwards = {}
    for layer, router in found.items():
        forwards[layer] = router.forward
        kept = retained[layer] if retained is not None and not biases else None
        router.forward = _masked(router.forward, kept, relation)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        for layer, router in found.items():
            router.forward = forwards[layer]
        for (_, bias), old in zip(biases, before, strict=True):
            bias.copy_(old)


def _layer(name: str) -> int:
    return int(name.split("layers.")[1].split(".")[0])


def _gone(experts: int, kept: list[int]) -> torch.Tensor:
    gone = torch.ones(experts, dtype=torch.bool)
    gone[kept] = False
    return gone


def _masked(forward: Callable[..., Any], kept: list[int] | None, relation: bool) -> Any:
    """A router's forward that can choose the experts in `kept` only (all where None)."""

    def linear(
        hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        out = torch.stack([torch.mv(hidden, row) for row in weight], dim=-1)
        out = out if bias is None else out + bias
        if kept is not None and not relation:
            out[:, _gone(len(weight), kept)] = float("-inf")
        return out

    def topk(scores: torch.Tensor, k: int, dim: int = -1, sorted: bool = True) -> Any:
        if kept is None or not relation:
            return _topk(scores, k, dim=dim, sorted=True)
        torch.testing.assert_close(scores.sum(-1), torch.ones(len(scores)))
        survivors = scores[:, kept]
        weights, chosen = _topk(survivors / survivors.sum(-1, keepdim=True), k, sorted=True)
        return weights, torch.tensor(kept)[chosen]

    def masked_forward(*arguments: Any) -> Any:
        with (
            mock.patch.object(functional, "linear", linear),
            mock.patch.object(torch, "topk", topk),
        ):
            return forward(*arguments)

    return masked_forward
