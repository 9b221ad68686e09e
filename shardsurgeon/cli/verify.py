"""`shardsurgeon verify`: prove a pruned model against its source."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from shardsurgeon.cli.help import Command
from shardsurgeon.cli.options import (
    family_option,
    json_option,
    links_option,
    progress_option,
    source_and_pruned,
)
from shardsurgeon.cli.output import emit, facts
from shardsurgeon.cli.values import at_least
from shardsurgeon.errors import VerificationError
from shardsurgeon.units import counted, format_size, number_ranges

if TYPE_CHECKING:
    from shardsurgeon.verification.findings import ArchitectureReport, VerifyReport


@click.command("verify", cls=Command)
@source_and_pruned
@click.option(
    "--sample",
    metavar="N",
    type=int,
    callback=at_least(1),
    help="Compare the bytes of N tensors per shard.  [default: of every tensor]",
)
@click.option(
    "--architecture",
    is_flag=True,
    help="Also check, by names and shapes, that transformers' model of the pruned config takes"
    " exactly these tensors. Needs pip install '.[architecture]'.",
)
@family_option
@links_option
@progress_option
@json_option
def verify_command(
    source: str,
    pruned: str,
    sample: int | None,
    architecture: bool,
    family: str | None,
    follow_links: bool,
    as_json: bool,
) -> None:
    """Prove a pruned model against its source.

    SOURCE and PRUNED are folders, or repositories of the Hub such as org/name.
    Checks headers, index, config, side files and metadata, and compares every
    byte of every surviving tensor. Exit status 1 where something differs,
    with the first differences. A sample that shows none says no more than that.

    \b
    Examples:
      shardsurgeon verify /models/Kimi-K2.5 Kimi-K2.5-REAP-65pct
      shardsurgeon verify /models/Kimi-K2.5 Kimi-K2.5-REAP-65pct --sample 20
      shardsurgeon verify /models/Kimi-K2.5 Kimi-K2.5-REAP-65pct --architecture
    """
    from shardsurgeon.operations import verify

    report = verify.verify(
        source,
        pruned,
        sample=sample,
        architecture=architecture,
        family=family,
        follow_links=follow_links,
    )
    error = None if report.holds else _error(report, source, pruned)
    emit(report, _lines(report), as_json, told_otherwise=True, error=error)
    if error is not None:
        raise error


def _error(report: VerifyReport, source: str, pruned: str) -> VerificationError:
    problem = f"{counted(len(report.differences), 'difference')} from {source}"
    if report.architecture is not None:
        built = counted(len(report.architecture.differences), "difference")
        problem += f", {built} from {report.architecture.model_class}"
    return VerificationError(pruned, problem, "see the report")


def _lines(report: VerifyReport) -> Iterator[str]:
    yield report.title
    yield ""
    yield from facts(_facts(report))
    if not report.holds:
        yield ""
        yield from (f"  {difference}" for difference in report.all_differences)


def _facts(report: VerifyReport) -> Iterator[tuple[str, str]]:
    which = "all" if report.sampled is None else f"a sample of {report.sampled} per shard"
    compared = f"{report.tensors_compared:,} tensors ({which})"
    yield "source", report.source
    yield "structure", f"{counted(report.tensors, 'tensor')}, index, config, side files, metadata"
    yield "bytes", f"{format_size(report.bytes_compared)} of {compared}"
    if report.architecture is not None:
        yield from _architecture_facts(report.architecture)
    yield from (("note", note) for note in report.notes)


def _architecture_facts(report: ArchitectureReport) -> Iterator[tuple[str, str]]:
    expected = f"{report.parameters:,} parameters and buffers of {report.model_class}"
    yield "architecture", f"{report.tensors:,} tensors, {expected}, {report.engine}"
    if report.mtp_layers:
        layers = number_ranges(report.mtp_layers)
        yield "MTP layers", f"{layers}: experts and routers, by the shapes of a main layer"
    if report.unchecked:
        yield "not checked", ", ".join(report.unchecked)
