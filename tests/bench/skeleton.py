"""A checkpoint of a published layout at any size, as sparse files or with bytes in them.

    python tests/bench/skeleton.py OUT                     Kimi-K2.5 whole: 554 GiB, sparse
    python tests/bench/skeleton.py OUT --layout glm        GLM-5.2 in FP8; `qwen`: Qwen3-235B;
                                                           `nvfp4`: the same in NVFP4
    python tests/bench/skeleton.py OUT --stamp             the same, every tensor with its mark
    python tests/bench/skeleton.py OUT --allocate          the same, allocated but not written
    python tests/bench/skeleton.py OUT --size 8GB --fill   8 GB of random bytes

Names, dtypes and shapes are the published ones; the tensors are dealt to the shards in order of
their layers, and lie in that order within a shard, wider dtypes first; with `--by-name` they lie
there as the safetensors library writes them, as in published models. Beside the shards lies a score
file whose best experts are scattered: at a ratio of 0.5 and more no two survivors of a layer are
neighbours, which is the worst case for a copy.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
from dataclasses import replace
from pathlib import Path

from layouts import (
    PUBLISHED,
    SIZED,
    WIDTH,
    Model,
    Spec,
    config,
    nbytes,
    side_files,
    sized,
    tensors,
    total,
)

GOLDEN = (5**0.5 - 1) / 2
BLOCK_NBYTES = 64 << 20


def build(
    out: Path, model: Model, shards: int, content: str, seed: int = 42, *, by_name: bool = False
) -> int:
    """Write the checkpoint; returns its bytes of tensor data.

    content: `holes` (sparse, zeros), `stamps` (sparse, but each tensor begins with its mark),
    `allocated` (zeros that the disk has room for, but that were not written) or `random`;
    by_name: order the tensors of a shard as the safetensors library does.
    """
    out.mkdir(parents=True)
    specs = list(tensors(model))
    size = sum(map(nbytes, specs))
    cut = deal(specs, size, shards)
    weight_map: dict[str, str] = {}
    for number, held in enumerate(cut, start=1):
        name = f"model-{number:05d}-of-{len(cut):06d}.safetensors"
        weight_map.update(dict.fromkeys((spec[0] for spec in held), name))
        write_shard(out / name, held, content, seed + number, by_name=by_name)
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    for name, document in {"config.json": config(model), **side_files(model)}.items():
        (out / name).write_text(json.dumps(document, indent=2))
    scores = {layer: scattered(model.experts, layer) for layer in model.moe_layers}
    (out / "scores.json").write_text(json.dumps(scores))
    return size


def scattered(experts: int, layer: int) -> list[float]:
    """Scores by which every second expert comes first, and among those no two close ones."""
    return [
        (expert + layer) % 2 + 0.9 * (expert * GOLDEN % 1) + expert * 1e-9
        for expert in range(experts)
    ]


def deal(specs: list[Spec], size: int, shards: int) -> list[list[Spec]]:
    """Cut the tensors into shards of about the same size."""
    cut: list[list[Spec]] = [[]]
    filled = 0
    for spec in specs:
        if filled >= size / shards * len(cut) and len(cut) < shards:
            cut.append([])
        cut[-1].append(spec)
        filled += nbytes(spec)
    return cut


def write_shard(
    path: Path, specs: list[Spec], content: str, seed: int, *, by_name: bool = False
) -> None:
    """A safetensors file; content, by_name: as for `build`."""
    if by_name:
        dtypes = list(WIDTH)
        specs = sorted(specs, key=lambda spec: (dtypes.index(spec[1]), spec[0]))
    else:
        specs = sorted(specs, key=lambda spec: -WIDTH[spec[1]])
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    places: list[tuple[int, str]] = []
    for spec in specs:
        begin, end = end, end + nbytes(spec)
        header[spec[0]] = {"dtype": spec[1], "shape": spec[2], "data_offsets": [begin, end]}
        places.append((begin, spec[0]))
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        if content == "random":
            block = random.Random(seed).randbytes(BLOCK_NBYTES)
            left = end
            while left:
                left -= file.write(block[: min(left, len(block))])
        elif content == "stamps":
            for begin, name in places:
                file.seek(8 + len(raw) + begin)
                file.write(hashlib.sha256(name.encode()).digest()[:8])
        elif content == "allocated":
            os.posix_fallocate(file.fileno(), 0, 8 + len(raw) + end)
        file.truncate(8 + len(raw) + end)
        os.fsync(file.fileno())


def parse_size(text: str) -> int:
    """`8GB` as bytes."""
    return int(float(text.upper().removesuffix("GB")) * 1e9)


def main() -> None:
    """The command line above."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--layout", choices=sorted({*PUBLISHED, *SIZED}), default="int4")
    parser.add_argument("--size", type=parse_size, help="8GB; without it as published")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--experts", type=int)
    parser.add_argument("--shards", type=int, default=64)
    parser.add_argument("--fill", action="store_const", dest="content", const="random")
    parser.add_argument("--stamp", action="store_const", dest="content", const="stamps")
    parser.add_argument("--allocate", action="store_const", dest="content", const="allocated")
    parser.add_argument("--by-name", action="store_true")
    given = parser.parse_args()
    sizes = [PUBLISHED, SIZED][given.size is not None]
    if given.layout not in sizes:
        parser.error(f"with and without --size there are different layouts: {', '.join(sizes)}")
    model = PUBLISHED[given.layout] if given.size is None else sized(given.layout, given.size)
    counts = {"layers": given.layers, "experts": given.experts}
    model = replace(model, **{name: n for name, n in counts.items() if n is not None})
    build(given.out, model, given.shards, given.content or "holes", by_name=given.by_name)
    print(f"{given.out}: {total(model):,} bytes of tensor data, {model}")


if __name__ == "__main__":
    main()
