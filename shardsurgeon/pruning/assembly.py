"""A decided prune as one SurgeryPlan: the shards, what goes beside them, and two fingerprints.

Last step of planning. The fingerprints say whose work an unfinished output is: one of what was
asked for, one of the source's state.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from shardsurgeon import __version__
from shardsurgeon.checkpoint.anatomy import Anatomy
from shardsurgeon.checkpoint.checkpoint import CONFIG_NAME, Checkpoint
from shardsurgeon.checkpoint.provenance import Step
from shardsurgeon.execution.surgeryplan import OutputShard, SurgeryPlan
from shardsurgeon.pruning.counts import SelectionRequest
from shardsurgeon.pruning.decision import Decision
from shardsurgeon.pruning.finishing import documents, side_files
from shardsurgeon.pruning.lineage import compose, step_of
from shardsurgeon.storage.base import SourceFile
from shardsurgeon.storage.origins import identity_of


def assemble(
    checkpoint: Checkpoint,
    anatomy: Anatomy,
    request: SelectionRequest,
    decision: Decision,
    shards: tuple[OutputShard, ...],
    given: Sequence[Path],
    max_shard_nbytes: int | None,
) -> SurgeryPlan:
    """The whole plan.

    given: the score or keep-list file of this run; max_shard_nbytes: what the shards were cut
    by. Raises what the documents raise: ConfigError, HeaderError, SourceReadError.
    """
    step = step_of(request, decision.keep, decision.metric, identity_of(checkpoint))
    provenance = compose(
        checkpoint.provenance, decision.keep, step, anatomy.n_group, decision.policies
    )
    copied, extra = side_files(checkpoint, given)
    papers = documents(checkpoint, anatomy, decision, shards, provenance)
    return SurgeryPlan(
        shards=shards,
        documents=papers,
        side_files=copied,
        extra_files=extra,
        source_files=_source_files(checkpoint, shards, copied),
        request_fingerprint=_request_fingerprint(decision, max_shard_nbytes, step, extra),
        source_fingerprint=_source_fingerprint(checkpoint),
    )


def _source_files(
    checkpoint: Checkpoint, shards: tuple[OutputShard, ...], copied: tuple[str, ...]
) -> tuple[SourceFile, ...]:
    """Every source file whose bytes end up in the result."""
    read = {shard.file for shard in checkpoint.shards} | set(copied) | {CONFIG_NAME}
    return tuple(file for file in checkpoint.files if file.name in read)


def _request_fingerprint(
    decision: Decision, max_shard_nbytes: int | None, step: Step, extra: Sequence[tuple[str, str]]
) -> str:
    """What was asked for, apart from the source's state: a run may only go on with the same."""
    asked = {
        "version": __version__,
        # The source is a matter of the other fingerprint.
        "step": {**asdict(step), "source": None},
        "retained": {n: layer.retained for n, layer in decision.keep.layers.items()},
        "drop_mtp": decision.drop_mtp,
        "max_shard_nbytes": max_shard_nbytes,
        "extra": [
            (name, hashlib.sha256(Path(path).read_bytes()).hexdigest()) for name, path in extra
        ],
    }
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


def _source_fingerprint(checkpoint: Checkpoint) -> str:
    files = [(file.name, file.nbytes, file.stamp) for file in checkpoint.files]
    headers = [shard.header_sha256 for shard in checkpoint.shards]
    return hashlib.sha256(json.dumps([files, headers]).encode()).hexdigest()
