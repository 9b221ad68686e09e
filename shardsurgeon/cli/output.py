"""Printing: reports as JSON or text, numbers and tables as wide as the terminal."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import textwrap
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import click

from shardsurgeon import units
from shardsurgeon.cli.progress import rest
from shardsurgeon.cli.streams import StdoutLost
from shardsurgeon.errors import ShardSurgeonError, printable
from shardsurgeon.reports import Report, failure_of

if TYPE_CHECKING:
    from shardsurgeon.layerwise.parts import PartReport
    from shardsurgeon.operations.recipe import Recipe

_LABEL = 14
# Columns where there is no terminal; and within which text is still text, however wide that is.
_WIDTH, _NARROWEST, _WIDEST = 80, 40, 120
# Of files that are only named; a model's folder can have hundreds.
_MOST_SHOWN = 8


class ScoredLayer(Protocol):
    """A layer of any report that has a table of layers."""

    @property
    def layer(self) -> int | str:
        """Its number, or its name."""
        ...

    @property
    def is_mtp(self) -> bool | None:
        """Whether it predicts a token beyond the next; None where no model says it."""
        ...


@dataclass
class Steps:
    """What the commands of a recipe report, by their names; the `obj` of their click contexts.

    recipe: that of them all; words: of the command line that runs it; silent: whether they print
    nothing, since one document follows.
    """

    recipe: Recipe
    words: Sequence[str]
    silent: bool
    reports: dict[str, Report] = field(default_factory=dict)

    @classmethod
    def here(cls) -> Steps | None:
        """Those that the running command is one of, None where it runs alone."""
        context = click.get_current_context(silent=True)
        return context.obj if context is not None and isinstance(context.obj, cls) else None


def width() -> int:
    """Columns to print in: COLUMNS, or the terminal's, or 80 where stdout is none."""
    columns = shutil.get_terminal_size((_WIDTH, 24)).columns
    return min(max(columns, _NARROWEST), _WIDEST)


def emit(
    report: Report,
    lines: Iterable[str],
    as_json: bool,
    *,
    told_otherwise: bool = False,
    error: ShardSurgeonError | None = None,
) -> None:
    """Print a report: as one JSON document, or for people as lines.

    told_otherwise: the result lies somewhere, or the exit status says it, so that a stdout which is
    lost costs the words; else that raises StdoutLost. error: what the command raises next, which
    the document then tells as well.
    """
    if (steps := Steps.here()) is not None:
        steps.reports[click.get_current_context().command.name or ""] = report
        if steps.silent:
            return
    if as_json:
        failed = {} if error is None else {"error": failure_of(error)}
        text = as_text({**report.to_dict(), **failed})
    else:
        text = printable("\n".join(lines))
    rest()
    try:
        click.echo(text)
    except StdoutLost as lost:
        if not told_otherwise:
            raise
        if not lost.reader_left:
            click.echo(f"shardsurgeon: the report is lost: stdout: {lost}", err=True)


def as_text(document: dict[str, Any]) -> str:
    """A JSON document as it is printed, in plain ASCII."""
    return json.dumps(document, indent=2, allow_nan=False)


def no_accuracy(measuring: Sequence[str]) -> Iterator[str]:
    """The legend of every table of shares of saliency: at one share one model is as good, another
    is not. measuring: the command that says what a prune costs, to copy; none for no legend."""
    if measuring:
        yield "  a share of saliency is no accuracy; this measures what a prune costs:"
        yield f"    {typed(measuring)}"


