"""What a page is about: the keep-lists of a plan.json, or of the record of a pruned folder.

Both become one value, and the files that a page shows beside it are held against that value here:
scores and evaluations of another model are refused.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from shardsurgeon.checkpoint.anatomy import read_anatomy
from shardsurgeon.checkpoint.layer_names import layer_number, listed_layers
from shardsurgeon.checkpoint.open import open_model
from shardsurgeon.checkpoint.provenance import LayerRecord, SourceIdentity
from shardsurgeon.checkpoint.recognition import EVALUATION, PLAN, SCORES, kind_of
from shardsurgeon.checkpoint.wrong_files import files_of, require_file
from shardsurgeon.errors import CheckpointError, KeepListError, ScoreError
from shardsurgeon.operations.evaluation_report import (
    EvaluationReport,
    read_evaluation,
)
from shardsurgeon.pruning.keep_list_files import PLAN_KIND, recognise
from shardsurgeon.pruning.keep_lists import KeepList, LayerKeep
from shardsurgeon.pruning.plan_model import PlannedModel, other_model
from shardsurgeon.pruning.request import MtpPolicy
from shardsurgeon.scores.table import Scores
from shardsurgeon.storage.formats.strict_json import brief, is_whole_number, read_object
from shardsurgeon.storage.limits import KEEP_LIST, read_limited

AnyPath = str | os.PathLike[str]
Values = tuple[float | None, ...]

_SAME_SCORES = "give the scores that it was made from"
_SAVE = "save one with `shardsurgeon plan -o FILE`"


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes of tensor data. before, after: of the whole model and of this prune; experts: of all
    experts of the whole model."""

    before: int
    after: int
    experts: int

    def at(self, removed: float) -> int:
        """About what is left where a share of all experts is gone."""
        return round(self.before - removed * self.experts)


@dataclass(frozen=True, slots=True)
class Subject:
    """Which experts of a model stay, and all that the file itself says of it.

    origin: the file or folder, for messages; is_prune: whether it is a model that was pruned;
    source: the first, unpruned model; num_experts: before, of the largest layers; layers: ids of
    the unpruned model; selection: how it was asked for, of a prune its last step; steps: prunes
    that led here; facts: what a plan says of its model; num_layers: the number of the first MTP
    layer, None where nothing says it; n_group: the router's groups; frequency: layer → tokens of
    each expert, of the layers for which scores say it; sizes: None where no model was looked at;
    notes: what a reader must know.
    """

    origin: str
    is_prune: bool
    source: SourceIdentity
    num_experts: int
    layers: Mapping[int, LayerRecord] = field(repr=False)
    selection: Mapping[str, Any]
    steps: int = 1
    facts: Mapping[str, object] = field(default_factory=dict, repr=False)
    num_layers: int | None = None
    n_group: int = 1
    frequency: Mapping[int, Values] = field(default_factory=dict, repr=False)
    sizes: Sizes | None = None
    notes: tuple[str, ...] = ()

    @property
    def main(self) -> list[int]:
        """The layers that are no MTP layers."""
        return [n for n in sorted(self.layers) if self.num_layers is None or n < self.num_layers]

    @property
    def keep(self) -> KeepList:
        """As keep-lists, of the unpruned model."""
        return KeepList(
            self.num_experts,
            {
                n: LayerKeep(each.retained, each.pruned, each.preserved, each.saliency)
                for n, each in self.layers.items()
            },
        )


def read_subject(place: AnyPath, model: AnyPath | None, family: str | None) -> Subject:
    """A plan.json, or a pruned folder.

    model: that of a plan, for sizes; None to go without; family: as for `plan`. Raises
    KeepListError for a file that is no plan or is one of another model, CheckpointError for a
    folder that is no prune.
    """
    missing = not os.path.lexists(place)
    if missing and not {"/", ":"} & {*os.fspath(place)} and Path(place).suffix != ".json":
        remedy = "give a file of `plan -o`, or a folder that `apply` wrote"
        raise KeepListError(place, "there is no such file or folder", remedy)
    if os.path.isfile(place) or (missing and Path(place).suffix == ".json"):
        return _with_model(_plan(place), model, family)
    return _prune(place, family)


