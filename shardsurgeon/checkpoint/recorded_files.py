"""A pruned model's files held against the list that `apply` made of them: sizes and SHA-256.

The record itself is not in the list, since no file holds its own digest. Records of earlier
versions list no digests, or nothing at all; then less is compared.
"""

from __future__ import annotations

import hashlib
import re
import threading
from dataclasses import dataclass

from shardsurgeon.checkpoint.checkpoint import Checkpoint
from shardsurgeon.checkpoint.files import set_aside
from shardsurgeon.storage.phases import BYTES, Phase, phase
from shardsurgeon.storage.source import Source, SourceFile
from shardsurgeon.storage.threads import map_in_threads

_READS_AT_ONCE = 4
# Remote places may stamp large files with their SHA-256.
SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Deviation:
    """A file that is not as it was written. problem: what is wrong, to be read behind its name."""

    name: str
    problem: str


def deviations(pruned: Checkpoint, *, shards: bool) -> list[Deviation]:
    """Files that the record lists and that are missing or are not what it says, sorted by name.

    shards: whether to digest those whose SHA-256 is recorded, which reads them. A card that was set
    aside for one of the pruned model's own counts under its new name. Raises what reading raises.
    """
    record = pruned.provenance
    if record is None or record.files is None:
        return []
    digests = dict(record.sha256 or {})
    if not shards:
        for shard in pruned.shards:
            digests.pop(shard.file, None)
    there = {file.name: file for file in pruned.files}
    stopped = threading.Event()
    remote = pruned.source.is_remote
    read = (f for f in pruned.files if f.name in digests and not (remote and _is_digest(f.stamp)))
    nbytes = sum(file.nbytes for file in read)

    def problem_of(file: SourceFile, nbytes: int, sha256: str | None) -> str | None:
        if file.nbytes != nbytes:
            return f"has {file.nbytes:,} bytes, apply wrote {nbytes:,}"
        if sha256 is None or (found := _sha256_in(pruned.source, file, stopped, at)) == sha256:
            return None
        told = f"it has SHA-256 {found[:12]}…, {sha256[:12]}… is recorded"
        return f"is not what apply wrote: {told}"

    def compare(listed: tuple[str, int]) -> Deviation | None:
        name, nbytes = listed
        aside = there.get(set_aside(name) or name)
        if aside is not None and problem_of(aside, nbytes, digests.get(name)) is None:
            return None
        if name not in there:
            return Deviation(name, "is missing, apply wrote it")
        problem = problem_of(there[name], nbytes, digests.get(name))
        return None if problem is None else Deviation(name, problem)

    at_once = _READS_AT_ONCE if shards or pruned.source.is_remote else 1
    listed = sorted(record.files.items())
    with phase("hashing", nbytes, BYTES) as at:
        found = map_in_threads(compare, listed, at_once, "checksums", stopped.set)
    return [deviation for deviation in found if deviation is not None]


def _is_digest(stamp: str) -> bool:
    return SHA256.fullmatch(stamp) is not None


def _sha256_in(source: Source, file: SourceFile, stopped: threading.Event, at: Phase) -> str:
    """SHA-256 (hex) of a source's file: as a remote place lists it, or else of its bytes."""
    if source.is_remote and _is_digest(file.stamp):
        return file.stamp
    found = hashlib.sha256()
    for piece in source.stream(file.name, 0, file.nbytes):
        if stopped.is_set():
            break
        found.update(piece)
        at.advance(len(piece))
    return found.hexdigest()
