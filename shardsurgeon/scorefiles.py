"""A score table as the bytes of a file that `scores` reads: `.safetensors` or `.json`.

The other way round from `scores`. Whoever writes the file does so atomically; nothing here
touches one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shardsurgeon.errors import UsageError
from shardsurgeon.formats.safetensors import build_header

Table = Mapping[int, Mapping[str, NDArray[np.float64]]]

_SUFFIXES = (".safetensors", ".json")


def check_score_file_name(path: str | PathLike[str]) -> None:
    """Raise UsageError unless the name ends in a form that can be written."""
    suffix = Path(path).suffix.lower()
    if suffix not in _SUFFIXES:
        problem = f"scores are not written as '{suffix}'" if suffix else "its name has no ending"
        raise UsageError(path, problem, f"give a name that ends in {' or '.join(_SUFFIXES)}")


def score_file(path: str | PathLike[str], layers: Table, facts: Mapping[str, str]) -> bytes:
    """The content of a score file of that name.

    layers: layer → metric → float64 [experts]; facts: what to say beside them. A safetensors
    file holds a tensor F64 `layers.<n>.<metric>` for each and the facts as its metadata; JSON
    holds the facts and `{"scores": {"<n>": {metric: [numbers]}}}`. The numbers survive either
    to the last bit. The same table gives the same bytes.
    """
    check_score_file_name(path)
    if Path(path).suffix.lower() == ".json":
        table = {
            str(layer): {metric: row.tolist() for metric, row in metrics.items()}
            for layer, metrics in layers.items()
        }
        return (json.dumps({**facts, "scores": table}, indent=1) + "\n").encode()
    rows = {
        f"layers.{layer}.{metric}": row.astype("<f8")
        for layer, metrics in layers.items()
        for metric, row in metrics.items()
    }
    header = build_header(
        [(name, "F64", row.shape, row.nbytes) for name, row in rows.items()], dict(facts)
    )
    return header + b"".join(row.tobytes() for row in rows.values())
