"""The model card of a pruned model, and the commands that it tells its readers.

Pure text from `card_data`: the same model has the same card. Lines that people have seen in a
card stay as they are when one is made anew, so that a second push changes nothing.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from shardsurgeon._version import __version__
from shardsurgeon.checkpoint.files import SOURCE_CARD_NAME
from shardsurgeon.checkpoint.provenance import (
    PROVENANCE_NAME,
    LayerRecord,
    Provenance,
    SourceIdentity,
    Step,
)
from shardsurgeon.errors import UsageError
from shardsurgeon.operations.card_data import Calibration, ModelFacts
from shardsurgeon.pruning.request import Allocation, MtpPolicy, SelectionRequest
from shardsurgeon.units import counted, format_size, number_ranges, parameters, percent

TAGS = ("reap", "pruned", "expert-pruning", "moe", "shardsurgeon")
# What holds for the pruned model as it did for its source.
_CARRIED_OVER = ("license", "license_name", "license_link", "language", "pipeline_tag")
# The Hub knows four relations; bytes that were neither trained nor quantized nor merged go here.
_RELATION = "finetune"
_HUB = "https://huggingface.co"

_PROGRAM = ("shardsurgeon", "apply")


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a model goes, and how it was made.

    repo_id: where it is to be served from; revision: its branch, None for main; command: the
    lines to type to make it again.
    """

    repo_id: str
    revision: str | None
    command: Sequence[str]


def model_card(facts: ModelFacts, placement: Placement) -> str:
    """The README.md."""
    body = "\n\n".join(_sections(facts, placement))
    return str(ModelCard(f"---\n{_metadata(facts)}\n---\n\n{body}\n"))


def require_metadata(text: str, where: str | PathLike[str]) -> None:
    """Raise UsageError, naming `where`, for a card of one's own whose metadata cannot be read."""
    try:
        ModelCard(text)
    except Exception as error:  # whatever YAML and the card's own rules raise
        problem = f"its metadata cannot be read ({' '.join(str(error).split())[:200]})"
        raise UsageError(
            where, problem, "mend what stands between its first lines of ---"
        ) from error


def base_models(facts: ModelFacts) -> tuple[str, ...]:
    """The Hub's names of what was pruned: from the record, else what the source's card names."""
    steps = facts.provenance.steps
    for step in (steps[-1], steps[0]):
        if "/" in step.source.name:
            return (step.source.name,)
    named = (facts.source_card or {}).get("base_model")
    listed = named if isinstance(named, list) else [named]
    return tuple(name for name in listed if isinstance(name, str) and name)


def _metadata(facts: ModelFacts) -> str:
    said = facts.source_card or {}
    bases = base_models(facts)
    data: dict[str, Any] = {}
    if bases:
        data["base_model"] = list(bases)
        data["base_model_relation"] = _RELATION
    data |= {key: said[key] for key in _CARRIED_OVER if said.get(key)}
    data["library_name"] = said.get("library_name") or "transformers"
    data["tags"] = [*dict.fromkeys((*_tags(said), *TAGS))]
    return ModelCardData(**data).to_yaml(original_order=[*data])


def _tags(said: Mapping[str, Any]) -> list[str]:
    found = said.get("tags")
    return [tag for tag in found if isinstance(tag, str)] if isinstance(found, list) else []


def _sections(facts: ModelFacts, placement: Placement) -> Iterator[str]:
    yield f"# {placement.repo_id.rpartition('/')[2]}"
    yield _summary(facts)
    yield _size_table(facts)
    yield "## What was pruned"
    yield from _pruned(facts)
    yield "## Use it"
    yield from _use(facts, placement)
    yield "## Make it again"
    yield from _again(facts, placement)
    yield "## Citation"
    yield _CITATION
    if facts.source_card is not None:
        yield "## The original's card"
        yield f"It is kept as [{SOURCE_CARD_NAME}]({SOURCE_CARD_NAME})."


def _summary(facts: ModelFacts) -> str:
    record = facts.provenance
    gone = sum(len(layer.pruned) for layer in record.layers.values())
    everyone = sum(layer.num_experts for layer in record.layers.values())
    name = _linked(base_models(facts)) or f"`{record.steps[0].source.name}`"
    return (
        f"{name} without {percent(gone / everyone)} of its experts: {_counts(record)}. "
        "The weights that are left are the original's, byte for byte; nothing was trained, "
        "merged or quantized on the way. The routers have the rows of the experts that stayed."
    )


def _linked(models: Iterable[str]) -> str:
    return ", ".join(
        f"[{model}]({_HUB}/{model})" if model.count("/") == 1 else f"`{model}`" for model in models
    )


