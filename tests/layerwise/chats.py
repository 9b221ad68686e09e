"""A small dataset of conversations, and the command that calibrates with it."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from shardsurgeon.layerwise.accumulators import Accumulators
from shardsurgeon.layerwise.calibration_file import read_calibration

FIXTURES = Path(__file__).parents[2] / "fixtures"
WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "while",
    "far",
    "stars",
    "burned",
    "and",
    "nobody",
    "knew",
    "why",
    "it",
    "mattered",
]


def write_chats(path: Path, count: int = 12, seed: int = 1) -> Path:
    """Conversations of 3 to 20 words a side."""
    numbers = random.Random(seed)

    def sentence() -> str:
        return " ".join(numbers.choices(WORDS, k=numbers.randint(3, 20)))

    lines = []
    for _ in range(count):
        roles = ("user", "assistant")
        lines.append({"messages": [{"role": role, "content": sentence()} for role in roles]})
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def words(model: str, dataset: Path | str, out: Path, *more: str) -> list[str]:
    """A command line: 12 samples of at most 48 tokens."""
    place = str(FIXTURES / model)
    options = ["--max-length", "48", "-o", str(out), *more]
    if "--samples" not in more:
        options += ["--samples", "12"]
    return ["calibrate", place, "--dataset", str(dataset), *options]


def sums(path: Path) -> dict[int, Accumulators]:
    """The accumulators of a score file."""
    return read_calibration(path).layers


def assert_same(
    one: Mapping[Any, Accumulators], other: Mapping[Any, Accumulators], rtol: float
) -> None:
    """The same sums, of all samples and of each part, as far as `other` knows its parts."""
    assert one.keys() == other.keys()
    for layer, found in one.items():
        wanted = other[layer].arrays()
        for name, array in found.arrays().items():
            np.testing.assert_allclose(array, wanted[name], rtol=rtol, err_msg=f"{layer} {name}")
        parts = other[layer].parts
        if parts is not None:
            assert_same(found.parts or {}, parts, rtol)
