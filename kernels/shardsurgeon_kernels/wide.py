"""Products of 16-bit floats on a CPU that has no unit for them: in float32, tile by tile.

A library without such a unit widens both matrices inside its product and is five to eight times
slower there than in float32. So W is written, one block of rows at a time, as floats that hold
values rounded to x's dtype; the block is still in the cache when it is multiplied by x, widened
once. The sum is in float32, as promised, and rounded once.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

HALVES = (torch.bfloat16, torch.float16)
# Of one block of W: 4 MB of float32. Smaller ones make the product slow.
BLOCK_ELEMENTS = 1 << 20
# Bounds the widened copy of x: 4 MB for a thousand features.
TOKENS_AT_ONCE = 1024
# Float32 must win clearly, so that processes on one machine decide alike. Measured ratios: 0.3 to
# 1.7 where there is a unit for the dtype, 3 and more where there is none.
TIMES_FASTER = 2.0
TRIAL_TOKENS, TRIAL_FEATURES, TRIALS = 64, 512, 6


@cache
def pays(dtype: torch.dtype) -> bool:
    """Whether this process multiplies float32 at least twice as fast as `dtype`.

    Found by a timing of some milliseconds, once per dtype, as neither the processor's name nor its
    flags say what the library makes of them (ONEDNN_MAX_CPU_ISA takes units away). On one thread:
    several would wait for each other on a machine that is shared. False for other dtypes than
    bfloat16 and float16.
    """
    if dtype not in HALVES:
        return False
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        narrow, wide = _seconds(dtype), _seconds(torch.float32)
        for _ in range(TRIALS):
            narrow, wide = min(narrow, _seconds(dtype)), min(wide, _seconds(torch.float32))
    finally:
        torch.set_num_threads(threads)
    return narrow > TIMES_FASTER * wide


def linear(
    x: Tensor, shape: tuple[int, int], bias: Tensor | None, fill: Callable[[int, Tensor], None]
) -> Tensor:
    """`x · Wᵀ + bias`: x [.., in] of 16-bit floats -> [.., out] of the same.

    shape: W's, (out, in). fill(begin, block) writes W's rows from `begin` on, rounded to x's
    dtype, into `block`, float32 [rows, in].
    """
    out_features, in_features = shape
    step = max(1, min(out_features, BLOCK_ELEMENTS // max(1, in_features)))
    tokens = x.reshape(-1, in_features)
    y = torch.empty(tokens.shape[0], out_features, dtype=x.dtype)
    buffer = torch.empty(step, in_features)
    wide_bias = None if bias is None else bias.float()
    for first in range(0, tokens.shape[0], TOKENS_AT_ONCE):
        some = tokens[first : first + TOKENS_AT_ONCE].float()
        for begin in range(0, out_features, step):
            here = slice(begin, min(begin + step, out_features))
            block = buffer[: here.stop - begin]
            fill(begin, block)
            part = functional.linear(some, block, None if wide_bias is None else wide_bias[here])
            y[first : first + TOKENS_AT_ONCE, here] = part
    return y.view(*x.shape[:-1], out_features)


def _seconds(dtype: torch.dtype) -> float:
    x = torch.ones(TRIAL_TOKENS, TRIAL_FEATURES, dtype=dtype)
    weight = torch.ones(TRIAL_FEATURES, TRIAL_FEATURES, dtype=dtype)
    begun = time.perf_counter()
    functional.linear(x, weight)
    return time.perf_counter() - begun
