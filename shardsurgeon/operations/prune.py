"""Scores and a model become a plan, which `apply` carries out."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from shardsurgeon.checkpoint.anatomy import Anatomy, read_anatomy
from shardsurgeon.checkpoint.checkpoint import Checkpoint
from shardsurgeon.checkpoint.open import already_open, files_read, open_model, reopened
from shardsurgeon.checkpoint.provenance import rounding_alone
from shardsurgeon.checkpoint.recognition import PLAN, SCORES
from shardsurgeon.checkpoint.wrong_files import files_of, is_model, require_file
from shardsurgeon.errors import KeepListError, OutputError, OutputWriteError, ScoreError
from shardsurgeon.execution.outputs import holds_result, output_sizes
from shardsurgeon.execution.plan import Plan
from shardsurgeon.execution.view import plan_view
from shardsurgeon.operations.measured import Evaluation, measuring
from shardsurgeon.operations.places import default_place, require_apart
from shardsurgeon.operations.python_calls import public
from shardsurgeon.operations.recipe import Recipe
from shardsurgeon.operations.serving import Serving, not_for_stock_engines, serve_words, serving_of
from shardsurgeon.pruning.decide import Decision, decide
from shardsurgeon.pruning.fit import Fit, MachineFit
from shardsurgeon.pruning.keep_list_files import is_plan
from shardsurgeon.pruning.keep_lists import write_plan
from shardsurgeon.pruning.machines import FitRequest
from shardsurgeon.pruning.output_files import assemble
from shardsurgeon.pruning.overrides import Overrides, engine_overrides
from shardsurgeon.pruning.plan_model import facts_of
from shardsurgeon.pruning.planner import SizeEstimate, checked_shards
from shardsurgeon.pruning.report import PlanReport, plan_report
from shardsurgeon.pruning.request import MtpPolicy, SelectionRequest
from shardsurgeon.reports import Titled
from shardsurgeon.scores.files import read_scores
from shardsurgeon.scores.table import Scores
from shardsurgeon.storage.files import Output, free_space, output_path, sha256_of
from shardsurgeon.storage.limits import uncollected
from shardsurgeon.storage.open import hub_name
from shardsurgeon.storage.phases import phase
from shardsurgeon.storage.system import default_system


@dataclass(frozen=True, repr=False)
class Pruning(Titled):
    """A prune that is decided and planned, and not yet done: what `shardsurgeon.plan` returns.

    decision: which experts stay; plan: the bytes to move; out: the folder they go to;
    max_shard_nbytes: the limit of a shard's size in bytes, None for the source's shards;
    declared: what --family said; evaluation: what it was measured by, None where that is unknown;
    gpus: machines that the report says the room of; note: what else it says; view: whether `apply`
    writes a view in place of shards.

    >>> plan = shardsurgeon.plan("fixtures/qwen3_moe", "fixtures/qwen3_moe/scores.pt", keep=8)
    >>> plan.report.total_size_before, plan.report.total_size_after
    (597056, 372800)
    >>> plan.write_plan("keep.json")
    True
    >>> again = shardsurgeon.plan("fixtures/qwen3_moe", plan_file="keep.json")
    >>> again.report.total_size_after == plan.report.total_size_after
    True
    """

    checkpoint: Checkpoint
    anatomy: Anatomy
    request: SelectionRequest
    decision: Decision
    plan: Plan
    out: Path
    max_shard_nbytes: int | None = None
    declared: str | None = None
    evaluation: Evaluation | None = None
    gpus: FitRequest | None = None
    note: str = ""
    view: bool = False

    @property
    def title(self) -> str:
        """That of its report."""
        return self.report.title

    def shown(self) -> Iterable[tuple[str, Any]]:
        """What its report shows."""
        return self.report.shown()

    @cached_property
    def report(self) -> PlanReport:
        """What it would do."""
        with phase("planning"), uncollected():
            found = plan_report(
                self.checkpoint,
                self.anatomy,
                self.request,
                self.decision,
                self.plan,
                str(self.out),
            )
        if self.evaluation is not None:
            found = self.evaluation.told(found, self.decision.keep, self.anatomy)
        notes = found.notes if not self.note else (*found.notes, self.note)
        told = self.overrides.values if not self.overrides.problem else None
        return replace(
            found,
            space_free=_free_space(self.out),
            notes=notes,
            fits=self._fits(),
            hf_overrides=told,
        )

    def _fits(self) -> tuple[MachineFit, ...]:
        """What the result leaves of the machines that were named."""
        if self.gpus is None:
            return ()
        fit = Fit(self.checkpoint, self.anatomy, self.gpus)
        layers = self.decision.keep.layers
        kept = {layer: len(keep.retained) for layer, keep in layers.items()}
        return tuple(fit.on(machine, [kept]) for machine in self.gpus.machines)

    @cached_property
    def written(self) -> Plan:
        """The bytes to move to `out`: the plan, or that of its view. Raises UsageError where no
        view can be made of the source."""
        if not self.view:
            return self.plan
        return plan_view(self.plan, self.checkpoint.source, self.out)

    @cached_property
    def overrides(self) -> Overrides:
        """What an engine is told that serves the model itself with this plan."""
        return engine_overrides(self.checkpoint, dict(self.plan.generated_files))

    @property
    def serving(self) -> Serving:
        """How the result is served."""
        layers = self.decision.keep.layers
        kept = {layer: len(keep.retained) for layer, keep in layers.items()}
        return serving_of(self.checkpoint, self.anatomy, kept)

    @public
    def write_plan(self, path: str | os.PathLike[str], *, force: bool = False) -> bool:
        """Save the keep-lists as a plan.json that `--plan` reads; False where it is saved already.

        force: replace another plan of ours. Raises OutputError for any other file that exists, a
        file that this plan was made from among them.
        """
        return save_plan(self, path, force=force)


def save_plan(pruning: Pruning, path: str | os.PathLike[str], *, force: bool = False) -> bool:
    """As `Pruning.write_plan`, with messages for the command line."""
    data = write_plan(
        pruning.decision.keep,
        selection=_selection_settings(pruning),
        source={
            "name": pruning.checkpoint.source.name,
            "config_sha256": pruning.checkpoint.config_sha256,
        },
        model=facts_of(pruning.checkpoint, pruning.anatomy),
    )
    model = pruning.checkpoint.source
    inputs = [Path(origin) for _, origin, _ in pruning.plan.score_files]
    inputs += filter(None, (model.local_path(file.name) for file in pruning.plan.source_files))
    inputs += files_read(pruning.checkpoint, pruning.declared)
    output = Output(output_path(path), "a plan", is_plan, force)
    return output.apart_from(inputs).write(data)


def serve_planned(pruning: Pruning, plan_file: str) -> tuple[str, ...] | None:
    """The command that serves the model itself as a saved plan leaves it, None where there is none.

    `Pruning.overrides` says why there is none of a model that a view can be made of.
    """
    source, serving = pruning.checkpoint.source, pruning.serving
    name = hub_name(source)
    is_read = name.count("/") == 1 if name else not source.is_remote
    if not is_read or not serving.by_vllm or pruning.overrides.problem:
        return None
    told = {"plan": plan_file}
    if pruning.request.mtp is not MtpPolicy.ROUTER_NORM:
        told["mtp"] = pruning.request.mtp.value
    return serve_words(
        name or source.location,
        source.revision if name else None,
        serving,
        planned=told,
        overrides=pruning.overrides.values,
    )


def plan(
    model: str | os.PathLike[str] | Checkpoint | None,
    scores: str | os.PathLike[str] | Scores | None,
    request: SelectionRequest,
    *,
    out: str | os.PathLike[str] | None = None,
    max_shard_nbytes: int | None = None,
    family: str | None = None,
    follow_links: bool = False,
    recipe: Recipe | None = None,
    evaluation: str | os.PathLike[str] | Evaluation | None = None,
    gpus: FitRequest | None = None,
) -> Pruning:
    """Decide which experts stay and plan every byte of the result. Writes nothing.

    model: a folder, an opened checkpoint, or None for the current folder; scores: a score
    file, a table that `read_scores` gave, or None with a keep-list file; out: where the
    result is to go (None: named after the model); max_shard_nbytes: None keeps the source's
    cutting; family: a file with the model's declaration, or `auto` to read a model without
    one, where that leaves no doubt; follow_links: take files that are links out of the model;
    recipe: what the result keeps a copy of, and so it does of an evaluation, which says in the
    report what the plan costs; gpus: machines whose room the report says. Raises InputError and
    its children for whatever does not fit.
    """
    place = None if out is None else output_path(out)
    _require_files(model, scores, request.plan_file)
    if evaluation is not None and not isinstance(evaluation, Evaluation):
        evaluation = Evaluation.read(evaluation, measuring(model, scores, [request], family))
    if isinstance(model, Checkpoint) and follow_links:
        raise already_open("follow_links")
    checkpoint = reopened(model, family, follow_links=follow_links)
    if evaluation is not None:
        evaluation.require_of(checkpoint)
    with phase("planning"), uncollected():
        made = _plan(
            checkpoint, scores, request, place, max_shard_nbytes, family, recipe, evaluation
        )
        return made if gpus is None else replace(made, gpus=gpus)


def _plan(
    checkpoint: Checkpoint,
    scores: str | os.PathLike[str] | Scores | None,
    request: SelectionRequest,
    place: Path | None,
    max_shard_nbytes: int | None,
    family: str | None,
    recipe: Recipe | None,
    evaluation: Evaluation | None,
) -> Pruning:
    """`plan`, of a checkpoint that is open; place: where the result is to go."""
    anatomy = read_anatomy(checkpoint)
    given = _digests(scores, request.plan_file)
    table = scores if isinstance(scores, Scores) or scores is None else read_scores(scores)
    note = ""
    if request.fit is not None:
        request, note = _fitted(checkpoint, anatomy, request, request.fit)
    estimate = SizeEstimate(checkpoint, anatomy, mtp=request.mtp)
    decision = decide(checkpoint, anatomy, table, request, estimate.nbytes)
    shards = checked_shards(
        checkpoint,
        anatomy,
        decision.keep,
        drop_mtp=decision.drop_mtp,
        max_shard_nbytes=max_shard_nbytes,
    )
    folder = place if place is not None else default_out(checkpoint, decision)
    require_apart(checkpoint.source, folder)
    kept = None if recipe is None else partial(recipe.copy_for, checkpoint)
    plan = assemble(
        checkpoint,
        anatomy,
        request,
        decision,
        shards,
        given,
        max_shard_nbytes,
        kept,
        {} if evaluation is None else evaluation.files,
    )
    made = Pruning(
        checkpoint,
        anatomy,
        request,
        decision,
        plan,
        folder,
        max_shard_nbytes,
        family,
        evaluation,
    )
    return replace(made, note=note) if note else made


def _fitted(
    checkpoint: Checkpoint, anatomy: Anatomy, request: SelectionRequest, asked: FitRequest
) -> tuple[SelectionRequest, str]:
    """The request with the largest count that fits in place of --fit, and a note on it."""
    fit = Fit(checkpoint, anatomy, asked)
    (machine,) = asked.machines
    kept = fit.largest(machine)
    note = f"{kept} experts are the most that fit {machine.label} with {asked.sequences} sequences "
    note += f"of {fit.context:,} tokens: `vllm serve ... {fit.on(machine, [kept]).flags}`"
    return replace(request, fit=None, keep=kept), note


def compare(
    model: str | os.PathLike[str] | None,
    scores: str | os.PathLike[str] | None,
    requests: Sequence[SelectionRequest],
    *,
    family: str | None = None,
    follow_links: bool = False,
    evaluation: str | os.PathLike[str] | None = None,
    gpus: FitRequest | None = None,
) -> list[PlanReport]:
    """What each of several requests would do to one model, which is opened once.

    Arguments and errors are those of `plan`. A plan of a large model takes much memory, so each is
    let go of before the next is made.
    """
    known = None
    if evaluation is not None:
        known = Evaluation.read(evaluation, measuring(model, scores, requests, family))
    checkpoint = open_model(model, family, follow_links=follow_links)
    return [
        plan(checkpoint, scores, request, evaluation=known, gpus=gpus).report
        for request in requests
    ]


def as_view(pruning: Pruning, *, is_named: bool) -> Pruning:
    """The prune, to be written as a view; is_named: whether the user said where to.

    Else it goes beside where its shards would: `<model name>-REAP-65pct-view`.
    """
    out = pruning.out if is_named else pruning.out.with_name(f"{pruning.out.name}-view")
    require_apart(pruning.checkpoint.source, out)
    return replace(pruning, out=out, view=True)


def require_ready(pruning: Pruning, *, stays: bool = True) -> None:
    """Raise UsageError where layers keep different numbers and the request does not allow it,
    OutputError where there is an OUT already that is not this prune's result.

    stays: whether the result stays on this machine.
    """
    keep = pruning.decision.keep
    # A view is loaded by our own loaders, which read a count per layer.
    if not keep.is_uniform and not pruning.request.allow_nonuniform and not pruning.view:
        counts = [len(layer.retained) for layer in keep.layers.values()]
        remedy = (
            "give it for an engine that reads a count per layer, or make a view with `apply --view`"
        )
        raise not_for_stock_engines(pruning.checkpoint, pruning.anatomy, counts, remedy)
    if os.path.lexists(pruning.out):
        plan = pruning.written
        if not stays or not holds_result(pruning.out, plan, output_sizes(plan)):
            raise OutputError(
                pruning.out, "exists and holds something else", "choose another -o or remove it"
            )


def _free_space(out: Path) -> int | None:
    """Free bytes where a result would go; None where the disk does not say it."""
    try:
        return free_space(out, default_system())
    except OutputWriteError:
        return None


def _require_files(
    model: str | os.PathLike[str] | Checkpoint | None,
    scores: str | os.PathLike[str] | Scores | None,
    plan_file: str | os.PathLike[str] | None,
) -> None:
    """Raise ScoreError or KeepListError for a file that is not there, before the model is read."""
    folder = "." if model is None else model if isinstance(model, str | os.PathLike) else None
    if plan_file is not None:
        require_file(plan_file, PLAN, KeepListError, folder)
    elif isinstance(scores, str | os.PathLike):
        if os.path.isdir(scores) and is_model(scores):
            problem = "is a model's folder, and SCORES is a file"
            found = files_of(SCORES, scores)
            remedy = f"give it with --model, and {found[0] if found else 'a score file'} as SCORES"
            raise ScoreError(scores, problem, remedy)
        require_file(scores, SCORES, ScoreError, folder)


def _digests(*files: object) -> dict[Path, str]:
    """SHA-256 of the files among `files`, by absolute path, before anything reads them.

    What changes after that is noticed when the file is copied. A pipe can be read but once and is
    not among them; of a file that cannot be read, its reader says so.
    """
    paths = [Path(file).absolute() for file in files if isinstance(file, str | os.PathLike)]
    return {
        path: sha256_of(path) for path in paths if os.path.isfile(path) and os.access(path, os.R_OK)
    }


def _selection_settings(pruning: Pruning) -> dict[str, object]:
    request, decision = pruning.request, pruning.decision
    return {
        "selection": request.selection,
        "ratio": decision.ratio,
        "rounding": request.effective_rounding,
        "metric": decision.metric,
        "kept": decision.kept,
        "allocate": request.allocate,
        "mtp": request.mtp,
    }


def default_out(checkpoint: Checkpoint, decision: Decision) -> Path:
    """`<model name>-REAP-65pct`, or `-REAP-134e` where no ratio was asked for, by the request or
    by its plan, or where more than rounding lies between it and what is removed.

    Where layers keep different numbers it is their mean, and `-nonuniform` follows. In the current
    folder; where that is the model itself, beside the model, because nothing is ever written into
    a source. Raises OutputError where that would be inside a Hub cache.
    """
    keep, ratio = decision.keep, decision.ratio
    layers = [layer for number, layer in keep.layers.items() if number not in keep.apart]
    removed = [(layer.num_experts, len(layer.pruned)) for layer in layers]
    if ratio is not None and rounding_alone(ratio, removed):
        what = f"{_percent(ratio)}pct"
    else:
        what = f"{round(sum(len(layer.retained) for layer in layers) / len(layers))}e"
    what += "" if keep.is_uniform else "-nonuniform"
    name = f"{checkpoint.source.name}-REAP-{what}"
    return default_place(checkpoint.source, name)


def _percent(ratio: float) -> str:
    return f"{ratio * 100:.6g}"
