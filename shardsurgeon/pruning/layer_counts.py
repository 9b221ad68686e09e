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
    published_list,
)
from shardsurgeon.families.schema import ENGINES, ConfigKeys, all_families
from shardsurgeon.pruning.keep_lists import KeepList
from shardsurgeon.storage.formats.json_edit import Insert

Path = tuple[str | int, ...]

_SINCE = "from transformers 5.14 on, older ones load it wrong without a word"


def says_per_layer(config: Mapping[str, Any], anatomy: Anatomy) -> str:
    """Where the family's own part of a config says experts per layer; "" where it does not."""
    keys = anatomy.family.config
    path = tuple(keys.per_layer.split("."))
    sections = (config_section(config, at) for at in keys.at)
    if keys.per_layer and any(list(config_values(section, path)) for section in sections):
        return keys.per_layer
    return ""


def engines_on_unequal(config: Mapping[str, Any], anatomy: Anatomy) -> str:
    """What stock engines do with the model where its layers keep different numbers of experts."""
    if says_per_layer(config, anatomy):
        return "of stock engines only vLLM reads a count per layer"
    if anatomy.family not in all_families():
        return "stock engines read one count for all layers"
    silent = anatomy.family.config.misread_by
    stop = " and ".join(engine for engine in ENGINES if engine not in silent)
    said = [f"stock {' and '.join(silent)} would load it wrong without a word"] if silent else []
    said += [f"stock {stop} would refuse to load it ({_SINCE})"] if stop else []
    return ", ".join(said)


def list_of_counts(config: Mapping[str, Any], anatomy: Anatomy) -> str:
    """The key of the list that says the experts of each layer, in a config that has one."""
    return published_list(anatomy.family, config) or PER_LAYER_KEY


def published_counts_note(config: Mapping[str, Any], anatomy: Anatomy) -> list[str]:
    """What a user must know of a model with another tool's list of counts."""
    key = published_list(anatomy.family, config)
    if not key:
        return []
    return [
        f"config.json says each layer's experts in {key}, which is read; stock engines ignore it"
    ]


def unequal_note(config: Mapping[str, Any], anatomy: Anatomy, keep: KeepList) -> list[str]:
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
    listed, engines = list_of_counts(config, anatomy), engines_on_unequal(config, anatomy)
    return [
        f"{kept}: {listed} in config.json says how many each, which no stock engine reads, and "
        f"{OVERRIDES_KEY} says it again, to stop them: {engines}. Serve it with an engine that "
        f"reads the list. The one family whose counts per layer stock vLLM reads is {paths}"
    ]


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
    """The override of every layer's count, under the keys that the layers have already.

    Of two keys for one layer transformers takes the last.
    """
    keys = {layer_at(key): key for key in present}
    made: dict[str, Any] = {}
    for layer, count in counts.items():
        override = made[keys.get(layer, str(layer))] = {}
        for dotted in anatomy.family.config.overrides:
            *outer, name = dotted.split(".")
            place = override
            for key in outer:
                place = place.setdefault(key, {})
            place[name] = count
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
