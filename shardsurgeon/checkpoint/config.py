"""What a model's config.json says: counts in every spelling of its family, and sections. Pure.

`anatomy` compares the counts with the tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

from shardsurgeon.checkpoint.roles import ExpertCounts
from shardsurgeon.errors import ConfigError
from shardsurgeon.families.schema import ConfigKeys, Family, numbers_of_experts
from shardsurgeon.families.schema import config_section as config_section
from shardsurgeon.storage.formats.strict_json import brief
from shardsurgeon.storage.limits import MAX_EXPERTS, MAX_LAYERS

# Experts of every layer, MTP layers included, 0 for dense ones. Pruned models whose layers keep
# different numbers have this list; no engine's release reads it.
PER_LAYER_KEY = "num_routed_experts_per_layer"
# The same said by others, who publish a patch of vLLM with it: a list over all layers but MTP's, or
# an object with their numbers. What it says of a dense layer means nothing.
PUBLISHED_KEYS = ("per_layer_num_experts", "num_experts_per_layer", "n_routed_experts_per_layer")
# transformers' own: layer -> {attribute: its value there}. An attribute that has one cannot be
# read from the whole config any more, which stops every model that knows one count for all layers.
OVERRIDES_KEY = "per_layer_config"
MLX_QUANTIZATION_KEY = "quantization"
# transformers' key, that of compressed-tensors before transformers had one, and MLX's.
QUANTIZATION_KEYS = frozenset({"quantization_config", "compression_config", MLX_QUANTIZATION_KEY})

JsonPath = tuple[str | int, ...]


def quantization_sections(
    config: Mapping[str, Any], path: JsonPath = ()
) -> Iterator[tuple[JsonPath, Mapping[str, Any]]]:
    """(path, section) of every part of a config that says how weights are quantized.

    At the top or in the text model's part, at whatever depth; empty ones are left out. path: that
    of `config` itself.
    """
    for key, value in config.items():
        if isinstance(value, Mapping):
            if value and key in QUANTIZATION_KEYS:
                yield (*path, key), value
            yield from quantization_sections(value, (*path, key))


def config_values(node: object, keys: tuple[str, ...]) -> Iterator[tuple[JsonPath, object]]:
    """(path, value) of every value at a path of keys, in which `*` is every key or position.

    A list at the end of the path gives each of its elements: some configs have one per layer.
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
        for path, number in config_values(value, keys[1:]):
            yield (key, *path), number


@dataclass(frozen=True, slots=True)
class Numbers:
    """Layers without MTP, experts, and routing, as `Anatomy` has them.

    mtp_layers: MTP layers; own_mtp_count: whether the config says of them how many experts they
    have; extra_rows: router rows behind the experts' own.
    """

    num_layers: int
    experts: ExpertCounts
    own_mtp_count: bool
    top_k: int
    n_group: int
    topk_group: int
    mtp_layers: int
    extra_rows: int


def read_numbers(family: Family, config: Mapping[str, Any], where: str) -> Numbers:
    """The counts of a config. Raises ConfigError, naming `where`, for one that is missing or not
    a number, and for spellings that disagree."""
    keys = family.config
    sections = [s for s in (config_section(config, at) for at in keys.at) if s is not None]
    lists = (f"{key}.*" for key in PUBLISHED_KEYS)
    spellings = (*keys.num_experts, *filter(None, (keys.per_layer,)), PER_LAYER_KEY, *lists)
    section = next((s for s in sections if any(_values_at(s, key) for key in spellings)), None)
    if section is None:
        raise _no_count(family, config, where)

    def number(names: tuple[str, ...], default: int | None) -> int:
        return _number(section, names, default, where)

    num_layers = _num_layers(section, keys.num_layers, where)
    experts = _experts(section, keys, num_layers, where)
    for other in sections:
        _refuse_other_count(other, keys.num_experts, experts.every, where)
    if num_layers > MAX_LAYERS:
        raise _too_many(num_layers, "layers", MAX_LAYERS, where)
    most = max(experts.every, experts.mtp, *experts.per_layer.values())
    if most > MAX_EXPERTS:
        raise _too_many(most, "experts", MAX_EXPERTS, where)
    n_group = max(number(keys.n_group, 1), 1)
    # Some wrappers count the MTP layers outside of the text model's part.
    counts_mtp = [s for s in sections if any(_values_at(s, key) for key in keys.mtp_layers)]
    own = (*keys.mtp_num_experts, *filter(None, (keys.per_mtp_layer,)))
    mtp_layers = _number(next(iter(counts_mtp), section), keys.mtp_layers, 0, where)
    if mtp_layers > MAX_LAYERS:
        raise _too_many(mtp_layers, "MTP layers", MAX_LAYERS, where)
    extra_rows = number((keys.extra_rows,), 0) if keys.extra_rows else 0
    if extra_rows > MAX_EXPERTS:
        raise _too_many(extra_rows, f"router rows more ({keys.extra_rows})", MAX_EXPERTS, where)
    return Numbers(
        num_layers=num_layers,
        experts=experts,
        own_mtp_count=any(_values_at(section, name) for name in own),
        top_k=number(keys.top_k, None),
        n_group=n_group,
        topk_group=max(number(keys.topk_group, n_group), 1),
        mtp_layers=mtp_layers,
        extra_rows=extra_rows,
    )


def _too_many(found: int, what: str, most: int, where: str) -> ConfigError:
    problem = f"says {brief(found)} {what}, no model has more than {most:,}"
    return ConfigError(where, problem, "fetch the file again")


