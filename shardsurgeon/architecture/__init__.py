"""Does the engine's own model take a pruned checkpoint? Answered by names and shapes alone.

Beside `verification`, which proves where the bytes came from: here the config is built by
transformers on the meta device, and the checkpoint's tensors, quantized ones as the weights
they stand for, go through its own loader with no weight behind them.
"""

from __future__ import annotations

from shardsurgeon.architecture.check import check_architecture

__all__ = ["check_architecture"]
