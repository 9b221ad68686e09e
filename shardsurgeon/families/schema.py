"""What a family file may say, and how it is read.

A family is data: where the config keeps its counts, how the tensors of a decoder layer are
named, and which of them have an expert axis. The language of the names is small:

    {layer}   a layer number          {expert}  an expert number
    {part}    the rest of the name    *         anything

`like = "deepseek_v3"` starts from another family and overrides single entries of its tables.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from functools import cache
from importlib import resources
from typing import Any

from shardsurgeon.errors import FamilyError

_NUMBER = r"(?:0|[1-9][0-9]*)"
_PLACEHOLDERS = {
    "{layer}": rf"(?P<layer>{_NUMBER})",
    "{expert}": rf"(?P<expert>{_NUMBER})",
    "{part}": r"(?P<part>.+)",
    "*": r".*",
}
_TOKEN = re.compile("|".join(re.escape(token) for token in _PLACEHOLDERS))


@dataclass(frozen=True, slots=True)
class Rule:
    """One tensor name of a layer, relative to the layer's prefix.

    axis: which dimension counts the experts, where the tensor has one.
    """

    name: str
    axis: int = 0


@dataclass(frozen=True, slots=True)
class ConfigKeys:
    """Where config.json keeps what pruning needs. Each tuple lists every spelling in use.

    at: dotted paths of the object that holds the keys; "" is the top. The first one that has
    an expert count is read, and every one is rewritten.
    also: dotted paths, from `at`, of further values that repeat the expert count; `*` stands
    for every element of a list or member of an object.
    extra_rows: key of the number of router rows behind the experts' own (identity experts).
    elsewhere: dotted paths of objects that speak of other experts, and stay as they are.
    """

    num_experts: tuple[str, ...]
    top_k: tuple[str, ...]
    at: tuple[str, ...] = ("",)
    num_layers: tuple[str, ...] = ("num_hidden_layers",)
    n_group: tuple[str, ...] = ()
    topk_group: tuple[str, ...] = ()
    mtp_layers: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    extra_rows: str = ""
    elsewhere: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TensorNames:
    """How the tensors of a decoder layer are named.

    layers: prefixes of decoder layers; a number from num_hidden_layers on is an MTP layer.
    mtp: prefixes of MTP layers that count from 0 on their own.
    mtp_others: tensors that go when the MTP layers go, beside those layers' own.
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


@dataclass(frozen=True, slots=True)
class Family:
    """One model family.

    group_score_top: how many of a group's experts make its score where routing is
    group-limited; a group must keep at least that many.
    refusal: why models of this family cannot be pruned correctly, where that is so.
    """

    name: str
    model_types: tuple[str, ...]
    architectures: tuple[str, ...]
    facts: str
    config: ConfigKeys
    tensors: TensorNames
    group_score_top: int = 1
    refusal: str = ""


def pattern(template: str) -> str:
    """The regular expression of a name template; every placeholder becomes a named group."""
    out, last = [], 0
    for token in _TOKEN.finditer(template):
        out += [re.escape(template[last : token.start()]), _PLACEHOLDERS[token[0]]]
        last = token.end()
    return "".join(out) + re.escape(template[last:])


def parse_family(text: str, where: str) -> Family:
    """Read one family file. Raises FamilyError where it says something the language lacks."""
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise FamilyError(where, f"not TOML: {error}") from error
    return _family(data, where)


def family_for(config: Mapping[str, Any], where: str) -> Family:
    """The family of a config.json, by `model_type`, else by `architectures`.

    Raises FamilyError where no family is declared for it.
    """
    families = all_families()
    model_type = config.get("model_type")
    architectures = config.get("architectures") or []
    for family in families:
        if model_type in family.model_types:
            return family
    for family in families:
        if any(name in family.architectures for name in architectures):
            return family
    if not _mentions_experts(config):
        problem = f"{model_type!r} names no experts: a dense model has none to prune"
        raise FamilyError(where, problem)
    raise FamilyError(where, *_unknown(model_type, families))


@cache
def all_families() -> tuple[Family, ...]:
    """Every shipped family, sorted by name."""
    folder = resources.files("shardsurgeon.families")
    files = sorted(file.name for file in folder.iterdir() if file.name.endswith(".toml"))
    return tuple(parse_family(_read(name), name) for name in files)


def _read(file_name: str) -> str:
    return (resources.files("shardsurgeon.families") / file_name).read_text(encoding="utf-8")


def _mentions_experts(node: object) -> bool:
    if isinstance(node, Mapping):
        return any("expert" in key or _mentions_experts(value) for key, value in node.items())
    return False


def _unknown(model_type: object, families: tuple[Family, ...]) -> tuple[str, str]:
    known = sorted({name for family in families for name in family.model_types})
    problem = f"model type {model_type!r} is not supported; supported are {', '.join(known)}"
    near = difflib.get_close_matches(str(model_type), known, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    remedy = f"{hint}a new family is one TOML file: see 'Adding a family' in CONTRIBUTING.md"
    return problem, remedy


def _family(data: dict[str, Any], where: str) -> Family:
    data = _inherit(data)
    config = _build(ConfigKeys, data.pop("config", {}), f"{where} [config]")
    tensors = _build(TensorNames, data.pop("tensors", {}), f"{where} [tensors]")
    rest = {"name": where.removesuffix(".toml"), "config": config, "tensors": tensors}
    family: Family = _build(Family, {**data, **rest}, where)
    return family


def _inherit(data: dict[str, Any]) -> dict[str, Any]:
    """The table with what it is `like` filled in below it."""
    parent = data.get("like")
    if parent is None:
        return data
    base = _inherit(tomllib.loads(_read(f"{parent}.toml")))
    tables = {name: {**base[name], **data.get(name, {})} for name in ("config", "tensors")}
    merged = {**base, **data, **tables}
    del merged["like"]
    return merged


def _build(kind: Any, data: dict[str, Any], where: str) -> Any:
    """Make one of the frozen values above from a TOML table, every entry of its declared type."""
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
    return kind(
        **{key: _entry(declared[key].type, value, f"{where} {key}") for key, value in data.items()}
    )


def _entry(declared: Any, value: Any, where: str) -> Any:
    if declared == "tuple[str, ...]":
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return tuple(value)
    elif declared == "tuple[Rule, ...]":
        if isinstance(value, list):
            return tuple(
                _build(Rule, {"name": v} if isinstance(v, str) else v, where) for v in value
            )
    elif type(value).__name__ == declared:
        return value
    raise FamilyError(where, f"{value!r} is not what this entry holds ({declared})")
