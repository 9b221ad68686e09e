"""The files beside the shards, and with them the whole plan.

Written anew are config, index, quantization lists, the record of the prune, and sampling settings
where they are asked for; what else belongs to the model is copied. Quantization lists and another
tool's record are read here.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from shardsurgeon.checkpoint.anatomy import Anatomy
from shardsurgeon.checkpoint.checkpoint import Checkpoint, identity_of
from shardsurgeon.checkpoint.files import (
    CALIBRATION_FOLDER,
    EVALUATION_NAME,
    QUANTIZATION_FILES,
    RECIPE_NAME,
)
from shardsurgeon.checkpoint.provenance import PROVENANCE_NAME, Step
from shardsurgeon.checkpoint.quantization import count_parameters, count_stored_elements
from shardsurgeon.checkpoint.sampling import GENERATION_CONFIG_NAME, listed
from shardsurgeon.checkpoint.sampling import OPTION as SAMPLING
from shardsurgeon.checkpoint.second_configs import second_configs
from shardsurgeon.checkpoint.side_files import require_sound, side_files
from shardsurgeon.execution.outputs import output_sizes
from shardsurgeon.execution.plan import OutputShard, Plan
from shardsurgeon.pruning.config_edits import (
    pruned_config,
    pruned_quantization_file,
    pruned_second_config,
)
from shardsurgeon.pruning.decide import Decision
from shardsurgeon.pruning.generation_config import with_sampling
from shardsurgeon.pruning.lineage import compose, step_of
from shardsurgeon.pruning.request import SelectionRequest
from shardsurgeon.storage.formats.index import build_index
from shardsurgeon.storage.formats.json_edit import Document
from shardsurgeon.storage.limits import CONFIG, METADATA
from shardsurgeon.storage.source import SourceFile

# What some writers of an index note beside its sizes: how many shards, how many tensors.
_SHARD_COUNTS = ("total_shards", "num_shards")
_TENSOR_COUNTS = ("total_tensors", "num_tensors")
# Where another tool's file of our record's name is kept.
_FOREIGN_PROVENANCE = f"{CALIBRATION_FOLDER}reap_pruning_metadata.source.json"

_NONE: Mapping[Path, str] = MappingProxyType({})

Recipe = Callable[[Sequence[tuple[str, str, str]]], bytes]


def assemble(
    checkpoint: Checkpoint,
    anatomy: Anatomy,
    request: SelectionRequest,
    decision: Decision,
    shards: tuple[OutputShard, ...],
    given: Mapping[Path, str],
    max_shard_nbytes: int | None,
    recipe: Recipe | None = None,
    evaluation: Mapping[Path, str] = _NONE,
) -> Plan:
    """The whole plan.

    shards: what `plan_shards` made; given: the score or keep-list file of this run → its SHA-256
    (hex) when it was read; max_shard_nbytes: what the shards were repacked to, None where they
    were not; recipe: makes the copy of the recipe that is kept, of the plan's `score_files`;
    evaluation: the file of one, as `given`.
    Raises ConfigError and HeaderError where config or quantization lists cannot be rewritten,
    SourceReadError where they cannot be read.
    """
    require_sound(checkpoint, request.include, request.exclude)
    beside, score_files = _copied_files(checkpoint, request, given, evaluation)
    source_files = _source_files(checkpoint, beside)
    second = second_configs(checkpoint, anatomy, beside)
    copied = tuple(name for name in beside if name not in second)
    generated = _generated_files(checkpoint, anatomy, decision, shards, second)
    step = step_of(
        request, decision.keep, decision.metric, identity_of(checkpoint), decision.made_for
    )
    if request.sampling:
        sampling, content = _generation_config(checkpoint, request.sampling, copied)
        step = replace(step, sampling=sampling)
        copied = tuple(name for name in copied if name != GENERATION_CONFIG_NAME)
        generated = ((GENERATION_CONFIG_NAME, content), *generated)
    provenance = compose(
        checkpoint.provenance, decision.keep, step, anatomy.n_group, decision.policies
    )
    if recipe is not None:
        taken = {*copied, *(name for name, _, _ in score_files), PROVENANCE_NAME}
        generated = ((_free_name(RECIPE_NAME, taken), recipe(score_files)), *generated)
    plan = Plan(
        shards=shards,
        generated_files=generated,
        copied_files=copied,
        score_files=score_files,
        source_files=source_files,
        asked=(
            *_asked(decision, max_shard_nbytes, step, score_files, request),
            *([("--follow-links", "given")] if checkpoint.source.follows_links else []),
            *([(SAMPLING, listed(step.sampling))] if step.sampling else []),
        ),
        source_fingerprint=_source_fingerprint(checkpoint, source_files),
    )
    record = replace(
        provenance,
        files=output_sizes(plan),
        include=request.include,
        exclude=request.exclude,
    )
    files = ((PROVENANCE_NAME, record.to_bytes()), *generated)
    return replace(plan, generated_files=files, record=PROVENANCE_NAME)


def _generated_files(
    checkpoint: Checkpoint,
    anatomy: Anatomy,
    decision: Decision,
    shards: tuple[OutputShard, ...],
    second: Mapping[str, Document],
) -> tuple[tuple[str, bytes], ...]:
    """(name, content) of every file written anew but the record, in the order of writing.

    second: what `second_configs` found.

    config.json and the index come last: a folder without them does not look like a model.
    """
    files = []
    present = {file.name: file for file in checkpoint.files}
    if PROVENANCE_NAME in present and checkpoint.provenance is None:
        # Another tool's record of an earlier prune makes room for ours and is not lost.
        files.append((_FOREIGN_PROVENANCE, checkpoint.read_file(PROVENANCE_NAME, METADATA)))
    for name in QUANTIZATION_FILES:
        if name in present:
            raw = checkpoint.read_file(name, CONFIG)
            document = Document.parse(raw, f"{checkpoint.location}/{name}")
            edited = pruned_quantization_file(
                name, document, checkpoint, anatomy, decision.keep, drop_mtp=decision.drop_mtp
            )
            files.append((name, edited))
    for name, document in second.items():
        edited = pruned_second_config(
            name, document, checkpoint, anatomy, decision.keep, drop_mtp=decision.drop_mtp
        )
        files.append((name, edited))
    config = pruned_config(checkpoint, anatomy, decision.keep, drop_mtp=decision.drop_mtp)
    files.append((checkpoint.names.config, config))
    if len(shards) > 1:
        files.append((checkpoint.names.index, _index(checkpoint, shards)))
    return tuple(files)


def _generation_config(
    checkpoint: Checkpoint, settings: Mapping[str, float], copied: Collection[str]
) -> tuple[dict[str, Any], bytes]:
    """As `with_sampling`; copied: what else belongs to the result, of the source's files."""
    name = GENERATION_CONFIG_NAME
    raw = checkpoint.read_file(name, CONFIG) if name in copied else None
    return with_sampling(raw, settings, checkpoint.settings, f"{checkpoint.location}/{name}")


