"""What a family file may say, and how it is read.

A family is data: where the config keeps its counts, how the tensors of a decoder layer are
named, and which of them have an expert axis. `templates` has the language of the names.

`like = "deepseek_v3"` starts from another family and overrides single entries of its tables.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from shardsurgeon.errors import FamilyError
from shardsurgeon.families.attention import CACHES, UNDECLARED, AttentionKeys
from shardsurgeon.families.templates import pattern, require_templates
from shardsurgeon.storage.formats.strict_json import brief
from shardsurgeon.storage.formats.strict_toml import parse_toml, read_toml
from shardsurgeon.storage.limits import FAMILY

# Engines whose behaviour with unequal counts is known.
ENGINES = ("transformers", "vLLM")
_SEE = "see 'Adding a family' in CONTRIBUTING.md"


@dataclass(frozen=True, slots=True)
class Rule:
    """One tensor name of a layer, relative to the layer's prefix.

    axis: which dimension counts the experts, from 0, where the tensor has one.
    flat: whether that dimension counts rows, as many of each expert, one expert's after another's.
    tail: whether a router has the rows that `extra_rows` counts.
    Raises FamilyError for an axis below 0: counted from the end, it would say another thing for
    each shape.
    """

    name: str
    axis: int = 0
    flat: bool = False
    tail: bool = True

    def __post_init__(self) -> None:
        if self.axis < 0:
            problem = f"axis = {self.axis}: dimensions are counted from 0"
            raise FamilyError(self.name, problem, "give the number from the front")


@dataclass(frozen=True, slots=True)
class ConfigKeys:
    """Where config.json keeps what pruning needs. Each tuple lists every spelling in use.

    at: dotted paths of the object that holds the keys; "" is the top. The first one that has
    an expert count is read, and all are rewritten.
    also: further values that repeat the expert count.
    num_layers: the number, or a list or text with one entry per layer, whose length it is.
    All except `at` and `elsewhere` are dotted paths from `at`, in which `*` is every element of a
    list or member of an object; a list at the end counts as its elements.
    per_layer, per_mtp_layer: where the config gives the number of experts of each layer, `*`
    being the layer's number (of MTP layers: counted from 0). These may differ between layers.
    mtp_num_experts: spellings of a separate count for the MTP layers.
    extra_rows: key of the number of router rows after the experts' own (identity or shared ones).
    mtp_padded: keys of lists with an entry per layer, MTP layers' behind the others, which a
    model without MTP layers must not have.
    elsewhere: dotted paths of objects about other experts, which are not changed.
    per_layer_names: the count's names in transformers' `per_layer_config`, none for the first of
    num_experts: those that the engines' config classes store, where their attribute_map leads.
    misread_by: those of ENGINES that load a model whose layers have different numbers without a
    word, whatever its `per_layer_config` says.
    """

    num_experts: tuple[str, ...]
    top_k: tuple[str, ...]
    at: tuple[str, ...] = ("",)
    num_layers: tuple[str, ...] = ("num_hidden_layers",)
    n_group: tuple[str, ...] = ()
    topk_group: tuple[str, ...] = ()
    mtp_layers: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    per_layer: str = ""
    per_mtp_layer: str = ""
    mtp_num_experts: tuple[str, ...] = ()
    extra_rows: str = ""
    mtp_padded: tuple[str, ...] = ()
    elsewhere: tuple[str, ...] = ()
    per_layer_names: tuple[str, ...] = ()
    misread_by: tuple[str, ...] = ()

    @property
    def overrides(self) -> tuple[str, ...]:
        """The dotted names under which transformers' `per_layer_config` has a layer's count."""
        return self.per_layer_names or self.num_experts[:1]


@dataclass(frozen=True, slots=True)
class TensorNames:
    """How the tensors of a decoder layer are named.

    layers: prefixes of decoder layers; a number from num_hidden_layers on is an MTP layer.
    mtp: prefixes of MTP layers that count from 0 on their own.
    mtp_others: tensors outside the MTP layers that are removed with them.
    blocks: parts of a layer, relative to it, that make up its MoE block: everything below
    them must be claimed by one of the rules that follow, all relative to the layer.
    experts: tensors of one expert, `{expert}` being its number.
    stacked: tensors of all experts, with an expert axis.
    routers: tensors with one row per expert that choose experts.
    shared: tensors in the block that have no expert axis.
    expert_counts: tensors whose first element is the number of experts.
    expert_ids: integer tables whose values are expert ids.
    beside: tensors of the layer outside the block that are known to have no expert axis,
    whatever their shape.
    elsewhere: tensors outside the layers that are known to have no expert to prune.
    varies: tensors of the block that only some MoE layers have; without it a layer that lacks
    what the others have is refused.
    """

    layers: tuple[str, ...]
    blocks: tuple[str, ...]
    routers: tuple[Rule, ...]
    experts: tuple[Rule, ...] = ()
    stacked: tuple[Rule, ...] = ()
    shared: tuple[Rule, ...] = ()
    expert_counts: tuple[Rule, ...] = ()
    expert_ids: tuple[Rule, ...] = ()
    mtp: tuple[str, ...] = ()
    mtp_others: tuple[str, ...] = ()
    beside: tuple[str, ...] = ("self_attn.*", "linear_attn.*", "*norm*")
    elsewhere: tuple[str, ...] = ()
    varies: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TransformersView:
    """How to change a published config.json that transformers does not read, so that it does.

    model_types: model type in config.json → the one that transformers has for the same model,
    at any place of the config.
    config_keys: dotted path in config.json → the one where transformers looks for the value.
    tensor_names: part of a published tensor name → what transformers calls it, where its own
    renaming rules lack it.
    text: dotted path of a section that transformers knows, where it does not know the whole.
    within: model type of a wrapper, where transformers builds the model only inside of it.
    absent: the wrapper's own parameters, which a checkpoint of the bare model lacks.
    unknown: why transformers cannot build models of this family at all.
    """

    model_types: tuple[tuple[str, str], ...] = ()
    config_keys: tuple[tuple[str, str], ...] = ()
    tensor_names: tuple[tuple[str, str], ...] = ()
    text: str = ""
    within: str = ""
    absent: tuple[str, ...] = ()
    unknown: str = ""


@dataclass(frozen=True, slots=True)
class Family:
    """One model family.

    group_score_top: how many of a group's experts make its score where routing is
    group-limited; a group must keep at least that many.
    refusal: why models of this family cannot be pruned correctly, where that is so.
    known_by: dotted paths that tell the family where a config names no type, all of them there.
    only_bytes: whether the bytes of a prune are all that is proven: no engine's answers were
    compared with those of the original.
    transformers, attention: not inherited; what is `like` another family need not be built like it.
    """

    name: str
    model_types: tuple[str, ...]
    architectures: tuple[str, ...]
    facts: str
    config: ConfigKeys
    tensors: TensorNames
    group_score_top: int = 1
    refusal: str = ""
    known_by: tuple[str, ...] = ()
    only_bytes: bool = False
    transformers: TransformersView = TransformersView()
    attention: AttentionKeys = UNDECLARED


def parse_family(text: str, where: str) -> Family:
    """Read the text of a family file. where: its name, for messages and as the family's name.

    Raises FamilyError where it is not TOML, or has an entry that is unknown, missing or of
    another type.
    """
    return _sound(_family(parse_toml(text, where, FamilyError), where), where)


def read_family(path: str) -> Family:
    """Read a user's own family file. Raises FamilyError where it cannot be read."""
    data = read_toml(path, FAMILY, FamilyError, "no declaration is so large")
    return _sound(_family(data, path), path)


