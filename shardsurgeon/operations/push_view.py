"""Push a view: its shards are made of the view's source one by one, sent, and removed again.

Nothing but a few shards is on the disk at a time, in `<view>-push.partial`, from where the same
command goes on after any interruption.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from shardsurgeon.checkpoint.anatomy import read_anatomy
from shardsurgeon.checkpoint.checkpoint import Checkpoint
from shardsurgeon.checkpoint.open import open_model
from shardsurgeon.errors import CheckpointError, ShardSurgeonError
from shardsurgeon.execution.view import plan_shards_of
from shardsurgeon.operations.carry_out import Run, budget_for
from shardsurgeon.operations.places import default_place, require_apart
from shardsurgeon.operations.request import RunOptions
from shardsurgeon.operations.serving import not_for_stock_engines
from shardsurgeon.operations.verify import SelfCheck
from shardsurgeon.operations.written import not_comparable
from shardsurgeon.storage.hub.repository import Repository
from shardsurgeon.storage.hub.upload import Content, HubDestination, Published, Unmade, foresee
from shardsurgeon.storage.view import ViewSource

_ALLOWED = "push what `materialize --allow-nonuniform` makes of it"
_WORK = "{}-push"
# Options that `apply` has, whose executor this is, and `push` has not.
_OF_OTHERS = re.compile(r"(?<![\w-])(-o|--restart|--max-shard-size)\b")


class ViewShipment:
    """A view on its way to a repository."""

    def __init__(
        self,
        pruned: Checkpoint,
        beside: Collection[str],
        edited: Collection[str],
        family: str | None,
        disk_budget: int | None,
    ) -> None:
        """pruned: the view; beside: the files of its folder that are sent with the shards; edited:
        files that are meant to be other ones than `apply` wrote, or are left here on purpose;
        family: as for `plan`; disk_budget: bytes of shards on the disk, None for a few.

        Raises CheckpointError where layers keep different numbers of experts, UsageError where the
        budget is less than one shard, OutputError where the current
        folder is no place to work in, and whatever opening the view's source raises.
        """
        source = pruned.source
        assert isinstance(source, ViewSource)
        _require_one_count(pruned)
        self._view, self._pruned = source, pruned
        self._plan = plan_shards_of(source, beside)
        self._edited, self._family = edited, family
        self._budget = budget_for(self._plan, disk_budget)
        self._work = default_place(source, _WORK.format(source.name))
        require_apart(source, self._work)

    def foresee(self, repository: Repository, files: Mapping[str, Content]) -> Published:
        """What a push would come to; files: what is sent with the shards, by name there."""
        unmade = {
            name: Unmade(shard.nbytes, self._sha256(name, shard.nbytes))
            for name, shard in self._view.shards.items()
        }
        return foresee(repository, {**files, **unmade})

    def _sha256(self, name: str, nbytes: int) -> Callable[[], str]:
        def read() -> str:
            found = hashlib.sha256()
            for piece in self._view.stream(name, 0, nbytes):
                found.update(piece)
            return found.hexdigest()

        return read

    def push(
        self, repository: Repository, rest: Callable[[Path], Mapping[str, Content]], command: str
    ) -> Published:
        """Make, check and send every shard, and then publish it all in one commit; once only.

        rest: given the folder of the other files, what is sent with the shards, by name there;
        command: as the user gave it.
        """
        plan, made = self._plan, []
        del self._plan
        before = open_model(self._view.origin, self._family)
        edited = {*self._edited, *not_comparable(before, self._pruned)}
        check = SelfCheck(
            before, plan, self._work, by_shard=True, edited=edited, beside=self._view.folder
        )

        def destination(check_shard: Callable[[str, Path], None]) -> HubDestination:
            made.append(HubDestination(repository, check_shard, rest))
            return made[0]

        run = Run(plan, self._view.origin, self._work, check)
        try:
            run.carry_out(RunOptions(command=command), destination, self._budget)
        except ShardSurgeonError as error:
            if not _OF_OTHERS.search(error.remedy):
                raise
            remedy = f"remove {self._work}.partial, or run the command in another folder"
            raise type(error)(error.where, error.problem, remedy) from error
        published = made[0].published
        assert published is not None
        return published


def _require_one_count(pruned: Checkpoint) -> None:
    """Raise CheckpointError where layers keep different numbers of experts: nobody has allowed
    shards of such a view yet."""
    record, anatomy = pruned.provenance, read_anatomy(pruned)
    assert record is not None
    kept = {layer: len(found.retained) for layer, found in record.layers.items()}
    if not anatomy.is_uniform(kept):
        error = not_for_stock_engines(pruned, anatomy, kept.values(), "")
        problem = error.problem.removeprefix("is needed: ")
        raise CheckpointError(pruned.location, problem, _ALLOWED)
