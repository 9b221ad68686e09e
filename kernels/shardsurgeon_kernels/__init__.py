"""INT4 group-quantized arithmetic on compressed-tensors' pack-quantized layout.

Independent of shardsurgeon and of checkpoints: tensors in, tensors out. Each operation has a
readable reference and faster implementations of the same signature; `dispatch` chooses one by
device. Calibration needs this package, pruning does not.
"""

from shardsurgeon_kernels.dispatch import (
    dequantize,
    dequantize_stack,
    grouped_linear,
    implementation_name,
    linear,
    unpack,
)
from shardsurgeon_kernels.stack import PackedInt4Stack
from shardsurgeon_kernels.weight import PackedInt4, pack

__all__ = [
    "PackedInt4",
    "PackedInt4Stack",
    "dequantize",
    "dequantize_stack",
    "grouped_linear",
    "implementation_name",
    "linear",
    "pack",
    "unpack",
]
