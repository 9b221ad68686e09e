"""The text of a pruned model's card, and the commands that it tells its readers.

`model_card.md` is the card with placeholders; here is what goes into them, from `card_data`. The
same model has the same card, so that a second push of it changes nothing: what an earlier version
wrote is kept to the letter.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from string import Template
from types import MappingProxyType
from typing import Any
from urllib.parse import quote

from huggingface_hub import ModelCard, ModelCardData

from shardsurgeon._version import __version__
from shardsurgeon.checkpoint.files import SOURCE_CARD_NAME
from shardsurgeon.checkpoint.provenance import (
    PROVENANCE_NAME,
    Provenance,
    SourceIdentity,
    Step,
    rounding_alone,
)
from shardsurgeon.checkpoint.sampling import GENERATION_CONFIG_NAME, OPTION, as_option, settings_of
from shardsurgeon.errors import UsageError
from shardsurgeon.operations.card_data import Calibration, Cost, ModelFacts
from shardsurgeon.operations.card_pictures import Picture
from shardsurgeon.operations.serving import serve_words
from shardsurgeon.pruning.request import Allocation, MtpPolicy, SelectionRequest
from shardsurgeon.storage.open import hub_address
from shardsurgeon.units import counted, format_size, number_ranges, parameters, percent

TAGS = ("reap", "pruned", "expert-pruning", "moe", "shardsurgeon")
# Metadata that holds for the pruned model as it did for its source.
_CARRIED_OVER = ("license", "license_name", "license_link", "language", "pipeline_tag")
# The Hub knows four relations: adapter, merge, quantized and finetune. A prune is none of the
# first three.
_RELATION = "finetune"
_HUB = "https://huggingface.co"

_PROGRAM = ("shardsurgeon", "apply")

_CARD = Path(__file__).with_name("model_card.md")
_SERVED = Template("""\
```sh
$serve
```""")
_BY_TRANSFORMERS = Template("""\
```python
from transformers import $model_class, $reader_class

$reader = $reader_class.from_pretrained($arguments)
model = $model_class.from_pretrained($arguments, dtype="auto", device_map="auto")
```""")
_OTHER_ENGINES = Template(
    "Its layers keep different numbers of experts, which `config.json` lists under `$listed`. No "
    "stock engine reads that list: $engines. Serve it with an engine that does."
)
_MLX = "It is in MLX's layout: load it with mlx-lm, as its original."
_UNPROVEN = (
    "That every byte is the original's is proven; no engine's answers have been compared with the "
    "original's yet. Serve it as its original is served, and compare."
)
_FILE = re.compile(r"[\w./-]+", re.ASCII)
_REPO_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_SOURCE_CARD = f"""\
## The original's card

It is kept as [{SOURCE_CARD_NAME}]({SOURCE_CARD_NAME})."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a model goes, and how it was made.

    repo_id: where it is to be served from; revision: its branch, None for main; command: the
    lines to type to make it again.
    """

    repo_id: str
    revision: str | None
    command: Sequence[str]


def model_card(
    facts: ModelFacts, placement: Placement, pictures: Mapping[str, Picture] = MappingProxyType({})
) -> str:
    """The README.md; pictures: those that it shows, as `card_pictures` draws them."""
    record = facts.provenance
    experts_before = sum(layer.num_experts for layer in record.layers.values())
    pruned = sum(len(layer.pruned) for layer in record.layers.values())
    notes = (*_preserved(record), *_policies(record), *_calibration(facts.calibrations))
    notes += tuple(_sampling(record))
    values = {
        "metadata": _metadata(facts),
        "title": placement.repo_id.rpartition("/")[2],
        "original": _linked(base_models(facts)) or _plain(record.steps[0].source.name),
        "share": percent(pruned / experts_before),
        "counts": _counts(record),
        "sizes": _rows(_sizes(facts, experts_before, experts_before - pruned)),
        "steps": _rows(_step(step, record.is_uniform) for step in record.steps),
        "notes": "\n".join(f"- {note}" for note in notes),
        "map": _picture(pictures.get(PROVENANCE_NAME)),
        "layers": "" if record.is_uniform else _layer_table(record),
        "costs": "\n\n".join(_cost(cost, pictures.get(cost.file)) for cost in facts.costs),
        "use": _use(facts, placement),
        "version": __version__,
        "command": "\n".join(placement.command),
        "source_card": "" if facts.source_card is None else _SOURCE_CARD,
    }
    paragraphs = _CARD.read_text(encoding="utf-8").rstrip().split("\n\n")
    # A paragraph that is one placeholder is left out where its value is empty.
    shown = [text for text in paragraphs if values.get(text.removeprefix("$"), text)]
    return str(ModelCard(Template("\n\n".join(shown)).substitute(values) + "\n"))


def require_metadata(text: str, where: str | PathLike[str]) -> None:
    """Raise UsageError, naming `where`, for a user's card whose metadata cannot be read."""
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
        if step.source.repository is not None:
            return (step.source.repository,)
    named = (facts.source_card or {}).get("base_model")
    listed = named if isinstance(named, list) else [named]
    return tuple(name for name in listed if isinstance(name, str) and name)


