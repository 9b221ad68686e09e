"""Evaluations, for notebooks and pipelines."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import Literal

from shardsurgeon.layerwise.settings import Listener, Settings, Tokens
from shardsurgeon.operations import evaluation_report
from shardsurgeon.operations.bars import bars
from shardsurgeon.operations.evaluation_report import EvaluationReport
from shardsurgeon.operations.python_calls import (
    AllocationName,
    AnyPath,
    ListsName,
    as_text,
    public,
)
from shardsurgeon.operations.score_api import Dtype
from shardsurgeon.pruning.request import Allocation, Lists
from shardsurgeon.units import parse_ratios, parse_size

read_evaluation = public(evaluation_report.read_evaluation)


@public
def evaluate(
    model: AnyPath | None,
    scores: AnyPath | None = None,
    *,
    dataset: str,
    out: AnyPath,
    ratio: float | str | Sequence[float | str] = (),
    keep: int | None = None,
    plan_files: AnyPath | Sequence[AnyPath] = (),
    metric: str | Sequence[str] = (),
    allocate: AllocationName = "uniform",
    lists: ListsName | None = None,
    samples: int | None = None,
    max_length: int | None = None,
    seed: int = 42,
    device: str = "cpu",
    dtype: Dtype | None = None,
    batch_size: int | Literal["auto"] = "auto",
    memory: int | str | None = None,
    activation_budget: int | str | None = None,
    field: str | None = None,
    tokens: Tokens = "all",
    skip_invalid: bool = False,
    tokenizer: str | None = None,
    trust_remote_code: bool = False,
    family: AnyPath | None = None,
    restart: bool = False,
    force: bool = False,
    progress: bool = False,
    on_progress: Listener | None = None,
) -> EvaluationReport:
    """Measure what prunes of a model cost, side by side with it, and write that as JSON.

    model: a folder or an address, None for the current folder. scores: a score file, None where
    plan_files say all. out: the evaluation, which `plan` and model cards read.

    What is measured, all of it in one pass over the weights: ratio, keep: as for `plan`; ratio may
    be a list. plan_files: keep-lists, one or a list. metric: which of the scores decides, or a
    list, each of which is measured. allocate, lists: as for `plan`.

    The rest is as for `calibrate`. A record that has a `completion` beside its prompt is an answer:
    it is forced, and its tokens alone are predicted.

    Needs `shardsurgeon[calibrate]`. Where `out` is what this very request gave, nothing is run;
    what is finished of an interrupted run is kept for a rerun. Raises children of InputError,
    before the work starts, for what cannot be used, and of WorkError where the work fails.

    >>> with open("chats.txt", "w") as file:
    ...     written = file.write("the cat sat on the mat, and the dog sat on the cat\\n" * 8)
    >>> model, scores = "fixtures/qwen3_moe", "fixtures/qwen3_moe/scores.pt"
    >>> report = shardsurgeon.evaluate(
    ...     model, scores, ratio=0.5, dataset="chats.txt:8", out="evaluation.json", dtype="float32"
    ... )
    >>> plan = shardsurgeon.plan(model, scores, ratio=0.5, evaluation="evaluation.json")
    >>> plan.report.measured.kl_mean == report.candidates[0].damage.kl_mean
    True
    """
    from shardsurgeon.layerwise.request import CalibrationRequest
    from shardsurgeon.operations import evaluate as evaluating

    request = CalibrationRequest(
        dataset,
        Settings(device, dtype, batch_size, seed),
        samples,
        max_length,
        activation_budget=_nbytes(activation_budget, "activation_budget"),
        field=field,
        tokenizer=tokenizer,
        trust_remote_code=trust_remote_code,
        skip_invalid=skip_invalid,
        tokens=tokens,
        memory=_nbytes(memory, "memory"),
    )
    prunes = evaluating.candidates(
        _ratios(ratio),
        keep,
        [plan_files] if isinstance(plan_files, str | PathLike) else plan_files,
        [metric] if isinstance(metric, str) else metric,
        Allocation(allocate),
        None if lists is None else Lists(lists),
    )
    with bars(progress):
        return evaluating.evaluate(
            model,
            scores,
            prunes,
            request,
            out,
            family=as_text(family),
            restart=restart,
            force=force,
            progress=on_progress,
        )


def _ratios(ratio: float | str | Sequence[float | str]) -> list[float]:
    """Numbers, each of which may be a text such as `65%`."""
    if isinstance(ratio, str):
        return list(parse_ratios(ratio, "ratio"))
    if isinstance(ratio, Sequence):
        return [number for each in ratio for number in _ratios(each)]
    return [ratio]


def _nbytes(size: int | str | None, name: str) -> int | None:
    return parse_size(size, name) if isinstance(size, str) else size
