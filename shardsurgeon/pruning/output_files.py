"""The files beside the shards: index, config, metadata, and what is copied from the source."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from shardsurgeon._version import __version__
from shardsurgeon.checkpoint.anatomy import Anatomy
from shardsurgeon.checkpoint.checkpoint import Checkpoint, identity_of
from shardsurgeon.checkpoint.files import (
    CALIBRATION_FOLDER,
    QUANTIZATION_FILES,
    is_other_weight_format,
)
from shardsurgeon.checkpoint.provenance import PROVENANCE_NAME, Provenance, Step
from shardsurgeon.checkpoint.quantization import count_parameters, count_stored_elements
from shardsurgeon.execution.plan import OutputShard, Plan
from shardsurgeon.pruning.config_edits import pruned_config, pruned_quantization_file
from shardsurgeon.pruning.decide import Decision
from shardsurgeon.pruning.lineage import compose, step_of
from shardsurgeon.pruning.planner import weight_map
from shardsurgeon.pruning.request import SelectionRequest
from shardsurgeon.storage.formats.index import CONFIG_NAME, INDEX_NAME, build_index
from shardsurgeon.storage.formats.json_edit import Document
from shardsurgeon.storage.source import SourceFile

_FOREIGN_PROVENANCE = f"{CALIBRATION_FOLDER}reap_pruning_metadata.source.json"


def assemble(
    checkpoint: Checkpoint,
    anatomy: Anatomy,
    request: SelectionRequest,
    decision: Decision,
    shards: tuple[OutputShard, ...],
    given: Sequence[Path],
    max_shard_nbytes: int | None,
) -> Plan:
    """The whole plan.

    given: the score or keep-list file of this run; max_shard_nbytes: what the shards were cut
    by. Raises what the documents raise: ConfigError, HeaderError, SourceReadError.
    """
    step = step_of(request, decision.keep, decision.metric, identity_of(checkpoint))
    provenance = compose(
        checkpoint.provenance, decision.keep, step, anatomy.n_group, decision.policies
    )
    copied, extra = copied_files(checkpoint, given)
    papers = generated_files(checkpoint, anatomy, decision, shards, provenance)
    return Plan(
        shards=shards,
        generated_files=papers,
        copied_files=copied,
        score_files=extra,
        source_files=_source_files(checkpoint, shards, copied),
        request_fingerprint=_request_fingerprint(decision, max_shard_nbytes, step, extra),
        source_fingerprint=_source_fingerprint(checkpoint),
    )


def _source_files(
    checkpoint: Checkpoint, shards: tuple[OutputShard, ...], copied: tuple[str, ...]
) -> tuple[SourceFile, ...]:
    """Every source file whose bytes end up in the result."""
    read = {shard.file for shard in checkpoint.shards} | set(copied) | {CONFIG_NAME}
    return tuple(file for file in checkpoint.files if file.name in read)


def _request_fingerprint(
    decision: Decision, max_shard_nbytes: int | None, step: Step, extra: Sequence[tuple[str, str]]
) -> str:
    """What was asked for, apart from the source's state: a run may only go on with the same."""
    asked = {
        "version": __version__,
        # The source is a matter of the other fingerprint.
        "step": {**asdict(step), "source": None},
        "retained": {n: layer.retained for n, layer in decision.keep.layers.items()},
        "drop_mtp": decision.drop_mtp,
        "max_shard_nbytes": max_shard_nbytes,
        "extra": [
            (name, hashlib.sha256(Path(path).read_bytes()).hexdigest()) for name, path in extra
        ],
    }
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


def _source_fingerprint(checkpoint: Checkpoint) -> str:
    files = [(file.name, file.nbytes, file.stamp) for file in checkpoint.files]
    headers = [shard.header_sha256 for shard in checkpoint.shards]
    return hashlib.sha256(json.dumps([files, headers]).encode()).hexdigest()


def generated_files(
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


def copied_files(
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
        name = _free_name(f"{CALIBRATION_FOLDER}{path.name}", taken)
        taken.add(name)
        extra.append((name, str(path)))
    return copied, tuple(extra)


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
