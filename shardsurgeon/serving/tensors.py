"""The tensors of a pruned model that has no shards, mapped from the ranges that they are made of.

The interface is that of the safetensors library's `safe_open`. torch is imported where a tensor is
asked for in torch.
"""

from __future__ import annotations

import math
import mmap
import os
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import cached_property
from io import FileIO
from itertools import accumulate, chain, groupby
from operator import itemgetter
from types import TracebackType
from typing import Any, Literal

import numpy as np

from shardsurgeon.errors import CheckpointError, SourceReadError, UsageError
from shardsurgeon.storage.files import output_path, read_into, write_new
from shardsurgeon.storage.formats.dtypes import NUMPY_NAMES, TORCH_NAMES
from shardsurgeon.storage.formats.tensor_table import TensorRecord
from shardsurgeon.storage.formats.view import DATA_NAME, Range, ViewShard
from shardsurgeon.storage.open import open_source
from shardsurgeon.storage.source import Source
from shardsurgeon.storage.system import default_system
from shardsurgeon.storage.view import ViewSource

Framework = Literal["pt", "np"]

# Files that stay mapped: tensors come in the source's order, and some are made of two files.
_MOST_MAPPED = 2
# What the system is asked to read before it is needed.
_AHEAD_NBYTES = 64 << 20
# Linux reads at most the device's largest request per advice; 128 KiB is its smallest default.
_ADVICE_NBYTES = 128 << 10


def open_view(path: str | os.PathLike[str], framework: Framework = "pt") -> ViewTensors:
    """The tensors of a view, by name; path: its folder; framework: `pt` for torch, `np` for numpy.

    Raises CheckpointError where the folder is no view, or its source is not what it was.

    >>> plan = shardsurgeon.plan("fixtures/qwen3_moe", "fixtures/qwen3_moe/scores.pt", keep=8)
    >>> view = shardsurgeon.apply(plan, "small", view=True).out
    >>> with shardsurgeon.open_view(view, framework="np") as tensors:
    ...     name = next(name for name in tensors.keys() if name.endswith("mlp.gate.weight"))
    ...     tensors.get_slice(name).get_shape()
    [8, 64]
    """
    if framework not in ("pt", "np"):
        raise UsageError("framework", f"is {framework!r}", "give 'pt' or 'np'")
    source = open_source(path)
    if not isinstance(source, ViewSource):
        problem = "is a model with its own shards, and no view"
        raise CheckpointError(path, problem, "open its shards with the safetensors library")
    return ViewTensors(source.manifest.shards, source.origin, source.data, framework)


