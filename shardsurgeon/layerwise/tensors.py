"""Tensors read from shards, whole or in part, with the next ones read ahead."""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from io import FileIO

import torch

from shardsurgeon.checkpoint.checkpoint import Checkpoint, Shard
from shardsurgeon.storage.formats.safetensors import TensorRecord
from shardsurgeon.storage.source import Source

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "F32": torch.float32,
    "I64": torch.int64,
    "F64": torch.float64,
}

_PIECE = 8 << 20


@dataclass(frozen=True, slots=True)
class ByteRange:
    """Bytes [begin, end) of a file of the source."""

    file: str
    begin: int
    end: int


class TensorReader:
    """Reads tensors of a checkpoint to a device, whole or some of their rows.

    Safe to use from several threads.
    """

    def __init__(self, checkpoint: Checkpoint, device: str) -> None:
        self._source = checkpoint.source
        self._device = device
        self._places: dict[str, tuple[Shard, TensorRecord]] = {
            record.name: (shard, record)
            for shard in checkpoint.shards
            for record in shard.header.tensors
        }

    def record(self, name: str) -> TensorRecord | None:
        """What the tensor is, None where there is none of the name."""
        place = self._places.get(name)
        return place[1] if place else None

    def range_of(self, name: str) -> ByteRange:
        """Where the tensor lies."""
        shard, record = self._places[name]
        begin = shard.header.data_begin
        return ByteRange(shard.file, begin + record.begin, begin + record.end)

    def read(self, name: str, row: int | None = None) -> torch.Tensor:
        """A tensor as it is stored; row: only that row, its axis kept: [1, ...]."""
        shape = self._places[name][1].shape
        if row is None:
            return self._elements(name, 0, math.prod(shape), shape)
        each = math.prod(shape[1:])
        return self._elements(name, row * each, (row + 1) * each, (1, *shape[1:]))

    def rows(self, name: str, rows: Iterable[int]) -> torch.Tensor:
        """Some rows of a matrix: [rows, width]."""
        place, (_, record) = self.range_of(name), self._places[name]
        dtype = DTYPES[record.dtype]
        each = math.prod(record.shape[1:]) * dtype.itemsize
        begins = [place.begin + row * each for row in rows]
        read = self._source.read
        raw = b"".join(read(place.file, begin, begin + each) for begin in begins)
        return self._tensor(raw, dtype, (len(begins), *record.shape[1:]))

    def _elements(self, name: str, first: int, last: int, shape: tuple[int, ...]) -> torch.Tensor:
        """Elements [first, last) of a tensor."""
        place = self.range_of(name)
        dtype = DTYPES[self._places[name][1].dtype]
        begin = place.begin + first * dtype.itemsize
        raw = self._source.read(place.file, begin, place.begin + last * dtype.itemsize)
        return self._tensor(raw, dtype, shape)

    def _tensor(self, raw: bytes, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        if not raw:
            return torch.empty(shape, dtype=dtype, device=self._device)
        with warnings.catch_warnings():
            # The bytes cannot be written to, and nobody does.
            warnings.simplefilter("ignore")
            flat = torch.frombuffer(raw, dtype=torch.uint8)
        # An offset within bytes need not be a multiple of the element size.
        return flat.view(dtype).reshape(shape).to(self._device)


class ReadAhead:
    """A thread that reads byte ranges, one list of them at a time; a context manager."""

    def __init__(self, source: Source, most_nbytes: int) -> None:
        """most_nbytes: how much of a list is read, what the system may keep in memory."""
        self._source = source
        self._most = most_nbytes
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()

    def begin(self, ranges: Iterable[ByteRange]) -> None:
        """Read these from now on, and no longer what was asked for before."""
        self.end()
        wanted = sorted(ranges, key=lambda part: (part.file, part.begin))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._read, args=(wanted, self._stop), daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Stop reading."""
        if self._thread is not None:
            self._stop.set()
            self._thread.join()
            self._thread = None

    def __enter__(self) -> ReadAhead:
        return self

    def __exit__(self, *failure: object) -> None:
        self.end()

    def _read(self, ranges: list[ByteRange], stop: threading.Event) -> None:
        buffer = memoryview(bytearray(_PIECE))
        left = self._most
        try:
            for part in ranges:
                path = self._source.local_path(part.file)
                if path is None or stop.is_set() or left <= 0:
                    return
                with FileIO(path) as file:
                    file.seek(part.begin)
                    at = part.begin
                    while at < part.end and not stop.is_set():
                        count = file.readinto(buffer[: min(_PIECE, part.end - at)])
                        if not count:
                            return
                        at += count
                left -= part.end - part.begin
        except OSError:
            # Whoever needs the bytes reads them again, and reports what is wrong.
            return
