"""`shardsurgeon calibrate`: scores from running the model, layer by layer."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import click

from shardsurgeon.cli.estimate import does_not_fit, estimate_lines
from shardsurgeon.cli.help import Command
from shardsurgeon.cli.options import (
    OUT,
    as_given,
    family_option,
    force_option,
    json_option,
    model_argument,
    progress_option,
)
from shardsurgeon.cli.output import emit, fact, part_lines, typed
from shardsurgeon.cli.plan import note_lines
from shardsurgeon.cli.values import OfMachine, at_least, size
from shardsurgeon.errors import UsageError
from shardsurgeon.units import counted

if TYPE_CHECKING:
    from shardsurgeon.layerwise.request import CalibrationReport
    from shardsurgeon.layerwise.settings import Settings

Run = TypeVar("Run", bound=Callable[..., Any])


def _batch_size(context: click.Context, parameter: click.Parameter, text: str) -> int | str:
    if text == "auto":
        return text
    if not text.isdecimal():
        raise UsageError("--batch-size", f"'{text}' is not a number", "write auto or a number")
    return int(text)


def _share(
    context: click.Context, parameter: click.Parameter, text: str | None
) -> tuple[int, int] | None:
    if text is None:
        return None
    match = re.fullmatch(r"([1-9][0-9]{0,5})/([1-9][0-9]{0,5})", text)
    if not match or int(match[1]) > int(match[2]):
        raise UsageError("--share", f"'{text}' is not a share", "write it like 1/4, 2/4, 3/4, 4/4")
    return int(match[1]), int(match[2])


def _needed(context: click.Context, parameter: click.Parameter, text: str | None) -> str | None:
    """A callback that refuses no text, but in a dry run."""
    if text is None and not context.params["dry_run"] and not context.resilient_parsing:
        raise click.MissingParameter(ctx=context, param=parameter)
    return text


_RUN: list[Callable[[Any], Any]] = [
    click.option(
        "--samples",
        metavar="N",
        type=int,
        callback=at_least(1),
        help="Samples in all.  [default: 512, or as SPEC says]",
    ),
    click.option(
        "--max-length",
        metavar="L",
        type=int,
        callback=at_least(1),
        help="Tokens of a sample at most.  [default: 2048]",
    ),
    click.option(
        "--seed",
        metavar="N",
        type=int,
        default=42,
        show_default=True,
        callback=at_least(0),
        help="Which records are drawn; the same seed draws the same ones.",
    ),
    click.option(
        "--device",
        cls=OfMachine,
        envvar="SHARDSURGEON_DEVICE",
        metavar="NAME",
        default="cpu",
        show_default=True,
        help="Where a layer computes: cpu, cuda for every GPU, or cuda:1 for one.",
    ),
    click.option(
        "--dtype",
        metavar="NAME",
        help="Arithmetic in bfloat16, float16, float32 or float64.  [default: the model's own, or "
        "float32 on a CPU that is faster in it]",
    ),
    click.option(
        "--batch-size",
        metavar="auto|N",
        default="auto",
        show_default=True,
        callback=_batch_size,
        help="Samples that pass a layer together.",
    ),
    click.option(
        "--memory",
        metavar="SIZE",
        callback=size,
        help="The most that it may take, on the device or of a processor's memory, such as 40GB.  "
        "[default: what is free]",
    ),
    click.option(
        "--activation-budget",
        metavar="SIZE",
        callback=size,
        help="Memory for what passes from layer to layer, such as 16GB; more than that is kept "
        "in a file in FILE.partial.  [default: half of what is free]",
    ),
    click.option(
        "--field",
        metavar="NAME",
        help="The field of a record that holds the messages or the text, where it has a name that "
        "is not known.",
    ),
    click.option(
        "--tokens",
        type=click.Choice(["all", "assistant"]),
        default="all",
        show_default=True,
        help="Which tokens count; all pass through the model. For assistant the chat template has "
        "to mark what the assistant says ({% generation %}).",
    ),
    click.option(
        "--skip-invalid",
        is_flag=True,
        help="Leave out records that cannot be used (empty, broken, of unknown form); FILE counts "
        "and lists them.",
    ),
    click.option(
        "--tokenizer",
        metavar="FOLDER",
        help="Take the tokenizer and the chat template from here.  [default: the model's own]",
    ),
    click.option(
        "--trust-remote-code",
        is_flag=True,
        help="Run the tokenizer's code where its folder ships some.",
    ),
]


def run_options(command: Run) -> Run:
    """Add the options for samples and for the machine, of every command that runs a model."""
    for option in reversed(_RUN):
        command = option(command)
    return command


def settings_of(device: str, dtype: str | None, batch_size: Any, seed: int) -> Settings:
    """The settings that they give."""
    from shardsurgeon.layerwise.settings import Settings

    return Settings(device=device, dtype=dtype, batch_size=batch_size, seed=seed)


@click.command("calibrate", cls=Command)
@model_argument
@click.option(
    "--dataset",
    metavar="SPEC",
    callback=_needed,
    help="Files, folders, names on the Hub (see Notes).",
)
@click.option(
    *OUT,
    "out",
    metavar="FILE",
    callback=_needed,
    help="A .pt, .npz, .json or .safetensors.",
)
@run_options
@click.option(
    "--dry-run",
    is_flag=True,
    is_eager=True,
    help="Say what it would take, here and elsewhere.",
)
@force_option
@click.option(
    "--extend",
    metavar="FILE",
    help="Draw other samples than this score file has, and add its sums to the new ones.",
)
@click.option(
    "--share",
    metavar="K/N",
    callback=_share,
    help="Take every Nth sample from the Kth on, for one of N machines; `scores merge` adds "
    "their files up.",
)
@click.option(
    "--pack",
    is_flag=True,
    help="Samples are windows of --max-length tokens, filled with records, one empty position "
    "between them, as REAP does by default.",
)
@family_option
@click.option("--restart", is_flag=True, help="Start over instead of resuming in FILE.partial.")
@progress_option
@json_option
def calibrate_command(
    model: str | None,
    dataset: str | None,
    out: str | None,
    dry_run: bool,
    force: bool,
    device: str,
    dtype: str | None,
    batch_size: Any,
    seed: int,
    family: str | None,
    restart: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Score experts by running samples through the model.

    SPEC names a .jsonl, .json, .parquet or .txt file (a line a sample), a local
    folder, or a dataset of the Hub: name, name[subset] or name(split). `:n`
    behind it takes n samples of it; parts without a number share the rest.

    MODEL is the folder of a checkpoint, by default the current folder, or a
    repository of the Hub such as org/name. A sample is cut to what the model
    allows. One layer is in memory at a time,
    read straight from the shards. FILE appears when it is complete; until then
    the work is in FILE.partial, saved every 10 minutes, and the same command
    goes on from there. Needs pip install '.[calibrate]'.

    --dry-run reads headers only and needs no torch. It says how the samples would
    pass this machine, and estimates time and bytes on four others; without
    --dataset for as many and as long samples as --samples and --max-length say.

    \b
    Examples:
      shardsurgeon calibrate --dataset chats.jsonl --samples 256 -o scores.pt
      shardsurgeon calibrate --dataset a.jsonl:384,b.parquet:128 -o scores.pt
      shardsurgeon calibrate --dataset 'org/name(train)' --device cuda -o s.pt
    """
    from shardsurgeon.layerwise import run
    from shardsurgeon.layerwise.request import CalibrationRequest

    settings = settings_of(device, dtype, batch_size, seed)
    request = CalibrationRequest(dataset or "", settings, **options)
    if dry_run:
        estimated = run.rehearse(model, request, out, family=family, force=force)
        refused = does_not_fit(estimated)
        emit(estimated, estimate_lines(estimated), as_json, error=refused)
        if refused is not None:
            raise refused
        return
    assert out is not None
    report = run.calibrate(
        model, request, out, family=family, restart=restart, force=force, command=as_given()
    )
    emit(report, _lines(report, model, family), as_json, told_otherwise=True)


