"""A layer's parameters, and one expert's at a time, made from the checkpoint's tensors.

All weights except those of experts go through transformers' own loader. An expert's weights go
through the same conversion rules, as if it were the only expert. The rules are applied to one
name at a time, so that one layer can be filled without the rest of the model.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    SkipParameters,
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils.loading_report import LoadStateDictInfo

from shardsurgeon.checkpoint.anatomy import Anatomy
from shardsurgeon.checkpoint.checkpoint import Checkpoint
from shardsurgeon.checkpoint.quantization import read_weights
from shardsurgeon.checkpoint.quantization_schemes import Shape
from shardsurgeon.checkpoint.roles import ExpertTensor, Sliced, Surplus
from shardsurgeon.checkpoint.transformers_model import MetaModel, name_in_transformers, silence_hub
from shardsurgeon.errors import FamilyError
from shardsurgeon.families.schema import TransformersView
from shardsurgeon.layerwise.decoding import Decoder, PackedInteger, PackedWeight
from shardsurgeon.layerwise.memory import OUTSIDE
from shardsurgeon.storage.formats.tensor_table import TensorRecord

_REMEDY = "this model cannot be run here"


@dataclass(frozen=True, slots=True)
class ExpertPart:
    """One weight of every expert of a layer.

    before, after: its name before and after the expert's id; shape: the weight's; stacked: one
    tensor, named `before`, holds it for all experts along its first axis.
    """

    before: str
    after: str
    shape: Shape
    stacked: bool

    def name(self, expert: int) -> str:
        """The weight's name for an expert."""
        return self.before if self.stacked else f"{self.before}{expert}{self.after}"


@dataclass
class LayerWeights:
    """The weights of one layer.

    dense: name → shape of the weights that are not of experts; parts: the weights of an expert.
    """

    dense: dict[str, Shape] = field(default_factory=dict)
    parts: list[ExpertPart] = field(default_factory=list)


def sort_weights(checkpoint: Checkpoint, anatomy: Anatomy) -> dict[int, list[TensorRecord]]:
    """Layer → its tensors; those of no layer under OUTSIDE."""
    layers: dict[int, list[TensorRecord]] = defaultdict(list)
    for shard in checkpoint.shards:
        for record in shard.header.tensors:
            place = anatomy.reader.place(record.name)
            layers[place[0] if place else OUTSIDE].append(record)
    return layers


def layer_weights(
    records: list[TensorRecord], anatomy: Anatomy, config: Mapping[str, Any]
) -> LayerWeights:
    """The weights that a layer's tensors store. Raises FamilyError for an unknown form."""
    weights = read_weights(records, config)
    for name, problem in weights.problems.items():
        raise FamilyError(name, problem, "run the checkpoint it was quantized from")
    layer = LayerWeights()
    for name, shape in weights.shapes.items():
        role = anatomy.reader.role(TensorRecord(name, "", shape, 0, 0))
        if isinstance(role, ExpertTensor):
            if role.expert == 0:
                part = ExpertPart(name[: role.begin], name[role.end :], shape, stacked=False)
                layer.parts.append(part)
        elif isinstance(role, Sliced) and not role.is_router:
            layer.parts.append(ExpertPart(name, "", shape, stacked=True))
        elif not isinstance(role, Surplus):
            layer.dense[name] = shape
    return layer


@dataclass(frozen=True, slots=True)
class Target:
    """What a weight becomes: a parameter, or one of the parts that a converter makes it of.

    parameter: its full name; converter, part: None where the weight is the whole parameter.
    """

    parameter: str
    converter: WeightConverter | None
    part: str | None


