"""The engine run on a folder, with a sink that keeps its results, for tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardsurgeon.checkpoint.checkpoint import open_checkpoint
from shardsurgeon.layerwise.accumulators import Accumulators
from shardsurgeon.layerwise.activations import ActivationStore
from shardsurgeon.layerwise.devices import Device
from shardsurgeon.layerwise.engine import calibrate_layers
from shardsurgeon.layerwise.samples import Sample
from shardsurgeon.layerwise.schedule import Hold
from shardsurgeon.layerwise.settings import BatchSize, Listener, Settings

Ids = NDArray[np.int64]
LENGTHS = (40, 33, 40, 12, 1, 27)


class Sink:
    """Keeps the results of layers in memory."""

    def __init__(self, done: dict[int, Accumulators] | None = None) -> None:
        self.layers = dict(done or {})
        self.mtp: set[int] = set()

    def finished_layer(self, index: int, is_mtp: bool, accumulators: Accumulators) -> None:
        self.layers[index] = accumulators
        if is_mtp:
            self.mtp.add(index)

    def done_layers(self) -> set[int]:
        return set(self.layers)


def token_ids(lengths: Sequence[int] = LENGTHS, vocabulary: int = 256, seed: int = 5) -> list[Ids]:
    """Samples of these lengths."""
    generator = np.random.default_rng(seed)
    return [generator.integers(0, vocabulary, length) for length in lengths]


def as_samples(ids: Sequence[Ids | Sample]) -> list[Sample]:
    return [
        each if isinstance(each, Sample) else Sample(each, "drawn", index)
        for index, each in enumerate(ids)
    ]


def stream(
    folder: Path,
    ids: Sequence[Ids | Sample],
    scratch: Path,
    *,
    batch_size: BatchSize = 2,
    chunk_tokens: int | None = None,
    dtype: str = "float32",
    budget: int = 1 << 30,
    sink: Sink | None = None,
    listener: Listener = lambda progress: None,
    device: Device | None = None,
    **changes: Any,
) -> dict[int, Accumulators]:
    """Layer → accumulators, by the engine.

    chunk_tokens: experts pass by once for so many; changes: of the schedule that was chosen.
    """
    sink = sink or Sink()
    if chunk_tokens is not None:
        changes |= {"hold": Hold.GROUPS, "chunk": chunk_tokens}
    scratch.mkdir(exist_ok=True, parents=True)
    settings = Settings(dtype=dtype, batch_size=batch_size)
    samples = as_samples(ids)
    with ActivationStore(scratch, [each.num_tokens for each in samples], budget) as store:
        calibrate_layers(
            open_checkpoint(folder),
            samples,
            settings,
            store,
            sink,
            listener,
            device=device,
            adjust=lambda schedule: replace(schedule, **changes),
        )
    return sink.layers
