"""A plan on its way to the executor, and the check of what comes of it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from shardsurgeon.execution.outputs import output_sizes
from shardsurgeon.execution.plan import Plan
from shardsurgeon.execution.run import ExecutionReport, execute, require_budget
from shardsurgeon.execution.upload import ShardDestination
from shardsurgeon.operations.request import RunOptions
from shardsurgeon.operations.verify import SelfCheck
from shardsurgeon.storage.source import Source

# Makes the destination of a run's shards, given the check that each of its shards has to pass.
DestinationMaker = Callable[[Callable[[str, Path], None]], ShardDestination]

# The budget where none is given, in shards of the largest size: `--disk-budget` documents it.
_FEW_SHARDS = 4


class Run:
    """A plan that is carried out once.

    Half a trillion parameters take 40 MB to plan. Once `carry_out` has given the plan to the
    executor nothing here holds it, nor does a caller who let go of it: the check of the result then
    has that memory.
    """

    def __init__(self, plan: Plan, source: Source, out: Path, check: SelfCheck | None) -> None:
        """source: what the plan reads; out: where the result goes; check: None for no check."""
        self._plan: Plan | None = plan
        self._source, self._out, self._check = source, out, check

    def carry_out(
        self,
        options: RunOptions,
        shard_destination: DestinationMaker | None = None,
        disk_budget: int | None = None,
    ) -> ExecutionReport:
        """Execute the plan and check the result; once only.

        shard_destination: where the result goes instead of a folder; disk_budget: bytes of shards
        that may be here at a time on their way there.
        """
        check, to = self._check, shard_destination
        taken = to(unchecked if check is None else check.shard) if to else None
        before_delivery = None
        if check is not None:
            before_delivery = check.whole if taken is None else check.rest
        try:
            return execute(
                self._hand_over(options.checksums),
                self._source,
                self._out,
                workers=options.workers,
                restart=options.restart,
                on_progress=options.progress,
                before_delivery=before_delivery,
                destination=taken,
                disk_budget=disk_budget,
                command=options.command,
            )
        except BaseException as stop:
            # A signal in the last moment: the result is there, and there is nothing to resume.
            if os.path.lexists(self._out):
                stop.add_note(complete(str(self._out)))
            raise

    def _hand_over(self, checksums: bool) -> Plan:
        """The plan, of which no reference is kept. checksums: whether to record those of shards."""
        plan, self._plan = self._plan, None
        assert plan is not None, "a run is carried out once"
        return replace(plan, checksums=checksums)


def budget_for(plan: Plan, disk_budget: int | None) -> int:
    """Bytes of shards that may be on the disk on their way elsewhere; disk_budget: what was asked
    for, None for a few of the largest. Raises UsageError where one alone takes more."""
    sizes = output_sizes(plan)
    budget = disk_budget or _FEW_SHARDS * max(sizes.values())
    require_budget(budget, sizes)
    return budget


def complete(out: str) -> str:
    """The note of an interrupted command whose result is already written."""
    return f"{out} is complete"


def unchecked(name: str, path: Path) -> None:
    """The check of a shard with --no-verify: none."""
