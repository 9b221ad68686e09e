"""`shardsurgeon inspect`: what a model is made of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from shardsurgeon.cli.help import Command
from shardsurgeon.cli.options import family_option, json_option, model_argument, progress_option
from shardsurgeon.cli.output import emit, facts, parameters, percent, table, units_legend
from shardsurgeon.units import counted, format_size, number_ranges

if TYPE_CHECKING:
    from shardsurgeon.operations.reports import InspectReport, PrunedReport


@click.command("inspect", cls=Command)
@model_argument
@family_option
@progress_option
@json_option
def inspect_command(model: str | None, family: str | None, as_json: bool) -> None:
    """Show a model's layers, experts and sizes.

    MODEL is the folder of a checkpoint, by default the current folder, or a
    repository of the Hub such as org/name. Reads headers and config only.

    \b
    Examples:
      shardsurgeon inspect
      shardsurgeon inspect /models/Kimi-K2.5 --json
      shardsurgeon inspect moonshotai/Kimi-K2.5
    """
    from shardsurgeon.operations import inspect

    report = inspect.inspect(model, family=family)
    emit(report, _lines(report), as_json)


def _lines(report: InspectReport) -> Iterator[str]:
    yield report.title
    yield ""
    yield from facts(_facts(report))
    if report.sizes_at:
        yield ""
        yield from table(("experts\nremoved", "tensor\ndata left", "share\nleft"), _sizes(report))
    yield from ["", units_legend(report.total_parameters)]
    if report.incomplete_experts:
        yield from [
            "",
            "Experts that lack a tensor which others have: they can be pruned, not kept",
        ]
        rows = report.incomplete_experts.items()
        yield from table(("layer", "experts"), ((str(n), number_ranges(ids)) for n, ids in rows))
    yield from ["", *facts(("note", note) for note in report.notes)] if report.notes else []


def _facts(report: InspectReport) -> Iterator[tuple[str, str]]:
    if report.pruned is not None:
        yield "pruned", _pruned(report.pruned)
    if report.view is not None:
        used = f"{counted(report.view.files, 'file')} of {format_size(report.view.nbytes)}"
        yield "view of", f"{report.view.source} ({used})"
    layers = f"{len(report.moe_layers)} ({number_ranges(report.moe_layers)})"
    expert = _size_range(report.smallest_expert_size, report.expert_size)
    over_layers = _size_range(
        report.smallest_expert_size_over_layers, report.expert_size_over_layers
    )
    yield "architecture", ", ".join(report.architectures) or "not named"
    yield "family", report.family
    yield "layers", str(report.num_hidden_layers)
    yield "MoE layers", layers
    yield "MTP layers", number_ranges(report.mtp_layers) or "none with experts"
    yield "experts", f"{_experts(report)} per MoE layer, {report.top_k} chosen per token"
    if report.n_group > 1:
        yield "groups", f"{report.n_group}, {report.topk_group} of them chosen per token"
    yield "layout", report.expert_layout
    yield "quantization", report.quantization or "none"
    yield "tensors", f"{report.tensors:,} in {counted(report.shards, 'shard')}"
    yield "tensor data", _data(report)
    if report.total_parameters is not None:
        yield "parameters", _parameters(report)
    yield "one expert", f"{expert} in a layer, {over_layers} over all layers"


def _pruned(pruned: PrunedReport) -> str:
    """`from Kimi-K2.5, which had 384 experts per MoE layer, by 65% (metric reap)`."""
    words = f"from {pruned.origin}, which had {pruned.num_experts} experts per MoE layer"
    if pruned.prunes > 1:
        words += f", in {pruned.prunes} prunes, the last of {pruned.source}"
    words += f", by {100 * pruned.ratio:.4g}%"
    return words + (f" (metric {pruned.metric})" if pruned.metric else " (a keep-list)")


def _data(report: InspectReport) -> str:
    """The size, and where the dtypes are several that of each."""
    sizes = [f"{format_size(nbytes)} {dtype}" for dtype, nbytes in report.dtypes.items()]
    words = format_size(report.total_size)
    return f"{words}: {', '.join(sizes)}" if len(sizes) > 1 else f"{words} {''.join(report.dtypes)}"


def _parameters(report: InspectReport) -> str:
    words = parameters(report.total_parameters)
    if report.active_parameters is None:
        return words
    return f"{words}, {parameters(report.active_parameters)} of them active per token"


def _experts(report: InspectReport) -> str:
    """`384`, or `108 to 216` where layers have different numbers."""
    if report.num_experts_per_layer is None:
        return str(report.num_experts)
    counts = report.num_experts_per_layer.values()
    return f"{min(counts)} to {max(counts)}"


def _size_range(smallest: int, largest: int) -> str:
    """`25.1 MB`, or `8.2 MB to 25.1 MB` where they differ as they are written."""
    return " to ".join(dict.fromkeys((format_size(smallest), format_size(largest))))


def _sizes(report: InspectReport) -> Iterator[tuple[str, str, str]]:
    for ratio, nbytes in report.sizes_at.items():
        yield f"{float(ratio):.0%}", format_size(nbytes), percent(report.shares_at[ratio])
