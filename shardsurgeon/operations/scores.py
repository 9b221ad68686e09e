"""The `scores` commands: look at score files, compare, convert and merge them, make baselines."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations, product
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from shardsurgeon.checkpoint.anatomy import Anatomy, read_anatomy
from shardsurgeon.checkpoint.checkpoint import Checkpoint
from shardsurgeon.checkpoint.layer_consistency import require_complete
from shardsurgeon.checkpoint.layer_names import Layer
from shardsurgeon.checkpoint.open import files_read, open_model
from shardsurgeon.errors import UsageError
from shardsurgeon.layerwise.accumulators import TOTAL_TOKENS
from shardsurgeon.layerwise.calibration_file import (
    Calibration,
    find_calibration,
    merge,
    read_calibration,
)
from shardsurgeon.operations.parts import parts_of, shown_parts
from shardsurgeon.operations.reports import (
    BaselineReport,
    RouterScoresReport,
    ScoreLayerReport,
    ScoresReport,
    ShownPartReport,
    WrittenScoresReport,
)
from shardsurgeon.pruning.agreement import (
    ComparisonReport,
    NamedScores,
    compare,
    compare_parts,
)
from shardsurgeon.pruning.analysis import (
    ScoreAnalysis,
    main_layers,
    view_alone,
    with_row_names,
)
from shardsurgeon.pruning.decide import model_super_experts, model_values, never_routed_experts
from shardsurgeon.pruning.lineage import check_lineage
from shardsurgeon.pruning.routing import routing_facts
from shardsurgeon.pruning.selection import SUPER_METRIC
from shardsurgeon.scores.checks import doubts
from shardsurgeon.scores.files import ScoreContent, read_scores, score_output, write_scores
from shardsurgeon.scores.observed import is_observed, merge_observed
from shardsurgeon.scores.router_norms import RouterNorm, random_scores, router_scores
from shardsurgeon.scores.table import Scores
from shardsurgeon.scores.weight_norms import WeightCriterion, aimer_scores, weight_norms
from shardsurgeon.storage.files import Output
from shardsurgeon.units import require_ratios

_Item = TypeVar("_Item")
Path = str | os.PathLike[str]
Scored = Mapping[int, NDArray[np.float64]]
# Criterion → what the file says of how it was made, its metric, and how.
_CRITERIA = {
    WeightCriterion.NORM: ("expert-weight-norm", "weight_l2", weight_norms),
    WeightCriterion.AIMER: ("aimer", "one_minus_aimer", aimer_scores),
}


def show_scores(
    file: Path,
    model: Path | None = None,
    *,
    metric: str | None = None,
    family: str | None = None,
) -> ScoresReport:
    """What a score file says of each layer, and where the layers could be cut.

    model: a folder that the scores must fit, None to look at the file alone; metric: None for
    the one that `plan` would take; family: as for `plan`. Scores that are no measurement are
    shown, with a note that `plan` refuses them. Raises ScoreError for scores that are broken or do
    not fit.

    >>> report = shardsurgeon.show_scores("fixtures/kimi_k25/scores.pt")
    >>> report.metric, report.layers[0].never_routed, report.cuts[-1].kept
    ('reap', (6,), 18)
    """
    _require_model(model, family)
    scores = read_scores(file)
    calibration = find_calibration(file)
    name, analysis = None, None
    if model is not None:
        checkpoint = open_model(model, family, follow_links=True)
        name = checkpoint.source.name
        analysis = _analysis_for_model(checkpoint, scores, metric)
    analysis = analysis or view_alone(scores, metric)
    layers = analysis.layers()
    return ScoresReport(
        file=str(file),
        model=name,
        metric=analysis.metric,
        metrics=scores.metrics or tuple(sorted(scores.rows)),
        num_experts=max(layer.num_experts for layer in layers),
        layers=layers,
        cuts=analysis.cuts(),
        super_experts_known=analysis.super_experts is not None,
        facts=dict(scores.facts),
        calibration=None if calibration is None else _settings_summary(calibration),
        notes=_notes(with_row_names(scores), analysis.metric),
        parts=_shown_parts(scores, calibration, analysis.metric),
    )


def _shown_parts(
    scores: Scores, calibration: Calibration | None, metric: str
) -> tuple[ShownPartReport, ...]:
    if calibration is None or not calibration.parts:
        return ()
    return shown_parts(calibration, scores.select(metric)[1], metric)


def _notes(scores: Scores, metric: str) -> tuple[str, ...]:
    """Why `plan` would refuse the scores; scores: with their layers named."""
    main = main_layers(scores)
    others = [layer for layer in scores.layers if layer not in main]
    found = doubts(scores, metric, main, others)
    return tuple(f"`plan` refuses these scores: {problem}" for problem, _ in found)


def convert_scores(
    source: Path,
    out: Path,
    *,
    model: Path | None = None,
    family: str | None = None,
    force: bool = False,
) -> WrittenScoresReport:
    """Write a score file in another format: all metrics, and the accumulators where it has them.

    model: names the layers of a file that has only rows; family: as for `plan`;
    force: replace another score file. Raises UsageError and OutputError where `out` cannot be
    written so, ScoreError for a file that cannot
    be read.

    >>> shardsurgeon.convert_scores("fixtures/kimi_k25/scores.pt", "scores.npz").layers
    3
    """
    _require_model(model, family)
    output = _output(out, force, source)
    scores = read_scores(source)
    if model is not None:
        checkpoint = open_model(model, family, follow_links=True)
        output = output.apart_from(files_read(checkpoint, family))
        anatomy = read_anatomy(checkpoint)
        scores = scores.assign_rows([layer.index for layer in anatomy.main_layers])
    calibration = find_calibration(source)
    written = write_scores(output, _content(scores, calibration))
    layers = len(scores.layers) or len(next(iter(scores.rows.values())))
    return _written((source,), out, layers, scores.metrics or scores.rows, calibration, written)


def merge_scores(
    files: Sequence[Path],
    out: Path,
    *,
    same_model: bool = False,
    mixed: bool = False,
    force: bool = False,
) -> WrittenScoresReport:
    """Add the accumulators of several calibrations of one model and write their score file.

    Files of REAP's observer are added up as well, if all of them are such files. same_model:
    models of one config under two names are one; mixed: files that differ in the kinds of tokens
    or in the dtype are added up; force: replace another score file. Raises UsageError and
    OutputError where `out` cannot be written, ScoreError for files without accumulators, of
    different models, kinds of tokens or dtypes, or with a sample in common.

    >>> try:
    ...     shardsurgeon.merge_scores(["fixtures/kimi_k25/scores.pt"] * 2, "both.npz")
    ... except shardsurgeon.InputError as error:
    ...     print(error.problem)
    holds the same counts and sums as fixtures/kimi_k25/scores.pt
    """
    output = _output(out, force, *files)
    if (observed := _observed(files)) is not None:
        content, merged = merge_observed(observed), None
    else:
        calibrations = [read_calibration(file) for file in files]
        merged = merge(calibrations, str(out), any_name=same_model, mixed=mixed)
        content = merged.content()
    written = write_scores(output, content)
    metrics = {
        name for row in content.layers.values() for name, item in row.items() if item.ndim == 1
    }
    return _written(files, out, len(content.layers), metrics, merged, written)


def _require_model(model: Path | None, family: str | None) -> None:
    if model is None and family is not None:
        raise UsageError("--family", "says how to read a model, and none is named", "add --model")


def _output(out: Path, force: bool, *inputs: Path) -> Output:
    return score_output(out, force=force).apart_from(pathlib.Path(path) for path in inputs)


def _observed(files: Sequence[Path]) -> list[Scores] | None:
    """The scores of at least two files, if all are of REAP's observer and none is a calibration."""
    tables = []
    for file in files:
        table = read_scores(file)
        if not is_observed(table) or find_calibration(file) is not None:
            return None
        tables.append(table)
    return tables if len(tables) > 1 else None


