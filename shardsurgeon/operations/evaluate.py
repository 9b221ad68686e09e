"""The `evaluate` command: what prunes of a model cost, measured before a byte is moved."""

from __future__ import annotations

import hashlib
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from shardsurgeon.checkpoint.anatomy import Anatomy, read_anatomy
from shardsurgeon.checkpoint.checkpoint import Checkpoint
from shardsurgeon.checkpoint.layer_consistency import require_complete
from shardsurgeon.checkpoint.open import files_read, open_model
from shardsurgeon.errors import ScoreError, UsageError
from shardsurgeon.layerwise.damage import (
    FEWEST_TOKENS,
    Candidate,
    Damage,
    LayerDamage,
    LayerSums,
    Predictions,
    damage_of,
)
from shardsurgeon.layerwise.datasets import identity, without_folders
from shardsurgeon.layerwise.dtype_choice import chosen_dtype
from shardsurgeon.layerwise.identity import run_identity
from shardsurgeon.layerwise.parts import short_names
from shardsurgeon.layerwise.preparation import (
    check_vocabulary,
    drawn_samples,
    dtypes_of,
    with_defaults,
    with_dtype,
)
from shardsurgeon.layerwise.request import CalibrationRequest
from shardsurgeon.layerwise.resume import FinishedDamage, Partial, partial_work
from shardsurgeon.layerwise.run import (
    files_named,
    layer_progress,
    require_unchanged_weights,
    states_budget,
)
from shardsurgeon.layerwise.samples import Sample, total_tokens
from shardsurgeon.layerwise.settings import Listener, refuse_missing_gpu, require_packages
from shardsurgeon.operations.evaluation_report import (
    CandidateDamage,
    EvaluationReport,
    PartDamage,
    is_evaluation,
    read_evaluation,
)
from shardsurgeon.operations.measured import main_layers
from shardsurgeon.operations.prune import plan
from shardsurgeon.pruning.keep_lists import KeepList, keep_sha256
from shardsurgeon.pruning.planner import changed_tensors
from shardsurgeon.pruning.request import Allocation, Lists, SelectionRequest
from shardsurgeon.scores.files import read_scores
from shardsurgeon.storage.files import Output, output_path
from shardsurgeon.units import counted

# Counted up where the same request would give other numbers.
_RESULTS = 1


@dataclass(frozen=True, slots=True)
class Prune:
    """A prune that is to be measured. name: how the report calls it."""

    name: str
    request: SelectionRequest


def candidates(
    ratios: Sequence[float],
    keep: int | None,
    plan_files: Sequence[str | os.PathLike[str]],
    metrics: Sequence[str],
    allocate: Allocation,
    lists: Lists | None = None,
) -> list[Prune]:
    """The prunes that are to be measured, named by what tells them apart.

    Every metric at every ratio, and with that count of experts; no metrics: the default one; then
    the keep-lists of each file. lists: what lists are in files that do not say it themselves.
    """
    of_plans = lists if lists in (Lists.KEPT, Lists.DROPPED) else None
    of_scores = lists if of_plans is None else None
    counts: list[dict[str, Any]] = [{"ratio": value} for value in ratios]
    counts += [{"keep": keep}] if keep is not None else []
    found = []
    for metric, count in product(metrics or (None,), counts):
        words = [f"{count['ratio']:g}" if "ratio" in count else f"keep {keep}"]
        words += [metric] if metric is not None and len(metrics) > 1 else []
        words += [allocate.value] if allocate is not Allocation.UNIFORM else []
        request = SelectionRequest(**count, metric=metric, allocate=allocate, lists=of_scores)
        found.append(Prune(" ".join(words), request))
    stems = [Path(file).stem for file in plan_files]
    named = stems if len({*stems}) == len(stems) else [os.fspath(file) for file in plan_files]
    found += [
        Prune(name, SelectionRequest(plan_file=file, lists=of_plans))
        for name, file in zip(named, plan_files, strict=True)
    ]
    return found


