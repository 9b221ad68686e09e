"""`shardsurgeon plan`, and a plan as text: its layers, its totals, several plans side by side."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import click

from shardsurgeon.cli.fit import assumption_lines, refusals
from shardsurgeon.cli.gpus import gpus_option
from shardsurgeon.cli.help import Command
from shardsurgeon.cli.layers import layer_lines
from shardsurgeon.cli.options import (
    OUT,
    evaluation_option,
    family_option,
    json_option,
    links_option,
    model_option,
    progress_option,
    scores_argument,
    selection_options,
)
from shardsurgeon.cli.output import (
    change,
    emit,
    fact,
    facts,
    grouped,
    no_accuracy,
    parameters,
    percent,
    saved,
    table,
    typed,
    units_legend,
)
from shardsurgeon.errors import UsageError
from shardsurgeon.pruning.request import Allocation, SelectionRequest
from shardsurgeon.units import counted, format_size

if TYPE_CHECKING:
    from shardsurgeon.operations.prune import Pruning
    from shardsurgeon.pruning.fit import FitRow, MachineFit
    from shardsurgeon.pruning.machines import FitRequest
    from shardsurgeon.pruning.report import Measured, PlanReport, PlansReport


@click.command("plan", cls=Command)
@scores_argument
@model_option
@gpus_option
@selection_options
@family_option
@links_option
@evaluation_option
@click.option(*OUT, "plan_out", metavar="FILE", help="Save the keep-lists, for `apply --plan`.")
@click.option("--force", is_flag=True, help="Replace another plan that was saved there.")
@click.option("--layers", is_flag=True, help="Show each layer, not their spread and the worst.")
@progress_option
@json_option
def plan_command(
    scores: str | None,
    model: str | None,
    requests: Sequence[SelectionRequest],
    gpus: FitRequest | None,
    family: str | None,
    follow_links: bool,
    evaluation: str | None,
    plan_out: str | None,
    force: bool,
    layers: bool,
    as_json: bool,
) -> None:
    """Show what would be removed. SCORES: a .pt, .safetensors, .npz or .json file.

    Writes no model. Several ratios, separated by commas, are compared. With
    --plan there are no SCORES. MODEL is a folder, org/name[@revision] on the
    Hugging Face Hub, or a URL (s3://, gs://, https://).

    \b
    Examples:
      shardsurgeon plan scores.pt --ratio 0.65
      shardsurgeon plan scores.pt --ratio 0.5,0.65,0.75
      shardsurgeon plan scores.pt --keep 72 --model /models/Kimi-K2.5 -o plan.json
      shardsurgeon plan scores.pt --ratio 0.5 --allocate global
      shardsurgeon plan scores.pt --ratio 0.25,0.5 --evaluation evaluation.json
      shardsurgeon plan scores.pt --fit 8x80GB --context 128k
    """
    from shardsurgeon.operations import prune
    from shardsurgeon.operations.measured import measuring
    from shardsurgeon.pruning.report import PlansReport
    from shardsurgeon.storage.files import output_path, require_folder_of

    if plan_out is not None:
        require_folder_of(output_path(plan_out))
    if force and plan_out is None:
        raise UsageError("--force", "is about a file that -o names", "give -o as well")
    measures = () if evaluation else measuring(model, scores, requests, family)
    how: dict[str, Any] = {"family": family, "follow_links": follow_links}
    how |= {"evaluation": evaluation, "gpus": gpus}
    if len(requests) > 1:
        if plan_out is not None:
            problem = f"one file cannot hold the keep-lists of {len(requests)} ratios"
            raise UsageError("-o", problem, "give a single --ratio")
        compared = PlansReport(tuple(prune.compare(model, scores, requests, **how)))
        emit(compared, comparison_lines(compared, measures), as_json)
        return
    pruning = prune.plan(model, scores, requests[0], **how)
    lines: Iterable[str] = plan_lines(pruning.report, measures, every=layers)
    if plan_out is not None:
        written = prune.save_plan(pruning, plan_out, force=force)
        lines = chain(lines, ["", saved("Keep-lists", plan_out, written)])
        lines = chain(lines, _serve_lines(pruning, plan_out))
    emit(pruning.report, lines, as_json, told_otherwise=plan_out is not None)


def _serve_lines(pruning: Pruning, plan_out: str) -> Iterator[str]:
    """How the model itself is served with the saved plan, with nothing written."""
    from shardsurgeon.operations.prune import serve_planned

    if words := serve_planned(pruning, plan_out):
        yield "Serve it without writing a model:"
        yield f"  {typed(words)}"
    elif pruning.serving.by_vllm and pruning.overrides.problem:
        yield f"vLLM serves it from a view, `apply --view`: {pruning.overrides.problem}."


def plan_lines(
    report: PlanReport, measures: Sequence[str], *, every: bool = False
) -> Iterator[str]:
    """A plan: its layers, then the totals; measures: the command that says what it costs, to copy,
    none where that is known; every: each layer, however many there are."""
    yield report.title
    yield ""
    yield from layer_lines(report.layers, every=every, measuring=measures)
    yield units_legend(report.total_parameters_before)
    yield ""
    yield from total_lines(report)


def total_lines(report: PlanReport) -> Iterator[str]:
    """What a plan comes to, what it needs, and its notes."""
    yield from outcome_lines(report)
    yield from fact("free space", _space(report))
    yield from fact("output", report.out)
    yield from note_lines(report.notes)
    yield from _room(report)


def _space(report: PlanReport) -> str:
    """`224.2 GB needed, 60.8 GB free: not enough`."""
    words = f"{format_size(report.space_needed)} needed"
    if report.space_free is None:
        return words
    words += f", {format_size(report.space_free)} free"
    return words if report.space_needed <= report.space_free else f"{words}: not enough"


def outcome_lines(report: PlanReport) -> Iterator[str]:
    """What a plan comes to: saliency dropped, and sizes before and after."""
    yield from facts(_outcome(report))


def note_lines(notes: Iterable[str]) -> Iterator[str]:
    """Each note once."""
    for note in dict.fromkeys(notes):
        yield from fact("note", note)


def comparison_lines(compared: PlansReport, measures: Sequence[str]) -> Iterator[str]:
    """Several plans of one model, a line each; measures: as for `plan_lines`."""
    reports = compared.plans
    yield compared.title
    yield ""
    yield from fact("now", _now(reports[0]))
    yield ""
    machines = [fit.machine.replace("x", "x\n", 1) for fit in reports[0].fits]
    headings = (*_COMPARED[:-1], *machines) if machines else _COMPARED
    yield from table(headings, (_compared(report) for report in reports))
    yield ""
    yield from _measured_table(reports)
    yield "  saliency dropped: share of a layer's saliency that goes with its experts"
    yield from no_accuracy(measures)
    if machines:
        yield "  under a machine: tokens of KV cache left; -: the weights do not fit"
    else:
        yield "  narrowest cut: how far the highest pruned saliency stays below the lowest kept"
    yield units_legend(reports[0].total_parameters_before)
    notes = list(note_lines(note for report in reports for note in report.notes))
    yield from ["", *notes] if notes else []
    yield from _served(reports)


def _served(reports: Sequence[PlanReport]) -> Iterator[str]:
    """What the machines' columns rest on: counts that do not divide, flags, assumptions."""
    if not reports[0].fits:
        return
    yield ""
    for fit in reports[0].fits:
        yield from fact(fit.machine, f"vllm serve ... {fit.flags}")
    yield from refusals(reports[0].fits)
    notes = (row.note for report in reports for fit in report.fits for row in fit.rows)
    yield from note_lines(note for note in notes if note)
    yield ""
    from shardsurgeon.pruning.fit import ASSUMED

    yield from assumption_lines(ASSUMED)


def _room(report: PlanReport) -> Iterator[str]:
    """What one plan leaves of each machine, and what that rests on."""
    for fit in report.fits:
        for row in fit.rows:
            words = f"{format_size(row.weights_nbytes)} of weights per GPU, {_tokens(row)} tokens "
            fits = "fits" if row.fits else "does not fit"
            yield from fact(fit.machine, f"{words}of KV cache left: {fits}")
    yield from _served([report])


def _tokens(row: FitRow) -> str:
    return f"{row.tokens:,}" if row.cache_nbytes > 0 else "-"


def _now(report: PlanReport) -> str:
    words = [f"{_before(report)} experts in each of {len(report.layers)} MoE layers"]
    words.append(f"{format_size(report.total_size_before)} of tensor data")
    if report.total_parameters_before is not None:
        words.append(f"{parameters(report.total_parameters_before)} parameters")
    return ", ".join(words)


def _outcome(report: PlanReport) -> Iterator[tuple[str, str]]:
    yield "chosen by", _chosen_by(report)
    if report.saliency_dropped_mean is not None:
        of = f", as measured on {report.saliency_of}" if report.saliency_of else ""
        worst = report.saliency_dropped_worst, report.saliency_dropped_worst_layer
        yield "saliency", f"{_dropped_words(report, report.saliency_dropped_mean, *worst)}{of}"
    if (mean := report.saliency_dropped_uniform_mean) is not None:
        worst = report.saliency_dropped_uniform_worst, report.saliency_dropped_uniform_worst_layer
        yield "if equal", _dropped_words(report, mean, *worst)
    if report.measured is not None:
        yield from _measured(report.measured)
    if report.mtp_dropped:
        yield "MTP", "the next-token-prediction layers are dropped"
    yield "tensor data", _size_change(report)
    if report.total_parameters_before is not None and report.total_parameters_after is not None:
        counts = report.total_parameters_before, report.total_parameters_after
        yield "parameters", change(*counts, [parameters(count) for count in counts])
    yield "shards", f"{report.shards_before:,} -> {report.shards_after:,}"
    if report.carried_along:
        yield "carried along", counted(len(report.carried_along), "file")
    if report.left_behind:
        yield "left behind", grouped(report.left_behind, report.carried_along)


def _chosen_by(report: PlanReport) -> str:
    words = [f"--{report.selection}"]
    if report.ratio is not None:
        words[0] += f" {report.ratio:g}"
    if report.rounding is not None:
        words.append(f"rounding {report.rounding}")
    if report.metric is not None:
        words.append(f"metric {report.metric}")
    if report.allocate != Allocation.UNIFORM:
        words.append(f"--allocate {report.allocate}")
    return ", ".join(words)


def _size_change(report: PlanReport) -> str:
    sizes = report.total_size_before, report.total_size_after
    return change(*sizes, [format_size(nbytes) for nbytes in sizes])


_COMPARED = (
    *("ratio", "kept", "tensor\ndata", "share\nleft", "parameters"),
    *("saliency\ndropped\non average", "\n\nat worst", "\nnarrowest\ncut"),
)


def _compared(report: PlanReport) -> tuple[str, ...]:
    return (
        f"{report.ratio:g}",
        _kept(report),
        format_size(report.total_size_after),
        percent(report.share_left),
        parameters(report.total_parameters_after),
        percent(report.saliency_dropped_mean),
        percent(report.saliency_dropped_worst),
        *([_column(fit) for fit in report.fits] or [percent(report.narrowest_cut)]),
    )


def _measured_table(reports: Sequence[PlanReport]) -> Iterator[str]:
    """What an evaluation measured of plans: a table of its own, for which a line has no room."""
    known = next((report.measured for report in reports if report.measured is not None), None)
    if known is None:
        return
    headings = ["ratio", "perplexity", "change", "KL\nmean", "KL\np99", "same first\nchoice"]
    parts = any(report.measured and report.measured.worst_part for report in reports)
    headings += ["worst\npart"] if parts else []
    data = f"on {known.dataset}, {counted(known.tokens, 'token')}"
    before = f"the whole model's perplexity is {known.perplexity_before:.4g}"
    yield from fact("measured", f"{data}: {before}")
    yield ""
    rows = ((f"{report.ratio:g}", *_costs(report.measured)) for report in reports)
    yield from table(headings, (row[: len(headings)] for row in rows))
    yield "  KL: in nats, of the plan from the model, per token; 0 where they say the same"
    yield ""


def _costs(found: Measured | None) -> tuple[str, ...]:
    if found is None:
        return ("-",) * 6
    return (
        f"{found.perplexity:.4g}",
        f"{found.perplexity_ratio - 1:+.1%}",
        f"{found.kl_mean:.3g}",
        f"{found.kl_p99:.3g}",
        percent(found.agreement),
        found.worst_part or "-",
    )


def _measured(found: Measured) -> Iterator[tuple[str, str]]:
    perplexity, by, mean, p99, agreement, worst = _costs(found)
    yield "perplexity", f"{found.perplexity_before:.4g} -> {perplexity} ({by})"
    yield "KL", f"{mean} nats per token on average, {p99} at the 99th percentile"
    worst = f", worst on {worst}" if found.worst_part else ""
    on = f"{counted(found.tokens, 'token')} of {found.dataset}"
    yield "same choice", f"{agreement} of first choices, measured on {on}{worst}"


def _column(fit: MachineFit) -> str:
    return _tokens(fit.rows[0]) if fit.rows else "no"


def _kept(report: PlanReport) -> str:
    """`135`, or `96-212` where layers keep different numbers."""
    ends = report.kept_least, report.kept_most
    return str(ends[0]) if ends[0] == ends[1] else f"{ends[0]}-{ends[1]}"


def _before(report: PlanReport) -> str:
    counts = sorted(layer.kept + layer.pruned for layer in report.layers)
    return str(counts[0]) if counts[0] == counts[-1] else f"{counts[0]} to {counts[-1]}"


def _dropped_words(report: PlanReport, mean: float, worst: float | None, layer: int | None) -> str:
    worst_of = f", {percent(worst)} at worst (layer {layer})" if len(report.layers) > 1 else ""
    return f"{percent(mean)} dropped on average{worst_of}"
