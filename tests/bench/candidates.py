"""What `evaluate` reads, computes and takes for one candidate, and for more.

    python tests/bench/candidates.py [--candidates 1,4,10] [--tokens 4096] [--work FOLDER]

Writes a small Qwen3-MoE of random weights and evaluates candidates that keep half of the experts,
drawn at random, each number of them in a process of its own. Needs torch and transformers.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import measure
from layer_stream import SHAPES, make

LENGTH = 512


def main() -> None:
    """The command line above."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--candidates", default="1,4,10")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--work", type=Path, help="where the checkpoint is written")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--number", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.number is not None:
        figures = evaluate(given.folder, given.number, given.tokens)
        (given.folder / f"{given.number}.json").write_text(json.dumps(figures))
        return
    numbers = [int(number) for number in given.candidates.split(",")]
    with tempfile.TemporaryDirectory(dir=given.work) as scratch:
        folder = Path(scratch) / "model"
        make(SHAPES["small"], folder)
        measure.warm(folder)
        rows, least = [], 0
        for number in numbers:
            words = [sys.executable, __file__, "--tokens", str(given.tokens)]
            measure.run([*words, "--folder", str(folder), "--number", str(number)])
            found = json.loads((folder / f"{number}.json").read_text())
            least = least or found["read"]
            rows.append(
                [
                    str(number),
                    f"{found['read'] / 1e6:,.1f}",
                    f"{found['read'] / least:.3f}",
                    f"{found['seconds']:.1f}",
                    f"{found['seconds'] / (number + 1):.2f}",
                    f"{found['peak'] / 1e6:,.0f}",
                    found["announced"],
                ]
            )
    headings = ["candidates", "read MB", "÷ one", "seconds", "÷ models", "peak MB", "announced"]
    print(measure.table(headings, rows))


def evaluate(folder: Path, number: int, tokens: int) -> dict[str, Any]:
    """One evaluation: bytes of weights that were read, seconds, the peak of this process."""
    import numpy as np

    from shardsurgeon.checkpoint.anatomy import read_anatomy
    from shardsurgeon.checkpoint.checkpoint import open_checkpoint
    from shardsurgeon.layerwise.activations import ActivationStore
    from shardsurgeon.layerwise.damage import Candidate
    from shardsurgeon.layerwise.evaluate import evaluate_layers
    from shardsurgeon.layerwise.memory import free_memory
    from shardsurgeon.layerwise.samples import Sample
    from shardsurgeon.layerwise.settings import Settings
    from shardsurgeon.pruning.keep_lists import KeepList, LayerKeep
    from shardsurgeon.pruning.planner import changed_tensors

    checkpoint = open_checkpoint(folder)
    anatomy = read_anatomy(checkpoint)
    drawn = np.random.default_rng(0)

    def keep() -> KeepList:
        layers = {}
        for layer in anatomy.layers:
            order = drawn.permutation(layer.num_experts)
            half = layer.num_experts // 2
            kept, gone = (tuple(sorted(part.tolist())) for part in (order[:half], order[half:]))
            layers[layer.index] = LayerKeep(kept, gone)
        return KeepList(anatomy.num_experts, layers)

    keeps = [keep() for _ in range(number)]
    candidates = [
        Candidate(str(place), each, changed_tensors(checkpoint, anatomy, each))
        for place, each in enumerate(keeps)
    ]
    vocabulary = checkpoint.settings["vocab_size"]
    samples = [
        Sample(drawn.integers(0, vocabulary, LENGTH), "random", index)
        for index in range(tokens // LENGTH)
    ]
    lengths = [LENGTH] * len(samples) * (number + 1)
    said = Said()
    logging.getLogger("shardsurgeon").addHandler(said)
    logging.getLogger("shardsurgeon").setLevel(logging.INFO)
    scratch = tempfile.TemporaryDirectory(dir=folder.parent)
    read = counted_reads(checkpoint.source)
    begun = time.perf_counter()
    with (
        scratch as place,
        ActivationStore(Path(place), lengths, free_memory("cpu") // 2) as store,
    ):
        evaluate_layers(
            checkpoint,
            samples,
            [0] * len(samples),
            candidates,
            Settings(dtype="float32"),
            store,
            Forget(),
            lambda progress: None,
        )
    return {
        "seconds": time.perf_counter() - begun,
        "read": sum(read),
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "announced": said.most,
    }


def counted_reads(source: Any) -> list[int]:
    """The bytes of every read of a source from now on."""
    found: list[int] = []
    before = source.read

    def read(name: str, begin: int, end: int) -> bytes:
        found.append(end - begin)
        return bytes(before(name, begin, end))

    source.read = read
    return found


class Said(logging.Handler):
    """What the evaluation announces."""

    most = ""

    def emit(self, record: logging.LogRecord) -> None:
        """Find the peak."""
        match = re.search(r"takes at most ([\d,.]+ \w+)", record.getMessage())
        self.most = match[1] if match else self.most


class Forget:
    """A sink that keeps nothing."""

    def finished_layer(self, index: int, sums: object) -> None:
        """Nothing."""


if __name__ == "__main__":
    main()
