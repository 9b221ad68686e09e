"""A published checkpoint as transformers reads it: its config, and a few names.

Pure. Where the two differ is said by the family's `[transformers]` table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

from shardsurgeon.checkpoint.checkpoint import config_section
from shardsurgeon.families.schema import Family, TransformersView

Known = Callable[[object], bool]


def as_transformers_reads(
    config: Mapping[str, Any], view: TransformersView, known: Known
) -> dict[str, Any] | None:
    """The config of a model that transformers has, or None where it has none.

    known: whether transformers has a config of a model type.
    """
    read: dict[str, Any] = _retyped(deepcopy(dict(config)), dict(view.model_types), known)
    for source, target in view.config_keys:
        _copy(read, source, target)
    section = config_section(read, view.text)
    if not known(read.get("model_type")) and section is not None:
        read = dict(section)
    if not known(read.get("model_type")):
        return None
    if view.within and read["model_type"] != view.within:
        return {"model_type": view.within, "text_config": read}
    return read


def name_in_transformers(name: str, view: TransformersView) -> str:
    """A published tensor name in the spelling that transformers' own rules start from."""
    for published, own in view.tensor_names:
        name = name.replace(published, own)
    return name


def identity_experts(config: Mapping[str, Any], family: Family) -> int:
    """How many experts without weights the config has behind the others."""
    key = family.config.extra_rows
    for at in family.config.at:
        count = (config_section(config, at) or {}).get(key)
        if isinstance(count, int):
            return count
    return 0


def _retyped(node: Any, names: Mapping[str, str], known: Known) -> Any:
    """The config with every model type that transformers lacks replaced by the one it has."""
    if isinstance(node, dict):
        node = {key: _retyped(value, names, known) for key, value in node.items()}
        own = node.get("model_type")
        if own in names and not known(own):
            node["model_type"] = names[own]
    return node


def _copy(config: dict[str, Any], source: str, target: str) -> None:
    """Give the value at one dotted path at another one too, where there is such a value."""
    outer, _, key = source.rpartition(".")
    section = config_section(config, outer)
    if section is None or key not in section:
        return
    outer, _, name = target.rpartition(".")
    place = config_section(config, outer)
    if isinstance(place, dict):
        place[name] = section[key]
