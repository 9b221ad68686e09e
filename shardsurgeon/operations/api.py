"""The commands for notebooks and pipelines, called with plain arguments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from os import PathLike
from typing import Any, Unpack, overload

from shardsurgeon.checkpoint.checkpoint import Checkpoint
from shardsurgeon.checkpoint.open import open_model
from shardsurgeon.errors import UsageError
from shardsurgeon.execution.workers import Listener
from shardsurgeon.operations import apply as applying
from shardsurgeon.operations import fit as fitting
from shardsurgeon.operations import inspect as inspection
from shardsurgeon.operations import prune
from shardsurgeon.operations import verify as verification
from shardsurgeon.operations.bars import bars
from shardsurgeon.operations.measured import Evaluation, measuring
from shardsurgeon.operations.places import require_apart
from shardsurgeon.operations.prune import Pruning
from shardsurgeon.operations.python_calls import (
    AllocationName,
    AnyPath,
    KvDtypeName,
    ListsName,
    MtpName,
    PlanOptions,
    RoundingName,
    ScoreValues,
    as_text,
    public,
)
from shardsurgeon.operations.reports import ApplyReport, PushReport
from shardsurgeon.operations.request import Destination, RunOptions
from shardsurgeon.pruning.machines import SEQUENCES, FitRequest, parse_machines
from shardsurgeon.pruning.request import (
    Allocation,
    Lists,
    MtpPolicy,
    Rounding,
    SelectionRequest,
)
from shardsurgeon.scores import files as score_files
from shardsurgeon.scores.shapes import scores_in_memory
from shardsurgeon.scores.table import Scores
from shardsurgeon.storage.files import output_path
from shardsurgeon.units import parse_ratios, parse_size
from shardsurgeon.verification.findings import VerifyReport

inspect = public(inspection.inspect)


@public
def fit(
    model: AnyPath | Checkpoint | None = None,
    scores: AnyPath | Scores | None = None,
    *,
    gpus: str | None = None,
    context: int | None = None,
    sequences: int = SEQUENCES,
    kv_dtype: KvDtypeName = "auto",
    tensor_parallel: int | None = None,
    expert_parallel: bool = False,
    mtp_layers: bool = False,
    family: str | None = None,
) -> fitting.FitReport:
    """Which counts of experts fit which GPUs, and with how much context. Reads headers and JSON.

    gpus: machines such as `8x80GB,2x141GB`, None for the usual ones; context: tokens of a sequence,
    None for 32,768 or what the model is made for; sequences: at the same time; kv_dtype: of keys
    and values, `auto` as the model says; tensor_parallel: GPUs that split each layer, None for all;
    expert_parallel: whole experts on one GPU each; mtp_layers: count them as loaded; scores: what
    each count drops of them. Raises UsageError for words that are no machine and a context beyond
    the model's, FamilyError where the model's attention is unknown.

    >>> report = shardsurgeon.fit("fixtures/kimi_k25", gpus="1x24GB", context=4096)
    >>> report.machines[0].kept, report.sequence_nbytes
    (32, 786432)
    """
    request = FitRequest(
        machines=() if gpus is None else parse_machines(gpus, "gpus"),
        context=context,
        sequences=sequences,
        kv_dtype=kv_dtype,
        tensor_parallel=tensor_parallel,
        expert_parallel=expert_parallel,
        mtp=mtp_layers,
    )
    return fitting.fit(model, request, scores=scores, family=family)


@public
def read_scores(path: AnyPath | ScoreValues) -> Scores:
    """Read a score file: `.pt`, `.pth`, `.safetensors`, `.npz`, `.json` or `.jsonl`.

    A file of another name is recognised by its first bytes. Gives every metric of the file as
    float64 [experts] per layer, in the units of the file. Nothing in a `.pt` file is executed.
    What is no path is taken for the scores themselves: `{layer: numbers}`, `{layer: {metric:
    numbers}}` or a table with a row for each MoE layer, of lists, numpy's arrays or torch's
    tensors, which are copied.

    Raises ScoreError where the file cannot be read, is hostile or broken, or does not hold one
    number per expert and layer.

    >>> scores = shardsurgeon.read_scores("fixtures/kimi_k25/scores.pt")
    >>> scores.metrics[:3], scores.facts
    (('ean_mean', 'ean_sum', 'expert_frequency'), {'total_tokens': 4096})
    >>> shardsurgeon.read_scores({1: [0.5, 0.25], 2: [0.125, 1.0]})
    scores: saliency of 2 experts in 2 layers
    """
    if isinstance(path, str | PathLike):
        return score_files.read_scores(path)
    return scores_in_memory(path)


@public
def open_checkpoint(
    model: AnyPath, *, family: AnyPath | None = None, follow_links: bool = False
) -> Checkpoint:
    """Open a model: its headers and JSON files, no weights.

    model: a folder or an address (`org/name`, `s3://…`). family, follow_links: as for `plan`.
    Raises CheckpointError or one of its subclasses where a file is missing, broken or contradicts
    another one, FamilyError where the declaration cannot be used.

    >>> checkpoint = shardsurgeon.open_checkpoint("fixtures/kimi_k25")
    >>> len(checkpoint.shards), checkpoint.num_tensors, checkpoint.total_size
    (5, 944, 657568)
    """
    return open_model(model, as_text(family), follow_links=follow_links)


@overload
def plan(
    checkpoint: Checkpoint | AnyPath,
    scores: Scores | AnyPath | ScoreValues | None = None,
    *,
    ratio: float | str | None = None,
    **options: Unpack[PlanOptions],
) -> Pruning: ...


@overload
def plan(
    checkpoint: Checkpoint | AnyPath,
    scores: Scores | AnyPath | ScoreValues | None = None,
    *,
    ratio: list[float] | list[str] | tuple[float | str, ...],
    **options: Unpack[PlanOptions],
) -> list[Pruning]: ...


@public
def plan(
    checkpoint: Checkpoint | AnyPath,
    scores: Scores | AnyPath | ScoreValues | None = None,
    *,
    ratio: float | str | Sequence[float | str] | None = None,
    keep: int | None = None,
    target_size: int | str | None = None,
    fit: str | None = None,
    gpus: str | None = None,
    context: int | None = None,
    sequences: int = SEQUENCES,
    kv_dtype: KvDtypeName = "auto",
    tensor_parallel: int | None = None,
    expert_parallel: bool = False,
    plan_file: AnyPath | None = None,
    rounding: RoundingName | None = None,
    multiple_of: int | None = None,
    metric: str | None = None,
    preserve_super_experts: bool = False,
    mtp: MtpName = "router-norm",
    allocate: AllocationName = "uniform",
    allow_nonuniform: bool = False,
    lists: ListsName | None = None,
    include: str | Sequence[str] = (),
    exclude: str | Sequence[str] = (),
    sampling: Mapping[str, float] | None = None,
    out: AnyPath | None = None,
    max_shard_size: int | str | None = None,
    family: AnyPath | None = None,
    follow_links: bool = False,
    evaluation: AnyPath | None = None,
) -> Pruning | list[Pruning]:
    """Decide which experts stay and plan every byte of the result. Reads headers, writes nothing.

    checkpoint: a folder, an address (`org/name`, `s3://…`) or what `open_checkpoint` returned.
    scores: a score file, what `read_scores` returned or takes (a dict or an array of numbers);
    None with plan_file.

    Exactly one of these says how many experts stay in each MoE layer:

    - ratio: the fraction to remove, above 0 and below 1, or as `"65%"`; of a list of ratios the
      result is a list of plans;
    - keep: how many to keep;
    - target_size: as many as fit tensor data of this size, in bytes or as `"122GB"`;
    - fit: as many as fit GPUs, such as `"8x80GB"`, with the KV cache of what follows;
    - plan_file: a keep-list that names them.

    context, sequences, kv_dtype, tensor_parallel, expert_parallel: how it is to be served there,
    and on the machines of gpus, whose room the report says: as for `fit`.

    The rest is as on the command line:

    - rounding: how ratio × experts becomes a number, `floor` (the default), `nearest` or `ceil`;
    - multiple_of: raise the kept count to the next multiple of this number;
    - metric: the metric that decides, where the file holds several (`reap` by default);
    - preserve_super_experts: keep experts with extreme activations whatever their scores;
    - mtp: what becomes of next-token-prediction layers without scores: `router-norm` scores them
      by their router rows, `last` repeats the choice of the last layer, `keep` leaves them whole
      where the config has a count for them alone, `drop` removes them;
    - allocate: `uniform`, or layers share one budget: `global` for the least saliency lost on
      average, `waterfill` for the least lost in the worst layer;
    - allow_nonuniform: accept layers that keep different numbers of experts;
    - lists: what lists of expert ids are in a file that does not say it: `kept` or `dropped` in
      plan_file, `best-first` or `worst-first` in scores that rank the experts;
    - include, exclude: globs of files beside the weights to copy, or not, whatever they are;
    - sampling: defaults to write into the result's generation_config.json, `{"min_p": 0.05}`: any
      of temperature, top_p, top_k, min_p, repetition_penalty and max_tokens;
    - out: the folder that `apply` writes, by default named after the model and the ratio;
    - max_shard_size: of the result, in bytes or as `"5GB"`; None keeps the source's shards;
    - family: the file of a declaration, or `auto` to read a model of no declared family;
    - follow_links: take files that are links out of the model's folder, as shards may always be;
      neither of the two with a checkpoint that is already open;
    - evaluation: the file of an `evaluate` of this model; what it measured of this prune is
      `report.measured`, and `apply` keeps a copy, which the model card is written from.

    Raises InputError and its children: for arguments that contradict each other or the model,
    for a file that is missing or broken, for scores or an evaluation that do not fit.

    >>> plan = shardsurgeon.plan("fixtures/kimi_k25", "fixtures/kimi_k25/scores.pt", ratio=0.65)
    >>> plan.report.num_experts_before, plan.report.num_experts_after
    (32, 12)
    """
    limit = _nbytes(max_shard_size, "max_shard_size")
    table = _table(scores)

    def serving(words: str, option: str) -> FitRequest:
        return FitRequest(
            machines=parse_machines(words, option),
            context=context,
            sequences=sequences,
            kv_dtype=kv_dtype,
            tensor_parallel=tensor_parallel,
            expert_parallel=expert_parallel,
        )

    def asked(share: float | str | None) -> SelectionRequest:
        return SelectionRequest(
            ratio=_ratio(share),
            keep=keep,
            target_size=_nbytes(target_size, "target_size"),
            fit=None if fit is None else serving(fit, "fit"),
            plan_file=plan_file,
            rounding=None if rounding is None else Rounding(rounding),
            multiple_of=multiple_of,
            metric=metric,
            preserve_super_experts=preserve_super_experts,
            mtp=MtpPolicy(mtp),
            allocate=Allocation(allocate),
            allow_nonuniform=allow_nonuniform,
            lists=None if lists is None else Lists(lists),
            include=_globs(include),
            exclude=_globs(exclude),
            sampling=dict(sampling or {}),
        )

    def known(requests: list[SelectionRequest]) -> Evaluation | None:
        if evaluation is None:
            return None
        return Evaluation.read(evaluation, measuring(checkpoint, table, requests, declared))

    def planned(model: Checkpoint | AnyPath, request: SelectionRequest, **how: Any) -> Pruning:
        shown = None if gpus is None else serving(gpus, "gpus")
        how |= {"out": out, "max_shard_nbytes": limit, "gpus": shown}
        return prune.plan(model, table, request, **how)

    declared = as_text(family)
    if not isinstance(ratio, list | tuple):
        assert not isinstance(ratio, Sequence) or isinstance(ratio, str)
        how: dict[str, Any] = {"family": declared, "follow_links": follow_links}
        return planned(checkpoint, asked(ratio), evaluation=known([asked(ratio)]), **how)
    if not ratio:
        raise UsageError("ratio", "is an empty list", "give at least one")
    if out is not None:
        problem = f"one folder cannot hold the models of {len(ratio)} ratios"
        raise UsageError("out", problem, "leave it out, and give it to `apply`")
    requests = [asked(each) for each in ratio]
    measured = known(requests)
    if isinstance(checkpoint, Checkpoint):
        how = {"family": declared, "evaluation": measured}
        return [planned(checkpoint, each, **how) for each in requests]
    opened = open_model(checkpoint, declared, follow_links=follow_links)
    plans = (planned(opened, each, evaluation=measured) for each in requests)
    return [replace(each, declared=declared) for each in plans]


@public
def apply(
    plan: Pruning,
    out: AnyPath | None = None,
    *,
    workers: int = 0,
    verify: bool = True,
    restart: bool = False,
    checksums: bool = False,
    view: bool = False,
    progress: bool = False,
    on_progress: Listener | None = None,
    push_to_hub: str | None = None,
    stream_push: str | None = None,
    disk_budget: int | str | None = None,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    card: AnyPath | bool = True,
) -> ApplyReport:
    """Write the pruned model, check it, and only then give its folder its name.

    plan: what `plan` returned. out: the folder to write, by default the one that the plan names.
    workers: threads, 0 for a number that suits the machine. verify: compare the structure of every
    tensor and the bytes of a sample. restart: discard what an interrupted run left, instead of
    going on from there. checksums: record the SHA-256 of the shards too, for which they are read
    once more; that of every other file is always recorded. view: write no shards, but where their
    bytes lie; `materialize` makes the shards. progress: show a bar. on_progress: called often, by
    one thread at a time, with the bytes and shards that are done; what it raises stops the run.

    push_to_hub: a repository, `org/name`, to push the finished folder to. stream_push: one to
    upload every shard to as soon as it is finished, so that nothing stays here; disk_budget: bytes
    or `"20GB"` of shards that may be on the disk meanwhile, by default four of the largest.
    private, revision, create_pr, card: as for `push`.

    Raises UsageError where layers keep different numbers of experts and the plan does not allow
    it, for options of a push where nothing is pushed, or where the Hub refuses; OutputError where
    `out` holds anything but the result of this plan, or belongs to another run; WorkError and its
    children where the work fails. What is finished is kept for a rerun.

    >>> plan = shardsurgeon.plan("fixtures/kimi_k25", "fixtures/kimi_k25/scores.pt", ratio=0.65)
    >>> report = shardsurgeon.apply(plan, "small")
    >>> report.out, report.files, report.verification.holds
    ('small', 22, True)
    """
    if out is not None:
        plan = replace(plan, out=output_path(out))
        require_apart(plan.checkpoint.source, plan.out)
    plan = prune.as_view(plan, is_named=out is not None) if view else plan
    own, with_card = _card(card)
    destination = Destination.of(
        push_to_hub,
        stream_push,
        private=private,
        revision=revision,
        create_pr=create_pr,
        card=own,
        with_card=with_card,
        disk_budget=_nbytes(disk_budget, "disk_budget"),
    )
    options = RunOptions(
        workers=workers,
        verify=verify,
        restart=restart,
        checksums=checksums,
        progress=on_progress,
    )
    with bars(progress):
        return applying.apply(plan, options, destination)


@public
def push(
    pruned: AnyPath,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    card: AnyPath | bool = True,
    family: AnyPath | None = None,
    include: str | Sequence[str] = (),
    exclude: str | Sequence[str] = (),
    follow_links: bool = False,
    disk_budget: int | str | None = None,
    progress: bool = False,
) -> PushReport:
    """Push a folder that `apply` wrote to the Hugging Face Hub, in one commit.

    pruned: the folder, which stays as it is. repo_id: `org/name`, or `name` for one of your own;
    made where it is missing. private: what a repository becomes that is made. revision: the
    branch, made where it is missing; None for main. create_pr: open a pull request instead.
    card: a README.md to use in place of the one that is made; False leaves the source's own.
    family, follow_links: as for `plan`. include: globs of files that are pushed as they are, though
    `apply` did not write them, or wrote something else; exclude: globs of files that are not
    pushed. disk_budget: of a view, whose shards are made on their way: bytes or `"20GB"` of them
    that may be on the disk. progress: show a bar. A rerun uploads nothing that is there already.

    Raises CheckpointError and its children where the folder is not a complete prune, or is not as
    `apply` wrote it (but for README.md, which may be edited), UsageError
    where the Hub refuses the token or the repository, PublishError where the upload fails.

    >>> plan = shardsurgeon.plan("fixtures/kimi_k25", "fixtures/kimi_k25/scores.pt", ratio=0.65)
    >>> written = shardsurgeon.apply(plan, "small")
    >>> report = shardsurgeon.push("small", "me/small", private=True)
    >>> report.repo_id, report.created
    ('me/small', True)
    """
    from shardsurgeon.operations import push as publishing

    destination = Destination(repo_id, private, revision, create_pr, *_card(card))
    with bars(progress):
        return publishing.push(
            pruned,
            destination,
            family=as_text(family),
            include=_globs(include),
            exclude=_globs(exclude),
            follow_links=follow_links,
            disk_budget=_nbytes(disk_budget, "disk_budget"),
        )


def _card(card: AnyPath | bool) -> tuple[AnyPath | None, bool]:
    """(the user's own card, whether there is to be one)."""
    return (None, card) if isinstance(card, bool) else (card, True)


@public
def verify(
    source: AnyPath,
    pruned: AnyPath,
    *,
    sample: int | None = None,
    architecture: bool = False,
    family: AnyPath | None = None,
    follow_links: bool = False,
    progress: bool = False,
) -> VerifyReport:
    """Compare a pruned model with its source: structure, records, and the bytes of every tensor.

    source, pruned: folders or addresses (`org/name`, `s3://…`). sample: tensors per shard whose
    bytes are compared, None for all. architecture: check as well, by names and shapes, that
    transformers' model of the pruned config takes exactly these tensors. family, follow_links:
    as for `plan`. progress: show a bar.

    Differences are in the report, not raised. Raises CheckpointError and its children where a
    model cannot be read, UsageError where the architecture cannot be checked.

    >>> plan = shardsurgeon.plan("fixtures/kimi_k25", "fixtures/kimi_k25/scores.pt", ratio=0.65)
    >>> written = shardsurgeon.apply(plan, "small")
    >>> report = shardsurgeon.verify("fixtures/kimi_k25", "small")
    >>> report.holds, report.tensors_compared
    (True, 404)
    """
    if sample is not None and sample < 1:
        raise UsageError("sample", f"{sample} is less than 1")
    with bars(progress):
        return verification.verify(
            source,
            pruned,
            sample=sample,
            architecture=architecture,
            family=as_text(family),
            follow_links=follow_links,
        )


def _nbytes(size: int | str | None, option: str) -> int | None:
    return parse_size(size, option) if isinstance(size, str) else size


def _ratio(ratio: float | str | None) -> float | None:
    """A ratio, which may be a text such as `65%`."""
    if not isinstance(ratio, str):
        return ratio
    found = parse_ratios(ratio, "ratio")
    if len(found) > 1:
        raise UsageError("ratio", f"'{ratio}' is {len(found)} ratios", f"give {list(found)}")
    return found[0]


def _globs(globs: str | Sequence[str]) -> tuple[str, ...]:
    return (globs,) if isinstance(globs, str) else tuple(globs)


def _table(scores: Scores | AnyPath | ScoreValues | None) -> Scores | AnyPath | None:
    if scores is None or isinstance(scores, Scores | str | PathLike):
        return scores
    return scores_in_memory(scores)
