"""Evaluations run on a folder, with a sink that keeps what is found in layers, for tests."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from shardsurgeon.checkpoint.anatomy import read_anatomy
from shardsurgeon.checkpoint.checkpoint import open_checkpoint
from shardsurgeon.layerwise.activations import ActivationStore
from shardsurgeon.layerwise.damage import Candidate, LayerSums, Predictions
from shardsurgeon.layerwise.devices import Device
from shardsurgeon.layerwise.evaluate import evaluate_layers
from shardsurgeon.layerwise.samples import Sample
from shardsurgeon.layerwise.settings import BatchSize, Settings
from shardsurgeon.pruning.keep_lists import KeepList, LayerKeep
from shardsurgeon.pruning.planner import changed_tensors
from tests.layerwise.streaming import Ids, as_samples

Kept = Mapping[int, Sequence[int]]
"""Layer → the experts that stay."""


class Sink:
    """Keeps what is found in layers."""

    def __init__(self) -> None:
        self.layers: dict[int, LayerSums] = {}

    def finished_layer(self, index: int, sums: LayerSums) -> None:
        self.layers.setdefault(index, sums)


def keep_list(folder: Path, kept: Kept) -> KeepList:
    """The keep-list of some experts of the layers that are named, and of all in the others."""
    anatomy = read_anatomy(open_checkpoint(folder))
    layers = {}
    for layer in anatomy.main_layers:
        own = sorted(kept.get(layer.index, range(layer.num_experts)))
        gone = tuple(sorted({*range(layer.num_experts)} - {*own}))
        layers[layer.index] = LayerKeep(tuple(own), gone)
    return KeepList(anatomy.num_experts, layers)


def every_other(folder: Path, kept: int, first: int = 0) -> dict[int, list[int]]:
    """In every layer so many experts, spread over its list; first: where they begin."""
    anatomy = read_anatomy(open_checkpoint(folder))
    spread = {}
    for layer in anatomy.main_layers:
        step = layer.num_experts // kept
        spread[layer.index] = [(first + step * n) % layer.num_experts for n in range(kept)]
    return spread


def evaluated(
    folder: Path,
    keeps: Sequence[KeepList | Kept],
    ids: Sequence[Ids | Sample],
    scratch: Path,
    *,
    parts: Sequence[int] | None = None,
    batch_size: BatchSize = 2,
    dtype: str = "float32",
    budget: int = 1 << 30,
    memory: int | None = None,
    sink: Any = None,
    device: Device | None = None,
    clock: Callable[[], float] | None = None,
    **changes: Any,
) -> tuple[list[Predictions], dict[int, LayerSums]]:
    """What the whole model and each candidate predict, and what was found in layers.

    changes: of the schedule that was chosen.
    """
    checkpoint = open_checkpoint(folder)
    anatomy = read_anatomy(checkpoint)
    lists = [keep if isinstance(keep, KeepList) else keep_list(folder, keep) for keep in keeps]
    candidates = [
        Candidate(str(number), keep, changed_tensors(checkpoint, anatomy, keep))
        for number, keep in enumerate(lists)
    ]
    scratch.mkdir(exist_ok=True, parents=True)
    samples, sink = as_samples(ids), Sink() if sink is None else sink
    lengths = [each.num_tokens for each in samples] * (len(candidates) + 1)
    told = {} if clock is None else {"clock": clock}
    with ActivationStore(scratch, lengths, budget, **told) as store:
        found = evaluate_layers(
            checkpoint,
            samples,
            [0] * len(samples) if parts is None else parts,
            candidates,
            Settings(dtype=dtype, batch_size=batch_size),
            store,
            sink,
            lambda progress: None,
            memory=memory,
            device=device,
            adjust=lambda schedule: replace(schedule, **changes),
        )
    return found, sink.layers
