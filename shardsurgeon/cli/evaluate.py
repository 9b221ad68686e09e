"""`shardsurgeon evaluate`: what prunes cost, measured before a byte is moved."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from shardsurgeon.cli.calibrate import run_options, settings_of
from shardsurgeon.cli.help import Command
from shardsurgeon.cli.options import (
    OUT,
    as_given,
    family_option,
    json_option,
    lists_option,
    model_option,
    one_model,
    progress_option,
    refuse_swapped,
)
from shardsurgeon.cli.output import emit, fact, percent, table
from shardsurgeon.cli.plan import note_lines
from shardsurgeon.cli.values import choice, kept, of_variable, ratios
from shardsurgeon.pruning.request import Allocation, Lists
from shardsurgeon.units import counted

if TYPE_CHECKING:
    from shardsurgeon.layerwise.damage import Damage
    from shardsurgeon.operations.evaluation_report import CandidateDamage, EvaluationReport

_HEADINGS = ["", "perplexity", "change", "KL\nmean", "KL\np95", "KL\np99", "same first\nchoice"]


def _model_and_scores(
    context: click.Context, parameter: click.Parameter, words: tuple[str, ...]
) -> tuple[str, ...]:
    if len(words) > 2:
        raise click.UsageError(f"Got unexpected extra argument ({' '.join(words[2:])})", context)
    return words


class _Evaluate(Command):
    how_much = "How much (all are measured)"


@click.command("evaluate", cls=_Evaluate)
@click.argument("words", metavar="[MODEL] [SCORES]", nargs=-1, callback=_model_and_scores)
@model_option
@click.option(
    "--ratio",
    "-r",
    metavar="R[,...]",
    callback=ratios,
    help="Shares of each layer's experts to remove, such as 0.25,0.5,0.65.",
)
@click.option(
    "--keep", metavar="N", callback=kept, help="Keep this many experts in every MoE layer."
)
@click.option(
    "--plan",
    "plan_files",
    metavar="FILE",
    multiple=True,
    help="Take a keep-list of `plan`, or from elsewhere; may be given several times.",
)
@click.option("--dataset", metavar="SPEC", required=True, help="As for `calibrate`: files, names.")
@click.option(*OUT, "out", metavar="FILE", required=True, help="The evaluation, as JSON.")
@click.option("--force", is_flag=True, help="Replace another evaluation that lies there.")
@click.option("--layers", is_flag=True, help="Show what each layer does.")
@run_options
@click.option(
    "--metric",
    metavar="NAME[,...]",
    default=None,
    help="Which of the scores decides; several are all measured.",
)
@click.option(
    "--allocate",
    type=click.Choice([each.value for each in Allocation]),
    default=Allocation.UNIFORM.value,
    show_default=True,
    callback=choice(Allocation),
    help="Every layer keeps the same number, or the layers share one budget.",
)
@lists_option
@family_option
@click.option("--restart", is_flag=True, help="Start over instead of resuming in FILE.partial.")
@progress_option
@json_option
def evaluate_command(
    words: tuple[str, ...],
    model: str | None,
    ratio: tuple[float, ...],
    keep: int | None,
    plan_files: tuple[str, ...],
    metric: str | None,
    allocate: Allocation,
    lists: Lists | None,
    dataset: str,
    out: str,
    force: bool,
    layers: bool,
    device: str,
    dtype: str | None,
    batch_size: Any,
    seed: int,
    family: str | None,
    restart: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure what prunes cost before one is made.

    Perplexity, the divergence of predictions (KL), the share of equal first choices.
    The model and every candidate go through the layers side by side, each with
    its own hidden states; the weights are read once for all of them. Nothing is
    written but FILE. The numbers are those of the pruned folder. MODEL is, by
    default, the current folder; a single word is SCORES where it is a file.

    A record with a `completion` behind its `messages` or `prompt` (as `probe`
    keeps the answers of a server) is an answer: it is forced, its tokens alone
    are predicted, and the report says how far each candidate goes along.

    \b
    Examples:
      shardsurgeon evaluate scores.pt --ratio 0.25,0.5 --dataset a.jsonl -o e.json
      shardsurgeon evaluate --plan plan.json --dataset chats.jsonl -o e.json
    """
    from shardsurgeon.layerwise.request import CalibrationRequest
    from shardsurgeon.operations.evaluate import candidates, evaluate

    place, scores = _places(words, model)
    metrics = () if metric is None else metric.split(",")
    prunes = candidates(ratio, keep, plan_files, metrics, allocate, lists)
    settings = settings_of(device, dtype, batch_size, seed)
    request = CalibrationRequest(dataset, settings, **options)
    report = evaluate(
        place,
        scores,
        prunes,
        request,
        out,
        family=family,
        restart=restart,
        force=force,
        command=as_given(),
    )
    emit(report, _lines(report, every=layers), as_json, told_otherwise=True)


