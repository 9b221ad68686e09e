"""`scores show`: what a score file says, layer by layer, and where the layers could be cut."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

import click

from shardsurgeon.cli.options import json_option
from shardsurgeon.cli.output import print_json, print_lines
from shardsurgeon.cli.tables import fact, percent, saliency, table
from shardsurgeon.operations.reports import GapReport, ScoresReport, ShownLayerReport
from shardsurgeon.units import counted

# Of the shares that the report has, those that fit a table.
_SHARES = ("0.05", "0.25")


@click.command("show")
@click.argument("file", metavar="FILE")
@click.option(
    "--model",
    metavar="MODEL",
    help="Folder of a checkpoint that the scores must fit; cuts then suit its router.",
)
@click.option(
    "--metric",
    metavar="NAME",
    help="Which metric to show where the file holds several.  [default: reap]",
)
@json_option
def show_command(file: str, model: str | None, metric: str | None, as_json: bool) -> None:
    """Show what a score file says of each layer.

    The range of the scores, experts that no token reached, experts with extreme
    activations, how many can go at a share of the layer's saliency, the widest
    gap between neighbours in the order of saliency; and the largest cuts, alike
    in every layer, at several costs.

    \b
    Examples:
      shardsurgeon scores show scores.pt
      shardsurgeon scores show scores.pt --model /models/K2.5 --metric ean_mean
    """
    from shardsurgeon.operations import scoreoperations

    report = scoreoperations.show_scores(file, model, metric=metric)
    if as_json:
        print_json(asdict(report))
    else:
        print_lines(_lines(report))


def _lines(report: ScoresReport) -> Iterator[str]:
    of_model = f" for {report.model}" if report.model is not None else ""
    layers = counted(len(report.layers), "layer")
    yield f"{report.file}: {report.metric} of {report.num_experts} experts in {layers}{of_model}"
    yield from fact("metrics", ", ".join(report.metrics))
    if report.facts:
        yield from fact("beside", ", ".join(f"{k} {v}" for k, v in report.facts.items()))
    if report.calibration is not None:
        yield from fact("calibration", _calibration(report.calibration))
    yield ""
    yield from table(_headings(), (_row(report, layer) for layer in report.layers))
    if any(layer.is_mtp for layer in report.layers):
        yield "  * next-token-prediction layer"
    yield ""
    yield from _cuts(report)


def _calibration(settings: dict[str, object]) -> str:
    sizes = {key: settings[key] for key in ("samples", "tokens")}
    words = [f"{size:,} {key}" for key, size in sizes.items()]
    known = ("model", "dataset", "seed", "max_length", "dtype")
    words += [f"{key} {settings[key]}" for key in known if settings.get(key) is not None]
    parts = settings.get("parts")
    words += [f"merged from {len(parts)} calibrations"] if isinstance(parts, list) else []
    return ", ".join(words)


def _headings() -> tuple[str, ...]:
    shares = (f"can go\nat {float(share):.0%}" for share in _SHARES)
    return "layer", "lowest", "median", "highest", "never\nrouted", "super", *shares, "widest\ngap"


def _row(report: ScoresReport, layer: ShownLayerReport) -> tuple[str, ...]:
    extreme = {*layer.super_experts, *layer.preserved}
    known = report.super_experts_known or extreme
    return (
        f"{layer.layer}{'*' if layer.is_mtp else ''}",
        *(saliency(value) for value in (layer.min, layer.median, layer.max)),
        str(len(layer.never_routed)),
        str(len(extreme)) if known else "-",
        *(str(layer.removable.get(share, "-")) for share in _SHARES),
        _gap(layer.gap),
    )


def _gap(gap: GapReport | None) -> str:
    return "-" if gap is None else f"{gap.removed} x{gap.factor:.3g}"


def _cuts(report: ScoresReport) -> Iterator[str]:
    if not report.cuts:
        yield "No cut is suggested: a score is below 0, or all are 0."
        return
    yield "Cuts alike in every layer, by the mean share of a layer's saliency that goes:"
    headings = ("at most", "--ratio", "kept", "lost", "lost in the\nworst layer")
    rows = (
        (
            percent(cut.limit),
            str(cut.ratio) if cut.removed else "-",
            str(cut.kept),
            percent(cut.mean_lost),
            f"{percent(cut.worst_lost)} ({cut.worst_layer})",
        )
        for cut in report.cuts
    )
    yield from table(headings, rows)
