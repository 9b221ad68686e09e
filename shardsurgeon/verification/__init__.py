"""An independent proof that a pruned model is right.

Reads the original and the pruned checkpoint and works its own way back from every output
tensor to the bytes it must hold. Shares nothing with the rooms that planned and wrote them.
"""

from __future__ import annotations

from shardsurgeon.verification.comparison import Sampling
from shardsurgeon.verification.outline import Heading, Outline
from shardsurgeon.verification.proof import verify_checkpoint
from shardsurgeon.verification.shards import ShardProof

__all__ = ["Heading", "Outline", "Sampling", "ShardProof", "verify_checkpoint"]
