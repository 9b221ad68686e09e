"""Experts' biases in other places than the router, and text models below a wrapper's name.

Sigmoid routers (LFM2 MoE, Trinity, Hunyuan 3 and 4, GLM): the pruned model must agree to the last
bit with the original that cannot choose the pruned experts (`masked_model`). Softmax routers
(Qwen4-Exp, Mistral 4, DeepSeek-OCR 2): the original's logits are masked before the softmax, and
the two agree but for the rounding of a sum with fewer terms.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from shardsurgeon.checkpoint.anatomy import read_anatomy
from shardsurgeon.errors import ConfigError, FamilyError
from shardsurgeon.families.schema import family_for
from shardsurgeon.operations import api
from tests.families.masked_model import Kept, load, logits
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

pytestmark = [
    pytest.mark.oracle,
    # A published key that transformers reads but calls old.
    pytest.mark.filterwarnings("ignore:`rope_scaling` is deprecated:FutureWarning"),
]

BUILDERS = {
    **builders("expert_bias"),
    **builders("vision_wrappers"),
    **builders("remote_wrappers"),
    **builders("deepseek_v41"),
}


@dataclass(frozen=True)
class Case:
    """What is known of a fixture: names, MTP tensors and how exact its logits are.

    logits: what masking leaves of them, None where transformers cannot run the model. mtp: the
    tensors that go with the MTP layers, which transformers does not read. text: where transformers
    lacks the wrapper, the part of config.json about the text model, and what its tensors' names
    begin with there and in the text model alone.
    """

    layout: Layout
    logits: Literal["same bits", "but for rounding"] | None
    mtp: str = r"(?!)"
    mtp_layers: int = 0
    main_layers: int = 3
    first_sparse: int = 1
    model_class: Any = AutoModelForCausalLM
    text: tuple[str, str, str] | None = None


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
MISTRAL_LARGE4 = Layout(
    layers=r"layers\.(\d+)\.",
    experts=r"experts\.(\d+)\.w[123]\.weight$",
    sliced=((r"gate\.weight", 0),),
    counts=GLM.counts,
)
OCR2 = replace(GLM, layers=r"model\.layers\.(\d+)\.", sliced=((r"mlp\.gate\.weight", 0),))
KIMI_VL = replace(GLM, layers=r"language_model\.model\.layers\.(\d+)\.")
VL2 = replace(
    OCR2,
    layers=r"language\.model\.layers\.(\d+)\.",
    counts=(("language_config", "n_routed_experts"),),
)
UNLIMITED_OCR = replace(OCR2, counts=VL2.counts)
OCR = replace(OCR2, counts=(("n_routed_experts",), *VL2.counts))
INTERNVL = replace(KIMI_VL, sliced=OCR2.sliced, counts=(("llm_config", "num_experts"),))
INTERNVL_HF = replace(INTERNVL, counts=(("text_config", "num_experts"),))
INTERNVL_GPT_OSS = Layout(
    layers=r"language_model\.model\.layers\.(\d+)\.",
    experts=None,
    sliced=(
        (r"mlp\.experts\.(gate_up|down)_proj(_bias)?", 0),
        (r"mlp\.router\.(weight|bias)", 0),
    ),
    counts=(("llm_config", "num_local_experts"),),
)
INTERNS1 = replace(GLM, sliced=OCR2.sliced, counts=(("text_config", "num_experts"),))
OVIS = replace(INTERNVL, layers=r"llm\.model\.layers\.(\d+)\.")
DEEPSEEK_V41 = Layout(
    layers=r"layers\.(\d+)\.",
    mtp=r"mtp\.(\d+)\.",
    experts=r"ffn\.experts\.(\d+)\.w[123]\.(?:weight|scale)$",
    sliced=((r"ffn\.gate\.(weight|bias|bias_vl)", 0),),
    counts=(("text_config", "n_routed_experts"),),
)
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
    "mistral_large4": WRAPPED(MISTRAL_LARGE4, "but for rounding"),
    "deepseek_ocr2": WRAPPED(OCR2, "but for rounding"),
    "unlimited_ocr": WRAPPED(UNLIMITED_OCR, "but for rounding"),
    "internvl_hf": WRAPPED(INTERNVL_HF, "but for rounding", first_sparse=0),
    "kimi_vl": Case(KIMI_VL, "same bits", text=("text_config", "language_model.", "")),
    "deepseek_vl2": Case(VL2, "but for rounding", text=("language_config", "language.", "")),
    # Its text model is that of OCR 2.
    "deepseek_ocr": Case(OCR, None),
    "internvl_qwen3_moe": Case(
        INTERNVL,
        "but for rounding",
        first_sparse=0,
        text=("llm_config", "language_model.", ""),
    ),
    "internvl_gpt_oss": Case(
        INTERNVL_GPT_OSS,
        "same bits",
        main_layers=2,
        first_sparse=0,
        text=("llm_config", "language_model.", ""),
    ),
    "interns1": Case(
        INTERNS1,
        "but for rounding",
        first_sparse=0,
        text=("text_config", "model.language_model.", "model."),
    ),
    "ovis2_6_moe": Case(OVIS, "but for rounding", first_sparse=0, text=("llm_config", "llm.", "")),
    "deepseek_v41": Case(DEEPSEEK_V41, None, mtp=r"mtp\.", mtp_layers=3, first_sparse=0),
    "deepseek_v41_even": Case(DEEPSEEK_V41, None, mtp=r"mtp\.", mtp_layers=3, first_sparse=0),
}

Pairs = Callable[[str], Pair]
every_family = pytest.mark.parametrize("name", list(BUILDERS))
RUN = [name for name, case in CASES.items() if case.logits]
run_by_transformers = pytest.mark.parametrize("name", [n for n in RUN if not CASES[n].text])


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    """Each fixture by name, built and pruned once."""

    @cache
    def pair(name: str) -> Pair:
        return build_and_prune(name, BUILDERS[name], tmp_path_factory.mktemp(name))

    return pair


@every_family
def test_every_tensor_is_the_sources_renumbered_or_sliced(name: str, pairs: Pairs) -> None:
    assert_tensors_follow(pairs(name), CASES[name].layout, CASES[name].main_layers)


@every_family
def test_every_layer_with_experts_is_pruned_mtp_layers_too(name: str, pairs: Pairs) -> None:
    case = CASES[name]
    layers = range(case.first_sparse, case.main_layers + case.mtp_layers)
    assert list(pairs(name).retained) == list(layers)


@pytest.mark.parametrize("name", [n for n in BUILDERS if n != "deepseek_v41"])
def test_the_count_is_rewritten_and_nothing_else_in_the_config(name: str, pairs: Pairs) -> None:
    assert_config_follows(pairs(name), CASES[name].layout)


@run_by_transformers
def test_a_pruned_model_is_the_original_that_cannot_choose_the_pruned_experts(
    name: str, pairs: Pairs
) -> None:
    pair = pairs(name)
    assert_same_answers(pair.source, pair.folder, pair.retained, CASES[name])


@pytest.mark.parametrize("name", [name for name in RUN if CASES[name].text])
def test_the_text_model_of_a_pruned_wrapper_is_the_originals_that_cannot_choose_the_pruned(
    name: str, pairs: Pairs, tmp_path: Path
) -> None:
    pair, text = pairs(name), CASES[name].text
    assert text
    source, pruned = (alone(f, *text, tmp_path / f.name) for f in (pair.source, pair.folder))
    assert_same_answers(source, pruned, pair.retained, CASES[name])


def assert_same_answers(source: Path, pruned: Path, retained: Kept, case: Case) -> None:
    """The pruned model answers as the original whose routers cannot choose pruned experts."""
    original = load(source, case.model_class, case.mtp)
    result = logits(load(pruned, case.model_class, case.mtp))
    masked = logits(original, retained)
    if case.logits == "same bits":
        assert torch.equal(result, masked)
    else:
        assert_equal_but_for_rounding(result, masked, source)
    # Without the mask they must differ, or the equality above proves nothing.
    assert (result - logits(original)).abs().max() > 1e-2


def alone(folder: Path, section: str, prefix: str, own: str, copy: Path) -> Path:
    """A copy that holds the text model of a wrapper only, under the text model's own names."""
    tensors = {}
    for name, tensor in read_tensors(folder).items():
        if name.startswith((prefix, "lm_head.")):
            tensors[own + name.removeprefix(prefix) if name.startswith(prefix) else name] = tensor
    copy.mkdir()
    (copy / "config.json").write_text(json.dumps(read_config(folder)[section]), encoding="utf-8")
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.logits])
def test_survivors_keep_their_router_logits(name: str, pairs: Pairs) -> None:
    pair, case = pairs(name), CASES[name]
    before, after = read_tensors(pair.source), read_tensors(pair.folder)
    hidden = torch.randn(64, generator=torch.Generator().manual_seed(3))
    routers = [tensor for tensor in before if tensor.endswith(".gate.weight")]
    assert len(routers) == len(pair.retained)
    for router in routers:
        own = case.layout.mtp and re.match(case.layout.mtp, router)
        match = own or re.match(case.layout.layers, router)
        assert match
        keep = pair.retained[int(match[1]) + (case.main_layers if own else 0)]
        old, new = (
            torch.stack([row.float() @ hidden for row in model[router]])
            for model in (before, after)
        )
        assert torch.equal(new, old[keep])


@run_by_transformers
def test_a_re_save_by_transformers_is_read_as_the_same_layers(
    name: str, pairs: Pairs, tmp_path: Path
) -> None:
    pair, case = pairs(name), CASES[name]
    load(pair.source, case.model_class, case.mtp).save_pretrained(tmp_path / "saved")
    pruning = api.plan(tmp_path / "saved", pair.source / "scores.pt", ratio=0.5)
    kept = {number: list(layer.retained) for number, layer in pruning.decision.keep.layers.items()}
    # The MTP layers are not in a re-save.
    assert kept == {
        number: ids for number, ids in pair.retained.items() if number < case.main_layers
    }


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


def test_mtp_stages_with_experts_of_their_own_number_keep_a_count_of_their_own(
    pairs: Pairs,
) -> None:
    pair = pairs("deepseek_v41")
    # 8 experts of a layer and 4 of a stage, pruned by half.
    counts = {layer: len(ids) for layer, ids in pair.retained.items()}
    assert counts == {0: 4, 1: 4, 2: 4, 3: 2, 4: 2, 5: 2}
    expected = read_config(pair.source)
    expected["text_config"] |= {"n_routed_experts": 4, "dspark_n_routed_experts": 2}
    assert read_config(pair.folder) == expected


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
