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
    from shardsurgeon.layerwise.estimate import CalibrationEstimate
    from shardsurgeon.layerwise.request import CalibrationReport
    from shardsurgeon.operations.api import (
        apply,
        fit,
        inspect,
        open_checkpoint,
        plan,
        push,
        read_scores,
        verify,
    )
    from shardsurgeon.operations.evaluation_api import evaluate, read_evaluation
    from shardsurgeon.operations.evaluation_report import EvaluationReport
    from shardsurgeon.operations.fit import FitReport
    from shardsurgeon.operations.materialize import MaterializeReport
    from shardsurgeon.operations.page import PageReport
    from shardsurgeon.operations.picture_api import plot_scores, report
    from shardsurgeon.operations.plots import PlotReport
    from shardsurgeon.operations.probe_report import ProbeReport
    from shardsurgeon.operations.prune import Pruning
    from shardsurgeon.operations.reports import (
        ApplyReport,
        BaselineReport,
        BlendReport,
        InspectReport,
        PushReport,
        RouterScoresReport,
        ScoresReport,
        WrittenScoresReport,
    )
    from shardsurgeon.operations.score_api import (
        blend_scores,
        calibrate,
        compare_scores,
        convert_scores,
        estimate_calibration,
        merge_scores,
        probe,
        scores_from_router,
        scores_from_weights,
        scores_random,
        show_scores,
    )
    from shardsurgeon.operations.view_api import materialize
    from shardsurgeon.pruning.agreement import ComparisonReport
    from shardsurgeon.pruning.report import PlanReport
    from shardsurgeon.scores.table import Scores
    from shardsurgeon.serving.tensors import open_view
    from shardsurgeon.verification.findings import ArchitectureReport, VerifyReport

__all__ = [
    "ApplyReport",
    "ArchitectureReport",
    "BaselineReport",
    "BlendReport",
    "CalibrationEstimate",
    "CalibrationReport",
    "Checkpoint",
    "ComparisonReport",
    "EvaluationReport",
    "FitReport",
    "InputError",
    "InspectReport",
    "MaterializeReport",
    "PageReport",
    "PlanReport",
    "PlotReport",
    "ProbeReport",
    "Pruning",
    "PushReport",
    "RouterScoresReport",
    "Scores",
    "ScoresReport",
    "ShardSurgeonError",
    "VerifyReport",
    "WorkError",
    "WrittenScoresReport",
    "apply",
    "blend_scores",
    "calibrate",
    "compare_scores",
    "convert_scores",
    "estimate_calibration",
    "evaluate",
    "fit",
    "inspect",
    "materialize",
    "merge_scores",
    "open_checkpoint",
    "open_view",
    "plan",
    "plot_scores",
    "probe",
    "push",
    "read_evaluation",
    "read_scores",
    "report",
    "scores_from_router",
    "scores_from_weights",
    "scores_random",
    "show_scores",
    "verify",
]

# Looked up when first used: `import shardsurgeon` and `shardsurgeon --help` stay cheap.
_HOMES = {
    "ApplyReport": "operations.reports",
    "ArchitectureReport": "verification.findings",
    "BaselineReport": "operations.reports",
    "BlendReport": "operations.reports",
    "CalibrationEstimate": "layerwise.estimate",
    "CalibrationReport": "layerwise.request",
    "Checkpoint": "checkpoint.checkpoint",
    "ComparisonReport": "pruning.agreement",
    "EvaluationReport": "operations.evaluation_report",
    "FitReport": "operations.fit",
    "InspectReport": "operations.reports",
    "MaterializeReport": "operations.materialize",
    "PageReport": "operations.page",
    "PlanReport": "pruning.report",
    "PlotReport": "operations.plots",
    "ProbeReport": "operations.probe_report",
    "Pruning": "operations.prune",
    "PushReport": "operations.reports",
    "RouterScoresReport": "operations.reports",
    "Scores": "scores.table",
    "ScoresReport": "operations.reports",
    "VerifyReport": "verification.findings",
    "WrittenScoresReport": "operations.reports",
    "apply": "operations.api",
    "blend_scores": "operations.score_api",
    "calibrate": "operations.score_api",
    "compare_scores": "operations.score_api",
    "convert_scores": "operations.score_api",
    "estimate_calibration": "operations.score_api",
    "evaluate": "operations.evaluation_api",
    "fit": "operations.api",
    "inspect": "operations.api",
    "materialize": "operations.view_api",
    "merge_scores": "operations.score_api",
    "open_checkpoint": "operations.api",
    "open_view": "serving.tensors",
    "plan": "operations.api",
    "plot_scores": "operations.picture_api",
    "probe": "operations.score_api",
    "push": "operations.api",
    "read_evaluation": "operations.evaluation_api",
    "read_scores": "operations.api",
    "report": "operations.picture_api",
    "scores_from_router": "operations.score_api",
    "scores_from_weights": "operations.score_api",
    "scores_random": "operations.score_api",
    "show_scores": "operations.score_api",
    "verify": "operations.api",
}


def __getattr__(name: str) -> Any:
    # A submodule of the same name, once imported, must not hide the function.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
