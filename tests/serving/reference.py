"""The same questions to transformers: a checkpoint as it is, or with experts masked.

The masked model is the original that cannot choose a pruned expert: the router's logits of the
pruned experts are -inf before anything else is done with them, and so is the bias that some
routers add for the choice alone. What the router then does, its softmax included, is its own
code, so the same rule is right for every router: one that takes a softmax over all experts
without renormalising its choice (OLMoE) becomes one whose softmax is over the survivors, which
is what a pruned checkpoint is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from tests.oracle.byte_oracle import read_config
from tests.serving.engine import Answer

Retained = Mapping[int, Sequence[int]]


def answers(
    folder: Path,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    retained: Retained | None = None,
) -> list[Answer]:
    """What the checkpoint in `folder` says to each prompt, computed in float32.

    retained: layer → the only experts its router may choose; None leaves the routers alone.
    """
    model = _load(folder)
    with torch.inference_mode(), _masked(model, retained):
        return [_answer(model, list(prompt), new_tokens) for prompt in prompts]


def _answer(model: Any, prompt: list[int], new_tokens: int) -> Answer:
    tokens = list(prompt)
    # Without a cache: every step computes the whole sequence again.
    for _ in range(new_tokens):
        tokens.append(int(_logprobs(model, tokens)[-1].argmax()))
    logprobs = _logprobs(model, tokens)[:-1]
    start, new = len(prompt), tokens[len(prompt) :]
    chosen = logprobs[start - 1 :].gather(1, torch.tensor(new)[:, None])[:, 0]
    return Answer(logprobs[: start - 1], tuple(new), chosen)


def _logprobs(model: Any, tokens: Sequence[int]) -> torch.Tensor:
    logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
    return torch.log_softmax(logits.double(), dim=-1)


def _load(folder: Path) -> Any:
    nested = "text_config" in read_config(folder)
    auto_class: Any = AutoModelForImageTextToText if nested else AutoModelForCausalLM
    model, report = auto_class.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
    )
    assert not report["missing_keys"]
    assert not report["mismatched_keys"]
    # The MTP layer is numbered after the last decoder layer; transformers never reads it.
    mtp = f"model.layers.{model.config.get_text_config().num_hidden_layers}."
    assert [name for name in report["unexpected_keys"] if not name.startswith(mtp)] == []
    return model.eval()


@contextmanager
def _masked(model: Any, retained: Retained | None) -> Iterator[None]:
    """Keep every router of the model from choosing an expert that is not retained."""
    if retained is None:
        yield
        return
    routers = {
        int(name.split("layers.")[1].split(".")[0]): module
        for name, module in model.named_modules()
        if type(module).__name__.endswith("Router")
    }
    assert routers
    assert routers.keys() <= retained.keys()
    for layer, router in routers.items():
        pruned = torch.ones(router.num_experts, dtype=torch.bool)
        pruned[list(retained[layer])] = False
        router.forward = _unable_to_choose(router, pruned)
    yield


def _unable_to_choose(router: Any, pruned: torch.Tensor) -> Callable[[torch.Tensor], Any]:
    forward, plain = router.forward, functional.linear
    bias = getattr(router, "e_score_correction_bias", None)
    if bias is not None:
        bias.masked_fill_(pruned, float("-inf"))

    def linear(*arguments: Any) -> torch.Tensor:
        return plain(*arguments).masked_fill(pruned, float("-inf"))

    def masked_forward(hidden: torch.Tensor) -> Any:
        with mock.patch.object(functional, "linear", linear):
            return forward(hidden)

    return masked_forward
