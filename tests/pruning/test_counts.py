"""The request and the kept count: combinations refused, rounding, groups, target sizes."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardsurgeon.errors import ConfigError, KeepListError, UsageError
from shardsurgeon.pruning.counts import kept_count, largest_kept
from shardsurgeon.pruning.request import Allocation, Rounding, SelectionRequest, removed_count
from shardsurgeon.pruning.routing import RoutingFacts, check_kept, check_routing, fewest_kept

DEEPSEEK = RoutingFacts(256, 8, n_group=8, topk_group=4, group_score_top=2)
KIMI = RoutingFacts(384, 8)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ({}, "nothing says how many"),
        ({"ratio": 0.5, "keep": 10}, "2 selections at once (--ratio, --keep)"),
        ({"target_size": 5, "plan_file": "plan.json"}, "(--target-size, --plan)"),
        ({"ratio": 0.0}, "0 is not between 0 and 1"),
        ({"ratio": 1.0}, "1 is not between 0 and 1"),
        ({"ratio": -0.5}, "-0.5 is not between 0 and 1"),
        ({"ratio": math.nan}, "nan is not between 0 and 1"),
        ({"ratio": math.inf}, "inf is not between 0 and 1"),
        ({"keep": 0}, "--keep: 0 is less than 1"),
        ({"target_size": 0}, "--target-size: 0 is less than 1"),
        ({"ratio": 0.5, "multiple_of": 0}, "--multiple-of: 0 is less than 1"),
        ({"keep": 8, "rounding": Rounding.CEIL}, "--rounding: rounds a ratio, and there is none"),
        ({"plan_file": "p.json", "rounding": Rounding.FLOOR}, "--rounding"),
        ({"plan_file": "p.json", "metric": "reap"}, "leave out --metric"),
        ({"plan_file": "p.json", "preserve_super_experts": True}, "--preserve-super-experts"),
        ({"plan_file": "p.json", "multiple_of": 4}, "leave out --multiple-of"),
        ({"plan_file": "p.json", "allocate": Allocation.GLOBAL}, "leave out --allocate"),
        ({"plan_file": "p.json", "allocate": Allocation.WATERFILL}, "leave out --allocate"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(words: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError) as caught:
        SelectionRequest(**words)
    assert says in str(caught.value)


def test_a_request_knows_which_selection_it_is_and_floors_a_ratio_by_default() -> None:
    assert SelectionRequest(ratio=0.5).selection == "ratio"
    assert SelectionRequest(target_size=9).selection == "target-size"
    assert SelectionRequest(ratio=0.5).effective_rounding is Rounding.FLOOR
    assert SelectionRequest(keep=9).effective_rounding is None


@pytest.mark.parametrize(
    ("ratio", "experts", "floor", "nearest", "ceil"),
    [
        (0.65, 384, 249, 250, 250),
        (0.29, 100, 28, 29, 29),  # the float product is 28.999999999999996
        (0.07, 100, 7, 7, 7),  # the float product is 7.000000000000001
        (0.5, 5, 2, 2, 3),  # a half goes to the even number
        (0.5, 7, 3, 4, 4),
        (0.001, 384, 0, 0, 1),
    ],
)
def test_rounding_decides_how_many_are_removed(
    ratio: float, experts: int, floor: int, nearest: int, ceil: int
) -> None:
    assert removed_count(ratio, experts, Rounding.FLOOR) == floor
    assert removed_count(ratio, experts, Rounding.NEAREST) == nearest
    assert removed_count(ratio, experts, Rounding.CEIL) == ceil


@pytest.mark.parametrize(
    ("words", "facts", "kept", "note"),
    [
        ({"keep": 134}, KIMI, 134, ""),
        ({"ratio": 0.5, "multiple_of": 8}, KIMI, 192, ""),
        (
            {"ratio": 0.65},
            RoutingFacts(384, 8, n_group=8, topk_group=4, group_score_top=2),
            136,
            "kept count raised from 135 to 136: a multiple of n_group 8",
        ),
        (
            {"keep": 130, "multiple_of": 16},
            KIMI,
            144,
            "kept count raised from 130 to 144: a multiple of 16 (--multiple-of)",
        ),
        (
            {"ratio": 0.5, "multiple_of": 6},
            DEEPSEEK,
            144,
            "kept count raised from 128 to 144: a multiple of n_group 8 and of 6 (--multiple-of)",
        ),
    ],
)
def test_the_kept_count_is_raised_to_its_multiple_and_says_so(
    words: dict[str, Any], facts: RoutingFacts, kept: int, note: str
) -> None:
    count = kept_count(SelectionRequest(**words), facts)
    assert (count.kept, count.note) == (kept, note)


@pytest.mark.parametrize(
    ("words", "facts", "says"),
    [
        ({"keep": 384}, KIMI, "keeping 384 of 384 experts prunes nothing"),
        ({"keep": 500}, KIMI, "keeping 500 of 384 experts prunes nothing"),
        ({"keep": 7}, KIMI, "fewer than the 8 each token is sent to"),
        ({"ratio": 0.99}, KIMI, "4 kept experts are fewer than the 8"),
        ({"ratio": 0.9999, "rounding": Rounding.CEIL}, KIMI, "0 kept experts"),
        ({"ratio": 0.002}, KIMI, "0.002 of 384 experts is 0.768, which removes 0 (floor)"),
        ({"keep": 380, "multiple_of": 16}, KIMI, "raised from 380 to 384"),
        ({"ratio": 0.01}, DEEPSEEK, "raised from 254 to 256"),
        ({"keep": 100}, DEEPSEEK, "do not divide into the 8 groups of the router; keep 96 or 104"),
        ({"keep": 100, "multiple_of": 8}, DEEPSEEK, "do not divide into the 8 groups"),
        ({"keep": 8}, DEEPSEEK, "4 of 8 groups with 1 experts each, 4 in all, and needs 8"),
        (
            {"keep": 8},
            RoutingFacts(64, 4, n_group=8, topk_group=4, group_score_top=2),
            "scores a group by its best 2; keep at least 16",
        ),
    ],
)
def test_a_count_the_model_cannot_work_with_is_refused(
    words: dict[str, Any], facts: RoutingFacts, says: str
) -> None:
    with pytest.raises(UsageError) as caught:
        kept_count(SelectionRequest(**words), facts)
    assert says in str(caught.value)


def test_a_count_from_a_keep_list_is_refused_in_the_name_of_its_file() -> None:
    check_kept(128, DEEPSEEK, "plan.json", KeepListError)
    with pytest.raises(KeepListError, match=r"plan\.json: 100 kept experts do not divide"):
        check_kept(100, DEEPSEEK, "plan.json", KeepListError)


@pytest.mark.parametrize(
    "numbers",
    [(0, 1, 1, 1, 1), (8, 9, 1, 1, 1), (10, 2, 4, 1, 1), (8, 2, 2, 3, 1), (8, 2, 0, 1, 1)],
)
def test_routing_facts_that_contradict_each_other_are_refused(numbers: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError):
        RoutingFacts(*numbers)


@pytest.mark.parametrize(
    ("facts", "fewest"),
    [
        (KIMI, 8),
        (DEEPSEEK, 16),  # two of a token's four groups would do; each is scored by its best two
        (RoutingFacts(64, 6, n_group=8, topk_group=2), 24),  # three in each of two groups
        (RoutingFacts(64, 4, n_group=8, topk_group=4, group_score_top=2), 16),  # one would do
    ],
)
def test_the_fewest_experts_are_those_below_which_a_router_is_refused(
    facts: RoutingFacts, fewest: int
) -> None:
    assert fewest_kept(facts) == fewest
    check_routing(fewest, facts, "here")
    with pytest.raises(UsageError):
        check_routing(fewest - facts.n_group, facts, "here")


def test_facts_of_a_smaller_layer_choose_no_more_than_it_has() -> None:
    assert DEEPSEEK.of_layer(64) == RoutingFacts(64, 8, 8, 4, 2)
    assert KIMI.of_layer(6) == RoutingFacts(6, 6)


def test_the_largest_count_within_a_target_size_is_kept() -> None:
    # 1000 bytes of everything else and 10 per expert: 122 experts are 2220 bytes, 123 are 2230.
    assert largest_kept(lambda kept: 1000 + 10 * kept, 2229, KIMI) == 122
    assert largest_kept(lambda kept: 1000 + 10 * kept, 2230, KIMI) == 123


def test_the_count_of_a_target_size_is_raised_to_whole_groups_and_the_report_says_so() -> None:
    # 123 of DeepSeek's experts fit; the next multiple of its 8 groups is 128, 50 bytes more.
    count = kept_count(SelectionRequest(target_size=2230), DEEPSEEK, lambda kept: 1000 + 10 * kept)
    assert count.kept == 128
    assert "raised from 123 to 128: a multiple of n_group 8, 50 B (50 bytes) above" in count.note
    request = SelectionRequest(target_size=2230, multiple_of=16)
    assert kept_count(request, KIMI, lambda kept: 1000 + 10 * kept).kept == 128


@pytest.mark.parametrize(
    ("limit", "says"),
    [
        (4840, "nothing needs pruning: the checkpoint has 4.8 kB (4,840 bytes), the target"),
        (
            1079,
            "with 8 experts kept, takes up to 1.1 kB (1,080 bytes), the target is 1.1 kB (1,079",
        ),
    ],
)
def test_a_target_size_that_cannot_be_met_is_refused(limit: int, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        largest_kept(lambda kept: 1000 + 10 * kept, limit, KIMI)
    assert says in str(caught.value)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.data())
def test_a_target_size_gives_the_count_that_trying_them_all_gives(
    each: int, data: st.DataObject
) -> None:
    facts = RoutingFacts(48, 4)
    limit = data.draw(st.integers(1, 50 * each))
    fitting = [kept for kept in range(4, 48) if 7 + each * kept <= limit]
    if fitting and 7 + each * 48 > limit:
        assert largest_kept(lambda kept: 7 + each * kept, limit, facts) == fitting[-1]
    else:
        with pytest.raises(UsageError):
            largest_kept(lambda kept: 7 + each * kept, limit, facts)


@pytest.mark.parametrize("where", [{"ratio": 0.5}, {"keep": 128}, {"target_size": 128}])
def test_the_multiple_is_the_least_that_groups_and_multiple_of_share(where: dict[str, Any]) -> None:
    # Of 8 groups and --multiple-of 12 that is 24, and not 96.
    request = SelectionRequest(**where, multiple_of=12)
    assert kept_count(request, DEEPSEEK, lambda kept: kept).kept == 144


@pytest.mark.parametrize(("kept", "remedy"), [(7, "keep 6"), (5, "keep 4 or 6"), (1, "keep 2")])
def test_the_counts_that_are_offered_are_whole_groups_and_prune_something(
    kept: int, remedy: str
) -> None:
    with pytest.raises(UsageError) as caught:
        check_routing(kept, RoutingFacts(8, 2, n_group=2, topk_group=2), "here")
    assert caught.value.remedy == remedy