def _metadata(facts: ModelFacts) -> str:
    source = facts.source_card or {}
    bases = base_models(facts)
    data: dict[str, Any] = {}
    if bases:
        data["base_model"] = list(bases)
        data["base_model_relation"] = _RELATION
    data |= {key: source[key] for key in _CARRIED_OVER if source.get(key)}
    library = "transformers" if facts.loading.auto_class else "vllm"
    library = "mlx" if facts.loading.serving.is_mlx else library
    data["library_name"] = source.get("library_name") or library
    data["tags"] = [*dict.fromkeys((*_tags(source), *TAGS))]
    return ModelCardData(**data).to_yaml(original_order=[*data])


def _tags(metadata: Mapping[str, Any]) -> list[str]:
    found = metadata.get("tags")
    return [tag for tag in found if isinstance(tag, str)] if isinstance(found, list) else []


def _linked(models: Iterable[str]) -> str:
    return ", ".join(
        f"[{model}]({_HUB}/{model})" if _REPO_ID.fullmatch(model) else _plain(model)
        for model in models
    )


def _counts(record: Provenance) -> str:
    layers = counted(len(record.layers), "MoE layer")
    if record.is_uniform:
        after, before = record.num_experts_after, record.num_experts_before
        return f"{after} of {before} stay in each of {layers}"
    kept = [len(layer.retained) for layer in record.layers.values()]
    return f"{min(kept)} to {max(kept)} of {record.num_experts_before} stay, in {layers}"


def _sizes(facts: ModelFacts, experts_before: int, experts_after: int) -> Iterator[Sequence[str]]:
    before, after, record = facts.before, facts.after, facts.provenance
    yield "Weights", format_size(before.nbytes), format_size(after.nbytes)
    if before.parameters is not None and after.parameters is not None:
        yield "Parameters", parameters(before.parameters), parameters(after.parameters)
    if record.is_uniform:
        counts = record.num_experts_before, record.num_experts_after
        yield "Experts per MoE layer", *map(str, counts)
    yield "Experts in all", f"{experts_before:,}", f"{experts_after:,}"


def _rows(rows: Iterable[Sequence[str]]) -> str:
    # A bar of its own would end a cell.
    escaped = ((cell.replace("|", "\\|") for cell in cells) for cells in rows)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in escaped)


def _step(step: Step, is_uniform: bool) -> tuple[str, str, str, str]:
    """is_uniform: whether its counts are those of every layer."""
    source, before = step.source, step.num_experts_before
    removed = before - step.num_experts_after
    # By a multiple of the router's groups, or the one asked for.
    raised = is_uniform and not rounding_alone(step.ratio, [(before, removed)])
    other = f" asked for, {percent(removed / before)} removed" if raised else ""
    at = f" at {_plain(source.revision[:12])}" if source.revision else ""
    how = {
        "ratio": f"ratio {step.ratio:g}{other}"
        + (f", rounded {step.rounding}" if step.rounding else ""),
        "keep": f"{step.num_experts_after} kept",
        "target-size": "the most that fit a size",
        "plan": "a keep-list",
    }
    return (
        f"{_plain(source.name)}{at}",
        f"{step.num_experts_before} → {step.num_experts_after}",
        how.get(step.selection) or _plain(step.selection),
        _plain(step.metric) if step.metric else f"a keep-list{_other(step)}",
    )


