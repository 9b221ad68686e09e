"""Solar Open, A.X-K1 and K2, K-EXAONE, Laguna, Kolibri, Command A and Sarvam, pruned by half.

Written from the modeling sources: which tensors have an expert axis, and where config.json says
the count. transformers runs no Sarvam, which is compared byte by byte only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch

from tests.families.masked_router import logits
from tests.families.pruned_pair import (
    Layout,
    Pair,
    assert_config_follows,
    assert_tensors_follow,
    build_and_prune,
    builders,
)
from tests.oracle.byte_oracle import read_config, read_tensors

pytestmark = pytest.mark.oracle

BUILDERS = builders("biased_routers")


@dataclass(frozen=True)
class Case:
    """What is known of a fixture: its experts, its names, its MoE layers (MTP counted on).

    runs: whether transformers runs the model; these routers score each expert by itself, so the
    pruned model must agree to the last bit.
    """

    layout: Layout
    experts: int = 8
    pruned: frozenset[int] = frozenset({1, 2})
    runs: bool = True


def routed(*routers: str, count: str = "num_experts", layers: str = r"model\.layers") -> Layout:
    """Experts one by one in `mlp`, and these tensors with a row for each."""
    return Layout(
        layers=rf"{layers}\.(\d+)\.",
        experts=r"mlp\.experts\.(\d+)\.(?:gate|up|down)_proj\.weight$",
        sliced=tuple((router, 0) for router in (r"mlp\.gate\.weight", *routers)),
        counts=(tuple(count.split(".")),),
    )


BIAS = r"mlp\.gate\.e_score_correction_bias"
V3 = routed(BIAS, count="n_routed_experts")
CASES = {
    "solar_open": Case(V3, 16, frozenset({0, 1, 2})),
    "axk1": Case(V3, 16),
    "axk2": Case(V3, 16),
    "axk2_light": Case(V3),
    "exaone_moe": Case(routed(r"mlp\.e_score_correction_bias")),
    "laguna": Case(routed(r"mlp\.experts\.e_score_correction_bias")),
    "kolibri1": Case(routed(r"moe\.router\.expert_bias"), pruned=frozenset({0, 1, 2})),
    "cohere2_moe": Case(routed()),
    "cohere2_moe_vision": Case(
        routed(count="text_config.num_experts", layers=r"model\.language_model\.layers")
    ),
    "sarvam_moe": Case(routed(r"mlp\.gate\.expert_bias"), 32, runs=False),
    "sarvam_mla": Case(routed(BIAS), runs=False),
}
MAIN_LAYERS = 3

Pairs = Callable[[str], Pair]
each_fixture = pytest.mark.parametrize("name", list(CASES))


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    """Each fixture by name, built and pruned once."""

    @cache
    def pair(name: str) -> Pair:
        return build_and_prune(name, BUILDERS[name], tmp_path_factory.mktemp(name))

    return pair


def test_every_fixture_has_a_case() -> None:
    assert BUILDERS.keys() == CASES.keys()


@each_fixture
def test_every_tensor_is_the_sources_renumbered_or_sliced(name: str, pairs: Pairs) -> None:
    case, pair = CASES[name], pairs(name)
    assert pair.retained.keys() == case.pruned
    assert_tensors_follow(pair, case.layout, MAIN_LAYERS)


@each_fixture
def test_the_config_has_the_new_count_and_not_one_other_change(name: str, pairs: Pairs) -> None:
    assert_config_follows(pairs(name), CASES[name].layout)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.runs])
def test_a_pruned_model_is_the_original_that_cannot_choose_the_pruned_experts(
    name: str, pairs: Pairs
) -> None:
    pair, experts = pairs(name), CASES[name].experts
    result = logits(pair.folder, experts // 2)
    assert torch.equal(result, logits(pair.source, experts, pair.retained))
    # Without the mask they must differ, or the equality above proves nothing.
    assert (result - logits(pair.source, experts)).abs().max() > 1e-2


def test_dropping_a_dense_mtp_layer_takes_all_its_tensors_and_its_count(tmp_path: Path) -> None:
    options = ("--ratio", "0.5", "--mtp", "drop")
    pair = build_and_prune("exaone_moe", BUILDERS["exaone_moe"], tmp_path, *options)
    assert any(name.startswith("mtp.") for name in read_tensors(pair.source))
    assert not any(name.startswith("mtp.") for name in read_tensors(pair.folder))
    assert read_config(pair.folder)["num_nextn_predict_layers"] == 0
