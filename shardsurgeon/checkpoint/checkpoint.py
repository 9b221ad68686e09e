"""A checkpoint opened: every header, the index, the config, the names of all files. No weights.

Reads what a source has besides weights into one frozen value, which `anatomy` interprets.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from os import PathLike
from typing import Any

from shardsurgeon.checkpoint.files import (
    QUANTIZATION_FILES,
    names_of,
    other_formats,
    root_safetensors,
)
from shardsurgeon.checkpoint.provenance import (
    PROVENANCE_NAME,
    Provenance,
    SourceIdentity,
    is_foreign,
    parse_provenance,
)
from shardsurgeon.checkpoint.recognition import sort_out
from shardsurgeon.checkpoint.shards import (
    Settled,
    Shard,
    are_one_set,
    open_readable,
    open_shards,
    require_listed,
    settle,
    shard_names,
    some,
    without_strangers,
)
from shardsurgeon.checkpoint.unlisted import forgotten_parts
from shardsurgeon.errors import CheckpointError, ConfigError, IndexFileError
from shardsurgeon.families.schema import Family, family_for, is_declared
from shardsurgeon.reports import Titled
from shardsurgeon.storage.formats.index import HUGGING_FACE, FileNames, parse_index
from shardsurgeon.storage.formats.json_edit import Document
from shardsurgeon.storage.formats.tensor_table import TensorRecord, TensorTable
from shardsurgeon.storage.limits import CONFIG, INDEX, METADATA, Limit, require_size, uncollected
from shardsurgeon.storage.open import hub_address, hub_name, open_source
from shardsurgeon.storage.phases import phase
from shardsurgeon.storage.source import Source, SourceFile, require_plain
from shardsurgeon.units import counted, format_size


@dataclass(frozen=True, repr=False)
class Checkpoint(Titled):
    """Everything of a checkpoint except its weights.

    files: every file of the source; names: what they are called; shards: the weight files, in
    order of their names; config: config.json, or what stands in its place; index_metadata: the
    index's `metadata`, or None for a checkpoint without an index (its weight map is checked against
    the shards and not kept); provenance: what an earlier prune by this tool wrote, or None;
    unindexed: safetensors files that are not part of the model; notes: what a user should know and
    need not repair; family: a declaration to use in place of the shipped ones; unlisted: tensors of
    the shards that the index does not name; superseded: (file, tensor) of those in a shard that the
    index says are in another.

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
    superseded: tuple[tuple[str, str], ...] = ()
    names: FileNames = HUGGING_FACE

    @property
    def title(self) -> str:
        """`Kimi-K2.5: kimi_k25, 208,235 tensors in 64 shards, 594.1 GB`."""
        held = f"{counted(self.num_tensors, 'tensor')} in {counted(len(self.shards), 'shard')}"
        kind = self.settings.get("model_type") or "no model type"
        return f"{self.source.name}: {kind}, {held}, {format_size(self.total_size)}"

    def shown(self) -> Iterable[tuple[str, object]]:
        """What it is and where, for a notebook."""
        yield "location", self.location
        yield "architectures", self.settings.get("architectures")
        yield "shards", len(self.shards)
        yield "tensors", self.num_tensors
        yield "total_size", self.total_size
        yield "files", len(self.files)
        yield "notes", self.notes

    @property
    def location(self) -> str:
        """Its folder or address, for messages."""
        return self.source.location

    @property
    def tables(self) -> tuple[TensorTable, ...]:
        """The tensors of each shard."""
        return tuple(shard.header.tensors for shard in self.shards)

    @property
    def config_place(self) -> str:
        """Its config, for messages."""
        return _at(self.source, self.names.config)

    @property
    def rewritten(self) -> frozenset[str]:
        """Names of files that a pruned model has new ones of."""
        own = (self.names.config, self.names.index, PROVENANCE_NAME)
        return frozenset((*own, *QUANTIZATION_FILES))

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

    @cached_property
    def left_behind(self) -> Mapping[str, str]:
        """Files beside the weights that are no part of the model → why: `hidden`, `log`, ….

        Raises what reading the source raises.
        """
        weights = {*self.unindexed, *(shard.file for shard in self.shards)}
        known = weights | self.rewritten | self.odd.keys()
        beside = [file for file in self.files if file.name not in known]
        return {**sort_out(self.source, beside, self.settings), **self.odd}

    @property
    def odd(self) -> Mapping[str, str]:
        """What lies beside the weights and is no plain file of the model → what it is.

        Shards may be links to anywhere.
        """
        shards = {shard.file for shard in self.shards}
        return {name: what for name, what in self.source.odd.items() if name not in shards}

    def read_file(self, name: str, limit: Limit) -> bytes:
        """A whole file of `files`. Raises CheckpointError for one beyond the limit of its kind,
        SourceReadError."""
        return _read_whole(
            self.source, next(file for file in self.files if file.name == name), limit
        )

    @property
    def num_tensors(self) -> int:
        """How many tensors the shards hold."""
        return sum(len(shard.header.tensors) for shard in self.shards)

    @cached_property
    def total_size(self) -> int:
        """Bytes of tensor data, as an index's `total_size` counts them."""
        return sum(int(table.nbytes.sum()) for table in self.tables)