def _index(checkpoint: Checkpoint, shards: tuple[OutputShard, ...]) -> bytes:
    tables = {shard.file: shard.tensors for shard in shards}
    num_tensors = sum(map(len, tables.values()))
    metadata: dict[str, Any] = dict(checkpoint.index_metadata or {})
    counts = dict.fromkeys(_SHARD_COUNTS, len(shards)) | dict.fromkeys(_TENSOR_COUNTS, num_tensors)
    metadata |= {key: count for key, count in counts.items() if key in metadata}
    metadata["total_size"] = sum(int(table.nbytes.sum()) for table in tables.values())
    metadata.pop("total_parameters", None)
    if (parameters := total_parameters(checkpoint, shards)) is not None:
        metadata["total_parameters"] = parameters
    return build_index(tables, metadata)


def total_parameters(checkpoint: Checkpoint, shards: tuple[OutputShard, ...]) -> int | None:
    """What the result's index says of its parameters, None where that cannot be known.

    Counted as the source's own number was, where it has one.
    """
    config, before = checkpoint.settings, (checkpoint.index_metadata or {}).get("total_parameters")
    tables = [shard.tensors for shard in shards]
    if before is not None and before == count_stored_elements(checkpoint.tables):
        return count_stored_elements(tables)
    return count_parameters(tables, config)


