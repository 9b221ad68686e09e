"""config.json and its siblings with new expert counts and everything else untouched.

Pure: documents in, bytes out. Rewritten are every spelling of the expert count, the MTP count
where the MTP layers go, and entries of quantization lists that name an expert by its number. Where
layers keep different numbers, and the family has no place of its own for that, one key is added.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from shardsurgeon.checkpoint.anatomy import Anatomy
from shardsurgeon.checkpoint.checkpoint import (
    CONFIG_NAME,
    Checkpoint,
    config_section,
    config_values,
)
from shardsurgeon.checkpoint.confignumbers import PER_LAYER_KEY, per_layer_paths
from shardsurgeon.errors import ConfigError
from shardsurgeon.families.schema import all_families
from shardsurgeon.pruning.keeplists import KeepList
from shardsurgeon.pruning.quantlists import QuantizationLists
from shardsurgeon.storage.formats.documents import DELETE, Document, Insert

Path = tuple[str | int, ...]

# Side files that repeat the quantization lists of config.json.
QUANTIZATION_FILES = (
    "hf_quant_config.json",  # ModelOpt
    "quantize_config.json",  # GPTQ
    "quant_config.json",  # AWQ
    "quantization_config.json",  # AutoRound
)

_COUNT_KEY = re.compile(r"expert|routed")
_NOT_A_COUNT = re.compile(r"size|dim|shared|per_tok|top_?k|freq|step|interval|layer|group")


def pruned_config(
    checkpoint: Checkpoint, anatomy: Anatomy, keep: KeepList, *, drop_mtp: bool
) -> bytes:
    """config.json for the experts that a keep-list leaves.

    Raises ConfigError where a value that looks like the expert count is known to no rule, or a
    quantization list names experts in a way that cannot be renumbered.
    """
    settings, where = checkpoint.settings, f"{checkpoint.location}/{CONFIG_NAME}"
    changes: dict[Path, object] = dict(_counts(settings, anatomy, keep, drop_mtp))
    _refuse_forgotten_counts(settings, anatomy, changes, where)
    lists = QuantizationLists(anatomy, keep, where)
    sections = _sections(settings, anatomy)
    for path in sections:
        changes.update(lists.changes(_at(settings, path), path))
    edited = checkpoint.config.edit(changes)
    after = Document.parse(edited, where).value
    for path in sections:
        lists.refuse_leftovers(_at(after, path))
    return edited


def pruned_quantization_file(
    document: Document, anatomy: Anatomy, keep: KeepList, where: str
) -> bytes:
    """A side file such as hf_quant_config.json with its expert entries renumbered.

    Raises ConfigError as `pruned_config` does.
    """
    lists = QuantizationLists(anatomy, keep, where)
    edited = document.edit(lists.changes(document.value))
    lists.refuse_leftovers(Document.parse(edited, where).value)
    return edited


def partial_lists(checkpoint: Checkpoint, anatomy: Anatomy, keep: KeepList) -> list[str]:
    """Notes on quantization lists that name some experts of a layer and not the others.

    Engines take what a list says of one expert for all of its layer (vLLM: of expert 0, or of
    any), and renumbering can make another expert that one. Raises what `pruned_config` raises.
    """
    settings, where = checkpoint.settings, f"{checkpoint.location}/{CONFIG_NAME}"
    lists = QuantizationLists(anatomy, keep, where)
    layers: dict[str, list[int]] = {}
    for path in _sections(settings, anatomy):
        for inner, layer in lists.partly_named(_at(settings, path), path):
            layers.setdefault(".".join(map(str, inner)), []).append(layer)
    return [
        f"{dotted} names some experts of layer {', '.join(map(str, sorted(set(found))))} and not "
        "others: engines may take that for all experts of the layer"
        for dotted, found in layers.items()
    ]


def quantization_name(config: Mapping[str, Any]) -> str | None:
    """The quantization in a few words: `compressed-tensors pack-quantized`, `fp8`, or None."""
    for path in _quantization_paths(config):
        section = _at(config, path)
        words = [section.get("quant_method"), section.get("format") or section.get("quant_algo")]
        return " ".join(str(word) for word in words if word) or "unnamed"
    return None


def says_per_layer(config: Mapping[str, Any], anatomy: Anatomy) -> str:
    """Where the family's own part of a config says experts per layer; "" where it does not."""
    keys = anatomy.family.config
    path = tuple(keys.per_layer.split("."))
    sections = (config_section(config, at) for at in keys.at)
    if keys.per_layer and any(list(config_values(section, path)) for section in sections):
        return keys.per_layer
    return ""


def nonuniform_notes(config: Mapping[str, Any], anatomy: Anatomy, keep: KeepList) -> list[str]:
    """What a user must know of a model whose layers keep different numbers of experts."""
    if keep.is_uniform:
        return []
    counts = sorted({len(layer.retained) for layer in keep.layers.values()})
    kept = f"layers keep {counts[0]} to {counts[-1]} experts"
    native = says_per_layer(config, anatomy)
    if native:
        return [f"{kept}; {native} says how many each, and stock vLLM reads it"]
    others = [f for f in all_families() if f.config.per_layer]
    paths = ", ".join(f"{f.name} ({f.config.per_layer.split('.')[0]})" for f in others)
    return [
        f"{kept}: {PER_LAYER_KEY} in config.json says how many each, but stock vLLM and "
        "transformers ignore it, build every layer with the largest count and would misread "
        "this checkpoint; serve it with an engine that reads the list. The one family whose "
        f"counts per layer stock vLLM reads is {paths}"
    ]


