"""The output as files: names, headers, alignment, index, and the files beside the weights.

Files whose content changes (config.json, the index, the metadata, quantization lists) have checks
of their own, and so has what lies there besides (`strays`).

What belongs to a model beside its weights, `checkpoint.side_files` says, by the globs in the
record; whether it is there is found out here.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection, Mapping

import numpy as np

from shardsurgeon.checkpoint.checkpoint import Checkpoint
from shardsurgeon.checkpoint.files import CALIBRATION_FOLDER, set_aside
from shardsurgeon.checkpoint.quantization import count_parameters, count_stored_elements
from shardsurgeon.checkpoint.shards import Shard
from shardsurgeon.checkpoint.side_files import side_files
from shardsurgeon.storage.formats.safetensors import DTYPE_BITS
from shardsurgeon.storage.source import SourceFile
from shardsurgeon.verification.byte_ranges import RangeComparer
from shardsurgeon.verification.findings import Findings
from shardsurgeon.verification.pairs import ShardPairs
from shardsurgeon.verification.parameter_count import parameter_bounds

_HEADER_UNIT = 8

# Remote sources may stamp files with their digest: SHA-256, or git's blob hash of small files.
_SHA256 = re.compile(r"[0-9a-f]{64}")
_GIT_SHA1 = re.compile(r"[0-9a-f]{40}")
# Numbers in an index that count what is there now; some writers note them.
_INDEX_COUNTS: dict[str, Callable[[Checkpoint], int]] = {
    "total_shards": lambda model: len(model.shards),
    "num_shards": lambda model: len(model.shards),
    "total_tensors": lambda model: model.num_tensors,
    "num_tensors": lambda model: model.num_tensors,
}


def check_structure(
    source: Checkpoint, pruned: Checkpoint, pairs: Mapping[str, ShardPairs], findings: Findings
) -> None:
    """Every file is named, laid out and listed as the contract says.

    Opening the checkpoint has already checked that headers have no holes and overlaps, and that
    the index names no tensor that is missing.
    """
    _check_names(source, pruned, findings)
    for file, name in pruned.superseded:
        findings.add(f"{file} {name}", "is in another shard too")
    for shard in pruned.shards:
        if not _is_whole(pairs[shard.file]):
            _check_layout(shard, findings)
        _check_metadata(source, shard, pairs[shard.file], findings)
    _check_index(source, pruned, findings)


def _check_names(source: Checkpoint, pruned: Checkpoint, findings: Findings) -> None:
    total, stem = len(pruned.shards), source.names.stem
    expected = [f"{stem}-{n:05d}-of-{total:05d}.safetensors" for n in range(1, total + 1)]
    if total == 1:
        expected = [f"{stem}.safetensors"]
    for shard, name in zip(pruned.shards, expected, strict=True):
        if shard.file != name:
            findings.add(shard.file, f"should be called {name}")


def _check_layout(shard: Shard, findings: Findings) -> None:
    """Every tensor begins at a multiple of its elements' size, whatever their order."""
    table, begin = shard.header.tensors, shard.header.data_begin
    if begin % _HEADER_UNIT:
        findings.add(shard.file, f"its header ends at byte {begin:,}, no multiple of 8")
    width = table.by_series([max(DTYPE_BITS[each.dtype] // 8, 1) for each in table.series])
    for place in np.flatnonzero((begin + table.begin) % width).tolist():
        at = f"begins at byte {begin + table.begin[place]:,} of {shard.file}"
        findings.add(table.name(place), f"{at}, no multiple of its {width[place]}-byte elements")


def _is_whole(pairs: ShardPairs) -> bool:
    """Whether a shard is to be a file of the source, byte for byte: then it is laid out as that."""
    shard, homes = pairs.shard, np.unique(pairs.home).tolist()
    if len(homes) != 1 or not np.array_equal(pairs.place, pairs.source_place):
        return False
    source = pairs.sources[homes[0]]
    return (shard.header_sha256, shard.nbytes) == (source.header_sha256, source.nbytes)


def _check_metadata(
    source: Checkpoint, shard: Shard, pairs: ShardPairs, findings: Findings
) -> None:
    """`__metadata__` has the entries of the source shards that the tensors come from."""
    homes = np.unique(pairs.home).tolist()
    origins = [source.shards[home].header.metadata or {} for home in homes]
    found = shard.header.metadata or {}
    for key in sorted(set(found).union(*origins)):
        said = dict.fromkeys(origin[key] for origin in origins if key in origin)
        if (found.get(key) not in said) if said else (key in found):
            expected = " or ".join(map(repr, said)) or "none"
            problem = f"__metadata__ {key!r} is {found.get(key)!r}, expected {expected}"
            findings.add(shard.file, problem)


def _check_index(source: Checkpoint, pruned: Checkpoint, findings: Findings) -> None:
    name = source.names.index
    if pruned.index_metadata is None:
        if len(pruned.shards) > 1:
            findings.add(name, f"is missing beside {len(pruned.shards)} shards")
        return
    for tensor in pruned.unlisted:
        findings.add(name, f"does not list {tensor}")
    before = source.index_metadata or {}
    said: dict[str, object] = {**before, "total_size": pruned.total_size}
    said |= {key: count(pruned) for key, count in _INDEX_COUNTS.items() if key in before}
    said["total_parameters"] = _parameters(source, pruned)
    for key, value in said.items():
        found = pruned.index_metadata.get(key)
        # Where the source is silent about parameters, the output may be.
        silent = found is None and key == "total_parameters" and key not in before
        if (type(found), found) != (type(value), value) and not silent:
            findings.add(name, f"{key} is {found!r}, expected {value!r}")
    _check_parameters(source, pruned, findings)


def _check_parameters(source: Checkpoint, pruned: Checkpoint, findings: Findings) -> None:
    """The index counts weights, not the words that they are packed into, unless the source's does.

    Found out by the bytes alone, whatever the scheme of the weights is taken for.
    """
    found = (pruned.index_metadata or {}).get("total_parameters")
    said = (source.index_metadata or {}).get("total_parameters")
    if type(found) is not int or said == count_stored_elements(source.tables):
        return
    least, most = parameter_bounds(pruned.tables)
    if not least <= found <= most:
        problem = f"total_parameters is {found:,}, its tensors hold {least:,} to {most:,}"
        findings.add(source.names.index, problem)


def _parameters(source: Checkpoint, pruned: Checkpoint) -> int | None:
    """Counted as the source's index counts them: stored elements, or unpacked weights.

    None where packing hides their number, which the index then does not have.
    """
    said = (source.index_metadata or {}).get("total_parameters")
    if said is not None and said == count_stored_elements(source.tables):
        return count_stored_elements(pruned.tables)
    return count_parameters(pruned.tables, pruned.settings)


def check_side_files(
    source: Checkpoint, pruned: Checkpoint, findings: Findings, rewritten: Collection[str] = ()
) -> None:
    """What belongs to the model beside its weights is there, byte for byte.

    rewritten: files of the source that are no copies in the output, and checked elsewhere.
    """
    there = {file.name: file.nbytes for file in pruned.files}
    carried = carried_files(source, pruned).difference(rewritten)
    with RangeComparer(source, pruned) as sides:
        same = _Sameness(source, pruned, sides)
        for file in source.files:
            name, nbytes = file.name, file.nbytes
            if name not in carried:
                continue
            aside = set_aside(name)
            if aside is not None and there.get(aside) == nbytes and same(file, aside):
                continue  # set aside for a card of the pruned model
            if name in there:
                if there[name] != nbytes:
                    problem = f"has {there[name]:,} bytes, the source's has {nbytes:,}"
                    findings.add(name, problem)
                elif not same(file, name):
                    findings.add(name, "is not the source's, byte for byte")
            elif not any(same(file, moved) for moved in _moved(name, nbytes, there)):
                findings.add(name, "is missing")


class _Sameness:
    """Whether a source file and an output file of its size hold the same bytes.

    Where a remote source stamps its files with digests, the output is compared with these and the
    source not read a second time.
    """

    def __init__(self, source: Checkpoint, pruned: Checkpoint, sides: RangeComparer) -> None:
        self._is_far = source.source.is_remote
        self._pruned = pruned.source
        self._sides = sides

    def __call__(self, file: SourceFile, name: str) -> bool:
        if self._is_far and _SHA256.fullmatch(file.stamp):
            return self._digest(hashlib.sha256(), name, file.nbytes) == file.stamp
        if self._is_far and _GIT_SHA1.fullmatch(file.stamp):
            begun = hashlib.sha1(b"blob %d\0" % file.nbytes, usedforsecurity=False)
            return self._digest(begun, name, file.nbytes) == file.stamp
        return self._sides.same_file(file.name, name, file.nbytes)

    def _digest(self, begun: hashlib._Hash, name: str, nbytes: int) -> str:
        for piece in self._pruned.stream(name, 0, nbytes):
            begun.update(piece)
        return begun.hexdigest()


def carried_files(source: Checkpoint, pruned: Checkpoint) -> set[str]:
    """The files of the source that belong to the pruned model, by the globs it was made with."""
    record = pruned.provenance
    globs = (record.include, record.exclude) if record is not None else ()
    return set(side_files(source, *globs).carried)


def _moved(name: str, nbytes: int, there: dict[str, int]) -> list[str]:
    """Names that a score file of the source can have now: in calibration/, with a number where an
    earlier prune left a file of that name."""
    stem = name.rpartition("/")[2].partition(".")[0]
    return [
        other
        for other, size in there.items()
        if other.startswith(f"{CALIBRATION_FOLDER}{stem}") and size == nbytes
    ]
