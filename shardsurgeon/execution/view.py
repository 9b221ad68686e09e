"""A plan as a view, and a view as the plan that makes real shards of it.

A view's folder gets every file of the result but its shards, and a manifest in their place; what
it says is the plan's shards, byte range by byte range.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np

from shardsurgeon.errors import CheckpointError, UsageError
from shardsurgeon.execution.plan import OutputShard, Pieces, Plan
from shardsurgeon.storage.files import sha256_of
from shardsurgeon.storage.formats.checksums import ends_with_checksums
from shardsurgeon.storage.formats.strict_json import is_text
from shardsurgeon.storage.formats.view import DATA_NAME, VIEW_NAME, ManifestWriter
from shardsurgeon.storage.limits import MAX_MANIFEST_NBYTES, MAX_OWN_NBYTES
from shardsurgeon.storage.open import hub_address, hub_name
from shardsurgeon.storage.source import Source
from shardsurgeon.storage.view import ViewSource

_KEPT = "a folder on this machine and a repository of the Hub"


def plan_view(plan: Plan, source: Source, out: Path) -> Plan:
    """The plan of the view, to be written to the folder `out`, that stands for a plan's result.

    Of a source that is a view itself, what that is made of is named. Raises UsageError where a view
    cannot name the source.
    """
    origin = source.origin if isinstance(source, ViewSource) else source
    made = view_manifest(plan, source, _place(source, origin, out))
    return replace(plan, shards=(), manifest=tuple(made.items()))


def view_manifest(plan: Plan, source: Source, place: str) -> dict[str, bytes]:
    """Name → content of the manifest that stands for a plan's shards, and of the file of values
    that goes with it where there is one; place: how it names where their bytes lie."""
    used = {
        shard.pieces.files[file]
        for shard in plan.shards
        for file in np.unique(shard.pieces.file).tolist()
        if file >= 0
    }
    if isinstance(source, ViewSource):
        files = source.manifest.files
    else:
        files = tuple(file for file in plan.source_files if file.name in used)
    for name in (place, *(file.name for file in files), *(shard.file for shard in plan.shards)):
        if not is_text(name):
            raise UsageError("--view", f"cannot name {name!a}, which is no text", "rename it")
    writer = ManifestWriter(place, files)
    for shard in plan.shards:
        pieces = shard.pieces
        if isinstance(source, ViewSource):
            pieces = _resolved(pieces, source)
        writer.add(shard.file, shard.header, len(shard.tensors), pieces)
    made = writer.finish()
    for name, most in ((VIEW_NAME, MAX_MANIFEST_NBYTES), (DATA_NAME, MAX_OWN_NBYTES)):
        if (nbytes := len(made.get(name, b""))) > most:
            problem = f"needs a {name} of {nbytes:,} bytes, and at most {most:,} are read"
            raise UsageError("--view", problem, "leave --view out")
    return made


def _resolved(pieces: Pieces, view: ViewSource) -> Pieces:
    """The same bytes as pieces of the view's own source, and values that it does not have."""
    files, literals = [file.name for file in view.manifest.files], list(pieces.literals)
    own = np.flatnonzero(pieces.file < 0)
    found = [(own, pieces.file[own], pieces.begin[own], pieces.nbytes[own])]
    for place, name in enumerate(pieces.files):
        mine, shard = np.flatnonzero(pieces.file == place), view.shards[name]
        first = pieces.begin[mine] - shard.header.data_begin
        which, file, begin, nbytes = shard.columns(first, first + pieces.nbytes[mine])
        for at in np.flatnonzero(file == len(files)).tolist():
            literals.append(view.data[begin[at] : begin[at] + nbytes[at]])
            file[at], begin[at] = -1, len(literals) - 1
        found.append((mine[which], file, begin, nbytes))
    which, file, begin, nbytes = (np.concatenate(column) for column in zip(*found, strict=True))
    order = np.argsort(which, kind="stable")
    return Pieces(tuple(files), file[order], begin[order], nbytes[order], tuple(literals))


def _place(source: Source, origin: Source, out: Path) -> str:
    """How a manifest in the folder `out` names the place of the shards' bytes.

    A folder that was named by a relative path is, so that both may be moved together.
    """
    if origin.is_remote:
        name = hub_name(origin)
        if name is None or not origin.location.startswith("hf://"):
            problem = f"cannot name {origin.location}: it reads from {_KEPT}"
            raise UsageError("--view", problem, "fetch the model first, or leave --view out")
        return f"hf://{hub_address(name, origin.revision).removeprefix('hf://')}"
    if isinstance(source, ViewSource) and "://" in source.manifest.source:
        return source.manifest.source
    # Not of a shard: that may be a link to elsewhere.
    path = origin.local_path("config.json")
    if path is None:
        raise UsageError("--view", f"cannot name {origin.location}: it reads from {_KEPT}")
    folder = os.path.realpath(path.parent)
    if os.path.isabs(origin.location):
        return folder
    return os.path.relpath(folder, os.path.realpath(out.absolute().parent / out.name))


def plan_shards_of(view: ViewSource, beside: Iterable[str], record: str = "") -> Plan:
    """The plan that makes a folder with real shards of a view. It reads the view's source.

    beside: the files of the view's folder that go along, like scores from outside of a source;
    record: the one of them to which the SHA-256 of the shards are to be added, "" for none. Raises
    CheckpointError where that record is not as it was written.
    """
    names = [name for name in beside if name != record]
    return Plan(
        shards=tuple(_output_shard(view, name) for name in view.shards),
        generated_files=((record, _record(view, record)),) if record else (),
        copied_files=(),
        score_files=tuple(_outside(view, name) for name in names),
        source_files=view.origin_files,
        asked=(("VIEW", view.location),),
        source_fingerprint=view.digest,
        record=record,
    )


def _record(view: ViewSource, name: str) -> bytes:
    """The record, which ends in the SHA-256 of the files beside the shards."""
    nbytes = next(file.nbytes for file in view.folder.list() if file.name == name)
    raw = view.folder.read(name, 0, nbytes)
    if not ends_with_checksums(raw):
        problem = "does not end in the SHA-256 of files, as apply writes them"
        raise CheckpointError(f"{view.location}/{name}", problem, "make the view again")
    return raw


def _outside(view: ViewSource, name: str) -> tuple[str, str, str]:
    path = view.folder.local_path(name).absolute()
    return name, str(path), sha256_of(path)


def _output_shard(view: ViewSource, name: str) -> OutputShard:
    shard = view.shards[name]
    begin = shard.header.data_begin
    file, at, nbytes = np.array([[0], [begin], [shard.nbytes - begin]], np.int64)
    pieces = _resolved(Pieces((name,), file, at, nbytes), view)
    return OutputShard(name, shard.head, shard.header.tensors, pieces)