class ViewTensors:
    """Tensors by name, each read when it is asked for, by one thread or several at once.

    A tensor that lies in one range of a file on this machine is that file, mapped: nothing is
    copied, and what is not looked at is not read. Others are put together in memory. Writing to one
    changes no file.
    """

    def __init__(
        self,
        shards: Sequence[ViewShard],
        origin: Source,
        data: bytes = b"",
        framework: Framework = "pt",
        *,
        most_mapped: int = _MOST_MAPPED,
    ) -> None:
        """shards: what the tensors are made of; origin: where its ranges lie; data: values that no
        source has; most_mapped: files that stay mapped when others are read."""
        self._shards, self._origin, self._data = shards, origin, data
        self._most_mapped = most_mapped
        self._framework = framework
        sizes = (len(shard.header.tensors) for shard in shards)
        # Of each shard, the number of its first tensor, and behind them of how many there are.
        self._firsts = list(accumulate(sizes, initial=0))
        self._mapped: OrderedDict[str, mmap.mmap] = OrderedDict()
        self._opened: dict[str, FileIO] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> ViewTensors:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the files. Tensors that were given out stay what they are."""
        with self._lock:
            self._mapped.clear()
            for file in self._opened.values():
                file.close()
            self._opened.clear()

    def __del__(self) -> None:
        """Let go of the files of a reader that nobody closed."""
        self.close()

    def __iter__(self) -> Iterator[str]:
        return chain.from_iterable(shard.header.tensors.names() for shard in self._shards)

    def __len__(self) -> int:
        return self._firsts[-1]

    def __contains__(self, name: object) -> bool:
        return name in self._numbers

    def keys(self) -> list[str]:
        """The names of all tensors, shard after shard in the order of their data."""
        return list(self)

    def metadata(self) -> dict[str, str] | None:
        """The `__metadata__` of the first shard's header."""
        return self._shards[0].header.metadata

    @cached_property
    def _numbers(self) -> dict[str, int]:
        """Name → which of all tensors it is. Whoever lists names only needs none of it."""
        return {name: number for number, name in enumerate(self)}

    def _found(self, name: str) -> tuple[ViewShard, TensorRecord]:
        number = self._numbers[name]
        which = bisect_right(self._firsts, number) - 1
        shard = self._shards[which]
        return shard, shard.header.tensors[number - self._firsts[which]]

    def record(self, name: str) -> TensorRecord:
        """What the header says of a tensor. Raises KeyError."""
        return self._found(name)[1]

    def get_tensor(self, name: str) -> Any:
        """A whole tensor. Raises KeyError, UsageError for a dtype that the framework does not have,
        and what reading the source raises."""
        return self._elements(name, 0, math.prod(self.record(name).shape), self.record(name).shape)

    def get_slice(self, name: str) -> ViewSlice:
        """A tensor of which only what is indexed is read. Raises KeyError."""
        self.record(name)
        return ViewSlice(self, name)

    def in_turn(self, names: Sequence[str]) -> Iterator[tuple[str, Any]]:
        """(name, tensor) of these, one after the other, while the system reads those that follow.

        Left to itself it would read what lies between them as well. Raises as `get_tensor` does.
        """
        ahead, told = 0, 0
        for number, name in enumerate(names):
            if told <= number:
                ahead, told = 0, number
            while told < len(names) and ahead < _AHEAD_NBYTES:
                ahead += self._read_ahead(names[told])
                told += 1
            yield name, self.get_tensor(name)
            ahead -= self.record(name).nbytes

    def _read_ahead(self, name: str) -> int:
        """Have the system read a tensor where its file is mapped; its size in bytes."""
        shard, record = self._found(name)
        for file, begin, nbytes in shard.ranges(record.begin, record.end):
            end = begin + nbytes
            mapped = self._map(file, end)
            if mapped is None or not hasattr(mmap, "MADV_WILLNEED"):
                break
            with self._lock:
                opened = self._opened.get(file)
                if opened is None or default_system().in_memory(opened, end - 1):
                    continue
            for at in range(begin - begin % mmap.PAGESIZE, end, _ADVICE_NBYTES):
                mapped.madvise(mmap.MADV_WILLNEED, at, min(_ADVICE_NBYTES, end - at))
        return record.nbytes

    def rows(self, name: str, begin: int, end: int) -> Any:
        """Rows [begin, end) of the first axis; raises as `get_tensor` does."""
        shape = self.record(name).shape
        each = math.prod(shape[1:])
        return self._elements(name, begin * each, end * each, (end - begin, *shape[1:]))

    def shards(self) -> list[str]:
        """The names of the shards that the view stands for, in order."""
        return [shard.file for shard in self._shards]

    def save_shard(self, shard: str, path: str | os.PathLike[str]) -> None:
        """Write one shard, by its name, to a file that does not exist yet, for a tool that reads
        files alone: the bytes that `apply` without `view` writes.

        Raises KeyError, OutputError where there is a file already or no folder for it,
        OutputWriteError, and what reading the source raises.
        """
        found = {each.file: each for each in self._shards}[shard]
        write_new(output_path(path), self._stream(found))

    def _stream(self, shard: ViewShard) -> Iterator[bytes]:
        """A shard's bytes, piece by piece."""
        yield shard.head
        for file, begin, nbytes in shard.ranges(0, shard.nbytes - shard.header.data_begin):
            if file == DATA_NAME:
                yield self._data[begin : begin + nbytes]
            else:
                yield from self._origin.stream(file, begin, begin + nbytes)

    def _elements(self, name: str, first: int, last: int, shape: tuple[int, ...]) -> Any:
        """The elements [first, last), in order, as a tensor of a shape."""
        shard, record = self._found(name)
        names = TORCH_NAMES if self._framework == "pt" else NUMPY_NAMES
        dtype = names.get(record.dtype)
        if dtype is None:
            have = "numpy has" if self._framework == "np" else "torch has"
            problem = f"is of type {record.dtype}, which {have} no type for"
            remedy = "ask for framework='pt'" if self._framework == "np" else ""
            raise UsageError(name, problem, remedy)
        width = record.nbytes // max(math.prod(record.shape), 1)
        ranges = list(shard.ranges(record.begin + first * width, record.begin + last * width))
        if self._framework == "np":
            flat = np.frombuffer(self._buffer(ranges), np.uint8)
            return flat.view(dtype).reshape(shape)
        import torch

        wanted = getattr(torch, dtype)
        if not ranges:
            return torch.empty(shape, dtype=wanted)
        buffer, at = self._place(ranges, wanted.itemsize)
        count = (last - first) * width // wanted.itemsize
        return torch.frombuffer(buffer, dtype=wanted, count=count, offset=at).reshape(shape)

    def _place(self, ranges: Sequence[Range], alignment: int) -> tuple[Any, int]:
        """Writable memory that holds some ranges, and where in it they begin."""
        if len(ranges) == 1:
            file, begin, nbytes = ranges[0]
            mapped = self._map(file, begin + nbytes)
            if mapped is not None and begin % alignment == 0:
                return mapped, begin
        return self._buffer(ranges), 0

    def _buffer(self, ranges: Sequence[Range]) -> bytearray:
        """Some ranges, one behind the other, in memory of their own.

        They are read, not mapped: what is mapped would take memory once more.
        """
        joined = bytearray(sum(nbytes for *_, nbytes in ranges))
        left = memoryview(joined)
        for file, parts in groupby(ranges, key=itemgetter(0)):
            opened = None if file == DATA_NAME else self._origin.open(file)
            with opened or nullcontext():
                for _, begin, nbytes in parts:
                    if opened is not None:
                        where = f"{self._origin.location}/{file}"
                        read_into(opened, left[:nbytes], begin, where, default_system())
                    elif file == DATA_NAME:
                        left[:nbytes] = self._data[begin : begin + nbytes]
                    else:
                        left[:nbytes] = self._origin.read(file, begin, begin + nbytes)
                    left = left[nbytes:]
        return joined

    def _map(self, file: str, end: int) -> mmap.mmap | None:
        """A file of the source, mapped so that writing stays here; None where it is elsewhere.

        Raises SourceReadError where it ends before byte `end`, which it did not when the view was
        opened.
        """
        if file == DATA_NAME:
            return None
        with self._lock:
            found = self._mapped.get(file)
            if found is None:
                opened = self._origin.open(file)
                if opened is None:
                    return None
                nbytes = os.fstat(opened.fileno()).st_size
                if nbytes < end:
                    opened.close()
                self._require(nbytes, end, file)
                self._opened[file] = opened
                found = self._mapped[file] = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
                if len(self._mapped) > self._most_mapped:
                    oldest, _ = self._mapped.popitem(last=False)
                    self._opened.pop(oldest).close()
            self._mapped.move_to_end(file)
        self._require(len(found), end, file)
        return found

    def _require(self, nbytes: int, end: int, file: str) -> None:
        if nbytes < end:
            problem = f"ends at byte {nbytes:,}, byte {end:,} was expected"
            remedy = "it was cut short: fetch it again and make the view again"
            raise SourceReadError(f"{self._origin.location}/{file}", problem, remedy)


class ViewSlice:
    """A tensor that is read when it is indexed, as the safetensors library's slices are."""

    def __init__(self, tensors: ViewTensors, name: str) -> None:
        self._tensors, self._name = tensors, name

    def get_shape(self) -> list[int]:
        """The shape of the whole tensor."""
        return list(self._tensors.record(self._name).shape)

    def get_dtype(self) -> str:
        """The dtype, as safetensors headers spell it."""
        return self._tensors.record(self._name).dtype

    def __getitem__(self, index: Any) -> Any:
        """What an index of the framework takes; rows of the first axis that it leaves out are not
        read."""
        whole = index if isinstance(index, tuple) else (index,)
        first = whole[0] if whole else ...
        shape = self.get_shape()
        if type(first) is int and shape and -shape[0] <= first < shape[0]:
            row = first % shape[0]
            return self._tensors.rows(self._name, row, row + 1)[(0, *whole[1:])]
        if isinstance(first, slice) and shape:
            begin, end, step = first.indices(shape[0])
            if step == 1:
                rows = self._tensors.rows(self._name, begin, max(begin, end))
                return rows[(slice(None), *whole[1:])]
        return self._tensors.get_tensor(self._name)[index]
