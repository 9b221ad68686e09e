"""`shardsurgeon probe`: what is wrong with a served model's free answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import click

from shardsurgeon.cli.help import Command
from shardsurgeon.cli.options import OUT, json_option, progress_option
from shardsurgeon.cli.output import emit, fact, table
from shardsurgeon.cli.values import at_least, settings
from shardsurgeon.units import counted

if TYPE_CHECKING:
    from shardsurgeon.operations.probe_report import (
        DifferenceReport,
        FailureReport,
        ProbeReport,
        SettingReport,
    )

_MOST_SHOWN = 3


def _others(
    context: click.Context, parameter: click.Parameter, texts: tuple[str, ...]
) -> list[dict[str, float]]:
    """Turn each `min_p=0.05,top_k=20` into values by name."""
    return [settings([text]) for text in texts]


def _number(
    name: str, metavar: str, default: float, text: str
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """An option that is a number as its default is: a whole one, or any."""
    return click.option(
        name, metavar=metavar, type=type(default), default=default, show_default=True, help=text
    )


@click.command("probe", cls=Command)
@click.argument("url")
@click.option("--prompts", metavar="SPEC", required=True, help="Files, folders, names on the Hub.")
@click.option(
    "--samples",
    metavar="N",
    type=int,
    callback=at_least(1),
    help="Answers in all.  [default: 2000, or as SPEC says]",
)
@click.option(*OUT, "out", metavar="FILE", required=True, help="The .json to write.")
@click.option(
    "--against",
    metavar="URL|FILE",
    help="The original: its server, or the .json of a probe of it.",
)
@click.option(
    "--sampling",
    metavar="NAME=X[,...]",
    multiple=True,
    callback=_others,
    help="Another setting to ask all prompts with; repeat it for more.",
)
@_number("--temperature", "T", 1.0, "0 for no sampling.")
@_number("--top-p", "P", 1.0, "1 for off.")
@_number("--top-k", "K", -1, "-1 for off.")
@_number("--min-p", "P", 0.0, "0 for off.")
@_number("--repetition-penalty", "X", 1.0, "1 for off.")
@_number("--max-tokens", "N", 2048, "Where an answer is cut, its thinking included.")
@_number(
    "--detect",
    "D",
    0.02,
    "The difference of two shares that matters. Where the interval is wider, nothing is said to "
    "be the same.",
)
@_number(
    "--seed", "N", 42, "Which records are asked, and what the server draws: one more a prompt."
)
@_number("--parallel", "N", 32, "Questions at a time.")
@_number("--timeout", "SECONDS", 600.0, "How long one answer may take.")
@click.option("--field", metavar="NAME", help="The field of a record that holds the prompt.")
@click.option("--served-model", metavar="NAME", help="The model to ask, where URL has several.")
@click.option("--against-model", metavar="NAME", help="The same of the original's server.")
@click.option(
    "--api-key-env",
    metavar="NAME",
    help="The environment variable that holds the key of URL, such as OPENAI_API_KEY. Without it "
    "no key is sent.",
)
@click.option(
    "--against-key-env",
    metavar="NAME",
    help="The same of the original's server.  [default: that of URL where both have one address]",
)
@click.option(
    "--restart", is_flag=True, help="Ask everything again, discarding the answers that are kept."
)
@click.option(
    "--force",
    is_flag=True,
    help="Replace a probe of something else, and drop its answers.",
)
@progress_option
@json_option
def probe_command(
    url: str,
    out: str,
    restart: bool,
    force: bool,
    sampling: list[dict[str, float]],
    temperature: float,
    top_p: float,
    top_k: int,
    min_p: float,
    repetition_penalty: float,
    max_tokens: int,
    parallel: int,
    timeout: float,
    as_json: bool,
    **options: Any,
) -> None:
    """Count how a served model's free answers fail.

    Asks an OpenAI-compatible server (vLLM, SGLang, llama.cpp) and counts answers
    that end in a loop, are cut by length or empty, thinking that never closes,
    and tool calls that do not parse, with intervals of 95 %.

    URL is the server's address, up to /v1. SPEC is as for `calibrate`: of a
    conversation the last answer is left out, a text is what a user says. Each
    sampling value is sent, so that no default of a server counts. The answers
    are kept in FILE's name with .answers.jsonl; the same command asks only what
    has no answer there: add --restart where another model is served under the
    same name.

    \b
    Examples:
      shardsurgeon probe http://localhost:8000/v1 --prompts chats.txt -o p.json
      shardsurgeon probe http://h/v1 --prompts c.jsonl --against o.json -o p.json
      shardsurgeon probe http://h/v1 --prompts c.txt --sampling min_p=.1 -o p.json
    """
    from shardsurgeon.operations import probe
    from shardsurgeon.operations.prompts import Sampling

    base = Sampling(temperature, top_p, top_k, min_p, repetition_penalty, max_tokens)
    request = probe.ProbeRequest(
        base=base, others=sampling, at_once=parallel, seconds=timeout, **options
    )
    report = probe.probe(url, request, out, restart=restart, force=force)
    emit(report, _lines(report), as_json, told_otherwise=True)


def _lines(report: ProbeReport) -> Iterator[str]:
    yield report.title
    yield from fact("server", report.url)
    prompts = f"{counted(report.records, 'prompt')} of {report.prompts}"
    yield from fact("asked", f"{counted(report.samples, 'question')}: {prompts}")
    if report.resumed:
        kept = counted(report.resumed, "answer")
        yield from fact("not asked", f"for {kept} that an earlier run had kept (--restart)")
    sampled = (f"{name} {value:g}" for name, value in report.settings[0].sampling.items())
    yield from fact("sampling", ", ".join(sampled))
    if report.original is not None:
        yield from fact("original", f"{report.original.model} ({report.original.where})")
    for setting in report.settings:
        yield ""
        yield from _setting_lines(setting, report.detect)
    yield ""
    if any(_undecided(each) for setting in report.settings for each in setting.failures):
        points = f"{100 * report.detect:g} points (--detect)"
        yield f"  undecided: a difference of {points} may be there or not; to tell"
        yield "  takes about as many answers of each model as the last column says"
    for refused in report.refusals[:_MOST_SHOWN]:
        yield from fact("refused", f"{refused.record}, by {refused.server}: {refused.said}")
    if report.records < report.samples:
        yield "  prompts were asked more than once; intervals take answers as independent"
    yield f"Answers saved in {report.answers_file}, beside {report.out}."


def _setting_lines(setting: SettingReport, detect: float) -> Iterator[str]:
    refused = f", {setting.refused:,} refused" if setting.refused else ""
    yield f"{setting.name}: {counted(setting.answers, 'answer')}{refused}"
    yield from table(("", "answers", "share", "95 %"), map(_row, setting.failures))
    for other, name in (("the original", "to_original"), ("the base setting", "to_base")):
        pairs = [(each.kind, getattr(each, name)) for each in setting.failures]
        compared = [(kind, found) for kind, found in pairs if found is not None]
        if compared:
            yield f"  compared with {other}, in points:"
            headings = ("", "its share", "difference", "95 %", "says", "answers\nit takes")
            yield from table(headings, (_compared(*pair, detect) for pair in compared))


def _undecided(failure: FailureReport) -> bool:
    compared = (failure.to_original, failure.to_base)
    return any(each is not None and each.verdict == "undecided" for each in compared)


def _row(failure: FailureReport) -> tuple[str, ...]:
    of = f"{failure.count:,} of {failure.answers:,}"
    return failure.kind, of, _share(failure.share), _interval(failure.low, failure.high, _share)


def _compared(kind: str, found: DifferenceReport, detect: float) -> tuple[str, ...]:
    none = found.verdict == "no difference"
    share, interval = found.count / found.answers, _interval(found.low, found.high, _points)
    says = f"none of {100 * detect:g}" if none else found.verdict
    needed = "" if found.answers_needed is None else f"{found.answers_needed:,}"
    return kind, _share(share), _points(found.difference), interval, says, needed


def _interval(low: float, high: float, written: Any) -> str:
    return f"[{written(low)}, {written(high)}]"


def _share(share: float) -> str:
    return f"{100 * share:.2f} %"


def _points(share: float) -> str:
    return f"{100 * share:+.2f}"
