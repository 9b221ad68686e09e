"""What `apply` proves of its own result before it lets go of it.

Introduces a plan to the verification room: a folder that is whole, or shard after shard where
shards leave the disk. Everything's structure is checked, and of every shard a few tensors' bytes;
`verify` compares them all.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from pathlib import Path

from shardsurgeon.checkpoint.checkpoint import Checkpoint
from shardsurgeon.errors import VerificationError
from shardsurgeon.execution.surgeryplan import SurgeryPlan
from shardsurgeon.operations.reports import VerifyReport
from shardsurgeon.storage.base import Source
from shardsurgeon.storage.local import LocalSource
from shardsurgeon.storage.memory import MemorySource
from shardsurgeon.verification.comparison import Sampling
from shardsurgeon.verification.outline import Heading, Outline
from shardsurgeon.verification.proof import verify_checkpoint
from shardsurgeon.verification.shards import ShardProof

SAMPLED_TENSORS = 8
SAMPLED_NBYTES = 1 << 20
# Of what a far source has to send for the result, so much may be sent once more for the proof.
FAR_SHARE = 0.0025
# And so much at least of a tensor, which costs a request in any case.
_LEAST_NBYTES = 512


class SelfCheck:
    """The proof of one run's result; `report` says what was compared."""

    def __init__(
        self, checkpoint: Checkpoint, surgery: SurgeryPlan, out: Path, *, by_shard: bool
    ) -> None:
        """checkpoint: the source; surgery: what is made of it; out: what reports call it;
        by_shard: whether the shards will be gone when the rest is there, so that each is checked
        alone; else the plan is not held on to."""
        self._checkpoint = checkpoint
        self._sampling = _sampling(checkpoint, surgery)
        self._planned = surgery if by_shard else None
        self._out = out
        self.report: VerifyReport | None = None

    def whole(self, folder: Path) -> None:
        """Check a folder that holds everything. Raises VerificationError."""
        sampling = self._sampling
        self._take(
            verify_checkpoint(
                self._checkpoint, folder, sample=sampling.tensors, sample_nbytes=sampling.nbytes
            )
        )

    def shard(self, name: str, path: Path) -> None:
        """Check one shard. Raises VerificationError."""
        if found := self._shards.differences(name, path):
            raise _does_not_hold(str(path), found)

    def rest(self, folder: Path) -> None:
        """Check what the shards, of which each was checked, are together with the other files.

        folder: holds those. Raises VerificationError.
        """
        report = verify_checkpoint(
            self._checkpoint, outline(self._surgery, LocalSource(folder), self._out), sample=0
        )
        seen = self._shards.compared
        self._take(
            replace(
                report,
                sampled=SAMPLED_TENSORS,
                tensors_compared=seen.tensors,
                bytes_compared=seen.nbytes,
            )
        )

    def _take(self, report: VerifyReport) -> None:
        # The result is checked under a working name, just before it gets its own.
        self.report = replace(report, pruned=str(self._out))
        if not report.holds:
            raise _does_not_hold(report.pruned, report.differences)

    @property
    def _surgery(self) -> SurgeryPlan:
        assert self._planned is not None, "a check of a whole folder knows no plan"
        return self._planned

    @cached_property
    def _shards(self) -> ShardProof:
        documents = MemorySource(dict(self._surgery.documents))
        planned = outline(self._surgery, documents, self._out)
        return ShardProof(self._checkpoint, planned, self._sampling)


def _sampling(checkpoint: Checkpoint, surgery: SurgeryPlan) -> Sampling:
    if not checkpoint.source.is_remote:
        return Sampling(SAMPLED_TENSORS, SAMPLED_NBYTES)
    share = int(FAR_SHARE * sum(shard.nbytes for shard in surgery.shards))
    each = share // (len(surgery.shards) * SAMPLED_TENSORS)
    return Sampling(SAMPLED_TENSORS, max(min(each, SAMPLED_NBYTES), _LEAST_NBYTES))


def outline(surgery: SurgeryPlan, rest: Source, out: Path) -> Outline:
    """The result as its headers and its other files tell it; rest: has those files."""
    headings = {shard.file: Heading(shard.header, shard.nbytes) for shard in surgery.shards}
    return Outline(headings, rest, str(out))


def _does_not_hold(where: str, differences: tuple[str, ...]) -> VerificationError:
    more = len(differences) - 1
    also = f" (and {more} more)" if more else ""
    problem = f"does not hold: {differences[0]}{also}"
    return VerificationError(where, problem, "report this as a bug")
