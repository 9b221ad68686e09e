"""Which safetensors files are a model, and which of their tensors count. Headers only.

An index decides: which files there are, and which of two tensors of one name is meant. Without an
index the names of the files have to tell, and every tensor has to occur once.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from shardsurgeon.checkpoint.files import root_safetensors
from shardsurgeon.errors import CheckpointError, HeaderError, IndexFileError, SourceReadError
from shardsurgeon.storage.formats.index import FileNames, Index, natural_order
from shardsurgeon.storage.formats.safetensors import (
    Header,
    header_length,
    parse_header,
)
from shardsurgeon.storage.formats.tensor_table import Stems
from shardsurgeon.storage.limits import MAX_HEADERS_NBYTES, MAX_TENSORS
from shardsurgeon.storage.phases import phase
from shardsurgeon.storage.source import Source, SourceFile
from shardsurgeon.storage.threads import map_in_threads

_NUMBERED = re.compile(
    r"(?P<stem>[^/]+)-(?P<number>[0-9]{1,9})-of-(?P<total>[0-9]{1,9})\.safetensors"
)
# Over a network each header takes two round trips; a model has up to a few hundred shards.
_HEADERS_AT_ONCE = 16
_Opened = TypeVar("_Opened")
_NAMED = 3  # tensors that a message names before it counts the rest


@dataclass(frozen=True, slots=True)
class Shard:
    """One safetensors file: its name in the source, its size in bytes, its parsed header.

    header: without tensors that the model has from another file; header_sha256: of all of it.
    """

    file: str
    nbytes: int
    header: Header
    header_sha256: str


@dataclass(frozen=True, slots=True)
class Settled:
    """Shards of which every tensor is in one only.

    unlisted: tensors that are not listed. superseded: (file, tensor) of those that are listed as
    another file's.
    """

    shards: tuple[Shard, ...]
    unlisted: tuple[str, ...]
    superseded: tuple[tuple[str, str], ...]


def shard_names(
    source: Source, files: Mapping[str, SourceFile], index: Index | None, called: FileNames
) -> list[str]:
    """The files that make up a model, in the order of their numbers. called: as its files are.

    Raises IndexFileError where the index names a file that is not there, CheckpointError where
    there is no index and the files are not all of a model.
    """
    if index is not None:
        names = index.shards
        for name in names:
            if name not in files:
                raise IndexFileError(
                    f"{source.location}/{called.index}",
                    f"names the shard {name}, which is not there",
                    "fetch the missing shard",
                )
        return names
    if (single := called.shard(1, 1)) in files:
        return [single]
    names = sorted(root_safetensors(files, called), key=natural_order)
    if not names:
        raise CheckpointError(source.location, "holds no .safetensors file")
    _require_complete(source, names, called.index)
    return names


def _require_complete(source: Source, names: Sequence[str], index: str) -> None:
    """Refuse `model-00001-of-00003.safetensors` without the other two."""
    sets: dict[tuple[str, int], set[int]] = {}
    for match in filter(None, map(_NUMBERED.fullmatch, names)):
        sets.setdefault((match["stem"], int(match["total"])), set()).add(int(match["number"]))
    for (stem, total), numbers in sets.items():
        if (len(numbers), min(numbers), max(numbers)) != (total, 1, total):
            problem = f"has {len(numbers)} of the {total} shards of {stem} and no {index}"
            raise CheckpointError(source.location, problem, "fetch the missing files")


def open_shards(source: Source, files: Sequence[SourceFile]) -> tuple[Shard, ...]:
    """The shards of some files, in their order; over a network, many headers at once.

    Raises HeaderError where one is not a safetensors file.
    """
    return tuple(_map(_open_shard, source, files))


def open_readable(source: Source, files: Sequence[SourceFile]) -> tuple[Shard, ...]:
    """The same without those that are not safetensors files or cannot be read."""
    return tuple(filter(None, _map(_shard_or_none, source, files)))


def _map(
    call: Callable[..., _Opened], source: Source, files: Sequence[SourceFile]
) -> list[_Opened]:
    reader = _Reader(source)
    with phase("reading headers", len(files)) as at:

        def counted(file: SourceFile) -> _Opened:
            opened = call(reader, file)
            at.advance()
            return opened

        if not source.is_remote:
            return [counted(file) for file in files]
        return map_in_threads(counted, files, _HEADERS_AT_ONCE, "headers", reader.stopped.set)


class _Reader:
    """Reads the headers of a model, a remote one's until it is stopped."""

    def __init__(self, source: Source) -> None:
        self.location = source.location
        self.stopped = threading.Event()
        self._source = source
        self._adding = threading.Lock()
        self._nbytes = 0
        self._tensors = 0

    def add(self, where: str, nbytes: int = 0, tensors: int = 0) -> None:
        """Count what the headers come to. Raises HeaderError for more than any model has."""
        with self._adding:
            self._nbytes += nbytes
            self._tensors += tensors
            found = None
            if self._nbytes > MAX_HEADERS_NBYTES:
                found = f"{self._nbytes:,} bytes of headers, at most {MAX_HEADERS_NBYTES:,}"
            elif self._tensors > MAX_TENSORS:
                found = f"{self._tensors:,} tensors, at most {MAX_TENSORS:,}"
        if found:
            problem = f"with this file the model has {found} are read"
            raise HeaderError(where, problem, "no model needs so much: fetch it again")

    def known_header(self, name: str) -> Header | None:
        """What a file's header says, where the source has read it already."""
        return self._source.known_header(name)

    def read(self, name: str, begin: int, end: int) -> bytes:
        """Exactly the bytes [begin, end) of a file. Raises CancelledError once it is stopped."""
        if not self._source.is_remote:
            return self._source.read(name, begin, end)
        data = bytearray()
        for piece in self._source.stream(name, begin, end):
            if self.stopped.is_set():
                raise CancelledError
            data += piece
        return bytes(data)


