"""A model whose layers keep different numbers of experts stops vLLM, family by family.

Nothing is served: the model is built from config.json, or where the CPU build has no kernels for
it, its config is read by vLLM's own class. It must refuse, because it would build every layer with
the largest count, or the family's declaration names it among those that misread such models.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from shardsurgeon.checkpoint.anatomy import read_anatomy
from tests.families.specimens import fixture, specimen, written
from tests.families.unequal import pruned_config_of
from tests.serving.asking import answers, planned
from tests.serving.test_specs import ALONE

pytestmark = [pytest.mark.serving, pytest.mark.slow]

STOPS = "AmbiguousGlobalPerLayerAttributeError"
# What vLLM says before it reads a count: of latent attention in layers that differ in anything.
OF_MLA = "Heterogeneous MLA models are not supported"
# Families that vLLM reads with config classes of its own, or with transformers', and that its CPU
# build cannot construct.
BY_CONFIG = (
    *("axk2_light", "bailing_hybrid_vision", "cohere2_moe_vision", "deepseek_ocr"),
    *("deepseek_v32", "deepseek_v4", "deepseek_v41", "deepseek_vl2", "glm4v_moe", "glm5_next"),
    *("glm_moe_dsa", "gpt_oss", "hy_v4", "inkling", "inkling_text", "internvl_hf", "kimi_k2"),
    *("kimi_k25", "kimi_k3", "kimi_linear", "kimi_vl", "mellum", "minimax", "minimax_m3"),
    *("mistral4", "mistral_native", "nemotron_h", "openai_privacy_filter", "qwen3_omni_moe"),
    *("step3_vl", "unlimited_ocr"),
)
# Its config class refuses what it does not store.
REFUSED = {
    "mimo_v2_flash": "mutually exclusive `sliding_window` and `attention_chunk_size`",
    "qwen4_exp": STOPS,
    "step3p5": "The following attributes are missing: ['n_routed_experts']",
}
# What Mistral's own format says beside the counts.
PARAMS = {
    "head_dim": 16,
    "llama_4_scaling": {"beta": 0.1, "original_max_position_embeddings": 8192},
    "max_position_embeddings": 128,
    "rope_theta": 10000.0,
}


def names_of(name: str) -> tuple[str, ...]:
    return read_anatomy(specimen(name).checkpoint()).family.config.overrides


def folder_of(name: str, place: Path, config: Mapping[str, Any]) -> Path:
    """The fixture's folder with another config."""
    folder = written(fixture(name), place)
    if name == "mistral_native":
        (folder / "config.json").unlink()
        (folder / "params.json").write_text(json.dumps({**config, **PARAMS}))
    else:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def unequal(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("unequal")
    names = (*ALONE, *BY_CONFIG, *REFUSED)
    return {name: folder_of(name, place, pruned_config_of(name, unequal=True)) for name in names}


@pytest.fixture(scope="session")
def equal(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("equal")
    names = (*ALONE, *BY_CONFIG)
    return {name: folder_of(name, place, pruned_config_of(name, unequal=False)) for name in names}


@pytest.fixture(scope="session")
def said(unequal: dict[str, Path], equal: dict[str, Path]) -> dict[tuple[str, str], Any]:
    """(fixture, which) → what vLLM's config says of both results, for those of BY_CONFIG."""
    asked: list[object] = []
    for folders in (unequal, equal):
        for name in (n for n in folders if n in BY_CONFIG or n in REFUSED):
            asked += [",".join(names_of(name)), folders[name]]
    lines = answers("counts.py", *asked)
    return {(Path(x["folder"]).name, Path(x["folder"]).parent.name[:5]): x for x in lines}


@pytest.mark.parametrize("name", ALONE)
def test_vllm_builds_no_model_of_unequal_counts(unequal: dict[str, Path], name: str) -> None:
    found = planned(1, tuple(unequal[each] for each in ALONE))[name]
    assert STOPS in found.get("error", "") or OF_MLA in found.get("error", ""), found


@pytest.mark.parametrize("name", ALONE)
def test_vllm_builds_the_model_of_equal_counts(equal: dict[str, Path], name: str) -> None:
    found = planned(1, tuple(equal[each] for each in ALONE))[name]
    assert "error" not in found, found


@pytest.mark.parametrize("name", BY_CONFIG)
def test_unequal_counts_cannot_be_read_from_vllms_configs(
    said: dict[tuple[str, str], Any], name: str
) -> None:
    alike, found = said[name, "equal"], said[name, "unequ"]
    assert all(type(count) is int for count in alike["said"].values()), alike
    misread = "vLLM" in read_anatomy(specimen(name).checkpoint()).family.config.misread_by
    stop = all(STOPS in str(count) for count in found["said"].values())
    assert stop != misread, found


@pytest.mark.parametrize("name", REFUSED)
def test_vllm_refuses_configs_with_what_it_does_not_store(
    said: dict[tuple[str, str], Any], name: str
) -> None:
    assert REFUSED[name] in said[name, "unequ"]["error"]