def _lines(report: CalibrationReport, model: str | None, family: str | None) -> Iterator[str]:
    yield report.title
    yield ""
    tokens = f"{counted(report.samples, 'sample')}, {counted(report.tokens, 'token')}"
    rate = f"{report.tokens_per_second:,.0f} tokens/s"
    yield from fact("samples", f"{tokens} in {report.seconds:.1f} s ({rate})")
    if report.counted_tokens != report.tokens:
        yield from fact("counted", counted(report.counted_tokens, "token"))
    if report.total_samples != report.samples:
        yield from fact("in the file", counted(report.total_samples, "sample"))
    yield from part_lines(report.parts)
    reason = f": {report.dtype_reason}" if report.dtype_reason else ""
    yield from fact("computed", f"in {report.dtype} on {report.device}{reason}")
    layers = counted(report.layers, "MoE layer")
    if report.mtp_layers:
        layers += f", {report.mtp_layers} of them for next-token prediction"
    if report.layers_resumed:
        layers += f", {report.layers_resumed} by an earlier run"
    yield from fact("scored", layers)
    yield from fact("never routed", counted(report.never_routed, "expert"))
    yield from note_lines(report.notes)
    yield ""
    yield f"Scores saved in {report.out}. Look at them, then prune:"
    yield f"  {typed(['shardsurgeon', 'scores', 'show', report.out])}"
    words = ["shardsurgeon", "apply", report.out, "--ratio", "0.5"]
    words += [] if model is None else ["--model", model]
    words += [] if family is None else ["--family", family]
    yield f"  {typed(words)}"
