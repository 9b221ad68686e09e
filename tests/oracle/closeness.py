"""How far apart the logits of two models may be that compute the same numbers in another order.

A pruned model sums fewer terms in a softmax than the original whose experts are masked, where
the masked ones are zeros. So the last bits differ, and with them those of all that follows.
How much that can come to, relative to the size of the logits:

- A float32 sum of n products is right to n · u times the sum of their magnitudes, u = eps / 2
  (N. J. Higham, Accuracy and Stability of Numerical Algorithms, section 3.1). Two models that
  both err by that much are n · eps apart.
- The longest sums of a layer run over the hidden size: n = hidden_size.
- Each layer adds as much again: times their number.

    tolerance = eps · hidden_size · layers · max |logits|

It is the worst case of rounding, and no proof: a normalisation may amplify what comes in. But
errors add up like the square root of n rather than n, so that there is room: of all models here,
on a processor with AVX-512, with AVX2 alone and with neither, none was further apart than a tenth
of it. A wrong expert or router row is a hundred times as far (tests/oracle/test_closeness.py).
"""

from __future__ import annotations

from pathlib import Path

import torch

from tests.oracle.byte_oracle import read_config


def tolerance(logits: torch.Tensor, folder: Path) -> float:
    """The largest difference that rounding explains, for a model with the config in `folder`."""
    config = read_config(folder)
    for inner in ("thinker_config", "text_config", "language_config"):
        config = config.get(inner, config)
    keys = ("num_hidden_layers", "num_layers", "n_layers")
    layers = next((config[key] for key in keys if config.get(key)), None)
    layers = layers or len(config["layers_block_type"])
    terms = (config.get("hidden_size") or config["d_model"]) * layers
    return float(torch.finfo(torch.float32).eps * terms * logits.abs().max())


def assert_equal_but_for_rounding(result: torch.Tensor, masked: torch.Tensor, folder: Path) -> None:
    """The logits differ by no more than `tolerance`."""
    assert result.dtype == masked.dtype == torch.float32
    torch.testing.assert_close(result, masked, atol=tolerance(masked, folder), rtol=0)
