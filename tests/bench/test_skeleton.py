"""The benchmark's checkpoints, beside what the safetensors library writes."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import save

DTYPES = {
    "F32": torch.float32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "U8": torch.uint8,
}


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> tuple[ModuleType, ModuleType]:
    """The modules `layouts` and `skeleton`, which find each other as scripts do."""
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parent), *sys.path])
    return importlib.import_module("layouts"), importlib.import_module("skeleton")


@pytest.mark.parametrize("layout", ["int4", "stacked", "glm", "qwen", "nvfp4"])
def test_by_name_a_shard_is_what_the_library_writes(
    bench: tuple[ModuleType, ModuleType], tmp_path: Path, layout: str
) -> None:
    layouts, skeleton = bench
    model = replace(layouts.SIZED[layout], experts=12)
    # The order depends on names and dtypes alone.
    specs = [
        (name, dtype, tuple(min(length, 3) for length in shape))
        for name, dtype, shape in layouts.tensors(model)
    ]
    skeleton.write_shard(tmp_path / "shard", specs, "holes", 1, by_name=True)
    tensors = {name: torch.zeros(shape, dtype=DTYPES[dtype]) for name, dtype, shape in specs}
    written = save(tensors, {"format": "pt"})
    assert (tmp_path / "shard").read_bytes() == written
