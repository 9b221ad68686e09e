"""INT4 group-quantized arithmetic on compressed-tensors' pack-quantized layout.

Stands beside shardsurgeon and knows nothing of checkpoints: tensors in, tensors out. Four
functions, each a readable reference with faster twins of the same signature; `dispatch` chooses
by device. Pruning never needs this package, calibration does.
"""

from shardsurgeon_kernels.dispatch import dequantize, implementation_name, linear, unpack
from shardsurgeon_kernels.weight import PackedInt4, pack

__all__ = ["PackedInt4", "dequantize", "implementation_name", "linear", "pack", "unpack"]