def _counts(record: Provenance) -> str:
    layers = counted(len(record.layers), "MoE layer")
    if record.is_uniform:
        after, before = record.num_experts_after, record.num_experts_before
        return f"{after} of {before} stay in each of {layers}"
    kept = [len(layer.retained) for layer in record.layers.values()]
    return f"{min(kept)} to {max(kept)} of {record.num_experts_before} stay, in {layers}"


def _size_table(facts: ModelFacts) -> str:
    before, after, record = facts.before, facts.after, facts.provenance
    left = sum(len(layer.retained) for layer in record.layers.values())
    had = sum(layer.num_experts for layer in record.layers.values())
    rows = [("Weights", format_size(before.nbytes), format_size(after.nbytes))]
    if before.parameters is not None and after.parameters is not None:
        rows.append(("Parameters", parameters(before.parameters), parameters(after.parameters)))
    if record.is_uniform:
        pair = str(record.num_experts_before), str(record.num_experts_after)
        rows.append(("Experts per MoE layer", *pair))
    rows.append(("Experts in all", f"{had:,}", f"{left:,}"))
    return _table(("", "Before", "After"), rows)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _pruned(facts: ModelFacts) -> Iterator[str]:
    record = facts.provenance
    yield _table(("Pruned", "Experts", "How many", "Chosen by"), map(_step, record.steps))
    notes = [*_preserved(record), *_policies(facts), *_calibration(facts.calibrations)]
    yield "\n".join(f"- {note}" for note in notes)
    if not record.is_uniform:
        yield _layer_table(record)


def _step(step: Step) -> tuple[str, str, str, str]:
    source = step.source
    at = f" at `{source.revision[:12]}`" if source.revision else ""
    how = {
        "ratio": f"ratio {step.ratio:g}" + (f", rounded {step.rounding}" if step.rounding else ""),
        "keep": f"{step.num_experts_after} kept",
        "target-size": "the most that fit a size",
        "plan": "a keep-list",
    }
    return (
        f"`{source.name}`{at}",
        f"{step.num_experts_before} → {step.num_experts_after}",
        how.get(step.selection, step.selection),
        f"`{step.metric}`" if step.metric else "a keep-list",
    )


def _preserved(record: Provenance) -> Iterator[str]:
    kept = {number: len(layer.preserved) for number, layer in record.layers.items()}
    if count := sum(kept.values()):
        where = _layers([number for number, preserved in kept.items() if preserved])
        yield (f"{counted(count, 'super expert')} preserved whatever the saliency, in {where}")
    else:
        yield "No super experts were preserved."


def _layers(numbers: Sequence[int]) -> str:
    """`layer 3`, `layers 1-60`."""
    return f"layer{'s' if len(numbers) > 1 else ''} {number_ranges(numbers)}"


def _policies(facts: ModelFacts) -> Iterator[str]:
    words = {
        "router-norm": "were chosen by the norm of their router rows, having no scores",
        "last": "follow the last scored layer",
    }
    for policy, said in words.items():
        layers = [n for n, layer in facts.provenance.layers.items() if layer.policy == policy]
        if layers:
            yield f"The experts of MTP {_layers(layers)} {said}."
    yield (
        "Which experts stayed, under their original ids, with every saliency: "
        "[calibration/reap_pruning_metadata.json](calibration/reap_pruning_metadata.json)"
    )


def _calibration(calibrations: Iterable[Calibration]) -> Iterator[str]:
    for found in calibrations:
        said = ", ".join(f"{_plain(key)} {_plain(value)}" for key, value in found.facts.items())
        yield f"Scores: [{found.file}]({found.file})" + (f" ({said})" if said else "")


def _plain(value: object) -> str:
    """A stranger's value, so that it stays text in Markdown and in one line."""
    text = f"{value:,}" if type(value) is int and value >= 10_000 else str(value)
    return f"`{' '.join(text.replace('`', '').split())}`"


def _layer_table(record: Provenance) -> str:
    def row(number: int, layer: LayerRecord) -> tuple[str, str, str]:
        return str(number), str(layer.num_experts), str(len(layer.retained))

    rows = [row(number, layer) for number, layer in sorted(record.layers.items())]
    table = _table(("Layer", "Experts before", "after"), rows)
    return f"<details>\n<summary>Experts per layer</summary>\n\n{table}\n\n</details>"