def _shard_or_none(source: _Reader, file: SourceFile) -> Shard | None:
    try:
        return _open_shard(source, file)
    except (HeaderError, SourceReadError):
        return None


def _open_shard(source: _Reader, file: SourceFile) -> Shard:
    where = f"{source.location}/{file.name}"
    if file.nbytes < 8:
        raise HeaderError(
            where, f"has {file.nbytes} bytes, too few for a safetensors header", "fetch it again"
        )
    length = header_length(source.read(file.name, 0, 8), file.nbytes, where)
    source.add(where, nbytes=length)
    raw = source.read(file.name, 8, 8 + length)
    digest = hashlib.sha256(raw).hexdigest()
    header = source.known_header(file.name) or parse_header(raw, file.nbytes, where)
    source.add(where, tensors=len(header.tensors))
    return Shard(file.name, file.nbytes, header, digest)


def without_strangers(shards: Sequence[Shard]) -> tuple[Shard, ...]:
    """Of files that no index lists, those that may be a model's: no adapters, no score tables.

    Numbered shards are a model's whatever they hold.
    """
    return tuple(
        shard
        for shard in shards
        if _NUMBERED.fullmatch(shard.file)
        or (
            any(len(each.shape) > 1 for each in shard.header.tensors.series)
            and not any(".lora_" in each.head + each.tail for each in shard.header.tensors.series)
        )
    )


def are_one_set(shards: Sequence[Shard]) -> bool:
    """Whether the names alone say that the files belong together: all of one numbered set."""
    matches = [_NUMBERED.fullmatch(shard.file) for shard in shards]
    return all(matches) and len({(m["stem"], m["total"]) for m in matches if m}) == 1


def settle(source: Source, shards: Sequence[Shard], listed: Mapping[str, str]) -> Settled:
    """Have every tensor in one shard: the one that `listed`, tensor → file, says.

    Tensors that are not listed count, since loaders read whole shards. Raises CheckpointError
    where one of these is in two shards.
    """
    settled: list[Shard] = []
    superseded: list[tuple[str, str]] = []
    unlisted: list[str] = []
    for shard in shards:
        table = shard.header.tensors
        names = table.names()
        homes = list(map(listed.get, names))
        if {*homes} != {shard.file}:
            unlisted += (name for name, home in zip(names, homes, strict=True) if home is None)
            stays = np.array([home in (None, shard.file) for home in homes], bool)
            superseded += ((shard.file, names[place]) for place in np.flatnonzero(~stays).tolist())
            shard = replace(shard, header=replace(shard.header, tensors=table.select(stays)))
        settled.append(shard)
    _require_once(source, settled)
    return Settled(tuple(settled), tuple(unlisted), tuple(superseded))


def _require_once(source: Source, shards: Sequence[Shard]) -> None:
    """Raise CheckpointError where a tensor is in two shards."""
    stems = Stems()
    keys = (stems.keys(shard.header.tensors) for shard in shards)
    found = np.sort(np.concatenate([np.zeros(0, np.int64), *keys]))
    if not (found[1:] == found[:-1]).any():
        return
    home: dict[str, str] = {}
    twice: dict[tuple[str, str], list[str]] = {}
    for shard in shards:
        for name in shard.header.tensors.names():
            if (other := home.setdefault(name, shard.file)) != shard.file:
                twice.setdefault((shard.file, other), []).append(name)
    for (file, other), names in twice.items():
        problem = f"holds {some(names)}, which {other} holds too, and no index says which is meant"
        remedy = "remove the file that does not belong"
        raise CheckpointError(f"{source.location}/{file}", problem, remedy)


def require_listed(where: str, settled: Settled, index: Index) -> None:
    """Raise IndexFileError, naming the index, `where`, unless every tensor is in the shard that it
    says."""
    present = sum(len(shard.header.tensors) for shard in settled.shards) - len(settled.unlisted)
    if present == len(index.weight_map):
        return
    listed = index.weight_map
    found = {name for shard in settled.shards for name in shard.header.tensors.names()}
    missing = [name for name in listed if name not in found]
    elsewhere = {name: file for file, name in settled.superseded}
    file, holder = listed[missing[0]], elsewhere.get(missing[0])
    alike = [n for n in missing if listed[n] == file and elsewhere.get(n) == holder]
    problem = f"says {file} holds {some(alike)}, but it does not"
    if holder is not None:
        problem += f": {holder} does"
    if more := len(missing) - len(alike):
        problem += f"; {more:,} others are not where it says either"
    remedy = "fetch the index and the shards again, from one revision"
    raise IndexFileError(where, problem, remedy)


def some(names: Sequence[str]) -> str:
    """`tensor a`, `tensors a, b`, or `tensors a, b, c and 12 more`."""
    shown = ", ".join(names[:_NAMED])
    more = f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
    return f"{'tensor' if len(names) == 1 else 'tensors'} {shown}{more}"
