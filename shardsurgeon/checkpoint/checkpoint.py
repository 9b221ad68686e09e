"""A checkpoint opened: every header, the index, the config, the names of all files. No weights.

Reads what a source has besides weights into one frozen value, which `anatomy` interprets.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass
from functools import cached_property, partial
from os import PathLike
from typing import Any

from shardsurgeon.checkpoint.files import SINGLE_SHARD, other_formats, root_safetensors
from shardsurgeon.checkpoint.provenance import (
    PROVENANCE_NAME,
    Provenance,
    SourceIdentity,
    is_foreign,
    parse_provenance,
)
from shardsurgeon.errors import CheckpointError, ConfigError, HeaderError, IndexFileError
from shardsurgeon.families.schema import Family
from shardsurgeon.storage.formats.index import CONFIG_NAME, INDEX_NAME, Index, parse_index
from shardsurgeon.storage.formats.json_edit import Document
from shardsurgeon.storage.formats.safetensors import (
    Header,
    TensorRecord,
    header_length,
    parse_header,
)
from shardsurgeon.storage.open import hub_name, open_source
from shardsurgeon.storage.source import Source, SourceFile
from shardsurgeon.storage.threads import map_in_threads

_DIGITS = re.compile(r"(\d+)")
_NUMBERED = re.compile(r"(?P<stem>[^/]+)-(?P<number>\d+)-of-(?P<total>\d+)\.safetensors")
# Over a network each header takes two round trips; a model has up to a few hundred shards.
_HEADERS_AT_ONCE = 16


@dataclass(frozen=True, slots=True)
class Shard:
    """One safetensors file: its name in the source, its size in bytes, its parsed header."""

    file: str
    nbytes: int
    header: Header
    header_sha256: str


@dataclass(frozen=True)
class Checkpoint:
    """Everything of a checkpoint except its weights.

    files: every file of the source; shards: the weight files, in order of their names;
    config: config.json; index_metadata: the index's `metadata`, or None for a checkpoint
    without an index (its weight map is checked against the shards and not kept); provenance:
    what an earlier prune by this tool wrote, or None; unindexed: safetensors files that the
    index does not name and that are therefore not part of the model; notes: what a user should
    know and need not repair; family: a declaration to use in place of the shipped ones;
    unlisted: tensors of the shards that the index does not name.

    >>> checkpoint = shardsurgeon.open_checkpoint("fixtures/kimi_k25")
    >>> checkpoint.settings["model_type"], checkpoint.shards[0].header.tensors[0].shape
    ('kimi_k25', (64, 4))
    """

    source: Source
    files: tuple[SourceFile, ...]
    shards: tuple[Shard, ...]
    config: Document
    index_metadata: Mapping[str, Any] | None
    provenance: Provenance | None
    unindexed: tuple[str, ...]
    notes: tuple[str, ...]
    family: Family | None = None
    unlisted: tuple[str, ...] = ()

    @property
    def location(self) -> str:
        """Its folder or address, for messages."""
        return self.source.location

    @cached_property
    def config_sha256(self) -> str:
        """SHA-256 of config.json's bytes, in hex."""
        return hashlib.sha256(self.config.edit({})).hexdigest()

    @property
    def settings(self) -> Mapping[str, Any]:
        """What config.json says."""
        value = self.config.value
        assert isinstance(value, dict)
        return value

    @property
    def records(self) -> Iterator[TensorRecord]:
        """The header entries of all tensors, shard after shard."""
        return (record for shard in self.shards for record in shard.header.tensors)

    def read_file(self, name: str) -> bytes:
        """A whole file, which must be small and in `files`. Raises SourceReadError."""
        nbytes = next(file.nbytes for file in self.files if file.name == name)
        return self.source.read(name, 0, nbytes)

    @property
    def num_tensors(self) -> int:
        """How many tensors the shards hold."""
        return sum(len(shard.header.tensors) for shard in self.shards)

    @cached_property
    def total_size(self) -> int:
        """Bytes of tensor data, as an index's `total_size` counts them."""
        return sum(record.nbytes for record in self.records)


def open_checkpoint(model: str | PathLike[str] | Source) -> Checkpoint:
    """Open a checkpoint; model: anything that `open_source` takes, or a Source.

    Reads headers and JSON only. Raises what `open_source` raises, and CheckpointError or one of
    its subclasses where a file is missing, broken or contradicts another one.
    """
    source = open_source(model)
    files = {file.name: file for file in source.list()}
    if CONFIG_NAME not in files:
        raise _no_model(source, files)
    config = Document.parse(_read_whole(source, files[CONFIG_NAME]), _at(source, CONFIG_NAME))
    if not isinstance(config.value, dict):
        raise ConfigError(_at(source, CONFIG_NAME), "holds no JSON object")
    index = None
    if INDEX_NAME in files:
        index = parse_index(_read_whole(source, files[INDEX_NAME]), _at(source, INDEX_NAME))
    names = _shard_names(source, files, index)
    shards = _open_shards(source, [files[name] for name in names])
    unlisted = _check_tensors(source, shards, index)
    provenance, foreign = None, False
    if PROVENANCE_NAME in files:
        raw = _read_whole(source, files[PROVENANCE_NAME])
        foreign = is_foreign(raw)
        provenance = None if foreign else parse_provenance(raw, _at(source, PROVENANCE_NAME))
    unindexed = tuple(sorted(set(root_safetensors(files)) - set(names)))
    notes = list(source.notes)
    notes += [f"{name} is not in the index and is left out" for name in unindexed]
    if foreign:
        notes.append(
            f"{PROVENANCE_NAME} was written by another tool: expert ids are counted from this "
            "checkpoint on"
        )
    if unlisted:
        notes.append(f"{len(unlisted)} tensors that the index does not list are part of the model")
    metadata = index.metadata if index is not None else None
    return Checkpoint(
        source,
        tuple(files.values()),
        shards,
        config,
        metadata,
        provenance,
        unindexed,
        tuple(notes),
        unlisted=unlisted,
    )


