"""Checkpoints of any size without their bytes: headers, small files, and zeros for all tensors."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from shardsurgeon.execution.plan import Literal, Plan
from shardsurgeon.storage.source import Source, SourceFile

Spec = tuple[str, str, tuple[int, ...]]
"""Name, dtype as in a header, shape."""
ZEROS = bytes(1 << 20)
# Bits: small floats may take less than a byte.
BITS = {
    "F32": 32,
    "BF16": 16,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "I8": 8,
    "U8": 8,
    "I32": 32,
    "U32": 32,
    "I64": 64,
}


@dataclass(frozen=True)
class HollowFile:
    """A file of `nbytes` zeros, but for the pieces: offset → bytes there."""

    nbytes: int
    pieces: Mapping[int, bytes]


class HollowSource(Source):
    """A tree of hollow files, made up as they are read."""

    is_remote = False

    def __init__(self, name: str, files: Mapping[str, HollowFile]) -> None:
        self.name = self.location = name
        self._files = files

    def list(self) -> tuple[SourceFile, ...]:
        return tuple(SourceFile(n, f.nbytes, "0") for n, f in sorted(self._files.items()))

    def stream(self, name: str, begin: int, end: int) -> Iterator[bytes]:
        file = self._files[name]
        assert end <= file.nbytes
        for at in range(begin, end, 1 << 20):
            stop = min(at + (1 << 20), end)
            data = ZEROS[: stop - at]
            for start, piece in file.pieces.items():
                low, high = max(start, at), min(start + len(piece), stop)
                if low < high:
                    middle = piece[low - start : high - start]
                    data = data[: low - at] + middle + data[high - at :]
            yield data


def whole(data: bytes) -> HollowFile:
    """A small file with its content."""
    return HollowFile(len(data), {0: data})


def shard(specs: Sequence[Spec]) -> HollowFile:
    """A safetensors file with these tensors."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype, shape in sorted(specs, key=lambda spec: -BITS[spec[1]]):
        nbytes = BITS[dtype] // 8
        for size in shape:
            nbytes *= size
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + nbytes]}
        end += nbytes
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    head = len(raw).to_bytes(8, "little") + raw
    return HollowFile(len(head) + end, {0: head})


def carried_out(plan: Plan, source: HollowSource, name: str) -> HollowSource:
    """What the plan would write, where all bytes of the source's tensors are zeros."""
    files: dict[str, HollowFile] = {}
    for output in plan.shards:
        pieces, at = {0: output.header}, len(output.header)
        for piece in output.pieces:
            if isinstance(piece, Literal):
                pieces[at] = piece.data
            at += piece.nbytes
        files[output.file] = HollowFile(output.nbytes, pieces)
    for file, data in plan.generated_files:
        files[file] = whole(data)
    sizes = {file.name: file.nbytes for file in source.list()}
    for file in plan.copied_files:
        files[file] = whole(source.read(file, 0, sizes[file]))
    for file, path, _ in plan.score_files:
        with open(path, "rb") as score_file:
            files[file] = whole(score_file.read())
    return HollowSource(name, files)
