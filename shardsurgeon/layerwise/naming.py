"""Which parameter of transformers' model a tensor of the checkpoint becomes, or is a part of.

Follows transformers' own loader, rule by rule, for one name at a time: a layer is filled without
leading every tensor of the model through it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from shardsurgeon.checkpoint.blueprint import Blueprint
from shardsurgeon.checkpoint.published import name_in_transformers
from shardsurgeon.families.schema import TransformersView


@dataclass(frozen=True, slots=True)
class Target:
    """A parameter by its full name, the rule that makes it, and which of its parts is meant.

    converter, part: None where the tensor is the parameter itself, under another name perhaps.
    """

    parameter: str
    converter: WeightConverter | None
    part: str | None


class ParameterNames:
    """The way from a checkpoint's names to a model's."""

    def __init__(
        self, blueprint: Blueprint, view: TransformersView, alias: tuple[str, str] = ("", "")
    ) -> None:
        """alias: a beginning of names, and what stands for it."""
        self._blueprint = blueprint
        self._view = view
        self._alias = alias
        self._prefix: str = blueprint.model.base_model_prefix
        self._expected: Mapping[str, Any] = blueprint.expected
        self._rules = blueprint.rules()
        self._renamings = [rule for rule in self._rules if isinstance(rule, WeightRenaming)]
        self._converters = [rule for rule in self._rules if isinstance(rule, WeightConverter)]
        self._by_part = {
            part: converter for converter in self._converters for part in converter.source_patterns
        }

    @property
    def rules(self) -> list[Any]:
        """transformers' rules, as its loader takes them."""
        return self._rules

    def for_loader(self, name: str) -> str:
        """The name as transformers' rules know it."""
        own, other = self._alias
        if own and name.startswith(own):
            name = other + name.removeprefix(own)
        return name_in_transformers(name, self._view)

    def renamed(self, own: str, other: str) -> ParameterNames:
        """The same, names that begin with `own` taken for such that begin with `other`."""
        return ParameterNames(self._blueprint, self._view, (own, other))

    def target(self, name: str) -> Target | None:
        """What a weight becomes, None where the model has no place for it."""
        known = self.for_loader(name)
        renamed, part = self._renamed(known, self._renamings, self._converters)
        if renamed not in self._expected and known in self._expected:
            renamed, part = self._renamed(known, [], [])
        if renamed not in self._expected:
            return None
        return Target(renamed, self._by_part[part] if part is not None else None, part)

    def _renamed(
        self, name: str, renamings: list[Any], converters: list[Any]
    ) -> tuple[str, str | None]:
        renamed: tuple[str, str | None] = rename_source_key(
            name, renamings, converters, self._prefix, self._expected
        )
        return renamed
