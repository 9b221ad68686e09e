"""Guess the declaration of a family that nobody has declared.

It reads names, shapes and config and writes the TOML that a person would write. Where two readings
are possible it does not choose: the skeleton then says what is known, and the user fills in the
rest. Experts may be numbered, or stacked in tensors `[E, ...]` beside a router `[E, hidden]`.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from shardsurgeon.checkpoint.checkpoint import Checkpoint
from shardsurgeon.checkpoint.config import QUANTIZATION_KEYS
from shardsurgeon.checkpoint.layouts import is_companion
from shardsurgeon.errors import FamilyError, UndeclaredFamilyError
from shardsurgeon.families.schema import (
    Family,
    architectures_of,
    numbers_of_experts,
    parse_family,
)
from shardsurgeon.storage.formats.strict_json import brief
from shardsurgeon.storage.limits import MAX_NAME

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
_LAYERS = ("num_hidden_layers", "num_layers", "n_layers", "layers_block_type")
_GROUPS = ("n_group", "num_expert_group", "n_expert_group")
_TOPK_GROUPS = ("topk_group", "n_limited_groups")
_MTP = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_modules")
# Names that families give to experts which all tokens pass; their width may equal the count.
_SHARED = re.compile(r"(?:^|\.)shared?_(?:experts?|mlp)(?:_gate)?\.")
_EXPERT = re.compile(r"(?P<prefix>.*?\D)(?P<layer>\d{1,6})\.(?P<block>.+\.)?experts\.\d{1,6}\..+")
_IN_LAYER = re.compile(r"(?P<prefix>.*?\D)(?P<layer>\d{1,6})\.(?P<rest>.+)")


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
        experts = ", ".join(rule.name for rule in (*names.experts, *names.stacked))
        return (
            "no family is declared for this model; it was read without one (--family auto)",
            f"assumed: experts {names.layers[0]}.{experts}, router {routers}, "
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
        where = checkpoint.config_place
        raise UndeclaredFamilyError(
            where,
            f"cannot be read without a declaration: {'; '.join(reading.ambiguities[:2])}",
            "complete the skeleton printed and pass it with --family FILE",
            skeleton=toml,
        )
    return Guess(parse_family(toml, "auto"), toml)


class _FamilyGuess:
    """What one checkpoint says of its family. ambiguities: why that is not enough."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.ambiguities: list[str] = []
        self._config = checkpoint.settings
        self._where = checkpoint.config_place
        self._sections = self._count_sections()
        self._counts = [key for key in _COUNTS if any(key in s for s in self._sections.values())]
        self._section = next(iter(self._sections.values()), self._config)
        self._experts = next((self._section[k] for k in self._counts if k in self._section), 0)
        self._shapes = {record.name: record.shape for record in checkpoint.records}
        longest = max(self._shapes, key=len, default="")
        if len(longest) > MAX_NAME:
            problem = (
                f"tensor {brief(longest)} has a name of {len(longest):,} characters, a family "
            )
            problem += f"is guessed by names of at most {MAX_NAME}"
            raise FamilyError(self._where, problem, "declare it with --family FILE")
        self._prefix, self._block, self._stacked = self._place()
        self._routers, self._shared = self._others()

    def toml(self) -> str:
        """The declaration, as far as it is known."""
        architectures = architectures_of(self._config, self._where)
        lines = [
            'facts = "read off one checkpoint by shardsurgeon; check it"',
            f"model_types = {_list([self._config.get('model_type')])}",
            f"architectures = {_list(architectures)}",
            # Some routers score a group by its best expert, some by the best two: two is safe.
            *(["group_score_top = 2"] if self._is_grouped() else []),
            "",
            "[config]",
            f"at = {_list(list(self._sections) or [''])}",
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
        experts = f"stacked = {_list(self._stacked)}"
        if not self._stacked:
            experts = f"experts = {_list([f'{dot}experts.{{expert}}.{{part}}'])}"
        lines += [
            "",
            "[tensors]",
            f"layers = {_list([f'{self._prefix}{{layer}}'] if self._prefix else [])}",
            f"blocks = {_list([block or 'experts'])}",
            experts,
            f"routers = {_list(self._routers)}",
            f"shared = {_list(self._shared)}",
        ]
        return "\n".join(lines) + "\n"

    def _is_grouped(self) -> bool:
        return any(self._section.get(key) not in (None, 0, 1) for key in _GROUPS)

    def _doubt(self, problem: str) -> None:
        if problem not in self.ambiguities:
            self.ambiguities.append(problem)

    def _count_sections(self) -> dict[str, Mapping[str, Any]]:
        """Path → object of the config that counts experts, the one that says most first.

        Several that agree are one count, repeated: experts of two kinds lie in two places.
        """
        found = {
            path: node
            for path, node in _objects(self._config, "")
            if QUANTIZATION_KEYS.isdisjoint(path.split("."))
            and any(node.get(key) not in (None, 0, 1) for key in _COUNTS)
        }
        counts = {
            f"{path}.{key}".lstrip("."): node[key]
            for path, node in found.items()
            for key in _COUNTS
            if node.get(key) is not None
        }
        if not counts:
            others = ", ".join(f"{key} {n}" for key, n in numbers_of_experts(self._config))
            known = f"config.json has none of {', '.join(_COUNTS)}"
            self._doubt(f"{known}, and says {others}" if others else known)
        if len(set(map(str, counts.values()))) > 1:
            shown = " and ".join(f"{path} {number}" for path, number in counts.items())
            self._doubt(f"config.json counts experts more than once: {shown}")
        odd = next((path for path, number in counts.items() if type(number) is not int), None)
        if odd is not None:
            self._doubt(f"{odd} is not a single number")
            return {}

        def told(path: str) -> int:
            return sum(key in found[path] for key in (*_TOP_K, *_LAYERS))

        return {path: found[path] for path in sorted(found, key=told, reverse=True)}

    def _place(self) -> tuple[str, str, list[str]]:
        """The prefix before the layer's number, the block with the experts, and stacked tensors.

        The last, relative to the layer, are empty where experts have numbers.
        """
        places = {
            (match["prefix"], match["block"] or "")
            for match in map(_EXPERT.fullmatch, self._shapes)
            if match
        }
        if len(places) == 1:
            return *places.pop(), []
        if places:
            shown = ", ".join(sorted(f"{prefix}N.{block}experts" for prefix, block in places))
            self._doubt(f"experts by number lie in {len(places)} places {shown}")
            return "", "", []
        return self._stacked_place()

    def _stacked_place(self) -> tuple[str, str, list[str]]:
        """As `_place`, of experts stacked in tensors with three dimensions, the first theirs."""
        weights: defaultdict[str, set[str]] = defaultdict(set)
        matrices: defaultdict[str, set[str]] = defaultdict(set)
        for name, shape in self._shapes.items():
            match = _IN_LAYER.fullmatch(name)
            if match and shape[:1] == (self._experts,) and len(shape) > 1 and self._experts:
                kind = weights if len(shape) > 2 else matrices
                kind[match["prefix"]].add(match["rest"])
        if len(weights) != 1:
            shown = ", ".join(f"{prefix}N.{min(rests)}" for prefix, rests in weights.items())
            where = f"in {len(weights)} places {shown}" if weights else "nowhere"
            self._doubt(f"no expert has a number; stacked tensors of {self._experts} lie {where}")
            return "", "", []
        ((prefix, stacked),) = weights.items()
        # A bias of a stacked weight has two dimensions, as a router has.
        stems = tuple(rest.removesuffix(".weight") for rest in stacked)
        biases = {rest for rest in matrices[prefix] if rest.startswith(stems)}
        routers = matrices[prefix] - biases
        block = _common(stacked)
        while block and not any(rest.startswith(block) for rest in routers):
            block = _common([block.rstrip(".")])
        if not block:
            self._doubt(f"no router is beside {prefix}N.{min(stacked)}")
        return prefix, block, sorted(stacked | biases)

    def _others(self) -> tuple[list[str], list[str]]:
        """Names, relative to the layer, of tensors that choose experts, and of shared ones."""
        inside = re.compile(
            rf"{re.escape(self._prefix)}(?P<layer>\d{{1,6}})\.(?P<rest>{re.escape(self._block)}.+)"
        )
        by_number = re.compile(rf"{re.escape(self._block)}experts\.\d{{1,6}}\..+")
        in_moe: defaultdict[str, dict[int, tuple[int, ...]]] = defaultdict(dict)
        moe_layers: set[int] = set()
        for name, shape in self._shapes.items():
            match = inside.fullmatch(name) if self._prefix else None
            if match is None:
                continue
            if match["rest"] in self._stacked or by_number.fullmatch(match["rest"]):
                moe_layers.add(int(match["layer"]))
                axes = [axis for axis, size in enumerate(shape) if size == self._experts]
                if match["rest"] in self._stacked and axes != [0]:
                    self._doubt(f"{match['rest']} has {self._experts} in dimensions {axes}")
            else:
                in_moe[match["rest"]][int(match["layer"])] = shape
        routers, shared = [], []
        for rest, shapes in sorted(in_moe.items()):
            present = {layer: shape for layer, shape in shapes.items() if layer in moe_layers}
            if not present or (
                is_companion(rest) and f"{rest.rpartition('.')[0]}.weight" in in_moe
            ):
                continue
            axes_found = {
                axis for s in present.values() for axis, n in enumerate(s) if n == self._experts
            }
            if not axes_found or _SHARED.search(rest):
                shared.append(rest)
            elif (
                axes_found == {0}
                and present.keys() == moe_layers
                and len(min(present.values())) <= 2
            ):
                routers.append(rest)
            else:
                self._doubt(f"{rest} has {self._experts} in dimension {sorted(axes_found)}")
        matrices = [
            rest for rest in routers if {len(shape) for shape in in_moe[rest].values()} == {2}
        ]
        if len(matrices) != 1:
            shown = ", ".join(matrices) or "none has a row per expert in every layer"
            self._doubt(f"{len(matrices)} tensors could be the router: {shown}")
        return routers, shared


def _common(rests: Iterable[str]) -> str:
    """The modules that all names share, without the last part of a single one."""
    shared = ""
    for parts in zip(*(rest.split(".")[:-1] for rest in rests), strict=False):
        if len(set(parts)) > 1:
            break
        shared += f"{parts[0]}."
    return shared


def _objects(node: object, path: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if isinstance(node, Mapping):
        yield path, node
        for key, value in node.items():
            yield from _objects(value, f"{path}.{key}".lstrip("."))


def _list(items: Iterable[Any]) -> str:
    """Texts as TOML has them: as JSON, but for one character more that is escaped."""
    quoted = (json.dumps(str(item), ensure_ascii=False) for item in items)
    return f"[{', '.join(quoted)}]".replace("\x7f", "\\u007f")