def _counts(
    config: Mapping[str, Any], anatomy: Anatomy, keep: KeepList, drop_mtp: bool
) -> Iterator[tuple[Path, object]]:
    keys = anatomy.family.config
    kept = {layer: len(each.retained) for layer, each in keep.layers.items()}
    add = not keep.is_uniform and not says_per_layer(config, anatomy)
    for at in keys.at:
        section = config_section(config, at)
        if section is None:
            continue
        prefix: Path = tuple(filter(None, at.split(".")))
        changes = dict(_shared_counts(section, anatomy, kept))
        if add and changes and PER_LAYER_KEY not in section:
            mtp = 0 if drop_mtp else anatomy.num_mtp_layers
            length = max(anatomy.num_layers + mtp, max(kept) + 1)
            changes[(PER_LAYER_KEY,)] = Insert([kept.get(layer, 0) for layer in range(length)])
        changes.update(_own_counts(section, anatomy, kept, drop_mtp))
        changes.update({(name,): 0 for name in keys.mtp_layers if drop_mtp and section.get(name)})
        yield from (((*prefix, *path), change) for path, change in changes.items())


def _shared_counts(
    section: Mapping[str, Any], anatomy: Anatomy, kept: Mapping[int, int]
) -> Iterator[tuple[Path, object]]:
    """Every spelling of the one count: it becomes that of the largest layers that share it."""
    keys = anatomy.family.config
    own_mtp = anatomy.own_mtp_count
    most = max(n for layer, n in kept.items() if layer < anatomy.num_layers or not own_mtp)
    for dotted in (*keys.num_experts, *keys.also):
        for path, value in config_values(section, tuple(dotted.split("."))):
            if value == anatomy.shared_count:
                yield path, most


def _own_counts(
    section: Mapping[str, Any], anatomy: Anatomy, kept: Mapping[int, int], drop_mtp: bool
) -> Iterator[tuple[Path, object]]:
    """Counts of single layers, and of the MTP layers alone."""
    of_mtp = [count for layer, count in kept.items() if layer >= anatomy.num_layers]
    for dotted in anatomy.family.config.mtp_num_experts:
        for path, value in config_values(section, tuple(dotted.split("."))):
            yield path, max(of_mtp) if of_mtp else value
    for template, first in per_layer_paths(anatomy.family.config, anatomy.num_layers):
        for path, value in config_values(section, template):
            layer = first + int(path[template.index("*")])
            if drop_mtp and layer >= anatomy.num_layers and template[0] == PER_LAYER_KEY:
                yield path, DELETE
            else:
                # That of a dense layer stays, and nobody takes it for a count forgotten.
                yield path, kept.get(layer, value)


def _refuse_forgotten_counts(
    config: Mapping[str, Any],
    anatomy: Anatomy,
    changes: Mapping[Path, object],
    where: str,
) -> None:
    """A count that stays behind would make a model that loads wrong or not at all."""
    num_experts = anatomy.shared_count
    for path, value in _leaves(config, ()):
        if _is_below(path, anatomy):
            continue
        names = [part for part in path if isinstance(part, str)]
        if type(value) is not int or value != num_experts:
            continue
        if path in changes or not names or "quantization_config" in names:
            continue
        if _COUNT_KEY.search(names[-1]) and not _NOT_A_COUNT.search(names[-1]):
            dotted = ".".join(map(str, path))
            raise ConfigError(
                where,
                f"{dotted} is {num_experts}, the expert count, and no rule rewrites it",
                "see 'Adding a family' in CONTRIBUTING.md",
            )


def _quantization_paths(config: Mapping[str, Any]) -> list[Path]:
    """Where a config keeps its quantization: at the top, or in the text model's part."""
    return [
        path
        for path, value in _objects(config, ())
        if path and path[-1] in ("quantization_config", "compression_config") and value
    ]


def _sections(config: Mapping[str, Any], anatomy: Anatomy) -> list[Path]:
    """The quantization of the model itself, not of another one in the same config."""
    return [path for path in _quantization_paths(config) if not _is_below(path, anatomy)]


def _is_below(path: Path, anatomy: Anatomy) -> bool:
    """Whether a path of the config speaks of other experts, a talker's say."""
    others = (tuple(dotted.split(".")) for dotted in anatomy.family.config.elsewhere)
    return any(path[: len(other)] == other for other in others)


def _objects(node: object, path: Path) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    if isinstance(node, Mapping):
        yield path, node
        for key, value in node.items():
            yield from _objects(value, (*path, key))


def _leaves(node: object, path: Path) -> Iterator[tuple[Path, object]]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from _leaves(value, (*path, key))
    elif isinstance(node, list):
        for position, value in enumerate(node):
            yield from _leaves(value, (*path, position))
    else:
        yield path, node


def _at(node: Any, path: Path) -> Any:
    for part in path:
        node = node[part]
    return node
