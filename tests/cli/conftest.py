"""A command line whose operations are stand-ins: parsing and printing are what is tested."""

from __future__ import annotations

import pytest

from shardsurgeon.cli.main import main
from shardsurgeon.layerwise import run as calibration
from shardsurgeon.operations import (
    apply,
    blend,
    evaluate,
    fit,
    inspect,
    materialize,
    page,
    plots,
    probe,
    prune,
    push,
    scores,
    verify,
)
from tests.cli.standins import SCORE_OPERATIONS, Ended, FakeOperations, FakePruning, Run


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeOperations:
    operations_ = FakeOperations()
    for module, name in (
        (inspect, "inspect"),
        (fit, "fit"),
        (prune, "plan"),
        (apply, "apply"),
        (materialize, "materialize"),
        (verify, "verify"),
        (push, "push"),
        (evaluate, "evaluate"),
        (probe, "probe"),
        (page, "report_page"),
    ):
        monkeypatch.setattr(module, name, operations_.answer(name))
    monkeypatch.setattr(prune, "compare", operations_.compare)
    monkeypatch.setattr(prune, "save_plan", FakePruning.save_plan)
    monkeypatch.setattr(prune, "as_view", lambda pruning, **how: pruning)
    monkeypatch.setattr(prune, "serve_planned", FakePruning.serve_planned)
    for name in SCORE_OPERATIONS:
        module = {"blend_scores": blend, "plot_scores": plots}.get(name, scores)
        monkeypatch.setattr(module, name, operations_.answer(name))
    monkeypatch.setattr(calibration, "calibrate", operations_.answer("calibrate"))
    monkeypatch.setattr(calibration, "rehearse", operations_.answer("rehearse"))
    return operations_


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], fake: FakeOperations) -> Run:
    """Run a command line of words against the stand-ins."""

    def words(*arguments: str) -> Ended:
        status = main(arguments)
        return Ended(status, *capsys.readouterr())

    return words
