"""What is compared: our product, the library's decompression and matmul, and a plain matmul.

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

from shardsurgeon_kernels import PackedInt4, linear, pack

COLD_NBYTES = 256 << 20
GROUP_SIZE = 32


@dataclass(frozen=True)
class Expert:
    """Copies of one projection: packed, and as the bfloat16 matrix that it stands for."""

    packed: list[PackedInt4]
    plain: list[Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of one packed copy, scales included."""
        return int(self.packed[0].packed.nbytes + self.packed[0].scale.nbytes)


def make_expert(out_features: int, in_features: int, device: torch.device) -> Expert:
    """A symmetric INT4 projection with groups of 32 and bfloat16 scales, as in Kimi K2.5."""
    torch.manual_seed(42)
    values = torch.randint(-8, 8, (out_features, in_features), dtype=torch.int8)
    words = pack(values).to(device)
    scale = torch.rand(out_features, in_features // GROUP_SIZE).mul(0.01).bfloat16().to(device)
    shape = (out_features, in_features)
    copies = 1 + COLD_NBYTES // (words.nbytes + scale.nbytes)
    packed = [
        PackedInt4(words.clone(), scale.clone(), None, shape, GROUP_SIZE) for _ in range(copies)
    ]
    matrix = decompress(packed[0])
    plain = [matrix.clone() for _ in range(1 + COLD_NBYTES // matrix.nbytes)]
    return Expert(packed, plain)


def methods(expert: Expert, x: Tensor) -> dict[str, Method]:
    """The three ways to y, by name. Every call takes the next copy of the weight."""
    packed, plain = expert.packed, expert.plain
    return {
        "ours": lambda call: linear(x, packed[call % len(packed)]),
        "library": lambda call: matmul(x, decompress(packed[call % len(packed)])),
        "plain": lambda call: matmul(x, plain[call % len(plain)]),
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