def is_declared(config: Mapping[str, Any]) -> bool:
    """Whether a shipped declaration is for this config."""
    try:
        family_for(config, "")
    except FamilyError:
        return False
    return True


def family_for(config: Mapping[str, Any], where: str, tensors: Iterable[str] = ()) -> Family:
    """The family of a config.json, by `model_type`, else by `architectures`.

    A wrapper that no family declares is read by the family of its text model, if that reads this
    part of a config. tensors: the checkpoint's names, which tell the families that would fit.
    Raises FamilyError where no family is declared for it.
    """
    families = all_families()
    model_type = config.get("model_type")
    architectures = architectures_of(config, where)
    for family in families:
        if model_type in family.model_types:
            return family
    for family in families:
        if any(name in family.architectures for name in architectures):
            return family
    for family in families:
        sections = (config.get(at) for at in family.config.at)
        types = (each.get("model_type") for each in sections if isinstance(each, Mapping))
        if any(name in family.model_types for name in types):
            return family
    for family in families:
        if family.known_by and all(_has(config, dotted) for dotted in family.known_by):
            return family
    if not _mentions_experts(config):
        problem = f"{model_type!r} names no experts: a dense model has none to prune"
        raise FamilyError(where, problem)
    raise FamilyError(where, *_unknown(config, families, tensors))


