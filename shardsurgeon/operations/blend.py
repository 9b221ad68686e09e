"""The `scores blend` command: parts of the data, each measured apart, made one saliency."""

from __future__ import annotations

import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

from shardsurgeon.checkpoint.layer_names import Layer
from shardsurgeon.errors import ScoreError, UsageError
from shardsurgeon.layerwise.calibration_file import merge
from shardsurgeon.operations.parts import ReadParts, read_parts
from shardsurgeon.operations.reports import BlendPartReport, BlendReport
from shardsurgeon.pruning.request import removed_count
from shardsurgeon.scores.blending import Retained, in_proportion
from shardsurgeon.scores.files import score_output, write_scores
from shardsurgeon.scores.observed import COUNT, MEANS, WEIGHED, is_observed, merge_observed
from shardsurgeon.scores.table import Scores
from shardsurgeon.storage.phases import phase
from shardsurgeon.units import require_ratios

Path = str | os.PathLike[str]
Objective = Literal["max-min"]


def blend_scores(
    files: Sequence[Path],
    out: Path,
    *,
    weights: Mapping[str, float] | None = None,
    objective: Objective | None = None,
    keep: int | None = None,
    ratio: float | None = None,
    metric: str = "reap",
    same_model: bool = False,
    mixed: bool = False,
    force: bool = False,
) -> BlendReport:
    """Make one saliency of several parts of the data, and write its score file.

    files: of `calibrate` or of REAP's observer, of one model; a calibration over several datasets
    has a part for each (`read_parts` says how parts are called). weights: name → how often each
    token of the part counts, in proportion to the others'; equal ones give what `merge_scores`
    gives. objective: `max-min` finds the weights under which the part that retains
    the least share of its saliency retains most, at `keep` experts a layer or at the `ratio`
    removed. With weights, keep or ratio add the retained shares to the report. metric: the one
    that the shares are of. same_model, mixed, force: as for `merge_scores`, which also says what
    is raised for the files. Raises UsageError for weights that are not one for each part.

    >>> file = "fixtures/kimi_k25/scores.pt"
    >>> try:
    ...     shardsurgeon.blend_scores([file], "blend.npz", weights={"code": 2, "chat": 1})
    ... except shardsurgeon.InputError as error:
    ...     print(error.problem)
    1 part of the data
    """
    if metric not in WEIGHED:
        problem = f"'{metric}' is none that adds up over parts"
        raise UsageError("--metric", problem, f"choose {', '.join(WEIGHED)}")
    output = score_output(out, force=force).apart_from(pathlib.Path(file) for file in files)
    read = read_parts(files)
    names = [part.name for part in read.parts]
    given = _given(names, weights, objective, keep, ratio)
    _require_sums(read, str(out), same_model, mixed)
    parts = [part.scores for part in read.parts]
    content = merge_observed(parts, given)
    kept = _kept(parts[0], keep, ratio)
    retained = None if kept is None else _retained(parts, metric, kept)
    facts = {"method": "blend"}
    if objective is not None and retained is not None:
        with phase("searching for weights"):
            given = retained.max_min()
        content = merge_observed(parts, given)
        facts |= {"objective": objective, "metric": metric}
    weighed = (f"{name}={weight:.6g}" for name, weight in zip(names, given, strict=True))
    facts["weights"] = ",".join(weighed)
    written = write_scores(output, replace(content, facts=facts))
    none = (None,) * len(parts)
    shares = none if retained is None else retained.shares(given)
    equal = none if retained is None else retained.shares((1.0,) * len(parts))
    of_files = [str(part.file) for part in read.parts]
    metrics = {name for row in content.layers.values() for name, of in row.items() if of.ndim == 1}
    return BlendReport(
        out=str(out),
        objective=objective or "weights",
        metric=metric,
        kept=None if kept is None else max(kept.values()),
        parts=tuple(map(BlendPartReport, names, of_files, given, shares, equal)),
        layers=len(content.layers),
        metrics=tuple(sorted(metrics)),
        written=written,
    )


def _given(
    names: Sequence[str],
    weights: Mapping[str, float] | None,
    objective: str | None,
    keep: int | None,
    ratio: float | None,
) -> tuple[float, ...]:
    """The weights asked for, part by part, 1 on average; 1 each where they are to be found."""
    if keep is not None and ratio is not None:
        raise UsageError("--keep", "is given beside --ratio", "give one of them")
    if ratio is not None:
        require_ratios((ratio,))
    if (weights is None) == (objective is None):
        what = "neither says" if weights is None else "both say"
        problem = f"{what} how the parts weigh: --weights, --objective"
        example = ",".join(f"{name}=1" for name in names)
        raise UsageError("scores blend", problem, f"say --weights {example} or --objective max-min")
    if weights is None:
        if keep is None and ratio is None:
            problem = "max-min depends on how many experts stay, and none is given"
            raise UsageError("--objective", problem, "add --keep or --ratio")
        return (1.0,) * len(names)
    every = f"give one for each of {', '.join(names)}"
    for name, weight in weights.items():
        if name not in names:
            raise UsageError("--weights", f"'{name}' is no part", every)
        number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not (number and math.isfinite(weight) and weight >= 0):
            remedy = "a weight is a number of 0 or more"
            raise UsageError("--weights", f"{name} has {str(weight)[:60]}", remedy)
    if lacking := [name for name in names if name not in weights]:
        raise UsageError("--weights", f"has none for {', '.join(lacking)}", every)
    if not any(weights.values()):
        raise UsageError("--weights", "every weight is 0", "give one that is above 0")
    return in_proportion([weights[name] for name in names])


def _require_sums(read: ReadParts, out: str, same_model: bool, mixed: bool) -> None:
    """Raise ScoreError for a part without sums, and what a merge of the files raises."""
    for part in read.parts:
        if not is_observed(part.scores):
            problem = "holds scores without the sums and counts that they are means of"
            remedy = "files of `shardsurgeon calibrate` and of REAP's observer can be blended"
            raise ScoreError(part.scores.origin, problem, remedy)
    if len(read.calibrations) > 1:
        merge(read.calibrations, out, any_name=same_model, mixed=mixed)


def _kept(part: Scores, keep: int | None, ratio: float | None) -> dict[Layer, int] | None:
    """Layer → how many experts stay; None where no count is given."""
    if keep is None and ratio is None:
        return None
    sizes = {layer: len(table[COUNT]) for layer, table in part.layers.items()}
    if ratio is not None:
        kept = {layer: size - removed_count(ratio, size) for layer, size in sizes.items()}
    else:
        kept = {layer: min(keep or 0, size) for layer, size in sizes.items()}
    if keep is not None and not 0 < keep < max(sizes.values()):
        problem = f"{keep} of {max(sizes.values())} experts leaves nothing to choose"
        raise UsageError("--keep", problem, "keep at least 1 and fewer than all")
    return kept


def _retained(parts: Sequence[Scores], metric: str, kept: Mapping[Layer, int]) -> Retained:
    for part in parts:
        lacking = next((n for n, table in part.layers.items() if metric not in table), None)
        if lacking is not None and metric not in MEANS:
            problem = f"has no metric {metric!r} for layer {lacking}"
            raise ScoreError(part.origin, problem, "choose another with --metric")
    return Retained(parts, metric, kept)
