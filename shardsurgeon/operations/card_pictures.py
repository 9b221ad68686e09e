"""The pictures in a model card: what was pruned, and what it costs by an evaluation.

They are drawn from the files in calibration/ alone, so that equal models have equal pictures, and
lie beside those files in the repository. Without matplotlib a card has none.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count

import numpy as np

from shardsurgeon.checkpoint.files import DAMAGE_PICTURE, SALIENCY_PICTURE
from shardsurgeon.checkpoint.provenance import PROVENANCE_NAME, LayerRecord, Provenance
from shardsurgeon.errors import UsageError
from shardsurgeon.operations.card_data import ModelFacts
from shardsurgeon.operations.plots import Values, curve_of_damage, map_of_prune
from shardsurgeon.units import counted

# Layers whose experts were chosen by other means have values of another kind, or none.
_BY_SALIENCY = ("scores", "plan")


@dataclass(frozen=True, slots=True)
class Picture:
    """A .png of a card. name: its path in the repository; text: what one reads who cannot see it,
    without anything that a file says."""

    name: str
    text: str
    data: bytes = field(repr=False)


def card_pictures(facts: ModelFacts) -> dict[str, Picture]:
    """The file in calibration/ that a picture is drawn from → the picture.

    No name is that of a file that the model carries: a prune of a pushed prune has its pictures.
    Empty where matplotlib is missing.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # of letters that the font lacks
            return dict(_drawn(facts))
    except UsageError:
        return {}


def _drawn(facts: ModelFacts) -> Iterator[tuple[str, Picture]]:
    record = facts.provenance
    taken = set(record.files or ())
    rows = {
        str(number): (_values(layer, layer.retained), _values(layer, layer.pruned))
        for number, layer in sorted(record.layers.items())
        if layer.policy in _BY_SALIENCY and any(value is not None for value in layer.saliency)
    }
    if rows:
        text = f"Saliency of the experts in {counted(len(rows), 'layer')}: at the left of the line "
        text += "those that stayed, at its right those that were pruned"
        name = _free(SALIENCY_PICTURE, taken)
        yield PROVENANCE_NAME, Picture(name, text, map_of_prune(_metric(record), rows))
    for cost in facts.costs:
        text = "Mean KL from the original over the share of experts that is removed; a ring marks "
        name = _free(DAMAGE_PICTURE, taken)
        data = curve_of_damage(cost.evaluation, cost.found)
        yield cost.file, Picture(name, f"{text}this model", data)


def _values(layer: LayerRecord, ids: tuple[int, ...]) -> Values:
    """float64 [ids], NaN where the saliency is unknown."""
    return np.array([layer.saliency[old_id] for old_id in ids], dtype=np.float64)


def _metric(record: Provenance) -> str:
    """What the saliencies are: of several prunes, each may have had its own."""
    metrics = {step.metric for step in record.steps}
    return (metrics.pop() if len(metrics) == 1 else None) or "saliency"


def _free(name: str, taken: set[str]) -> str:
    """A name that no file has; it is taken then. calibration/saliency.png, -2.png, and so on."""
    stem = name.removesuffix(".png")
    names = (name if number == 1 else f"{stem}-{number}.png" for number in count(1))
    found = next(each for each in names if each not in taken)
    taken.add(found)
    return found
