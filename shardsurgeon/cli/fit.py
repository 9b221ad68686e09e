"""`shardsurgeon fit`: how many experts fit which GPUs."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from shardsurgeon.cli.gpus import SERVING, fit_request
from shardsurgeon.cli.help import Command
from shardsurgeon.cli.options import (
    family_option,
    json_option,
    model_argument,
    progress_option,
    refuse_swapped,
)
from shardsurgeon.cli.output import emit, fact, percent, table
from shardsurgeon.units import counted, format_size

if TYPE_CHECKING:
    from shardsurgeon.operations.fit import FitReport
    from shardsurgeon.pruning.fit import FitRow, MachineFit

# Rows of a machine's table for people: the counts around the best one, thinned out below and above.
_ROWS = 12


def _serving(command: Any) -> Any:
    """Add the options that say how a model is served."""
    return functools.reduce(lambda done, option: option(done), reversed(SERVING.values()), command)


@click.command("fit", cls=Command)
@model_argument
@click.argument("scores", required=False)
@click.option("--gpus", metavar="MACHINES", help="Such as 8x80GB or 4x80GB,2x141GB.")
@_serving
@click.option("--mtp-layers", is_flag=True, help="Count the MTP layers, for speculative decoding.")
@family_option
@progress_option
@json_option
def fit_command(
    model: str | None,
    scores: str | None,
    gpus: str | None,
    mtp_layers: bool,
    family: str | None,
    as_json: bool,
    **serving: Any,
) -> None:
    """Show how many experts fit which GPUs, with how much context.

    MODEL is the folder of a checkpoint, by default the current folder, or a
    repository of the Hub such as org/name. Reads headers and config only. With
    SCORES the share of saliency that each count drops is shown as well.
    Without --gpus the usual machines are compared.

    \b
    Examples:
      shardsurgeon fit
      shardsurgeon fit moonshotai/Kimi-K2.5 --gpus 4x141GB --context 128k
      shardsurgeon fit /models/GLM-5 scores.pt --gpus 8x80GB --expert-parallel
    """
    from shardsurgeon.operations import fit

    if model is not None and scores is not None:
        refuse_swapped(model, scores)
    request = replace(fit_request(gpus, serving, "--gpus"), mtp=mtp_layers)
    report = fit.fit(model, request, scores=scores, family=family)
    emit(report, fit_lines(report), as_json)


def fit_lines(report: FitReport) -> Iterator[str]:
    """The report for people."""
    yield report.title
    yield ""
    yield from fact("KV cache", _cache(report))
    if report.longest_context:
        yield from fact("context", f"the model is made for {report.longest_context:,} tokens")
    yield ""
    if report.usual:
        yield from table(_USUAL, map(functools.partial(_usual, report), report.machines))
        yield "  kept: the most experts per layer that fit; longest: context of the sequences then"
        yield "  KV tokens: room of the KV cache in all; -: not even the fewest experts fit"
    else:
        for machine in report.machines:
            yield from _machine(report, machine)
    yield from refusals(report.machines)
    yield ""
    yield from assumption_lines(report.assumptions)


def refusals(machines: Iterable[MachineFit]) -> Iterator[str]:
    """Why no engine runs the model on some machines, or does otherwise, each reason once."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for machine in machines:
        for label, reason in (("not on", machine.problem), ("note", machine.note)):
            if reason:
                reasons.setdefault((label, reason), []).append(machine.machine)
    for (label, reason), names in reasons.items():
        yield from fact(label, f"{', '.join(names)}: {reason}")


def assumption_lines(assumptions: Iterable[str]) -> Iterator[str]:
    """What is assumed."""
    yield "Computed from headers and config, not measured. Assumed:"
    for words in assumptions:
        yield from fact("", words)


def _cache(report: FitReport) -> str:
    """`68.6 kB per token, 2.2 GB per sequence of 32,768 tokens, on one GPU alone, bfloat16`."""
    words = [f"{format_size(round(report.token_nbytes))} per token"] if report.token_nbytes else []
    words += [f"{format_size(report.state_nbytes)} of states"] if report.state_nbytes else []
    whole = f"{format_size(report.sequence_nbytes)} per sequence of {report.context:,} tokens"
    return f"{', '.join([*words, whole])}, {report.kv_dtype}, on one GPU alone"


_USUAL = (
    "machine",
    "kept",
    "removed",
    "weights\nper GPU",
    "KV cache\nper GPU",
    "KV\ntokens",
    "longest",
)


def _usual(report: FitReport, machine: MachineFit) -> tuple[str, ...]:
    row = machine.best
    if row is None:
        return (machine.machine, "no" if machine.problem else "-", *("",) * 5)
    kept = f"all {row.kept}" if row.kept == report.num_experts else str(row.kept)
    return (machine.machine, kept, *_numbers(row)[1:])


def _numbers(row: FitRow) -> tuple[str, ...]:
    return (
        str(row.kept),
        percent(row.ratio),
        format_size(row.weights_nbytes),
        format_size(max(row.cache_nbytes, 0)),
        f"{row.tokens:,}",
        f"{row.longest_context:,}",
    )


def _machine(report: FitReport, machine: MachineFit) -> Iterator[str]:
    """One machine: what an engine takes of it, and a line per count."""
    ranks = counted(machine.tensor_parallel, "rank")
    if machine.replicas > 1:
        ranks += f", {counted(machine.replicas, 'replica')}"
    yield f"{machine.machine}: {format_size(machine.gpu_nbytes)} per GPU, {ranks}"
    if not machine.rows:
        yield ""
        return
    yield from fact("sequence", f"{format_size(machine.sequence_nbytes)} of KV cache per GPU")
    beside = format_size(machine.other_nbytes)
    yield from fact("engine", f"{beside} per GPU beside weights and cache")
    yield from fact("flags", machine.flags)
    scored = any(row.saliency_dropped_mean is not None for row in machine.rows)
    heads = ["kept", "removed", *_USUAL[3:], "fits"]
    heads += ["saliency\ndropped", "\nat worst"] if scored else []
    rows = thinned(machine.rows, machine.kept)
    yield from table(heads, (_fitting(row)[: len(heads)] for row in rows))
    if len(rows) < len(machine.rows):
        yield f"  {len(machine.rows)} counts in all: --json has every one"
    notes = dict.fromkeys(row.note for row in rows if row.note)
    for note in notes:
        yield from fact("note", str(note))
    yield ""


def _fitting(row: FitRow) -> tuple[str, ...]:
    dropped = (percent(row.saliency_dropped_mean), percent(row.saliency_dropped_worst))
    return (*_numbers(row), "yes" if row.fits else "no", *dropped)


def thinned(rows: tuple[FitRow, ...], kept: int | None) -> list[FitRow]:
    """At most so many rows as one looks through, the best one and its neighbours among them."""
    if len(rows) <= _ROWS:
        return list(rows)
    best = next((n for n, row in enumerate(rows) if row.kept == kept), 0)
    near = {n for n in (best - 1, best, best + 1) if 0 <= n < len(rows)}
    step = (len(rows) - 1) / (_ROWS - len(near) - 1)
    spread = {round(n * step) for n in range(_ROWS - len(near))}
    return [rows[n] for n in sorted(near | spread)]