def _plan(path: AnyPath) -> Subject:
    require_file(path, PLAN, KeepListError)
    where = os.fspath(path)
    if kind_of(Path(path)) == SCORES:
        raise KeepListError(where, "holds scores, no plan", "give it with --scores, beside a plan")
    raw = read_limited(path, KEEP_LIST, KeepListError)
    value = read_object(raw, where, "the plan", KeepListError, _SAVE, KEEP_LIST)
    if value.get("kind") != PLAN_KIND:
        raise KeepListError(where, "is no plan that was saved here", _SAVE)
    found = recognise(value, where, None)
    if found.made_for is None:
        raise KeepListError(where, "does not say which model it was made for", _SAVE)
    selection, facts = value.get("selection"), found.made_for.facts
    selection = selection if isinstance(selection, dict) else {}
    layers: dict[int, LayerRecord] = {}
    for name, retained in found.layers.items():
        if not isinstance(name, int):
            raise KeepListError(where, f"layer {name} is no number", "make the plan again")
        count = found.per_layer[name]
        gone = tuple(sorted(set(range(count)).difference(retained)))
        saliency = found.saliency.get(name, (None,) * count)
        policy = "plan" if selection.get("selection") == "plan" else "scores"
        layers[name] = LayerRecord(retained, gone, found.preserved[name], saliency, policy)
    subject = Subject(
        origin=where,
        is_prune=False,
        source=SourceIdentity(found.made_for.name, None, found.made_for.config_sha256),
        num_experts=int(str(value["num_experts"])),
        layers=layers,
        selection=selection,
        facts=facts,
        num_layers=_whole(facts.get("num_layers")),
        n_group=_whole(facts.get("n_group")) or 1,
    )
    policy = str(selection.get("mtp", ""))
    for name in layers.keys() - set(subject.main):
        layers[name] = replace(layers[name], policy=policy)
    return subject


def _with_model(subject: Subject, model: AnyPath | None, family: str | None) -> Subject:
    """With the sizes of the plan's model, or of a quantization or a fine-tune of it."""
    if model is None:
        return subject
    checkpoint = open_model(model, family, follow_links=True)
    anatomy = read_anatomy(checkpoint)
    planned = PlannedModel(
        subject.source.name, subject.source.config_sha256 or "", dict(subject.facts)
    )
    other = other_model(planned, checkpoint, anatomy, subject.origin)
    for layer in anatomy.layers:
        record = subject.layers.get(layer.index)
        if record is not None and record.num_experts != layer.num_experts:
            problem = f"layer {layer.index} is for {record.num_experts} experts, the model has "
            remedy = "give the model that the plan was made for"
            raise KeepListError(subject.origin, f"{problem}{layer.num_experts} there", remedy)
    gone = 0
    for layer in anatomy.layers:
        record = subject.layers.get(layer.index)
        dropped = subject.selection.get("mtp") == MtpPolicy.DROP and layer.is_mtp
        pruned = range(layer.num_experts) if dropped else record.pruned if record else ()
        gone += sum(layer.expert_nbytes[old_id] for old_id in pruned)
    if subject.selection.get("mtp") == MtpPolicy.DROP:
        gone += anatomy.mtp_nbytes
    before = checkpoint.total_size
    sizes = Sizes(before, before - gone, sum(sum(each.expert_nbytes) for each in anatomy.layers))
    if other is None:
        return replace(subject, sizes=sizes)
    note = f"sizes are those of {checkpoint.source.name}, the plan was made for {other.name}"
    return replace(subject, sizes=sizes, notes=(note,))


def _prune(place: AnyPath, family: str | None) -> Subject:
    checkpoint = open_model(place, family, follow_links=True)
    record = checkpoint.provenance
    if record is None:
        problem = "has no record of a prune"
        remedy = "give a folder that `apply` wrote, or a plan that `plan -o` saved"
        raise CheckpointError(place, problem, remedy)
    anatomy = read_anatomy(checkpoint)
    last = record.steps[-1]
    selection = {
        "selection": last.selection,
        "ratio": last.ratio if last.selection == "ratio" else None,
        "rounding": last.rounding,
        "metric": last.metric,
        "kept": last.num_experts_after,
    }
    experts = lost = 0
    for layer in anatomy.layers:
        # A survivor stands for those that were pruned: experts of a layer have the same tensors.
        each = sum(layer.expert_nbytes) // layer.num_experts
        gone = len(record.layers[layer.index].pruned) if layer.index in record.layers else 0
        experts, lost = experts + each * (layer.num_experts + gone), lost + each * gone
    after = checkpoint.total_size
    return Subject(
        origin=os.fspath(place),
        is_prune=True,
        source=record.steps[0].source,
        num_experts=record.num_experts_before,
        layers=record.layers,
        selection=selection,
        steps=len(record.steps),
        num_layers=anatomy.num_layers,
        n_group=record.n_group,
        sizes=Sizes(after + lost, after, experts),
    )