def open_checkpoint(
    model: str | PathLike[str] | Source,
    family: Family | None = None,
    *,
    follow_links: bool = False,
) -> Checkpoint:
    """Open a checkpoint; model: anything that `open_source` takes, or a Source.

    family: a declaration to use in place of the shipped ones; follow_links: as `LocalSource` has
    it. Reads headers and JSON only. Raises what `open_source` raises, and CheckpointError or one of
    its subclasses where a file is missing, broken, no plain file or contradicts another one.
    """
    with phase("reading the model"), uncollected():
        return _opened(open_source(model, follow_links=follow_links), family)


def _opened(source: Source, family: Family | None) -> Checkpoint:
    files = {file.name: file for file in source.list()}
    called = names_of(source.location, {**files, **source.odd})
    read_whole = (called.config, called.index, PROVENANCE_NAME, *QUANTIZATION_FILES)
    require_plain(source, read_whole)
    if called.config not in files:
        raise _no_model(source, files, called)
    place = _at(source, called.config)
    config = Document.parse(_read_whole(source, files[called.config], CONFIG, ConfigError), place)
    if not isinstance(config.value, dict):
        raise ConfigError(place, "holds no JSON object")
    index = None
    if called.index in files:
        raw = _read_whole(source, files[called.index], INDEX, IndexFileError)
        index = parse_index(raw, _at(source, called.index))
    alone = index is None and called.shard(1, 1) in files
    said = index.shards if index is not None else root_safetensors(source.odd, called)
    require_plain(source, [] if alone else said, links=True)
    names = shard_names(source, files, index, called)
    shards = open_shards(source, [files[name] for name in names])
    if index is None and len(shards) > 1:
        shards = without_strangers(shards)
    settled = settle(source, shards, index.weight_map if index is not None else {})
    if index is not None:
        require_listed(_at(source, called.index), settled, index)
    provenance, foreign = None, False
    if PROVENANCE_NAME in files:
        raw = _read_whole(source, files[PROVENANCE_NAME], METADATA)
        foreign = is_foreign(raw)
        provenance = None if foreign else parse_provenance(raw, _at(source, PROVENANCE_NAME))
    unindexed = tuple(sorted(set(root_safetensors(files)) - {shard.file for shard in shards}))
    notes = [*source.notes, *_weight_notes(settled, unindexed, index is not None)]
    if foreign:
        notes.append(
            f"{PROVENANCE_NAME} was written by another tool: expert ids are counted from this "
            "checkpoint on"
        )
    checkpoint = Checkpoint(
        source,
        tuple(files.values()),
        settled.shards,
        config,
        index.metadata if index is not None else None,
        provenance,
        unindexed,
        tuple(notes),
        unlisted=settled.unlisted if index is not None else (),
        superseded=settled.superseded,
        names=called,
    )
    if family is not None:
        return with_family(checkpoint, family)
    if is_declared(checkpoint.settings):
        return _with_parts(checkpoint, family_for(checkpoint.settings, ""))
    return checkpoint


def with_family(checkpoint: Checkpoint, family: Family) -> Checkpoint:
    """The checkpoint, to be read by a declaration, and with it the files that only that knows."""
    return _with_parts(replace(checkpoint, family=family), family)