class ParameterNames:
    """Maps names of a checkpoint's weights to those of a model's parameters.

    rules: transformers' conversion rules, as its loader takes them.
    """

    def __init__(
        self, meta_model: MetaModel, view: TransformersView, alias: tuple[str, str] = ("", "")
    ) -> None:
        """alias: a prefix of names, and the prefix that replaces it."""
        self._meta_model = meta_model
        self._view = view
        self._alias = alias
        self._prefix: str = meta_model.model.base_model_prefix
        self._expected: Mapping[str, Any] = meta_model.expected
        self.rules = meta_model.rules()
        self._renamings = [rule for rule in self.rules if isinstance(rule, WeightRenaming)]
        self._converters = [rule for rule in self.rules if isinstance(rule, WeightConverter)]
        self._by_part = {
            part: converter for converter in self._converters for part in converter.source_patterns
        }

    def for_loader(self, name: str) -> str:
        """The name that transformers' rules are written for."""
        own, other = self._alias
        if own and name.startswith(own):
            name = other + name.removeprefix(own)
        return name_in_transformers(name, self._view)

    def renamed(self, own: str, other: str) -> ParameterNames:
        """A mapping in which the prefix `own` stands for the prefix `other`."""
        return ParameterNames(self._meta_model, self._view, (own, other))

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


class _OnDemand:
    """A weight that is read when transformers' loader, in one of its threads, slices it."""

    def __init__(self, decoder: Decoder, name: str, shape: Shape) -> None:
        self._decoder, self._name, self._shape = decoder, name, shape

    def __getitem__(self, key: object) -> Tensor:
        return self._decoder.weight(self._name, self._shape)


class Loader:
    """Fills parameters of one model on the meta device.

    kept: parameters that are float32 whatever the dtype of the others.
    """

    def __init__(
        self,
        model: Any,
        names: ParameterNames,
        decoder: Decoder,
        dtype: torch.dtype,
        device: str,
    ) -> None:
        self._model = model
        self._names = names
        self._decoder = decoder
        self._dtype = dtype
        self._device = device
        self.kept: frozenset[str] = frozenset()

    def named(self, names: ParameterNames) -> Loader:
        """A loader of the same model that maps names in another way."""
        other = Loader(self._model, names, self._decoder, self._dtype, self._device)
        other.kept = self.kept
        return other

    def fill(self, weights: Mapping[str, Shape]) -> set[str]:
        """Read weights into their parameters, and return the names of these parameters.

        weights: name → shape. Raises FamilyError where a weight does not fit.
        """
        wanted = {
            self._names.for_loader(name): _OnDemand(self._decoder, name, shape)
            for name, shape in weights.items()
        }
        before = set(self._model.state_dict())
        settings = LoadStateDictConfig(
            device_map={"": self._device},
            dtype=self._dtype,
            dtype_plan=self._model._get_dtype_plan(self._dtype) | self._kept_plan(),
            weight_mapping=self._names.rules,
        )
        with silence_hub():
            info, _ = convert_and_load_state_dict_in_model(self._model, wanted, settings)
        filled: set[str] = before - info.missing_keys
        self._model._adjust_missing_and_unexpected_keys(info)
        _require_fit(info)
        return filled

    def recipe(self, parts: Iterable[ExpertPart], decoder: Decoder | None = None) -> ExpertRecipe:
        """How an expert's parameters are made of its parts.

        decoder: reads them; None for the one that reads all weights.
        """
        decoder = decoder or self._decoder
        return ExpertRecipe(self._model, self._names, decoder, self._dtype, parts)

    def _kept_plan(self) -> dict[str, torch.dtype]:
        """`kept` as transformers takes it: patterns of names."""
        return {f"^{re.escape(name)}$": torch.float32 for name in sorted(self.kept)}


