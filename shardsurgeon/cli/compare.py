"""`shardsurgeon scores compare`: two score files side by side, and their parts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import click

from shardsurgeon.cli.help import Command
from shardsurgeon.cli.options import json_option, progress_option
from shardsurgeon.cli.output import emit, fact, percent, table
from shardsurgeon.cli.values import ratios

if TYPE_CHECKING:
    from shardsurgeon.pruning.agreement import (
        ComparedLayerReport,
        ComparedPartsReport,
        ComparisonReport,
    )


@click.command("compare", cls=Command)
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@click.option(
    "--ratio",
    "-r",
    "at",
    metavar="R[,R...]",
    default="0.25,0.5",
    show_default=True,
    callback=ratios,
    help="Compare what is kept when this fraction of the experts is removed.",
)
@click.option(
    "--metric",
    metavar="NAME[,NAME]",
    help="The metric of both files, or of each.  [default: reap]",
)
@progress_option
@json_option
def compare_command(
    a: str, b: str, at: tuple[float, ...], metric: str | None, as_json: bool
) -> None:
    """Compare two score files of one model.

    Per layer: the rank correlations of Spearman and Kendall (tau-b), and at each
    ratio the share of one keep-list that is in the other and their Jaccard
    index. Without groups and super experts; a keep-list by chance shares as much
    as it keeps. Where `calibrate` measured several datasets, those of A are set
    beside those of B, too; a file and itself: its datasets beside each other.

    \b
    Examples:
      shardsurgeon scores compare scores.pt router.safetensors
      shardsurgeon scores compare a.pt b.pt --ratio 0.65 --metric reap,ean_mean
      shardsurgeon scores compare mix.pt mix.pt
    """
    from shardsurgeon.operations import scores

    metrics = () if metric is None else tuple(metric.split(","))
    report = scores.compare_scores(a, b, ratios=tuple(dict.fromkeys(at)), metrics=metrics)
    emit(report, _comparison_lines(report), as_json)


def _comparison_lines(report: ComparisonReport) -> Iterator[str]:
    yield report.title
    yield from fact("A", f"{report.metric_a} of {report.a}")
    yield from fact("B", f"{report.metric_b} of {report.b}")
    yield ""
    rows = ((str(layer.layer), *_agreement(layer)) for layer in (*report.layers, report.mean))
    with_itself = report.a == report.b and report.metric_a == report.metric_b
    if not (with_itself and report.parts):
        yield from table(_agreement_headings("layer", report.ratios), rows)
        yield from [""] * bool(report.parts)
    if report.parts:
        yield "Part by part, the means over the layers:"
        pairs = ((f"{pair.a}, {pair.b}", *_agreement(pair)) for pair in report.parts)
        yield from table(_agreement_headings("parts", report.ratios), pairs)
    for name, layers in (("A", report.only_a), ("B", report.only_b)):
        if layers:
            yield from fact(f"only in {name}", f"layer {', '.join(map(str, layers))}")


def _agreement_headings(first: str, ratios: Iterable[float]) -> tuple[str, ...]:
    overlaps = (f"{head}\nat {ratio:g}" for ratio in ratios for head in ("share", "Jaccard"))
    return first, "Spearman", "Kendall", *overlaps


def _agreement(compared: ComparedLayerReport | ComparedPartsReport) -> Iterator[str]:
    yield _correlation(compared.spearman)
    yield _correlation(compared.kendall)
    for both in compared.overlaps.values():
        yield percent(both.share)
        yield percent(both.jaccard)


def _correlation(value: float | None) -> str:
    return "-" if value is None else f"{value:z.3f}"
