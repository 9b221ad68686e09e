"""A model and a plan as the pruned model that they stand for, in memory: nothing is written.

What `apply --view` would write is made here, and read again as a view is.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from shardsurgeon.checkpoint.anatomy import read_anatomy
from shardsurgeon.checkpoint.checkpoint import Checkpoint
from shardsurgeon.checkpoint.open import open_model
from shardsurgeon.execution.view import view_manifest
from shardsurgeon.pruning.decide import decide
from shardsurgeon.pruning.keep_lists import KeepList
from shardsurgeon.pruning.output_files import assemble
from shardsurgeon.pruning.planner import SizeEstimate, checked_shards
from shardsurgeon.pruning.request import MtpPolicy, SelectionRequest
from shardsurgeon.storage.formats.view import DATA_NAME, VIEW_NAME, ViewShard, read_manifest
from shardsurgeon.storage.source import Source
from shardsurgeon.storage.view import ViewSource


@dataclass(frozen=True)
class Planned:
    """A pruned model that exists as a plan alone.

    checkpoint: the model that is pruned; keep: which of its experts stay; shards: what the result's
    shards are made of; origin: where those bytes lie; data: values that no source has; generated:
    name → content of the files that are made anew, config.json among them.
    """

    checkpoint: Checkpoint
    keep: KeepList
    shards: tuple[ViewShard, ...] = field(repr=False)
    origin: Source
    data: bytes = field(repr=False)
    generated: Mapping[str, bytes] = field(repr=False)

    @property
    def config(self) -> bytes:
        """The result's config.json."""
        return self.generated[self.checkpoint.names.config]


def open_planned(
    model: str | os.PathLike[str],
    plan_file: str | os.PathLike[str],
    *,
    family: str | None = None,
    mtp: MtpPolicy = MtpPolicy.ROUTER_NORM,
) -> Planned:
    """The result of a plan, as a plan.json or another keep-list file says it.

    model: a folder or an address; family, mtp: as `shardsurgeon.plan` takes them. Layers may keep
    different numbers. Raises InputError and its children where the two do not fit.
    """
    checkpoint = open_model(model, family)
    request = SelectionRequest(plan_file=plan_file, mtp=mtp, allow_nonuniform=True)
    anatomy = read_anatomy(checkpoint)
    estimate = SizeEstimate(checkpoint, anatomy, mtp=request.mtp)
    decision = decide(checkpoint, anatomy, None, request, estimate.nbytes)
    keep = decision.keep
    shards = checked_shards(checkpoint, anatomy, keep, drop_mtp=decision.drop_mtp)
    plan = assemble(checkpoint, anatomy, request, decision, shards, {}, None)
    source = checkpoint.source
    made = view_manifest(plan, source, source.location)
    return Planned(
        checkpoint=checkpoint,
        keep=keep,
        shards=read_manifest(made[VIEW_NAME], f"{checkpoint.location}/{VIEW_NAME}").shards,
        origin=source.origin if isinstance(source, ViewSource) else source,
        data=made.get(DATA_NAME, b""),
        generated=dict(plan.generated_files),
    )
