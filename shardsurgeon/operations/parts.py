"""The parts that score files say something of, each as scores of its own."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from shardsurgeon.checkpoint.layer_names import Layer
from shardsurgeon.errors import ScoreError, UsageError
from shardsurgeon.layerwise.calibration_file import Calibration, find_calibration
from shardsurgeon.operations.reports import ShownPartReport
from shardsurgeon.pruning.agreement import keep_list
from shardsurgeon.pruning.request import removed_count
from shardsurgeon.scores.files import read_scores
from shardsurgeon.scores.table import Scores, Vector
from shardsurgeon.units import counted

Path = str | os.PathLike[str]

# Shares of the experts that go, at which it is shown what each part retains.
SHOWN_RATIOS = (0.25, 0.5)


@dataclass(frozen=True, slots=True)
class Part:
    """A part of the data. name: one that no other part has; file: it is in; scores: its own."""

    name: str
    file: Path
    scores: Scores


@dataclass(frozen=True, slots=True)
class ReadParts:
    """The parts of some files, and those of the files that are calibrations."""

    parts: tuple[Part, ...]
    calibrations: tuple[Calibration, ...]


def parts_of(calibration: Calibration) -> dict[str, Scores]:
    """Name of a part → its scores, where the file keeps those of several apart; else empty."""
    found = {}
    for part, layers in zip(calibration.parts, calibration.mix.values(), strict=False):
        found[part.name] = Scores(
            origin=f"{calibration.origin}, {part.name}",
            layers={layer: sums.metrics() for layer, sums in layers.items()},
            tokens={layer: sums.total_tokens for layer, sums in layers.items()},
        )
    return found


def shown_parts(
    calibration: Calibration, chosen_by: Mapping[Layer, Vector], metric: str
) -> tuple[ShownPartReport, ...]:
    """The parts of a file, and what they retain of a metric.

    chosen_by: layer → saliency by which experts stay, the file's own.
    """
    found = []
    for part, scores in zip(calibration.parts, parts_of(calibration).values(), strict=True):
        shares = {str(at): _retained(scores, chosen_by, metric, at) for at in SHOWN_RATIOS}
        found.append(ShownPartReport(part.name, part.source, part.records, part.tokens, shares))
    return tuple(found)


def _retained(
    part: Scores, chosen_by: Mapping[Layer, Vector], metric: str, ratio: float
) -> float | None:
    """The part's own saliency of the experts that stay over that of all, the mean over the layers;
    None where that says nothing."""
    shares = []
    for layer, values in chosen_by.items():
        own = part.layers.get(layer, {}).get(metric)
        if own is None or not np.isfinite(own).all() or own.min() < 0:
            return None
        stay = sorted(keep_list(values, len(values) - removed_count(ratio, len(values))))
        if (total := own.sum()) > 0:
            shares.append(float(own[stay].sum() / total))
    return fmean(shares) if shares else None


def read_parts(files: Sequence[Path]) -> ReadParts:
    """Every part of some score files: the datasets of a calibration over a mix, or a whole file.

    A dataset has its short name, behind that of its file where several parts would be called
    alike; a whole file is called by its name without the ending, or by its folder where several
    files have that name. Raises ScoreError for a file that cannot be read, UsageError for fewer
    than two parts, and for a file given twice.
    """
    names = _names(files)
    scores = [read_scores(file) for file in files]
    found = [find_calibration(file) for file in files]
    mixes = [{} if each is None else parts_of(each) for each in found]
    whole = [name for name, mix in zip(names, mixes, strict=True) if not mix]
    short = [*whole, *(part for mix in mixes for part in mix)]
    parts = []
    for file, name, of_all, mix in zip(files, names, scores, mixes, strict=True):
        for part, own in mix.items():
            parts.append(Part(part if short.count(part) == 1 else f"{name}:{part}", file, own))
        if not mix:
            parts.append(Part(name, file, of_all))
    calibrations = tuple(each for each in found if each is not None)
    if len(parts) < 2:
        lacking = next((each.lacks_parts for each in calibrations), "")
        if lacking:
            raise ScoreError(files[0], lacking, "calibrate again, or give a file for each part")
        problem = f"{counted(len(parts), 'part')} of the data"
        remedy = "give a file of `calibrate` over several datasets, or several files"
        raise UsageError("scores blend", problem, remedy)
    return ReadParts(tuple(parts), calibrations)


def _names(files: Sequence[Path]) -> tuple[str, ...]:
    """A name for each file. Raises UsageError where one is given twice."""
    paths = [pathlib.Path(file) for file in files]
    for named in ([path.stem for path in paths], [path.absolute().parent.name for path in paths]):
        if len({*named}) == len(named):
            return tuple(named)
    if len({*paths}) < len(paths):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise UsageError(twice, "is given twice", "give each part once, and weigh it")
    return tuple(map(str, paths))
