"""Many experts in one product: their parameters as stacks, and the outputs for sorted tokens.

transformers marks the classes of experts that consist of an up and a down projection with what is
between them, and says how they differ: a gate, biases, transposed weights, a norm behind them.
Those can be computed together. All other classes compute one expert at a time.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import _grouped_linear

from shardsurgeon.layerwise.decoding import PackedWeight

if TYPE_CHECKING:
    from collections.abc import Mapping

    from shardsurgeon_kernels import PackedInt4Stack

_PARAMETERS = {
    f"{name}{end}" for name in ("gate_up_proj", "up_proj", "down_proj") for end in ("", "_bias")
}
_MARKS = ("has_gate", "has_bias", "is_transposed", "has_post_expert_norm", "_apply_gate")


def may_be_grouped(module: nn.Module) -> bool:
    """Whether transformers marks a module of experts as one that grouped products compute."""
    marked = all(hasattr(module, mark) for mark in _MARKS)
    return marked and module._parameters.keys() <= _PARAMETERS


class Stack:
    """The parameters of some experts, each one tensor [experts, ...]. Threads may fill it."""

    def __init__(self, num_experts: int) -> None:
        self._num_experts = num_experts
        self._filling = threading.Lock()
        self._tensors: dict[str, Tensor] = {}
        self._packed: dict[str, PackedInt4Stack] = {}

    def put(self, place: int, parameters: Mapping[str, Tensor | PackedWeight]) -> None:
        """Copy one expert's parameters, each [1, ...], to its place."""
        for name, value in parameters.items():
            leaf = name.rpartition(".")[2]
            if isinstance(value, PackedWeight):
                self._put_packed(leaf, place, value)
            else:
                self._stacked(leaf, value)[place] = value[0]

    def __getitem__(self, leaf: str) -> Tensor | PackedInt4Stack:
        """A parameter of all experts, by the last part of its name."""
        packed = self._packed.get(leaf)
        return self._tensors[leaf] if packed is None else packed

    def _stacked(self, leaf: str, value: Tensor) -> Tensor:
        with self._filling:
            if leaf not in self._tensors:
                self._tensors[leaf] = value.new_empty(self._num_experts, *value.shape[1:])
            return self._tensors[leaf]

    def _put_packed(self, leaf: str, place: int, value: PackedWeight) -> None:
        from shardsurgeon_kernels import PackedInt4Stack

        whole = value.joined()
        tensors = {"packed": whole.packed, "scale": whole.scale, "zero_point": whole.zeros}
        for part, tensor in tensors.items():
            if tensor is not None:
                self._stacked(f"{leaf}.{part}", tensor[None])[place] = tensor
        with self._filling:
            if leaf not in self._packed:
                self._packed[leaf] = PackedInt4Stack(
                    packed=self._tensors[f"{leaf}.packed"],
                    scale=self._tensors[f"{leaf}.scale"],
                    zero_point=self._tensors.get(f"{leaf}.zero_point"),
                    shape=(self._num_experts, *whole.shape),
                    group_size=whole.group_size,
                )


def grouped_outputs(module: Any, stack: Stack, inputs: Tensor, ends: Tensor) -> Tensor:
    """The outputs [n, H] of experts for inputs [n, H] that are sorted by expert.

    module: of a class that `may_be_grouped`; ends: int32 [experts], where each one's rows end.
    Rows behind the last end are undefined. Nothing here waits for the device.
    """
    experts = None
    if module.has_bias:
        rows = torch.arange(len(inputs), device=inputs.device)
        experts = torch.searchsorted(ends, rows, right=True).clamp(max=len(ends) - 1)
    first = "gate_up_proj" if module.has_gate else "up_proj"
    made = _linear(module, stack, first, inputs, ends, experts)
    made = module._apply_gate(made) if module.has_gate else module.act_fn(made)
    made = _linear(module, stack, "down_proj", made, ends, experts)
    return module.post_expert_norm(made) if module.has_post_expert_norm else made


def _linear(
    module: Any, stack: Stack, leaf: str, inputs: Tensor, ends: Tensor, experts: Tensor | None
) -> Tensor:
    """One projection. experts: of each row, where there are biases."""
    weight = stack[leaf]
    bias = None
    if experts is not None:
        all_biases = stack[f"{leaf}_bias"]
        assert isinstance(all_biases, Tensor)
        bias = all_biases.index_select(0, experts)
    if isinstance(weight, Tensor):
        made: Tensor = _grouped_linear(inputs, weight, ends, bias, module.is_transposed)
        return made
    from shardsurgeon_kernels import grouped_linear

    made = grouped_linear(inputs, weight, ends)
    return made if bias is None else made.add_(bias)
