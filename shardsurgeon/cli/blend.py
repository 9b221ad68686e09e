"""`shardsurgeon scores blend`: one saliency of several parts of the data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

import click

from shardsurgeon.cli.help import Command
from shardsurgeon.cli.options import json_option, out_option, progress_option
from shardsurgeon.cli.output import emit, fact, percent, table
from shardsurgeon.cli.values import kept, ratios
from shardsurgeon.errors import UsageError

if TYPE_CHECKING:
    from shardsurgeon.operations.reports import BlendPartReport, BlendReport


def _weights(
    context: click.Context, parameter: click.Parameter, text: str | None
) -> dict[str, float] | None:
    """Turn `code=2,chat=1` into weights by name."""
    if text is None:
        return None
    found: dict[str, float] = {}
    for entry in text.split(","):
        name, _, number = entry.rpartition("=")
        name = name.strip()
        try:
            weight = float(number)
        except ValueError:
            name = ""
        if not name or name in found:
            problem = f"'{entry}' names {name} again" if name else f"'{entry}' is not NAME=NUMBER"
            raise UsageError("--weights", problem, "write it like code=2,chat=1")
        found[name] = weight
    return found


def _one_ratio(
    context: click.Context, parameter: click.Parameter, text: str | None
) -> float | None:
    """Turn `0.5` into a number."""
    found = ratios(context, parameter, text)
    if len(found) > 1:
        raise UsageError("--ratio", f"{len(found)} ratios at once", "give one")
    return found[0] if found else None


@click.command("blend", cls=Command)
@click.argument("files", metavar="FILE...", nargs=-1, required=True)
@out_option
@click.option(
    "--weights",
    metavar="NAME=W[,...]",
    callback=_weights,
    help="How often each token of a part counts, against the other parts'.",
)
@click.option(
    "--objective",
    type=click.Choice(["max-min"]),
    help="Find the weights under which the part that retains least retains most.",
)
@click.option(
    "--keep",
    metavar="N",
    callback=kept,
    help="Shares retained with this many experts in every layer.",
)
@click.option(
    "--ratio",
    "-r",
    metavar="R",
    callback=_one_ratio,
    help="Shares retained with this fraction of the experts removed.",
)
@click.option(
    "--metric",
    metavar="NAME",
    default="reap",
    show_default=True,
    help="The metric that shares are of; the file holds all but msan.",
)
@click.option(
    "--same-model",
    is_flag=True,
    help="Take models of one config under two names for the same.",
)
@click.option(
    "--mixed",
    is_flag=True,
    help="Blend files that differ in their dtype, or in which tokens count.",
)
@progress_option
@json_option
def blend_command(
    files: tuple[str, ...],
    out: str,
    force: bool,
    weights: dict[str, float] | None,
    objective: Literal["max-min"] | None,
    keep: int | None,
    ratio: float | None,
    metric: str,
    same_model: bool,
    mixed: bool,
    as_json: bool,
) -> None:
    """Make one saliency of several parts of the data.

    A file of `calibrate` over several datasets has a part for each, called by it:
    org/code[python] and code.jsonl are code (`scores show` lists them). Any other
    FILE of it, or of REAP's observer, is one part, called by the file, or by its
    folder. Equal weights give what `scores merge` gives.

    A part's retained share is its own saliency of the experts that stay over
    that of all, averaged over the layers; it is no accuracy. Groups and super
    experts are left to `plan`. The blend cannot be merged with calibrations.

    \b
    Examples:
      shardsurgeon scores blend mix.pt --weights code=2,chat=1 -o scores.pt
      shardsurgeon scores blend *.pt --objective max-min --ratio 0.5 -o s.npz
    """
    from shardsurgeon.operations import blend

    report = blend.blend_scores(
        files,
        out,
        weights=weights,
        objective=objective,
        keep=keep,
        ratio=ratio,
        metric=metric,
        same_model=same_model,
        mixed=mixed,
        force=force,
    )
    emit(report, _lines(report), as_json, told_otherwise=True)


def _lines(report: BlendReport) -> Iterator[str]:
    yield report.title
    yield from fact("layers", str(report.layers))
    yield from fact("metrics", ", ".join(report.metrics))
    yield ""
    headings: tuple[str, ...] = ("part", "weight")
    if report.kept is not None:
        yield f"Retained shares of {report.metric} with {report.kept} experts kept:"
        headings += ("retained", "with equal\nweights")
    yield from table(headings, map(_row, report.parts))
    if report.worst is not None:
        yield from fact("worst part", report.worst)


def _row(part: BlendPartReport) -> tuple[str, ...]:
    shares = (share for share in (part.retained, part.retained_equal) if share is not None)
    return part.name, f"{part.weight:.4g}", *map(percent, shares)
