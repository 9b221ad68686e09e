"""What goes beside the weights: the JSON documents that change, and the files that do not.

Pure but for reading a source's small JSON files.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from shardsurgeon.checkpoint.anatomy import Anatomy
from shardsurgeon.checkpoint.checkpoint import CONFIG_NAME, Checkpoint
from shardsurgeon.checkpoint.parameters import count_parameters, count_stored_elements
from shardsurgeon.checkpoint.provenance import PROVENANCE_NAME, Provenance
from shardsurgeon.execution.surgeryplan import OutputShard
from shardsurgeon.pruning.decision import Decision
from shardsurgeon.pruning.modelconfig import (
    QUANTIZATION_FILES,
    pruned_config,
    pruned_quantization_file,
)
from shardsurgeon.pruning.planning import weight_map
from shardsurgeon.storage.formats.documents import Document
from shardsurgeon.storage.formats.index import INDEX_NAME, build_index

_FOREIGN_PROVENANCE = "calibration/reap_pruning_metadata.source.json"
_OTHER_WEIGHTS = (".bin", ".pth", ".gguf", ".bin.index.json")


def documents(
    checkpoint: Checkpoint,
    anatomy: Anatomy,
    decision: Decision,
    shards: tuple[OutputShard, ...],
    provenance: Provenance,
) -> tuple[tuple[str, bytes], ...]:
    """(name, content) of every file that is written anew, config.json and the index last."""
    papers = [(PROVENANCE_NAME, provenance.to_bytes())]
    present = {file.name: file for file in checkpoint.files}
    if PROVENANCE_NAME in present and checkpoint.provenance is None:
        # Another tool's record of an earlier prune makes room for ours and is not lost.
        raw = checkpoint.source.read(PROVENANCE_NAME, 0, present[PROVENANCE_NAME].nbytes)
        papers.append((_FOREIGN_PROVENANCE, raw))
    for name in QUANTIZATION_FILES:
        if name in present:
            raw = checkpoint.source.read(name, 0, present[name].nbytes)
            where = f"{checkpoint.location}/{name}"
            document = Document.parse(raw, where)
            papers.append((name, pruned_quantization_file(document, anatomy, decision.keep, where)))
    config = pruned_config(checkpoint, anatomy, decision.keep, drop_mtp=decision.drop_mtp)
    papers.append((CONFIG_NAME, config))
    if len(shards) > 1:
        papers.append((INDEX_NAME, _index(checkpoint, shards)))
    return tuple(papers)


def _index(checkpoint: Checkpoint, shards: tuple[OutputShard, ...]) -> bytes:
    tensors = [tensor for shard in shards for tensor in shard.tensors]
    metadata: dict[str, Any] = dict(checkpoint.index_metadata or {})
    parameters = _total_parameters(checkpoint, shards, metadata.get("total_parameters"))
    metadata["total_size"] = sum(tensor.nbytes for tensor in tensors)
    metadata.pop("total_parameters", None)
    if parameters is not None:
        metadata["total_parameters"] = parameters
    return build_index(weight_map(shards), metadata)


def _total_parameters(
    checkpoint: Checkpoint, shards: tuple[OutputShard, ...], before: object
) -> int | None:
    """Counted as the source's own number was, where it has one."""
    config = checkpoint.settings
    records = [record for shard in checkpoint.shards for record in shard.header.tensors]
    tensors = [tensor for shard in shards for tensor in shard.tensors]
    if before is not None and before == count_stored_elements(records):
        return count_stored_elements(tensors)
    return count_parameters(tensors, config)


def side_files(
    checkpoint: Checkpoint, given: Sequence[Path]
) -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
    """(source files to copy as they are, (output name, path) of files from elsewhere).

    given: the score or keep-list file of this run. It goes to calibration/ and, should it lie
    in the source, nowhere else.
    """
    written = {CONFIG_NAME, INDEX_NAME, PROVENANCE_NAME, *QUANTIZATION_FILES}
    weights = {shard.file for shard in checkpoint.shards} | set(checkpoint.unindexed)
    in_use = {path.resolve() for path in given}
    copied = tuple(
        file.name
        for file in checkpoint.files
        if file.name not in written | weights
        and not is_other_weight_format(file.name)
        and not _is_one_of(checkpoint.source.local_path(file.name), in_use)
    )
    # A metadata file given as --plan must not take the place of the one that is written.
    taken = {*copied, PROVENANCE_NAME, _FOREIGN_PROVENANCE}
    extra = []
    for path in given:
        name = _free_name(f"calibration/{path.name}", taken)
        taken.add(name)
        extra.append((name, str(path)))
    return copied, tuple(extra)


def is_other_weight_format(name: str) -> bool:
    """Whether a file holds the weights in another format, which pruning leaves behind."""
    folder, _, rest = name.partition("/")
    base = name.rpartition("/")[2]
    return (
        base.endswith(_OTHER_WEIGHTS)
        or base.startswith("consolidated")
        or (folder == "original" and bool(rest))
    )


def _is_one_of(path: Path | None, others: Iterable[Path]) -> bool:
    return path is not None and path.resolve() in others


def _free_name(name: str, taken: set[str] | Mapping[str, object]) -> str:
    """`calibration/scores.pt`, or `scores-2.pt` where an earlier prune left one of that name."""
    stem, dot, suffix = name.rpartition(".")
    number = 1
    candidate = name
    while candidate in taken:
        number += 1
        candidate = f"{stem}-{number}{dot}{suffix}" if dot else f"{name}-{number}"
    return candidate
