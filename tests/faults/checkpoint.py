"""The deepseek_v3 fixture blown up: its names and shards, random bytes in wider tensors."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

ROOT = Path(__file__).parents[2]
FIXTURE = ROOT / "fixtures" / "deepseek_v3"
HIDDEN, WIDTH = 64, 24  # the fixture's


def write_checkpoint(folder: Path, hidden: int, width: int) -> None:
    """Make `folder` a checkpoint with `scores.pt` in it; the same bytes for the same sizes."""
    shutil.copytree(FIXTURE, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_size": hidden, "moe_intermediate_size": width}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    numbers = random.Random(4)
    total = 0
    for shard in sorted(folder.glob("*.safetensors")):
        total += _blow_up(shard, {HIDDEN: hidden}, {HIDDEN: hidden, WIDTH: width}, numbers)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["metadata"]["total_size"] = total
    index.write_text(json.dumps(content, indent=2))


def _blow_up(
    shard: Path, sizes: dict[int, int], expert_sizes: dict[int, int], numbers: random.Random
) -> int:
    """Widen every tensor of a shard; the bytes of its data."""
    raw = shard.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    begin = 0
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        wider = expert_sizes if ".experts." in name else sizes
        old = entry["data_offsets"][1] - entry["data_offsets"][0]
        for axis, size in enumerate(entry["shape"]):
            entry["shape"][axis] = wider.get(size, size)
            old = old // size * entry["shape"][axis]
        entry["data_offsets"] = [begin, begin + old]
        begin += old
    text = json.dumps(header).encode()
    with shard.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for done in range(0, begin, 1 << 20):
            file.write(numbers.randbytes(min(1 << 20, begin - done)))
    return begin
