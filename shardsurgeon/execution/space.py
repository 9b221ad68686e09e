"""The disk that a run needs: what it will write, without what it shares with its source."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from shardsurgeon.errors import OutputWriteError, ShardSurgeonError
from shardsurgeon.execution.plan import Plan, Segment
from shardsurgeon.execution.ranges import CopyRange, copy_ranges, shared_nbytes
from shardsurgeon.execution.shards import ResumeState
from shardsurgeon.execution.workdir import WorkDir
from shardsurgeon.storage.source import Source
from shardsurgeon.units import format_size


@dataclass(frozen=True, slots=True)
class Space:
    """Bytes of disk: that a run still needs, and that are free for it."""

    needed: int
    free: int


def require_space(space: Space, out: Path) -> None:
    """Raise OutputWriteError where a run to `out` would not fit its disk."""
    if space.needed > space.free:
        raise OutputWriteError(
            out,
            f"the disk is too small: {format_size(space.needed)} ({space.needed:,} bytes) are "
            f"needed, {format_size(space.free)} ({space.free:,} bytes) are free",
            "free some space or choose another -o",
        )


def sharable_files(plan: Plan, source: Source, workdir: WorkDir) -> frozenset[str]:
    """The files of the source whose blocks can be shared with what is written; found by trying."""
    found: set[str] = set()
    for file in plan.source_files:
        # What cannot be opened is told where it is read, if it is.
        with suppress(ShardSurgeonError):
            if (opened := source.open(file.name)) is not None:
                with opened:
                    found |= {file.name} if workdir.sharing.works_for(opened) else set()
    return frozenset(found)


def needed_nbytes(
    plan: Plan,
    sizes: dict[str, int],
    found: ResumeState,
    sharable: frozenset[str],
    budget: int | None,
) -> int:
    """Bytes of disk still needed. Shards written in part count whole: their disk is counted free.

    sizes: of every output file; sharable: as `sharable_files` has it; budget: bytes of shards that
    may be here at a time on their way to a destination, None where all stay.
    """
    whole = sum(found.whole.values())
    left = sum(sizes.values()) - whole - sum(found.sent.values())
    left -= _shared(plan, sizes, found, sharable) if sharable else 0
    return left if budget is None else min(left, budget - whole)


def _shared(plan: Plan, sizes: dict[str, int], found: ResumeState, sharable: frozenset[str]) -> int:
    """Bytes still to be written that take no disk: their blocks are the source's."""
    whole = ([CopyRange(Segment(name, 0, sizes[name]), 0)] for name in plan.copied_files)
    shards = (copy_ranges(shard) for shard in found.unfinished(plan.shards))
    return sum(shared_nbytes(ranges, sharable) for ranges in chain(whole, shards))