def counts_no_mtp(family: Family, config: Mapping[str, Any]) -> bool:
    """Whether the config has a count of MTP layers, and it is 0."""
    sections = (config_section(config, at) or {} for at in family.config.at)
    return any(s.get(name) == 0 for s in sections for name in family.config.mtp_layers)


def per_layer_paths(keys: ConfigKeys, num_layers: int) -> list[tuple[tuple[str, ...], int]]:
    """(path, first layer) of every place with experts per layer, which counts from that layer."""
    places = ((f"{PER_LAYER_KEY}.*", 0), (keys.per_layer, 0), (keys.per_mtp_layer, num_layers))
    published = ((f"{key}.*", 0) for key in PUBLISHED_KEYS)
    overrides = ((".".join(path), 0) for path in override_paths(keys))
    listed = (*places, *published, *overrides)
    return [(tuple(dotted.split(".")), first) for dotted, first in listed if dotted]


def override_paths(keys: ConfigKeys) -> list[tuple[str, ...]]:
    """Where transformers' overrides may say a layer's experts, the layer being `*`."""
    names = dict.fromkeys((*keys.overrides, *keys.num_experts))
    return [(OVERRIDES_KEY, "*", *name.split(".")) for name in names]


def layer_at(position: str | int) -> int | None:
    """The layer that a list's position, or an object's key in digits, stands for."""
    if isinstance(position, str):
        digits = position.isascii() and position.isdigit() and len(position) < 10
        return int(position) if digits else None
    return position


def published_list(family: Family, config: Mapping[str, Any]) -> str:
    """The key of another tool's counts per layer that a config has, "" where it has none."""
    sections = [config_section(config, at) or {} for at in family.config.at]
    found = (key for key in PUBLISHED_KEYS if any(_values_at(s, f"{key}.*") for s in sections))
    return next(found, "")


def _experts(
    section: Mapping[str, Any], keys: ConfigKeys, num_layers: int, where: str
) -> ExpertCounts:
    per_layer = _per_layer(section, keys, num_layers, where)
    largest = max((n for layer, n in per_layer.items() if layer < num_layers), default=None)
    every = _number(section, keys.num_experts, largest, where)
    # 0 is how a config says that the MTP layers have as many as the others.
    mtp = _number(section, keys.mtp_num_experts, every, where) or every
    return ExpertCounts(every, per_layer, mtp)


def _refuse_other_count(
    section: Mapping[str, Any], names: tuple[str, ...], every: int, where: str
) -> None:
    """Raise ConfigError where a part of the config has a spelling with another count."""
    for name in names:
        other = next((n for n in _values_at(section, name) if n != every), None)
        if other is not None:
            problem = f"says {brief(every)} and {brief(other)} experts ({name})"
            raise ConfigError(where, problem, "make the spellings agree")


def _per_layer(
    section: Mapping[str, Any], keys: ConfigKeys, num_layers: int, where: str
) -> dict[int, int]:
    """Layer → experts, of the layers for which the config says it."""
    if not isinstance(section.get(PER_LAYER_KEY, []), list):
        raise ConfigError(where, f"{PER_LAYER_KEY} is not a list", "say a number for every layer")
    found: dict[int, int] = {}
    for template, first in per_layer_paths(keys, num_layers):
        for path, value in config_values(section, template):
            position = layer_at(path[template.index("*")])
            if value is None:
                continue
            if type(value) is not int or value < 0 or position is None:
                dotted = ".".join(map(str, path))
                raise ConfigError(
                    where, f"{dotted} is {brief(value)}, expected a whole number for each layer"
                )
            layer = first + position
            if found.setdefault(layer, value) != value:
                problem = f"says {found[layer]} and {value} experts for layer {layer}"
                raise ConfigError(where, problem, "make the spellings agree")
    return found


def _no_count(family: Family, config: Mapping[str, Any], where: str) -> ConfigError:
    """The error for a config without the count: of a dense model, or with the count elsewhere."""
    keys = family.config
    problem = f"has no expert count ({' or '.join(keys.num_experts)})"
    # The count rather than what else a config says of experts: the largest number, mostly.
    other = max(numbers_of_experts(config), key=itemgetter(1), default=None)
    if other is None:
        return ConfigError(where, problem, "a dense model has no experts to prune")
    places = " or ".join(at or "the top" for at in keys.at)
    return ConfigError(
        where,
        f"{problem} in {places}, where family {family.name} has it, and says {other[0]} {other[1]}",
        "declare where it stands with --family FILE: see 'Adding a family' in CONTRIBUTING.md",
    )


def _num_layers(section: Mapping[str, Any], names: tuple[str, ...], where: str) -> int:
    """The number of layers: a spelling's value, or the length of a list or text of layer kinds."""
    for name in names:
        outer, _, key = name.rpartition(".")
        value = (config_section(section, outer) or {}).get(key)
        if isinstance(value, list | str):
            return len(value)
        if value is not None:
            return _number(section, (name,), None, where)
    raise ConfigError(where, f"has no {' or '.join(names)}")


def _number(
    section: Mapping[str, Any], names: tuple[str, ...], default: int | None, where: str
) -> int:
    for name in names:
        numbers = _values_at(section, name)
        if not numbers:
            continue
        for number in numbers:
            if type(number) is not int or number < 0:
                raise ConfigError(where, f"{name} is {brief(number)}, expected a whole number")
        largest: int = max(numbers)
        return largest
    if default is None:
        raise ConfigError(where, f"has no {' or '.join(names)}")
    return default


def _values_at(section: Mapping[str, Any], name: str) -> list[Any]:
    """The values at a dotted path of a config: one, or one per layer; null is left out."""
    values = config_values(section, tuple(name.split(".")))
    return [value for _, value in values if value is not None]
