"""Tables whose values are expert ids, such as a token-to-expert table, after a prune.

Pure: the table's bytes and the retained ids in, bytes of the same shape out. An id that is
retained becomes its new number. An id that is gone becomes the new number (old id mod kept),
or the next one (cyclically) that its row does not hold yet: so every row still names different
experts, nothing depends on the weights, and what the table spread evenly stays spread evenly.
"""

from __future__ import annotations

import numpy as np

from shardsurgeon.errors import FamilyError

_WIDTHS = {"I32": "<i4", "I64": "<i8"}


def remapped(
    name: str,
    dtype: str,
    shape: tuple[int, ...],
    raw: bytes,
    retained: tuple[int, ...],
    experts: int,
) -> bytes:
    """The table of old ids `raw`, of `dtype` and `shape` [..., ids per row], in new ids.

    Raises FamilyError where the table is of no integer type, names an expert beyond
    `experts`, or has rows longer than the experts that are left.
    """
    if dtype not in _WIDTHS or len(shape) < 1 or shape[-1] > len(retained):
        problem = f"a table of expert ids of type {dtype} and shape {list(shape)}"
        raise FamilyError(name, f"{problem} cannot be renumbered for {len(retained)} experts")
    old = np.frombuffer(raw, _WIDTHS[dtype]).reshape(-1, shape[-1])
    if old.size and not 0 <= int(old.min()) <= int(old.max()) < experts:
        raise FamilyError(name, f"holds expert ids from {old.min()} to {old.max()}")
    new_ids = np.full(experts, -1, dtype=np.int64)
    new_ids[list(retained)] = np.arange(len(retained))
    new = new_ids[old]
    for column in range(shape[-1]):
        _fill(new, old, column, len(retained))
    table: bytes = new.astype(_WIDTHS[dtype]).tobytes()
    return table


def _fill(new: np.ndarray, old: np.ndarray, column: int, kept: int) -> None:
    """Give the rows whose expert in `column` is gone another that they do not hold yet."""
    rows = np.flatnonzero(new[:, column] < 0)
    candidate = old[rows, column] % kept
    while rows.size:
        taken = (new[rows] == candidate[:, None]).any(axis=1)
        new[rows[~taken], column] = candidate[~taken]
        rows, candidate = rows[taken], (candidate[taken] + 1) % kept
