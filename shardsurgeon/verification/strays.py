"""What lies in a pruned model's place besides the model, and whether all that was written is there.

What `apply` writes is worked out from the source, not believed of the record: weights that the
record alone vouches for are strays. A loader might read weights and indexes that are not the
model's, so these are differences; any other file is only named.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from shardsurgeon.checkpoint.checkpoint import Checkpoint
from shardsurgeon.checkpoint.files import (
    CALIBRATION_FOLDER,
    QUANTIZATION_FILES,
    is_card_picture,
    looks_like_weights,
    set_aside,
)
from shardsurgeon.checkpoint.provenance import PROVENANCE_NAME
from shardsurgeon.checkpoint.recorded_files import SHA256, deviations
from shardsurgeon.checkpoint.sampling import GENERATION_CONFIG_NAME
from shardsurgeon.storage.formats.view import DATA_NAME, VIEW_NAME
from shardsurgeon.storage.source import SKIPPED_FOLDERS
from shardsurgeon.storage.view import ViewSource
from shardsurgeon.units import counted
from shardsurgeon.verification.files import carried_files
from shardsurgeon.verification.findings import Findings

_MOST_NAMED = 5
# What the Hub puts into a repository.
_THE_HUBS = ".gitattributes"


def check_strays(source: Checkpoint, pruned: Checkpoint, findings: Findings) -> None:
    """There are no weights and no index besides the model's own; what else is there is noted."""
    expected = {shard.file for shard in pruned.shards} | carried_files(source, pruned)
    expected |= {pruned.names.config, PROVENANCE_NAME}
    expected |= {pruned.names.index} if len(pruned.shards) > 1 else set()
    expected |= {file.name for file in source.files}.intersection(QUANTIZATION_FILES)
    record = pruned.provenance
    if record is not None and any(step.sampling for step in record.steps):
        expected.add(GENERATION_CONFIG_NAME)
    if isinstance(pruned.source, ViewSource):
        expected |= {VIEW_NAME, DATA_NAME}
    recorded = {} if record is None or record.files is None else record.files
    if record is not None and record.files is None:
        # Earlier versions copied whatever lay there.
        old_shards = {shard.file for shard in source.shards} | set(source.unindexed)
        expected |= {file.name for file in source.files} - old_shards
    others = []
    for name in (*(file.name for file in pruned.files), *_not_listed(pruned)):
        is_ours = name.startswith(CALIBRATION_FOLDER) and not name.endswith("/")
        if name in expected or set_aside(name) is not None or name == _THE_HUBS:
            continue
        if is_card_picture(name):
            continue
        if is_ours and (name in recorded or record is None or record.files is None):
            continue
        if looks_like_weights(name.rstrip("/")) and not is_ours:
            findings.add(name, "is a weight file that is not part of the model")
        elif name in QUANTIZATION_FILES:
            findings.add(name, "is a quantization list that the source has not")
        else:
            others.append(name)
    if others:
        more = f" and {len(others) - _MOST_NAMED} more" if len(others) > _MOST_NAMED else ""
        named = ", ".join(sorted(others)[:_MOST_NAMED])
        findings.note(f"beside the model lie files that apply does not write: {named}{more}")


def _not_listed(pruned: Checkpoint) -> Iterator[str]:
    """What a source does not list as a file, in a folder of this machine: links to folders, pipes,
    devices, and folders that are called like weights, these with a slash behind."""
    config = None if pruned.source.is_remote else pruned.source.local_path(pruned.names.config)
    if config is None:
        return
    folder, listed = config.parent, {file.name for file in pruned.files}
    for below, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS]
        for name in (*folders, *names):
            place = Path(below, name)
            inside = place.relative_to(folder).as_posix()
            if name in folders and not place.is_symlink():
                own = not any(other.startswith(f"{inside}/") for other in listed)
                if own and looks_like_weights(inside):
                    yield f"{inside}/"
            elif inside not in listed:
                yield inside


def check_recorded(pruned: Checkpoint, findings: Findings, *, complete: bool) -> None:
    """Every file is there as the record says that it was written, and the record lists every file.

    complete: whether shards are to be digested too, those whose SHA-256 is recorded; not where
    their bytes would travel a network once more. Comes last: a file of which a difference is known
    is not named again.
    """
    record = pruned.provenance
    if record is None:
        return
    if record.files is None or record.sha256 is None:
        missing = "files" if record.files is None else "SHA-256 of files"
        findings.note(f"{PROVENANCE_NAME} is of an earlier version and lists no {missing}")
    if record.files is None:
        return
    weights = {shard.file for shard in pruned.shards}
    own = [*weights, pruned.names.config, *([pruned.names.index] if len(weights) > 1 else [])]
    for name in sorted(set(own).difference(record.files)):
        findings.add(PROVENANCE_NAME, f"does not list {name} among the files")
    if record.sha256 is not None:
        for name in sorted(record.files.keys() - weights - record.sha256.keys()):
            findings.add(PROVENANCE_NAME, f"does not list the SHA-256 of {name}")
    stamps = (file.stamp for file in pruned.files if file.name in weights)
    near = not pruned.source.is_remote or all(map(SHA256.fullmatch, stamps))
    for deviation in deviations(pruned, shards=complete and near):
        if not findings.tells_of(deviation.name):
            findings.add(deviation.name, deviation.problem)
    left = 0 if complete and near else len(weights.intersection(record.sha256 or ()))
    if left:
        findings.note(f"not compared: the recorded SHA-256 of {counted(left, 'shard')}")
