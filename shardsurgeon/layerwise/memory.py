"""How much fits into memory: batch sizes, chunks, and what this machine has free."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from shardsurgeon.errors import UsageError
from shardsurgeon.units import format_size

_SHARE = 0.5
"""Of the free memory, what activations of a chunk may take."""
_MOST_BATCH_TOKENS = 16_384
_MOST_CHUNK_TOKENS = 1 << 20
MOST_ROWS = 8192
"""Tokens that an expert computes at once."""
MOST_BATCHES = 8
"""Batches of a chunk: each has a thread, and every thread that computes brings helpers along."""


@dataclass(frozen=True, slots=True)
class LayerMemory:
    """Bytes that one layer takes.

    weights: what is not experts, of the largest layer or group of layers; expert: one of them
    and the next one, as they are read and unpacked; row: activations inside an expert of one
    token; token: activations of one token while its layer computes; pair: what each pair of
    tokens of one sample takes, in attention that is computed in full.
    """

    weights: int
    expert: int
    row: int
    token: int
    pair: int

    def batch(self, tokens: int, longest: int) -> int:
        """Bytes of one batch of so many tokens, in samples of at most so many."""
        rows = min(tokens, MOST_ROWS)
        return tokens * (self.token + self.pair * longest) + rows * self.row


@dataclass(frozen=True, slots=True)
class BatchSizes:
    """How samples pass. batch_size: samples a forward; chunk: tokens an expert is read for."""

    batch_size: int
    chunk: int


def batch_sizes(
    layer_memory: LayerMemory,
    lengths: Sequence[int],
    batch_size: int | str,
    chunk: int | None,
    free: int | None,
    device: str,
) -> BatchSizes:
    """Decide how many samples pass together.

    lengths: tokens of each sample; batch_size, chunk: as asked for, "auto" and None for what
    fits; free: bytes, None where that is not known. Raises UsageError where one layer and one
    sample do not fit.
    """
    longest = max(lengths)
    fixed = layer_memory.weights + layer_memory.expert
    asked = batch_size if isinstance(batch_size, int) else 1
    needed = fixed + layer_memory.batch(asked * longest, longest)
    if free is not None and needed > free:
        raise UsageError(
            f"--device {device}",
            f"one layer takes {format_size(fixed)}, a batch of {asked} of {longest:,} tokens "
            f"{format_size(needed - fixed)}, and {format_size(free)} are free",
            "give a smaller --max-length or --batch-size, or more memory",
        )
    room = int((free - fixed) * _SHARE) if free is not None else 1 << 30
    if not isinstance(batch_size, int):
        each = layer_memory.batch(longest, longest)
        batch_size = max(1, min(room // max(each, 1) // 2, _MOST_BATCH_TOKENS // longest))
    if chunk is None:
        fits = room // max(layer_memory.token, 1)
        chunk = max(1, min(fits, _MOST_CHUNK_TOKENS))
    return BatchSizes(batch_size, chunk)


def layer_memory(
    weights: int, expert: int, config: Mapping[str, Any], itemsize: int, *, eager: bool
) -> LayerMemory:
    """What a layer takes. weights: bytes; expert: numbers of one expert; config: of the text
    model; itemsize: bytes of a number; eager: whether attention is computed in full."""
    heads, width = _number(config, "num_attention_heads"), _number(config, "hidden_size")
    head = _number(config, "head_dim") or (width // heads if heads else 0)
    streams = max(1, _number(config, "hc_mult"))
    # Queries, keys and values and their rotated twins; the state, normed, routed and summed.
    token = itemsize * (6 * heads * max(head, 1) + (4 + 4 * streams) * width)
    pair = heads * (itemsize + 4) if eager else 0
    # An expert of n numbers is three matrices, its input and inner widths n / width together.
    row = itemsize * (expert // max(width, 1) + 3 * width)
    # As it is read, at full width, and as its class wants it; and the next one.
    read = 2 * expert * (max(itemsize, 4) + 2 * itemsize)
    return LayerMemory(weights, read, row, token, pair)


def _number(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    return value if isinstance(value, int) else 0


def free_memory(device: str) -> int | None:
    """Bytes that may still be taken on a device; None where that cannot be told."""
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(torch.device(device))[0])
    return free_host_memory()


def free_host_memory() -> int | None:
    """Bytes of memory that this process may still take; None where that cannot be told."""
    limits = [limit for limit in (_available_memory(), _group_memory()) if limit is not None]
    return min(limits) if limits else None


def _available_memory() -> int | None:
    """What the system can give without taking it from somebody."""
    if sys.platform == "win32":
        return _windows_memory()
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        facts = dict(line.split(":", 1) for line in lines)
        return int(facts["MemAvailable"].split()[0]) * 1024
    except (OSError, ValueError, KeyError):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return None


def _group_memory() -> int | None:
    """What is left of the limit of the process's control group, where it has one."""
    folder = Path("/sys/fs/cgroup")
    for most, used, files in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            limit = int((folder / most).read_text())
            taken = int((folder / used).read_text())
            stat = (folder / most).parent / "memory.stat"
            facts = dict(line.split() for line in stat.read_text().splitlines())
            # Cached files count as taken, and are given up when asked for.
            return max(0, limit - taken + int(facts.get(files, 0)))
        except (OSError, ValueError):
            continue
    return None


def _windows_memory() -> int | None:
    class Status(ctypes.Structure):
        _fields_ = (
            ("length", ctypes.c_ulong),
            ("load", ctypes.c_ulong),
            *(
                (name, ctypes.c_ulonglong)
                for name in ("total", "available", "a", "b", "c", "d", "e")
            ),
        )

    status = Status()
    status.length = ctypes.sizeof(Status)
    kernel: Any = getattr(ctypes, "windll").kernel32  # noqa: B009 (unknown off Windows)
    if not kernel.GlobalMemoryStatusEx(ctypes.byref(status)):
        return None
    return int(status.available)
