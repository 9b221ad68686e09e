"""Help texts: examples before options, options in groups, the most needed first."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import click

_HOW_MUCH = "How much (one of them)"
# Headings, and the options under each, of the commands that have too many for a flat list. What
# is on top is what most users need. An option that is not listed comes last, under Advanced.
SECTIONS = {
    "Parts (one of them)": ("--weights", "--objective"),
    _HOW_MUCH: ("--ratio", "--keep", "--target-size", "--fit", "--plan"),
    "Samples": ("--dataset", "--prompts", "--samples", "--max-length"),
    "Model and output": (
        *(
            "--model",
            "--out",
            "--dry-run",
            "--restart",
            "--force",
            "--layers",
            "--evaluation",
            "--scores",
            "--probe",
        ),
    ),
    "Comparison": ("--against", "--detect"),
    "Sampling": (
        *("--temperature", "--top-p", "--top-k", "--min-p", "--repetition-penalty"),
        *("--max-tokens", "--sampling"),
    ),
    "Server": (
        *("--parallel", "--timeout", "--served-model", "--against-model", "--api-key-env"),
        "--against-key-env",
    ),
    "Machine": ("--device", "--dtype", "--batch-size", "--memory", "--activation-budget"),
    "GPUs": (
        *("--gpus", "--context", "--sequences", "--kv-dtype", "--tensor-parallel"),
        *("--expert-parallel", "--mtp-layers"),
    ),
    "More about samples": (
        *("--pack", "--tokens", "--seed", "--field", "--skip-invalid", "--share", "--extend"),
    ),
    "Scores": (
        *("--metric", "--mtp", "--preserve-super-experts", "--rounding", "--multiple-of"),
        *("--allocate", "--lists", "--same-model", "--mixed"),
    ),
    "Output files": (
        *("--view", "--max-shard-size", "--include", "--exclude", "--verify", "--checksums"),
        "--workers",
    ),
    "Hub": (
        *("--push-to-hub", "--stream-push", "--disk-budget", "--private", "--revision"),
        *("--create-pr", "--card", "--no-card"),
    ),
    "Advanced": (
        *("--allow-nonuniform", "--family", "--follow-links", "--tokenizer"),
        "--trust-remote-code",
    ),
    "Report": ("--json", "--progress", "--quiet", "--verbose", "--help"),
}
_ADVANCED = "Advanced"
# So many options are a flat list.
_FEW = 13
# The widest column of names: longer ones have a line to themselves.
_WIDEST = 26


class Command(click.Command):
    """A command whose help shows examples, then options, then the rest of its description.

    how_much: the heading of the options that say how many experts go.
    """

    how_much = _HOW_MUCH

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the first paragraph and the examples."""
        summary, examples, _ = self._paragraphs()
        for paragraph in (summary, examples):
            formatter.write_paragraph()
            with formatter.indentation():
                formatter.write_text(paragraph)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, in sections where they are many."""
        records = {}
        for option in self.get_params(ctx):
            record = option.get_help_record(ctx) if isinstance(option, click.Option) else None
            if record is not None:
                records[_long(option)] = record
        sections = _sections(records) if len(records) > _FEW else {"Options": list(records)}
        width = min(_WIDEST, max(len(names) for names, _ in records.values()))
        for heading, names in sections.items():
            rows = [(records[name][0].ljust(width), records[name][1]) for name in names]
            with formatter.section(self.how_much if heading == _HOW_MUCH else heading):
                formatter.write_dl(rows, col_max=_WIDEST)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write what the summary left out, and which variables give defaults."""
        *_, details = self._paragraphs()
        details = [*details, *self._variables()]
        if details:
            with formatter.section("Notes"):
                for number, paragraph in enumerate(details):
                    if number:
                        formatter.write_paragraph()
                    formatter.write_text(paragraph)

    def _paragraphs(self) -> tuple[str, str, list[str]]:
        """The description: its first paragraph, the examples, the rest."""
        summary, *others = inspect.cleandoc(self.help or "").split("\n\n")
        examples = [text for text in others if text.startswith("\b")]
        return summary, "\n\n".join(examples), [text for text in others if text not in examples]

    def _variables(self) -> Iterator[str]:
        named = [
            f"{each.envvar} ({_long(each)})"
            for each in self.params
            if isinstance(each, click.Option) and isinstance(each.envvar, str)
        ]
        if named:
            yield f"Defaults from the environment: {', '.join(named)}."


def _long(parameter: click.Parameter) -> str:
    """The name that SECTIONS has: `--ratio` of `-r, --ratio`."""
    return next((name for name in parameter.opts if name.startswith("--")), parameter.opts[0])


def _sections(names: dict[str, tuple[str, str]]) -> dict[str, list[str]]:
    """Heading → those of the options that it stands above."""
    listed = {name for known in SECTIONS.values() for name in known}
    found = {
        heading: [name for name in known if name in names] for heading, known in SECTIONS.items()
    }
    found[_ADVANCED] += [name for name in names if name not in listed]
    return {heading: under for heading, under in found.items() if under}