def fact(label: str, text: str) -> list[str]:
    """One aligned line `label  text`, wrapped under itself where it is too long."""
    indent = " " * (_LABEL + 2)
    lines = textwrap.wrap(
        text,
        width(),
        initial_indent=f"  {label:<{_LABEL}}",
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return lines or [f"  {label}"]


def part_lines(parts: Sequence[PartReport]) -> list[str]:
    """The datasets of a mix, where a file keeps their sums apart."""
    sizes = (
        f"{part.name} ({units.counted(part.records, 'record')}, "
        f"{units.counted(part.tokens, 'token')})"
        for part in parts
    )
    return fact("parts", ", ".join(sizes)) if parts else []


def facts(pairs: Iterable[tuple[str, str]]) -> list[str]:
    """Aligned lines, one fact after another."""
    return [line for label, text in pairs for line in fact(label, text)]


def grouped(names: Iterable[str], others: Iterable[str] = ()) -> str:
    """`.env, train.log, wandb/ (3)`: files, of which there are 3; a folder stands for all below it.

    others: files that are not meant: a folder that has one of them is not shown as a whole.
    """
    names = list(names)
    torn = {other.rpartition("/")[0] for other in others}
    shown = list(dict.fromkeys(_shown(name, torn) for name in names))
    more = len(shown) - _MOST_SHOWN
    listed = ", ".join(shown[:_MOST_SHOWN]) + (f", {more} more" if more > 0 else "")
    return f"{listed} ({len(names)})"


def _shown(name: str, torn: Collection[str]) -> str:
    folder = name.partition("/")[0]
    inside = "/" in name and not any(f"{path}/".startswith(f"{folder}/") for path in torn)
    return f"{folder}/" if inside else name


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Right-aligned columns under headings, whose lines are separated by newlines."""
    rows = list(rows)
    heads = [heading.split("\n") for heading in headings]
    height = max(len(head) for head in heads)
    heads = [[""] * (height - len(head)) + head for head in heads]
    lines = [*zip(*heads, strict=True), *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headings))]
    gap = 2 if sum(widths) + 2 * len(widths) <= width() else 1
    out = [
        "".join(f"{cell:>{width + gap}}" for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]
    rule = "".join(" " * gap + "-" * width for width in widths)
    return [*out[:height], rule, *out[height:]]


def layer_number(layer: ScoredLayer) -> str:
    """The number of a layer in a table, with a star where `mtp_legend` explains it."""
    return f"{layer.layer}{'*' if layer.is_mtp else ''}"


def units_legend(count: int | None) -> str:
    """What the units of sizes mean, and those of parameters where their count is known."""
    words = "  kB, MB, GB, TB: powers of 1000 bytes"
    return words if count is None else f"{words}; K, M, B: powers of 1000 parameters"


def mtp_legend(layers: Iterable[ScoredLayer]) -> list[str]:
    """What the star at a layer's number means, below a table that has one."""
    return ["  * next-token-prediction layer"] if any(layer.is_mtp for layer in layers) else []


def percent(share: float | None) -> str:
    """A share of 1 as `40.4%`; `-` where it is unknown."""
    return "-" if share is None else f"{100 * share:.1f}%"


def change(before: int, after: int, shown: Sequence[str]) -> str:
    """Two sizes as `594.1 GB -> 240.3 GB (40.4%)`; shown: how to write them."""
    share = f" ({percent(after / before)})" if before else ""
    return f"{shown[0]} -> {shown[1]}{share}"


def parameters(count: int | None) -> str:
    """A parameter count with one decimal, `1,026.4B`; `-` where it is unknown."""
    return "-" if count is None else units.parameters(count, ",.1f", "BMK")


def saliency(value: float | None) -> str:
    """Four significant digits; `-` where there is none."""
    return "-" if value is None else f"{value:.4g}"


def saved(what: str, path: str, written: bool) -> str:
    """The line that says where something lies; written: False where it lay there already."""
    return f"{what} saved in {path}." if written else f"{what} were saved in {path} already."


def typed(words: Iterable[str]) -> str:
    """A command as it is typed in this system's shell."""
    return " ".join(map(as_typed, words))


def as_typed(path: str) -> str:
    """A path as it is typed in this system's shell."""
    return subprocess.list2cmdline([path]) if os.name == "nt" else shlex.quote(path)
