"""`verify`, and what `apply` checks of its own result before it gives it its name.

The result is checked as a whole folder, or shard by shard where shards do not stay on the disk.
`apply` checks the structure of everything and a few tensors' bytes of every shard; `verify`
compares them all.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from shardsurgeon.checkpoint.checkpoint import Checkpoint, open_checkpoint
from shardsurgeon.checkpoint.open import open_model, require_finished
from shardsurgeon.errors import InputError, SourceChangedError, UsageError, VerificationError
from shardsurgeon.execution.plan import Plan
from shardsurgeon.storage.local import LocalSource
from shardsurgeon.storage.open import address_of, open_source
from shardsurgeon.storage.phases import phase
from shardsurgeon.storage.source import MemorySource, Source, SourceFile, require_unchanged
from shardsurgeon.storage.view import ViewSource, is_view
from shardsurgeon.verification.architecture import AnyCheckpoint, check_architecture
from shardsurgeon.verification.byte_comparison import Sampling
from shardsurgeon.verification.findings import VerifyReport
from shardsurgeon.verification.streamed import HeadersOnlySource, ShardHeader, ShardVerifier
from shardsurgeon.verification.verify import verify_checkpoint

SAMPLED_TENSORS = 8
SAMPLED_NBYTES = 1 << 20
# The share of the result's bytes that a remote source may have to send again for the check.
FAR_SHARE = 0.0025
# Bytes that are compared of a tensor at least: fewer would cost the same request.
_LEAST_NBYTES = 512


def verify(
    source: str | os.PathLike[str],
    pruned: str | os.PathLike[str],
    *,
    sample: int | None = None,
    architecture: bool = False,
    progress: Callable[[int, int], None] | None = None,
    family: str | None = None,
    follow_links: bool = False,
) -> VerifyReport:
    """Compare a pruned model, a folder or a repository, with its source.

    sample: tensors per shard whose bytes are compared, None for all; architecture: check as
    well that transformers' model of the pruned config takes exactly these tensors; follow_links: as
    for `plan`, on both sides. Raises UsageError, before any weight is read, where that cannot be
    checked.
    """
    before = open_model(source, family, follow_links=follow_links)
    remote = isinstance(pruned, str) and not os.path.lexists(pruned)
    # A view that cannot be opened is bad input: there is no result yet that could differ.
    as_source = remote or is_view(pruned) or (follow_links and os.path.isdir(pruned))
    place = open_source(pruned, follow_links=follow_links) if as_source else pruned
    after: AnyCheckpoint = place
    _require_in_order(before, place)
    fits = None
    if architecture:
        # What cannot be opened is a difference, which both checks find by themselves.
        with suppress(InputError):
            after = open_checkpoint(place, before.family)
        with phase("building the model of transformers"):
            fits = check_architecture(before, after)
    report = verify_checkpoint(before, after, sample=sample, on_progress=progress)
    if not report.holds:
        try:
            require_unchanged(before.source, _compared(before))
        except SourceChangedError as error:
            remedy = "verify again once nothing writes to it"
            raise SourceChangedError(error.where, error.problem, remedy) from error
    return replace(report, architecture=fits)


def _require_in_order(before: Checkpoint, pruned: str | os.PathLike[str] | Source) -> None:
    """Raise UsageError where both are one model or prune, or the first was made of the second."""
    if isinstance(pruned, Source):
        location = pruned.location
        same = location == before.location
    else:
        require_finished(pruned)
        location = os.fspath(pruned)
        home = before.source.local_path(before.names.config)
        same = home is not None and os.path.realpath(home.parent) == os.path.realpath(pruned)
    if same:
        raise UsageError(location, "is SOURCE itself", "give what `apply` wrote as PRUNED")
    if before.provenance is None:
        return
    after = None
    with suppress(InputError):
        after = open_checkpoint(pruned)
    if after is None:
        return
    if _is_same_prune(before, after):
        problem = f"is the same prune as {before.location}"
        raise UsageError(location, problem, _name_origin(before.source, after.source))
    if after.config_sha256 in (step.source.config_sha256 for step in before.provenance.steps):
        problem = f"was made of {location}: SOURCE and PRUNED are swapped"
        raise UsageError(before.location, problem, f"name {location} first")


def _is_same_prune(one: Checkpoint, other: Checkpoint) -> bool:
    """Whether two models keep the same experts by the same steps, as a view and its folder do."""
    left, right = one.provenance, other.provenance
    return (
        left is not None
        and right is not None
        and (left.steps, left.layers) == (right.steps, right.layers)
    )


def _name_origin(*sources: Source) -> str:
    """What to compare two places of one prune with; a view of it knows."""
    origins = (each.origin for each in sources if isinstance(each, ViewSource))
    known = next((f", {address_of(origin)}" for origin in origins), "")
    return f"compare it with the model that both are made of{known}"


def _compared(checkpoint: Checkpoint) -> list[SourceFile]:
    """The files of a source that a comparison reads, and not a log that goes on growing there."""
    named = {shard.file for shard in checkpoint.shards} | checkpoint.rewritten
    return [file for file in checkpoint.files if file.name in named]


class SelfCheck:
    """The check of one run's result; `report` says what was compared."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: Plan,
        out: Path,
        *,
        by_shard: bool = False,
        view: bool = False,
        edited: Collection[str] = (),
        beside: Source | None = None,
    ) -> None:
        """checkpoint: the source; plan: what is made of it; out: its name in
        reports; by_shard: whether each shard is checked alone, because it will be gone when the
        rest is there; otherwise no reference to the plan is kept; view: whether it is a view;
        edited: files beside the shards that are meant to differ; beside: has the files beside the
        shards, None where the plan generates those that a check needs."""
        self._checkpoint = checkpoint
        self._sampling = _sampling(checkpoint, plan)
        self._planned = plan if by_shard else None
        self._out, self._view = out, view
        self._edited, self._beside = edited, beside
        self.report: VerifyReport | None = None

    def whole(self, folder: Path) -> None:
        """Check a folder that holds everything. Raises VerificationError."""
        sampling = self._sampling
        result = ViewSource(LocalSource(folder), at=self._out) if self._view else folder
        self._take(
            verify_checkpoint(
                self._checkpoint,
                result,
                sample=sampling.tensors,
                sample_nbytes=sampling.nbytes,
                edited=self._edited,
            )
        )

    def shard(self, name: str, path: Path) -> None:
        """Check one shard. Raises VerificationError."""
        if found := self._shards.differences(name, path):
            raise _differs(str(path), found)

    def rest(self, folder: Path) -> None:
        """Check the result as a whole, after each of its shards, by the shards' planned headers.

        folder: has the other files. Raises VerificationError.
        """
        rest = headers_only(self._plan, LocalSource(folder), self._out)
        report = verify_checkpoint(self._checkpoint, rest, sample=0, edited=self._edited)
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
            raise _differs(report.pruned, report.differences)

    @property
    def _plan(self) -> Plan:
        assert self._planned is not None, "a check of a whole folder knows no plan"
        return self._planned

    @cached_property
    def _shards(self) -> ShardVerifier:
        beside = self._beside or MemorySource(dict(self._plan.generated_files))
        planned = headers_only(self._plan, beside, self._out)
        return ShardVerifier(self._checkpoint, planned, self._sampling)


def _sampling(checkpoint: Checkpoint, plan: Plan) -> Sampling:
    if not checkpoint.source.is_remote:
        return Sampling(SAMPLED_TENSORS, SAMPLED_NBYTES)
    share = int(FAR_SHARE * sum(shard.nbytes for shard in plan.shards))
    each = share // (len(plan.shards) * SAMPLED_TENSORS)
    return Sampling(SAMPLED_TENSORS, max(min(each, SAMPLED_NBYTES), _LEAST_NBYTES))


def headers_only(plan: Plan, rest: Source, out: Path) -> HeadersOnlySource:
    """The result as a source of planned headers and real small files; rest: has those files."""
    headers = {shard.file: ShardHeader(shard.header, shard.nbytes) for shard in plan.shards}
    return HeadersOnlySource(headers, rest, str(out))


def _differs(where: str, differences: tuple[str, ...]) -> VerificationError:
    more = len(differences) - 1
    also = f" (and {more} more)" if more else ""
    problem = f"differs from what it was made of: {differences[0]}{also}"
    remedy = "let nothing write to the source, not even by a memory map, and run it again with "
    return VerificationError(where, problem, f"{remedy}--restart; what comes back is a bug")
