"""config.json and its siblings with new expert counts and everything else untouched.

Pure: documents in, bytes out. Rewritten are every spelling of the expert count, the MTP count
where the MTP layers go, and entries of quantization lists that name an expert by its number.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from shardsurgeon.anatomy import Anatomy
from shardsurgeon.checkpoint import CONFIG_NAME, Checkpoint, config_section
from shardsurgeon.errors import ConfigError
from shardsurgeon.formats.documents import DELETE, Document, Rename
from shardsurgeon.keeplists import KeepList

Path = tuple[str | int, ...]

# Side files that repeat the quantization lists of config.json.
QUANTIZATION_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")

_LAYER = re.compile(r"(?:^|[.\\])(?P<mtp>mtp[.\\]+)?(?:layers|blocks)[.\\]+(?P<layer>\d+)(?=[.\\])")
_EXPERT = re.compile(r"(?<=experts)(?P<dot>[.\\]+)(?P<expert>\d+)(?!\d)")
_CHOICE = re.compile(r"experts[.\\]+[(\[][^)\]]*\d")
_WILDCARD = re.compile(r"experts[.\\]+(?:\[0-9\]|\(\[0-9\]|\(\?:\[0-9\])")
_COUNT_KEY = re.compile(r"expert|routed")
_NOT_A_COUNT = re.compile(r"size|dim|shared|per_tok|top_?k|freq|step|interval|layer|group")


def pruned_config(
    checkpoint: Checkpoint, anatomy: Anatomy, keep: KeepList, kept: int, *, drop_mtp: bool
) -> bytes:
    """config.json for `kept` experts per MoE layer.

    Raises ConfigError where a value that looks like the expert count is known to no rule, or a
    quantization list names experts in a way that cannot be renumbered.
    """
    settings, where = checkpoint.settings, f"{checkpoint.location}/{CONFIG_NAME}"
    changes: dict[Path, object] = dict(_counts(settings, anatomy, kept, drop_mtp))
    _refuse_forgotten_counts(settings, anatomy, changes, where)
    for path in _quantization_paths(settings):
        changes.update(_renumbered(_at(settings, path), path, anatomy, keep, where))
    return checkpoint.config.edit(changes)


def pruned_quantization_file(
    document: Document, anatomy: Anatomy, keep: KeepList, where: str
) -> bytes:
    """A side file such as hf_quant_config.json with its expert entries renumbered."""
    return document.edit(_renumbered(document.value, (), anatomy, keep, where))


def quantization_name(config: Mapping[str, Any]) -> str | None:
    """The quantization in a few words: `compressed-tensors pack-quantized`, `fp8`, or None."""
    for path in _quantization_paths(config):
        section = _at(config, path)
        words = [section.get("quant_method"), section.get("format") or section.get("quant_algo")]
        return " ".join(str(word) for word in words if word) or "unnamed"
    return None


def _counts(
    config: Mapping[str, Any], anatomy: Anatomy, kept: int, drop_mtp: bool
) -> Iterator[tuple[Path, int]]:
    keys = anatomy.family.config
    for at in keys.at:
        section = config_section(config, at)
        prefix: Path = tuple(filter(None, at.split(".")))
        for dotted in (*keys.num_experts, *keys.also):
            for path, value in _found(section, tuple(dotted.split("."))):
                if value == anatomy.num_experts:
                    yield (*prefix, *path), kept
        for name in keys.mtp_layers if drop_mtp else ():
            if section is not None and section.get(name):
                yield (*prefix, name), 0


def _found(node: object, keys: tuple[str, ...]) -> Iterator[tuple[Path, object]]:
    """(path, number) of every number at a path whose `*` stands for all there are.

    A list at the end of the path gives each of its elements: some configs say it per layer.
    """
    if not keys and not isinstance(node, list):
        yield (), node
        return
    inner: Iterable[tuple[str | int, object]] = ()
    if isinstance(node, list) and (not keys or keys[0] == "*"):
        inner = enumerate(node)
    elif isinstance(node, Mapping) and keys:
        inner = node.items() if keys[0] == "*" else [(k, node[k]) for k in keys[:1] if k in node]
    for key, value in inner:
        for path, number in _found(value, keys[1:]):
            yield (key, *path), number


def _refuse_forgotten_counts(
    config: Mapping[str, Any],
    anatomy: Anatomy,
    changes: Mapping[Path, object],
    where: str,
) -> None:
    """A count that stays behind would make a model that loads wrong or not at all."""
    num_experts = anatomy.num_experts
    others = {tuple(dotted.split(".")) for dotted in anatomy.family.config.elsewhere}
    for path, value in _leaves(config, ()):
        if any(path[: len(other)] == other for other in others):
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


def _renumbered(
    node: object, path: Path, anatomy: Anatomy, keep: KeepList, where: str
) -> dict[Path, object]:
    """The changes that renumber or remove every entry that names an expert by its number."""
    changes: dict[Path, object] = {}
    if isinstance(node, Mapping):
        for key, value in node.items():
            renamed = _rename(key, anatomy, keep, where)
            if renamed is None:
                changes[(*path, key)] = DELETE
                continue
            if renamed != key:
                changes[(*path, key)] = Rename(renamed)
            changes.update(_renumbered(value, (*path, key), anatomy, keep, where))
    elif isinstance(node, list):
        for position, value in enumerate(node):
            if isinstance(value, str):
                renamed = _rename(value, anatomy, keep, where)
                if renamed != value:
                    changes[(*path, position)] = DELETE if renamed is None else renamed
            else:
                changes.update(_renumbered(value, (*path, position), anatomy, keep, where))
    return changes


def _rename(text: str, anatomy: Anatomy, keep: KeepList, where: str) -> str | None:
    """A module name or pattern with its expert renumbered; None where the expert is gone.

    Patterns that name no expert stay as they are.
    """
    if _CHOICE.search(text) and not _WILDCARD.search(text):
        raise ConfigError(
            where,
            f"quantization entry {text!r} names several experts by number",
            "write one entry per expert, or one for all of them",
        )
    match = _EXPERT.search(text)
    if match is None:
        return text
    layer = _layer_of(text, anatomy)
    if layer is None:
        raise ConfigError(
            where,
            f"quantization entry {text!r} names expert {match['expert']} of no single layer",
            "the experts of each layer get numbers of their own; write one entry per layer",
        )
    kept = keep.layers.get(layer)
    if kept is None:
        # The layer's experts stay as they are, or the layer is gone and no one reads the entry.
        return text
    old_id = int(match["expert"])
    if old_id not in kept.retained:
        return None
    new_id = kept.retained.index(old_id)
    return f"{text[: match.start('expert')]}{new_id}{text[match.end('expert') :]}"


def _layer_of(text: str, anatomy: Anatomy) -> int | None:
    match = _LAYER.search(text)
    if match is None:
        return None
    return int(match["layer"]) + (anatomy.num_layers if match["mtp"] else 0)