def architectures_of(config: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """The classes that a config.json names. Raises FamilyError where it lists something else."""
    named = config.get("architectures") or []
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        problem = f"architectures is {brief(named)}, not a list of names"
        raise FamilyError(where, problem, "fetch the file again")
    return tuple(named)


@cache
def all_families() -> tuple[Family, ...]:
    """Every shipped family, sorted by name."""
    named = ((f"{name}.toml", _table_of(name)) for name in _shipped())
    return tuple(_sound(_family(data, where), where) for where, data in named)


@cache
def _shipped() -> tuple[str, ...]:
    """The names of the shipped families, sorted."""
    folder = resources.files("shardsurgeon.families")
    names = (file.name for file in folder.iterdir())
    return tuple(sorted(name.removesuffix(".toml") for name in names if name.endswith(".toml")))


@cache
def _table_of(name: str) -> dict[str, Any]:
    """What a shipped family's file says; many others are like it, so that it is read once."""
    file = resources.files("shardsurgeon.families") / f"{name}.toml"
    return parse_toml(file.read_text(encoding="utf-8"), f"{name}.toml", FamilyError)


def config_section(config: Mapping[str, Any], dotted: str) -> Mapping[str, Any] | None:
    """The object at a dotted path of a config (`text_config`; "" is the top), or None."""
    node: Any = config
    for key in filter(None, dotted.split(".")):
        node = node.get(key) if isinstance(node, Mapping) else None
    return node if isinstance(node, Mapping) else None


def numbers_of_experts(node: object, path: str = "") -> Iterator[tuple[str, int]]:
    """(dotted path, number) of what a config says about experts, whatever it counts of them.

    Numbers of 1 and less, and null, say that a model of the family is dense.
    """
    members: Iterable[tuple[object, object]] = ()
    if isinstance(node, Mapping):
        members = node.items()
    elif isinstance(node, list):
        members = enumerate(node)
    for key, value in members:
        where = f"{path}.{key}".lstrip(".")
        if "expert" in str(key) and type(value) is int and value > 1:
            yield where, value
        yield from numbers_of_experts(value, where)


def _has(config: Mapping[str, Any], dotted: str) -> bool:
    outer, _, key = dotted.rpartition(".")
    return (config_section(config, outer) or {}).get(key) is not None


def _mentions_experts(node: object) -> bool:
    if isinstance(node, Mapping):
        return any("expert" in key or _mentions_experts(value) for key, value in node.items())
    return isinstance(node, list) and any(map(_mentions_experts, node))


def _unknown(
    config: Mapping[str, Any], families: tuple[Family, ...], tensors: Iterable[str]
) -> tuple[str, str]:
    model_type = config.get("model_type")
    known = {name: f for f in families if not f.refusal for name in f.model_types}
    near = difflib.get_close_matches(str(model_type), sorted(known), n=len(known))
    closest = f", the closest are {', '.join(near[:3])}" if near else ""
    problem = f"model type {model_type!r} is not supported (`shardsurgeon families` lists the "
    problem += f"{len(known)} that are{closest})"
    held = list(tensors)
    fitting = (name for name in near if _would_fit(known[name], config, held))
    first = next(fitting, None)
    hint = f"did you mean {first}? " if first else ""
    remedy = (
        f"{hint}try --family auto, or declare it with --family FILE: see 'Adding a family' in "
        "CONTRIBUTING.md"
    )
    return problem, remedy


def _would_fit(family: Family, config: Mapping[str, Any], tensors: list[str]) -> bool:
    """Whether a family's declaration finds its counts in a config, and an expert among tensors.

    tensors: names; none at all are no reason against a family.
    """
    keys = family.config
    sections = [config_section(config, at) or {} for at in keys.at]
    wanted = (keys.num_experts, keys.top_k, keys.num_layers)
    if not any(all(any(s.get(k) is not None for k in ks) for ks in wanted) for s in sections):
        return False
    names = family.tensors
    experts = [re.compile(pattern(rule.name)) for rule in (*names.experts, *names.stacked)]
    layers = [re.compile(pattern(f"{prefix}.")) for prefix in names.layers]
    starts = (
        (name, match.end()) for name in tensors for layer in layers if (match := layer.match(name))
    )
    return not tensors or any(
        expert.fullmatch(name, start) for name, start in starts for expert in experts
    )


def _family(data: dict[str, Any], where: str) -> Family:
    data = dict(_inherit(data, where))
    config = _build(ConfigKeys, data.pop("config", {}), f"{where} [config]")
    tensors = _build(TensorNames, data.pop("tensors", {}), f"{where} [tensors]")
    view = _build(TransformersView, data.pop("transformers", {}), f"{where} [transformers]")
    attention = _build(AttentionKeys, data.pop("attention", {}), f"{where} [attention]")
    rest = {
        "name": Path(where).stem,
        "config": config,
        "tensors": tensors,
        "transformers": view,
        "attention": attention,
    }
    family: Family = _build(Family, {**data, **rest}, where)
    return family


def _sound(family: Family, where: str) -> Family:
    """The family, if every name can be read and none of what is needed is empty."""
    tensors, config = family.tensors, family.config
    needed = {
        "layers": tensors.layers,
        "routers": tensors.routers,
        "experts": tensors.experts or tensors.stacked,
        "at": config.at,
        "num_experts": config.num_experts,
        "top_k": config.top_k,
        "num_layers": config.num_layers,
    }
    for entry, values in needed.items():
        if not values:
            raise FamilyError(where, f"entry '{entry}' is empty", _SEE)
    for place in (config.per_layer, config.per_mtp_layer):
        if place and place.split(".").count("*") != 1:
            problem = f"'{place}' has not one '*' for the number of a layer"
            raise FamilyError(f"{where} [config]", problem, _SEE)
    for name in config.misread_by:
        if name not in ENGINES:
            problem = f"misread_by names '{name}'"
            raise FamilyError(f"{where} [config]", problem, f"one of {', '.join(ENGINES)}")
    for unknown in sorted(family.attention.caches() - CACHES):
        known = ", ".join(sorted(CACHES))
        raise FamilyError(f"{where} [attention]", f"'{unknown}' is no cache", f"one of {known}")
    templates = [
        (field.name, item.name if isinstance(item, Rule) else item)
        for field in fields(tensors)
        for item in getattr(tensors, field.name)
    ]
    templates += [("absent", name) for name in family.transformers.absent]
    require_templates(templates, where)
    return family


def _inherit(data: dict[str, Any], where: str) -> dict[str, Any]:
    """The table with the entries of the family that it is `like`, except where it has its own."""
    parent = data.get("like")
    if parent is None:
        return data
    if parent not in _shipped():
        near = difflib.get_close_matches(str(parent), _shipped(), n=1)
        remedy = f"did you mean {near[0]}?" if near else "name one of shardsurgeon/families"
        raise FamilyError(where, f"is like {parent!r}, which is no family", remedy)
    base = _inherit(_table_of(parent), where)
    tables = {
        name: {**base[name], **_table(data.get(name, {}), f"{where} [{name}]")}
        for name in ("config", "tensors")
    }
    merged = {**base, **data, **tables}
    del merged["like"]
    for own in ("transformers", "attention"):
        merged[own] = data.get(own, {})
    return merged


def _table(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise FamilyError(where, f"is {brief(value)}, not a table", _SEE)
    return value


def _build(kind: Any, value: object, where: str) -> Any:
    """One of the frozen values above from a TOML table, whose entries must have its types."""
    data = _table(value, where)
    declared = {field.name: field for field in fields(kind)}
    for key in data:
        if key not in declared:
            near = difflib.get_close_matches(key, declared, n=1)
            raise FamilyError(
                where, f"unknown entry '{key}'", f"did you mean {near[0]}?" if near else ""
            )
    for field in declared.values():
        if field.default is MISSING and field.name not in data:
            raise FamilyError(where, f"entry '{field.name}' is missing")
    entries = {
        key: _entry(declared[key].type, item, f"{where} {key}") for key, item in data.items()
    }
    try:
        return kind(**entries)
    except FamilyError as error:
        raise FamilyError(f"{where} {error.where}", error.problem, error.remedy) from error


def _entry(declared: Any, value: Any, where: str) -> Any:
    if declared == "tuple[str, ...]":
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return tuple(value)
    elif declared == "tuple[Rule, ...]":
        if isinstance(value, list):
            return tuple(
                _build(Rule, {"name": v} if isinstance(v, str) else v, where) for v in value
            )
    elif declared == "tuple[tuple[str, str], ...]":
        if isinstance(value, dict) and all(isinstance(item, str) for item in value.values()):
            return tuple(value.items())
    elif type(value).__name__ == declared:
        return value
    raise FamilyError(where, f"{brief(value)} is not what this entry holds ({declared})")
