"""The shape of the output as files: names, headers, order, alignment, the index."""

from __future__ import annotations

import math
from itertools import pairwise

from shardsurgeon.checkpoint.checkpoint import Checkpoint, Shard
from shardsurgeon.checkpoint.parameters import count_parameters
from shardsurgeon.storage.formats.index import INDEX_NAME
from shardsurgeon.storage.formats.safetensors import DTYPE_BITS
from shardsurgeon.verification.findings import Findings
from shardsurgeon.verification.pairing import Pair

_HEADER_UNIT = 8


def check_structure(
    source: Checkpoint, pruned: Checkpoint, pairs: dict[str, list[Pair]], findings: Findings
) -> None:
    """Every file is named, laid out and listed as the contract says.

    That headers have no holes and overlaps, and that the index names nothing that is not
    there, has been checked when the folder was opened.
    """
    _check_names(pruned, findings)
    for shard in pruned.shards:
        _check_layout(shard, findings)
        _check_order(pairs.get(shard.file, []), findings)
        _check_metadata(source, shard, pairs.get(shard.file, []), findings)
    _check_index(source, pruned, findings)


def _check_names(pruned: Checkpoint, findings: Findings) -> None:
    total = len(pruned.shards)
    expected = [f"model-{n:05d}-of-{total:05d}.safetensors" for n in range(1, total + 1)]
    if total == 1:
        expected = ["model.safetensors"]
    for shard, name in zip(pruned.shards, expected, strict=True):
        if shard.file != name:
            findings.add(shard.file, f"should be called {name}")


def _check_layout(shard: Shard, findings: Findings) -> None:
    begin = shard.header.data_begin
    if begin % _HEADER_UNIT:
        findings.add(shard.file, f"its header ends at byte {begin:,}, no multiple of 8")
    for record in shard.header.tensors:
        width = max(DTYPE_BITS[record.dtype] // 8, 1)
        if (begin + record.begin) % width:
            place = f"begins at byte {begin + record.begin:,} of {shard.file}"
            findings.add(record.name, f"{place}, no multiple of its {width}-byte elements")


def _check_order(pairs: list[Pair], findings: Findings) -> None:
    """Wider types first, and within a width the order of the source."""
    for first, second in pairwise(pairs):
        wider, narrower = DTYPE_BITS[first.dtype], DTYPE_BITS[second.dtype]
        if wider < narrower:
            findings.add(f"{second.file} {second.name}", f"stands behind narrower {first.name}")
        elif wider == narrower and first.source_place > second.source_place:
            findings.add(f"{second.file} {second.name}", f"stands behind {first.name}")


def _check_metadata(
    source: Checkpoint, shard: Shard, pairs: list[Pair], findings: Findings
) -> None:
    """`__metadata__` says what it said in the source shards that the tensors come from."""
    files = {pair.source_file for pair in pairs}
    origins = [shard.header.metadata or {} for shard in source.shards if shard.file in files]
    found = shard.header.metadata or {}
    for key in sorted(set(found).union(*origins)):
        said = dict.fromkeys(origin[key] for origin in origins if key in origin)
        if (found.get(key) not in said) if said else (key in found):
            expected = " or ".join(map(repr, said)) or "none"
            problem = f"__metadata__ {key!r} is {found.get(key)!r}, expected {expected}"
            findings.add(shard.file, problem)


def _check_index(source: Checkpoint, pruned: Checkpoint, findings: Findings) -> None:
    if pruned.index_metadata is None:
        if len(pruned.shards) > 1:
            findings.add(INDEX_NAME, f"is missing beside {len(pruned.shards)} shards")
        return
    for name in pruned.unlisted:
        findings.add(INDEX_NAME, f"does not list {name}")
    said = {**(source.index_metadata or {}), "total_size": pruned.total_size}
    if (parameters := _parameters(source, pruned)) is not None:
        said["total_parameters"] = parameters
    for key, value in said.items():
        found = pruned.index_metadata.get(key)
        # Where the source is silent about parameters, the output may be.
        silent = found is None and key not in (source.index_metadata or {}) and key != "total_size"
        if (type(found), found) != (type(value), value) and not silent:
            findings.add(INDEX_NAME, f"{key} is {found!r}, expected {value!r}")


def _parameters(source: Checkpoint, pruned: Checkpoint) -> int | None:
    """Counted as the source counts them: elements as they are stored, or unpacked weights."""
    said = (source.index_metadata or {}).get("total_parameters")
    if said is not None and said == _stored_elements(source):
        return _stored_elements(pruned)
    records = (record for shard in pruned.shards for record in shard.header.tensors)
    return count_parameters(records, pruned.settings)


def _stored_elements(checkpoint: Checkpoint) -> int:
    return sum(
        math.prod(record.shape) for shard in checkpoint.shards for record in shard.header.tensors
    )
