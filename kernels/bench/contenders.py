"""What is compared: our product, the library's decompression and matmul, and a plain matmul.

For one projection, and for the same projection of some experts with rows sorted by expert, where
library and plain take one expert after the other.

Each holds so many copies of its weight that no cache keeps one until its next turn: experts are
met cold, and so they are timed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from timing import Method
from torch import Tensor
from torch.nn.functional import linear as matmul

from shardsurgeon_kernels import PackedInt4, PackedInt4Stack, grouped_linear, linear, pack

COLD_NBYTES = 256 << 20
GROUP_SIZE = 32


@dataclass(frozen=True)
class Expert:
    """Copies of one projection: packed, and as the matrix that it stands for."""

    packed: list[PackedInt4]
    plain: list[Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of one packed copy, scales included."""
        return int(self.packed[0].packed.nbytes + self.packed[0].scale.nbytes)


@dataclass(frozen=True)
class Experts:
    """Copies of a stack of projections: packed, and as the matrices that they stand for."""

    packed: list[PackedInt4Stack]
    plain: list[list[Tensor]]


def make_expert(
    out_features: int, in_features: int, dtype: torch.dtype, device: torch.device
) -> Expert:
    """A symmetric INT4 projection with groups of 32 and scales of `dtype`, as in Kimi K2.5."""
    torch.manual_seed(42)
    values = torch.randint(-8, 8, (out_features, in_features), dtype=torch.int8)
    words = pack(values).to(device)
    scale = torch.rand(out_features, in_features // GROUP_SIZE).mul(0.01).to(device, dtype)
    shape = (out_features, in_features)
    copies = 1 + COLD_NBYTES // (words.nbytes + scale.nbytes)
    packed = [
        PackedInt4(words.clone(), scale.clone(), None, shape, GROUP_SIZE) for _ in range(copies)
    ]
    matrix = decompress(packed[0])
    plain = [matrix.clone() for _ in range(1 + COLD_NBYTES // matrix.nbytes)]
    return Expert(packed, plain)


def make_experts(count: int, expert: Expert) -> Experts:
    """Stacks of `count` experts from copies of one."""
    one = expert.packed[0]
    words, scale = (
        torch.stack([tensor] * count).contiguous() for tensor in (one.packed, one.scale)
    )
    copies = 1 + COLD_NBYTES // (words.nbytes + scale.nbytes)
    packed = [
        PackedInt4Stack(words.clone(), scale.clone(), None, (count, *one.shape), GROUP_SIZE)
        for _ in range(copies)
    ]
    plain = expert.plain
    stacks = [plain[first : first + count] for first in range(0, len(plain) - count + 1, count)]
    return Experts(packed, stacks)


def methods(expert: Expert, x: Tensor) -> dict[str, Method]:
    """The three ways to y, by name. Every call takes the next copy of the weight."""
    packed, plain = expert.packed, expert.plain
    return {
        "ours": lambda call: linear(x, packed[call % len(packed)]),
        "library": lambda call: matmul(x, decompress(packed[call % len(packed)])),
        "plain": lambda call: matmul(x, plain[call % len(plain)]),
    }


def grouped_methods(experts: Experts, x: Tensor, tokens: int) -> dict[str, Method]:
    """The same three for rows sorted by expert, `tokens` for each."""
    packed, plain, count = experts.packed, experts.plain, len(experts.packed[0])
    ends = torch.arange(tokens, tokens * count + 1, tokens, dtype=torch.int32, device=x.device)
    rows = x.split(tokens)

    def library(call: int) -> list[Tensor]:
        stack = packed[call % len(packed)]
        return [matmul(rows[expert], decompress(stack[expert])) for expert in range(count)]

    def unpacked(call: int) -> list[Tensor]:
        return [matmul(*pair) for pair in zip(rows, plain[call % len(plain)], strict=True)]

    return {
        "ours": lambda call: grouped_linear(x, packed[call % len(packed)], ends),
        "library": library,
        "plain": unpacked,
    }


def decompress(weight: PackedInt4) -> Tensor:
    """compressed-tensors' own decompression."""
    state = {
        "weight_packed": weight.packed,
        "weight_scale": weight.scale,
        "weight_shape": torch.tensor(weight.shape),
    }
    matrix: Tensor = PackedQuantizationCompressor.decompress(state, SCHEME)["weight"]
    return matrix


SCHEME = QuantizationScheme(
    targets=["Linear"],
    weights=QuantizationArgs(
        num_bits=4, type="int", symmetric=True, strategy="group", group_size=GROUP_SIZE
    ),
)
