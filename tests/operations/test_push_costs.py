"""What it costs to prune from the Hub and back to it, by the account of server and disk.

The benchmark's own measurements, on checkpoints of a size for tests.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.bench import remote

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="wait4 and st_blocks")


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["int4", "stacked"])
def test_what_is_kept_travels_once_and_through_half_its_disk(tmp_path: Path, layout: str) -> None:
    budget = 12_000_000
    costs = remote.costs(tmp_path, layout, 60_000_000, budget=budget)
    assert costs.problems() == []
    assert costs.inspected.sent == costs.inspected.facts > 0
    for cost in (costs.pruned, costs.streamed):
        assert 0.98 < cost.ratio <= 1.02
        assert cost.sent < costs.downloaded.sent / 2
    assert costs.streamed.kept > 2 * budget
    assert 0 < costs.streamed.disk <= budget
    # All of the model and all of the result: the watcher sees what there is, and not only shards.
    assert costs.downloaded.disk >= costs.downloaded.sent + costs.downloaded.kept - 100_000
    assert costs.pruned.disk >= costs.pruned.kept


def test_a_dearer_way_than_promised_is_told() -> None:
    fine = remote.Cost("fine", 1.0, 1.0, sent=1_010, facts=10, disk=99, kept=1_000)
    dear = remote.Cost("dear", 1.0, 1.0, sent=1_040, facts=10, disk=101, kept=1_000)
    seen = remote.Cost("inspect", 1.0, 1.0, sent=10, facts=10, disk=0)
    costs = remote.Costs("int4", seen, fine, fine, fine, budget=100, differing=[])
    assert costs.problems() == []
    costs = remote.Costs("int4", fine, dear, fine, dear, budget=100, differing=["config.json"])
    assert costs.problems() == [
        "int4: config.json is not what a local prune makes",
        "int4: inspect: 1,010 bytes, headers and JSON have 10",
        "int4: dear: 1.0300 bytes downloaded for each byte kept",
        "int4: dear: 1.0300 bytes downloaded for each byte kept",
        "int4: 101 bytes of disk, the budget is 100",
    ]
