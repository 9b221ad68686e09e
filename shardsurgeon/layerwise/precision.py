"""What stays in float32 where a run computes in fewer bits.

Authors store in float32 what must not be rounded, such as the biases that choose experts, and
their own code computes with it in float32. transformers rounds it to the dtype of the run unless
the model's class says otherwise, and not every class does. Here a tensor that is stored in F32
stays float32 wherever the model's own code runs with it and returns what it returns otherwise. A
trial finds that out: some tokens through each kind of layer, before any layer's weight is read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from transformers.core_model_loading import build_glob_alternation

from shardsurgeon.checkpoint.anatomy import Anatomy
from shardsurgeon.checkpoint.roles import ExpertTensor, Sliced
from shardsurgeon.layerwise.loading import ParameterNames
from shardsurgeon.layerwise.text_model import TextModel
from shardsurgeon.storage.formats.tensor_table import TensorRecord

NARROWER = (torch.bfloat16, torch.float16)
TRIAL_TOKENS = 130
"""Tokens of a trial: attention that works in chunks, mostly of 64, goes from one to the next."""

Run = Callable[[range], torch.dtype]
"""Layers that are filled → dtype of the states behind them."""
_Place = tuple[int, str]
"""A parameter of a group of layers: which of its layers, and the name behind the prefix."""


def stored_wider(
    records: Iterable[TensorRecord],
    anatomy: Anatomy,
    names: ParameterNames,
    buffers: Collection[str],
) -> frozenset[str]:
    """The parameters of a layer that its authors keep in float32.

    records: the layer's tensors; buffers: those of the model. Of what is stored in F32: the
    router's, and where F32 is the exception, less than half of the numbers outside of experts,
    the other parameters too. A layer that is stored in F32 throughout is rounded to the dtype that
    is asked for, and so are buffers, which a class computes for itself and multiplies with states.
    """
    roles = [(record, anatomy.reader.role(record)) for record in records]
    dense = [(record, role) for record, role in roles if not isinstance(role, ExpertTensor)]
    wide = [(record, role) for record, role in dense if record.dtype == "F32"]
    numbers, wide_numbers = (
        sum(math.prod(record.shape) for record, _ in tensors) for tensors in (dense, wide)
    )
    is_exception = 2 * wide_numbers < numbers
    found = set()
    for record, role in wide:
        is_router = isinstance(role, Sliced) and role.is_router
        target = names.target(record.name) if is_router or is_exception else None
        if target is not None and (is_router or target.parameter not in buffers):
            found.add(target.parameter)
    return frozenset(found)


@dataclass(frozen=True)
class Trials:
    """Finds out which parameters may be float32.

    text: with layers that are empty; run: runs some tokens through filled layers; dtype: of the
    run; device: where it computes.
    """

    text: TextModel
    run: Run
    dtype: torch.dtype
    device: str

    def kept(self, wide: Mapping[int, frozenset[str]]) -> frozenset[str]:
        """Those that stay float32, transformers' own left out; wide: layer → what could."""
        decided: dict[object, frozenset[_Place]] = {}
        found: set[str] = set()
        for group in self.text.groups():
            own = [self.text.parameters_of(layer) for layer in group]
            candidates = [
                self._place(group, at, name)
                for at, layer in enumerate(group)
                for name in sorted(wide.get(layer, frozenset()) & own[at])
                if not self._is_wide_anyway(name)
            ]
            if not candidates:
                continue
            parameters = [
                self._place(group, at, name) for at, names in enumerate(own) for name in names
            ]
            kind = (frozenset(parameters), tuple(candidates))
            if kind not in decided:
                decided[kind] = self._tried(group, candidates)
            found |= {self._name(group, place) for place in decided[kind]}
        return frozenset(found)

    def _place(self, group: range, at: int, name: str) -> _Place:
        return at, name.removeprefix(self.text.layer_prefix(group[at]))

    def _name(self, group: range, place: _Place) -> str:
        return self.text.layer_prefix(group[place[0]]) + place[1]

    def _is_wide_anyway(self, name: str) -> bool:
        """Whether transformers itself has a parameter in another dtype than that of the run."""
        planned = self._plan is not None and self._plan.search(name) is not None
        return planned or self._dtypes[name] != self.dtype

    @cached_property
    def _plan(self) -> re.Pattern[str] | None:
        plan = list(self.text.model._get_dtype_plan(self.dtype))
        return build_glob_alternation(plan)[0] if plan else None

    @cached_property
    def _dtypes(self) -> dict[str, torch.dtype]:
        return {name: value.dtype for name, value in self.text.model.state_dict().items()}

    def _tried(self, group: range, candidates: Sequence[_Place]) -> frozenset[_Place]:
        """Those of one group that may be float32: all at once, or else one after another."""
        plain = self._result(group, ())
        if plain is None:
            return frozenset()
        if self._result(group, candidates) == plain:
            return frozenset(candidates)
        kept: list[_Place] = []
        for candidate in candidates:
            if self._result(group, [*kept, candidate]) == plain:
                kept.append(candidate)
        return frozenset(kept)

    def _result(self, group: range, wide: Sequence[_Place]) -> torch.dtype | None:
        """The dtype that a group returns with these parameters in float32, None where it fails."""
        names = {self._name(group, place) for place in wide}
        with self.text.emptied(group):
            for layer in group:
                self._fill(layer, names)
            # The code of a model may raise anything where two dtypes do not go together.
            with suppress(Exception):
                return self.run(group)
        return None

    def _fill(self, layer: int, wide: set[str]) -> None:
        """Give a layer weights of 0; its integers are 1, as some of them are divisors."""
        for path, module in self.text.layers[layer].named_modules():
            prefix = f"{self.text.layer_prefix(layer)}{path}."
            for leaf, value in module.named_parameters(recurse=False):
                filler = self._filler(value, f"{prefix}{leaf}", wide)
                module._parameters[leaf] = nn.Parameter(filler, requires_grad=False)
            for leaf, value in module.named_buffers(recurse=False):
                module._buffers[leaf] = self._filler(value, f"{prefix}{leaf}", wide)

    def _filler(self, value: Tensor, name: str, wide: set[str]) -> Tensor:
        if not value.is_floating_point():
            return torch.ones_like(value, device=self.device)
        in_float32 = name in wide or (name in self._dtypes and self._is_wide_anyway(name))
        dtype = torch.float32 if in_float32 else value.dtype
        return torch.zeros_like(value, dtype=dtype, device=self.device)