def kept_beside(place: AnyPath, kind: str) -> Path | None:
    """The file of a kind that a prune keeps in its folder, where it keeps one."""
    found = files_of(kind, place) if os.path.isdir(place) else []
    return found[0] if len(found) == 1 else None


def with_scores(subject: Subject, scores: Scores) -> Subject:
    """With how often each expert was routed to, and saliencies where the file has none.

    Raises ScoreError where the scores are not those that it was made from: of other layers, other
    numbers of experts, or other saliencies.
    """
    where, main = scores.origin, subject.main
    mtp = sorted(set(subject.layers).difference(main))
    scores = scores.assign_rows(main)
    metric = subject.selection.get("metric")
    if metric is not None and metric not in scores.choices:
        listed = ", ".join(scores.choices)
        raise ScoreError(where, f"has no metric {brief(metric)}, only {listed}", _SAME_SCORES)
    table = {_number(n, subject, mtp): row for n, row in scores.select(metric)[1].items()}
    missing = set(main).difference(table)
    surplus = set(table).difference(subject.layers)
    if missing or surplus:
        which, how = (missing, "lacks") if missing else (surplus, "has, unlike it,")
        problem = f"is not of {subject.origin}: {how} layer {listed_layers(which)}"
        raise ScoreError(where, problem, _SAME_SCORES)
    layers = dict(subject.layers)
    for number, row in table.items():
        found = layers[number]
        if len(row) != found.num_experts:
            problem = f"has {len(row)} experts in layer {number}, {subject.origin} has "
            raise ScoreError(where, f"{problem}{found.num_experts}", _SAME_SCORES)
        values = _finite(row.tolist())
        if any(value is not None for value in found.saliency):
            _require_same(where, number, found.saliency, values, subject)
        elif metric is not None or found.policy in ("scores", "plan"):
            layers[number] = replace(found, saliency=values)
    counted = scores.frequencies().items()
    frequency = {_number(n, subject, mtp): _whole_counts(row.tolist()) for n, row in counted}
    return replace(subject, layers=layers, frequency=frequency)


def _require_same(where: str, layer: int, said: Values, here: Values, subject: Subject) -> None:
    # Of several prunes, the record has the saliencies of each; and a list has what its maker had.
    if subject.steps > 1 or subject.layers[layer].policy not in ("scores", "plan"):
        return
    for old_id, (one, other) in enumerate(zip(said, here, strict=True)):
        if one is not None and other is not None and one != other:
            problem = f"layer {layer}, expert {old_id}: its saliency is {other:.4g}, "
            raise ScoreError(where, f"{problem}{subject.origin} says {one:.4g}", _SAME_SCORES)


def read_evaluation_of(path: AnyPath, subject: Subject) -> EvaluationReport:
    """An evaluation of the unpruned model. Raises ScoreError where it is of another one."""
    require_file(path, EVALUATION, ScoreError)
    found = read_evaluation(path)
    if subject.source.config_sha256 not in (None, found.config_sha256):
        problem = f"is of {found.model[:40]}, whose config.json has sha256 "
        problem += f"{found.config_sha256[:12]}…, that of {subject.source.name} has "
        remedy = "give an evaluation of this model, or leave it out"
        raise ScoreError(path, f"{problem}{subject.source.config_sha256:.12}…", remedy)
    return found


def _number(layer: int | str, subject: Subject, mtp: list[int]) -> int:
    return layer_number(layer, subject.num_layers or len(subject.layers), mtp)


def _finite(values: Iterable[float]) -> Values:
    return tuple(value if math.isfinite(value) else None for value in values)


def _whole_counts(values: Iterable[float]) -> Values:
    """Counts as whole numbers, where they are."""
    finite = _finite(values)
    return tuple(
        int(value) if value is not None and value.is_integer() else value for value in finite
    )


def _whole(value: object) -> int | None:
    return int(str(value)) if is_whole_number(value) else None