class ExpertRecipe:
    """Makes the parameters of one expert, for the model's class with a single expert."""

    def __init__(
        self,
        model: Any,
        names: ParameterNames,
        decoder: Decoder,
        dtype: torch.dtype,
        parts: Iterable[ExpertPart],
    ) -> None:
        self._model = model
        self._decoder = decoder
        self._dtype = dtype
        self._parameters: dict[str, list[tuple[ExpertPart, Target]]] = defaultdict(list)
        for part in sorted(parts, key=lambda part: part.name(0)):
            target = names.target(part.name(0))
            if target is None:
                raise FamilyError(
                    part.name(0), f"{type(model).__name__} has no place for it", _REMEDY
                )
            self._parameters[target.parameter].append((part, target))
        for entries in self._parameters.values():
            entries.sort(key=_place_in_converter)

    @property
    def parameters(self) -> set[str]:
        """Full names of the parameters it makes."""
        return set(self._parameters)

    def make(self, expert: int) -> dict[str, Tensor | PackedWeight]:
        """Parameter → its value for one expert, [1, ...]; left packed where kernels allow it."""
        made: dict[str, Tensor | PackedWeight] = {}
        for parameter, entries in self._parameters.items():
            made |= self._convert(parameter, entries, expert)
        return made

    def _convert(
        self, parameter: str, entries: list[tuple[ExpertPart, Target]], expert: int
    ) -> Mapping[str, Tensor | PackedWeight]:
        converter = entries[0][1].converter
        stored = [self._read(part, expert) for part, _ in entries]
        packed = [value for value in stored if isinstance(value, PackedInteger)]
        if len(packed) == len(stored) and _may_stay_packed(packed, converter):
            return {parameter: PackedWeight(packed, self._dtype)}
        values = [self._unpacked(value) for value in stored]
        if converter is None:
            return {parameter: values[0]}
        # It collects what it converts: each thread needs its own, as in transformers' loader.
        converter = deepcopy(converter)
        info = LoadStateDictInfo(set(), set(), set(), [], {}, set())
        for (part, target), value in zip(entries, values, strict=True):
            converter.add_tensor(parameter, part.name(0), target.part, value)
        try:
            made = converter.convert(
                parameter, model=self._model, config=self._model.config, loading_info=info
            )
        except SkipParameters:
            _require_fit(info)
            raise
        return {
            name: value[0] if isinstance(value, list) else value for name, value in made.items()
        }

    def _read(self, part: ExpertPart, expert: int) -> Tensor | PackedInteger:
        row = expert if part.stacked else None
        return self._decoder.stored(part.name(expert), part.shape, row)

    def _unpacked(self, stored: Tensor | PackedInteger) -> Tensor:
        if isinstance(stored, PackedInteger):
            return stored.dequantize(self._dtype)
        return stored.to(self._dtype)


def _place_in_converter(entry: tuple[ExpertPart, Target]) -> int:
    target = entry[1]
    return target.converter.source_patterns.index(target.part) if target.converter else 0


def _may_stay_packed(parts: list[PackedInteger], converter: WeightConverter | None) -> bool:
    """Whether a parameter consists of its parts' rows, in a packing that the kernels know."""
    if not all(part.has_kernel for part in parts):
        return False
    for operation in converter.operations if converter else ():
        merges = isinstance(operation, MergeModulelist) and operation.dim == 0
        # Axis 0 is that of experts: along axis 1 the parts' rows follow one another.
        below = isinstance(operation, Concatenate) and operation.dim == 1
        if not (merges or (below and operation.num_shards_attribute is None)):
            return False
    return True


def _require_fit(info: LoadStateDictInfo) -> None:
    """Raise FamilyError for the first weight that transformers' loader could not place."""
    for name, given, expected in info.mismatched_keys:
        problem = f"shape {list(given)}, and the config makes it {list(expected)}"
        raise FamilyError(name, problem, "the config and the tensors are not of one model")
    for name, text in info.conversion_errors.items():
        reason = (text.rpartition("\nError")[0] or text).strip().splitlines()[-1]
        problem = f"cannot be put together from the checkpoint's tensors: {reason}"
        raise FamilyError(name, problem, _REMEDY)
    for name in sorted(info.unexpected_keys):
        raise FamilyError(name, "transformers' model has no place for it", _REMEDY)