def _no_model(source: Source, files: Mapping[str, SourceFile]) -> CheckpointError:
    """The error for a place without config.json: it may hold a model in another format."""
    if source.is_remote and not root_safetensors(files):
        suffixes = other_formats(files)
        but = f", only {', '.join(suffixes)}" if suffixes else ""
        return CheckpointError(
            source.location,
            f"holds no .safetensors file{but}",
            "name a model that is published as safetensors",
        )
    where = f"{source.location}/{CONFIG_NAME}"
    return ConfigError(where, "no such file", "give the folder of a model")


def _at(source: Source, name: str) -> str:
    return f"{source.location}/{name}"


def _read_whole(source: Source, file: SourceFile) -> bytes:
    return source.read(file.name, 0, file.nbytes)


def _shard_names(source: Source, files: Mapping[str, SourceFile], index: Index | None) -> list[str]:
    if index is not None:
        names = sorted(set(index.weight_map.values()), key=_natural)
        for name in names:
            if name not in files:
                raise IndexFileError(
                    _at(source, INDEX_NAME),
                    f"names the shard {name}, which is not there",
                    "fetch the missing shard",
                )
        if not names:
            raise IndexFileError(_at(source, INDEX_NAME), "weight_map is empty")
        return names
    if SINGLE_SHARD in files:
        return [SINGLE_SHARD]
    return _shards_without_index(source, root_safetensors(files))


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts `model-2-of-12` before `model-10-of-12`."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in _DIGITS.split(name)]


def _shards_without_index(source: Source, names: list[str]) -> list[str]:
    """One file, or a complete numbered set, can do without an index; anything else cannot."""
    if not names:
        raise CheckpointError(source.location, "holds no .safetensors file")
    if len(names) == 1:
        return names
    numbered = [_NUMBERED.fullmatch(name) for name in names]
    sets = {(match["stem"], int(match["total"])) for match in numbered if match}
    if all(numbered) and len(sets) == 1:
        ((_, total),) = sets
        if {int(match["number"]) for match in numbered if match} == set(range(1, total + 1)):
            return sorted(names, key=_natural)
        problem = f"has {len(names)} of the {total} shards and no {INDEX_NAME}"
        raise CheckpointError(source.location, problem, "fetch the missing files")
    raise CheckpointError(
        source.location,
        f"has {len(names)} .safetensors files and no {INDEX_NAME} to say which of them belong",
        "fetch the index",
    )


def _open_shards(source: Source, files: Sequence[SourceFile]) -> tuple[Shard, ...]:
    """The shards of some files, in their order; over a network, many headers at once."""
    if not source.is_remote:
        return tuple(_open_shard(source, file) for file in files)
    reader = _Reader(source)
    call = partial(_open_shard, reader)
    return tuple(map_in_threads(call, files, _HEADERS_AT_ONCE, "headers", reader.stopped.set))


class _Reader:
    """Reads from a remote source until it is stopped."""

    def __init__(self, source: Source) -> None:
        self.location = source.location
        self.stopped = threading.Event()
        self._source = source

    def read(self, name: str, begin: int, end: int) -> bytes:
        """Exactly the bytes [begin, end) of a file. Raises CancelledError once it is stopped."""
        data = bytearray()
        for piece in self._source.stream(name, begin, end):
            if self.stopped.is_set():
                raise CancelledError
            data += piece
        return bytes(data)


def _open_shard(source: Source | _Reader, file: SourceFile) -> Shard:
    where = f"{source.location}/{file.name}"
    if file.nbytes < 8:
        raise HeaderError(
            where, f"has {file.nbytes} bytes, too few for a safetensors header", "fetch it again"
        )
    length = header_length(source.read(file.name, 0, 8), file.nbytes, where)
    raw = source.read(file.name, 8, 8 + length)
    digest = hashlib.sha256(raw).hexdigest()
    return Shard(file.name, file.nbytes, parse_header(raw, file.nbytes, where), digest)


def _check_tensors(
    source: Source, shards: tuple[Shard, ...], index: Index | None
) -> tuple[str, ...]:
    """Refuse a tensor that is in two shards, or not where the index says.

    Returns the tensors that the index does not list: loaders read whole shards, so these are part
    of the model.
    """
    home: dict[str, str] = {}
    for shard in shards:
        for record in shard.header.tensors:
            other = home.setdefault(record.name, shard.file)
            if other != shard.file:
                raise CheckpointError(
                    _at(source, shard.file),
                    f"holds tensor {record.name}, which {other} holds too",
                    "remove the shard that does not belong",
                )
    if index is None:
        return ()
    where = _at(source, INDEX_NAME)
    for name, file in index.weight_map.items():
        if home.get(name) != file:
            remedy = "fetch the index and the shards again, from one revision"
            raise IndexFileError(where, f"says {file} holds {name}, but it does not", remedy)
    return tuple(name for name in home if name not in index.weight_map)


def identity_of(checkpoint: Checkpoint) -> SourceIdentity:
    """Name, commit and config.json's digest of a source."""
    source = checkpoint.source
    name = hub_name(source) or source.name
    return SourceIdentity(name, source.revision, checkpoint.config_sha256)