def _other(step: Step) -> str:
    """Whose the saliencies are, where they were measured on another model."""
    return f" made for {_plain(step.saliency_of.name)}" if step.saliency_of is not None else ""


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


def _policies(record: Provenance) -> Iterator[str]:
    reasons = {
        "router-norm": "were chosen by the norm of their router rows, having no scores",
        "last": "follow the last scored layer",
        "keep": "stay whole, the config counting them apart",
    }
    others = [step.saliency_of for step in record.steps if step.saliency_of is not None]
    for other in dict.fromkeys(others):
        yield f"The saliencies are those of {_plain(other.name)}, whose plan was used."
    for policy, reason in reasons.items():
        layers = [n for n, layer in record.layers.items() if layer.policy == policy]
        if layers:
            yield f"The experts of MTP {_layers(layers)} {reason}."
    yield (
        "Which experts stayed, under their original ids, with every saliency: "
        "[calibration/reap_pruning_metadata.json](calibration/reap_pruning_metadata.json)"
    )


def _calibration(calibrations: Iterable[Calibration]) -> Iterator[str]:
    for found in calibrations:
        facts = ", ".join(f"{_plain(key)} {_plain(value)}" for key, value in found.facts.items())
        yield f"Scores: {_link(found.file)}" + (f" ({facts})" if facts else "")


def _sampling(record: Provenance) -> Iterator[str]:
    if record.sampling:
        said = ", ".join(f"`{key}` {json.dumps(value)}" for key, value in record.sampling.items())
        yield f"{_link(GENERATION_CONFIG_NAME)} was given defaults to sample with: {said}"


def _link(file: str) -> str:
    """To a file of the model's folder."""
    return f"[{file if _FILE.fullmatch(file) else _plain(file)}]({quote(file)})"


def _plain(value: object) -> str:
    """A word from outside as one line of code, so that Markdown and HTML in it mean nothing."""
    text = f"{value:,}" if type(value) is int and value >= 10_000 else str(value)
    return f"`{' '.join(text.replace('`', '').split()) or '?'}`"


def _layer_table(record: Provenance) -> str:
    head = [("Layer", "Experts before", "after"), ("---", "---", "---")]
    counts = [
        (str(number), str(layer.num_experts), str(len(layer.retained)))
        for number, layer in sorted(record.layers.items())
    ]
    table = _rows([*head, *counts])
    return f"<details>\n<summary>Experts per layer</summary>\n\n{table}\n\n</details>"


def _picture(picture: Picture | None) -> str:
    return "" if picture is None else f"![{picture.text}]({picture.name})"


def _cost(cost: Cost, picture: Picture | None) -> str:
    """What an evaluation measured, its parts each in a row where there are several."""
    evaluation, found = cost.evaluation, cost.found
    rows = [("All", evaluation.original, found.damage)]
    if len(found.parts) > 1:
        parts = zip(evaluation.original_parts, found.parts, strict=True)
        rows += [(_plain(part.name), before.damage, part.damage) for before, part in parts]
    head = [("", "Perplexity before", "After", "KL mean", "KL p99", "Same first choice")]
    cells = [
        (
            name,
            f"{before.perplexity:.4g}",
            f"{after.perplexity:.4g} ({_change(before.perplexity, after.perplexity)})",
            f"{after.kl_mean:.3g}",
            f"{after.kl_p99:.3g}",
            percent(after.agreement),
        )
        for name, before, after in rows
    ]
    table = _rows([*head, ("---",) * 6, *cells])
    return (
        f"## What it costs\n\nMeasured on {counted(evaluation.predicted, 'token')} of "
        f"{_plain(evaluation.dataset)}, against the original "
        f"({_link(cost.file)}):\n\n{table}\n\n"
        "KL: of this model's predictions from the original's, in nats per token."
        + (f"\n\n{_picture(picture)}" if picture is not None else "")
    )


