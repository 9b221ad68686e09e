"""Every fixture there is, as headers and config in memory: what a test may mutate at no cost.

Finds the families of fixtures/build.py and the BUILDERS of every module in fixtures/builders.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import sys
import warnings
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from shardsurgeon.checkpoint.checkpoint import Checkpoint
from shardsurgeon.checkpoint.shards import Shard
from shardsurgeon.storage.formats.json_edit import Document
from shardsurgeon.storage.formats.safetensors import Header
from shardsurgeon.storage.formats.tensor_table import TensorRecord, TensorTable
from shardsurgeon.storage.source import MemorySource

FIXTURES = Path(__file__).parents[2] / "fixtures"
DTYPES = {
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int32: "I32",
    torch.int64: "I64",
}


@dataclass(frozen=True)
class Specimen:
    """A checkpoint without its weights: name → (dtype, shape), and config.json's content."""

    tensors: Mapping[str, tuple[str, tuple[int, ...]]]
    config: dict[str, Any]

    def without(self, name: str) -> Specimen:
        return replace(self, tensors={key: v for key, v in self.tensors.items() if key != name})

    def renamed(self, old: str, new: str) -> Specimen:
        assert new not in self.tensors
        return replace(self, tensors={new if k == old else k: v for k, v in self.tensors.items()})

    def having(self, name: str, dtype: str, *shape: int) -> Specimen:
        return replace(self, tensors={**self.tensors, name: (dtype, shape)})

    def configured(self, path: tuple[str | int, ...], value: object) -> Specimen:
        config = deepcopy(self.config)
        node: Any = config
        for key in path[:-1]:
            node = node[key]
        node[path[-1]] = value
        return replace(self, config=config)

    def checkpoint(self) -> Checkpoint:
        """As `open_checkpoint` would give it; no byte of a tensor can be read."""
        records = tuple(TensorRecord(name, *kind, 0, 0) for name, kind in self.tensors.items())
        shard = Shard("model.safetensors", 0, Header(TensorTable.of(records), None, 0), "")
        config = Document.parse(json.dumps(self.config).encode(), "config.json")
        return Checkpoint(
            MemorySource({}, name="specimen"), (), (shard,), config, None, None, (), ()
        )


@cache
def builders() -> dict[str, Callable[[], Any]]:
    """Every fixture builder, by the fixture's name."""
    if str(FIXTURES) not in sys.path:
        sys.path.insert(0, str(FIXTURES))
    found: dict[str, Callable[[], Any]] = dict(importlib.import_module("build").FAMILIES)
    package = importlib.import_module("builders")
    for module in pkgutil.iter_modules(package.__path__):
        for name, build in getattr(
            importlib.import_module(f"builders.{module.name}"), "BUILDERS", {}
        ).items():
            # One fixture would hide another of its name.
            assert found.setdefault(name, build) is build, name
    return found


@cache
def fixture(name: str) -> Any:
    """What the named fixture's builder gives: tensors, config and files."""
    with warnings.catch_warnings():
        # transformers' warnings about the published configs do not concern these tests.
        warnings.simplefilter("ignore")
        return builders()[name]()


def written(made: Any, folder: Path) -> Path:
    """The folder below `folder` that a fixture is written to."""
    path: Path = importlib.import_module("builders.folder").write(made, folder)
    return path


@cache
def specimen(name: str) -> Specimen:
    """The named fixture's headers and config."""
    made = fixture(name)
    tensors = {
        name: (DTYPES[tensor.dtype], tuple(tensor.shape)) for name, tensor in made.tensors.items()
    }
    return Specimen(tensors, json.loads(json.dumps(made.config)))
