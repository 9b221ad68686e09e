"""`shardsurgeon apply`: write the pruned model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from shardsurgeon.checkpoint.sampling import generation_members
from shardsurgeon.cli.help import Command
from shardsurgeon.cli.options import (
    OUT,
    as_given,
    evaluation_option,
    family_option,
    json_option,
    links_option,
    model_option,
    only_one,
    progress_option,
    push_options,
    scores_argument,
    selection_options,
)
from shardsurgeon.cli.output import Steps, emit, fact, typed
from shardsurgeon.cli.plan import note_lines, outcome_lines, plan_lines
from shardsurgeon.cli.push import push_lines
from shardsurgeon.cli.values import OfMachine, at_least, settings, shard_size, size
from shardsurgeon.errors import InputError, ShardSurgeonError, WorkError
from shardsurgeon.operations.request import Destination, RunOptions
from shardsurgeon.pruning.request import SelectionRequest
from shardsurgeon.units import counted, format_size

if TYPE_CHECKING:
    from shardsurgeon.operations.materialize import MaterializeReport
    from shardsurgeon.operations.prune import Pruning
    from shardsurgeon.operations.reports import ApplyReport, PushTarget, Refusal
    from shardsurgeon.verification.findings import VerifyReport


workers_option = click.option(
    "--workers",
    "-j",
    cls=OfMachine,
    envvar="SHARDSURGEON_WORKERS",
    metavar="N",
    type=int,
    default=0,
    callback=at_least(0),
    help="Threads that copy; the bytes are the same for any number.  [default: 0, as suits]",
)
checksums_option = click.option(
    "--checksums",
    is_flag=True,
    help="Record the SHA-256 of the shards too, which reads them once more.",
)
dry_run_option = click.option(
    "--dry-run", is_flag=True, help="Say what would happen and write nothing."
)
restart_option = click.option(
    "--restart", is_flag=True, help="Start over instead of resuming in OUT.partial."
)


def _sampling(
    context: click.Context, parameter: click.Parameter, texts: tuple[str, ...]
) -> dict[str, float]:
    """Turn `min_p=0.05` into values by name, which can be written."""
    found = settings(texts)
    generation_members(found)
    return found


@click.command("apply", cls=Command)
@scores_argument
@model_option
@selection_options
@family_option
@links_option
@evaluation_option
@click.option(
    *OUT,
    "out",
    metavar="OUT",
    help="Folder to write.  [default: <model>-REAP-65pct]",
)
@click.option(
    "--sampling",
    metavar="NAME=X[,...]",
    multiple=True,
    callback=_sampling,
    help="Write these defaults into the result's generation_config.json, such as "
    "min_p=0.05,repetition_penalty=1.1, by the names of `probe`.",
)
@click.option(
    "--max-shard-size",
    "max_shard_nbytes",
    metavar="SIZE",
    default="source",
    callback=shard_size,
    show_default=True,
    help="Pack shards up to this size, such as 5GB; source keeps the source's cutting.",
)
@workers_option
@click.option(
    "--verify/--no-verify",
    default=None,
    help="Check the result: structure of every tensor, bytes of a sample.  "
    "[default: verify, but for a view]",
)
@click.option(
    "--view",
    is_flag=True,
    help="Write where the shards' bytes lie in MODEL, and no shards: a few MB that "
    "engines load and `materialize` makes shards of.",
)
@checksums_option
@dry_run_option
@restart_option
@click.option("--push-to-hub", metavar="REPO_ID", help="Push the result, with a model card.")
@click.option(
    "--stream-push",
    metavar="REPO_ID",
    help="Push every shard when it is finished and keep none: OUT never appears.",
)
@click.option(
    "--disk-budget",
    metavar="SIZE",
    callback=size,
    help="Disk for shards on their way, such as 20GB.  [default: four of the largest]",
)
@push_options
@progress_option
@json_option
def apply_command(
    scores: str | None,
    model: str | None,
    requests: Sequence[SelectionRequest],
    family: str | None,
    follow_links: bool,
    evaluation: str | None,
    sampling: dict[str, float],
    out: str | None,
    max_shard_nbytes: int | None,
    workers: int,
    verify: bool | None,
    view: bool,
    checksums: bool,
    dry_run: bool,
    restart: bool,
    push_to_hub: str | None,
    stream_push: str | None,
    disk_budget: int | None,
    pushed: dict[str, Any],
    as_json: bool,
) -> None:
    """Write the pruned model. SCORES: a .pt, .safetensors, .npz or .json file.

    With --plan there are no SCORES. MODEL is a folder, org/name[@revision] on
    the Hugging Face Hub, or a URL (s3://, gs://, https://). It is only read. OUT
    appears when it is complete; until then the work is in OUT.partial, and the
    same command resumes it after any interruption. An OUT that the same command
    made is checked again, any other is refused.

    \b
    Examples:
      shardsurgeon apply scores.pt --ratio 0.65
      shardsurgeon apply scores.pt --keep 72 --model /models/Kimi-K2.5
      shardsurgeon apply scores.pt --target-size 122GB -o /models/small
      shardsurgeon apply scores.pt --ratio 0.65 --view
      shardsurgeon apply --plan plan.json --model org/m --stream-push me/small
    """
    from shardsurgeon.operations import apply, carry_out, prune
    from shardsurgeon.operations.measured import measuring

    request, steps = replace(only_one(requests), sampling=sampling), Steps.here()
    # A view is loaded by loaders that read a count per layer.
    request = replace(request, allow_nonuniform=request.allow_nonuniform or view)
    destination = Destination.of(push_to_hub, stream_push, disk_budget=disk_budget, **pushed)
    options = RunOptions(
        workers=workers,
        verify=not view if verify is None else verify,
        dry_run=dry_run,
        restart=restart,
        checksums=checksums,
        command=as_given(),
    )

    def planned() -> Pruning:
        made = prune.plan(
            model,
            scores,
            request,
            out=out,
            max_shard_nbytes=max_shard_nbytes,
            family=family,
            follow_links=follow_links,
            recipe=steps.recipe if steps else None,
            evaluation=evaluation,
        )
        return prune.as_view(made, is_named=out is not None) if view else made

    # No variable holds the plan: its memory is needed for the check at the end.
    report = apply.apply(planned(), options, destination)
    stop = refused(report.refusal) if report.refusal is not None else None
    measures = () if evaluation else measuring(model, scores, [request], family)
    lines = _lines(report, measures, follow_links)
    try:
        emit(report, lines, as_json, told_otherwise=not dry_run, error=stop)
    except BaseException as end:
        if report.out is not None:
            end.add_note(carry_out.complete(report.out))
        raise
    if stop is not None:
        raise stop


def refused(refusal: Refusal) -> ShardSurgeonError:
    """What a run would end with, as the end of its dry run."""
    kind = InputError if refusal.status == InputError.exit_status else WorkError
    return kind(refusal.where, refusal.problem, refusal.remedy)


def _lines(report: ApplyReport, measures: Sequence[str], follow_links: bool) -> Iterator[str]:
    if report.dry_run:
        yield from plan_lines(report.plan, measures)
        yield from _target_lines(report.target) if report.target else ()
        yield ""
        stop = "; the run would stop at once" if report.refusal else ""
        yield f"Dry run: nothing was written{stop}."
        return
    yield report.title
    yield ""
    yield from outcome_lines(report.plan)
    if report.out is not None:
        yield from fact("written", f"{report.out}: {written(report)}")
    else:
        yield from fact("streamed", written(report))
    if report.bytes_downloaded:
        yield from fact("downloaded", format_size(report.bytes_downloaded))
    yield from checked(report.verification, *(["nothing"] if report.view else []))
    yield from push_lines(report.push) if report.push else ()
    yield from note_lines(report.plan.notes)
    yield from _next(report, follow_links)


def _target_lines(target: PushTarget) -> Iterator[str]:
    """The repository that a run would push to."""
    where = target.repo_id if target.revision == "main" else f"{target.repo_id}@{target.revision}"
    which = "a new repository" if target.created else "a repository that is there"
    words = {True: "private", False: "public", None: "public unless its organization says else"}
    seen = words[target.private]
    how = ", by a pull request" if target.pull_request else ""
    yield from fact("push to", f"{where}: {which}, {seen}{how}")


def written(report: ApplyReport | MaterializeReport) -> str:
    """How many files, bytes and seconds a run took, and which of the bytes it did not move."""
    if not report.bytes_copied + report.bytes_shared:
        size = format_size(report.bytes_resumed)
        return f"{counted(report.files, 'file')}, {size}, all of it by an earlier run"
    copied = format_size(report.bytes_copied)
    if report.bytes_shared:
        copied = f"shared {format_size(report.bytes_shared)}, copied {copied}"
    words = f"{counted(report.files, 'file')}, {copied}"
    words += f" in {report.seconds:.1f} s ({format_size(report.bytes_per_second)}/s)"
    if report.bytes_resumed:
        words += f", {format_size(report.bytes_resumed)} by an earlier run"
    return words


def checked(check: VerifyReport | None, nothing: str = "nothing (--no-verify)") -> list[str]:
    """What was compared; nothing: the words where there was no check."""
    if check is None:
        return fact("checked", nothing)
    structure = f"structure of all {counted(check.tensors, 'tensor')}"
    compared = f"bytes of {check.tensors_compared:,}"
    compared += " sampled" if check.sampled is not None else ""
    return fact("checked", f"{structure}, {compared} ({format_size(check.bytes_compared)})")


def _next(report: ApplyReport, follow_links: bool) -> Iterator[str]:
    """Commands to copy, each on a line of its own however long it gets."""
    out, check = report.out, report.verification
    source = report.source or (check.source if check else "")
    yield ""
    if out is not None and source:
        words = ["shardsurgeon", "verify", source, out]
        words += ["--family", report.family] if report.family else []
        words += ["--follow-links"] if follow_links else []
        yield "Compare every byte:"
        yield f"  {typed(words)}"
    if out is not None and report.view:
        yield "Make real shards:"
        yield f"  {typed(['shardsurgeon', 'materialize', out])}"
    if report.serve is not None:
        yield "Serve:"
        yield f"  {typed(report.serve)}"
