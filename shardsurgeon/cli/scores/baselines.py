"""`scores from-router`, `from-weights` and `random`: scores without a calibration."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict

import click

from shardsurgeon.cli.options import json_option, progress_option
from shardsurgeon.cli.output import byte_bar, print_json, print_lines
from shardsurgeon.cli.scores.options import model_argument, out_option
from shardsurgeon.cli.tables import saliency, table
from shardsurgeon.operations.reports import BaselineReport, RouterScoresReport, ScoreLayerReport
from shardsurgeon.units import counted


@click.command("from-router")
@model_argument
@out_option
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
    from shardsurgeon.operations import scoreoperations

    _show(scoreoperations.scores_from_router(model, out, norm=norm), "router", as_json)


@click.command("from-weights")
@model_argument
@out_option
@progress_option
@json_option
def from_weights_command(model: str | None, out: str, progress: bool | None, as_json: bool) -> None:
    """Score experts by the norm of their weights.

    MODEL is the folder of a checkpoint, by default the current folder. Reads all
    experts once, a piece at a time: floats, FP8, INT8, and compressed-tensors'
    packed INT4 and INT8. A baseline, not a replacement for measured saliency.

    \b
    Examples:
      shardsurgeon scores from-weights -o weights.safetensors
      shardsurgeon scores from-weights /models/Kimi-K2.5 -o weights.json
    """
    from shardsurgeon.operations import scoreoperations

    with byte_bar(progress) as bar:
        on_bytes = bar.on_bytes if bar is not None else None
        report = scoreoperations.scores_from_weights(model, out, on_bytes=on_bytes)
    _show(report, "layer", as_json)


@click.command("random")
@model_argument
@out_option
@click.option(
    "--seed",
    metavar="N",
    type=int,
    default=42,
    show_default=True,
    help="The same seed gives the same scores, on every machine.",
)
@json_option
def random_command(model: str | None, out: str, seed: int, as_json: bool) -> None:
    """Score experts at random.

    MODEL is the folder of a checkpoint, by default the current folder. What a
    method of scoring must beat.

    \b
    Examples:
      shardsurgeon scores random -o random.safetensors
      shardsurgeon scores random /models/Kimi-K2.5 --seed 7 -o random7.json
    """
    from shardsurgeon.operations import scoreoperations

    _show(scoreoperations.scores_random(model, out, seed=seed), "layer", as_json)


def _show(report: RouterScoresReport | BaselineReport, thing: str, as_json: bool) -> None:
    if as_json:
        print_json(asdict(report))
    else:
        print_lines(_lines(report, thing))


def _lines(report: RouterScoresReport | BaselineReport, thing: str) -> Iterator[str]:
    scored = counted(len(report.layers), thing)
    yield f"{report.model}: {report.metric} of {report.num_experts} experts in {scored}"
    yield ""
    yield from table(("layer", "lowest", "median", "highest"), _rows(report.layers))
    if any(layer.is_mtp for layer in report.layers):
        yield "  * next-token-prediction layer"
    yield ""
    yield f"Scores saved in {report.out}."


def _rows(layers: Sequence[ScoreLayerReport]) -> Iterator[tuple[str, ...]]:
    for layer in layers:
        number = f"{layer.layer}{'*' if layer.is_mtp else ''}"
        yield number, saliency(layer.min), saliency(layer.median), saliency(layer.max)
