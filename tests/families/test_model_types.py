"""Every model type of the installed transformers that has experts, and what becomes of it.

A type has experts where its config, or a part of it, has a field that counts them, or where a
fresh config of it does. Each is declared, refused with the reason that stands in a declaration, or
listed below with the reason for neither: nothing falls through.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from typing import Any

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from shardsurgeon.errors import FamilyError
from shardsurgeon.families.schema import family_for

COUNTS = re.compile(r"(?:n_routed|num_local|moe_num|num|n)_experts")

DECLARED = "declared"
# What no declaration speaks of yet; `--family auto` reads those whose names leave no doubt.
UNDECLARED = {
    "afmoe", "axk1", "axk2", "cohere2_moe", "dbrx", "deepseek_ocr2", "deepseek_ocr2_text",
    "exaone_moe", "glm4v_moe", "glm4v_moe_text", "glm5_next", "glm5_next_text", "granitemoe_swa",
    "hy_v3", "hy_v4", "inkling2", "inkling2_text", "kolibri1", "laguna", "lfm2_moe", "minimax",
    "mistral4", "muse_spark", "muse_spark_text", "openai_privacy_filter", "qwen4_exp",
    "qwen4_exp_text", "solar_open",
}  # fmt: skip
# Refused, and why: a word of the reason that a user is told.
REASONS = {
    "doge": "product keys",
    "dots3_note_vision_encoder": "vision encoder",
    "ernie4_5_vl_moe": "two sets of experts",
    "ernie4_5_vl_moe_text": "two sets of experts",
    "jetmoe": "attention heads are experts",
    "nllb-moe": "encoder and decoder",
    "qwen3_omni_moe_talker_text": "talker",
    "switch_transformers": "encoder and decoder",
    "vitpose": "one for each data set",
    "vitpose_backbone": "one for each data set",
    "zaya": "skips the layer",
}


@cache
def with_experts() -> tuple[str, ...]:
    return tuple(name for name, config in CONFIG_MAPPING.items() if has_experts(config))


def has_experts(config: Any) -> bool:
    parts = (config, *getattr(config, "sub_configs", {}).values())
    if any(COUNTS.fullmatch(name) for part in parts for name in fields(part)):
        return True
    # Some configs take their parts from a default only. A few cannot be made without arguments.
    with suppress(Exception):
        return any(COUNTS.fullmatch(key) for key in keys(config().to_dict()))
    return False


def fields(config: Any) -> Iterator[str]:
    for base in config.__mro__ if inspect.isclass(config) else ():
        yield from vars(base).get("__annotations__", {})


def keys(node: object) -> Iterator[str]:
    for key, value in node.items() if isinstance(node, dict) else ():
        yield str(key)
        yield from keys(value)


def outcome(model_type: str) -> str:
    """What a config of this type is for: a declaration, its refusal, or the message without one."""
    try:
        family = family_for({"model_type": model_type, "num_experts": 8}, model_type)
    except FamilyError as error:
        return str(error)
    return family.refusal or DECLARED


def test_every_type_with_experts_is_declared_or_refused_or_listed() -> None:
    assert len(with_experts()) > 90
    outcomes = {name: outcome(name) for name in with_experts()}
    declared = {name for name, said in outcomes.items() if said == DECLARED}
    undeclared = {name for name, said in outcomes.items() if "is not supported" in said}
    assert undeclared == UNDECLARED
    assert outcomes.keys() - declared - undeclared == REASONS.keys()


@pytest.mark.parametrize("model_type", REASONS)
def test_what_is_refused_is_refused_with_its_own_reason(model_type: str) -> None:
    assert REASONS[model_type] in outcome(model_type)


def test_what_is_undeclared_is_never_called_dense() -> None:
    for name in with_experts():
        assert "dense" not in outcome(name), name
