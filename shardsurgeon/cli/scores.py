"""`shardsurgeon scores`: look at score files, compare, convert and merge them, make baselines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal

import click

from shardsurgeon.cli.blend import blend_command
from shardsurgeon.cli.compare import compare_command
from shardsurgeon.cli.help import Command
from shardsurgeon.cli.layers import profile_lines
from shardsurgeon.cli.options import (
    OUT,
    InOrder,
    family_option,
    json_option,
    model_argument,
    out_option,
    progress_option,
)
from shardsurgeon.cli.output import (
    emit,
    fact,
    layer_number,
    mtp_legend,
    no_accuracy,
    part_lines,
    percent,
    saliency,
    saved,
    table,
    width,
)
from shardsurgeon.cli.plan import note_lines
from shardsurgeon.cli.values import ratios
from shardsurgeon.errors import UsageError
from shardsurgeon.pruning.request import SelectionRequest
from shardsurgeon.units import counted

if TYPE_CHECKING:
    from shardsurgeon.operations.reports import (
        BaselineReport,
        RouterScoresReport,
        ScoreLayerReport,
        ScoresReport,
        WrittenScoresReport,
    )
    from shardsurgeon.pruning.analysis import Gap, ShownLayerReport

# Of the shares that the report has, those that fit a table of 80 columns, and a wide one.
# Where a layer's profile is cut.
_DRAWN = "0.05"
_SHARES, _MORE_SHARES, _WIDE = ("0.05", "0.25"), ("0.01", "0.05", "0.1", "0.25"), 100


@click.command("show", cls=Command)
@click.argument("file", metavar="FILE")
@click.option(
    "--model",
    "-m",
    metavar="MODEL",
    help="Folder of a checkpoint that the scores must fit; cuts then suit its router.",
)
@click.option(
    "--metric",
    metavar="NAME",
    help="Which metric to show where the file holds several.  [default: reap]",
)
@family_option
@progress_option
@json_option
def show_command(
    file: str, model: str | None, metric: str | None, family: str | None, as_json: bool
) -> None:
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
    from shardsurgeon.operations import scores
    from shardsurgeon.operations.measured import measuring

    report = scores.show_scores(file, model, metric=metric, family=family)
    some = [SelectionRequest(ratio=ratio, metric=metric) for ratio in (0.25, 0.5)]
    emit(report, _shown_lines(report, measuring(model, file, some, family)), as_json)


def _shown_lines(report: ScoresReport, measures: Sequence[str]) -> Iterator[str]:
    yield report.title
    yield from fact("metrics", ", ".join(report.metrics))
    if report.facts:
        yield from fact("beside", ", ".join(f"{k} {v}" for k, v in report.facts.items()))
    if report.calibration is not None:
        yield from fact("calibration", _calibration(report.calibration))
    yield ""
    yield from table(_shown_headings(), (_shown_row(report, layer) for layer in report.layers))
    yield from mtp_legend(report.layers)
    rows = ((layer_number(x), x.profile, _share_kept(x)) for x in report.layers)
    yield from profile_lines(rows, f" at {float(_DRAWN):.0%}")
    yield "  widest gap: experts below it, and how many times as high the next score is"
    yield from no_accuracy(measures)
    yield ""
    yield from _cuts(report)
    yield from _shown_parts(report)
    yield from (line for note in report.notes for line in fact("note", note))


def _share_kept(layer: ShownLayerReport) -> float | None:
    """The share of the experts that stay where what _DRAWN says may go."""
    removed = layer.removable.get(_DRAWN)
    return None if removed is None else 1 - removed / layer.num_experts


def _calibration(settings: dict[str, object]) -> str:
    sizes = {key: settings[key] for key in ("samples", "tokens")}
    words = [f"{size:,} {key}" for key, size in sizes.items()]
    known = ("model", "dataset", "seed", "max_length", "dtype")
    words += [f"{key} {settings[key]}" for key in known if settings.get(key) is not None]
    parts = settings.get("parts")
    runs = parts if isinstance(parts, list) else [settings]
    packed = any(isinstance(run, dict) and "windows" in run for run in runs)
    words += ["packed windows"] if packed else []
    words += ["the assistant's tokens alone"] if settings.get("counted") == "assistant" else []
    words += [f"merged from {len(parts)} calibrations"] if isinstance(parts, list) else []
    return ", ".join(words)


def _shown_headings() -> tuple[str, ...]:
    shares = (f"can go\nat {float(share):.0%}" for share in _shares())
    return "layer", *_RANGE, "never\nrouted", "super", *shares, "widest\ngap"


def _shown_row(report: ScoresReport, layer: ShownLayerReport) -> tuple[str, ...]:
    extreme = {*layer.super_experts, *layer.preserved}
    known = report.super_experts_known or extreme
    return (
        layer_number(layer),
        *_range(layer),
        str(len(layer.never_routed)),
        str(len(extreme)) if known else "-",
        *(str(layer.removable.get(share, "-")) for share in _shares()),
        _gap(layer.gap),
    )


def _shares() -> tuple[str, ...]:
    return _SHARES if width() < _WIDE else _MORE_SHARES


_RANGE = ("lowest", "median", "highest")


def _range(layer: ShownLayerReport | ScoreLayerReport) -> Iterator[str]:
    return (saliency(value) for value in (layer.min, layer.median, layer.max))


def _gap(gap: Gap | None) -> str:
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


def _shown_parts(report: ScoresReport) -> Iterator[str]:
    """What the experts retain of each part that the scores of all would choose."""
    if not report.parts:
        return
    yield ""
    yield f"Parts, and the share of their own {report.metric} that stays where this file chooses:"
    ratios = [f"retained\nat {ratio}" for ratio in report.parts[0].retained]
    rows = (
        (
            part.name,
            f"{part.records:,}",
            f"{part.tokens:,}",
            *("-" if share is None else percent(share) for share in part.retained.values()),
        )
        for part in report.parts
    )
    yield from table(("part", "records", "tokens", *ratios), rows)


@click.command("plot", cls=Command)
@click.argument("file", metavar="FILE")
@click.option(
    "--ratio",
    "-r",
    metavar="R",
    callback=ratios,
    help="Draw the cut where this share of each layer's experts goes.",
)
@click.option("--evaluation", metavar="FILE", help="What `evaluate` measured, for the curve.")
@click.option("--metric", metavar="NAME", help="Which metric to draw.  [default: reap]")
@click.option(*OUT, "out", metavar="FILE", required=True, help="The picture, .png or .svg.")
@click.option("--force", is_flag=True, help="Replace another picture that lies there.")
@progress_option
@json_option
def plot_command(
    file: str,
    ratio: tuple[float, ...],
    evaluation: str | None,
    metric: str | None,
    out: str,
    force: bool,
    as_json: bool,
) -> None:
    """Draw the saliencies, the cut and what prunes cost, as a picture.

    For papers and model cards. Without --evaluation the curve is the share of
    saliency that goes, which is no accuracy.

    \b
    Examples:
      shardsurgeon scores plot scores.pt --ratio 0.65 -o saliency.svg
      shardsurgeon scores plot scores.pt --evaluation e.json -o damage.png
    """
    from shardsurgeon.operations import plots

    if len(ratio) > 1:
        raise UsageError("--ratio", f"{len(ratio)} ratios at once", "give one, for one cut")
    report = plots.plot_scores(
        file,
        out,
        ratio=ratio[0] if ratio else None,
        evaluation=evaluation,
        metric=metric,
        force=force,
    )
    emit(report, [report.title], as_json, told_otherwise=True)


@click.command("convert", cls=Command)
@click.argument("source", metavar="IN")
@out_option
@click.option(
    "--model",
    "-m",
    metavar="MODEL",
    help="Folder of the checkpoint, to name the layers of a file that only has rows.",
)
@family_option
@progress_option
@json_option
def convert_command(
    source: str, out: str, force: bool, model: str | None, family: str | None, as_json: bool
) -> None:
    """Write a score file in another format.

    Every metric with one number per expert is kept to the last bit, and so are
    the accumulators of a calibration. Torch is needed to write .pt, not to read
    it.

    \b
    Examples:
      shardsurgeon scores convert scores.pt -o scores.safetensors
      shardsurgeon scores convert rows.npz --model /models/K2.5 -o scores.json
    """
    from shardsurgeon.operations import scores

    report = scores.convert_scores(source, out, model=model, family=family, force=force)
    emit(report, _written_lines(report), as_json, told_otherwise=True)


@click.command("merge", cls=Command)
@click.argument("files", metavar="FILE FILE...", nargs=-1, required=True)
@out_option
@click.option(
    "--same-model",
    is_flag=True,
    help="Take models of one config under two names for the same.",
)
@click.option(
    "--mixed",
    is_flag=True,
    help="Add up files that differ in their dtype, or in which tokens count.",
)
@progress_option
@json_option
def merge_command(
    files: tuple[str, ...], out: str, force: bool, same_model: bool, mixed: bool, as_json: bool
) -> None:
    """Add up calibrations of one model over different samples.

    Adds the accumulators that `calibrate` keeps beside the scores, so that the
    result is what one calibration over all the samples would have given. Files
    of different models or dtypes, or with a sample in common, are refused. The
    sums in files of REAP's observer add up too; those list no samples.

    \b
    Examples:
      shardsurgeon scores merge code.pt chat.pt -o scores.pt
      shardsurgeon scores merge a.pt b.pt c.pt -o scores.safetensors
    """
    from shardsurgeon.operations import scores

    report = scores.merge_scores(files, out, same_model=same_model, mixed=mixed, force=force)
    emit(report, _written_lines(report), as_json, told_otherwise=True)


def _written_lines(report: WrittenScoresReport) -> Iterator[str]:
    yield report.title
    yield from fact("layers", str(report.layers))
    yield from fact("metrics", ", ".join(report.metrics))
    if report.samples is not None and report.tokens is not None:
        words = f"{counted(report.samples, 'sample')}, {counted(report.tokens, 'token')}"
        yield from fact("calibration", words)
    yield from part_lines(report.parts)
    yield from note_lines(report.notes)


@click.command("from-router", cls=Command)
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
@family_option
@progress_option
@json_option
def from_router_command(
    model: str | None,
    out: str,
    force: bool,
    norm: Literal["l2", "l1"],
    family: str | None,
    as_json: bool,
) -> None:
    """Score experts by the size of their router rows.

    MODEL is the folder of a checkpoint, by default the current folder. Needs no
    calibration and reads only the routers; a baseline, not a replacement for
    measured saliency.

    \b
    Examples:
      shardsurgeon scores from-router -o scores.safetensors
      shardsurgeon scores from-router /models/Kimi-K2.5 --norm l1 -o scores.json
    """
    from shardsurgeon.operations import scores

    report = scores.scores_from_router(model, out, norm=norm, family=family, force=force)
    emit(report, _baseline_lines(report), as_json, told_otherwise=True)


@click.command("from-weights", cls=Command)
@model_argument
@out_option
@click.option(
    "--criterion",
    type=click.Choice(["norm", "aimer"]),
    default="norm",
    show_default=True,
    help="Euclidean length of all weights (norm), or 1 less their mean magnitude over their root "
    "mean square (aimer; arXiv 2603.18492).",
)
@family_option
@progress_option
@json_option
def from_weights_command(
    model: str | None,
    out: str,
    force: bool,
    criterion: Literal["norm", "aimer"],
    family: str | None,
    as_json: bool,
) -> None:
    """Score experts by their weights.

    MODEL is the folder of a checkpoint, by default the current folder. Reads all
    experts once, a piece at a time: floats, FP8, INT8, and compressed-tensors'
    packed INT4 and INT8. A baseline, not a replacement for measured saliency.

    \b
    Examples:
      shardsurgeon scores from-weights -o weights.safetensors
      shardsurgeon scores from-weights --criterion aimer -o aimer.json
    """
    from shardsurgeon.operations import scores

    report = scores.scores_from_weights(model, out, criterion=criterion, family=family, force=force)
    emit(report, _baseline_lines(report), as_json, told_otherwise=True)


@click.command("random", cls=Command)
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
@family_option
@progress_option
@json_option
def random_command(
    model: str | None, out: str, force: bool, seed: int, family: str | None, as_json: bool
) -> None:
    """Score experts at random.

    MODEL is the folder of a checkpoint, by default the current folder. What a
    method of scoring must beat.

    \b
    Examples:
      shardsurgeon scores random -o random.safetensors
      shardsurgeon scores random /models/Kimi-K2.5 --seed 7 -o random7.json
    """
    from shardsurgeon.operations import scores

    report = scores.scores_random(model, out, seed=seed, family=family, force=force)
    emit(report, _baseline_lines(report), as_json, told_otherwise=True)


def _baseline_lines(report: RouterScoresReport | BaselineReport) -> Iterator[str]:
    yield report.title
    yield ""
    yield from table(("layer", *_RANGE), ((layer_number(x), *_range(x)) for x in report.layers))
    yield from mtp_legend(report.layers)
    yield ""
    yield saved("Scores", report.out, report.written)


@click.group(
    "scores",
    cls=InOrder,
    commands=[
        show_command,
        plot_command,
        compare_command,
        convert_command,
        merge_command,
        blend_command,
        from_router_command,
        from_weights_command,
        random_command,
    ],
    invoke_without_command=True,
    subcommand_metavar="COMMAND ...",
)
@click.pass_context
def scores_commands(context: click.Context) -> None:
    """Look at files of expert scores, and make some.

    \b
    Examples:
      shardsurgeon scores show scores.pt
      shardsurgeon scores compare scores.pt other.safetensors
      shardsurgeon scores merge monday.pt tuesday.pt -o both.pt
      shardsurgeon scores from-router /models/Kimi-K2.5 -o router.safetensors
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())