def compare_scores(
    a: Path, b: Path, *, ratios: Sequence[float] = (0.25, 0.5), metrics: Sequence[str] = ()
) -> ComparisonReport:
    """How well two score files agree on the order of each layer's experts.

    ratios: fractions removed at which the keep-lists are compared; metrics: one for both files or
    one for each, none for the one that `plan` would take. Parts that the files keep apart are
    compared as well, those of one with those of the other; a file with itself: each of its parts
    with each other. Raises ScoreError where the files have no
    layer in common or different numbers of experts in one.

    >>> scores = "fixtures/kimi_k25/scores.pt"
    >>> report = shardsurgeon.compare_scores(scores, scores, metrics=["reap", "ean_mean"])
    >>> round(report.mean.spearman, 2), report.mean.overlaps["0.5"].kept
    (0.79, 16)
    """
    require_ratios(ratios)
    if len(metrics) > 2:
        raise UsageError("--metric", f"{len(metrics)} metrics for two files", "give one or two")
    wanted = (metrics[0], metrics[-1]) if metrics else (None, None)
    scores = read_scores(a), read_scores(b)
    report = compare(*scores, ratios, wanted)
    parts = [
        _parts_of_file(file) or {"all": whole} for file, whole in zip((a, b), scores, strict=True)
    ]
    if max(map(len, parts)) == 1:
        return report
    used = (report.metric_a, report.metric_b)
    pairs: Iterable[tuple[NamedScores, NamedScores]]
    if str(a) == str(b) and used[0] == used[1]:
        pairs = combinations(parts[0].items(), 2)
    else:
        pairs = product(parts[0].items(), parts[1].items())
    return replace(report, parts=compare_parts(pairs, ratios, used))


