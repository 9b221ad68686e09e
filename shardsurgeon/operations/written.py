"""A folder that `apply` wrote: whether it is all there, and as it was written.

Asked before it is pushed, and before shards are made of a view. A folder that has changed since is
refused, unless the change is said to be meant.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from shardsurgeon.checkpoint.anatomy import read_anatomy
from shardsurgeon.checkpoint.checkpoint import Checkpoint
from shardsurgeon.checkpoint.files import CARD_NAME
from shardsurgeon.checkpoint.layer_consistency import require_complete
from shardsurgeon.checkpoint.open import open_model, require_finished, unfinished
from shardsurgeon.checkpoint.provenance import PROVENANCE_NAME, Provenance
from shardsurgeon.checkpoint.recorded_files import deviations
from shardsurgeon.checkpoint.side_files import matches
from shardsurgeon.errors import CheckpointError
from shardsurgeon.pruning.lineage import check_lineage
from shardsurgeon.storage.files import JOURNAL_NAME
from shardsurgeon.storage.local import LocalSource

_PUSHED_AS_IT_IS = (
    "restore it, or say that it is meant: --include NAME pushes a changed or added file as it is, "
    "--exclude NAME goes without one"
)
# Weights beside the model's own.
_WEIGHTS = re.compile(r"[^/]+\.safetensors", re.IGNORECASE)
# Of files that are not as they were written.
_MOST_TOLD = 5


def complete_prune(
    folder: Path, family: str | None, follow_links: bool
) -> tuple[Checkpoint, Provenance]:
    """Open a folder that `apply` wrote. Raises CheckpointError and its children for another one."""
    if not os.path.isdir(folder):
        raise CheckpointError(folder, "is not a folder", "give the folder that apply wrote")
    _require_finished(folder)
    checkpoint = open_model(folder, family, follow_links=follow_links)
    record = checkpoint.provenance
    if record is None:
        problem = f"was not pruned by shardsurgeon, which leaves its {PROVENANCE_NAME} there"
        raise CheckpointError(folder, problem, "`hf upload` pushes any folder")
    anatomy = read_anatomy(checkpoint)
    check_lineage(record, anatomy.experts_per_layer)
    require_complete(anatomy.incomplete, None, checkpoint.location)
    return checkpoint, record


def not_comparable(before: Checkpoint, pruned: Checkpoint) -> frozenset[str]:
    """Files beside the weights that a model may rightly have other ones of than the one whose bytes
    it has: where there was a model between the two, its files were carried along."""
    earlier = len(before.provenance.steps) if before.provenance is not None else 0
    steps = len(pruned.provenance.steps) if pruned.provenance is not None else 0
    if steps <= earlier + 1:
        return frozenset()
    weights = {shard.file for shard in before.shards}
    return frozenset(file.name for file in before.files) - before.rewritten - weights


def _require_finished(folder: Path) -> None:
    """Raise CheckpointError where the folder, that above or a folder in it is unfinished work."""
    require_finished(folder)
    within = (folder / file.name for file in LocalSource(folder).list())
    for path in (path for path in within if path.name == JOURNAL_NAME):
        raise unfinished(path.parent)


def require_as_written(
    pruned: Checkpoint, meant: Sequence[str] = (), remedy: str = _PUSHED_AS_IT_IS
) -> tuple[str, ...]:
    """The names of the files that are meant to differ from what `apply` wrote, and do.

    meant: globs of files that were changed, added or removed on purpose; the card may always be.
    Raises CheckpointError, with the remedy, for any other one that is not as it was written.
    """
    record = pruned.provenance
    if record is None:
        return ()
    differ = {each.name: each.problem for each in deviations(pruned, shards=True)}
    for file in pruned.files if record.files is not None else ():
        if file.name not in (record.files or ()) and _WEIGHTS.fullmatch(file.name):
            differ[file.name] = "is a weight file that apply did not write"
    changed = tuple(name for name in differ if matches(name, [*meant, CARD_NAME]))
    differ = {name: problem for name, problem in differ.items() if name not in changed}
    if differ:
        told = "; ".join(f"{name} {problem}" for name, problem in [*differ.items()][:_MOST_TOLD])
        more = f"; and {len(differ) - _MOST_TOLD} more" if len(differ) > _MOST_TOLD else ""
        problem = f"is not as apply wrote it: {told}{more}"
        raise CheckpointError(pruned.location, problem, remedy)
    return changed
