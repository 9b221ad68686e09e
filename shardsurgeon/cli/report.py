"""`shardsurgeon report`: a plan or a prune as one page to send."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from shardsurgeon.cli.gpus import gpus_options
from shardsurgeon.cli.help import Command
from shardsurgeon.cli.options import (
    OUT,
    family_option,
    json_option,
    model_option,
    progress_option,
)
from shardsurgeon.cli.output import emit, fact
from shardsurgeon.cli.plan import note_lines
from shardsurgeon.cli.values import of_variable
from shardsurgeon.units import format_size

if TYPE_CHECKING:
    from shardsurgeon.operations.page import PageReport
    from shardsurgeon.pruning.machines import FitRequest


@click.command("report", cls=Command)
@click.argument("place", metavar="PLAN|OUT")
@click.option(
    "--scores", metavar="FILE", help="What a plan was made from.  [default: what OUT keeps]"
)
@click.option("--evaluation", metavar="FILE", help="What `evaluate` measured of the model.")
@click.option("--probe", metavar="FILE", help="What `probe` found of the pruned model's answers.")
@gpus_options
@model_option
@click.option(*OUT, "out", metavar="FILE", required=True, help="The page, .html.")
@click.option("--force", is_flag=True, help="Replace another report that lies there.")
@family_option
@progress_option
@json_option
def report_command(
    place: str,
    scores: str | None,
    evaluation: str | None,
    probe: str | None,
    gpus: FitRequest | None,
    model: str | None,
    out: str,
    force: bool,
    family: str | None,
    as_json: bool,
) -> None:
    """Show a plan, or a pruned folder, on a page that can be sent.

    \b
    Examples:
      shardsurgeon report plan.json --scores scores.pt -o report.html
      shardsurgeon report K2.5-72 --evaluation e.json -o report.html

    The page needs no network: the saliency of every expert and the cut, what
    prunes cost, what the model answers, each layer, where all of it comes from.
    PLAN is a file of `plan -o`; --model gives it sizes. OUT is a folder that
    `apply` wrote.
    """
    from shardsurgeon.operations.page import report_page

    if os.path.isdir(place) and of_variable(click.get_current_context(), "model"):
        model = None  # a pruned folder says its own sizes
    report = report_page(
        place,
        out,
        scores=scores,
        evaluation=evaluation,
        probe=probe,
        gpus=gpus,
        model=model,
        family=family,
        force=force,
    )
    emit(report, _lines(report), as_json, told_otherwise=True)


def _lines(report: PageReport) -> Iterator[str]:
    yield report.title
    yield from fact("sections", ", ".join(report.holds))
    yield from fact("size", format_size(report.nbytes))
    yield from note_lines(report.notes)
