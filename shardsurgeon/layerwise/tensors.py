"""Tensors read from shards, whole or in part; the system is told what will be read next."""

from __future__ import annotations

import math
import os
import sys
import threading
import warnings
from collections.abc import Iterable
from contextlib import suppress
from itertools import groupby
from typing import NamedTuple, Protocol

import torch

from shardsurgeon.checkpoint.checkpoint import Checkpoint
from shardsurgeon.checkpoint.shards import Shard
from shardsurgeon.errors import ShardSurgeonError
from shardsurgeon.execution.plan import Literal, OutputTensor
from shardsurgeon.layerwise.devices import Device
from shardsurgeon.storage.formats.dtypes import TORCH_NAMES
from shardsurgeon.storage.formats.tensor_table import TensorRecord

# Of weights; torch calculates with no others.
DTYPES = {
    name: getattr(torch, called)
    for name, called in TORCH_NAMES.items()
    if name not in ("U16", "U32", "U64", "C64")
}

_ADVICE_NBYTES = 128 << 10
"""Linux reads at most the device's largest request per advice; 128 KiB is its smallest default."""


class _ByteRange(NamedTuple):
    """Bytes [begin, end) of a file of the source."""

    file: str
    begin: int
    end: int


class Tensors(Protocol):
    """Where weights are read from."""

    def record(self, name: str) -> TensorRecord | None:
        """The header's entry of a tensor, None where there is no tensor of this name."""
        ...

    def read(self, name: str, row: int | None = None) -> torch.Tensor:
        """A tensor on the device, as `TensorReader.read` gives it."""
        ...


class TensorReader:
    """Reads tensors of a checkpoint to a device, whole or some of their rows.

    Safe to use from several threads. Raises what the source raises where it cannot be read.
    """

    def __init__(self, checkpoint: Checkpoint, device: Device) -> None:
        self._source = checkpoint.source
        self._device = device
        self._places: dict[str, tuple[Shard, TensorRecord]] = {
            record.name: (shard, record)
            for shard in checkpoint.shards
            for record in shard.header.tensors
        }

    def record(self, name: str) -> TensorRecord | None:
        """The header's entry of a tensor, None where there is no tensor of this name."""
        place = self._places.get(name)
        return place[1] if place else None

    def read(self, name: str, row: int | None = None) -> torch.Tensor:
        """A tensor in its stored dtype and shape; row: only that row of the first axis, as
        [1, ...]."""
        shape = self._places[name][1].shape
        if row is None:
            return self._elements(name, 0, math.prod(shape), shape)
        each = math.prod(shape[1:])
        return self._elements(name, row * each, (row + 1) * each, (1, *shape[1:]))

    def planned(self, tensor: OutputTensor) -> torch.Tensor:
        """A tensor as a plan would write it."""
        parts = [
            piece.data
            if isinstance(piece, Literal)
            else self._source.read(piece.file, piece.begin, piece.begin + piece.nbytes)
            for piece in tensor.pieces
        ]
        return self._tensor(b"".join(parts), DTYPES[tensor.dtype], tensor.shape)

    def rows(self, name: str, rows: Iterable[int]) -> torch.Tensor:
        """Some rows of a matrix, in their stored dtype: [rows, width]."""
        place, (_, record) = self._range(name), self._places[name]
        dtype = DTYPES[record.dtype]
        each = math.prod(record.shape[1:]) * dtype.itemsize
        begins = [place.begin + row * each for row in rows]
        read = self._source.read
        raw = b"".join(read(place.file, begin, begin + each) for begin in begins)
        return self._tensor(raw, dtype, (len(begins), *record.shape[1:]))

    def read_ahead(self, names: Iterable[str], most_nbytes: int) -> None:
        """Ask the system to read tensors into its file cache, and do not wait for that.

        most_nbytes: where to stop, what the cache can hold. Linux only, and only where the
        source is a local folder; elsewhere nothing happens.
        """
        if sys.platform != "linux":
            return
        # Whatever is wrong with a file is reported when its tensors are read.
        with suppress(OSError, ShardSurgeonError):
            ranges = sorted(map(self._range, names))
            for name, parts in groupby(ranges, key=lambda part: part.file):
                opened = self._source.open(name)
                if opened is None:
                    return
                with opened as file:
                    for part in parts:
                        for begin in range(part.begin, part.end, _ADVICE_NBYTES):
                            nbytes = min(_ADVICE_NBYTES, part.end - begin, most_nbytes)
                            if nbytes <= 0:
                                return
                            os.posix_fadvise(file.fileno(), begin, nbytes, os.POSIX_FADV_WILLNEED)
                            most_nbytes -= nbytes

    def _range(self, name: str) -> _ByteRange:
        """Where a tensor lies."""
        shard, record = self._places[name]
        begin = shard.header.data_begin
        return _ByteRange(shard.file, begin + record.begin, begin + record.end)

    def _elements(self, name: str, first: int, last: int, shape: tuple[int, ...]) -> torch.Tensor:
        """Elements [first, last) of a tensor."""
        place = self._range(name)
        dtype = DTYPES[self._places[name][1].dtype]
        begin = place.begin + first * dtype.itemsize
        raw = self._source.read(place.file, begin, place.begin + last * dtype.itemsize)
        return self._tensor(raw, dtype, shape)

    def _tensor(self, raw: bytes, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        if not raw:
            return torch.empty(shape, dtype=dtype, device=self._device.name)
        with warnings.catch_warnings():
            # torch warns that `bytes` are read-only; nothing writes to this tensor.
            warnings.simplefilter("ignore")
            flat = torch.frombuffer(raw, dtype=torch.uint8)
        # An offset within bytes need not be a multiple of the element size.
        return self._device.load(flat).view(dtype).reshape(shape)


class HeldTensors:
    """A reader that keeps what it read, on the device and as it is stored, until it is dropped."""

    def __init__(self, tensors: Tensors) -> None:
        self._tensors = tensors
        self._held: dict[tuple[str, int | None], torch.Tensor] = {}
        self._reading: dict[tuple[str, int | None], threading.Lock] = {}

    def record(self, name: str) -> TensorRecord | None:
        """As of the reader behind it."""
        return self._tensors.record(name)

    def read(self, name: str, row: int | None = None) -> torch.Tensor:
        """As of the reader behind it, which is asked once for each row, by several threads too."""
        with self._reading.setdefault((name, row), threading.Lock()):
            held = self._held.get((name, row))
            if held is None:
                held = self._held[name, row] = self._tensors.read(name, row)
            return held
