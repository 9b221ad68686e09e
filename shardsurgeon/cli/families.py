"""`shardsurgeon families`: which models can be pruned."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import click

from shardsurgeon.cli.help import Command
from shardsurgeon.cli.options import json_option
from shardsurgeon.cli.output import emit, width

if TYPE_CHECKING:
    from shardsurgeon.operations.families import FamiliesReport


@click.command("families", cls=Command)
@json_option
def families_command(as_json: bool) -> None:
    """List the model families that can be pruned.

    Each with the model types that a config.json names. A model of another type
    is read with --family auto, or by a declaration of your own.

    \b
    Examples:
      shardsurgeon families
      shardsurgeon families --json
    """
    from shardsurgeon.operations import families

    report = families.list_families()
    emit(report, _lines(report), as_json)


def _lines(report: FamiliesReport) -> Iterator[str]:
    # A config of Mistral's own format names no type.
    read = {
        family.name: ", ".join(family.model_types or family.architectures) or "told by its config"
        for family in report.families
        if family.refusal is None
    }
    refused = {f.name: f.refusal for f in report.families if f.refusal is not None}
    yield f"{report.title}:"
    yield ""
    yield from _columns(read)
    yield ""
    yield f"{len(refused)} cannot:"
    yield ""
    yield from _columns(refused)
    yield ""
    yield "Another model: --family auto, or --family FILE with a declaration of your own."


def _columns(rows: Mapping[str, str]) -> Iterator[str]:
    """Names and what belongs to each, wrapped under itself."""
    column = max(map(len, rows)) + 4
    for name, words in rows.items():
        yield from textwrap.wrap(
            words,
            width(),
            initial_indent=f"  {name}".ljust(column),
            subsequent_indent=" " * column,
            break_long_words=False,
            break_on_hyphens=False,
        )
