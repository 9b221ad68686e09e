"""Times side by side: methods take turns, and each keeps its median.

Turns, because a machine speeds up, slows down and is shared: what happens to one method happens
to all.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

# Seconds of a CPU, since some moment.
Clock = Callable[[], float]
# One call: its argument counts the calls, so that a method can take other weights each time.
Method = Callable[[int], object]

WARM_UPS = 2
# A launch takes a GPU microseconds; a run of them is timed as one.
CALLS_ON_GPU = 20
BANDWIDTH_NBYTES = 256 << 20


def side_by_side(
    methods: Mapping[str, Method],
    device: torch.device,
    rounds: int,
    clock: Clock = time.perf_counter,
) -> dict[str, float]:
    """Median seconds of one call, by method, over `rounds` turns after two to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for turn in range(WARM_UPS + rounds):
        for name, method in methods.items():
            taken = _on_gpu(method, turn) if device.type == "cuda" else _on_cpu(method, turn, clock)
            seconds[name].append(taken)
    return {name: statistics.median(taken[WARM_UPS:]) for name, taken in seconds.items()}


def bandwidth(device: torch.device, rounds: int, clock: Clock) -> float:
    """Bytes read and written in a second by a copy too large for any cache."""
    source = torch.ones(BANDWIDTH_NBYTES, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    taken = side_by_side({"copy": lambda _: target.copy_(source)}, device, rounds, clock)
    return 2 * BANDWIDTH_NBYTES / taken["copy"]


def _on_cpu(method: Method, turn: int, clock: Clock) -> float:
    begun = clock()
    method(turn)
    return clock() - begun


def _on_gpu(method: Method, turn: int) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    for call in range(CALLS_ON_GPU):
        method(turn * CALLS_ON_GPU + call)
    end.record()
    torch.cuda.synchronize()
    milliseconds: float = begin.elapsed_time(end)
    return milliseconds / 1000 / CALLS_ON_GPU
