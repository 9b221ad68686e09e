"""What other writers make of a family's published tensor names. Pure.

A family declares names as they are published. transformers' `save_pretrained(save_original_format=
False)` stacks the experts of a layer and has names of its own for the block and the layers of many
families; MLX stacks them under other names, quantized ones with `scales` and `biases` beside the
`weight`. Both do the same with every family, so that is one rule here, and no declaration there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain
from typing import TypeVar

from shardsurgeon.families.schema import Rule, TensorNames

_Name = TypeVar("_Name", str, Rule)

_ONE_BY_ONE = "experts.{expert}.{part}"
# Of all experts, the first dimension counting them: transformers' names, then MLX's.
_STACKED = ("experts.gate_up_proj*", "experts.gate_proj*", "experts.up_proj*", "experts.down_proj*")
_STACKED_BY_MLX = ("experts.switch_glu.*", "switch_mlp.*")
# What MLX stores beside a quantized `weight`, a router's included.
_COMPANIONS = (".scales", ".biases")
_BIAS = "e_score_correction_bias"
_RESAVED_BLOCK = "mlp"
_HOMES = ("experts", "switch_mlp")
_WRAPPED = ("language_model.model.layers.", "model.language_model.layers.")


def with_other_layouts(names: TensorNames, tensors: Iterable[str]) -> TensorNames:
    """The names, and behind them those that transformers and MLX write instead of them.

    tensors: the checkpoint's names. `mlp` is taken for a block of experts only where it holds
    some: in other models it is a dense layer's, or lies beside the block.
    """
    if any(any(f".{_RESAVED_BLOCK}.{home}." in name for home in _HOMES) for name in tensors):
        names = _with_the_resaved_block(names)
    stacked: list[Rule] = []
    for rule in names.experts:
        if rule.name.endswith(_ONE_BY_ONE):
            block = rule.name.removesuffix(_ONE_BY_ONE)
            # Without a block around them, what lies beside the experts is not theirs.
            forms = _STACKED + _STACKED_BY_MLX[: 2 if block else 1]
            stacked += [Rule(block + form, rule.axis) for form in forms]
    return replace(
        names,
        layers=_joined(names.layers, chain.from_iterable(map(_rewrapped, names.layers))),
        stacked=_joined(names.stacked, stacked),
        routers=_joined(
            names.routers, [*map(_bias_elsewhere, names.routers), *_companions(names.routers)]
        ),
        shared=_joined(names.shared, _companions(names.shared)),
    )


def is_companion(name: str) -> bool:
    """Whether a router's tensor only says how another one is quantized."""
    return name.endswith(_COMPANIONS)


def is_named_by_mlx(name: str) -> bool:
    """Whether a tensor has a name that MLX alone gives to stacked experts."""
    return ".switch_glu." in name or ".switch_mlp." in name


def _with_the_resaved_block(names: TensorNames) -> TensorNames:
    """With the rules of each block of experts a second time, for `mlp` in its place."""
    blocks = [block for block in names.blocks if Rule(f"{block}.{_ONE_BY_ONE}") in names.experts]
    if not blocks or _RESAVED_BLOCK in names.blocks:
        return names

    def renamed(name: str) -> str:
        block = next((block for block in blocks if name.startswith(f"{block}.")), None)
        return name if block is None else _RESAVED_BLOCK + name.removeprefix(block)

    def again(rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
        return _joined(rules, (Rule(renamed(rule.name), rule.axis) for rule in rules))

    return replace(
        names,
        blocks=(*names.blocks, _RESAVED_BLOCK),
        experts=again(names.experts),
        routers=again(names.routers),
        shared=again(names.shared),
        expert_counts=again(names.expert_counts),
        expert_ids=again(names.expert_ids),
        varies=_joined(names.varies, map(renamed, names.varies)),
    )


def _rewrapped(prefix: str) -> Iterator[str]:
    """A text model's prefix with the wrapper's name on the other side of `model`, and without.

    What transformers saves of a base model alone has no `model.`.
    """
    forms = [prefix]
    for here, there in (_WRAPPED, _WRAPPED[::-1]):
        if here in prefix:
            forms.append(prefix.replace(here, there))
    yield from forms
    yield from (form.removeprefix("model.") for form in forms)


def _bias_elsewhere(rule: Rule) -> Rule:
    """The rule of a correction bias that stands below the router with it beside, or so back."""
    block = rule.name.removesuffix(_BIAS)
    if block == rule.name:
        return rule
    beside = block.removesuffix("gate.")
    return Rule((beside if beside != block else f"{block}gate.") + _BIAS, rule.axis)


def _companions(rules: Iterable[Rule]) -> list[Rule]:
    stems = [(rule.name.removesuffix(".weight"), rule) for rule in rules]
    return [
        Rule(stem + end, rule.axis)
        for stem, rule in stems
        if stem != rule.name
        for end in _COMPANIONS
    ]


def _joined(declared: Iterable[_Name], added: Iterable[_Name]) -> tuple[_Name, ...]:
    return tuple(dict.fromkeys(chain(declared, added)))
