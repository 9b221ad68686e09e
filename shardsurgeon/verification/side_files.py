"""What lies beside the weights: every file that was to be copied is there, and nothing stale.

Files that are written anew (config.json, the index, the metadata, quantization lists) have
checks of their own. Files that came later, such as a model card, are nobody's business here.
"""

from __future__ import annotations

import hashlib
import re

from shardsurgeon.checkpoint.cardnames import set_aside
from shardsurgeon.checkpoint.checkpoint import CONFIG_NAME, Checkpoint
from shardsurgeon.checkpoint.provenance import PROVENANCE_NAME
from shardsurgeon.storage.base import SourceFile
from shardsurgeon.storage.formats.index import INDEX_NAME
from shardsurgeon.verification.findings import Findings
from shardsurgeon.verification.settings import QUANTIZATION_FILES
from shardsurgeon.verification.windows import BLOCK_NBYTES, SideBySide

_CALIBRATION = "calibration/"
# Far places that know contents by digest stamp files with it: sha256, or git's own of small ones.
_SHA256 = re.compile(r"[0-9a-f]{64}")
_GIT_SHA1 = re.compile(r"[0-9a-f]{40}")
_REWRITTEN = frozenset({CONFIG_NAME, INDEX_NAME, PROVENANCE_NAME, *QUANTIZATION_FILES})


def check_side_files(source: Checkpoint, pruned: Checkpoint, findings: Findings) -> None:
    """Tokenizer, remote code and whatever else lay beside the weights is there, byte for byte."""
    there = {file.name: file.nbytes for file in pruned.files}
    weights = {shard.file for shard in source.shards} | set(source.unindexed)
    with SideBySide(source, pruned) as sides:
        same = _Sameness(source, pruned, sides)
        for file in source.files:
            name, nbytes = file.name, file.nbytes
            if name in weights or name in _REWRITTEN or _holds_other_weights(name):
                continue
            aside = set_aside(name)
            if aside is not None and there.get(aside) == nbytes and same(file, aside):
                continue  # another card has its name
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

    A far source that stamps its files with digests is believed and not read a second time.
    """

    def __init__(self, source: Checkpoint, pruned: Checkpoint, sides: SideBySide) -> None:
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
        for begin in range(0, nbytes, BLOCK_NBYTES):
            begun.update(self._pruned.read(name, begin, min(begin + BLOCK_NBYTES, nbytes)))
        return begun.hexdigest()


def check_strays(source: Checkpoint, pruned: Checkpoint, findings: Findings) -> None:
    """No weights lie about that are no part of the model: a loader might take them."""
    shards = {shard.file for shard in pruned.shards}
    old_shards = {shard.file for shard in source.shards} | set(source.unindexed)
    copied = {file.name for file in source.files} - old_shards
    for file in pruned.files:
        name = file.name
        if name in shards or name.startswith(_CALIBRATION):
            continue
        if _holds_other_weights(name) or (name.endswith(".safetensors") and name not in copied):
            findings.add(name, "is a weight file that is no part of the model")


def _moved(name: str, nbytes: int, there: dict[str, int]) -> list[str]:
    """Where a score file that lay in the model can be: in calibration/, under its own name or,
    where an earlier prune left one of that name, a numbered one."""
    stem = name.rpartition("/")[2].partition(".")[0]
    return [
        other
        for other, size in there.items()
        if other.startswith(f"{_CALIBRATION}{stem}") and size == nbytes
    ]


def _holds_other_weights(name: str) -> bool:
    """Whether a file holds weights in another format than the shards."""
    return (
        name.startswith("original/")
        or name.rpartition("/")[2].startswith("consolidated")
        or name.endswith((".bin", ".pth", ".gguf", ".bin.index.json"))
    )
