"""A shard's tensors as bytes, whatever their type, to be changed and written again."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import safetensors

# Bytes per number of the types that the fixtures have.
WIDTHS = {"F32": 4, "I32": 4, "BF16": 2, "F16": 2}


@dataclass(frozen=True)
class Stored:
    """One tensor."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    def rolled(self) -> Stored:
        """Its rows moved by one place, the last one to the front."""
        row = len(self.data) // self.shape[0]
        return replace(self, data=self.data[-row:] + self.data[:-row])


def load(shard: Path) -> dict[str, Stored]:
    """Read a shard with the safetensors library."""
    read = safetensors.deserialize(shard.read_bytes())  # type: ignore[no-untyped-call]
    return {
        name: Stored(one["dtype"], tuple(one["shape"]), bytes(one["data"])) for name, one in read
    }


def save(tensors: dict[str, Stored], shard: Path) -> None:
    """Write a shard as the library does: wide types first, then by name."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, one in sorted(tensors.items(), key=lambda item: (-WIDTHS[item[1].dtype], item[0])):
        end = len(data) + len(one.data)
        header[name] = {"dtype": one.dtype, "shape": one.shape, "data_offsets": [len(data), end]}
        data += one.data
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    shard.write_bytes(len(text).to_bytes(8, "little") + text + data)
