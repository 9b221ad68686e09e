"""The peer of the benchmark: compressed-tensors' convert_checkpoint with its expert pruner.

    python tests/bench/peer_converter.py MODEL OUT KEEP.json

Its own scores are router magnitudes; the keep-lists given here replace them, so that it does the
same work: KEEP.json maps layer numbers to the ids that stay.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from compressed_tensors.entrypoints.convert import MagnitudeExpertPruner, convert_checkpoint

_LAYER = re.compile(r"layers\.(\d+)\.")


def main() -> None:
    """The command line above."""
    model, out, keep_file = sys.argv[1:]
    keep = json.loads(Path(keep_file).read_text())
    pruner = MagnitudeExpertPruner.from_pretrained(
        model,
        router_pattern=r"\.mlp\.gate\.weight$",
        expert_pattern=r"\.mlp\.experts\.",
        sparsity=0.5,
    )
    for router in pruner.retained_experts:
        match = _LAYER.search(router)
        assert match is not None
        pruner.retained_experts[router] = keep[match[1]]
    convert_checkpoint(model, out, pruner, device="cpu")


if __name__ == "__main__":
    main()