def _use(facts: ModelFacts, placement: Placement) -> Iterator[str]:
    loading = facts.loading
    if not loading.stock_engines:
        yield (
            "Its layers keep different numbers of experts, which `config.json` lists under "
            "`num_routed_experts_per_layer`. Stock vLLM and transformers do not read that list "
            "and would load this model wrong: serve it with an engine that does."
        )
        return
    words = ["vllm", "serve", placement.repo_id]
    words += ["--revision", placement.revision] if placement.revision else []
    words += ["--trust-remote-code"] if loading.remote_code else []
    yield _code("sh", [" ".join(words)])
    yield _code("python", _loading_lines(facts, placement))


def _loading_lines(facts: ModelFacts, placement: Placement) -> list[str]:
    loading = facts.loading
    shared = ", ".join(
        (f'"{placement.repo_id}"',)
        + ((f'revision="{placement.revision}"',) if placement.revision else ())
        + (("trust_remote_code=True",) if loading.remote_code else ())
    )
    reader = "processor" if loading.processor == "AutoProcessor" else "tokenizer"
    return [
        f"from transformers import {loading.auto_class}, {loading.processor}",
        "",
        f"{reader} = {loading.processor}.from_pretrained({shared})",
        f'model = {loading.auto_class}.from_pretrained({shared}, dtype="auto", device_map="auto")',
    ]


def _again(facts: ModelFacts, placement: Placement) -> Iterator[str]:
    yield f"With shardsurgeon {__version__}:"
    yield _code("sh", placement.command)
    yield (
        "`shardsurgeon verify ORIGINAL PRUNED` proves every surviving byte against the original."
    )


def _code(language: str, lines: Iterable[str]) -> str:
    return "\n".join((f"```{language}", *lines, "```"))


_CITATION = """\
Pruning experts in one shot, by their saliency, is what REAP does:

```bibtex
@misc{lasby2025reap,
  title         = {{REAP} the Experts: Why Pruning Prevails for One-Shot {MoE} Compression},
  author        = {Lasby, Mike and Lazarevich, Ivan and Sinnadurai, Nish and Lie, Sean and
                   Ioannou, Yani and Thangarasa, Vithursan},
  year          = {2025},
  eprint        = {2510.13999},
  archivePrefix = {arXiv},
  primaryClass  = {cs.LG}
}
```"""


def recipe(
    request: SelectionRequest,
    source: SourceIdentity,
    given: Mapping[str, str],
    max_shard_nbytes: int | None,
    declared: str | None,
) -> str:
    """The command that was given, its files under the names that the model carries them by.

    given: name in the model → path, of the score file and the keep-list; declared: the words of
    --family.
    """
    plan = None if request.plan_file is None else str(Path(request.plan_file).absolute())
    scores = [name for name, path in given.items() if path != plan]
    options: dict[str, object] = {
        "--ratio": request.ratio,
        "--keep": request.keep,
        "--target-size": request.target_size,
        "--plan": next((name for name, path in given.items() if path == plan), None),
        "--rounding": request.rounding,
        "--multiple-of": request.multiple_of,
        "--metric": request.metric,
        "--mtp": request.mtp if request.mtp is not MtpPolicy.ROUTER_NORM else None,
        "--allocate": request.allocate if request.allocate is not Allocation.UNIFORM else None,
        "--max-shard-size": max_shard_nbytes,
        "--family": declared and Path(declared).name,
    }
    words = [*_PROGRAM, *scores, "--model", address(source)]
    for option, value in options.items():
        words += [] if value is None else [option, str(value)]
    words += ["--preserve-super-experts"] if request.preserve_super_experts else []
    words += ["--allow-nonuniform"] if request.allow_nonuniform else []
    return shlex.join(words)


def recipe_by_record(facts: ModelFacts) -> str:
    """The command that goes by the keep-lists in the model's metadata."""
    source = facts.provenance.steps[0].source
    words = [*_PROGRAM, "--plan", PROVENANCE_NAME, "--model", address(source)]
    words += ["--mtp", "drop"] if facts.mtp_removed and not facts.mtp_layers else []
    words += [] if facts.provenance.is_uniform else ["--allow-nonuniform"]
    return shlex.join(words)


def with_files(command: str, repo_id: str, revision: str | None) -> tuple[str, ...]:
    """The command behind the one that fetches the files it names."""
    words = ["hf", "download", repo_id, "--include", "calibration/*", "--local-dir", "."]
    words += ["--revision", revision] if revision else []
    return shlex.join(words), command


def address(source: SourceIdentity) -> str:
    """MODEL as it must be typed: a repository at its commit, or a folder's name."""
    at_commit = source.revision is not None and "/" in source.name
    return f"{source.name}@{source.revision}" if at_commit else source.name
