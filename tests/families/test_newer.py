"""Families of fixtures/builders/newer.py: bytes, config and logits of a prune.

transformers runs the text models; of the wrappers, whose fixtures have no vision tensors, the
bytes are compared. In Flint and Inkling a router sees every expert for itself, in Aria the chosen
ones only; the mask of `masked_router` serves all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest

from tests.families.masked_router import logits
from tests.families.pruned_pair import (
    Layout,
    Pair,
    assert_config_follows,
    assert_tensors_follow,
    build_and_prune,
    builders,
)
from tests.oracle.closeness import assert_equal_but_for_rounding

pytestmark = pytest.mark.oracle

BUILDERS = builders("newer")
EXPERTS, KEPT = 8, 4
LAYERS = r"model\.layers\.(\d+)\."
BIAS = (r"mlp\.gate\.(?:e_score_correction_)?bias", 0)
SOFTMAX = Layout(
    layers=LAYERS,
    experts=r"mlp\.experts\.(\d+)\.(?:gate|up|down)_proj\.weight$",
    sliced=((r"mlp\.gate\.weight", 0),),
    counts=(("num_experts",),),
)
SIGMOID = replace(SOFTMAX, sliced=(*SOFTMAX.sliced, BIAS))
ROUTED = (("n_routed_experts",),)
LAYOUTS = {
    "beam": SIGMOID,
    "mellum": SOFTMAX,
    "flex_olmo": SOFTMAX,
    "flint": SOFTMAX,
    "aria_text": Layout(
        layers=LAYERS,
        experts=None,
        sliced=((r"mlp\.experts\.fc[12]\.weight", 0), (r"mlp\.router\.weight", 0)),
        counts=(("moe_num_experts",),),
    ),
    "dots3_note_text": replace(SIGMOID, counts=ROUTED),
    "diffusion_gemma": Layout(
        layers=r"model\.decoder\.layers\.(\d+)\.",
        experts=None,
        sliced=(
            (r"experts\.(?:gate_up|down)_proj", 0),
            (r"router\.(?:proj\.weight|per_expert_scale)", 0),
        ),
        counts=(("text_config", "num_experts"),),
    ),
    "inkling_text": Layout(
        layers=LAYERS,
        experts=None,
        sliced=((r"mlp\.experts\.(?:gate_up|down)_proj", 0), (r"mlp\.gate\.weight", 0), BIAS),
        counts=ROUTED,
        tail=(r"mlp\.gate\.weight", 2),
    ),
}
RUN_BY_TRANSFORMERS = [
    "beam", "mellum", "flex_olmo", "flint", "aria_text", "dots3_note_text", "inkling_text",
]  # fmt: skip

each_family = pytest.mark.parametrize("name", list(BUILDERS))


@pytest.fixture(scope="session")
def pair_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    """Family → its fixture, built and pruned once in a session."""

    @cache
    def pair(name: str) -> Pair:
        return build_and_prune(name, BUILDERS[name], tmp_path_factory.mktemp(name))

    return pair


@each_family
def test_every_tensor_is_the_sources_renumbered_or_sliced(
    name: str, pair_of: Callable[[str], Pair]
) -> None:
    assert_tensors_follow(pair_of(name), LAYOUTS[name], 3)


@each_family
def test_the_count_is_rewritten_and_nothing_else_in_the_config(
    name: str, pair_of: Callable[[str], Pair]
) -> None:
    assert_config_follows(pair_of(name), LAYOUTS[name])


@pytest.mark.parametrize("name", RUN_BY_TRANSFORMERS)
def test_the_pruned_model_is_the_original_that_cannot_choose_the_pruned_experts(
    name: str, pair_of: Callable[[str], Pair]
) -> None:
    pair = pair_of(name)
    result, masked = logits(pair.folder, KEPT), logits(pair.source, EXPERTS, pair.retained)
    assert_equal_but_for_rounding(result, masked, pair.source)
    # Without the mask they must differ, or the equality above proves nothing.
    assert (result - logits(pair.source, EXPERTS)).abs().max() > 1e-2
