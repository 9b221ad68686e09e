"""An independent proof that a pruned folder is right.

Reads the original and the pruned checkpoint and works its own way back from every output
tensor to the bytes it must hold. Shares nothing with the rooms that planned and wrote them.
"""

from __future__ import annotations

from shardsurgeon.verification.proof import verify_checkpoint

__all__ = ["verify_checkpoint"]
