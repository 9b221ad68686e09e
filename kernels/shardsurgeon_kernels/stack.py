"""The weights of many experts in one set of tensors, and products of rows sorted by expert.

`PackedInt4Stack` is checked once, as `PackedInt4` is; implementations do not check it again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from shardsurgeon_kernels.weight import PackedInt4, unpack_zero_points


@dataclass(frozen=True, eq=False)
class PackedInt4Stack:
    """The weights of one linear layer of E experts; each element as `PackedInt4` says.

    packed: int32 [E, out, ceil(in / 8)].
    scale: float16, bfloat16 or float32 [E, out, groups].
    zero_point: None; int32 [E, ceil(out / 8), groups]; or int8 [E, out, groups].
    shape: (E, out, in), E at least 1.
    group_size: input features that share a scale; None or -1: the whole row (channel-wise).

    Raises ValueError where the tensors do not fit each other.
    """

    packed: Tensor
    scale: Tensor
    zero_point: Tensor | None
    shape: tuple[int, int, int]
    group_size: int | None

    def __post_init__(self) -> None:
        """Refuse tensors that do not fit each other: kernels would read past their ends."""
        experts = self.shape[0]
        if experts < 1:
            raise ValueError(f"shape is {list(self.shape)}; a stack has at least one weight")
        tensors = {"packed": self.packed, "scale": self.scale, "zero_point": self.zero_point}
        for name, tensor in tensors.items():
            if tensor is not None and (tensor.ndim != 3 or tensor.shape[0] != experts):
                expected = f"[{experts}, .., ..]"
                raise ValueError(f"{name} has shape {list(tensor.shape)}; expected {expected}")
        # All weights of a stack have the form of the first.
        zero_point = None if self.zero_point is None else self.zero_point[0]
        PackedInt4(self.packed[0], self.scale[0], zero_point, self.shape[1:], self.group_size)

    def __len__(self) -> int:
        """The number of experts."""
        return self.shape[0]

    def __getitem__(self, expert: int) -> PackedInt4:
        """One expert's weight, sharing the stack's memory. Raises IndexError past the last."""
        zeros = None if self.zeros is None else self.zeros[expert]
        one = self.packed[expert], self.scale[expert], zeros
        return PackedInt4(*one, self.shape[1:], self.group_size)

    @cached_property
    def zeros(self) -> Tensor | None:
        """The zero points as int8 [E, out, groups], or None."""
        if self.zero_point is None or self.zero_point.dtype is torch.int8:
            return self.zero_point
        return unpack_zero_points(self.zero_point, self.shape[1])

    def flat(self, begin: int, end: int) -> PackedInt4:
        """Experts begin:end as one weight [(end - begin) * out, in], one below the other.

        Raises ValueError unless 0 <= begin <= end <= E.
        """
        experts, out_features, in_features = self.shape
        if not 0 <= begin <= end <= experts:
            raise ValueError(f"experts {begin}:{end} are asked for; the stack has 0:{experts}")
        zeros = None if self.zeros is None else self.zeros[begin:end].flatten(0, 1)
        rows = self.packed[begin:end].flatten(0, 1), self.scale[begin:end].flatten(0, 1), zeros
        return PackedInt4(*rows, ((end - begin) * out_features, in_features), self.group_size)


def expert_by_expert(
    linear: Callable[[Tensor, PackedInt4], Tensor],
    x: Tensor,
    weights: PackedInt4Stack,
    ends: Tensor,
) -> Tensor:
    """`grouped_linear` with one product for each expert that has rows. Reads `ends` on the host.

    Raises ValueError where `ends` decreases or passes the end of x.
    """
    y = x.new_zeros(x.shape[0], weights.shape[1])
    begin = 0
    for expert, end in enumerate(ends.tolist()):
        if not begin <= end <= x.shape[0]:
            raise ValueError(f"ends[{expert}] is {end}; expected {begin} to {x.shape[0]}")
        if end > begin:
            y[begin:end] = linear(x[begin:end], weights[expert])
        begin = end
    return y
