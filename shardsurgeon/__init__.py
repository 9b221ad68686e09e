"""A streaming, out-of-core surgeon for Mixture-of-Experts checkpoints.

checkpoint = shardsurgeon.open_checkpoint("Kimi-K2.5")
plan = shardsurgeon.plan(checkpoint, "scores.pt", ratio=0.65)
shardsurgeon.apply(plan, "Kimi-K2.5-REAP-65pct")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from shardsurgeon.errors import InputError, ShardSurgeonError, WorkError

if TYPE_CHECKING:
    from shardsurgeon.api import apply, plan, push, verify
    from shardsurgeon.checkpoint import Checkpoint, open_checkpoint
    from shardsurgeon.operations import Pruning, inspect
    from shardsurgeon.reports import (
        ApplyReport,
        ArchitectureReport,
        InspectReport,
        PlanReport,
        PushReport,
        VerifyReport,
    )
    from shardsurgeon.scores import Scores, read_scores

__version__ = "0.1.0"

__all__ = [
    "ApplyReport",
    "ArchitectureReport",
    "Checkpoint",
    "InputError",
    "InspectReport",
    "PlanReport",
    "Pruning",
    "PushReport",
    "Scores",
    "ShardSurgeonError",
    "VerifyReport",
    "WorkError",
    "apply",
    "inspect",
    "open_checkpoint",
    "plan",
    "push",
    "read_scores",
    "verify",
]

# Looked up when first used: `import shardsurgeon` and `shardsurgeon --help` stay cheap.
_HOMES = {
    "ApplyReport": "reports",
    "ArchitectureReport": "reports",
    "Checkpoint": "checkpoint",
    "InspectReport": "reports",
    "PlanReport": "reports",
    "Pruning": "operations",
    "PushReport": "reports",
    "Scores": "scores",
    "VerifyReport": "reports",
    "apply": "api",
    "inspect": "operations",
    "open_checkpoint": "checkpoint",
    "plan": "api",
    "push": "api",
    "read_scores": "scores",
    "verify": "api",
}


def __getattr__(name: str) -> Any:
    # A submodule of the same name, once imported, must not hide the function.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