def _change(before: float, after: float) -> str:
    return f"{after / before - 1:+.1%}" if before else "-"


def _use(facts: ModelFacts, placement: Placement) -> str:
    loading, repo_id, revision = facts.loading, placement.repo_id, placement.revision
    serving = loading.serving
    if not serving.stock_engines:
        return _OTHER_ENGINES.substitute(listed=facts.counts_list, engines=facts.engines)
    if serving.is_mlx:
        return _MLX
    served = _UNPROVEN
    if serving.by_vllm:
        words = serve_words(repo_id, revision, serving)
        served = _SERVED.substitute(serve=shlex.join(words))
    if not loading.auto_class:
        return served
    arguments = [f'"{repo_id}"']
    arguments += [f'revision="{revision}"'] if revision else []
    arguments += ["trust_remote_code=True"] if serving.remote_code else []
    code = _BY_TRANSFORMERS.substitute(
        model_class=loading.auto_class,
        reader_class=loading.processor,
        reader="processor" if loading.processor == "AutoProcessor" else "tokenizer",
        arguments=", ".join(arguments),
    )
    return f"{served}\n\n{code}"


def recipe(
    request: SelectionRequest,
    source: SourceIdentity,
    given: Mapping[str, str],
    max_shard_nbytes: int | None,
    declared: str | None,
    evaluation: Collection[Path],
) -> str:
    """The command that was given, with its files by their names in the model's folder.

    given: name in the model → path, of the score file, the keep-list and the evaluation, whose
    path evaluation is; declared: what --family said.
    """
    plan = None if request.plan_file is None else str(Path(request.plan_file).absolute())
    measured = next((name for name, path in given.items() if Path(path) in evaluation), None)
    scores = [name for name, path in given.items() if path != plan and name != measured]
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
        "--evaluation": measured,
        OPTION: as_option(request.sampling) or None,
    }
    words = [*_PROGRAM, *scores, "--model", address(source)]
    for option, value in options.items():
        words += [] if value is None else [option, str(value)]
    words += ["--preserve-super-experts"] if request.preserve_super_experts else []
    words += ["--allow-nonuniform"] if request.allow_nonuniform else []
    words += _globs(request)
    return shlex.join(words)


def recipe_by_record(facts: ModelFacts) -> str:
    """The command that repeats the prune by the keep-lists in the model's record."""
    source = facts.provenance.steps[0].source
    words = [*_PROGRAM, "--plan", PROVENANCE_NAME, "--model", address(source)]
    words += ["--mtp", "drop"] if facts.mtp_removed and not facts.mtp_layers else []
    words += [] if facts.uniform else ["--allow-nonuniform"]
    sampling = as_option(settings_of(facts.provenance.sampling))
    words += [OPTION, sampling] if sampling else []
    words += _globs(facts.provenance)
    return shlex.join(words)


def _globs(asked: SelectionRequest | Provenance) -> list[str]:
    return [
        *(f"--include={glob}" for glob in asked.include),
        *(f"--exclude={glob}" for glob in asked.exclude),
    ]


def with_files(command: str, repo_id: str, revision: str | None) -> tuple[str, ...]:
    """The command that fetches calibration/ from the repository, and after it `command`."""
    words = ["hf", "download", repo_id, "--include", "calibration/*", "--local-dir", "."]
    words += ["--revision", revision] if revision else []
    return shlex.join(words), command


def address(source: SourceIdentity) -> str:
    """MODEL as it is typed: a repository at its commit, or a folder's name."""
    at_commit = source.revision is not None and "/" in source.name
    return hub_address(source.name, source.revision) if at_commit else source.name
