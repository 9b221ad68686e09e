"""A model and a plan as the pruned model that they stand for, in memory: nothing is written.

What `apply --view` would write is made here, and read again as a view is.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from shardsurgeon.checkpoint.anatomy import read_anatomy
from shardsurgeon.checkpoint.checkpoint import Checkpoint
from shardsurgeon.checkpoint.files import QUANTIZATION_FILES
from shardsurgeon.checkpoint.open import open_model
from shardsurgeon.execution.view import view_manifest
from shardsurgeon.pruning.decide import decide
from shardsurgeon.pruning.keep_lists import KeepList
from shardsurgeon.pruning.output_files import assemble
from shardsurgeon.pruning.planner import SizeEstimate, checked_shards
from shardsurgeon.pruning.request import SelectionRequest
from shardsurgeon.storage.formats.view import DATA_NAME, VIEW_NAME, ViewShard, read_manifest
from shardsurgeon.storage.source import Source
from shardsurgeon.storage.view import ViewSource


@dataclass(frozen=True)
class Planned:
    """A pruned model that exists as a plan alone.

    checkpoint: the model that is pruned; keep: which of its experts stay; shards: what the result's
    shards are made of; origin: where those bytes lie; data: values that no source has; config: the
    result's config.json; quantization_files: name → content of files such as hf_quant_config.json,
    with the experts that they name renumbered.
    """

    checkpoint: Checkpoint
    keep: KeepList
    shards: tuple[ViewShard, ...] = field(repr=False)
    origin: Source
    data: bytes = field(repr=False)
    config: bytes = field(repr=False)
    quantization_files: Mapping[str, bytes] = field(repr=False)


def open_planned(
    model: str | os.PathLike[str],
    plan_file: str | os.PathLike[str],
    *,
    family: str | None = None,
) -> Planned:
    """The result of a plan, as a plan.json or another keep-list file says it.

    model: a folder or an address; family: as `shardsurgeon.plan` takes it. Layers may keep
    different numbers. Raises InputError and its children where the two do not fit.
    """
    checkpoint = open_model(model, family)
    request = SelectionRequest(plan_file=plan_file, allow_nonuniform=True)
    anatomy = read_anatomy(checkpoint)
    estimate = SizeEstimate(checkpoint, anatomy, mtp=request.mtp)
    decision = decide(checkpoint, anatomy, None, request, estimate.nbytes)
    keep = decision.keep
    shards = checked_shards(checkpoint, anatomy, keep, drop_mtp=decision.drop_mtp)
    plan = assemble(checkpoint, anatomy, request, decision, shards, {}, None)
    files = dict(plan.generated_files)
    source = checkpoint.source
    made = view_manifest(plan, source, source.location)
    return Planned(
        checkpoint=checkpoint,
        keep=keep,
        shards=read_manifest(made[VIEW_NAME], f"{checkpoint.location}/{VIEW_NAME}").shards,
        origin=source.origin if isinstance(source, ViewSource) else source,
        data=made.get(DATA_NAME, b""),
        config=files[checkpoint.names.config],
        quantization_files={name: files[name] for name in QUANTIZATION_FILES if name in files},
    )
