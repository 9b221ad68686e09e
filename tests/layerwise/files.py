"""Made-up calibrations, for tests of their files."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from shardsurgeon.layerwise.accumulators import Accumulators
from shardsurgeon.layerwise.calibration_file import Calibration
from shardsurgeon.layerwise.datasets import identity

EXPERTS = 6


def sums(seed: int, tokens: int = 100, experts: int = EXPERTS) -> Accumulators:
    """Plausible sums of a layer; no token is routed to expert 2."""
    numbers = np.random.default_rng(seed)
    counts = numbers.integers(1, tokens, experts)
    counts[2] = 0
    routed = counts > 0
    squares = 4.0 * numbers.random(experts) * counts
    return Accumulators(
        tokens,
        counts.astype(np.int64),
        *(numbers.random(experts) * counts * scale for scale in (0.5, 3.0, 1 / 3)),
        numbers.random(experts) * routed,
        squares,
    )


def calibration(
    number: int, samples: list[list[object]] | None = None, **settings: object
) -> Calibration:
    """Layers 1, 2 and 5, two samples of its own."""
    own = [["c4", 2 * number, 60], ["c4", 2 * number + 1, 40]]
    known: dict[str, object] = {
        "model": "Tiny",
        "revision": None,
        "config_sha256": "ab" * 32,
        "dataset": "c4:2",
        "seed": 42,
        "samples": own if samples is None else samples,
        "versions": {"torch": "2.13"},
    }
    layers = {layer: sums(10 * number + layer) for layer in (1, 2, 5)}
    return Calibration(f"{number}.pt", layers, {**known, **settings})


def mixed(number: int, *sources: str, **settings: object) -> Calibration:
    """A calibration of these datasets, two samples of each, with the sums of each."""
    samples: list[list[object]] = []
    layers = {layer: Accumulators.zeros(EXPERTS) for layer in (1, 2, 5)}
    for place, source in enumerate(sorted(sources, key=identity)):
        samples += [[source, 2 * number, 60], [source, 2 * number + 1, 40]]
        for layer, of in layers.items():
            of.add(sums(100 * number + 10 * place + layer).of_one(identity(source)))
    whole = calibration(number, samples, **settings)
    return replace(whole, layers=layers)
