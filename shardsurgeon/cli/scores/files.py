"""`scores convert` and `scores merge`: score files from score files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

import click

from shardsurgeon.cli.options import json_option
from shardsurgeon.cli.output import print_json, print_lines
from shardsurgeon.cli.scores.options import out_option
from shardsurgeon.cli.tables import fact
from shardsurgeon.operations.reports import WrittenScoresReport
from shardsurgeon.units import counted


@click.command("convert")
@click.argument("source", metavar="IN")
@out_option
@click.option(
    "--model",
    metavar="MODEL",
    help="Folder of the checkpoint, to name the layers of a file that only has rows.",
)
@json_option
def convert_command(source: str, out: str, model: str | None, as_json: bool) -> None:
    """Write a score file in another format.

    Every metric with one number per expert is kept to the last bit, and so are
    the accumulators of a calibration. Torch is needed to write .pt, not to read
    it.

    \b
    Examples:
      shardsurgeon scores convert scores.pt -o scores.safetensors
      shardsurgeon scores convert rows.npz --model /models/K2.5 -o scores.json
    """
    from shardsurgeon.operations import scoreoperations

    _show(scoreoperations.convert_scores(source, out, model=model), as_json)


@click.command("merge")
@click.argument("files", metavar="FILE FILE...", nargs=-1, required=True)
@out_option
@click.option(
    "--same-model",
    is_flag=True,
    help="Take models of one config under two names for the same.",
)
@json_option
def merge_command(files: tuple[str, ...], out: str, same_model: bool, as_json: bool) -> None:
    """Add up calibrations of one model over different samples.

    Adds the accumulators that `calibrate` keeps beside the scores, so that the
    result is what one calibration over all the samples would have given. Files
    of different models, or with a sample in common, are refused.

    \b
    Examples:
      shardsurgeon scores merge code.pt chat.pt -o scores.pt
      shardsurgeon scores merge a.pt b.pt c.pt -o scores.safetensors
    """
    from shardsurgeon.operations import scoreoperations

    _show(scoreoperations.merge_scores(files, out, same_model=same_model), as_json)


def _show(report: WrittenScoresReport, as_json: bool) -> None:
    if as_json:
        print_json(asdict(report))
    else:
        print_lines(_lines(report))


def _lines(report: WrittenScoresReport) -> Iterator[str]:
    yield f"{' + '.join(report.inputs)} -> {report.out}"
    yield from fact("layers", str(report.layers))
    yield from fact("metrics", ", ".join(report.metrics))
    if report.samples is not None and report.tokens is not None:
        words = f"{counted(report.samples, 'sample')}, {counted(report.tokens, 'token')}"
        yield from fact("calibration", words)
