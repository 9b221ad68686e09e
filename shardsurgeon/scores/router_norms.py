"""Scores without a calibration: the norm of each expert's row of its router, or random numbers.

MTP layers without scores are scored by their routers, `scores from-router` writes the norms for
every layer, and `scores random` is a baseline to compare other scores with. Only routers are
read, one at a time.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from shardsurgeon.checkpoint.census import MoELayer
from shardsurgeon.checkpoint.checkpoint import Checkpoint
from shardsurgeon.checkpoint.shards import Shard
from shardsurgeon.errors import CheckpointError, FamilyError
from shardsurgeon.storage.formats.dtypes import Array, decode
from shardsurgeon.storage.formats.tensor_table import TensorRecord
from shardsurgeon.storage.phases import phase

# Types whose numbers are what they stand for; others need scales.
_READABLE = ("BF16", "F16", "F32", "F64")


class RouterNorm(StrEnum):
    """The norm of a router row: the sum of magnitudes, or the Euclidean length."""

    L1 = "l1"
    L2 = "l2"


def router_scores(
    checkpoint: Checkpoint, layers: Iterable[MoELayer], norm: RouterNorm = RouterNorm.L2
) -> dict[int, NDArray[np.float64]]:
    """The norm of each expert's row of its router: layer → float64 [num_experts], ascending.

    Score of expert j: ||w_j||, w_j row j of the router [experts, hidden]; L2 is
    sqrt(sum of squares), L1 the sum of magnitudes; in the units of the weights. layers: of this
    checkpoint. Rows behind the experts' own (identity experts) are left out.

    Raises FamilyError where a router is stored in a form that has no norms without its scales,
    CheckpointError where a row holds NaN or infinity, SourceReadError where it cannot be read.
    """
    wanted = {layer.router: layer for layer in layers}
    scores = {}
    with phase("reading routers", len(wanted)) as at:
        for shard in checkpoint.shards:
            for record in shard.header.tensors:
                layer = wanted.get(record.name)
                if layer is not None:
                    rows = _rows(checkpoint, shard, record)[: layer.num_experts]
                    scores[layer.index] = _norms(rows, norm)
                    at.advance()
    return dict(sorted(scores.items()))


def _rows(checkpoint: Checkpoint, shard: Shard, record: TensorRecord) -> Array:
    """A router, float64 [rows, hidden]."""
    if record.dtype not in _READABLE:
        raise FamilyError(
            record.name,
            f"is stored as {record.dtype}, whose rows have no norm by themselves",
            "use scores from a calibration; `apply` has --mtp last and drop for MTP layers",
        )
    begin = shard.header.data_begin
    raw = checkpoint.source.read(shard.file, begin + record.begin, begin + record.end)
    rows = decode(record.dtype, raw).reshape(record.shape)
    finite = np.isfinite(rows).all(axis=1)
    if not finite.all():
        problem = f"row {int(np.argmin(finite))} holds NaN or infinity"
        raise CheckpointError(record.name, problem, "fetch the shard again")
    return rows


def _norms(rows: Array, norm: RouterNorm) -> NDArray[np.float64]:
    if norm is RouterNorm.L1:
        return np.asarray(np.abs(rows).sum(axis=1))
    return np.asarray(np.sqrt((rows * rows).sum(axis=1)))


def random_scores(seed: int, layer: int, count: int) -> NDArray[np.float64]:
    """Scores of one layer, float64 [count], 0 <= score < 1: the same on every machine.

    seed: 0 or more; layer: its number, so that every layer has numbers of its own.
    """
    # numpy promises that a bit generator's stream never changes, and does not for a Generator's.
    words = np.random.PCG64(np.random.SeedSequence([seed, layer])).random_raw(count)
    # The upper 53 bits, as many as a float64 holds.
    return np.asarray((words >> np.uint64(11)).astype(np.float64) * 2.0**-53)