def _parts_of_file(file: Path) -> dict[str, Scores]:
    calibration = find_calibration(file)
    return {} if calibration is None else parts_of(calibration)


def scores_from_router(
    model: Path | None,
    out: Path,
    *,
    norm: Literal["l2", "l1"] = "l2",
    family: str | None = None,
    force: bool = False,
) -> RouterScoresReport:
    """Write router magnitudes, of MTP layers too, as a score file; norm: `l2` or `l1`.

    family: as for `plan`; force: replace another score file. Raises OutputError where the file
    that is there stays, UsageError where its suffix is not one of a score file that can be written,
    and whatever opening the model and reading its routers raises.

    >>> shardsurgeon.scores_from_router("fixtures/qwen3_moe", "router.npz")
    qwen3_moe: router_l2 of 16 experts in 3 routers
    """
    output, checkpoint, anatomy = _begin(model, out, family, force)
    scores = router_scores(checkpoint, anatomy.layers, RouterNorm(norm))
    name, metric = checkpoint.source.name, f"router_{norm}"
    facts = {"method": "router-magnitude", "model": name, "norm": norm}
    layers, written = _save(output, anatomy, scores, metric, facts)
    experts = anatomy.num_experts
    return RouterScoresReport(name, norm, metric, experts, layers, str(out), written)


def scores_from_weights(
    model: Path | None,
    out: Path,
    *,
    criterion: Literal["norm", "aimer"] = "norm",
    family: str | None = None,
    force: bool = False,
) -> BaselineReport:
    """Write a score of each expert's weights, of MTP layers too, as a score file.

    criterion: their `norm`, or `aimer`, whose distance to 1 is written (`aimer_scores`). Raises
    what `scores_from_router` raises, and FamilyError for weights stored in a form that is not read
    here.
    """
    output, checkpoint, anatomy = _begin(model, out, family, force)
    require_complete(anatomy.incomplete, None, checkpoint.location)
    name = checkpoint.source.name
    method, metric, scored = _CRITERIA[WeightCriterion(criterion)]
    facts = {"method": method, "model": name}
    # All experts are read to find out what a file holds: not for one that says it is another's.
    if not force and output.path.is_file() and dict(read_scores(out).facts) != facts:
        output.refuse()
    scores = scored(checkpoint, anatomy)
    layers, written = _save(output, anatomy, scores, metric, facts)
    experts = anatomy.num_experts
    return BaselineReport(name, method, metric, experts, layers, str(out), written=written)


def scores_random(
    model: Path | None,
    out: Path,
    *,
    seed: int = 42,
    family: str | None = None,
    force: bool = False,
) -> BaselineReport:
    """Write a random number from 0 to 1 for each expert, of MTP layers too, as a score file.

    seed: 0 or more; the same seed gives the same numbers on every machine, and a layer's do not
    depend on the other layers. Raises what `scores_from_router` raises.

    >>> report = shardsurgeon.scores_random("fixtures/qwen3_moe", "random.npz", seed=7)
    >>> report.seed, report.written
    (7, True)
    """
    if seed < 0:
        raise UsageError("--seed", f"{seed} is less than 0")
    output, checkpoint, anatomy = _begin(model, out, family, force)
    scores = {
        layer.index: random_scores(seed, layer.index, layer.num_experts) for layer in anatomy.layers
    }
    name, method, metric = checkpoint.source.name, "random", "random"
    facts = {"method": method, "model": name, "seed": str(seed)}
    layers, written = _save(output, anatomy, scores, metric, facts)
    return BaselineReport(
        name, method, metric, anatomy.num_experts, layers, str(out), seed, written=written
    )


