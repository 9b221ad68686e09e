"""Baselines: how large each expert's row of its router is, and scores at random.

The router's rows need no calibration. MTP layers without saliency are scored by them, and
`shardsurgeon scores from-router` writes them for every layer. Only routers are read, one at a
time.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from shardsurgeon.checkpoint.anatomy import MoELayer
from shardsurgeon.checkpoint.checkpoint import Checkpoint, Shard
from shardsurgeon.errors import CheckpointError, FamilyError
from shardsurgeon.storage.formats.dtypes import Array, decode
from shardsurgeon.storage.formats.safetensors import TensorRecord

_READABLE = ("BF16", "F16", "F32", "F64")


class RouterNorm(StrEnum):
    """The norm of a router row: the sum of magnitudes, or the Euclidean length."""

    L1 = "l1"
    L2 = "l2"


def router_scores(
    checkpoint: Checkpoint, layers: Iterable[MoELayer], norm: RouterNorm = RouterNorm.L2
) -> dict[int, NDArray[np.float64]]:
    """The norm of each expert's row of its router: layer → float64 [num_experts], ascending.

    Rows behind the experts' own (identity experts) are left out. Raises FamilyError where a
    router is stored in a form that has no norms without its scales, CheckpointError where a
    row holds NaN or infinity.
    """
    wanted = {layer.router: layer for layer in layers}
    scores = {}
    for shard in checkpoint.shards:
        for record in shard.header.tensors:
            layer = wanted.get(record.name)
            if layer is not None:
                rows = _rows(checkpoint, shard, record)[: layer.num_experts]
                scores[layer.index] = _norms(rows, norm)
    return dict(sorted(scores.items()))


def _rows(checkpoint: Checkpoint, shard: Shard, record: TensorRecord) -> Array:
    """A router, float64 [rows, hidden]."""
    if record.dtype not in _READABLE:
        raise FamilyError(
            record.name,
            f"is stored as {record.dtype}, whose rows have no norm by themselves",
            "use scores from a calibration; for an MTP layer, --mtp last or --mtp drop",
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
    """Scores of one layer, float64 [count], 0 <= score < 1: the same on every machine."""
    # numpy promises the stream of a bit generator for good, that of its Generator not.
    words = np.random.PCG64(np.random.SeedSequence([seed, layer])).random_raw(count)
    return np.asarray((words >> np.uint64(11)).astype(np.float64) * 2.0**-53)
