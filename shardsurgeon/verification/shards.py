"""Shards proven one by one, each while it is on the disk: for results that never are there whole.

Says of a shard what `proof` says of a folder: its header is the one that the whole was judged
by, and a sample of its bytes is the source's.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from shardsurgeon.checkpoint.anatomy import read_anatomy
from shardsurgeon.checkpoint.checkpoint import Checkpoint, open_checkpoint
from shardsurgeon.storage.durable import reading
from shardsurgeon.verification.comparison import Compared, Sampling, compare_bytes
from shardsurgeon.verification.findings import Findings
from shardsurgeon.verification.lineage import read_keeps
from shardsurgeon.verification.outline import Outline
from shardsurgeon.verification.pairing import pair_tensors


class ShardProof:
    """Proves the shards of one pruned model. For one thread at a time."""

    def __init__(self, source: Checkpoint, pruned: Outline, sampling: Sampling) -> None:
        """pruned: what every shard is to look like, and the metadata that says what was kept.

        Raises CheckpointError where that is no model. What does not fit the source is found
        when the shard concerned is checked, or by the proof of the whole.
        """
        self._source = source
        self._outline = pruned
        self._pruned = open_checkpoint(pruned)
        self._sampling = sampling
        anatomy, ignored = read_anatomy(source), Findings()
        keeps = read_keeps(source, anatomy, self._pruned, ignored)
        pairing = keeps and pair_tensors(source, anatomy, self._pruned, keeps, ignored)
        self._pairs = pairing.pairs if pairing else {}
        self.compared = Compared(0, 0)

    def differences(self, name: str, path: Path) -> tuple[str, ...]:
        """What is wrong with a shard, its name in the model and its place on the disk given.

        Raises SourceReadError where it or the source cannot be read.
        """
        findings = Findings()
        heading = self._outline.heading(name)
        with reading(path), path.open("rb") as file:
            begins = file.read(len(heading.header))
            nbytes = file.seek(0, 2)
        if nbytes != heading.nbytes:
            findings.add(name, f"has {nbytes:,} bytes, expected {heading.nbytes:,}")
        elif begins != heading.header:
            findings.add(name, "does not begin with the header that was planned")
        elif not self._pairs.get(name):
            findings.add(name, "holds no tensor that the source accounts for")
        else:
            self._compare(name, path, findings)
        return findings.lines()

    def _compare(self, name: str, path: Path, findings: Findings) -> None:
        at_hand = replace(self._pruned, source=self._outline.with_shard(name, path))
        pairs = {name: self._pairs[name]}
        found = compare_bytes(self._source, at_hand, pairs, self._sampling, 1, None, findings)
        so_far = self.compared
        self.compared = Compared(so_far.tensors + found.tensors, so_far.nbytes + found.nbytes)
