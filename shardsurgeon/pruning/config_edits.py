"""What pruning changes in config.json and the quantization files. Pure.

Expert counts in every spelling that is present and MTP counts; the quantization lists are
`quantization_lists`' own matter.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from shardsurgeon.checkpoint.anatomy import Anatomy
from shardsurgeon.checkpoint.checkpoint import Checkpoint
from shardsurgeon.checkpoint.config import (
    MLX_QUANTIZATION_KEY,
    PER_LAYER_KEY,
    PUBLISHED_KEYS,
    QUANTIZATION_KEYS,
    config_section,
    config_values,
    layer_at,
    per_layer_paths,
    quantization_sections,
)
from shardsurgeon.checkpoint.quantization_lists import tool_of
from shardsurgeon.checkpoint.second_configs import other_configs
from shardsurgeon.errors import ConfigError
from shardsurgeon.pruning.keep_lists import KeepList
from shardsurgeon.pruning.layer_counts import says_per_layer, superfluous_overrides, unequal_counts
from shardsurgeon.pruning.quantization_lists import QuantizationLists
from shardsurgeon.storage.formats.json_edit import DELETE, Document

Path = tuple[str | int, ...]

_COUNT_KEY = re.compile(r"expert|routed")
_NOT_A_COUNT = re.compile(r"size|dim|shared|per_tok|top_?k|freq|step|interval|layer|group")


def pruned_config(
    checkpoint: Checkpoint, anatomy: Anatomy, keep: KeepList, *, drop_mtp: bool
) -> bytes:
    """config.json for the experts that a keep-list leaves.

    Raises ConfigError where a value that looks like the expert count is known to no rule, or a
    quantization list names experts in a way that cannot be renumbered.
    """
    where, remedy = checkpoint.config_place, "see 'Adding a family' in CONTRIBUTING.md"
    return _pruned(checkpoint.config, where, checkpoint, anatomy, keep, drop_mtp, remedy)


def settings_with_counts(
    checkpoint: Checkpoint, anatomy: Anatomy, keep: KeepList
) -> Mapping[str, Any]:
    """The config with the expert counts of a keep-list, all else as it is."""
    changes = dict(_counts(checkpoint.settings, anatomy, keep, drop_mtp=False))
    edited = checkpoint.config.edit(changes)
    settings: Any = Document.parse(edited, checkpoint.config_place).value
    return dict(settings)


def pruned_second_config(
    name: str,
    document: Document,
    checkpoint: Checkpoint,
    anatomy: Anatomy,
    keep: KeepList,
    *,
    drop_mtp: bool,
) -> bytes:
    """A config beside the model's own, as `second_configs` finds them, changed as that is.

    Raises ConfigError as `pruned_config` does.
    """
    where, remedy = f"{checkpoint.location}/{name}", f"--exclude {name} leaves it behind"
    return _pruned(document, where, checkpoint, anatomy, keep, drop_mtp, remedy)


def _pruned(
    document: Document,
    where: str,
    checkpoint: Checkpoint,
    anatomy: Anatomy,
    keep: KeepList,
    drop_mtp: bool,
    remedy: str,
) -> bytes:
    settings: Any = document.value
    changes: dict[Path, object] = dict(_counts(settings, anatomy, keep, drop_mtp))
    _refuse_forgotten_counts(settings, anatomy, changes, where, remedy)
    lists = QuantizationLists(checkpoint, anatomy, keep, where, drop_mtp=drop_mtp)
    sections = _sections(settings, anatomy)
    for path in sections:
        changes.update(lists.changes(_at(settings, path), path))
    edited = document.edit(changes)
    after: Any = Document.parse(edited, where).value
    for path in sections:
        lists.refuse_changed(_at(settings, path), _at(after, path), path)
    return edited


def pruned_quantization_file(
    name: str,
    document: Document,
    checkpoint: Checkpoint,
    anatomy: Anatomy,
    keep: KeepList,
    *,
    drop_mtp: bool,
) -> bytes:
    """A side file such as hf_quant_config.json (`name`) with its lists rewritten.

    Raises ConfigError as `pruned_config` does.
    """
    where = f"{checkpoint.location}/{name}"
    lists = QuantizationLists(
        checkpoint, anatomy, keep, where, drop_mtp=drop_mtp, method=tool_of(name)
    )
    if not isinstance(document.value, dict):
        raise ConfigError(where, "is not a JSON object", "fetch it again")
    edited = document.edit(lists.changes(document.value))
    after: Any = Document.parse(edited, where).value
    lists.refuse_changed(document.value, after)
    return edited


def partial_lists(checkpoint: Checkpoint, anatomy: Anatomy, keep: KeepList) -> list[str]:
    """Notes on quantization lists that name some experts of a layer and not the others.

    Engines take what a list says of one expert for all of its layer (vLLM: of expert 0, or of
    any), and renumbering can make another expert that one. Raises what `pruned_config` raises.
    """
    settings, where = checkpoint.settings, checkpoint.config_place
    lists = QuantizationLists(checkpoint, anatomy, keep, where)
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
    names = []
    for path, section in quantization_sections(config):
        words = [section.get("quant_method"), section.get("format") or section.get("quant_algo")]
        if path[-1] == MLX_QUANTIZATION_KEY and not any(words):
            words = ["mlx", section.get("mode")]
        names.append(" ".join(str(word) for word in words if word))
    return next(filter(None, names), "unnamed") if names else None


def side_file_quantization(name: str, content: object) -> str | None:
    """The quantization that a side file says, in a few words; None where it says none.

    name: one of QUANTIZATION_FILES; content: its JSON. Some models have it there and not in
    their config.
    """
    if not isinstance(content, Mapping):
        return None
    section = content.get("quantization", content)
    section = section if isinstance(section, Mapping) else {}
    bits = section.get("bits", section.get("w_bit"))
    what = section.get("quant_algo") or section.get("format") or (bits and f"{bits} bits")
    tool = section.get("quant_method") or tool_of(name)
    return f"{tool} {what}".strip() if what else section.get("quant_method")


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
        add_here = add and bool(changes)
        changes.update(_own_counts(section, anatomy, kept, drop_mtp))
        if add_here:
            changes.update(unequal_counts(section, anatomy, kept, drop_mtp=drop_mtp))
        for gone in superfluous_overrides(section, keys) if keep.is_uniform else ():
            changes = {path: each for path, each in changes.items() if path[: len(gone)] != gone}
            changes[gone] = DELETE
        for dotted in keys.mtp_layers if drop_mtp else ():
            counts = config_values(section, tuple(dotted.split(".")))
            changes.update({path: 0 for path, value in counts if value})
        for name in keys.mtp_padded if drop_mtp else ():
            entries = section.get(name)
            padded = range(anatomy.num_layers, anatomy.num_layers + anatomy.num_mtp_layers)
            if isinstance(entries, list) and len(entries) == padded.stop:
                changes.update({(name, place): DELETE for place in padded})
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
    of_mtp = max((n for layer, n in kept.items() if layer >= anatomy.num_layers), default=None)
    shared = max(n for layer, n in kept.items() if layer < anatomy.num_layers)
    for dotted in anatomy.family.config.mtp_num_experts:
        for path, value in config_values(section, tuple(dotted.split("."))):
            # 0 says "as many as the others", and stays where that is true.
            says = of_mtp is None or (not value and of_mtp == shared)
            yield path, value if says else of_mtp
    for template, first in per_layer_paths(anatomy.family.config, anatomy.num_layers):
        for path, value in config_values(section, template):
            position = layer_at(path[template.index("*")])
            if position is None:
                continue
            layer, listed = first + position, template[0] in (PER_LAYER_KEY, *PUBLISHED_KEYS)
            if drop_mtp and layer >= anatomy.num_layers and listed:
                yield path, DELETE
            elif template[0] in PUBLISHED_KEYS and value == anatomy.shared_count:
                # Of a dense layer it says what the config says of all.
                yield path, kept.get(layer, shared)
            else:
                # A dense layer's count is given as it is, so that it does not pass for forgotten.
                yield path, kept.get(layer, value)


def _refuse_forgotten_counts(
    config: Mapping[str, Any],
    anatomy: Anatomy,
    changes: Mapping[Path, object],
    where: str,
    remedy: str,
) -> None:
    """Raise ConfigError for a value that looks like the expert count and is not in `changes`.

    A model with an old count left in its config loads wrong or not at all.
    """
    num_experts = anatomy.shared_count
    for path, value in _leaves(config, ()):
        if _is_below(path, anatomy):
            continue
        names = [part for part in path if isinstance(part, str)]
        if type(value) is not int or value != num_experts:
            continue
        if path in changes or not names or not QUANTIZATION_KEYS.isdisjoint(names):
            continue
        if any(changes.get(path[:length]) is DELETE for length in range(1, len(path))):
            continue
        if _is_count(path):
            dotted = ".".join(map(str, path))
            raise ConfigError(
                where,
                f"{dotted} is {num_experts}, the expert count, and no rule rewrites it",
                remedy,
            )


def stale_counts(checkpoint: Checkpoint, anatomy: Anatomy, names: Iterable[str]) -> list[str]:
    """One note per config of another program, among the files called `names`, that says the old
    number of experts (DeepSeek's inference/config.json): no rule here knows its spellings.

    Raises SourceReadError.
    """
    notes = []
    for name, document in other_configs(checkpoint, names):
        stale = [
            ".".join(map(str, path))
            for path, value in _leaves(document.value, ())
            if type(value) is int and value == anatomy.shared_count and _is_count(path)
        ]
        if stale:
            said = f"{stale[0]} {anatomy.shared_count}, the number before"
            notes.append(f"{name} is copied as it is and says {said}")
    return notes


def _is_count(path: Path) -> bool:
    """Whether a path looks as if an expert count stood there."""
    last = next((part for part in reversed(path) if isinstance(part, str)), "")
    return bool(_COUNT_KEY.search(last)) and not _NOT_A_COUNT.search(last)


def _sections(config: Mapping[str, Any], anatomy: Anatomy) -> list[Path]:
    """The quantization of the model itself, not of another one in the same config."""
    return [path for path, _ in quantization_sections(config) if not _is_below(path, anatomy)]


def _is_below(path: Path, anatomy: Anatomy) -> bool:
    """Whether a path of the config speaks of other experts, a talker's say."""
    others = (tuple(dotted.split(".")) for dotted in anatomy.family.config.elsewhere)
    return any(path[: len(other)] == other for other in others)


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