def _with_parts(checkpoint: Checkpoint, family: Family) -> Checkpoint:
    """The checkpoint with the files that no index lists and that are parts of it.

    Raises CheckpointError where two of them hold the same tensor.
    """
    if not checkpoint.unindexed:
        return checkpoint
    files = [file for file in checkpoint.files if file.name in checkpoint.unindexed]
    readable = open_readable(checkpoint.source, files)
    found = forgotten_parts(checkpoint.shards, readable, family, checkpoint.settings)
    listed = ((name, s.file) for s in checkpoint.shards for name in s.header.tensors.names())
    parts = settle(checkpoint.source, found, dict(listed))
    damaged = {file.name for file in files} - {shard.file for shard in readable}
    taken = {shard.file for shard in parts.shards}
    said = {_left_out(name): _unreadable(name) for name in damaged}
    said |= {_left_out(shard.file): _taken_in(shard) for shard in parts.shards}
    listing = checkpoint.index_metadata is not None
    return replace(
        checkpoint,
        shards=(*checkpoint.shards, *parts.shards),
        unindexed=tuple(name for name in checkpoint.unindexed if name not in taken),
        notes=tuple(said.get(note, note) for note in checkpoint.notes),
        unlisted=checkpoint.unlisted + (parts.unlisted if listing else ()),
        superseded=checkpoint.superseded + parts.superseded,
    )


def _left_out(file: str) -> str:
    return f"{file} is not in the index and is left out"


def _unreadable(file: str) -> str:
    return f"{file} is not in the index, is not a whole safetensors file and is left out"


def _taken_in(shard: Shard) -> str:
    count = len(shard.header.tensors)
    return f"{shard.file} is not in the index and is taken in: its {count} tensors are the model's"


def _weight_notes(settled: Settled, unindexed: tuple[str, ...], has_index: bool) -> Iterator[str]:
    """What a user should know of weight files and tensors that no index tells of."""
    for name in unindexed:
        yield _left_out(name)
    if not has_index and len(settled.shards) > 1 and not are_one_set(settled.shards):
        files = ", ".join(shard.file for shard in settled.shards)
        yield f"there is no index: {files} together are taken for the model"
    if has_index and settled.unlisted:
        yield f"{len(settled.unlisted)} tensors that the index does not list are part of the model"
    if settled.superseded:
        files = ", ".join(dict.fromkeys(file for file, _ in settled.superseded))
        names = [name for _, name in settled.superseded]
        yield f"{some(names)} of {files} left out: the index says that another shard has them"


def _no_model(
    source: Source, files: Mapping[str, SourceFile], called: FileNames
) -> CheckpointError:
    """The error for a place without a config: it may hold a model in another format, or in a
    folder."""
    inner = sorted(name.rpartition("/")[0] for name in files if name.endswith(f"/{called.config}"))
    if inner:
        name = hub_name(source) if source.is_remote else None
        where = f"{name or source.location}/{inner[0]}"
        meant = where if name is None else hub_address(where, source.revision)
        problem = f"holds no {called.config} but in {counted(len(inner), 'folder')}"
        return ConfigError(source.location, problem, f"did you mean {meant}?")
    if called == HUGGING_FACE and source.is_remote and not root_safetensors(files):
        suffixes = other_formats(files)
        but = f", only {', '.join(suffixes)}" if suffixes else ""
        return CheckpointError(
            source.location,
            f"holds no .safetensors file{but}",
            "name a model that is published as safetensors",
        )
    where = _at(source, called.config)
    return ConfigError(where, "no such file", "give the folder of a model")


def _at(source: Source, name: str) -> str:
    return f"{source.location}/{name}"


def _read_whole(
    source: Source, file: SourceFile, limit: Limit, error: type[CheckpointError] = CheckpointError
) -> bytes:
    require_size(file.nbytes, limit, _at(source, file.name), error)
    return source.read(file.name, 0, file.nbytes)


def identity_of(checkpoint: Checkpoint) -> SourceIdentity:
    """Name, commit and config.json's digest of a source."""
    source = checkpoint.source
    name = hub_name(source) or source.name
    return SourceIdentity(name, source.revision, checkpoint.config_sha256)