def _begin(
    model: Path | None, out: Path, family: str | None, force: bool
) -> tuple[Output, Checkpoint, Anatomy]:
    output = _output(out, force)
    checkpoint = open_model(model, family, follow_links=True)
    output = output.apart_from(files_read(checkpoint, family))
    return output, checkpoint, read_anatomy(checkpoint)


def _save(
    output: Output, anatomy: Anatomy, scores: Scored, metric: str, facts: Mapping[str, str]
) -> tuple[tuple[ScoreLayerReport, ...], bool]:
    """Write a score file of one metric; each layer's range, and whether it was not there yet."""
    table = _keyed({layer: {metric: row} for layer, row in scores.items()})
    written = write_scores(output, ScoreContent(layers=table, facts=facts))
    layers = []
    for layer in anatomy.layers:
        lowest, median, highest = np.quantile(scores[layer.index], (0, 0.5, 1)).tolist()
        layers.append(ScoreLayerReport(layer.index, layer.is_mtp, lowest, median, highest))
    return tuple(layers), written


def _analysis_for_model(
    checkpoint: Checkpoint, scores: Scores, metric: str | None
) -> ScoreAnalysis:
    """The scores of the model's present experts."""
    anatomy = read_anatomy(checkpoint)
    check_lineage(checkpoint.provenance, anatomy.experts_per_layer)
    scores = scores.assign_rows([layer.index for layer in anatomy.main_layers])
    name, values = model_values(checkpoint, anatomy, scores, metric)
    extreme = None
    if all(SUPER_METRIC in metrics for metrics in scores.layers.values()):
        extreme = model_super_experts(checkpoint, anatomy, scores)
    return ScoreAnalysis(
        metric=name,
        values=_keyed(values),
        never_routed=_keyed(never_routed_experts(checkpoint, anatomy, scores, values)),
        super_experts=None if extreme is None else _keyed(extreme),
        mtp=frozenset(layer.index for layer in anatomy.mtp_layers),
        facts=routing_facts(anatomy),
    )


def _keyed(table: Mapping[int, _Item]) -> dict[Layer, _Item]:
    """The same table; its type allows layers that have names, as writers and views take."""
    keyed: dict[Layer, _Item] = {}
    for layer, item in table.items():
        keyed[layer] = item
    return keyed


def _settings_summary(calibration: Calibration) -> dict[str, object]:
    """The settings, with numbers in place of the list of samples."""
    settings = {key: item for key, item in calibration.settings.items() if key != "samples"}
    tokens = sum(sample[2] for sample in calibration.samples)
    return {**settings, "samples": calibration.num_samples, "tokens": tokens}


def _content(scores: Scores, calibration: Calibration | None) -> ScoreContent:
    """What to write of a file: its scores, and the accumulators beside them."""
    if calibration is None:
        return ScoreContent(layers=scores.layers, rows=scores.rows, facts=scores.facts)
    added = calibration.content()
    layers = {**added.layers}
    for layer, metrics in scores.layers.items():
        layers[layer] = {**layers.get(layer, {}), **metrics}
    own = ("format", "version", TOTAL_TOKENS)
    facts = {key: fact for key, fact in scores.facts.items() if key not in own}
    return replace(added, layers=layers, facts=facts)


def _written(
    files: Sequence[Path],
    out: Path,
    layers: int,
    metrics: Iterable[str],
    calibration: Calibration | None,
    written: bool,
) -> WrittenScoresReport:
    samples = None if calibration is None else calibration.samples
    lacking = "" if calibration is None else calibration.lacks_parts
    return WrittenScoresReport(
        inputs=tuple(map(str, files)),
        out=str(out),
        layers=layers,
        metrics=tuple(sorted(metrics)),
        samples=None if calibration is None else calibration.num_samples,
        tokens=None if samples is None else sum(sample[2] for sample in samples),
        written=written,
        parts=() if calibration is None else calibration.parts,
        notes=(f"{out} {lacking}",) if lacking else (),
    )
