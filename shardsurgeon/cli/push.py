"""`shardsurgeon push`: put a pruned model on the Hub."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from shardsurgeon.cli.help import Command
from shardsurgeon.cli.options import (
    as_given,
    family_option,
    json_option,
    links_option,
    progress_option,
    push_options,
)
from shardsurgeon.cli.output import emit, fact, grouped, typed
from shardsurgeon.cli.values import size
from shardsurgeon.operations.request import Destination
from shardsurgeon.units import counted, format_size

if TYPE_CHECKING:
    from shardsurgeon.operations.reports import PushReport


@click.command("push", cls=Command)
@click.argument("pruned")
@click.argument("repo_id")
@push_options
@click.option(
    "--include",
    metavar="GLOB",
    multiple=True,
    help="Push these files as they are, though apply did not write them, or not so.",
)
@click.option(
    "--exclude", metavar="GLOB", multiple=True, help="Leave these files of the folder here."
)
@click.option(
    "--dry-run", is_flag=True, help="Say what would be pushed, replaced and removed; send nothing."
)
@click.option(
    "--disk-budget",
    metavar="SIZE",
    callback=size,
    help="Disk for a view's shards on their way, such as 20GB.  [default: four of the largest]",
)
@family_option
@links_option
@progress_option
@json_option
def push_command(
    pruned: str,
    repo_id: str,
    pushed: dict[str, Any],
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    dry_run: bool,
    disk_budget: int | None,
    family: str | None,
    follow_links: bool,
    as_json: bool,
) -> None:
    """Put a pruned model on the Hugging Face Hub.

    PRUNED is a folder that apply wrote, REPO_ID is org/name. What apply wrote
    goes in one commit, with a model card; other files stay here and are named.
    A folder that is not as apply wrote it is refused, but for README.md.
    The shards of a view (apply --view) are made on their way, and none stays.
    The same command goes on after any interruption and uploads nothing twice.
    Log in with `hf auth login`, or set HF_TOKEN.

    \b
    Examples:
      shardsurgeon push Kimi-K2.5-REAP-65pct me/Kimi-K2.5-REAP-65pct
      shardsurgeon push Kimi-K2.5-REAP-65pct me/pruned --private --revision 65pct
      shardsurgeon push Kimi-K2.5-REAP-65pct me/x --include chat_template.jinja
    """
    from shardsurgeon.operations import push

    destination = Destination(repo_id, **pushed)
    report = push.push(
        pruned,
        destination,
        family=family,
        include=include,
        exclude=exclude,
        follow_links=follow_links,
        dry_run=dry_run,
        disk_budget=disk_budget,
        command=as_given(),
    )
    emit(report, _lines(pruned, report), as_json, told_otherwise=not dry_run)


def _lines(pruned: str, report: PushReport) -> Iterator[str]:
    yield f"{pruned}: {report.title}"
    yield ""
    yield from push_lines(report)
    if report.dry_run:
        yield ""
        yield "Dry run: nothing was made there and nothing sent."
        return
    if report.serve is not None:
        yield ""
        yield "Serve:"
        yield f"  {typed(report.serve)}"


def push_lines(report: PushReport) -> Iterator[str]:
    """What a push came to."""
    dry = report.dry_run
    what = f"{counted(report.files, 'file')}, {format_size(report.nbytes)}"
    yield from fact(
        "to push" if dry else "pushed", what if dry else f"{what} in {report.seconds:.1f} s"
    )
    there = format_size(report.sent) if report.sent else "nothing: it was all there"
    yield from fact("to send" if dry else "sent", there)
    where = "pull request" if report.pull_request else "new repository" if report.created else ""
    yield from fact("to", f"{report.url}" + (f" ({where})" if where else ""))
    if report.private is not None:
        yield from fact("visibility", "private" if report.private else "public")
    if not dry:
        yield from fact("commit", report.commit)
    if report.replaced:
        yield from fact("to replace" if dry else "replaced", grouped(report.replaced))
    if report.removed:
        yield from fact(
            "to remove" if dry else "removed", f"an earlier model's {', '.join(report.removed)}"
        )
    if report.others:
        yield from fact("stays there", grouped(report.others))
    if report.left:
        yield from fact("left here", grouped(report.left))
    for note in report.notes:
        yield from fact("note", note)
