"""A result is named after the ratio that was asked for only where that is what was removed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shardsurgeon.checkpoint.provenance import PROVENANCE_NAME, rounding_alone
from shardsurgeon.operations import api
from tests.operations.workbench import scores_of
from tests.support.hub.models import fixture_folder

# 32 experts in each layer; 24 in 4 groups, so that of 9, 16 or 23 kept it keeps 12, 16 or 24.
UNGROUPED, GROUPED = "kimi_k25", "deepseek_v3"
GLOBAL = {"allocate": "global", "allow_nonuniform": True}


def planned(family: str, **asked: Any) -> Any:
    return api.plan(fixture_folder(family), scores_of(family), **asked)


@pytest.mark.parametrize(
    ("family", "asked", "name"),
    [
        (UNGROUPED, {"ratio": 0.65}, "65pct"),  # 20.8 of 32: 20 are removed
        (UNGROUPED, {"ratio": 0.65, "rounding": "ceil"}, "65pct"),
        (UNGROUPED, {"ratio": 0.65, "multiple_of": 4}, "65pct"),
        (UNGROUPED, {"ratio": 0.65, "multiple_of": 8}, "16e"),
        (UNGROUPED, {"ratio": 0.655, "multiple_of": 2}, "65.5pct"),
        (UNGROUPED, {"ratio": 0.5, **GLOBAL}, "50pct-nonuniform"),
        (UNGROUPED, {"keep": 12}, "12e"),
        (GROUPED, {"ratio": 0.5}, "50pct"),
        (GROUPED, {"ratio": 0.65}, "12e"),
    ],
)
def test_the_folder_is_called_by_what_is_removed(
    family: str, asked: dict[str, Any], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    plan = planned(family, **asked)
    assert plan.out == tmp_path / f"{family}-REAP-{name}"
    assert plan.report.out == str(plan.out)
    plan.write_plan("plan.json")
    nonuniform = {"allow_nonuniform": True} if "allocate" in asked else {}
    again = api.plan(fixture_folder(family), plan_file="plan.json", **nonuniform)
    assert again.out == plan.out
    again.write_plan("again.json")
    third = api.plan(fixture_folder(family), plan_file="again.json", **nonuniform)
    assert third.out == plan.out


def test_a_plan_that_was_edited_is_not_called_by_its_old_ratio(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    planned(UNGROUPED, ratio=0.5).write_plan("plan.json")
    lists = json.loads(Path("plan.json").read_bytes())
    for layer in lists["layers"].values():
        layer["pruned"] += layer["retained"][8:]
        layer["pruned"].sort()
        layer["retained"] = layer["retained"][:8]
        layer["saliency"] = None
    Path("plan.json").write_text(json.dumps(lists))
    assert api.plan(fixture_folder(UNGROUPED), plan_file="plan.json").out.name.endswith("-8e")


def test_the_record_of_a_prune_is_a_plan_of_the_same_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    plan = planned(UNGROUPED, ratio=0.65)
    api.apply(plan, "out")
    record = Path("out", PROVENANCE_NAME)
    assert api.plan(fixture_folder(UNGROUPED), plan_file=record).out == plan.out


@pytest.mark.parametrize(("ratio", "said"), [(0.5, 0.5), (0.51, 0.51), (0.65, 0.5)])
def test_the_record_says_the_share_that_was_removed(
    ratio: float, said: float, tmp_path: Path
) -> None:
    plan = planned(GROUPED, ratio=ratio)
    api.apply(plan, tmp_path / "out")
    record = json.loads((tmp_path / "out" / PROVENANCE_NAME).read_bytes())
    assert record["ratio"] == said
    assert record["steps"][0]["ratio"] == ratio
    assert api.verify(fixture_folder(GROUPED), tmp_path / "out").holds


def test_less_than_one_expert_is_rounding() -> None:
    assert rounding_alone(0.65, [(384, 249)])  # 249.6
    assert rounding_alone(0.65, [(384, 250)])
    assert not rounding_alone(0.65, [(384, 248)])
    assert not rounding_alone(0.5, [(32, 15)])
    assert rounding_alone(0.5, [(32, 8), (32, 24)])
    assert not rounding_alone(0.5, [(32, 8), (32, 20)])
