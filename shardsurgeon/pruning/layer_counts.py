"""What a config says where layers keep different numbers of experts. Pure.

A list with the number of each layer, and transformers' overrides with the same numbers: they stop
engines that know one count for all layers, which would otherwise load the model wrong.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any

from shardsurgeon.checkpoint.anatomy import Anatomy
from shardsurgeon.checkpoint.config import (
    OVERRIDES_KEY,
    PER_LAYER_KEY,
    PUBLISHED_KEYS,
    config_section,
    config_values,
    layer_at,
    override_paths,
)
from shardsurgeon.families.schema import ConfigKeys, Family
from shardsurgeon.storage.formats.json_edit import Insert

Path = tuple[str | int, ...]

_STOCK = ("transformers", "vLLM")


def engines_on_unequal(family: Family) -> str:
    """What stock engines do with a model of a family whose layers keep different numbers."""
    silent = family.config.misread_by
    stop = " and ".join(engine for engine in _STOCK if engine not in silent)
    said = [f"stock {' and '.join(silent)} would load it wrong without a word"] if silent else []
    said += [f"stock {stop} would refuse to load it"] if stop else []
    return ", ".join(said)


def unequal_counts(
    section: Mapping[str, Any], anatomy: Anatomy, kept: Mapping[int, int], *, drop_mtp: bool
) -> Iterator[tuple[Path, object]]:
    """Changes of the section with the count that say how many experts each layer keeps.

    kept: layer → its experts. A list that is there already is no addition: its numbers are
    rewritten as all counts are.
    """
    has_list = PER_LAYER_KEY in section or any(
        next(config_values(section, (key, "*")), None) for key in PUBLISHED_KEYS
    )
    if not has_list:
        mtp = 0 if drop_mtp else anatomy.num_mtp_layers
        length = max(anatomy.num_layers + mtp, max(kept) + 1)
        yield (PER_LAYER_KEY,), Insert([kept.get(layer, 0) for layer in range(length)])
    present = section.get(OVERRIDES_KEY)
    if present is None or isinstance(present, Mapping):
        # transformers knows no layers behind the main ones, and refuses what it does not know.
        main = {layer.index: kept[layer.index] for layer in anatomy.main_layers}
        yield from _merged({OVERRIDES_KEY: _overrides(present or {}, anatomy, main)}, section, ())


def superfluous_overrides(section: Mapping[str, Any], keys: ConfigKeys) -> list[Path]:
    """The paths that go from the overrides where all layers keep the same number again.

    Engines that know one count then serve the model, and some refuse one with any override.
    """
    templates = override_paths(keys)
    present = section.get(OVERRIDES_KEY)
    counted = any(next(config_values(section, path), None) for path in templates)
    if not counted or not isinstance(present, Mapping):
        return []
    return _emptied(present, [template[1:] for template in templates], (OVERRIDES_KEY,))


def without_overrides(config: Mapping[str, Any], keys: ConfigKeys) -> dict[str, Any]:
    """A config with one count for all layers, as far as transformers is concerned."""
    read = deepcopy(dict(config))
    for at in keys.at:
        section: Any = config_section(read, at) or {}
        for *outer, last in superfluous_overrides(section, keys):
            node = section
            for key in outer:
                node = node[key]
            del node[last]
    return read


def _overrides(
    present: Mapping[str, Any], anatomy: Anatomy, counts: Mapping[int, int]
) -> dict[str, Any]:
    """The override of every layer's count, under the keys that the layers have already."""
    keys = {layer_at(key): key for key in present}
    made: dict[str, Any] = {}
    for layer, count in counts.items():
        value: Any = count
        for name in reversed(anatomy.family.config.override.split(".")):
            value = {name: value}
        made[keys.get(layer, str(layer))] = value
    return made


def _merged(
    wanted: Mapping[str, Any], node: Mapping[str, Any], path: Path
) -> Iterator[tuple[Path, object]]:
    """Changes that put values into an object and leave its other members."""
    for key, value in wanted.items():
        there = node.get(key)
        if key not in node:
            yield (*path, key), Insert(value)
        elif isinstance(value, Mapping) and isinstance(there, Mapping):
            yield from _merged(value, there, (*path, key))
        else:
            yield (*path, key), value


def _emptied(
    node: Mapping[str, Any], templates: Sequence[tuple[str, ...]], path: Path
) -> list[Path]:
    """What to remove so that nothing at the templates is left, nor an object without members."""
    gone: dict[str, list[Path]] = {}
    for key, value in node.items():
        place = (*path, key)
        inner = [template[1:] for template in templates if template[0] in ("*", key)]
        if () in inner or value == {}:
            gone[key] = [place]
        elif isinstance(value, Mapping) and (below := _emptied(value, inner, place)):
            gone[key] = below
    whole = all(gone.get(key) == [(*path, key)] for key in node)
    return [path] if whole else [each for below in gone.values() for each in below]
