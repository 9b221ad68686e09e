"""`scores compare`: how far two score files agree about which experts matter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

import click

from shardsurgeon.cli.options import json_option
from shardsurgeon.cli.output import print_json, print_lines
from shardsurgeon.cli.tables import fact, percent, table
from shardsurgeon.errors import UsageError
from shardsurgeon.operations.reports import ComparedLayerReport, ComparisonReport
from shardsurgeon.units import counted


def _ratios(context: click.Context, parameter: click.Parameter, text: str) -> tuple[float, ...]:
    try:
        return tuple(dict.fromkeys(float(part) for part in text.split(",")))
    except ValueError:
        problem = f"'{text}' is not a number"
        raise UsageError("--ratio", problem, "write it like 0.25,0.5") from None


@click.command("compare")
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@click.option(
    "--ratio",
    "ratios",
    metavar="R[,R...]",
    default="0.25,0.5",
    show_default=True,
    callback=_ratios,
    help="Compare what is kept when this fraction of the experts is removed.",
)
@click.option(
    "--metric",
    metavar="NAME[,NAME]",
    help="The metric of both files, or of each.  [default: reap]",
)
@json_option
def compare_command(
    a: str, b: str, ratios: tuple[float, ...], metric: str | None, as_json: bool
) -> None:
    """Compare two score files of one model.

    Per layer: the rank correlations of Spearman and Kendall (tau-b), and at each
    ratio the share of one keep-list that is in the other and their Jaccard
    index. Without groups and super experts; a keep-list by chance shares as much
    as it keeps.

    \b
    Examples:
      shardsurgeon scores compare scores.pt router.safetensors
      shardsurgeon scores compare a.pt b.pt --ratio 0.65 --metric reap,ean_mean
    """
    from shardsurgeon.operations import scoreoperations

    metrics = () if metric is None else tuple(metric.split(","))
    report = scoreoperations.compare_scores(a, b, ratios=ratios, metrics=metrics)
    if as_json:
        print_json(asdict(report))
    else:
        print_lines(_lines(report))


def _lines(report: ComparisonReport) -> Iterator[str]:
    yield f"{counted(len(report.layers), 'layer')} of {report.mean.num_experts} experts"
    yield from fact("A", f"{report.metric_a} of {report.a}")
    yield from fact("B", f"{report.metric_b} of {report.b}")
    yield ""
    overlaps = [f"{head}\nat {ratio:g}" for ratio in report.ratios for head in ("share", "Jaccard")]
    rows = [*report.layers, report.mean]
    yield from table(("layer", "Spearman", "Kendall", *overlaps), map(_row, rows))
    for name, layers in (("A", report.only_a), ("B", report.only_b)):
        if layers:
            yield from fact(f"only in {name}", f"layer {', '.join(map(str, layers))}")


def _row(layer: ComparedLayerReport) -> tuple[str, ...]:
    cells = [_correlation(layer.spearman), _correlation(layer.kendall)]
    for both in layer.overlaps.values():
        cells += [percent(both.share), percent(both.jaccard)]
    return str(layer.layer), *cells


def _correlation(value: float | None) -> str:
    return "-" if value is None else f"{value:z.3f}"
