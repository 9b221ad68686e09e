"""An expert's weight that stays packed while the model's own code multiplies with it.

Between `loading` and the classes of transformers: those call `linear(inputs, weight[expert])`,
which torch lets this object answer, by the kernels of this project. Whatever else is done with it
is done with the unpacked weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from shardsurgeon.layerwise.packing import PackedInteger


class PackedWeight:
    """Packed matrices `[out, in]`, one below the other, in the place of a parameter [1, out, in].

    Stands for `linear`'s weight [out, in] as well, whatever it is indexed with.
    """

    def __init__(self, parts: Sequence[PackedInteger], dtype: torch.dtype) -> None:
        self._parts = [part.for_kernels() for part in parts]
        self._whole = list(parts)
        self.dtype = dtype

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the parameter: one expert."""
        return 1, sum(part.shape[0] for part in self._parts), self._parts[0].shape[1]

    def __getitem__(self, expert: object) -> PackedWeight:
        return self

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: Sequence[type],
        arguments: tuple[Any, ...] = (),
        named: dict[str, Any] | None = None,
    ) -> Any:
        named = named or {}
        weight = arguments[1] if len(arguments) > 1 else None
        if function is functional.linear and isinstance(weight, cls) and not named:
            return weight.times(*arguments[:1], *arguments[2:])
        unpacked = [item.unpacked() if isinstance(item, cls) else item for item in arguments]
        return function(*unpacked, **named)

    def times(self, inputs: Tensor, bias: Tensor | None = None) -> Tensor:
        """inputs [N, in] times the weight's transpose: [N, out]."""
        from shardsurgeon_kernels import linear

        made = torch.cat([linear(inputs, part) for part in self._parts], dim=-1)
        return made if bias is None else made + bias

    def unpacked(self) -> Tensor:
        """The weight, [out, in]."""
        return torch.cat([part.dequantize(self.dtype).flatten(0, -2) for part in self._whole])
