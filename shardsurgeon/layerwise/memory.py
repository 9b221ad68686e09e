"""How much fits into memory: what a layer needs, what is free, and the batch sizes that follow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from shardsurgeon.errors import UsageError
from shardsurgeon.layerwise.settings import require
from shardsurgeon.units import format_size

MOST_ROWS = 8192
"""Tokens that an expert computes at once."""
MOST_BATCHES = 8
"""Batches of a chunk: each runs in a thread, and torch starts helper threads for each of them."""

_SHARE = 0.5
"""The part of the free memory that the activations of a chunk may take."""
_MOST_BATCH_TOKENS = 16_384
_MOST_CHUNK_TOKENS = 1 << 20


@dataclass(frozen=True, slots=True)
class LayerMemory:
    """Bytes that one layer takes.

    weights: all weights of the largest layer, or group of layers, except those of experts.
    expert: one expert and the next one, while they are read and unpacked.
    row: activations of one token inside an expert.
    token: activations of one token while its layer computes.
    pair: attention scores of one pair of tokens, where attention is computed in full.
    """

    weights: int
    expert: int
    row: int
    token: int
    pair: int

    def batch(self, tokens: int, longest: int) -> int:
        """Bytes of a batch of `tokens` tokens in samples of at most `longest` tokens."""
        rows = min(tokens, MOST_ROWS)
        return tokens * (self.token + self.pair * longest) + rows * self.row


def layer_memory(
    weights: int, expert: int, config: Mapping[str, Any], itemsize: int, *, eager: bool
) -> LayerMemory:
    """Estimate what a layer takes.

    weights: bytes; expert: parameters of one expert; config: of the text model; itemsize: bytes
    of one number; eager: whether attention is computed in full.
    """
    heads, width = _number(config, "num_attention_heads"), _number(config, "hidden_size")
    head = _number(config, "head_dim") or (width // heads if heads else 0)
    streams = max(1, _number(config, "hc_mult"))
    # Queries, keys and values and their rotated copies; the hidden state, as it is, normalized,
    # routed and summed.
    token = itemsize * (6 * heads * max(head, 1) + (4 + 4 * streams) * width)
    pair = heads * (itemsize + 4) if eager else 0
    # An expert's parameters are three matrices of its input width by its inner width: divided by
    # the input width, they give the inner activations of a token.
    row = itemsize * (expert // max(width, 1) + 3 * width)
    # Stored, in float32, and twice in the dtype of the run; all of it for the next expert too.
    read = 2 * expert * (max(itemsize, 4) + 2 * itemsize)
    return LayerMemory(weights, read, row, token, pair)


def _number(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    return value if isinstance(value, int) else 0


@dataclass(frozen=True, slots=True)
class BatchSizes:
    """How samples are grouped.

    batch_size: samples of one forward pass; chunk: tokens for which an expert is read once.
    """

    batch_size: int
    chunk: int


def batch_sizes(
    layer_memory: LayerMemory,
    lengths: Sequence[int],
    batch_size: int | str,
    chunk: int | None,
    free: int,
    device: str,
) -> BatchSizes:
    """Decide how samples are grouped.

    lengths: tokens of each sample; batch_size, chunk: as asked for, "auto" and None for what
    fits; free: bytes. Raises UsageError where one layer and one batch do not fit.
    """
    longest = max(lengths)
    fixed = layer_memory.weights + layer_memory.expert
    asked = batch_size if isinstance(batch_size, int) else 1
    needed = fixed + layer_memory.batch(asked * longest, longest)
    if needed > free:
        raise UsageError(
            f"--device {device}",
            f"one layer takes {format_size(fixed)}, a batch of {asked} of {longest:,} tokens "
            f"{format_size(needed - fixed)}, and {format_size(free)} are free",
            "give a smaller --max-length or --batch-size, or more memory",
        )
    budget = int((free - fixed) * _SHARE)
    if not isinstance(batch_size, int):
        each = layer_memory.batch(longest, longest)
        batch_size = max(1, min(budget // max(each, 1) // 2, _MOST_BATCH_TOKENS // longest))
    if chunk is None:
        chunk = max(1, min(budget // max(layer_memory.token, 1), _MOST_CHUNK_TOKENS))
    return BatchSizes(batch_size, chunk)


def free_memory(device: str) -> int:
    """Bytes that may still be allocated on a device.

    For `cpu` that is what the system has available, or less where the process's control group
    (of a container, say) has a limit.
    """
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(torch.device(device))[0])
    available = int(require("psutil").virtual_memory().available)
    left = _left_in_control_group()
    return available if left is None else min(available, left)


def _left_in_control_group() -> int | None:
    """Bytes left under the memory limit of Linux control groups, which psutil does not know.

    None where there is no limit. The two versions of control groups differ in their file names.
    """
    folder = Path("/sys/fs/cgroup")
    for limit, usage, cache in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            left = int((folder / limit).read_text()) - int((folder / usage).read_text())
            stat = (folder / limit).with_name("memory.stat").read_text()
            # Cached file pages count as used, and are freed when memory is asked for.
            cached = dict(line.split() for line in stat.splitlines()).get(cache, 0)
            return max(0, left + int(cached))
        except (OSError, ValueError):
            continue
    return None