def evaluate(
    model: str | os.PathLike[str] | None,
    scores: str | os.PathLike[str] | None,
    prunes: Sequence[Prune],
    request: CalibrationRequest,
    out: str | os.PathLike[str],
    *,
    family: str | None = None,
    restart: bool = False,
    force: bool = False,
    progress: Listener | None = None,
    command: str = "",
) -> EvaluationReport:
    """Run samples through a model and its prunes, side by side, and write what each costs.

    model: a folder or an address, None for the current folder; scores: of the prunes that have no
    keep-list of their own; request: the samples and the machine; out: the report, as JSON; the
    other arguments as for `calibrate`. Where `out` is what this very request gave, nothing is run.
    Raises subclasses of InputError, before the work starts, for what cannot be used, data that are
    too few among it, and subclasses of WorkError where the work fails.
    """
    begin = time.monotonic()
    output = Output(output_path(out), "an evaluation", is_evaluation, force)
    output = replace(output, folder_is_made=True).apart_from(files_named(request))
    require_packages()
    refuse_missing_gpu(request.settings.device)
    checkpoint = open_model(model, family, follow_links=True)
    output = output.apart_from(files_read(checkpoint, family))
    given = [scores, *(prune.request.plan_file for prune in prunes)]
    output = output.apart_from(Path(file) for file in given if file is not None)
    anatomy = read_anatomy(checkpoint)
    require_complete(anatomy.incomplete, None, checkpoint.location)
    keeps = _keep_lists(checkpoint, scores, prunes)
    request = with_defaults(request, checkpoint, anatomy)
    possible = dtypes_of(request, checkpoint, anatomy, None)
    drawn = drawn_samples(request, checkpoint, None, answers=True)
    check_vocabulary(checkpoint, anatomy, drawn.samples)
    data = _Data.of(drawn.samples)
    digests = [keep_sha256(keep, main_layers(anatomy)) for keep in keeps]
    run = run_identity(request, checkpoint, data.samples, [request.settings.device])
    asked = f"{_RESULTS} {run.result} {' '.join(digests)}"
    run = replace(run, result=hashlib.sha256(asked.encode()).hexdigest(), command=command)
    known = hashlib.sha256(f"{run.result} {run.source}".encode()).hexdigest()
    if (before := _before(output, known)) is not None:
        return before
    layers = anatomy.num_layers
    with partial_work(Path(out), run, FinishedDamage, layers, restart=restart) as work:
        resumed = work.num_resumed
        with chosen_dtype(possible, work.activations) as choice:
            asked_of = with_dtype(request, choice.dtype)
            candidates = list(_candidates(checkpoint, anatomy, prunes, keeps))
            found = _run(checkpoint, asked_of, data, candidates, work, progress)
        require_unchanged_weights(checkpoint, run, work)
        original = data.damage(found[0])
        measured = []
        for place, (candidate, digest) in enumerate(zip(candidates, digests, strict=True)):
            made = data.candidate(candidate, digest, original, found[place + 1])
            own = partial(_layers, candidate.keep, work.layers.layers, place)
            measured.append(_with_layers(made, own))
        report = EvaluationReport(
            model=checkpoint.source.name,
            revision=checkpoint.source.revision,
            config_sha256=checkpoint.config_sha256,
            run=known,
            out=str(out),
            dataset=without_folders(request.dataset),
            samples=len(data.samples),
            tokens=total_tokens(data.samples),
            predicted=data.begins[-1],
            num_experts=anatomy.num_experts,
            original=original,
            original_parts=data.parts_of(found[0]),
            candidates=tuple(measured),
            dtype=choice.dtype,
            device=request.settings.device,
            layers_resumed=resumed,
            seconds=time.monotonic() - begin,
            notes=(*checkpoint.notes, *data.notes),
        )
        output.write(report.file())
        work.clear()
    return report


def _keep_lists(
    checkpoint: Checkpoint, scores: str | os.PathLike[str] | None, prunes: Sequence[Prune]
) -> list[KeepList]:
    """What each prune keeps, all else of its plan dropped: the plan of a large model is large.

    Raises UsageError for no prune, or two of one name, and what `plan` raises.
    """
    if not prunes:
        remedy = "give --ratio, --keep or --plan"
        raise UsageError("selection", "nothing says what to evaluate", remedy)
    twice = next((name for name, n in Counter(p.name for p in prunes).items() if n > 1), None)
    if twice is not None:
        raise UsageError("selection", f"'{twice}' is given twice", "give each prune once")
    of_scores = any(prune.request.plan_file is None for prune in prunes)
    if scores is not None and not of_scores:
        problem = "is not used: every prune has a keep-list of its own"
        raise UsageError(scores, problem, "leave it out, or say how much with --ratio")
    table = read_scores(scores) if scores is not None else None
    keeps = []
    for prune in prunes:
        request, given = prune.request, table
        if request.plan_file is not None:
            # Measured beside the others, layers may differ: nothing is written.
            request, given = replace(request, allow_nonuniform=True), None
        keeps.append(plan(checkpoint, given, request).decision.keep)
    return keeps


def _candidates(
    checkpoint: Checkpoint, anatomy: Anatomy, prunes: Sequence[Prune], keeps: Sequence[KeepList]
) -> Iterator[Candidate]:
    for prune, keep in zip(prunes, keeps, strict=True):
        yield Candidate(prune.name, keep, changed_tensors(checkpoint, anatomy, keep))


def _before(output: Output, run: str) -> EvaluationReport | None:
    """What the file holds, where that is what this very run gives. Raises OutputError for any
    other file, unless it is to be replaced."""
    if not output.path.is_file():
        return None
    with suppress(ScoreError):
        found = read_evaluation(output.path)
        if found.run == run:
            return replace(found, out=str(output.path))
    if not output.force:
        output.refuse()
    return None


def _run(
    checkpoint: Checkpoint,
    request: CalibrationRequest,
    data: _Data,
    candidates: Sequence[Candidate],
    partial: Partial[FinishedDamage],
    progress: Listener | None,
) -> list[Predictions]:
    from shardsurgeon.layerwise.activations import ActivationStore
    from shardsurgeon.layerwise.evaluate import evaluate_layers

    lengths = [sample.num_tokens for sample in data.samples] * (len(candidates) + 1)
    with (
        layer_progress("evaluating", progress) as report,
        ActivationStore(partial.activations, lengths, states_budget(request)) as store,
    ):
        return evaluate_layers(
            checkpoint,
            data.samples,
            data.parts,
            candidates,
            request.settings,
            store,
            partial.layers,
            report,
            memory=request.memory,
        )


