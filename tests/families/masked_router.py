"""Logits by transformers, in float32, of a model whose routers cannot choose some experts.

One mask serves every router here: a pruned expert's logit is -inf before anything is computed
from it, and so is its correction bias, where there is one. What follows from it:
- the router takes a sigmoid of every expert for itself, or a softmax over its choice only
  (gpt-oss, Llama 4, Nemotron-H, Step-3.x): no other expert's weight changes, and the pruned
  model must agree to the last bit;
- it takes a softmax over all experts (Gemma 4, ERNIE 4.5, LongCat-Flash): the mask makes it one
  over the survivors, p_e / (sum of p over the survivors), which is what the pruned model
  computes with fewer terms in the sum: equal but for rounding,
  as tests/oracle/closeness.py says. In ERNIE 4.5 and LongCat-Flash the correction bias is added
  after that softmax, so the pruned model may choose otherwise than the original does among the
  survivors; masking the choice alone would not be its oracle.

A.X-K2 gives every expert outside the chosen groups a score of 0, whatever it was before: the
choice itself is masked, too, so that a pruned one does not come back that way.

The summation order of the router's product, the order of an unsorted top-k and that of equal
scores are fixed, as in tests/oracle/logits_oracle.py.
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
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForTokenClassification,
)

from tests.oracle.byte_oracle import read_config

Kept = dict[int, list[int]]


def logits(folder: Path, experts: int, retained: Kept | None = None) -> torch.Tensor:
    """Logits for fixed tokens, `[2, 40, vocab]` or of a classifier `[2, 40, labels]`; of `experts`,
    only the retained may be chosen."""
    config = read_config(folder)
    auto_class: Any = AutoModelForCausalLM
    if "text_config" in config:
        auto_class = AutoModelForImageTextToText
    elif config["architectures"][0].endswith("ForTokenClassification"):
        auto_class = AutoModelForTokenClassification
    model, report = auto_class.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
    )
    # Every class here leaves the MTP tensors of its family out of this report.
    assert not any(report[kind] for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"))
    tokens = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(7))
    with torch.inference_mode(), _masks(model.eval(), experts, retained):
        result: torch.Tensor = model(input_ids=tokens, use_cache=False).logits
    assert torch.isfinite(result).all()
    return result


@contextmanager
def _masks(model: Any, experts: int, retained: Kept | None) -> Iterator[None]:
    routers = {
        int(re.split(r"(?:layers|blocks)\.", name)[1].split(".")[0]): module
        for name, module in model.named_modules()
        if type(module).__name__.endswith(("Router", "MoEV1Gate"))
    }
    assert routers
    assert retained is None or routers.keys() <= retained.keys()
    for layer, router in routers.items():
        gone = [e for e in range(experts) if retained is not None and e not in retained[layer]]
        for name, bias in [*model.named_buffers(), *model.named_parameters()]:
            # Some blocks keep it beside the router and hand it over.
            if f".layers.{layer}." in name and name.endswith("e_score_correction_bias"):
                bias[..., gone] = float("-inf")
        router.forward = _masked(router.forward, gone, experts)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _masked(forward: Callable[..., Any], gone: list[int], experts: int) -> Any:
    """A router's own forward that sees -inf where the logits of the experts in `gone` were."""

    def linear(
        hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        out = torch.stack([torch.mv(hidden, row) for row in weight], dim=-1)
        out = out if bias is None else out + bias
        out[:, gone] = float("-inf")
        return out

    def topk(scores: torch.Tensor, k: int, dim: int = -1, sorted: bool = True) -> Any:
        if gone and scores.shape[dim] >= experts:
            scores = scores.clone()
            scores[..., gone] = float("-inf")
        values, indices = torch.sort(scores, dim=dim, descending=True, stable=True)
        return torch.return_types.topk((values[..., :k], indices[..., :k]))

    def masked_forward(*arguments: Any) -> Any:
        with (
            mock.patch.object(functional, "linear", linear),
            mock.patch.object(torch, "topk", topk),
            mock.patch.object(torch.Tensor, "topk", topk),
        ):
            return forward(*arguments)

    return masked_forward
