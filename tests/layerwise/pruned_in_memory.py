"""What a pruned folder predicts, and how far that is from the original, by transformers in memory.

Knows nothing of the engine: both folders are loaded by `from_pretrained`, samples run one by one,
and every formula is followed to the letter in float64 from float32 logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Ids = NDArray[np.int64]


@dataclass
class Predicted:
    """Per predicted token: -ln q(t) and KL(p ‖ q); the two largest logits of each model."""

    nll: NDArray[np.float64]
    kl: NDArray[np.float64]
    first: NDArray[np.int64]
    gap: NDArray[np.float64]

    @property
    def perplexity(self) -> float:
        return float(np.exp(self.nll.mean()))


def logits(model: Any, samples: Sequence[Ids]) -> list[torch.Tensor]:
    """Float64 [tokens - 1, vocabulary] of each sample."""
    with torch.inference_mode():
        return [
            model(input_ids=torch.from_numpy(ids)[None], use_cache=False).logits[0, :-1].double()
            for ids in samples
            if len(ids) > 1
        ]


def predicted(
    whole: Sequence[torch.Tensor], pruned: Sequence[torch.Tensor], samples: Sequence[Ids]
) -> Predicted:
    """The numbers of a pruned model."""
    following = [torch.from_numpy(ids[1:]) for ids in samples if len(ids) > 1]
    p, q, t = torch.cat(list(whole)), torch.cat(list(pruned)), torch.cat(following)
    log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
    largest = q.topk(2).values
    return Predicted(
        nll=-log_q.gather(1, t[:, None])[:, 0].numpy(),
        kl=(log_p.exp() * (log_p - log_q)).sum(-1).numpy(),
        first=q.argmax(-1).numpy(),
        gap=(largest[:, 0] - largest[:, 1]).numpy(),
    )
