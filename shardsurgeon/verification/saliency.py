"""The saliencies that the metadata publishes: they must bear out the choice of experts."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from shardsurgeon.checkpoint.checkpoint import Checkpoint
from shardsurgeon.checkpoint.provenance import PROVENANCE_NAME, LayerRecord
from shardsurgeon.verification.findings import Findings

_LEAST = "min_retained_saliency"
_MOST = "max_pruned_saliency"


def check_saliencies(pruned: Checkpoint, findings: Findings) -> None:
    """In every layer (or router group) no pruned expert has more saliency than a retained one.

    Preserved experts are left out. The extremes that the file names must be those of its own
    saliencies, where it has any.
    """
    record = pruned.provenance
    if record is None:
        return
    (size,) = (file.nbytes for file in pruned.files if file.name == PROVENANCE_NAME)
    content = json.loads(pruned.source.read(PROVENANCE_NAME, 0, size))
    for key, fields in content["layers"].items():
        where = f"{PROVENANCE_NAME} layers.{key}"
        layer = record.layers[int(key)]
        groups = fields.get("groups")
        _check_extremes(where, fields, layer, range(layer.num_experts), findings)
        if groups is None:
            _check_order(where, fields, findings)
            continue
        size = layer.num_experts // len(groups)
        for number, group in enumerate(groups):
            ids = range(number * size, (number + 1) * size)
            _check_extremes(f"{where}.groups[{number}]", group, layer, ids, findings)
            _check_order(f"{where}.groups[{number}]", group, findings)


def _check_order(where: str, fields: object, findings: Findings) -> None:
    least, most = _number(fields, _LEAST), _number(fields, _MOST)
    if least is not None and most is not None and least < most:
        findings.add(where, f"{_LEAST} {least} is below {_MOST} {most}")


def _check_extremes(
    where: str, fields: object, layer: LayerRecord, ids: range, findings: Findings
) -> None:
    retained = set(layer.retained).difference(layer.preserved)
    expected = {
        _LEAST: min(_saliencies(layer, retained, ids), default=None),
        _MOST: max(_saliencies(layer, set(layer.pruned), ids), default=None),
    }
    for key, value in expected.items():
        given = _number(fields, key)
        if given is not None and value is not None and given != value:
            findings.add(where, f"{key} is {given}, its saliencies say {value}")


def _saliencies(layer: LayerRecord, members: Collection[int], ids: range) -> Iterator[float]:
    for old_id in ids:
        value = layer.saliency[old_id]
        if value is not None and old_id in members:
            yield value


def _number(fields: object, key: str) -> float | None:
    value: Any = fields.get(key) if isinstance(fields, Mapping) else None
    return float(value) if isinstance(value, int | float) else None
