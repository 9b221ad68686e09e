"""A model with tensors of every type that shards may have, some of them where no number begins.

Written by hand, header and all: the safetensors library pads its headers, other writers need not.
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

from tests.support.hub.models import fixture_folder

# Bits of an element.
BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "I64": 64,
    "U64": 64,
    "F64": 64,
    "C64": 64,
}
SHAPES: dict[str, list[int]] = {"matrix": [6, 4], "scalar": [], "empty": [0, 3], "one": [1]}
# Two elements in a byte.
HALVES = {"model.extra.f4.matrix": ("F4", [6, 4])}

Tensor = tuple[str, list[int], bytes]


def name_of(dtype: str, shape: str) -> str:
    return f"model.extra.{dtype.lower()}.{shape}"


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a fixture: its dtype, its shape, its bytes."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        raw = path.read_bytes()
        begin = 8 + int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8:begin])
        header.pop("__metadata__", None)
        for name, entry in header.items():
            first, last = entry["data_offsets"]
            found[name] = (entry["dtype"], entry["shape"], raw[begin + first : begin + last])
    return found


def write_model(folder: Path, *, halves: bool = False) -> Path:
    """Qwen3-MoE's fixture in two shards, with tensors of every type behind and between its own.

    Both headers end at an odd byte. halves: whether some have less than a byte an element.
    """
    source = fixture_folder("qwen3_moe")
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
    tensors = tensors_of(source)
    numbers = random.Random(3)
    for dtype, bits in BITS.items():
        for shape, sizes in SHAPES.items():
            count = 1
            for size in sizes:
                count *= size
            data = numbers.randbytes(count * bits // 8)
            if dtype == "BOOL":
                data = bytes(each & 1 for each in data)
            tensors[name_of(dtype, shape)] = (dtype, sizes, data)
    if halves:
        tensors |= {name: (*kind, numbers.randbytes(12)) for name, kind in HALVES.items()}
    # By their width alone the library would sort them: here they lie as they come.
    names = sorted(tensors, key=lambda name: name.split(".")[-1])
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        _write(folder / file, {name: tensors[name] for name in part})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt", "of": path.name}}
    at = 0
    for name, (dtype, shape, data) in tensors.items():
        offsets = [at, at + len(data)]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        at += len(data)
    text = json.dumps(header).encode()
    text += b" " * (1 - len(text) % 2)
    assert len(text) % 2
    path.write_bytes(
        len(text).to_bytes(8, "little") + text + b"".join(d for *_, d in tensors.values())
    )
