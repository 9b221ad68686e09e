"""Several plans of one model: what is read for them, and what is kept of them."""

from __future__ import annotations

import gc

import pytest

from shardsurgeon.execution.plan import Plan
from shardsurgeon.operations import prune
from shardsurgeon.pruning.request import SelectionRequest
from tests.operations.workbench import scores_of
from tests.support.far_source import FarSource
from tests.support.hub.models import fixture_folder

FAMILY = "qwen3_moe"
REQUESTS = [SelectionRequest(ratio=ratio) for ratio in (0.25, 0.5, 0.75)]


def far() -> FarSource:
    folder = fixture_folder(FAMILY)
    return FarSource({file.name: file.read_bytes() for file in folder.iterdir()}, 1 << 20)


def test_a_model_is_opened_once_for_several_plans() -> None:
    once, thrice = far(), far()
    alone = prune.plan(once, scores_of(FAMILY), REQUESTS[0]).report
    reports = prune.compare(thrice, scores_of(FAMILY), REQUESTS)
    assert [report.num_experts_after for report in reports] == [12, 8, 4]
    assert reports[0] == alone
    assert sorted(thrice.requests) == sorted(once.requests)
    assert thrice.lists == once.lists == 1


def test_each_plan_is_let_go_of_before_the_next_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    gc.collect()
    gc.freeze()  # what is there already is neither looked through nor counted
    alive: list[int] = []
    real = prune.plan_report

    def counted(*args: object) -> object:
        gc.collect()
        alive.append(sum(type(thing) is Plan for thing in gc.get_objects()))
        return real(*args)

    monkeypatch.setattr(prune, "plan_report", counted)
    prune.compare(fixture_folder(FAMILY), scores_of(FAMILY), REQUESTS)
    gc.unfreeze()
    assert alive == [1, 1, 1]
