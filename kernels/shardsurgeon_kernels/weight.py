"""A pack-quantized INT4 weight: its tensors, checked once, and how values are packed into words.

All other modules take a `PackedInt4` and do not check it again.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

LOWEST, HIGHEST = -8, 7
NIBBLES = 8  # of one int32 word
SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True, eq=False)
class PackedInt4:
    """The weight of one linear layer, as a compressed-tensors checkpoint stores it.

    Element `[o, i]` stands for `(q[o, i] - zero_point[o, g]) * scale[o, g]`, where `q` is in
    -8..7 and `g = i // group_size`.

    packed: int32 [out, ceil(in / 8)]; value `8 w + j` of a row, plus 8, is nibble `j` of its word
        `w`, counted from the low end. Nibbles past `in` are ignored.
    scale: float16, bfloat16 or float32 [out, groups].
    zero_point: None for symmetric quantization; int32 [ceil(out / 8), groups], packed along the
        output dimension as in a checkpoint; or int8 [out, groups] with values in -8..7.
    shape: (out, in).
    group_size: input features that share a scale; None or -1: the whole row (channel-wise).

    Raises ValueError where the tensors do not fit each other.
    """

    packed: Tensor
    scale: Tensor
    zero_point: Tensor | None
    shape: tuple[int, int]
    group_size: int | None

    def __post_init__(self) -> None:
        """Refuse tensors that do not fit each other: kernels would read past their ends."""
        out_features, in_features = self.shape
        if self.group_size is not None and self.group_size != -1 and self.group_size < 1:
            raise ValueError(f"group_size is {self.group_size}; expected a positive number or None")
        expect_words(self.packed, out_features, in_features)
        if self.scale.dtype not in SCALE_DTYPES:
            raise ValueError(f"scale is {self.scale.dtype}; expected one of {SCALE_DTYPES}")
        _expect_shape("scale", self.scale, (out_features, self.groups))
        if self.zero_point is not None:
            _expect_zero_point(self.zero_point, out_features, self.groups)
        devices = {t.device for t in (self.packed, self.scale, self.zero_point) if t is not None}
        if len(devices) > 1:
            raise ValueError(f"the weight's tensors lie on {len(devices)} devices: {devices}")

    @property
    def columns_per_scale(self) -> int:
        """Input features of one group; the whole row where quantization is channel-wise."""
        if self.group_size is None or self.group_size == -1:
            return max(1, self.shape[1])
        return self.group_size

    @property
    def groups_begin_on_bytes(self) -> bool:
        """Whether no group begins in the middle of a byte, which byte-wise kernels need."""
        return self.columns_per_scale % 2 == 0 or self.groups < 2

    @property
    def groups(self) -> int:
        """Groups of one row. The last one is shorter where the row does not divide."""
        return -(-self.shape[1] // self.columns_per_scale)

    @cached_property
    def zeros(self) -> Tensor | None:
        """The zero points as int8 [out, groups], or None."""
        if self.zero_point is None or self.zero_point.dtype is torch.int8:
            return self.zero_point
        return unpack_zero_points(self.zero_point, self.shape[0])


def pack(values: Tensor) -> Tensor:
    """int8 [out, in] with values in -8..7 -> int32 [out, ceil(in / 8)].

    The nibbles past the end of a row are 0, as compressed-tensors leaves them. Raises ValueError
    for another dtype or shape, or a value out of range.
    """
    if values.dtype is not torch.int8 or values.ndim != 2:
        raise ValueError(f"values are {values.dtype} {list(values.shape)}; expected int8 [out, in]")
    if values.numel() and (values.min() < LOWEST or values.max() > HIGHEST):
        span = f"{int(values.min())}..{int(values.max())}"
        raise ValueError(f"values span {span}; INT4 holds {LOWEST}..{HIGHEST}")
    rows, columns = values.shape
    nibbles = values.to(torch.int32) - LOWEST
    nibbles = torch.nn.functional.pad(nibbles, (0, -columns % NIBBLES)).view(rows, -1, NIBBLES)
    words = torch.zeros(nibbles.shape[:2], dtype=torch.int32, device=values.device)
    for place in range(NIBBLES):
        words |= nibbles[:, :, place] << 4 * place
    return words


def spread_nibbles(words: Tensor) -> Tensor:
    """int32 [.., words] -> int8 [.., 8 * words] in -8..7, the low nibble of a word first."""
    shifts = torch.arange(0, 4 * NIBBLES, 4, dtype=torch.int32, device=words.device)
    nibbles = (words.unsqueeze(-1) >> shifts) & 15
    return (nibbles + LOWEST).to(torch.int8).flatten(-2)


def unpack_zero_points(words: Tensor, out_features: int) -> Tensor:
    """int32 [.., ceil(out / 8), groups] -> int8 [.., out, groups] in -8..7."""
    nibbles = spread_nibbles(words.transpose(-1, -2))
    return nibbles[..., :out_features].transpose(-1, -2).contiguous()


def expect_words(packed: Tensor, rows: int, in_features: int) -> None:
    """Raise ValueError unless `packed` is int32 [rows, ceil(in_features / 8)]."""
    if packed.dtype is not torch.int32:
        raise ValueError(f"packed is {packed.dtype}; expected torch.int32")
    _expect_shape("packed", packed, (rows, -(-in_features // NIBBLES)))


def _expect_zero_point(zero_point: Tensor, out_features: int, groups: int) -> None:
    if zero_point.dtype is torch.int8:
        _expect_shape("zero_point", zero_point, (out_features, groups))
    elif zero_point.dtype is torch.int32:
        _expect_shape("zero_point", zero_point, (-(-out_features // NIBBLES), groups))
    else:
        raise ValueError(f"zero_point is {zero_point.dtype}; expected int32 (packed) or int8")


def _expect_shape(name: str, tensor: Tensor, shape: tuple[int, int]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {list(tensor.shape)}; expected {list(shape)}")
