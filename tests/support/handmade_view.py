"""A view made by hand from the description of its manifest, with json, gzip and hashlib alone.

`a.safetensors` and `b.safetensors` of the source are written by the safetensors library. Of them
the view makes two shards: rows 0 and 2 of `x`, the whole of `y` and two counts of its own, then
`z` and a tensor without elements.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

Lines = list[dict[str, Any]]

MANIFEST, OWN = "shardsurgeon_view.jsonl.gz", "shardsurgeon_view.data"
X = np.arange(12, dtype=np.float32).reshape(4, 3)
Y = np.arange(6, dtype=np.int16)
Z = np.arange(5, dtype=np.float16)
COUNTS = np.array([2, 3], dtype=np.int32)
EXPECTED: dict[str, NDArray[Any]] = {
    "x": X[[0, 2]],
    "y": Y,
    "counts": COUNTS,
    "zé": Z,
    "none": np.zeros((0, 3), np.uint8),
}


@dataclass(frozen=True)
class HandmadeView:
    """folder: the view's; source: the folder that its bytes lie in."""

    folder: Path
    source: Path

    @property
    def manifest(self) -> Path:
        return self.folder / MANIFEST

    def lines(self) -> Lines:
        return [
            json.loads(line)
            for line in gzip.decompress(self.manifest.read_bytes()).split(b"\n")[:-1]
        ]

    def write(self, lines: Sequence[dict[str, Any]]) -> None:
        self.manifest.write_bytes(packed(lines))


def make(work: Path) -> HandmadeView:
    """The source and the view, in two folders that lie beside one another."""
    view = HandmadeView(work / "view", work / "source")
    view.folder.mkdir()
    view.source.mkdir()
    files = {"a.safetensors": save({"x": X, "y": Y}), "b.safetensors": save({"z": Z})}
    for name, data in files.items():
        (view.source / name).write_bytes(data)
    (view.folder / OWN).write_bytes(COUNTS.tobytes())
    stamps = {name: stamp_of(view.source / name) for name in files}
    view.write(described(files, stamps))
    return view


def in_memory() -> Lines:
    """The lines of such a manifest, of a source that is not there."""
    files = {"a.safetensors": save({"x": X, "y": Y}), "b.safetensors": save({"z": Z})}
    return described(files, {"a.safetensors": "1:2", "b.safetensors": "1:3"})


def stamp_of(path: Path) -> str:
    """A file's time of writing in nanoseconds and its inode."""
    return f"{path.stat().st_mtime_ns}:{path.stat().st_ino}"


def described(files: dict[str, bytes], stamps: dict[str, str]) -> Lines:
    """The lines of the manifest, of files of these contents."""
    x, y = place_of(files["a.safetensors"], "x"), place_of(files["a.safetensors"], "y")
    z = place_of(files["b.safetensors"], "z")
    own = COUNTS.tobytes()
    listed = [[name, len(data), stamps[name]] for name, data in files.items()]
    listed.append([OWN, len(own), hashlib.sha256(own).hexdigest()])
    first = {
        "x": entry("F32", [2, 3], 0),
        "counts": entry("I32", [2], 24),
        "y": entry("I16", [6], 32),
    }
    second = {
        "__metadata__": {"format": "pt"},
        "zé": entry("F16", [5], 0),
        "none": entry("U8", [0, 3], 10),
    }
    row = X[0].nbytes
    shards = [
        shard(
            "one.safetensors", first, [(0, x, row), (0, x + 2 * row, row), (2, 0, 8), (0, y, 12)]
        ),
        shard("two.safetensors", second, [(1, z, 10)]),
    ]
    head = {
        "format": "shardsurgeon view",
        "version": 1,
        "source": "../source",
        "files": listed,
        "shards": 2,
        "tensors": 5,
    }
    return [head, *shards]


_WIDTHS = {"F32": 4, "I32": 4, "I16": 2, "F16": 2, "U8": 1}


def entry(dtype: str, shape: list[int], begin: int) -> dict[str, Any]:
    """What a header says of a tensor whose data begins there."""
    end = begin + int(np.prod(shape)) * _WIDTHS[dtype]
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def shard(
    file: str, header: dict[str, Any], ranges: Sequence[tuple[int, int, int]]
) -> dict[str, Any]:
    """The line of a shard."""
    text = spelled(header)
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    return {
        "file": file,
        "nbytes": len(head) + sum(nbytes for *_, nbytes in ranges),
        "header_nbytes": len(head),
        "header_sha256": hashlib.sha256(head).hexdigest(),
        "header": header,
        "ranges": {
            "file": [number for number, *_ in ranges],
            "begin": [begin for _, begin, _ in ranges],
            "nbytes": [nbytes for *_, nbytes in ranges],
        },
    }


def place_of(file: bytes, tensor: str) -> int:
    """Where a tensor's data begins in a safetensors file."""
    length = int.from_bytes(file[:8], "little")
    begin: int = json.loads(file[8 : 8 + length])[tensor]["data_offsets"][0]
    return 8 + length + begin


def text_of(lines: Sequence[dict[str, Any]]) -> bytes:
    """The lines as text, their headers spelled as they were when their digests were made."""
    return b"".join(spelled(line) + b"\n" for line in lines)


def spelled(value: object) -> bytes:
    """JSON without white space; characters beyond ASCII are escaped only where one must be."""
    for escapes in (False, True):
        text = json.dumps(value, separators=(",", ":"), ensure_ascii=escapes)
        with suppress(UnicodeEncodeError):
            return text.encode()
    raise AssertionError("unreachable")


def packed(lines: Sequence[dict[str, Any]]) -> bytes:
    """The manifest of some lines."""
    return gzip.compress(text_of(lines), mtime=0)
