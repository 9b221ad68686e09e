"""Remove whole experts from Mixture-of-Experts checkpoints, without loading the model.

checkpoint = shardsurgeon.open_checkpoint("Kimi-K2.5")
plan = shardsurgeon.plan(checkpoint, "scores.pt", ratio=0.65)
shardsurgeon.apply(plan, "Kimi-K2.5-REAP-65pct")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from shardsurgeon._version import __version__ as __version__
from shardsurgeon.errors import InputError, ShardSurgeonError, WorkError

if TYPE_CHECKING:
    from shardsurgeon.checkpoint.checkpoint import Checkpoint
    from shardsurgeon.operations.api import apply, open_checkpoint, plan, push, verify
    from shardsurgeon.operations.inspect import inspect
    from shardsurgeon.operations.prune import Pruning
    from shardsurgeon.operations.reports import ApplyReport, InspectReport, PushReport
    from shardsurgeon.pruning.report import PlanReport
    from shardsurgeon.scores.files import read_scores
    from shardsurgeon.scores.table import Scores
    from shardsurgeon.verification.findings import ArchitectureReport, VerifyReport

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
    "ApplyReport": "operations.reports",
    "ArchitectureReport": "verification.findings",
    "Checkpoint": "checkpoint.checkpoint",
    "InspectReport": "operations.reports",
    "PlanReport": "pruning.report",
    "Pruning": "operations.prune",
    "PushReport": "operations.reports",
    "Scores": "scores.table",
    "VerifyReport": "verification.findings",
    "apply": "operations.api",
    "inspect": "operations.inspect",
    "open_checkpoint": "operations.api",
    "plan": "operations.api",
    "push": "operations.api",
    "read_scores": "scores.files",
    "verify": "operations.api",
}


def __getattr__(name: str) -> Any:
    # A submodule of the same name, once imported, must not hide the function.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
