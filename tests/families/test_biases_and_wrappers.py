"""Experts' biases in other places than the router, and text models below a wrapper's name.

Sigmoid routers (LFM2 MoE, Trinity, Hunyuan 3 and 4, GLM): the pruned model must agree to the last
bit with the original that cannot choose the pruned experts (`masked_model`). Softmax routers
(Qwen4-Exp, Mistral 4, DeepSeek-OCR 2): the original's logits are masked before the softmax, and
the two agree but for the rounding of a sum with fewer terms.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from shardsurgeon.checkpoint.anatomy import read_anatomy
from shardsurgeon.errors import ConfigError, FamilyError
from shardsurgeon.families.schema import family_for
from shardsurgeon.operations import api
from tests.families.masked_model import load, logits
from tests.families.pruned_pair import (
    Layout,
    Pair,
    assert_config_follows,
    assert_tensors_follow,
    build_and_prune,
    builders,
)
from tests.families.specimens import specimen
from tests.oracle.byte_oracle import read_config, read_tensors
from tests.oracle.closeness import assert_equal_but_for_rounding

pytestmark = pytest.mark.oracle

BUILDERS = builders("expert_bias") | builders("vision_wrappers")
MAIN_LAYERS = 3


@dataclass(frozen=True)
class Case:
    """What is known of a fixture: names, MTP tensors and how exact its logits are.

    logits: what masking leaves of them, None where transformers cannot run the model. mtp: the
    tensors that go with the MTP layers, which transformers does not read.
    """

    layout: Layout
    logits: Literal["same bits", "but for rounding"] | None
    mtp: str = r"(?!)"
    mtp_layers: int = 0
    first_sparse: int = 1
    model_class: Any = AutoModelForCausalLM


GATED = r"\.(?:gate|up|down)_proj\.weight$"
LFM2 = Layout(
    layers=r"model\.layers\.(\d+)\.",
    experts=r"feed_forward\.experts\.(\d+)\.w[123]\.weight$",
    sliced=((r"feed_forward\.(gate\.weight|expert_bias)", 0),),
    counts=(("num_experts",),),
)
TRINITY = Layout(
    layers=r"model\.layers\.(\d+)\.",
    experts=r"mlp\.experts\.(\d+)" + GATED,
    sliced=((r"mlp\.(router\.gate\.weight|expert_bias)", 0),),
    counts=(("num_experts",),),
)
HUNYUAN4 = Layout(
    layers=r"model\.layers\.(\d+)\.",
    mtp=r"model\.mtp_layers\.(\d+)\.",
    experts=None,
    sliced=(
        (r"mlp\.experts\.(gate_up|down)_proj", 0),
        (r"mlp\.gate\.(weight|e_score_correction_bias)", 0),
    ),
    counts=(("n_routed_experts",),),
)
GLM = Layout(
    layers=r"model\.language_model\.layers\.(\d+)\.",
    experts=r"mlp\.experts\.(\d+)" + GATED,
    sliced=((r"mlp\.gate\.(weight|e_score_correction_bias)", 0),),
    counts=(("text_config", "n_routed_experts"),),
)
QWEN4 = replace(
    GLM,
    mtp=r"mtp\.layers\.(\d+)\.",
    sliced=((r"mlp\.gate\.weight", 0), (r"mlp\.experts\.(gate_up|down)_proj", 0)),
    counts=(("text_config", "num_experts"),),
)
MISTRAL4 = replace(
    QWEN4,
    layers=r"language_model\.model\.layers\.(\d+)\.",
    mtp=None,
    experts=None,
    counts=GLM.counts,
)
OCR2 = replace(GLM, layers=r"model\.layers\.(\d+)\.", sliced=((r"mlp\.gate\.weight", 0),))
WRAPPED = partial(Case, model_class=AutoModelForImageTextToText)
BEHIND = r"model\.language_model\.layers\.3\."
CASES = {
    "lfm2_moe": Case(LFM2, "same bits"),
    "lfm2_moe_unbiased": Case(LFM2, "same bits"),
    "afmoe": Case(TRINITY, "same bits"),
    "hy_v3": Case(TRINITY, "same bits", mtp=r"model\.layers\.3\.", mtp_layers=1),
    "hy_v4": Case(HUNYUAN4, "same bits", mtp=r"model\.mtp_layers\.", mtp_layers=1),
    "glm4v_moe": WRAPPED(GLM, "same bits", mtp=BEHIND, mtp_layers=1),
    "glm5_next": WRAPPED(GLM, "same bits", mtp=BEHIND, mtp_layers=1),
    "qwen4_exp": WRAPPED(QWEN4, "but for rounding", mtp=r"mtp\.", mtp_layers=1, first_sparse=0),
    "mistral4": WRAPPED(MISTRAL4, "but for rounding", first_sparse=0),
    "deepseek_ocr2": WRAPPED(OCR2, "but for rounding"),
}

Pairs = Callable[[str], Pair]
every_family = pytest.mark.parametrize("name", list(BUILDERS))
run_by_transformers = pytest.mark.parametrize("name", [n for n in CASES if CASES[n].logits])


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    """Each fixture by name, built and pruned once."""

    @cache
    def pair(name: str) -> Pair:
        return build_and_prune(name, BUILDERS[name], tmp_path_factory.mktemp(name))

    return pair


@every_family
def test_every_tensor_is_the_sources_renumbered_or_sliced(name: str, pairs: Pairs) -> None:
    assert_tensors_follow(pairs(name), CASES[name].layout, MAIN_LAYERS)


@every_family
def test_every_layer_with_experts_is_pruned_mtp_layers_too(name: str, pairs: Pairs) -> None:
    case = CASES[name]
    layers = range(case.first_sparse, MAIN_LAYERS + case.mtp_layers)
    assert list(pairs(name).retained) == list(layers)


@every_family
def test_the_count_is_rewritten_and_nothing_else_in_the_config(name: str, pairs: Pairs) -> None:
    assert_config_follows(pairs(name), CASES[name].layout)


@run_by_transformers
def test_a_pruned_model_is_the_original_that_cannot_choose_the_pruned_experts(
    name: str, pairs: Pairs
) -> None:
    pair, case = pairs(name), CASES[name]
    source = load(pair.source, case.model_class, case.mtp)
    result = logits(load(pair.folder, case.model_class, case.mtp))
    masked = logits(source, pair.retained)
    if case.logits == "same bits":
        assert torch.equal(result, masked)
    else:
        assert_equal_but_for_rounding(result, masked, pair.source)
    # Without the mask they must differ, or the equality above proves nothing.
    assert (result - logits(source)).abs().max() > 1e-2


@run_by_transformers
def test_a_re_save_by_transformers_is_read_as_the_same_layers(
    name: str, pairs: Pairs, tmp_path: Path
) -> None:
    pair, case = pairs(name), CASES[name]
    load(pair.source, case.model_class, case.mtp).save_pretrained(tmp_path / "saved")
    pruning = api.plan(tmp_path / "saved", pair.source / "scores.pt", ratio=0.5)
    kept = {number: list(layer.retained) for number, layer in pruning.decision.keep.layers.items()}
    # The MTP layers are not in a re-save.
    assert kept == {number: ids for number, ids in pair.retained.items() if number < MAIN_LAYERS}


@pytest.mark.parametrize("name", [n for n in CASES if CASES[n].mtp_layers])
def test_dropped_mtp_layers_leave_no_tensor_and_no_count(name: str, tmp_path: Path) -> None:
    pair = build_and_prune(name, BUILDERS[name], tmp_path, "--ratio", "0.5", "--mtp", "drop")
    before, after = read_tensors(pair.source), read_tensors(pair.folder)
    gone = {tensor for tensor in before if re.match(CASES[name].mtp, tensor)}
    assert gone
    assert gone.isdisjoint(after)
    assert {tensor for tensor in before if ".experts." not in tensor} - gone <= after.keys()
    config = read_config(pair.folder)
    text = config.get("text_config", config)
    assert [
        text[key] for key in ("num_nextn_predict_layers", "mtp_num_hidden_layers") if key in text
    ] == [0]


def test_a_wrapper_that_dense_models_have_too_is_told_by_its_text_model() -> None:
    config = specimen("mistral4").config
    assert family_for(config, "").name == "mistral4"
    text = {"model_type": "ministral3", "num_hidden_layers": 3, "hidden_size": 64}
    with pytest.raises(FamilyError, match="'mistral3' names no experts: a dense model has none"):
        family_for({**config, "text_config": text}, "")


def test_counts_in_two_parts_of_a_config_that_do_not_agree_are_refused() -> None:
    spoiled = specimen("mistral4").configured(("n_routed_experts",), 16)
    with pytest.raises(ConfigError, match=r"says 8 and 16 experts \(n_routed_experts\)"):
        read_anatomy(spoiled.checkpoint())