def _with_layers(
    made: CandidateDamage, of: Callable[[Sequence[int], int], tuple[LayerDamage, ...]]
) -> CandidateDamage:
    """The same with its layers, on all tokens and, of several parts, on each part's.

    of: (numbers of parts, their tokens) → what the layers do on them.
    """
    every = of(range(len(made.parts)), made.damage.tokens)
    if len(made.parts) == 1:
        return replace(made, layers=every)
    parts = (
        replace(part, layers=of([number], part.damage.tokens))
        for number, part in enumerate(made.parts)
    )
    return replace(made, layers=every, parts=tuple(parts))


def _layers(
    keep: KeepList, found: Mapping[int, LayerSums], place: int, parts: Sequence[int], tokens: int
) -> tuple[LayerDamage, ...]:
    """What candidate number `place` does to each layer's output, on some parts' tokens."""
    made = []
    for layer, sums in found.items():
        error, cosine = sums.compared[place][:, parts].sum(1) / tokens
        lost = None
        if sums.gates is not None:
            gates, kept = sums.gates[parts].sum(0), keep.layers.get(layer)
            gone = gates[list(kept.pruned)].sum() if kept is not None else 0.0
            lost = float(gone / gates.sum()) if gates.sum() else 0.0
        made.append(LayerDamage(layer, float(error), float(cosine), lost))
    return tuple(made)


@dataclass(frozen=True, slots=True)
class _Data:
    """The samples of an evaluation.

    parts: the number of each one's part of the data; names: of parts; begins: where the predicted
    tokens of each begin, and how many there are of all.
    """

    samples: list[Sample]
    parts: list[int]
    names: list[str]
    begins: list[int]
    notes: tuple[str, ...]

    @classmethod
    def of(cls, drawn: Sequence[Sample]) -> _Data:
        """Leave out samples that predict nothing; parts are in the order of the dataset.

        Raises UsageError for a part with fewer than FEWEST_TOKENS to predict.
        """
        sources = list(dict.fromkeys(sample.source for sample in drawn))
        short = short_names(sources)
        names = [short[identity(source)] for source in sources]
        samples = [sample for sample in drawn if _predicted(sample)]
        parts = [sources.index(sample.source) for sample in samples]
        found = Counter(parts)
        tokens = Counter[int]()
        for part, sample in zip(parts, samples, strict=True):
            tokens[part] += _predicted(sample)
        for part, name in enumerate(names):
            if tokens[part] < FEWEST_TOKENS:
                problem = f"{name} has {counted(tokens[part], 'token')} to predict in "
                problem += f"{counted(found[part], 'sample')}, and a 99th percentile takes "
                problem += f"{FEWEST_TOKENS}"
                remedy = "give more or longer records (--samples, --max-length)"
                raise UsageError("--dataset", problem, remedy)
        begins = np.cumsum([0, *map(_predicted, samples)]).tolist()
        left = len(drawn) - len(samples)
        notes = (f"{counted(left, 'sample')} left out: no token to predict",) if left else ()
        return cls(samples, parts, names, begins, notes)

    def damage(self, found: Predictions) -> Damage:
        """Over all samples."""
        return self._of(found, range(len(self.samples)))

    def parts_of(self, found: Predictions) -> tuple[PartDamage, ...]:
        """Part by part."""
        chosen: list[list[int]] = [[] for _ in self.names]
        for sample, part in enumerate(self.parts):
            chosen[part].append(sample)
        return tuple(
            PartDamage(name, len(samples), self._of(found, samples))
            for name, samples in zip(self.names, chosen, strict=True)
        )

    def candidate(
        self, candidate: Candidate, digest: str, original: Damage, found: Predictions
    ) -> CandidateDamage:
        """What was found of a candidate, its layers left out."""
        keep, parts, whole = candidate.keep, self.parts_of(found), self.damage(found)
        worst = max(parts, key=lambda part: part.damage.kl_mean)
        total = sum(kept.num_experts for kept in keep.layers.values())
        return CandidateDamage(
            name=candidate.name,
            kept=keep.kept,
            removed=sum(len(kept.pruned) for kept in keep.layers.values()) / total,
            keep_sha256=digest,
            damage=whole,
            perplexity_ratio=whole.perplexity / original.perplexity,
            parts=parts,
            worst_part=worst.name if len(parts) > 1 else None,
            layers=(),
        )

    def _of(self, found: Predictions, chosen: Sequence[int]) -> Damage:
        answers = [sample.is_answer for sample in self.samples]
        return damage_of(found, self.begins, answers, chosen)


def _predicted(sample: Sample) -> int:
    """How many of a sample's tokens are predicted: what counts and has a token before it."""
    return sample.num_counted - (sample.counted is None or bool(sample.counted[0]))
