"""A transformers model whose layers have different numbers of experts.

transformers builds every layer from one count. So the model is built for the largest count, and
beside it, without weights, once for each other one; what holds the experts of a layer comes from
the model for its count.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from shardsurgeon.checkpoint.config import (
    config_section,
    config_values,
    read_numbers,
)
from shardsurgeon.errors import ConfigError
from shardsurgeon.families.schema import ConfigKeys, Family
from shardsurgeon.pruning.layer_counts import without_overrides

# The first number in a parameter's name is its layer: `model.layers.3.mlp.gate.weight`.
_LAYER = re.compile(r"((?:.*?\.)??(\d+))\.(.+)")


@dataclass(frozen=True)
class LayerCounts:
    """Layer → how many experts it has, 0 in a dense one; most: the largest of these numbers."""

    config: Mapping[str, Any]
    keys: ConfigKeys
    kept: Mapping[int, int]

    @classmethod
    def of(cls, config: Mapping[str, Any], family: Family, where: str) -> LayerCounts | None:
        """What a config says, None where all layers with experts have the same number of them."""
        keys = family.config
        numbers = read_numbers(family, config, where)
        for at in filter(None, (config_section(config, at) for at in keys.at)):
            # Of a family's own that say it, transformers has a class that reads it.
            if keys.per_layer and any(config_values(at, tuple(keys.per_layer.split(".")))):
                return None
        layers, per_layer = range(numbers.num_layers), numbers.experts.per_layer
        kept = {layer: count for layer, count in per_layer.items() if layer in layers}
        counts = cls(config, keys, kept)
        return counts if kept and counts.others else None

    @property
    def most(self) -> int:
        """That of the largest layers."""
        return max(self.kept.values())

    @property
    def others(self) -> list[int]:
        """The other numbers, ascending."""
        return sorted(set(self.kept.values()) - {0, self.most})

    def layers_of(self, count: int) -> set[int]:
        """The layers with so many experts."""
        return {layer for layer, each in self.kept.items() if each == count}

    def settings(self, count: int | None = None) -> dict[str, Any]:
        """The config that gives every layer `count` experts, None for the most."""
        made = without_overrides(self.config, self.keys)
        for at in self.keys.at:
            section: Any = config_section(made, at)
            if section is None:
                continue
            for dotted in (*self.keys.num_experts, *self.keys.also):
                for path, value in list(config_values(section, tuple(dotted.split(".")))):
                    if value == self.most and count is not None:
                        node = section
                        for key in path[:-1]:
                            node = node[key]
                        node[path[-1]] = count
        return made

    def require_loaded(self, missing: Iterable[str], where: str) -> None:
        """Raise ConfigError where values of a layer that has not the most experts were not there:
        some quantizations build their own experts, as many in every layer.

        missing: names of parameters; where: the model, as messages name it.
        """
        fewer = {layer for count in self.others for layer in self.layers_of(count)}
        for name in sorted(missing):
            layer = _LAYER.fullmatch(name)
            if layer is not None and int(layer[2]) in fewer:
                problem = f"transformers built {name}, which layer {layer[2]} does not have"
                remedy = "prune with the same number of experts in every layer"
                raise ConfigError(where, problem, remedy)


def model_with_counts(model_class: Any, counts: LayerCounts, configs: Mapping[int, Any]) -> Any:
    """The class of a model that has as many experts in each layer as `counts` says.

    configs: count → the config of a model with so many in every layer, but for that of the most.
    """

    def build(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        model_class.__init__(self, config, *args, **kwargs)
        for count, other in configs.items():
            _take_dtype(other, config)
            twin = model_class(other, *args, **kwargs)
            _take_layers(self, twin, counts.layers_of(count), count)

    members = {"__init__": build, "__module__": model_class.__module__}
    return type(model_class.__name__, (model_class,), members)


def _take_dtype(config: Any, other: Any) -> None:
    """Give a config, and its parts, the dtype of another one."""
    config.dtype = other.dtype
    for name in config.sub_configs:
        inner = getattr(config, name, None)
        if inner is not None:
            _take_dtype(inner, other)


def _take_layers(model: Any, twin: Any, layers: set[int], count: int) -> None:
    """Put the parts of `twin` that have another shape into layers of `model`."""
    own, others = _shapes(model), _shapes(twin)
    taken: dict[int, set[str]] = {}
    for path, shapes in others.items():
        layer = int(path.rpartition(":")[0].rpartition(".")[2])
        if layer in layers and own.get(path) != shapes:
            place, _, child = path.partition(":")
            module = model.get_submodule(place)
            setattr(module, child, getattr(twin.get_submodule(place), child))
            taken.setdefault(layer, set()).add(place)
    if taken.keys() != layers or any(len(places) > 1 for places in taken.values()):
        missing = sorted(layers - taken.keys())
        problem = f"{type(model).__name__} cannot be built with {count} experts in layers {missing}"
        raise ConfigError("config.json", problem, "prune with the same number in every layer")


def _shapes(model: Any) -> dict[str, dict[str, tuple[int, ...]]]:
    """`<layer's path>:<child>` → the shapes of its parameters and buffers, by name."""
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, value in _values(model):
        layer = _LAYER.fullmatch(name)
        if layer is not None:
            child = layer[3].partition(".")[0]
            found.setdefault(f"{layer[1]}:{child}", {})[layer[3]] = tuple(value.shape)
    return found


def _values(model: Any) -> Iterator[tuple[str, Any]]:
    yield from model.named_parameters()
    yield from model.named_buffers()