def _copied_files(
    checkpoint: Checkpoint,
    request: SelectionRequest,
    given: Mapping[Path, str],
    evaluation: Mapping[Path, str],
) -> tuple[tuple[str, ...], tuple[tuple[str, str, str], ...]]:
    """(source files to copy as they are, (output name, path, sha256) of files from elsewhere).

    given: the score or keep-list file of this run; evaluation: the file of one. They go to
    calibration/ and, should they lie in the source, nowhere else.
    """
    elsewhere = {os.path.realpath(path) for path in (*given, *evaluation)}
    copied = tuple(
        name
        for name in side_files(checkpoint, request.include, request.exclude).carried
        if not _is_one_of(checkpoint.source.local_path(name), elsewhere)
    )
    # A metadata file given as --plan must not take the place of the one that is written.
    taken = {*copied, PROVENANCE_NAME, _FOREIGN_PROVENANCE}
    score_files = []
    named = [(f"{CALIBRATION_FOLDER}{path.name}", path, sha256) for path, sha256 in given.items()]
    named += [(EVALUATION_NAME, path, sha256) for path, sha256 in evaluation.items()]
    for wanted, path, sha256 in named:
        name = _free_name(wanted, taken)
        taken.add(name)
        score_files.append((name, str(path), sha256))
    return copied, tuple(score_files)


def _is_one_of(path: Path | None, others: Collection[str]) -> bool:
    return path is not None and os.path.realpath(path) in others


def _free_name(name: str, taken: Collection[str]) -> str:
    """`calibration/scores.pt`, or `scores-2.pt` where an earlier prune left one of that name."""
    stem, dot, suffix = name.rpartition(".")
    number = 1
    candidate = name
    while candidate in taken:
        number += 1
        candidate = f"{stem}-{number}{dot}{suffix}" if dot else f"{name}-{number}"
    return candidate


def _source_files(checkpoint: Checkpoint, copied: tuple[str, ...]) -> tuple[SourceFile, ...]:
    """Every source file that is copied, in part or whole, or that a new one was written from."""
    read = {shard.file for shard in checkpoint.shards} | set(copied) | checkpoint.rewritten
    return tuple(file for file in checkpoint.files if file.name in read)


def _asked(
    decision: Decision,
    max_shard_nbytes: int | None,
    step: Step,
    score_files: Sequence[tuple[str, str, str]],
    request: SelectionRequest,
) -> tuple[tuple[str, str], ...]:
    """What was asked for, so that a message can say how two commands differ."""
    selection = f"{step.selection} {step.ratio:g}" if step.selection == "ratio" else step.selection
    rounding = f", rounding {step.rounding}" if step.rounding else ""
    metric = f", metric {step.metric}" if step.metric else ""
    retained = {layer: kept.retained for layer, kept in decision.keep.layers.items()}
    return (
        ("selection", f"{selection}{rounding}{metric}"),
        ("experts kept", f"up to {decision.keep.most} per layer"),
        ("MTP", "dropped" if decision.drop_mtp else "as the other layers"),
        ("shards", "as the source's" if max_shard_nbytes is None else f"{max_shard_nbytes} bytes"),
        ("--include", " ".join(request.include) or "nothing"),
        ("--exclude", " ".join(request.exclude) or "nothing"),
        *((name, f"SHA-256 {sha256[:12]}") for name, _, sha256 in score_files),
        ("keep-lists", hashlib.sha256(json.dumps(retained).encode()).hexdigest()[:12]),
    )


def _source_fingerprint(checkpoint: Checkpoint, used: Sequence[SourceFile]) -> str:
    """A hash of the source's state: names, sizes and stamps of the files used, and all headers."""
    files = [(file.name, file.nbytes, file.stamp) for file in used]
    headers = [shard.header_sha256 for shard in checkpoint.shards]
    return hashlib.sha256(json.dumps([files, headers]).encode()).hexdigest()
