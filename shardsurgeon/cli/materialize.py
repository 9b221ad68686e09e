"""`shardsurgeon materialize`: write the shards of a view."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from shardsurgeon.cli.apply import (
    checked,
    checksums_option,
    dry_run_option,
    refused,
    restart_option,
    workers_option,
    written,
)
from shardsurgeon.cli.help import Command
from shardsurgeon.cli.options import (
    OUT,
    as_given,
    family_option,
    json_option,
    links_option,
    progress_option,
)
from shardsurgeon.cli.output import emit, fact, grouped, typed
from shardsurgeon.operations.request import RunOptions
from shardsurgeon.units import counted, format_size

if TYPE_CHECKING:
    from shardsurgeon.operations.materialize import MaterializeReport


@click.command("materialize", cls=Command)
@click.argument("view")
@click.option(
    *OUT,
    "out",
    metavar="OUT",
    help="Folder to write.  [default: the view's name without -view]",
)
@dry_run_option
@restart_option
@workers_option
@click.option(
    "--verify/--no-verify",
    default=True,
    help="Check the result: structure of every tensor, bytes of a sample.  [default: verify]",
)
@checksums_option
@click.option(
    "--allow-nonuniform",
    is_flag=True,
    help="Accept layers that keep different numbers of experts, as `apply` has it.",
)
@family_option
@links_option
@progress_option
@json_option
def materialize_command(
    view: str,
    out: str | None,
    dry_run: bool,
    restart: bool,
    workers: int,
    verify: bool,
    checksums: bool,
    allow_nonuniform: bool,
    family: str | None,
    follow_links: bool,
    as_json: bool,
) -> None:
    """Make real shards of a view.

    VIEW is a folder that `apply --view` wrote. It stays as it is, and OUT gets
    the bytes that `apply` would have written. Its source has to be where it was,
    or where it can be reached, and unchanged. OUT appears when it is complete;
    until then the work is in OUT.partial, and the same command resumes it after
    any interruption.

    \b
    Examples:
      shardsurgeon materialize Kimi-K2.5-REAP-65pct-view
      shardsurgeon materialize Kimi-K2.5-REAP-65pct-view -o /models/small
      shardsurgeon materialize Kimi-K2.5-REAP-65pct-view --dry-run
    """
    from shardsurgeon.operations import carry_out, materialize

    options = RunOptions(
        workers=workers,
        verify=verify,
        dry_run=dry_run,
        restart=restart,
        checksums=checksums,
        command=as_given(),
    )
    report = materialize.materialize(
        view,
        out,
        options,
        allow_nonuniform=allow_nonuniform,
        family=family,
        follow_links=follow_links,
    )
    stop = refused(report.refusal) if report.refusal is not None else None
    try:
        emit(report, _lines(report, follow_links), as_json, told_otherwise=not dry_run, error=stop)
    except BaseException as end:
        if not dry_run:
            end.add_note(carry_out.complete(report.out))
        raise
    if stop is not None:
        raise stop


def _lines(report: MaterializeReport, follow_links: bool) -> Iterator[str]:
    yield report.title
    yield ""
    yield from fact("source", report.source)
    if report.dry_run:
        what = f"{counted(report.files, 'file')}, {format_size(report.nbytes)}"
        yield from fact("to write", f"{report.out}: {what}")
        if report.space_needed is not None and report.space_free is not None:
            needed, free = map(format_size, (report.space_needed, report.space_free))
            yield from fact("disk", f"{needed} needed, {free} free")
    else:
        yield from fact("written", f"{report.out}: {written(report)}")
        if report.bytes_downloaded:
            yield from fact("downloaded", format_size(report.bytes_downloaded))
        yield from checked(report.verification)
    if report.left:
        yield from fact("left behind", grouped(report.left))
    yield ""
    if report.dry_run:
        stop = "; the run would stop at once" if report.refusal else ""
        yield f"Dry run: nothing was written{stop}."
        return
    words = ["shardsurgeon", "verify", report.source, report.out]
    words += ["--family", report.family] if report.family else []
    words += ["--follow-links"] if follow_links else []
    yield "Compare every byte:"
    yield f"  {typed(words)}"
    if report.serve is not None:
        yield "Serve:"
        yield f"  {typed(report.serve)}"
