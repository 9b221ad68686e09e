"""`shardsurgeon scores`: make and work with files of expert scores."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

import click

from shardsurgeon.cli.options import json_option
from shardsurgeon.cli.output import print_json, print_lines
from shardsurgeon.cli.tables import counted, saliency, table
from shardsurgeon.reports import RouterScoresReport


@click.group("scores", invoke_without_command=True, subcommand_metavar="COMMAND ...")
@click.pass_context
def scores_commands(context: click.Context) -> None:
    """Make files of expert scores.

    \b
    Examples:
      shardsurgeon scores from-router -o scores.safetensors
      shardsurgeon scores from-router /models/Kimi-K2.5 -o scores.json
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@scores_commands.command("from-router")
@click.argument("model", required=False)
@click.option(
    "-o",
    "out",
    metavar="FILE",
    required=True,
    help="Score file to write: .safetensors or .json.",
)
@click.option(
    "--norm",
    type=click.Choice(["l2", "l1"]),
    default="l2",
    show_default=True,
    help="Length of a router row (l2), or the sum of its magnitudes, as compressed-tensors' "
    "MagnitudeExpertPruner ranks experts (l1).",
)
@json_option
def from_router_command(model: str | None, out: str, norm: str, as_json: bool) -> None:
    """Score experts by the size of their router rows.

    MODEL is the folder of a checkpoint, by default the current folder. Needs no
    calibration and reads only the routers; a baseline, not a replacement for
    measured saliency.

    \b
    Examples:
      shardsurgeon scores from-router -o scores.safetensors
      shardsurgeon scores from-router /models/Kimi-K2.5 --norm l1 -o scores.json
    """
    from shardsurgeon import operations

    report = operations.scores_from_router(model, out, norm=norm)
    if as_json:
        print_json(asdict(report))
    else:
        print_lines(_lines(report))


def _lines(report: RouterScoresReport) -> Iterator[str]:
    routers = counted(len(report.layers), "router")
    yield f"{report.model}: {report.metric} of {report.num_experts} experts in {routers}"
    yield ""
    yield from table(("layer", "lowest", "median", "highest"), _rows(report))
    if any(layer.is_mtp for layer in report.layers):
        yield "  * next-token-prediction layer"
    yield ""
    yield f"Scores saved in {report.out}."


def _rows(report: RouterScoresReport) -> Iterator[tuple[str, ...]]:
    for layer in report.layers:
        number = f"{layer.layer}{'*' if layer.is_mtp else ''}"
        yield number, saliency(layer.min), saliency(layer.median), saliency(layer.max)
