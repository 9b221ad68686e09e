"""The shape of the output as files: names, headers, order, alignment, the index, strays."""

from __future__ import annotations

from itertools import pairwise

from shardsurgeon.checkpoint import Checkpoint, Shard
from shardsurgeon.formats.index import INDEX_NAME, parse_index
from shardsurgeon.formats.safetensors import DTYPE_BITS
from shardsurgeon.verification.findings import Findings
from shardsurgeon.verification.pairing import Pair

_HEADER_UNIT = 8
_OTHER_WEIGHTS = (".bin", ".pth", ".gguf")


def check_structure(pruned: Checkpoint, pairs: dict[str, list[Pair]], findings: Findings) -> None:
    """Every file is named, laid out and listed as the contract says.

    That headers have no holes and overlaps, and that the index names nothing that is not
    there, has been checked when the folder was opened.
    """
    _check_names(pruned, findings)
    for shard in pruned.shards:
        _check_layout(shard, findings)
        _check_order(pairs.get(shard.file, []), findings)
    _check_index(pruned, findings)


def _check_names(pruned: Checkpoint, findings: Findings) -> None:
    total = len(pruned.shards)
    expected = [f"model-{n:05d}-of-{total:05d}.safetensors" for n in range(1, total + 1)]
    if total == 1:
        expected = ["model.safetensors"]
    for shard, name in zip(pruned.shards, expected, strict=True):
        if shard.file != name:
            findings.add(shard.file, f"should be called {name}")
    shards = {shard.file for shard in pruned.shards}
    for file in pruned.files:
        if "/" in file.name or file.name in shards:
            continue
        if file.name.endswith((".safetensors", *_OTHER_WEIGHTS)):
            findings.add(file.name, "is a weight file that is no part of the model")


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


def _check_index(pruned: Checkpoint, findings: Findings) -> None:
    file = next((file for file in pruned.files if file.name == INDEX_NAME), None)
    if file is None:
        if len(pruned.shards) > 1:
            findings.add(INDEX_NAME, f"is missing beside {len(pruned.shards)} shards")
        return
    index = parse_index(pruned.source.read(INDEX_NAME, 0, file.nbytes), INDEX_NAME)
    listed = set(index.weight_map)
    for shard in pruned.shards:
        for record in shard.header.tensors:
            if record.name not in listed:
                findings.add(INDEX_NAME, f"does not list {record.name} of {shard.file}")
    said = index.metadata.get("total_size")
    if said != pruned.total_size:
        problem = f"total_size is {said}, the tensors have {pruned.total_size} bytes"
        findings.add(INDEX_NAME, problem)