def _places(words: Sequence[str], model: str | None) -> tuple[str | None, str | None]:
    """MODEL and SCORES. Raises UsageError where the model is said twice, or the two are swapped."""
    if len(words) == 2:
        refuse_swapped(*words)
        return one_model("MODEL", words[0], model, "model"), words[1]
    said_here = model is not None and not of_variable(click.get_current_context(), "model")
    if words and not said_here and not Path(words[0]).is_file():
        return words[0], None
    return model, words[0] if words else None


def _lines(report: EvaluationReport, *, every: bool) -> Iterator[str]:
    yield report.title
    yield ""
    yield from _table(report.original, [(each.name, each.damage) for each in report.candidates])
    for place, part in enumerate(report.original_parts if len(report.original_parts) > 1 else ()):
        yield ""
        yield f"  {part.name}: {counted(part.samples, 'sample')}"
        rows = [(each.name, each.parts[place].damage) for each in report.candidates]
        yield from _table(part.damage, rows)
    yield ""
    yield "  KL: in nats, of a candidate from the model, per token; 0 where they say the same"
    for each in report.candidates:
        if each.worst_part is not None:
            yield from fact(each.name, f"is worst on {each.worst_part}")
    if every:
        yield from _layer_lines(report.candidates)
    yield ""
    tokens = f"{counted(report.predicted, 'token')} of {counted(report.samples, 'sample')}"
    yield from fact("predicted", tokens)
    yield from fact("computed", f"in {report.dtype} on {report.device}, {report.seconds:.1f} s")
    if report.layers_resumed:
        yield from fact("resumed", f"{counted(report.layers_resumed, 'layer')} of an earlier run")
    yield from note_lines(report.notes)
    yield ""
    yield f"Evaluation saved in {report.out}."


def _table(original: Damage, rows: Sequence[tuple[str, Damage]]) -> Iterator[str]:
    forced = original.accepted is not None
    headings = [*_HEADINGS, *(["accepted\ntokens"] if forced else [])]
    yield from table(headings, [_row(*row, original) for row in [("original", original), *rows]])


def _row(name: str, found: Damage, original: Damage) -> list[str]:
    ratio = found.perplexity / original.perplexity - 1
    cells = [name, f"{found.perplexity:.4g}", f"{ratio:+.1%}", _nats(found.kl_mean)]
    cells += [_nats(found.kl_p95), _nats(found.kl_p99), percent(found.agreement)]
    if found is original:
        cells[2:] = ["-"] * 5
    if found.accepted is not None:
        cells.append(f"{found.accepted.mean:.1f} of {found.accepted.length:.1f}")
    return cells


def _nats(value: float) -> str:
    return f"{value:.3g}"


def _layer_lines(found: Sequence[CandidateDamage]) -> Iterator[str]:
    headings = ["layer", "relative\nerror", "cosine", "weight lost"]
    for each in found:
        yield ""
        yield f"  {each.name}"
        yield from table(
            headings,
            [
                [
                    str(layer.layer),
                    f"{layer.relative_error:.3g}",
                    f"{layer.cosine:.4f}",
                    percent(layer.lost_weight),
                ]
                for layer in each.layers
            ],
        )
