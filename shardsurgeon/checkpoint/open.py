"""Open a model with the family that was asked for, or guess one where none is declared.

`--family auto` reads names, shapes and config and writes the TOML that a person would write.
Where two readings are possible it does not choose: the skeleton then says what is known, and the
user fills in the rest.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shardsurgeon.checkpoint.checkpoint import Checkpoint, open_checkpoint, with_family
from shardsurgeon.checkpoint.config import QUANTIZATION_KEYS
from shardsurgeon.errors import UndeclaredFamilyError, UsageError
from shardsurgeon.families.schema import Family, is_declared, parse_family, read_family
from shardsurgeon.storage.formats.index import CONFIG_NAME

_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_TOP_K = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "experts_per_token",
    "top_k_experts",
    "moe_topk",
    "moe_top_k",
    "moe_k",
)
_LAYERS = ("num_hidden_layers", "num_layers", "n_layers")
_GROUPS = ("n_group", "num_expert_group", "n_expert_group")
_TOPK_GROUPS = ("topk_group", "n_limited_groups")
_MTP = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_modules")
# Names that families give to experts which all tokens pass; their width may equal the count.
_SHARED = re.compile(r"(?:^|\.)shared?_(?:experts?|mlp)(?:_gate)?\.")
_EXPERT = re.compile(r"(?P<prefix>.*?\D)(?P<layer>\d+)\.(?P<block>.+\.)?experts\.\d+\..+")


def open_model(model: str | os.PathLike[str] | None, family: str | None = None) -> Checkpoint:
    """Open a checkpoint; model: as `open_checkpoint` takes it, None for the current folder.

    family: a file with the model's declaration; `auto` to read a model without one where names
    and config leave no doubt; None for the shipped declarations. Raises UsageError where the
    current folder is not a model, and whatever opening a checkpoint raises.
    """
    declared = read_family(family) if family not in (None, "auto") else None
    checkpoint = open_checkpoint(_named(model), declared)
    if family != "auto" or is_declared(checkpoint.settings):
        return checkpoint
    guess = guess_family(checkpoint)
    checkpoint = with_family(checkpoint, guess.family)
    return replace(checkpoint, notes=(*checkpoint.notes, *guess.notes))


def _named(model: str | os.PathLike[str] | None) -> str | os.PathLike[str]:
    if model is not None:
        return model
    if not Path(CONFIG_NAME).is_file():
        problem = f"the current folder has no {CONFIG_NAME}"
        raise UsageError("--model", problem, "go to a model's folder or name one with --model")
    return "."


@dataclass(frozen=True, slots=True)
class Guess:
    """A family read off a checkpoint. toml: the declaration; family: the same, parsed."""

    family: Family
    toml: str

    @property
    def notes(self) -> tuple[str, ...]:
        """What was assumed, for the report."""
        names = self.family.tensors
        routers = ", ".join(rule.name for rule in names.routers)
        return (
            "no family is declared for this model; it was read without one (--family auto)",
            f"assumed: experts {names.layers[0]}.{names.experts[0].name}, router {routers}, "
            f"count {' and '.join(self.family.config.num_experts)}",
            "check the result before you trust it: see 'Adding a family' in CONTRIBUTING.md",
        )


def guess_family(checkpoint: Checkpoint) -> Guess:
    """The one declaration that explains every tensor and the config.

    Raises UndeclaredFamilyError, with the skeleton of a declaration to fill in, where there is
    none or more than one.
    """
    reading = _FamilyGuess(checkpoint)
    toml = reading.toml()
    if reading.ambiguities:
        where = f"{checkpoint.location}/{CONFIG_NAME}"
        raise UndeclaredFamilyError(
            where,
            f"cannot be read without a declaration: {reading.ambiguities[0]}",
            "complete the skeleton printed and pass it with --family FILE",
            skeleton=toml,
        )
    return Guess(parse_family(toml, "auto"), toml)


class _FamilyGuess:
    """What one checkpoint says of its family. ambiguities: why that is not enough."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.ambiguities: list[str] = []
        self._config = checkpoint.settings
        self._section, self._at = self._count_section()
        self._counts = [key for key in _COUNTS if key in self._section]
        self._experts = self._section[self._counts[0]] if self._counts else 0
        if not isinstance(self._experts, int) or isinstance(self._experts, bool):
            self._doubt(f"{self._counts[0]} is not a single number")
            self._experts = 0
        self._shapes = {record.name: record.shape for record in checkpoint.records}
        self._prefix, self._block = self._place()
        self._routers, self._shared = self._others()

    def toml(self) -> str:
        """The declaration, as far as it is known."""
        architectures = self._config.get("architectures") or []
        lines = [
            'facts = "read off one checkpoint by shardsurgeon; check it"',
            f"model_types = {_list([self._config.get('model_type')])}",
            f"architectures = {_list(architectures)}",
            # Some routers score a group by its best expert, some by the best two: two is safe.
            *(["group_score_top = 2"] if self._is_grouped() else []),
            "",
            "[config]",
            f"at = {_list([self._at])}",
            f"num_experts = {_list(self._counts)}",
        ]
        for entry, keys in {
            "top_k": _TOP_K,
            "num_layers": _LAYERS,
            "n_group": _GROUPS,
            "topk_group": _TOPK_GROUPS,
            "mtp_layers": _MTP,
        }.items():
            present = [key for key in keys if self._section.get(key) is not None]
            if present or entry in ("top_k", "num_layers"):
                lines.append(f"{entry} = {_list(present)}")
            if not present and entry in ("top_k", "num_layers"):
                self._doubt(f"config.json has none of {', '.join(keys)}")
        block = self._block.rstrip(".")
        dot = f"{block}." if block else ""
        lines += [
            "",
            "[tensors]",
            f"layers = {_list([f'{self._prefix}{{layer}}'] if self._prefix else [])}",
            f"blocks = {_list([block or 'experts'])}",
            f"experts = {_list([f'{dot}experts.{{expert}}.{{part}}'])}",
            f"routers = {_list(self._routers)}",
            f"shared = {_list(self._shared)}",
        ]
        return "\n".join(lines) + "\n"

    def _is_grouped(self) -> bool:
        return any(self._section.get(key) not in (None, 0, 1) for key in _GROUPS)

    def _doubt(self, problem: str) -> None:
        if problem not in self.ambiguities:
            self.ambiguities.append(problem)

    def _count_section(self) -> tuple[Mapping[str, Any], str]:
        found = [
            (path, node)
            for path, node in _objects(self._config, "")
            if any(key in node for key in _COUNTS) and QUANTIZATION_KEYS.isdisjoint(path.split("."))
        ]
        if len(found) != 1:
            self._doubt(f"config.json counts experts in {len(found)} places")
            return self._config, ""
        path, section = found[0]
        values = {str(section[key]) for key in _COUNTS if key in section}
        if len(values) > 1:
            self._doubt(f"config.json says {' and '.join(sorted(values))} experts")
        return section, path

    def _place(self) -> tuple[str, str]:
        """The prefix before the layer's number, and the block that holds `experts`."""
        places = {
            (match["prefix"], match["block"] or "")
            for match in map(_EXPERT.fullmatch, self._shapes)
            if match
        }
        if len(places) != 1:
            shown = ", ".join(sorted(f"{prefix}N.{block}experts" for prefix, block in places))
            self._doubt(f"experts by number lie in {len(places)} places {shown}".rstrip())
            return "", ""
        return places.pop()

    def _others(self) -> tuple[list[str], list[str]]:
        """Names, relative to the layer, of tensors that choose experts, and of shared ones."""
        inside = re.compile(
            rf"{re.escape(self._prefix)}(?P<layer>\d+)\.(?P<rest>{re.escape(self._block)}.+)"
        )
        in_moe: defaultdict[str, dict[int, tuple[int, ...]]] = defaultdict(dict)
        moe_layers: set[int] = set()
        for name, shape in self._shapes.items():
            match = inside.fullmatch(name) if self._prefix else None
            if match is None:
                continue
            if match["rest"].startswith(f"{self._block}experts."):
                moe_layers.add(int(match["layer"]))
            else:
                in_moe[match["rest"]][int(match["layer"])] = shape
        routers, shared = [], []
        for rest, shapes in sorted(in_moe.items()):
            present = {layer: shape for layer, shape in shapes.items() if layer in moe_layers}
            if not present:
                continue
            axes = {
                axis for s in present.values() for axis, n in enumerate(s) if n == self._experts
            }
            if not axes or _SHARED.search(rest):
                shared.append(rest)
            elif axes == {0} and present.keys() == moe_layers and len(min(present.values())) <= 2:
                routers.append(rest)
            else:
                self._doubt(f"{rest} has {self._experts} in dimension {sorted(axes)}")
        matrices = [
            rest for rest in routers if {len(shape) for shape in in_moe[rest].values()} == {2}
        ]
        if len(matrices) != 1:
            self._doubt(f"{len(matrices)} tensors could be the router: {', '.join(matrices)}")
        return routers, shared


def _objects(node: object, path: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if isinstance(node, Mapping):
        yield path, node
        for key, value in node.items():
            yield from _objects(value, f"{path}.{key}".lstrip("."))


def _list(items: list[Any]) -> str:
    quoted = ", ".join(
        '"' + str(item).replace("\\", "\\\\").replace('"', '\\"') + '"' for item in items
    )
    return f"[{quoted}]"
