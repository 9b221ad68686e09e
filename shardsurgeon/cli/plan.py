"""`shardsurgeon plan`: what a prune would do, in a form a person can decide from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict

import click

from shardsurgeon.cli.options import (
    family_option,
    json_option,
    model_option,
    scores_argument,
    selection_options,
)
from shardsurgeon.cli.output import print_json, print_lines
from shardsurgeon.cli.plantext import comparison_lines, plan_lines
from shardsurgeon.errors import UsageError
from shardsurgeon.operations.reports import PlanReport
from shardsurgeon.pruning.counts import SelectionRequest


@click.command("plan")
@scores_argument
@model_option
@selection_options
@family_option
@click.option("-o", "plan_out", metavar="PLAN.JSON", help="Save the keep-lists, for `--plan`.")
@json_option
def plan_command(
    scores: str | None,
    model: str | None,
    requests: Sequence[SelectionRequest],
    family: str | None,
    plan_out: str | None,
    as_json: bool,
) -> None:
    """Show what would be removed; writes no model.

    SCORES is a file of expert scores: .pt, .safetensors, .npz or .json. Say how
    much to remove with one of --ratio, --keep, --target-size and --plan. Several
    ratios, separated by commas, are compared.

    \b
    Examples:
      shardsurgeon plan scores.pt --ratio 0.65
      shardsurgeon plan scores.pt --ratio 0.5,0.65,0.75
      shardsurgeon plan scores.pt --keep 72 --model /models/Kimi-K2.5
      shardsurgeon plan scores.pt --target-size 122GB -o plan.json
      shardsurgeon plan scores.pt --ratio 0.5 --allocate global
    """
    from shardsurgeon.operations import operations

    if plan_out is not None and len(requests) > 1:
        problem = f"one file cannot hold the keep-lists of {len(requests)} ratios"
        raise UsageError("-o", problem, "give a single --ratio")
    prunings = [operations.plan(model, scores, request, family=family) for request in requests]
    if plan_out is not None:
        prunings[0].write_plan(plan_out)
    _show([pruning.report for pruning in prunings], plan_out, as_json)


def _show(reports: Sequence[PlanReport], plan_out: str | None, as_json: bool) -> None:
    if as_json and len(reports) > 1:
        print_json({"plans": [asdict(report) for report in reports]})
    elif as_json:
        print_json(asdict(reports[0]))
    elif len(reports) > 1:
        print_lines(comparison_lines(reports))
    else:
        print_lines(_with_file(plan_lines(reports[0]), plan_out))


def _with_file(lines: Iterator[str], plan_out: str | None) -> Iterator[str]:
    yield from lines
    if plan_out is not None:
        yield ""
        yield f"Keep-lists saved in {plan_out}."
