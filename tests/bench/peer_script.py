"""The other peer: what people publish, safe_open, a dict, save_file every 5 GB.

python tests/bench/peer_script.py MODEL OUT KEEP.json
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

SHARD_NBYTES = 5_000_000_000
EXPERT = re.compile(r"layers\.(\d+)\.mlp\.experts\.(\d+)\.")
STACKED = re.compile(r"layers\.(\d+)\.mlp\.(?:experts\.\w+|gate\.weight|gate\.\w+_bias)$")


def main() -> None:
    """The command line above."""
    model, out = Path(sys.argv[1]), Path(sys.argv[2])
    keep = {int(layer): ids for layer, ids in json.loads(Path(sys.argv[3]).read_text()).items()}
    out.mkdir()
    held: dict[str, torch.Tensor] = {}
    filled, shards = 0, 0
    for path in sorted(model.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in list(file.keys()):
                new_name, ids = name, None
                if match := EXPERT.search(name):
                    layer, expert = int(match[1]), int(match[2])
                    if expert not in keep[layer]:
                        continue
                    number = keep[layer].index(expert)
                    new_name = f"{name[: match.start(2)]}{number}{name[match.end(2) :]}"
                elif match := STACKED.search(name):
                    ids = keep.get(int(match[1]))
                tensor = file.get_tensor(name)
                if ids is not None:
                    tensor = tensor[ids].contiguous()
                if filled + tensor.nbytes > SHARD_NBYTES:
                    shards += 1
                    save_file(held, out / f"model-{shards:05d}.safetensors")
                    held, filled = {}, 0
                held[new_name] = tensor
                filled += tensor.nbytes
    save_file(held, out / f"model-{shards + 1:05d}.safetensors")


if __name__ == "__main__":
    main()
