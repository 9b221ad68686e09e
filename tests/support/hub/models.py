"""Checkpoints to put into the Hub: the shipped tiny ones, and ones of a chosen size.

A checkpoint of a chosen size has the names, dtypes and order of a published layout (tests/bench),
matrices that are narrower, random bytes, several shards, and side files as publishers have them.
Its score file scatters the survivors: at a ratio of 0.5 no two of them are neighbours.
"""

from __future__ import annotations

import importlib
import random
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from tests.support.hub.server import LocalHub

ROOT = Path(__file__).parents[3]
CARD = """---
license: apache-2.0
language:
- en
- zh
pipeline_tag: text-generation
tags:
- moe
base_model: org/ancestor
---

# {name}

A checkpoint of random numbers, {layout}.
"""
FILL_NBYTES = 32 << 20


class Sample(NamedTuple):
    """A checkpoint on this disk, and scores for it that lie beside it."""

    folder: Path
    scores: Path


def fixture_folder(family: str) -> Path:
    """The shipped tiny checkpoint of a family: `kimi_k25`, `qwen3_5_moe`, ..."""
    return ROOT / "fixtures" / family


def add_fixture(hub: LocalHub, family: str, id: str, **how: bool) -> str:
    """Make it a repository; returns the commit. `how` as `add_model` takes it."""
    return hub.add_model(id, fixture_folder(family), **how)


def write_checkpoint(
    out: Path, layout: str, nbytes: int, *, shards: int = 8, experts: int = 64, seed: int = 1
) -> Sample:
    """A new checkpoint of about `nbytes`, 20 MB at least, in the folder `out`.

    layout: `int4`, Kimi-K2.5's nine tensors per expert, or `stacked`, Qwen3.5's bf16 tensors with
    an expert axis.
    """
    layouts, skeleton = _bench()
    model = replace(_smallest(layouts, layout, nbytes), experts=experts)
    one_more = replace(model, layers=model.layers + 1)
    each = layouts.total(one_more) - layouts.total(model)
    layers = model.layers + max(round((nbytes - layouts.total(model)) / each), 0)
    skeleton.build(out, replace(model, layers=layers), shards, "holes")
    for number, shard in enumerate(sorted(out.glob("*.safetensors"))):
        _fill(shard, random.Random(seed * 1000 + number))
    _write_side_files(out, layout)
    scores = out.parent / f"{out.name}-scores.json"
    shutil.move(out / "scores.json", scores)
    return Sample(out, scores)


def _smallest(layouts: ModuleType, layout: str, nbytes: int) -> Any:
    """The layout with matrices of a width that suits the size, and as few layers as can be."""
    hidden = 512 if nbytes < 250e6 else 1024 if nbytes < 1e9 else 2048
    width = {"hidden": hidden, "moe": hidden // 2, "vocabulary": 512, "heads": 2}
    if layout == "int4":
        small = layouts.Model("int4", layers=2, experts=64, dense=hidden, **width)
        return replace(small, q_lora=128, kv_lora=128, nope=32, rope=32, v_head=32)
    width["moe"] //= 2
    return layouts.Model("stacked", layers=1, experts=64, dense=0, **width)


def _fill(shard: Path, dice: random.Random) -> None:
    """Random bytes for the tensors of a shard that has its header only."""
    with shard.open("r+b") as file:
        begin = 8 + int.from_bytes(file.read(8), "little")
        left = shard.stat().st_size - begin
        block = dice.randbytes(min(left, FILL_NBYTES))
        file.seek(begin)
        while left:
            left -= file.write(block[:left])


def _write_side_files(out: Path, layout: str) -> None:
    (out / "README.md").write_bytes(CARD.format(name=out.name, layout=layout).encode())
    (out / "LICENSE").write_bytes(b"Apache License, version 2.0\n")
    (out / "tokenizer.json").write_bytes(b'{"version": "1.0", "model": {}}\n')
    (out / "tiktoken.model").write_bytes(bytes(range(256)))
    (out / "figures").mkdir()
    (out / "figures" / "banner.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))


def _bench() -> tuple[ModuleType, ModuleType]:
    """The benchmark's modules, which find each other as scripts do."""
    folder = str(ROOT / "tests" / "bench")
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module("layouts"), importlib.import_module("skeleton")
